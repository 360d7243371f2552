"""generate.py: sampling, parsing, cleaning, HTTP, ledger and resume, against real sockets on 127.0.0.1."""

import collections
import email.utils
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import generate
import llm
from fault_server import KEY, FaultServer

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "data/recorded.jsonl.gz"
PROMPTS = generate.load_prompts()
POOLS = {kind: [f"Task {i} of {kind} for tests." for i in range(50)] for kind in PROMPTS["task_types"]}
EXAMPLES = int(os.environ.get("PARSER_EXAMPLES", "300"))  # of each property; the slow tests raise it


def recorded():
    with gzip.open(RECORDED, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def row_of(kind="sts", language="English", task="Find it.", **values):
    """A row as raw.jsonl has it, whose answer is a valid object of the type unless values say otherwise."""
    texts = dict(
        zip(PROMPTS["task_types"][kind]["keys"], ["A first text.", "Quite another text.", "A third one."])
    )
    params = generate.request_at(
        0, 0, {**PROMPTS, "task_types": {kind: PROMPTS["task_types"][kind]}}, POOLS, {"m": 1}
    )
    params = params["params"] | {"language": language, "task": task}
    return {
        "id": 7,
        "step": "generate",
        "type": kind,
        "params": params,
        "response": json.dumps(texts | values),
    }


# ---- sampling ----


def test_templates_render_the_recorded_prompts():
    for row in recorded():
        assert generate.render(PROMPTS, **row) == row["messages"][0]["content"]


def test_shares_languages_and_values_follow_the_data():
    n = 20_000
    requests = [generate.request_at(i, 0, PROMPTS, POOLS, {"a": 3, "b": 1}) for i in range(n)]
    share = lambda hits: sum(hits) / n  # noqa: E731
    for kind, task in PROMPTS["task_types"].items():
        assert share(r["type"] == kind for r in requests) == pytest.approx(task["weight"], abs=0.015)
    assert share(r["model"] == "a" for r in requests) == pytest.approx(0.75, abs=0.015)
    single = [r for r in requests if r["type"] != "bitext"]
    languages = collections.Counter(r["params"]["language"] for r in single)
    assert languages["English"] / len(single) == pytest.approx(0.431, abs=0.015)
    assert languages["Polish"] / len(single) == pytest.approx(0.030, abs=0.006)
    assert languages["Welsh"] / len(single) == pytest.approx(0.198 / 79, abs=0.0015)
    assert len(PROMPTS["languages"]) == 93 == len(languages)
    pairs = [
        (r["params"]["source_language"], r["params"]["target_language"])
        for r in requests
        if r["type"] == "bitext"
    ]
    assert all(source != target for source, target in pairs) and len(set(pairs)) > 500
    for kind, placeholders in PROMPTS["placeholders"].items():
        of_kind = [r for r in requests if r["type"] == kind]
        for name, values in placeholders.items():
            counts = collections.Counter(r["params"][name] for r in of_kind)
            assert set(counts) == set(values)
            assert min(counts.values()) > 0.75 * len(of_kind) / len(values)
        if kind in POOLS and PROMPTS["task_types"][kind]["brainstorm"]:
            assert {r["params"]["task"] for r in of_kind} == set(POOLS[kind])


def test_request_i_depends_on_seed_and_i_alone_and_stays_as_it_is():
    ask = lambda i, seed=0: generate.request_at(i, seed, PROMPTS, POOLS, {"a": 3, "b": 1})  # noqa: E731
    assert [ask(i) for i in (5, 3, 5)] == [ask(5), ask(3), ask(5)]
    assert ask(5) != ask(5, seed=1) | {"id": 5}
    # Frozen: a change of this hash remaps every run that users have begun.
    digest = hashlib.sha256(json.dumps([ask(i) for i in range(200)]).encode()).hexdigest()
    assert digest[:16] == "979549d052771a0e"


def test_weights_in_a_value_list():
    import random

    rng = random.Random("x")
    drawn = collections.Counter(generate.draw(rng, {"a": 9, "b": 1, "never": 0}) for _ in range(5000))
    assert set(drawn) == {"a", "b"} and drawn["a"] / 5000 == pytest.approx(0.9, abs=0.02)


def test_a_placeholder_without_values_is_a_user_error(tmp_path):
    for path in generate.PROMPTS.iterdir():
        (tmp_path / path.name).write_text(path.read_text("utf-8"), "utf-8")
    (tmp_path / "sts.txt").write_text("Write {poem} in {language}.")
    with pytest.raises(llm.UserError, match="poem"):
        generate.load_prompts(tmp_path)


# ---- parsing ----

ABC = {"S1": "one", "S2": "two", "S3": "three"}
GOOD = [
    ('{"S1": "one", "S2": "two", "S3": "three"}', "clean"),
    ('```json\n{"S1": "one", "S2": "two", "S3": "three"}\n```', "in prose"),
    ('Sure, here it is:\n{"S1": "one", "S2": "two", "S3": "three"}\nHope it helps {smile}!', "in prose"),
    (
        '<think>maybe {"S1": "x", "S2": "y", "S3": "z"}?</think>{"S1": "one", "S2": "two", "S3": "three"}',
        "clean",
    ),
    (
        'maybe {"S1": "x", "S2": "y", "S3": "z"}?\n</think>\n{"S1": "one", "S2": "two", "S3": "three"}',
        "clean",
    ),
    ('{"S1": "one", "S2": "two", "S3": "three",}', "repaired"),
    ("{'S1': 'one', 'S2': 'two', 'S3': 'three'}", "repaired"),
    ('{"S1": "one", "S2": "two", "S3": "three"} {"S1": "4", "S2": "5", "S3": "6"}', "doubled"),
    ('{"S1": "one", "S2": "two", "S3": "three"}\n{"S1": "fo', "doubled"),
    ('[{"S1": "one", "S2": "two", "S3": "three"}]', "in prose"),
    ('{"example": {"S1": "one", "S2": "two", "S3": "three"}}', "clean"),
    ('{"S1": "one", "S2": "two", "S3": "three"} and so on and so', "in prose"),
]


@pytest.mark.parametrize("text, found", GOOD)
def test_objects_are_found(text, found):
    value, how = generate.parse_object(text, list(ABC))
    assert value == ABC and how == found


def test_repairs_keep_the_text():
    text = r"""{'S1': 'It\'s "one"', "S2": "she said "two" and left", 'S3': "\(x\) and \\alpha \u00e9"}"""
    value, _ = generate.parse_object(text, list(ABC))
    assert value == {"S1": 'It\'s "one"', "S2": 'she said "two" and left', "S3": r"\(x\) and \alpha é"}
    raw_newline, _ = generate.parse_object('{"S1": "a\nb", "S2": "two", "S3": "three"}', list(ABC))
    assert raw_newline["S1"] == "a\nb"


@pytest.mark.parametrize(
    "text, finish, reason",
    [
        ("", "stop", "empty answer"),
        ("", "length", "truncated"),
        ("<think>and then", "length", "truncated"),
        ('{"S1": "one", "S2": "tw', "length", "truncated"),
        ('{"S1": "one", "S2": "tw', None, "truncated"),
        ('{"S1": "one", "S2": "two", "S3": "three"}', "content_filter", "content filter"),
        ("I can't help with that.", "stop", "no JSON object"),
        ("{S1: one}", "stop", "broken JSON"),
        ('{"S1": "one", "S2": "two"}', "stop", "missing keys"),
        ('{"s1": "one", "s2": "two", "s3": "three"}', "stop", "missing keys"),
        ('{"S1": "one", "S2": "two", "S3": "three", "S4": "four"}', "stop", "extra keys"),
        ('{"S1": "one", "S2": "two", "S3": 3}', "stop", "not a string"),
        ('{"S1": "one", "S2": ["two"], "S3": "three"}', "stop", "not a string"),
        ('{"S1": null, "S2": "two", "S3": "three"}', "stop", "not a string"),
        ("x" * 10 * 20_001, "stop", "too long"),
    ],
)
def test_answers_are_rejected_for_a_reason(text, finish, reason):
    with pytest.raises(generate.Reject, match=f"^{reason}$"):
        generate.parse_object(text, list(ABC), finish)


TEXT = st.text(max_size=60)
PROSE = st.text(st.characters(exclude_characters="{}<>", exclude_categories=["Cs"]), max_size=30)


def quote_single(text):
    return "'" + json.dumps(text, ensure_ascii=False)[1:-1].replace("'", r"\'").replace(r"\"", '"') + "'"


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.tuples(TEXT, TEXT, TEXT), PROSE, PROSE, st.sampled_from(["", "```json\n", "<think>{hm}</think>"]))
@example(("a </think> b", "<think>", "c"), "Here it is: ", "", "")
@example(("a </think> b", "<think>", "c"), "", "", "<think>{hm}</think>")
def test_any_object_survives_any_wrapping(texts, before, after, fence):
    # A closing tag and then a brace, behind prose: nothing tells that from the end of a thought.
    assume(fence.startswith("<think>") or not re.search(r"</think>.*[{[]", "".join(texts), re.DOTALL))
    value = dict(zip(ABC, texts))
    body = fence + before + json.dumps(value) + after
    assert generate.parse_object(body, list(ABC))[0] == value


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.tuples(TEXT, TEXT, TEXT), st.booleans(), st.booleans())
def test_single_quotes_and_trailing_commas_lose_nothing(texts, single, comma):
    # A quote directly before a comma, colon or bracket can't be told from the end of a string, so none
    # stands there.
    texts = [re.sub(r"""['"](?=\s*[:,}\]])|[\ud800-\udfff]""", "", text.replace("'", "")) for text in texts]
    value, dump = dict(zip(ABC, texts)), quote_single if single else json.dumps
    body = "{" + ", ".join(f"{dump(key)}: {dump(text)}" for key, text in value.items()) + "," * comma + "}"
    assert generate.parse_object(body, list(ABC))[0] == value


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.tuples(TEXT, TEXT, TEXT), st.integers(0, 300))
def test_a_cut_object_is_never_an_example(texts, length):
    body = json.dumps(dict(zip(ABC, texts)))
    with pytest.raises(generate.Reject):
        generate.parse_object(body[: min(length, len(body) - 1)], list(ABC), "length")


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.text(st.sampled_from("{}[]\"':,\\ \nSu123tdé<>/think"), max_size=200))
def test_no_answer_breaks_the_parser(text):
    row = row_of() | {"response": text}
    try:
        json.dumps(generate.make_example(row, PROMPTS)).encode()
    except generate.Reject as reason:
        assert str(reason)
    assert all(isinstance(task, str) for task in generate.parse_tasks(text))


@pytest.mark.parametrize(
    "text",
    [
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
    ],
)
def test_hostile_answers_take_bounded_time(text):
    begun = time.process_time()
    with pytest.raises(generate.Reject):
        generate.parse_object(text, list(ABC), "stop")
    generate.parse_tasks(text)
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(
    "text, number",
    [
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
    ],
)
def test_task_lists(text, number):
    tasks = generate.parse_tasks(text)
    assert len(tasks) == number and all(task.startswith("Given") for task in tasks)


SMOLLM2 = ROOT / "tests/data/smollm2_raw.jsonl.gz"
FOUND = {"in prose": 2, "repaired": 1, "doubled": 1}
REASONS = {
    "truncated": 74,
    "missing keys": 45,
    "no JSON object": 29,
    "extra keys": 15,
    "broken JSON": 10,
    "copy between fields": 10,
    "not a string": 7,
    "label in input": 3,
    "copy of the prompt": 2,
    "wrong script": 1,
}


def test_raw_answers_of_a_small_llm():
    """200 answers of SmolLM2-135M (and six brainstorms) as llama.cpp's server gave them: prose, fences, cuts, loops.

    Made by tools/serve.py and generate.py --model smollm2 --n 200 --tasks 16 --patience 2 --no-json-mode
    --max-answer-tokens 300; sorted by id.
    """
    rows = list(generate.read_answers(SMOLLM2, PROMPTS, log=False))
    reasons, found, brainstormed = collections.Counter(), collections.Counter(), 0
    for row in rows:
        assert row["finish_reason"] in ("stop", "length") and row["usage"]["completion_tokens"] > 0
        if row["step"] == "brainstorm":
            tasks = generate.parse_tasks(row["response"])
            assert all(task.strip('"') == task for task in tasks)
            brainstormed += len(tasks)
            continue
        try:
            example, how = generate.make_example(row, PROMPTS)
            found[how] += 1
            assert all([example["query"], *example["pos"], *example["neg"]])
        except generate.Reject as reason:
            reasons[str(reason)] += 1
    assert (found, reasons, brainstormed) == (FOUND, REASONS, 35)


# ---- cleaning ----


def reject_reason(row):
    with pytest.raises(generate.Reject) as caught:
        generate.make_example(row, PROMPTS)
    return str(caught.value)


def test_an_example_of_each_type():
    for kind in PROMPTS["task_types"]:
        row = row_of(kind)
        if kind == "bitext":
            row["params"] |= {"source_language": "Welsh", "target_language": "English"}
        example, _ = generate.make_example(row, PROMPTS)
        assert example["query"] == "A first text." and example["pos"] == ["Quite another text."]
        assert example["neg"] == (["A third one."] if len(PROMPTS["task_types"][kind]["keys"]) == 3 else [])
        assert example["prompt"] == {
            "sts": "Retrieve semantically similar text.",
            "bitext": "Retrieve parallel sentences.",
        }.get(kind, "Find it.")
        assert example["language"] == ("Welsh-English" if kind == "bitext" else "English")
        assert (example["type"], example["id"]) == (kind, 7)


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"S2": "  "}, "empty text"),
        ({"S2": "x y " * 6000}, "too long"),
        ({"S2": "a \ud800 b"}, "bad characters"),
        ({"S2": "a \f b"}, "bad characters"),
        ({"S2": "once more " * 80}, "repetition"),
        ({"S2": " a FIRST  text."}, "copy between fields"),
        ({"S3": "Quite another text."}, "copy between fields"),
        ({"S1": "the same topic with details that differ"}, "copy of the prompt"),
        ({"S1": "Это предложение написано по-русски."}, "wrong script"),
    ],
)
def test_rejected_texts(values, reason):
    assert reject_reason(row_of(**values)) == reason


def test_labels_inside_the_input():
    good = row_of("long-short", input_text="Untrue words were said.", label="true", misleading_label="false")
    generate.make_example(good, PROMPTS)  # no whole word
    bad = row_of("long-short", input_text="What he said is True.", label="true", misleading_label="false")
    assert reject_reason(bad) == "label in input"
    bad = row_of("long-short", input_text="Not false at all.", label="true", misleading_label="false")
    assert reject_reason(bad) == "label in input"
    chinese = row_of(
        "long-short", "Chinese", input_text="这部电影很负面", label="负面", misleading_label="正面"
    )
    assert reject_reason(chinese) == "label in input"


@pytest.mark.parametrize(
    "language, text, wrong",
    [
        ("Japanese", "これは日本語で書かれた十分に長い文章です。", False),
        ("Japanese", "这是一个用中文写的足够长的句子而不是日语的句子。", True),
        ("Chinese", "这是一个用中文写的足够长的句子而不是别的语言。", False),
        ("Russian", "This sentence was written in English.", True),
        ("Russian", "Print", False),  # too short to tell
        ("English", "日本語の文章がここに書かれていますがなぜでしょう。", True),
        ("Hindi", "यह वाक्य हिन्दी में लिखा गया है और काफ़ी लंबा है।", False),
        ("Serbian", "Ova rečenica je napisana latinicom.", False),
        ("Serbian", "Ова реченица је написана ћирилицом.", False),
        (
            "Russian",
            "import math  # возвращает площадь круга\ndef area(radius): return math.pi * radius",
            False,
        ),
    ],
)
def test_scripts(language, text, wrong):
    row = row_of(language=language, **{key: f"{text} {i}" for i, key in enumerate(ABC)})
    if wrong:
        assert reject_reason(row) == "wrong script"
    else:
        generate.make_example(row, PROMPTS)


def test_short_texts_are_judged_together():
    row = row_of("short-short", "Polish", input="Час и закреплять", positive_document="Лалькусьий")
    assert reject_reason(row) == "wrong script"


def test_every_language_has_scripts_that_its_recorded_texts_use():
    assert set(PROMPTS["scripts"]) <= set(PROMPTS["languages"])
    dropped = collections.Counter()
    for row in recorded():
        if row["step"] == "generate":
            try:
                generate.make_example(row, PROMPTS)
            except generate.Reject as reason:
                dropped[str(reason)] += 1
    assert dropped == {"label in input": 1}


def test_duplicates_are_found_after_normalisation(tmp_path):
    rows = [row_of(), row_of(S1="a  FIRST text.", S3="Other."), row_of(S1="A new one.")]
    report = generate.write_examples(rows, PROMPTS, tmp_path / "out.jsonl")
    assert report["examples"] == 2 and report["dropped"] == {"duplicate": 1}
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_replay_of_the_recorded_answers(tmp_path, capsys):
    assert generate.main(["--replay", str(RECORDED), "--out", str(tmp_path / "s.jsonl")]) == 0
    examples = [json.loads(line) for line in (tmp_path / "s.jsonl").open(encoding="utf-8")]
    assert len(examples) == 2030
    assert "label in input 1" in capsys.readouterr().out
    for example in examples:
        assert set(example) == {"prompt", "query", "pos", "neg", "type", "language", "id"}
        assert (
            example["prompt"]
            and example["query"]
            and len(example["pos"]) == 1
            and all(example["pos"] + example["neg"])
        )
    report = json.loads((tmp_path / "s/report.json").read_text())
    assert report["type"]["bitext"] == 360 and sum(report["type"].values()) == report["examples"] == 2030
    assert report["distinct prompts"] == len({example["prompt"].casefold() for example in examples})
    query_lengths = sorted(len(example["query"]) for example in examples if example["type"] == "sts")
    assert report["characters"]["sts query"]["p50"] == query_lengths[len(query_lengths) // 2]


# ---- live runs ----


def raw_ids(folder, step="generate"):
    return [row["id"] for row in llm.read_jsonl(folder / "raw.jsonl") if row["step"] == step]


def started(folder):
    return list(llm.read_jsonl(folder / "started.jsonl"))


def test_a_run_asks_each_index_once_and_extends(live):
    server = FaultServer()
    assert live(server) == 0
    assert sorted(raw_ids(live.folder)) == list(range(40))
    tasks = (live.folder / "tasks.jsonl").read_text()
    assert len(tasks.splitlines()) == 60
    first = {row["id"]: row for row in llm.read_jsonl(live.folder / "raw.jsonl")}
    asked = server.requests
    assert live(server) == 0 and server.requests == asked  # nothing is asked twice
    assert live(server, n=70) == 0 and server.requests == asked + 30
    assert (live.folder / "tasks.jsonl").read_text() == tasks
    rows = list(llm.read_jsonl(live.folder / "raw.jsonl"))
    assert sorted(raw_ids(live.folder)) == list(range(70))
    assert {row["id"]: row for row in rows if row["id"] in first} == first
    for row in rows:  # what was sent is what the settings say, and nothing else
        if row["step"] == "generate":
            pools = collections.defaultdict(list)
            for task in map(json.loads, tasks.splitlines()):
                pools[task["type"]].append(task["task"])
            request = generate.request_at(row["id"], 0, PROMPTS, pools, {"m": 1.0})
            assert {key: row[key] for key in request} == request
            assert generate.render(PROMPTS, **request) in server.answered
    body = server.bodies[-1]
    assert (body["temperature"], body["top_p"], body["model"]) == (1, 1, "m") and len(body["messages"]) == 1


def test_connections_are_reused(live):
    server = FaultServer()
    live(server, "--concurrency", "4", n=200)
    assert (
        server.requests > 200 and server.connections <= 4 * 5
    )  # four threads, a few waves of brainstorming


def test_models_share_the_requests(live):
    server = FaultServer()
    live(server, "--model", "big:0.75", "--model", "llama3:8b:0.25", n=200)
    counts = collections.Counter(body["model"] for body in server.bodies)
    assert counts["big"] / server.requests == pytest.approx(0.75, abs=0.12) and set(counts) == {
        "big",
        "llama3:8b",
    }


def test_faults_lose_and_double_nothing(live):
    server = FaultServer(
        {
            "status-429": 0.05,
            "status-500": 0.05,
            "cut": 0.05,
            "garbage": 0.05,
            "truncated": 0.05,
            "headless": 0.05,
            "reset": 0.05,
            "half-headers": 0.05,
            "no-usage": 0.05,
            "drip": 0.01,
            "hang": 0.01,
        },
        hang=6,
    )
    assert live(server, "--timeout", "2.5", n=300) == 0
    assert sorted(raw_ids(live.folder)) == list(range(300))
    assert all(server.fault_counts.get(name) for name in server.faults)
    report = json.loads((live.folder / "report.json").read_text())
    paid_for_nothing = sum(
        server.fault_counts[name]
        for name in server.faults
        if name not in ("status-429", "status-500", "no-usage")
    )
    assert report["ledger"]["tries perhaps paid without an answer"] == paid_for_nothing
    assert report["ledger"]["answers with estimated usage"] == server.fault_counts["no-usage"]
    assert (
        sum("refused" in row for row in started(live.folder))
        == server.fault_counts["status-429"] + server.fault_counts["status-500"]
    )


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured_by_all_threads(live, as_date):
    limited = []

    def script(number, body, headers):
        if number == 10:
            limited.append(time.monotonic())
            value = email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "1"
            return 429, {"error": {"message": "slow down"}}, {"Retry-After": value}

    server = FaultServer(scripted=script, delay=0.01)
    assert live(server, "--concurrency", "2", n=60) == 0
    after = [t - limited[0] for t in server.times if t > limited[0] + 0.2]
    assert min(after) >= 0.95  # a date has whole seconds, so two are one at least


def test_backoff_grows_and_tries_are_bounded(live):
    server = FaultServer({"status-503": 1.0})
    assert live(server, "--tries", "4", "--concurrency", "1", "--tasks", "1", n=1, backoff=0.1) == 1
    gaps = [b - a for a, b in zip(server.times, server.times[1:])]
    assert (
        all(gap >= 0.05 * 2**i for i, gap in enumerate(gaps[:3])) and gaps[0] < 0.15
    )  # jitter takes up to a half
    assert not live.out.exists()
    assert server.requests <= 4 * 2  # a dead server stops the run early


@pytest.mark.parametrize(
    "status, error, words",
    [
        (400, {"message": "bad body"}, "bad body"),
        (401, {"message": f"Incorrect API key {KEY} provided"}, "check OPENAI_API_KEY"),
        (403, {"message": "forbidden"}, "403"),
        (404, {"message": "no such model"}, "--model"),
        (302, {"message": "moved"}, "302"),
        (429, {"message": "no money", "code": "insufficient_quota"}, "quota"),
        (429, {"message": "no money", "type": "insufficient_quota", "code": None}, "quota"),
    ],
)
def test_hopeless_answers_stop_at_once(live, status, error, words):
    server = FaultServer(scripted=lambda *_: (status, {"error": error}, {"Location": "http://127.0.0.1:1/"}))
    with pytest.raises(llm.UserError) as caught:
        live(server, "--concurrency", "2")
    assert words in str(caught.value) and "\n" not in str(caught.value) and KEY not in str(caught.value)
    assert server.requests <= 2
    assert not any(
        "tokens_in" in row and row["id"] not in {r["id"] for r in started(live.folder) if "refused" in r}
        for row in started(live.folder)
    )


@pytest.mark.parametrize(
    "field, message",
    [
        (
            "max_tokens",
            "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
        ),
        ("temperature", "Unsupported value: 'temperature' does not support 1.0 with this model."),
        ("response_format", "json_object mode is not available"),
    ],
)
def test_fields_that_a_server_refuses_are_switched_once(live, field, message):
    def script(number, body, headers):
        if field in body:
            return 400, {"error": {"message": message}}, {}

    server = FaultServer(scripted=script)
    assert live(server, "--concurrency", "3", n=30) == 0
    refused = sum(field in body for body in server.bodies)
    assert 1 <= refused <= 3  # at most once a thread
    assert ("max_completion_tokens" in server.bodies[-1]) == (field == "max_tokens")
    assert sorted(raw_ids(live.folder)) == list(range(30))


def test_a_field_refused_under_both_names_stops(live):
    server = FaultServer(
        scripted=lambda *_: (400, {"error": {"message": "max_tokens, max_completion_tokens: no"}}, {})
    )
    with pytest.raises(llm.UserError, match="max_completion_tokens"):
        live(server, "--concurrency", "1")
    assert server.requests == 2


def test_a_filtered_prompt_counts_as_answered(live):
    def script(number, body, headers):
        if "JSON object" in body["messages"][0]["content"]:
            return 400, {"error": {"message": "filtered", "code": "content_filter"}}, {}

    server = FaultServer(scripted=script)
    assert live(server, n=10) == 0
    asked = server.requests
    assert live(server, n=10) == 0 and server.requests == asked
    assert json.loads((live.folder / "report.json").read_text())["dropped"] == {"content filter": 10}


def test_the_key_appears_nowhere(live, capfd):
    def script(number, body, headers):
        assert headers["authorization"] == f"Bearer {KEY}"
        if number % 5 == 0:
            return 500, {"error": {"message": f"your key {KEY} is fine, we are not"}}, {}
        if number % 5 == 1 and "JSON object" in body["messages"][0]["content"]:
            text = json.dumps({"choices": [{"message": {"content": f"key {KEY}"}, "finish_reason": KEY}]})
            return 200, text.replace("sk-", "\\u0073k-").encode(), {}

    live(FaultServer(scripted=script), n=30)
    for path in live.folder.parent.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "url, key, words",
    [
        ("http://example.com/v1", KEY, "--allow-http"),
        ("ftp://example.com/v1", KEY, "OPENAI_BASE_URL"),
        ("https://user:pass@example.com/v1", KEY, "OPENAI_BASE_URL"),
        ("", "", "OPENAI_API_KEY"),
        ("https://example.com/v1", "sk-\nfoo-bar-baz", "OPENAI_API_KEY"),
        ("https://example.com/v1", "sk-é-foo-bar-baz", "OPENAI_API_KEY"),
    ],
)
def test_unsafe_or_broken_settings_are_refused(tmp_path, monkeypatch, url, key, words):
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(llm.UserError) as caught:
        generate.main(["--model", "m", "--out", str(tmp_path / "x.jsonl")])
    assert (
        words in str(caught.value)
        and (not key or key not in str(caught.value))
        and "pass" not in str(caught.value)
    )


def test_a_proxy_is_used_and_netrc_is_not(live, monkeypatch, tmp_path):
    proxy = FaultServer()
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("default login someone password secret\n")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("no_proxy", "")
    direct = FaultServer()
    direct.url = "http://llm.invalid/v1"
    assert live(direct, "--allow-http", n=5) == 0
    assert proxy.requests >= 5 and proxy.headers[0]["authorization"] == f"Bearer {KEY}"


# ---- ledger ----


def test_budgets_are_never_passed(live):
    for name, flags, limit in [
        ("tokens", ["--budget-tokens", "40_000"], 40_000),
        ("usd", ["--budget-usd", "0.05", "--price", "m:1:2"], 0.05),
    ]:
        server = FaultServer(delay=0.002)
        assert (
            live(
                server, *flags, "--max-answer-tokens", "500", "--out", str(live.out.with_stem(name)), n=1000
            )
            == 0
        )
        folder = live.out.with_stem(name).with_suffix("")
        ledger = json.loads((folder / "report.json").read_text())["ledger"]
        used = [len(body["messages"][0]["content"]) // 4 for body in server.bodies]
        assert ledger["tokens in"] == sum(used)
        assert 0.9 * limit < ledger[name] <= limit
        asked = server.requests
        assert (
            live(
                server, *flags, "--max-answer-tokens", "500", "--out", str(live.out.with_stem(name)), n=1000
            )
            == 0
        )
        assert server.requests - asked < 10  # only what still fits
        ids = raw_ids(folder)
        assert len(ids) == len(set(ids)) < 1000


def test_tries_that_may_be_paid_count_against_the_budget(live):
    server = FaultServer({"cut": 1.0})
    assert live(server, "--budget-tokens", "5000", "--max-answer-tokens", "1000", "--tries", "1000") == 0
    assert server.requests == 4  # of about 1,150 each


def test_a_server_that_is_down_costs_nothing(live):
    server = FaultServer()
    server.close()
    assert live(server, "--tries", "2", "--budget-tokens", "20_000") == 1
    rows = started(live.folder)
    assert sum("tokens_in" in row for row in rows) == sum(row.get("refused") == "unsent" for row in rows) > 0
    assert llm.Run(live.folder, {}, read_only=True).ledger()["tries perhaps paid without an answer"] == 0


def test_a_budget_needs_prices(tmp_path):
    with pytest.raises(llm.UserError, match="--price b:IN:OUT"):
        generate.main(
            [
                "--model",
                "a",
                "--model",
                "b",
                "--price",
                "a:1:2",
                "--budget-usd",
                "1",
                "--out",
                str(tmp_path / "x.jsonl"),
            ]
        )


def test_torn_lines_are_cut_and_redone(live):
    server = FaultServer()
    live(server, n=20)
    asked, raw = server.requests, live.folder / "raw.jsonl"
    whole = raw.read_bytes()
    for cut in (1, 7, len(whole.splitlines(keepends=True)[-1]) - 1):
        raw.write_bytes(whole[:-cut])
        assert live(server, n=20) == 0
        asked += 1
        assert server.requests == asked
        assert sorted(raw_ids(live.folder)) == list(range(20))
    ledger = json.loads((live.folder / "report.json").read_text())["ledger"]
    assert ledger["tries perhaps paid without an answer"] == 3


def test_a_broken_line_in_the_middle_is_named(live):
    live(FaultServer(), n=5)
    raw = live.folder / "raw.jsonl"
    lines = raw.read_text().splitlines(keepends=True)
    lines[2] = "garbage\n"
    raw.write_text("".join(lines))
    with pytest.raises(llm.UserError, match=r"raw\.jsonl:3"):
        live(FaultServer(), n=5)


def test_a_full_disk_leaves_no_torn_line(tmp_path):
    class Full:
        """A file that takes ten bytes of each line."""

        def __init__(self, path):
            self.file, self.name = open(path, "ab+", buffering=0), str(path)

        def write(self, data):
            return self.file.write(data[:10])

        def __getattr__(self, name):
            return getattr(self.file, name)

    llm.append(open(tmp_path / "log", "ab", buffering=0), {"a": 1})
    with pytest.raises(llm.UserError, match="disk"):
        llm.append(Full(tmp_path / "log"), {"b": "long enough"})
    assert (tmp_path / "log").read_text() == '{"a": 1}\n'


@pytest.mark.parametrize(
    "flags, words",
    [(["--seed", "1"], "seed"), (["--model", "other"], "models"), (["--temperature", "0.5"], "temperature")],
)
def test_other_settings_are_refused(live, flags, words):
    server = FaultServer()
    live(server, n=5)
    asked = server.requests
    with pytest.raises(llm.UserError, match=words):
        live(server, *flags, n=5)
    assert server.requests == asked


def test_changed_tasks_or_prompts_are_refused(live, monkeypatch):
    server = FaultServer()
    live(server, n=5)
    with (live.folder / "tasks.jsonl").open("a") as file:
        file.write('{"type": "sts", "task": "More."}\n')
    with pytest.raises(llm.UserError, match="tasks.jsonl"):
        live(server, n=6)
    monkeypatch.setattr(generate, "load_prompts", lambda: PROMPTS | {"num_tasks": 21})
    with pytest.raises(llm.UserError, match="prompts"):
        live(server, n=6)


def test_one_process_at_a_time(live):
    holder = llm.Run(live.folder, {})
    with pytest.raises(llm.UserError, match="another process"):
        live(FaultServer())
    holder.lock.close()
    assert live(FaultServer(), n=5) == 0


def test_brainstorming_ends_when_nothing_new_comes(live):
    tasks = json.dumps([f"Given a {word}, find its opposite." for word in ("word", "name", "fact")])

    def script(number, body, headers):
        if body["messages"][0]["content"].startswith("Suggest"):
            return 200, {"choices": [{"message": {"content": tasks}, "finish_reason": "stop"}]}, {}

    server = FaultServer(scripted=script)
    assert live(server, "--patience", "3", "--tasks", "400", n=20) == 0
    assert len((live.folder / "tasks.jsonl").read_text().splitlines()) == 4 * 3
    brainstorms = len(raw_ids(live.folder, "brainstorm"))
    assert 4 * 4 <= brainstorms <= 4 * 4 + 400 // 20


def test_a_model_that_lists_no_tasks_is_named(live):
    server = FaultServer(scripted=lambda *_: (200, {"choices": [{"message": {"content": "No."}}]}, {}))
    with pytest.raises(llm.UserError, match="no task could be read"):
        live(server)


def test_report_and_dry_run_use_no_network(live, monkeypatch, capsys):
    live(FaultServer(), n=20)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    capsys.readouterr()
    lines = live.out.read_text()
    live.out.unlink()
    assert generate.main(["--report", "--out", str(live.out)]) == 0
    assert live.out.read_text() == lines and "short-long" in capsys.readouterr().out
    before = sorted(live.folder.parent.rglob("*"))
    assert not generate.main(
        ["--dry-run", "--model", "m", "--n", "500_000", "--price", "m:1:2", "--out", str(live.out)]
    )
    text = capsys.readouterr().out
    assert sorted(live.folder.parent.rglob("*")) == before
    for template in PROMPTS["templates"].values():
        assert template.splitlines()[-1] in text
    tokens_in, tokens_out = (
        int(n.replace(",", "")) for n in re.search(r"([\d,]+) in, ([\d,]+) out", text).groups()
    )
    assert 60e6 < tokens_in < 140e6 and 90e6 < tokens_out < 200e6  # the paper: about 180 million in all
    assert f"${tokens_in / 1e6 + 2 * tokens_out / 1e6:,.2f}"[:-3] in text


# ---- the command line ----


def command(*flags, env=None, **kwargs):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
        **kwargs,
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--model"),
        (["--replay", "missing.jsonl"], "missing.jsonl"),
        (["--replay", "broken.jsonl"], "broken.jsonl:2"),
        (["--replay", "foreign.jsonl"], "foreign.jsonl:1"),
        (["--replay", "cut.jsonl.gz"], "cut.jsonl.gz"),
        (["--model", "a", "--model", "a"], "--model"),
        (["--model", "a:0"], "--model"),
        (["--model", "a", "--price", "a:1"], "--price"),
        (["--model", "a", "--tries", "0"], "--tries"),
        (["--model", "a", "--n", "0"], "--n"),
        (["--model", "a", "--n", "many"], "--n"),
        (["--report", "--out", "none.jsonl"], "none"),
        (["--model", "a", "--out", "nosuffix"], "nosuffix"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(tmp_path, flags, words):
    first = json.dumps(recorded()[20], ensure_ascii=False)
    (tmp_path / "broken.jsonl").write_text(first + "\n{torn\n")
    (tmp_path / "foreign.jsonl").write_text('{"text": "hello"}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(RECORDED.read_bytes()[:5000])
    before = sorted(tmp_path.rglob("*"))
    process = command(
        *flags, cwd=tmp_path, env={"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "OPENAI_API_KEY": KEY}
    )
    out, err = process.communicate(timeout=30)
    assert process.returncode == 2, (out, err)
    last = err.strip().splitlines()[-1]
    assert words in last and "Traceback" not in err
    if "usage:" not in err:  # argparse's own mistakes print the usage above
        assert len(err.strip().splitlines()) == 1
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == [
        p for p in before if p.is_file()
    ]


def test_ctrl_c_stops_cleanly_and_the_rerun_finishes(tmp_path):
    server = FaultServer(delay=0.3)
    flags = ["--model", "m", "--n", "60", "--tasks", "4", "--concurrency", "4", "--out", "run.jsonl"]
    env = {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": KEY}
    process = command(*flags, cwd=tmp_path, env=env)
    while len(server.answered) < 10:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err and "stopping" in out
    ids = raw_ids(tmp_path / "run") + raw_ids(tmp_path / "run", "brainstorm")
    assert len(ids) == len(server.answered)  # what was under way was taken in
    server.delay = 0
    assert command(*flags, cwd=tmp_path, env=env).wait(30) == 0
    assert sorted(raw_ids(tmp_path / "run")) == list(range(60))
    assert len(server.answered) == 60 + 4
    server.close()


def test_progress_is_plain_lines_where_the_output_is_no_terminal(tmp_path):
    server = FaultServer()
    process = command(
        "--model",
        "m",
        "--n",
        "10",
        "--tasks",
        "4",
        "--price",
        "m:1:2",
        "--out",
        "run.jsonl",
        cwd=tmp_path,
        env={"OPENAI_BASE_URL": server.url},
    )
    out, _ = process.communicate(timeout=30)
    assert re.search(r"^10 of 10, [\d.]+/s, [\d,]+ tokens, \$0\.0\d, 0:00:00 left$", out, re.MULTILINE)
    assert "\r" not in out
    server.close()
