r"""plumbing/answers.py: an LLM's answer -> values. An LLM is asked for JSON and sends nearly JSON.

It wraps the object in prose or a code fence, thinks aloud and drafts before it, forgets to escape quotes,
writes Python's quotes, adds commas or LaTeX's backslashes, stops in the middle, or begins a second object.
`parse_object` and `parse_tasks` read what can be read without guessing. Whether a text is fit to be trained
on, texts.py tells.

`Reject` is how an answer is refused: not an error, but a reason that the report counts.
"""
import itertools
import json
import re

from plumbing.refusals import is_refusal
from plumbing.texts import MAX_CHARS, bad_characters

MOST_OPENINGS = 100     # brackets at which reading is tried: a wall of them stays linear
# How LLMs mark what they think before they answer. What stands between two marks is never data.
THOUGHTS = [("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"),
            ("<thoughts>", "</thoughts>"), ("<reasoning>", "</reasoning>"),
            ("<reflection>", "</reflection>"), ("<analysis>", "</analysis>"),
            ("<scratchpad>", "</scratchpad>"),
            ("[THINK]", "[/THINK]"),                                       # Mistral
            ("<|channel|>analysis", "<|channel|>final"),                   # gpt-oss
            ("analysis<|message|>", "<|channel|>final"), ("<|channel|>commentary", "<|channel|>final"),
            ("<|START_THINKING|>", "<|END_THINKING|>"),                    # Cohere
            ("<seed:think>", "</seed:think>"), ("<unused94>", "<unused95>"),       # ByteDance, MedGemma
            ("◁think▷", "◁/think▷"),                                       # Kimi
            ("<|begin_of_thought|>", "<|end_of_thought|>"), ("<|inner_prefix|>", "<|inner_suffix|>")]
THOUGHT_ENDS = [closing for _, closing in THOUGHTS] + ["assistantfinal"]   # gpt-oss, its marks stripped


class Reject(Exception):
    """An answer that cannot become an example; str(error) is the reason."""


def reject_if(condition, reason: str) -> None:
    """Raise Reject(reason) if the condition holds."""
    if condition:
        raise Reject(reason)


# -------------------------------------------------------------------------------- the object in an answer

def parse_object(text: str, keys: list[str], finish_reason: str | None = None) -> tuple[dict, str]:
    """The last complete object in an answer that has all the keys -> (object, clean | in prose | repaired |
    doubled). What comes before it may be a draft.

    Raises Reject if there is none, or if it has more keys or a value that is no string.

    >>> parse_object('Draft: {"S1": "x", "S2": "y"}. Better: {"S1": "a", "S2": "b",}', ["S1", "S2"])
    ({'S1': 'a', 'S2': 'b'}, 'repaired')
    """
    reject_if(finish_reason == "content_filter", "content filter")
    reject_if(len(text) > 10 * MAX_CHARS, "too long")
    text = after_thinking(text).strip()
    objects, last = 0, None
    for value, repaired, end in find_objects(text, keys):
        objects += 1
        if all(key in value for key in keys):
            last = value, repaired, end
    if last:
        value, repaired, end = last
        words_first = not re.match(r"(```\w*\s*)?[{[]", text)
        rest = text[end:]
        another_begun = f'"{keys[0]}"' in rest and rest.count("{") > rest.count("}")
        reject_if(words_first and another_begun, "truncated")      # this one may have been a draft
        reject_if(len(value) > len(keys), "extra keys")
        reject_if(not all(isinstance(value[key], str) for key in keys), "not a string")
        return value, how_it_stood(text, keys[0], repaired)
    reject_if(finish_reason == "length" or text.count("{") > text.count("}"), "truncated")
    reject_if(not text, "empty answer")
    reject_if(objects, "missing keys")
    reject_if("{" in text, "broken JSON")
    reject_if(is_refusal(text), "refusal")
    raise Reject("no JSON object")


def how_it_stood(text: str, first_key: str, repaired: bool) -> str:
    """How an object stood in its answer, in one of four words for the report."""
    if repaired:
        return "repaired"
    if text.count(f'"{first_key}"') > 1:
        return "doubled"                           # a draft or another object beside it, or a loop
    if text.startswith("{") and text.endswith("}"):
        return "clean"
    return "in prose"


def after_thinking(text: str) -> str:
    """The answer without the thoughts before it: all of it is thought where their closing mark is missing.

    >>> after_thinking("[THINK]Shall I write {}?[/THINK]{1}"), after_thinking("<think>and then")
    ('{1}', '')
    """
    text = text.lstrip()
    if text.startswith("{"):                        # most answers
        return text
    closing = closing_mark(text)
    while closing:
        text = text.partition(closing)[2].lstrip()
        closing = closing_mark(text)
    if text.startswith(("{", "[")):
        return text
    for closing in THOUGHT_ENDS:                    # some servers swallow the opening mark
        _, mark, tail = text.rpartition(closing)
        if mark and re.search(r"[{[]", tail):       # else the mark is a word of the answer's own
            text = tail
    return text


def closing_mark(text: str) -> str | None:
    """The mark that ends the thought with which a text begins, if it begins with one."""
    for opening, closing in THOUGHTS:
        if text.startswith(opening):
            return closing
    return None


# ---------------------------------------------------------------------------------------- repair of JSON

DECODER = json.JSONDecoder(strict=False)         # takes raw line breaks inside strings, the commonest slip


def string_pattern(repeat: str) -> str:
    """A regular expression for a string literal in either kind of quotes; its two groups hold what is
    inside.

    The string ends at the first quote of its kind behind which JSON could go on, so quotes inside need no
    escape. repeat: how many characters, "*" for any number. (?>...) is atomic: once a string has matched, a
    mismatch behind it never makes it longer. That keeps the search linear.
    """
    character = r"(?:\\.|[^\\])"
    end = r"(?=\s*[:,}\]])"
    double_quoted = rf'"({character}{repeat}?)"{end}'
    single_quoted = rf"'({character}{repeat}?)'{end}"
    return f"(?>{double_quoted}|{single_quoted})"


STRING = string_pattern("*")
PAIR = re.compile(rf"\s*{STRING}\s*:\s*{STRING}\s*(?:,|(?=\}}))", re.DOTALL)     # "key": "value" and a comma


def find_objects(text: str, keys: list[str]):
    """Yield (object, whether it was repaired, where it ends) for each readable JSON object in a text, outer
    ones first. What stands inside an object that has the keys is its own text, and no object."""
    end = 0
    for opening in itertools.islice(re.finditer(r"\{", text), MOST_OPENINGS):
        start = opening.start()
        if start < end:
            continue
        value, repaired, after = read_object(text, start)
        if value is not None:
            yield value, repaired, after
            if all(key in value for key in keys):
                end = after


def read_object(text: str, start: int) -> tuple[dict | None, bool, int]:
    """The object that begins at text[start] -> (object or None, whether it was repaired, where it ends)."""
    try:
        value, end = DECODER.raw_decode(text, start)
        return value, False, end
    except (ValueError, RecursionError):
        value, end = repair_object(text, start)
        return value, True, end


def repair_object(text: str, start: int) -> tuple[dict | None, int]:
    """The flat object of strings that begins at text[start], despite wrong quotes and commas; or None."""
    value = {}
    position = start + 1
    while match := PAIR.match(text, position):
        key_in_double, key_in_single, value_in_double, value_in_single = match.groups("")
        key = unescape(key_in_double or key_in_single)
        value[key] = unescape(value_in_double or value_in_single)
        position = match.end()
    position += len(text[position:]) - len(text[position:].lstrip())
    ended = text.startswith("}", position)
    return (value if value and ended else None), position + 1


def unescape(inside: str) -> str:
    r"""The text of a string literal, given what stands between its quotes. Takes what JSON forbids, too.

    >>> unescape(r'a "word" and \\alpha, \(x\), it\'s')
    'a "word" and \\alpha, \\(x\\), it\'s'
    """
    inside = re.sub(r'\\(.)|"', legal_escape, inside, flags=re.DOTALL)
    try:
        return json.loads(f'"{inside}"', strict=False)
    except ValueError:
        return inside


def legal_escape(match) -> str:
    """A backslash and its character, or a bare quote, as JSON wants it."""
    character = match[1]
    if character is None:                           # a bare quote
        return r"\""
    if character in '"\\/bfnrtu':                   # one of JSON's own escapes
        return match[0]
    if character == "'":                            # Python's
        return "'"
    return "\\" + match[0]                          # no escape but a backslash, as LaTeX has them


# ----------------------------------------------------------------------------------- the list in an answer

# A string in a list ends at the quote behind which the list goes on or ends, or the answer stops.
ITEM_ENDS = r"""(?=\s*(?:,\s*["'{\]]|\]|,?\s*\Z))"""
ITEM = re.compile(rf"""\s*(["'])((?:\\.|[^\\]){{0,2000}}?)\1{ITEM_ENDS}\s*,?""", re.DOTALL)
# Without a list, a task is a line behind a bullet or a number, or a line in quotes.
TASK_LINE = re.compile(r"""^\s*(?:(?:[-*•]|\d+[.)])\s+(.+)|["“]([^"“”\n]+)["”],?\s*)$""", re.MULTILINE)


def parse_tasks(text: str) -> list[str]:
    """The tasks in a brainstorming answer: its last JSON list that has some, or what can be saved of it, or
    a bulleted list.

    >>> parse_tasks('1. Given a name, find a date.\\n2. Given a date, find a name.')
    ['Given a name, find a date.', 'Given a date, find a name.']
    """
    text = after_thinking(text)[:5 * MAX_CHARS]
    tasks = []
    end = 0
    for opening in itertools.islice(re.finditer(r"\[", text), MOST_OPENINGS):
        start = opening.start()
        if start >= end:                               # else it stands inside of the list before it
            items, end = read_list(text, start)
            tasks = tasks_among(items) or tasks
    return tasks or tasks_among([bullet or quoted for bullet, quoted in TASK_LINE.findall(text)])


def read_list(text: str, start: int) -> tuple[list, int]:
    """The list that begins at text[start], despite wrong quotes and a missing end -> (items, where it
    ends)."""
    try:
        return DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        pass
    items = []
    position = start + 1
    while match := ITEM.match(text, position):
        items.append(unescape(match[2]))
        position = match.end()
    return rejoin(items), position


def rejoin(pieces: list[str]) -> list[str]:
    """Pieces of strings that ended too early, at quotes inside of them, are put together again.

    Quotes come in pairs: a piece with an odd number goes on in the next one, unless it ends a sentence.

    >>> rejoin(['Given a "pro', 'con" list, find another.', 'Given a 5" pipe, find its price.'])
    ['Given a "pro", "con" list, find another.', 'Given a 5" pipe, find its price.']
    """
    whole = []
    begun = ""
    for piece in pieces:
        begun += piece
        if begun.count('"') % 2 == 0 or begun.endswith((".", "!", "?", "。")):
            whole.append(begun)
            begun = ""
        else:
            begun += '", "'
    return whole                                       # what was begun and never ended is a fragment


def tasks_among(items: list) -> list[str]:
    """The tasks among the items of a list: strings, or objects like {"task": "..."}."""
    tasks = []
    for item in items:
        if isinstance(item, dict):
            strings = [value for value in item.values() if isinstance(value, str)]
            item = item.get("task", strings[0] if len(strings) == 1 else None)
        if isinstance(item, str):
            task = " ".join(item.split()).strip('"“”')
            if 10 <= len(task) <= 500 and not bad_characters(task):
                tasks.append(task)
    return tasks
