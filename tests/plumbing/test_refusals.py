"""plumbing/refusals.py: an LLM's refusals, and texts that only sound like one."""
import pytest

from answers import recorded
from plumbing.refusals import is_refusal


@pytest.mark.parametrize("text", [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, but I can’t assist with that request.",
    "Sorry, I cannot fulfill this request because it asks for personal data.",
    "I cannot create content that promotes violence.",
    "I apologize, but I am unable to provide this content.",
    "Unfortunately, I can't do that.",
    "As an AI language model, I have no opinions.",
    "I'm sorry, but as an AI assistant, I don't have access to files.",
    "Es tut mir leid, aber dabei kann ich nicht helfen.",
    "Es tut mir leid, aber ich kann Ihnen bei dieser Anfrage nicht helfen.",
    "Je suis désolé, mais je ne peux pas vous aider avec cette demande.",
    "Lo siento, pero no puedo ayudar con eso.",
    "Desculpe, mas não posso ajudar com isso.",
    "Mi dispiace, ma non posso aiutarti con questa richiesta.",
    "Het spijt me, maar ik kan hier niet mee helpen.",
    "Przykro mi, ale nie mogę w tym pomóc.",
    "Извините, но я не могу помочь с этим запросом.",
    "Вибачте, але я не можу допомогти з цим.",
    "很抱歉，我无法协助您完成这个请求。",
    "申し訳ありませんが、そのご要望にはお応えできません。",
    "죄송하지만 그 요청은 도와드릴 수 없습니다.",
    "عذراً، لا أستطيع مساعدتك في هذا الطلب.",
    "متأسفم، اما نمی‌توانم در این مورد کمک کنم.",
    "Maaf, saya tidak dapat membantu dengan permintaan itu.",
    "Üzgünüm, bu konuda yardımcı olamam.",
    "Xin lỗi, tôi không thể giúp bạn với yêu cầu này.",
])
def test_refusals(text):
    assert is_refusal(text) and is_refusal(f'"{text}"')


@pytest.mark.parametrize("text", [
    "I'm sorry, but I can't come to the meeting on Friday.",
    "Sorry, I cannot find my keys.",
    "We cannot provide a refund after thirty days.",
    "As an AI researcher, she trains models.",
    "The assistant said: I'm sorry, but I can't help with that.",
    "Es tut mir leid, dass du krank bist.",
    "Je suis désolé d'être en retard.",
    "Lo siento mucho, llegaré tarde.",
    "Извините за опоздание, поезд не пришёл.",
    "很抱歉，火车晚点了。",
    "申し訳ありませんが、駅はどちらですか。",
])
def test_people_who_apologize_are_no_refusals(text):
    assert not is_refusal(text)


def test_no_recorded_answer_is_a_refusal():
    assert not any(is_refusal(row["response"]) for row in recorded())
