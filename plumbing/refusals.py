"""plumbing/refusals.py: a text in which an LLM says no, in the languages in which examples are common.

Asked for an example on a delicate task, an LLM may put its refusal where the text should stand. As a
positive it would teach that an apology answers any question.

Each pattern begins where the text begins. It wants an apology, "I cannot" and a word of an assistant's work
(help, request, content, ...), so that people who apologize to each other are no refusals; or the words by
which an LLM speaks of itself.
"""
import re

# Between two parts up to 40 characters of the same sentence may stand: spelled "..." in these patterns.
PATTERNS = {
    "English": [
        r"(?:(?:(?:i'm|i am) (?:very |so |truly )?(?:sorry|afraid)|sorry|(?:i )?apologi[sz]e|my apologies|"
        r"unfortunately)\W{1,3}(?:but )?(?:that )?)?(?:as an ai[^.]{0,30}, )?(?:i|we) "
        r"(?:can't|cannot|can not|won't|will not|am not able to|am unable to|must decline to)(?: directly)? "
        r"(?:assist|help (?:you )?with|(?:fulfil|fulfill|comply|provide|create|generate|produce|write|"
        r"answer|translate|engage|continue|complete|share|process|do)\b..."
        r"(?:requests?|content|prompt|this task|(?:this|that)(?:[.!,;]|$)))",
        r"(?:(?:i'm|i am) sorry\W{1,3}(?:but )?)?as an ai(?:,| language| model| assistant)"],
    "German": [
        r"(?:es )?(?:tut mir (?:sehr )?leid|entschuldig\w+|leider|ich bedaure)..."
        r"(?:kann|darf)...(?:nicht|keine)...(?:helfen|unterstützen|anfrage|inhalte?\b|nachkommen)",
        r"ich kann (?:dir |ihnen )?(?:dabei|damit|bei dieser anfrage)...nicht ...helfen",
        r"als (?:ki|sprachmodell|künstliche intelligenz)\b"],
    "French": [
        r"(?:je suis )?(?:vraiment )?(?:désolée?|navrée?|malheureusement)...je ne (?:peux|suis|pourrai)..."
        r"(?:aider|assister|répondre à (?:cette|votre)|contenu|demande)",
        r"je ne peux pas (?:vous |t')?aider (?:avec|à) (?:cela|ça|cette|ce)\b",
        r"en tant qu(?:'|e )(?:ia|intelligence artificielle|assistant|modèle)"],
    "Spanish": [
        r"(?:lo siento|lo lamento|disculp\w+|perdón|lamentablemente)...no (?:puedo|podemos|me es posible)..."
        r"(?:ayudar|asistir|cumplir|contenido|solicitud|petición)",
        r"no puedo (?:ayudar|asistir)(?:te|le)? con (?:es|est)[oae]\b",
        r"como (?:una )?(?:ia|inteligencia artificial|modelo de lenguaje)\b"],
    "Portuguese": [
        r"(?:(?:me )?desculpe|sinto muito|lamento|infelizmente)...não (?:posso|consigo)..."
        r"(?:ajudar|auxiliar|atender|conteúdo|solicitação|pedido)",
        r"não posso (?:te |lhe )?(?:ajudar|auxiliar)(?:-lo|-la)? com (?:isso|isto|ess[ae])\b",
        r"como (?:uma )?(?:ia|inteligência artificial|modelo de linguagem)\b"],
    "Italian": [
        r"(?:mi (?:di)?spiace|spiacente|purtroppo)...non (?:posso|sono in grado)..."
        r"(?:aiutar|assister|soddisfare|contenut|richiesta)",
        r"non posso aiutar(?:ti|la|vi) con (?:quest|ci)",
        r"(?:in quanto|come) (?:ia|intelligenza artificiale|modello linguistico)\b"],
    "Dutch": [
        r"(?:het )?(?:spijt me|sorry|helaas)...kan...(?:niet|geen)...(?:helpen|assisteren|verzoek|inhoud)",
        r"ik kan (?:je |u )?(?:daar|hier)...niet (?:mee |bij )?helpen",
        r"als (?:ai|taalmodel)\b"],
    "Polish": [
        r"(?:przykro mi|przepraszam|niestety)...nie (?:mogę|jestem w stanie)..."
        r"(?:pomóc|spełnić|treści|prośb)",
        r"jako (?:model językowy|sztuczna inteligencja)"],
    "Russian": [
        r"(?:извините|простите|к сожалению|мне жаль|сожалею)...не (?:могу|смогу)..."
        r"(?:помочь|выполнить|запрос|контент)",
        r"я не могу (?:вам )?помочь (?:с|в) эт",
        r"как (?:языковая модель|ии|искусственный интеллект)\b"],
    "Ukrainian": [
        r"(?:вибачте|перепрошую|на жаль)...не (?:можу|зможу)...(?:допомогти|виконати|запит)"],
    "Chinese": [
        r"(?:很|非常)?(?:抱歉|对不起|對不起)...(?:无法|無法|不能|没办法)..."
        r"(?:帮|幫|协助|協助|提供|满足|完成|生成|回答|请求|內容|内容)",
        r"作为(?:一个|一名|一款)?(?:ai|人工智能|大?语言模型)"],
    "Japanese": [
        r"(?:大変)?(?:申し訳|すみません|ごめんなさい|恐れ入ります)..."
        r"(?:手伝い|応え|答え|要望|リクエスト|対応|支援|生成|提供|作成)...(?:できません|かねます|ありません)",
        r"(?:私は)?(?:ai|言語モデル|ai言語モデル)として"],
    "Korean": [
        r"(?:죄송|미안)...(?:도와|도움|요청|제공|생성|답변)...(?:수 없|수는 없|어렵)"],
    "Arabic": [
        r"(?:عذر|آسف|أنا آسف|أعتذر|معذرة|للأسف)...(?:لا|لن) (?:أستطيع|يمكنني|أتمكن)..."
        r"(?:مساعد|تقديم|تلبية|طلب|محتوى)"],
    "Persian": [
        r"(?:متأسف|متاسف|ببخشید|عذر)...(?:نمی\W?توانم|قادر نیستم)...(?:کمک|پاسخ|درخواست|محتوا)"],
    "Indonesian": [
        r"(?:mohon )?maaf...tidak (?:dapat|bisa)...(?:membantu|memenuhi|konten|permintaan)",
        r"sebagai (?:model bahasa|ai)\b"],
    "Turkish": [
        r"(?:üzgünüm|maalesef|özür dilerim)...(?:yardımcı olamam|yardım edemem|yerine getiremem)"],
    "Vietnamese": [
        r"(?:(?:tôi )?xin lỗi|rất tiếc)...không thể...(?:giúp|hỗ trợ|cung cấp|đáp ứng|yêu cầu)"],
}


def refusal_pattern() -> re.Pattern:
    """One pattern of all. A match is a refusal."""
    patterns = []
    for patterns_of_language in PATTERNS.values():
        patterns += patterns_of_language
    return re.compile("|".join(patterns).replace("...", r"[^.!?。！？]{0,40}?"))


REFUSAL = refusal_pattern()


def is_refusal(text: str) -> bool:
    """Whether the text begins with an LLM's refusal.

    >>> is_refusal("I'm sorry, but I can't help with that."), is_refusal("I'm sorry, but I can't come.")
    (True, False)
    """
    head = text[:200].casefold().replace("’", "'").lstrip(" \n\"'*")
    return bool(REFUSAL.match(head))
