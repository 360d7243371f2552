"""plumbing/completion.py: what a completion holds, whatever a server left out or put elsewhere.

Text comes as a string, as a list of parts, or beside an empty content as the thoughts of a model. Usage
comes whole, without its reasoning tokens, or not at all. An answer is paid for, so nothing of it is thrown
away: where the text is not all that there is, the message is kept as it came.
"""
from plumbing.ledger import estimate_tokens

THOUGHTS = ("reasoning_content", "reasoning")


def text_of(content, message) -> str:
    """The text of an answer: its content, joined if it comes in parts; the thoughts where there is none."""
    text = joined(content)
    if text.strip() or not isinstance(message, dict):
        return text
    for key in THOUGHTS:
        thoughts = joined(message.get(key))
        if thoughts.strip():
            return thoughts
    return text


def joined(content) -> str:
    """A string as it is, or the texts of a list of parts, one after another.

    >>> joined([{"type": "text", "text": "a"}, {"type": "thinking", "thinking": []}, "b"])
    'ab'
    """
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return joined(content.get("text"))
    if isinstance(content, list):
        return "".join(joined(part) for part in content)
    return ""


def whole_message(message) -> dict:
    """{"message": as it came} for raw.jsonl, where the message is more than a role and a string; else {}."""
    if not isinstance(message, dict):
        return {}
    more = [key for key, value in message.items() if value and key not in ("role", "content")]
    if more or not isinstance(message.get("content"), str):
        return {"message": message}
    return {}


def usage_of(usage, message: str, text: str) -> dict:
    """{"prompt_tokens", "completion_tokens"}, whole numbers, and "estimated" where the server gave none.

    Some count the tokens of thoughts in the total alone: the larger of the two is what is paid.
    """
    usage = usage if isinstance(usage, dict) else {}
    counts = [usage.get(key) for key in ("prompt_tokens", "completion_tokens", "total_tokens")]
    tokens_in, tokens_out, total = map(whole_number, counts)
    if tokens_in is None or tokens_out is None:
        return {"prompt_tokens": estimate_tokens(message), "completion_tokens": estimate_tokens(text),
                "estimated": True}
    return {"prompt_tokens": tokens_in, "completion_tokens": max(tokens_out, (total or 0) - tokens_in)}


def whole_number(value) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 2**53:
        return None
    return int(value) if value == int(value) else None
