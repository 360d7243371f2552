"""plumbing/answers.py: what is read out of an LLM's answer, what is repaired, and what is refused and why."""
import collections
import json
import os
import re
import time

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import generate
from answers import PROMPTS, SMOLLM2, row_of
from plumbing.answers import THOUGHTS, Reject, parse_object, parse_tasks

EXAMPLES = int(os.environ.get("PARSER_EXAMPLES", "300"))       # of each property; the slow tests raise it
ABC = {"S1": "one", "S2": "two", "S3": "three"}
KEYS = list(ABC)


# ------------------------------------------------------------------------------------------ objects by hand

@pytest.mark.parametrize("text, how", [
    ('{"S1": "one", "S2": "two", "S3": "three"}', "clean"),
    ('```json\n{"S1": "one", "S2": "two", "S3": "three"}\n```', "in prose"),
    ('Sure, here it is:\n{"S1": "one", "S2": "two", "S3": "three"}\nHope it helps {smile}!', "in prose"),
    ('<think>maybe {"S1": "x", "S2": "y", "S3": "z"}?</think>{"S1": "one", "S2": "two", "S3": "three"}',
     "clean"),
    ('maybe {"S1": "x", "S2": "y", "S3": "z"}?\n</think>\n{"S1": "one", "S2": "two", "S3": "three"}',
     "clean"),
    ('{"S1": "one", "S2": "two", "S3": "three",}', "repaired"),
    ("{'S1': 'one', 'S2': 'two', 'S3': 'three'}", "repaired"),
    ('{"S1": "4", "S2": "5", "S3": "6"} {"S1": "one", "S2": "two", "S3": "three"}', "doubled"),
    ('{"S1": "one", "S2": "two", "S3": "three"}\n{"S1": "fo', "doubled"),
    ('[{"S1": "one", "S2": "two", "S3": "three"}]', "in prose"),
    ('{"example": {"S1": "one", "S2": "two", "S3": "three"}}', "clean"),
    ('{"S1": "one", "S2": "two", "S3": "three"} and so on and so', "in prose"),
])
def test_objects_that_are_read(text, how):
    assert parse_object(text, KEYS) == (ABC, how)


DRAFT = '{"S1": "x", "S2": "y", "S3": "z"}'
FINAL = json.dumps(ABC)


@pytest.mark.parametrize("opening, closing", THOUGHTS)
def test_a_draft_between_the_marks_of_a_thought_is_never_the_answer(opening, closing):
    thought = f'{opening} ["Given a draft, think of it."] First try: {DRAFT} {closing}'
    assert parse_object(thought + FINAL, KEYS)[0] == ABC
    assert parse_tasks(thought + '["Given a, find b."]') == ["Given a, find b."]
    for begun in ("", '{"S1": "on'):               # the draft alone is no answer, nor with a torn one
        with pytest.raises(Reject):
            parse_object(thought + begun, KEYS, "length")
    assert parse_tasks(opening + ' "Given a draft, think of it."') == []       # a thought without an end


@pytest.mark.parametrize("text", [
    f"Draft: {DRAFT}\nFinal answer: {FINAL}",
    f"{DRAFT}\nThat repeats itself. Better:\n```json\n{FINAL}\n```",
    f"<|channel|>analysis<|message|>{DRAFT}?<|end|><|start|>assistant<|channel|>final<|message|>{FINAL}",
    f"analysisMaybe {DRAFT}?assistantfinal{FINAL}",                # the same, its marks stripped
    f"Let me think: {DRAFT}</reasoning>{FINAL}",                   # the opening mark swallowed
    f"<think>a</think><thinking>{DRAFT}</thinking>{FINAL}",
])
def test_the_last_object_is_the_answer(text):
    assert parse_object(text, KEYS)[0] == ABC


def test_a_draft_before_a_torn_answer_is_no_answer():
    with pytest.raises(Reject, match="^truncated$"):
        parse_object(f'Draft: {DRAFT}\nFinal answer: {{"S1": "one", "S2": "tw', KEYS, "length")


def test_an_object_inside_a_text_is_text():
    value = ABC | {"S3": FINAL}
    assert parse_object(json.dumps(value), KEYS)[0] == value


def test_repairs_keep_the_text():
    text = r"""{'S1': 'It\'s "one"', "S2": "she said "two" and left", 'S3': "\(x\) and \\alpha \u00e9"}"""
    value, _ = parse_object(text, KEYS)
    assert value == {"S1": 'It\'s "one"', "S2": 'she said "two" and left', "S3": r"\(x\) and \alpha é"}
    raw_newline, _ = parse_object('{"S1": "a\nb", "S2": "two", "S3": "three"}', KEYS)
    assert raw_newline["S1"] == "a\nb"


@pytest.mark.parametrize("text, finish_reason, reason", [
    ("", "stop", "empty answer"),
    ("", "length", "truncated"),
    ("<think>and then", "length", "truncated"),
    ('{"S1": "one", "S2": "tw', "length", "truncated"),
    ('{"S1": "one", "S2": "tw', None, "truncated"),
    ('{"S1": "one", "S2": "two", "S3": "three"}', "content_filter", "content filter"),
    ("I can't help with that.", "stop", "refusal"),
    ("Which text do you mean?", "stop", "no JSON object"),
    ("{S1: one}", "stop", "broken JSON"),
    ('{"S1": "one", "S2": "two"}', "stop", "missing keys"),
    ('{"s1": "one", "s2": "two", "s3": "three"}', "stop", "missing keys"),
    ('{"S1": "one", "S2": "two", "S3": "three", "S4": "four"}', "stop", "extra keys"),
    ('{"S1": "one", "S2": "two", "S3": 3}', "stop", "not a string"),
    ('{"S1": "one", "S2": ["two"], "S3": "three"}', "stop", "not a string"),
    ('{"S1": null, "S2": "two", "S3": "three"}', "stop", "not a string"),
    ("x" * 10 * 20_001, "stop", "too long"),
])
def test_answers_are_rejected_for_a_reason(text, finish_reason, reason):
    with pytest.raises(Reject, match=f"^{reason}$"):
        parse_object(text, KEYS, finish_reason)


@pytest.mark.parametrize("text, number", [
    ('["Given a, find b.", "Given c, find d."]', 2),
    ('```json\n["Given a, find b.",\n "Given c, find d.",]\n```', 2),
    ("Here you go:\n['Given a, find b.', 'Given c, find d.']", 2),
    ('["Given a, find b.", "Given c, find d.", "Given e, fi', 2),
    ('1. "Given a, find b."\n2. "Given c, find d."', 2),
    ("1. Given a, find b.\n2) Given c, find d.\n- Given e, find f.", 3),
    ('["short", "Given a, find b.", 5, null, {"task": "x"}]', 1),
    ("No.", 0),
    ("", 0),
    ('{"a": 1}', 0),
])
def test_task_lists(text, number):
    tasks = parse_tasks(text)
    assert len(tasks) == number and all(task.startswith("Given") for task in tasks)


TEA = ['Given the word "tea", find recipes.', "Given c, find d."]
PAIR = ['Given "salt", "tea" or "oil", find its origin.', "Given c, find d."]


@pytest.mark.parametrize("text, tasks", [
    ('["Given the word "tea", find recipes.", "Given c, find d."]', TEA),
    ('["Given the word "tea", find recipes.",\n"Given c, find d.",\n]', TEA),
    ('["Given the word "tea", find recipes.", "Given c, find d.", "Given e, fi', TEA),
    ("['Given the word \"tea\", find recipes.', 'Given c, find d.']", TEA),
    ('["Given "salt", "tea" or "oil", find its origin.", "Given c, find d."]', PAIR),
    ('["Given c, find d.", "Given "salt", "te', PAIR[1:]),                         # torn inside
    ('They want "tasks for text search", I think.\n["Given c, find d."]', PAIR[1:]),
    ('They want "tasks for text search", I think.', []),
    ('As in [1], ["Given c, find d."]', PAIR[1:]),
    ('["Given a draft, find more."] Shorter: ["Given c, find d."]', PAIR[1:]),
    ('[{"task": "Given c, find d."}]', PAIR[1:]),
    ('{"tasks": [{"id": 1, "task": "Given c, find d.", "labels": ["positive words", "negative words"]}]}',
     PAIR[1:]),
])
def test_tasks_are_whole_and_from_the_last_list(text, tasks):
    assert parse_tasks(text) == tasks


# -------------------------------------------------------------------------------------------- any objects

TEXT = st.text(max_size=60)
PROSE = st.text(st.characters(exclude_characters="{}<>", exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.tuples(TEXT, TEXT, TEXT), PROSE, PROSE, st.sampled_from(["", "```json\n", "<think>{hm}</think>"]))
@example(("a </think> b", "<think>", "c"), "Here it is: ", "", "")
@example(("a </think> b", "<think>", "c"), "", "", "<think>{hm}</think>")
def test_any_object_survives_any_wrapping(texts, before, after, fence):
    # A closing tag and then a brace, behind prose: nothing tells that from the end of a thought.
    assume(fence.startswith("<think>") or not re.search(r"</think>.*[{[]", "".join(texts), re.DOTALL))
    value = dict(zip(KEYS, texts))
    assert parse_object(fence + before + json.dumps(value) + after, KEYS)[0] == value


def in_single_quotes(text):
    return "'" + json.dumps(text, ensure_ascii=False)[1:-1].replace("'", r"\'").replace(r"\"", '"') + "'"


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.tuples(TEXT, TEXT, TEXT), st.booleans(), st.booleans())
def test_single_quotes_and_trailing_commas_lose_nothing(texts, single, comma):
    # A quote right before a comma, colon or bracket cannot be told from the end of a string: there is none.
    texts = [re.sub(r"""['"](?=\s*[:,}\]])|[\ud800-\udfff]""", "", text.replace("'", "")) for text in texts]
    value = dict(zip(KEYS, texts))
    quoted = in_single_quotes if single else json.dumps
    pairs = ", ".join(f"{quoted(key)}: {quoted(text)}" for key, text in value.items())
    assert parse_object("{" + pairs + "," * comma + "}", KEYS)[0] == value


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.tuples(TEXT, TEXT, TEXT), st.integers(0, 300))
def test_a_truncated_object_is_never_an_example(texts, length):
    body = json.dumps(dict(zip(KEYS, texts)))
    with pytest.raises(Reject):
        parse_object(body[:min(length, len(body) - 1)], KEYS, "length")


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.text(st.sampled_from("{}[]\"':,\\ \nSu123tdé<>/think"), max_size=200))
def test_no_answer_breaks_the_parser(text):
    try:
        json.dumps(generate.make_example(row_of() | {"response": text}, PROMPTS)).encode()
    except Reject as reason:
        assert str(reason)
    assert all(isinstance(task, str) for task in parse_tasks(text))


@pytest.mark.parametrize("text", [
    "{" * 100_000,
    '{"a":' * 20_000,
    "[" * 100_000,
    '{"a' * 30_000,
    "{'a': '" * 15_000,
    '{"' + "\\" * 100_000,
    "'" * 100_000,
    "<think>" * 15_000,
    '"a", ' * 30_000,
    '{"S1": "' + '", "' * 30_000,
], ids=lambda text: text[:8])
def test_hostile_answers_take_bounded_time(text):
    begun = time.process_time()
    with pytest.raises(Reject):
        parse_object(text, KEYS, "stop")
    parse_tasks(text)
    assert time.process_time() - begun < 5


# ------------------------------------------------------------------------------- a small LLM's real answers

HOW = {"in prose": 2, "doubled": 1}
REASONS = {"truncated": 74, "missing keys": 45, "no JSON object": 29, "extra keys": 15, "broken JSON": 10,
           "copy between fields": 11, "not a string": 7, "label in input": 3, "copy of the prompt": 2,
           "wrong script": 1}


def test_raw_answers_of_a_small_llm():
    """200 answers of SmolLM2-135M (and six brainstorms) as llama.cpp's server gave them: fences, loops.

    Made by tools/models/serve.py and generate.py --model smollm2 --n 200 --tasks 16 --patience 2 --no-json-mode
    --max-answer-tokens 300; sorted by id.
    """
    reasons, hows, brainstormed = collections.Counter(), collections.Counter(), 0
    for row in generate.read_answers(SMOLLM2, PROMPTS, log=False):
        assert row["finish_reason"] in ("stop", "length") and row["usage"]["completion_tokens"] > 0
        if row["step"] == "brainstorm":
            tasks = parse_tasks(row["response"])
            assert all(task.strip('"') == task for task in tasks)
            brainstormed += len(tasks)
            continue
        try:
            made, how = generate.make_example(row, PROMPTS)
            hows[how] += 1
            assert all([made["query"], *made["pos"], *made["neg"]])
        except Reject as reason:
            reasons[str(reason)] += 1
    assert (hows, reasons, brainstormed) == (HOW, REASONS, 24)
