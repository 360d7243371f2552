"""plumbing/completion.py: all of an answer that was paid for, wherever a server puts it."""
import pytest

from plumbing.completion import text_of, usage_of, whole_message

PARTS = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}},
         {"type": "text", "text": "b"}]
THINKING = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
            {"type": "text", "text": "c"}]


@pytest.mark.parametrize("message, text, whole", [
    ({"content": "plain"}, "plain", False),
    ({"role": "assistant", "content": "plain", "refusal": None, "tool_calls": []}, "plain", False),
    ({"content": PARTS}, "ab", True),
    ({"content": THINKING}, "c", True),
    ({"content": ["a", {"type": "text", "text": {"text": "b"}}, 7, None]}, "ab", True),
    ({"content": None, "reasoning_content": "thought"}, "thought", True),
    ({"content": "", "reasoning": "thought"}, "thought", True),
    ({"content": "said", "reasoning_content": "thought"}, "said", True),
    ({"content": None, "refusal": "I won't"}, "", True),
    ({"content": None}, "", True),
    ({}, "", True),
])
def test_texts_and_whole_messages(message, text, whole):
    assert text_of(message.get("content"), message) == text
    assert whole_message(message) == ({"message": message} if whole else {})


@pytest.mark.parametrize("usage, tokens", [
    ({"prompt_tokens": 10, "completion_tokens": 20}, (10, 20)),
    ({"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}, (10, 20)),
    ({"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 530}, (10, 520)),    # with the thoughts
    ({"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 5}, (10, 20)),
    ({"prompt_tokens": 10.0, "completion_tokens": 20, "total_tokens": "?"}, (10, 20)),
])
def test_what_is_paid_is_the_larger_count(usage, tokens):
    assert usage_of(usage, "m", "t") == {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}


@pytest.mark.parametrize("usage", [None, [], {}, {"prompt_tokens": 1},
                                   {"prompt_tokens": True, "completion_tokens": 1},
                                   {"prompt_tokens": -1, "completion_tokens": 1},
                                   {"prompt_tokens": 1.5, "completion_tokens": 1},
                                   {"prompt_tokens": 1, "completion_tokens": float("nan")}])
def test_usage_that_says_nothing_is_estimated(usage):
    estimate = {"prompt_tokens": 11, "completion_tokens": 21, "estimated": True}
    assert usage_of(usage, "m" * 40, "t" * 80) == estimate
