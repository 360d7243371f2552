"""plumbing/complaints.py: what a server means that answers with anything but a completion.

Servers share the shape of a completion, but each refuses in its own words. All knowledge of these words is
here, as tables: what may pass, what may have been billed, what a prompt's moderation looks like, which field
of the body is not taken, and which flag mends a complaint.
"""
import re

HINTS = {401: "check OPENAI_API_KEY", 402: "the account needs credit", 403: "check what the key may do",
         404: "check OPENAI_BASE_URL, which mostly ends in /v1, and --model",
         407: "the proxy wants a password",
         429: "the quota is used up"}
NO_QUOTA = {"insufficientquota", "billinghardlimitreached"}

# ------------------------------------------------------------------------------------------------- statuses

# 498: no capacity now; 499: a gateway gave up on its server.
PASSING = {408, 409, 425, 429, 498, 499}
NEVER_PASSING = {501, 505, 506, 510, 511}
# A gateway lost the answer, or did not wait for it. The server behind it may have written, and billed, one.
PERHAPS_PAID = {408, 499, 504, 520, 522, 524, 598, 599}

# Where others are answered, one of these says something of this prompt: too long, too odd for a firewall.
OF_ONE_PROMPT = {400, 403, 413, 422, 451}


def is_success(status) -> bool:
    return isinstance(status, int) and 200 <= status < 300


def may_pass(status) -> bool:
    """Whether the same request may be answered later. All of the 5xx may, but a few that are final."""
    return status in PASSING or 500 <= status < 600 and status not in NEVER_PASSING


# ---------------------------------------------------------------------------------------- words and codes

def error_of(answer, content: str) -> tuple[str, str | None]:
    """(message, code) of a server's error, {"error": {"message", "code" or "type"}}; else all it sent."""
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict) or not error:
        return content, None
    return str(error.get("message")), error.get("code") or error.get("type")


def complaint_of(answer, text: str) -> str:
    """A server's message, headed by the code and the field that stand beside it."""
    error = answer.get("error") if isinstance(answer, dict) else None
    beside = [error.get(key) for key in ("code", "param")] if isinstance(error, dict) else []
    return " ".join([*(value for value in beside if isinstance(value, str)), text])


def codes_of(answer) -> set[str]:
    """The names that a server gives its error, wherever it puts them, as bare small letters.

    >>> sorted(codes_of({"error": {"code": "DataInspectionFailed", "type": "bad_request"}}))
    ['badrequest', 'datainspectionfailed']
    """
    values, codes = [answer], set()
    while values:
        value = values.pop()
        if not isinstance(value, dict):
            continue
        values += [value.get(key) for key in ("error", "innererror", "inner_error", "metadata")]
        for key in ("code", "type", "error_type", "error_code", "param"):
            if isinstance(value.get(key), str):
                codes.add(re.sub("[^a-z]", "", value[key].lower()))
    return codes


# ---------------------------------------------------------------- what a provider thinks of this one prompt

MODERATION_CODES = {
    "contentfilter", "contentpolicyviolation", "contentpolicy", "contentblocked", "contentmoderation",
    "datainspectionfailed", "invalidprompt", "moderation", "moderationblocked", "moderationerror",
    "prohibitedcontent", "promptblocked", "responsibleaipolicyviolation", "riskcontent", "safety",
    "safetyviolation", "sensitivecontent", "inputmoderation", "unsafecontent", "flaggedinput",
    "contentsafety", "inputsensitive", "sensitive"}
MODERATION_WORDS = re.compile(
    "content (management|usage|safety) policy|content[ _](filter|moderat)|inappropriate content|"
    "(violat|against)[^.]{0,40}(content|usage|safety)[^.]{0,20}polic|input was flagged|prompt was flagged|"
    "flagged (by|as|for) [^.]{0,30}(moderation|violat|sexual|violence|hate|unsafe)|"
    "(input|prompt|request|content)[^.]{0,40}(unsafe|sensitive|prohibited) (content|words|information)|"
    "(blocked|rejected) (by|as a result of) [^.]{0,20}(safety|moderation|content)|data may contain", re.I)


def is_moderation(status: int, codes: set[str], text: str) -> bool:
    """Whether a prompt was refused for its content. It would be again, so this counts as an answer."""
    if status not in (400, 403, 422, 451):
        return False
    return bool(codes & MODERATION_CODES) or bool(MODERATION_WORDS.search(text))


# What the model wrote did not pass the server's own check of JSON: chance, and the next try may do better.
BAD_LUCK = {"jsonvalidatefailed", "jsongenerationfailed", "outputparsefailed", "failedgeneration"}


# ----------------------------------------------------------------------------------- fields of the body

# Some servers do not take these; the words by which they name them.
FIELDS = {"max_tokens": r"max_tokens", "temperature": r"\btemperature\b", "top_p": r"\btop_p\b",
          "response_format": r"response.format|json.object|json.mode|json.schema"}
NEUTRAL = {"temperature": 1.0, "top_p": 1.0}    # what a server does anyway, if the field is left out
FLAGS = {r"max_(new_|completion_|output_)?tokens|context length|too many tokens": "--max-answer-tokens",
         r"\btemperature\b": "--temperature", r"\btop_p\b": "--top-p",
         r"response.format|json.object|json.mode|json.schema|grammar": "--no-json-mode"}
NOT_TAKEN = re.compile(
    r"\bun(supported|known|recogni[sz]ed|expected|available)|\bextra (inputs|fields)|additional propert|"
    r"\bno longer\b|deprecated|\bonly one\b|instead|n[o']t (be )?(both |be )?(\w+ )?(support|take|accept|"
    r"allow|available|permit|recogni|implement|enabled|compatible|specif|use|combin|have|set)|: no$", re.I)
BOUNDED = re.compile(r"too (large|high|big|long|many)|at most|maximum|exceed|(more|less|greater|larger) "
                     r"than|up to|\brange\b|between|reduce|<=|>=", re.I)
NOT_BOTH = re.compile(r"\bboth\b|only one|together|simultaneously|one of|either", re.I)


def fields_not_taken(status: int, text: str, body: dict) -> set[str]:
    """The fields of the body that a refusal says the server does not take.

    A number that is out of bounds is no such case: the user has to choose another. But a field that asks for
    nothing special can always go. Of two fields that exclude each other, the one goes that asks for nothing.
    """
    if status not in (400, 422):
        return set()
    named = {field for field, words in FIELDS.items() if field in body and re.search(words, text, re.I)}
    neutral = {field for field in named if body[field] == NEUTRAL.get(field)}
    if {"temperature", "top_p"} <= named and NOT_BOTH.search(text):
        return {"temperature"} if neutral == {"temperature"} else {"top_p"}
    not_taken = bool(NOT_TAKEN.search(text)) and not BOUNDED.search(text)
    named_alone = {field for field in named if not_taken or field == "response_format"}
    return named_alone | neutral


def hint_of(status: int, text: str) -> str:
    """The way out of a refusal, in a few words."""
    if status in HINTS:
        return HINTS[status]
    if status in (400, 413, 422):
        flags = [flag for words, flag in FLAGS.items() if re.search(words, text, re.I)]
        if flags:
            return "try another " + ", ".join(flags).replace("another --no-json", "--no-json")
    return "no retry would help"
