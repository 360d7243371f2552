"""plumbing/texts.py: scripts, code, labels: whether a text is fit to be trained on."""
import random
import zlib

import pytest

import generate
from answers import PROMPTS, recorded, reject_reason, row_of
from plumbing.texts import contains_label, is_code, repetitive, script, wrong_script

KEYS = ["S1", "S2", "S3"]


@pytest.mark.parametrize("language, text, wrong", [
    ("Japanese", "これは日本語で書かれた十分に長い文章です。", False),
    ("Japanese", "这是一个用中文写的足够长的句子而不是日语的句子。", True),
    ("Chinese", "这是一个用中文写的足够长的句子而不是别的语言。", False),
    ("Russian", "This sentence was written in English.", True),
    ("Russian", "Print", False),                   # too short to tell
    ("English", "日本語の文章がここに書かれていますがなぜでしょう。", True),
    ("Hindi", "यह वाक्य हिन्दी में लिखा गया है और काफ़ी लंबा है।", False),
    ("Serbian", "Ova rečenica je napisana latinicom.", False),
    ("Serbian", "Ова реченица је написана ћирилицом.", False),
    ("Russian", "import math  # возвращает площадь круга\ndef area(radius): return math.pi * radius", False),
])
def test_scripts(language, text, wrong):
    row = row_of(language=language, **{key: f"{text} {i}" for i, key in enumerate(KEYS)})
    if wrong:
        assert reject_reason(row) == "wrong script"
    else:
        generate.make_example(row, PROMPTS)


def test_one_letter_in_twenty_is_enough():
    assert not wrong_script("x" * 19 + "й", ["CYRILLIC"])
    assert wrong_script("x" * 20 + "й", ["CYRILLIC"])


def test_a_label_is_whole_words():
    assert contains_label("It is NOT  true!", "not true") and not contains_label("Nottrue", "true")
    assert contains_label("这部电影很负面", "负面")


def wrong_script_letter_by_letter(text, scripts):
    """The same in its plainest form."""
    letters = [one for one in map(script, text[:2000]) if one]
    right = sum(one in scripts for one in letters)
    return len(letters) >= 20 and 20 * right < len(letters)


def test_the_fast_script_check_is_the_plain_one():
    rng = random.Random(0)
    texts = ["".join(rng.choices("abyz é12ßйщ漢あ .", k=rng.randrange(60))) for _ in range(3000)]
    texts += ["a" * 1999 + "й" * 200, "x" * 19, "x" * 20, "", "a" * 300 + "й" * 90, "a" * 1900 + "й" * 99,
              "a" * 1905 + "й" * 95, "й" * 99 + "a" * 1881, "й" * 99 + "a" * 1882]
    for text in texts:
        for scripts in (["LATIN"], ["CYRILLIC"], ["HIRAGANA", "KATAKANA"], ["CYRILLIC", "LATIN"]):
            assert wrong_script(text, scripts) == wrong_script_letter_by_letter(text, scripts)


CODE = ["def area(radius):\n    return math.pi * radius",
        "SELECT name FROM users WHERE age > 30 ORDER BY name;",
        "for (int i = 0; i < n; i++) { total += prices[i]; }",
        "<p class='note'>An example of a paragraph</p>",
        r"\frac{a}{b} = \sqrt{\alpha + \beta}"]


def test_code_is_known():
    assert all(map(is_code, CODE))
    prose = [row["response"].split('": "')[1] for row in recorded() if row["type"] in ("sts", "bitext")]
    assert sum(map(is_code, prose)) < 0.01 * len(prose)


@pytest.mark.parametrize("code", CODE)
def test_code_under_a_question_in_another_script_is_kept(code):
    row = row_of("short-long", "Russian", user_query="Напиши пример, который это делает.",
                 positive_document=code, hard_negative_document=code + "\n" + CODE[0])
    assert generate.make_example(row, PROMPTS)[0]["pos"] == [code]


def test_prose_in_another_script_is_dropped_beside_code():
    row = row_of("short-long", "Russian", user_query="Write an example that does exactly this, please.",
                 positive_document=CODE[0], hard_negative_document=CODE[1])
    assert reject_reason(row) == "wrong script"


def test_repetition_is_what_zlib_says():
    """The look at the words before saves time, and changes nothing."""
    texts = ["once more " * 80, "a" * 400, "ab, " * 200, "一二三" * 200, "No. " * 90 + "Yes.", "x y " * 500]
    for row in recorded()[::10]:
        texts += [row["response"], row["response"][:100] * 20, row["response"] + "again and again. " * 500]
    for text in texts:
        raw = text.encode()
        assert repetitive(text) == (len(text) > 300 and 10 * len(zlib.compress(raw)) < len(raw))


def test_a_label_with_neighbours():
    assert contains_label("pre-true", "true") and not contains_label("untrue, trueness, true_", "true")
    assert contains_label("untrue but true", "true") and contains_label("true", "true")
