"""plumbing/texts.py: is a text fit to be trained on?

Each function answers one question of one text. The lesson asks, and says which answer drops an example. Half
a million answers are read again by each report, so a function looks for the plain case first.
"""
import functools
import re
import unicodedata
import zlib
from collections import Counter

from plumbing.errors import check

MAX_CHARS = 20_000      # longer texts are loops, and training truncates at 512 tokens anyway
CODE_MARKS = re.compile(r"[({\[=;<>_\\]|\):|[a-z]\.[a-z]")     # no closing ones: a pair counts once


@functools.lru_cache(100)                         # a text of a row is asked for several times
def normalize(text: str) -> str:
    """The form in which two texts count as the same: Unicode NFKC, no case, single spaces.

    >>> normalize(" A  ﬁrst\\tText")
    'a first text'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def check_texts(where: str, texts: dict) -> None:
    """Refuse what is no text, or an empty one, or holds half a surrogate pair, which UTF-8 cannot.

    texts: {name: value}; where: "path:line".
    """
    for name, text in texts.items():
        is_text = isinstance(text, str) and text.strip() and not re.search(r"[\ud800-\udfff]", text)
        check(is_text, f"{where}: its {name} is no text: {text!r:.40}: mend or delete this line")


def bad_characters(text: str) -> bool:
    r"""Whether it holds control characters (a bare \frac becomes a form feed), lone surrogates or U+FFFD."""
    return bool(re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffd]", text))


def repetitive(text: str) -> bool:
    """Whether it repeats itself over and over: zlib shrinks it to a tenth, prose to a half or a third."""
    if len(text) <= 300:
        return False
    words = text.split()
    if 10 * len(words) > len(text) and 4 * len(set(words)) > len(words):     # too many different words
        return False
    raw = text.encode()
    return 10 * len(zlib.compress(raw)) < len(raw)


@functools.cache
def script(character: str) -> str | None:
    """A letter's script, the first word of its Unicode name; None for what is no letter.

    >>> script("й"), script("漢"), script("é"), script("7")
    ('CYRILLIC', 'CJK', 'LATIN', None)
    """
    if not character.isalpha():
        return None
    return unicodedata.name(character, "?").split()[0].split("-")[0]


def wrong_script(text: str, scripts: list[str], enough=20) -> bool:
    """Whether a text of at least `enough` letters holds next to none of the language's letters.

    Its first 2,000 characters count. One letter in twenty suffices: code, formulas and quotations are Latin
    in any language. So 100 letters decide, which a short piece of most texts has.
    """
    text = text[:2000]
    if text.isascii() and "LATIN" in scripts:
        return False
    for piece in (text[:300], text):
        letters = right = 0
        for character, number in Counter(piece).items():
            script_of_character = script(character)
            if script_of_character:
                letters += number
            if script_of_character in scripts:
                right += number
        if right >= 100:
            return False
    return letters >= enough and 20 * right < letters


def is_code(text: str) -> bool:
    """Whether a text is code or formulas, which are Latin in any language: to twenty letters, there is one
    of the marks that prose seldom has.

    >>> is_code("for (i = 0; i < n; i++) total += a[i];"), is_code("A loop (see above) adds up all values.")
    (True, False)
    """
    text = text[:2000]
    marks = len(CODE_MARKS.findall(text))
    return marks >= 2 and 20 * marks >= sum(map(str.isalpha, text))


def contains_label(text: str, label: str) -> bool:
    """Whether a label stands in the text: as whole words, or anywhere in scripts that don't put spaces."""
    text, label = normalize(text), normalize(label)
    anywhere = script(label[-1]) in ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
    start = text.find(label)
    while start >= 0:
        neighbours = text[max(0, start - 1):start] + text[start + len(label):][:1]
        if anywhere or not any(one.isalnum() or one == "_" for one in neighbours):
            return True
        start = text.find(label, start + 1)
    return False
