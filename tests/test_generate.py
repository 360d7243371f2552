"""generate.py: the draws, the two steps, the request on the wire, an answer becomes an example.

What lies below it (retries, books, the repair of JSON) is in tests/plumbing/. A server is a real socket on
127.0.0.1.
"""
import collections
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import requests

import generate
from answers import (GENERATIONS, POOLS, PROMPTS, RECORDED, ROOT, raw_ids, recorded, reject_reason, row_of,
                     rows_of)
from fault_server import KEY, FaultServer
from plumbing.answers import Reject
from plumbing.errors import UserError
from plumbing.pools import read_generations

TYPES = list(PROMPTS["task_types"])
ASYMMETRIC = ["short-long", "long-short", "long-long", "short-short"]


# ------------------------------------------------------------------------------------ prompts and draws

def test_the_table_of_the_six_types_says_what_the_prompts_say():
    source = (ROOT / "generate.py").read_text("utf-8")
    rows = re.findall(r"^# ([a-z-]+) +(\d+) % +([12]) ", source, re.MULTILINE)
    assert [kind for kind, _, _ in rows] == TYPES
    for kind, share, steps in rows:
        assert PROMPTS["task_types"][kind]["weight"] == int(share) / 100
        assert PROMPTS["task_types"][kind]["brainstorm"] == (steps == "2") == (kind in ASYMMETRIC)


def test_recorded_answers_keep_the_messages_that_they_were_made_from():
    newer = {"sts", "bitext", "short-long"}        # templates that have changed since
    for row in recorded():
        message = row["messages"][0]["content"]
        assert generate.message_of(row, PROMPTS) == message
        if row["step"] == "brainstorm" or row["type"] not in newer:
            assert generate.render(PROMPTS, row) == message
    row = row_of()                                 # an answer from before a placeholder came is read as well
    del row["params"]["topic"]
    assert "{topic}" in generate.message_of(row, PROMPTS) and generate.make_example(row, PROMPTS)


def test_messages_are_english_and_follow_the_papers_rules():
    messages = collections.defaultdict(list)
    for i in range(4000):
        request = generate.request_at(i, 0, PROMPTS, GENERATIONS, {"m": 1})
        messages[request["type"]].append(generate.render(PROMPTS, request))
    for message in sum(messages.values(), []):
        assert not re.search(r"\b(a [aei]|an [^aeiou]|the the)", message), message
        assert "{" not in message
    assert all("All three have some words in common" in message for message in messages["sts"])
    assert all("S2 and S3 have some words in common" in message for message in messages["bitext"])
    assert all("few would think of" not in message for message in messages["short-long"])
    topics = {re.search("this field: (.*?)\\.", message)[1] for message in messages["sts"]}
    assert len(topics) > 150


def test_shares_languages_and_values_follow_the_data():
    n = 20_000
    drawn = [generate.request_at(i, 0, PROMPTS, GENERATIONS, {"a": 3, "b": 1}) for i in range(n)]
    types = collections.Counter(request["type"] for request in drawn)
    for kind, task_type in PROMPTS["task_types"].items():
        assert types[kind] / n == pytest.approx(task_type["weight"], abs=0.015)
    assert sum(request["model"] == "a" for request in drawn) / n == pytest.approx(0.75, abs=0.015)

    single = [request["params"] for request in drawn if request["type"] != "bitext"]
    languages = collections.Counter(params["language"] for params in single)
    assert languages["English"] / len(single) == pytest.approx(0.431, abs=0.015)
    assert languages["Polish"] / len(single) == pytest.approx(0.030, abs=0.006)
    assert languages["Welsh"] / len(single) == pytest.approx(0.198 / 79, abs=0.0015)
    assert len(PROMPTS["languages"]) == 93 == len(languages)
    bitext = [request["params"] for request in drawn if request["type"] == "bitext"]
    pairs = {(params["source_language"], params["target_language"]) for params in bitext}
    assert all(source != target for source, target in pairs) and len(pairs) > 500

    for kind, placeholders in PROMPTS["placeholders"].items():
        of_kind = [request["params"] for request in drawn if request["type"] == kind]
        for name, values in placeholders.items():
            counts = collections.Counter(params[name] for params in of_kind)
            assert set(counts) == set(values)
            assert len(values) > 10 or min(counts.values()) > 0.75 * len(of_kind) / len(values)
        if kind in ASYMMETRIC:
            assert {params["task"] for params in of_kind} == set(POOLS[kind])


def test_request_i_depends_on_seed_and_i_alone_and_stays_as_it_is(monkeypatch):
    def ask(i, seed=0):
        return generate.request_at(i, seed, PROMPTS, GENERATIONS, {"a": 3, "b": 1})

    assert [ask(i) for i in (5, 3, 5)] == [ask(5), ask(3), ask(5)]
    assert ask(5) != ask(5, seed=1)
    # Frozen: a change of this hash would change every run that users have begun.
    digest = hashlib.sha256(json.dumps([ask(i) for i in range(200)]).encode()).hexdigest()
    assert digest[:16] == "2e0280306d0a9f53"
    older = {kind: {name: values for name, values in placeholders.items() if name not in ("topic", "length")}
             for kind, placeholders in PROMPTS["placeholders"].items()}
    monkeypatch.setitem(PROMPTS, "placeholders", older)    # as with the first templates of sts and bitext
    digest = hashlib.sha256(json.dumps([ask(i) for i in range(200)]).encode()).hexdigest()
    assert digest[:16] == "979549d052771a0e"


def test_weights_in_a_value_list():
    rng = random.Random("x")
    drawn = collections.Counter(generate.draw(rng, {"a": 9, "b": 1, "never": 0}) for _ in range(5000))
    assert set(drawn) == {"a", "b"} and drawn["a"] / 5000 == pytest.approx(0.9, abs=0.02)


@pytest.fixture
def prompts_copy(tmp_path):
    folder = tmp_path / "prompts"
    shutil.copytree(generate.PROMPTS, folder)
    return folder


def test_a_placeholder_without_values_is_a_users_error(prompts_copy):
    (prompts_copy / "sts.txt").write_text("Write {poem} in {language}.")
    with pytest.raises(UserError, match="poem"):
        generate.load_prompts(prompts_copy)


@pytest.mark.parametrize("path, value, words", [
    ("task_types/sts/keys", [], "values.json: sts: keys"),
    ("task_types/sts/keys", ["S1"], "values.json: sts: keys"),
    ("task_types/sts/keys", ["S1", "S1"], "values.json: sts: keys"),
    ("task_types/sts/keys", [1, 2], "values.json: sts: 'keys'"),
    ("task_types/sts/weight", -0.2, "values.json: task_types: weights"),
    ("task_types/sts/weight", float("nan"), "values.json: sts: 'weight'"),
    ("task_types/sts/weight", "0.2", "values.json: sts: 'weight'"),
    ("task_types/sts/brainstorm", "false", "values.json: sts: 'brainstorm'"),
    ("task_types/sts/instruction", 5, "values.json: sts: 'instruction'"),
    ("task_types/sts/words", 5, "values.json: sts: words"),
    ("task_types/sts/words", [["unit"]], "values.json: sts: words"),
    ("task_types/sts", [], "values.json: sts: holds no JSON object"),
    ("task_types", {}, "values.json: task_types"),
    ("placeholders/sts/unit", [], "values.json: sts: unit"),
    ("placeholders/sts/unit", {}, "values.json: sts: unit"),
    ("placeholders/sts/unit", {"phrase": -1, "sentence": 2}, "values.json: sts: unit"),
    ("placeholders/sts/unit", {"phrase": 0}, "values.json: sts: unit"),
    ("placeholders/sts/unit", None, "values.json: sts: unit"),
    ("placeholders/sts/unit", ["phrase", None], "values.json: sts: unit"),
    ("placeholders/sts/unit", [["phrase"]], "values.json: sts: unit"),
    ("num_tasks", [], "values.json: num_tasks"),
    ("num_tasks", [20, 0], "values.json: num_tasks"),
    ("num_tasks", {"20": 1}, "values.json: num_tasks"),
    ("num_tasks", "20", "values.json: num_tasks"),
    ("weights/English", -1, "languages.json: weights"),
    ("weights/English", "half", "languages.json: weights"),
    ("weights/ ", 0.1, "languages.json: ' '"),
    ("others_share", -0.2, "languages.json: weights"),
    ("others", [], "mend its files"),
    ("scripts/Thai", "THAI", "languages.json: scripts: 'Thai'"),
])
def test_prompts_that_could_not_bring_examples_are_refused_when_read(prompts_copy, path, value, words):
    *folders, name = path.split("/")
    of_values = [*folders, name][0] in ("task_types", "placeholders", "num_tasks")
    file = prompts_copy / ("values.json" if of_values else "languages.json")
    content = inner = json.loads(file.read_text("utf-8"))
    for key in folders:
        inner = inner[key]
    inner[name] = value
    file.write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError, match=re.escape(words)):
        generate.load_prompts(prompts_copy)


def test_translations_need_two_languages(prompts_copy):
    languages = {"weights": {"English": 1}, "others": ["Thai"], "others_share": 0, "scripts": {}}
    (prompts_copy / "languages.json").write_text(json.dumps(languages))
    with pytest.raises(UserError, match="bitext: .* two languages"):
        generate.load_prompts(prompts_copy)


def test_types_with_step_1_need_a_weight_above_0(prompts_copy):
    values = json.loads((prompts_copy / "values.json").read_text())
    for kind in ASYMMETRIC:
        values["task_types"][kind]["weight"] = 0
    (prompts_copy / "values.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="task_types with step 1: weights"):
        generate.load_prompts(prompts_copy)


def test_a_type_of_task_is_data(prompts_copy, live, monkeypatch, capsys):
    """Two new types by their templates and their entries in values.json alone: code search, headlines."""
    values = json.loads((prompts_copy / "values.json").read_text())
    values["task_types"]["code"] = {"weight": 0.5, "brainstorm": True, "keys": ["question", "code"]}
    values["task_types"]["headline"] = {"weight": 0.5, "brainstorm": False, "keys": ["text", "label"],
                                        "instruction": "Find the headline."}
    values["placeholders"] |= {"code": {"size": ["10 lines"]}, "headline": {}}
    (prompts_copy / "values.json").write_text(json.dumps(values))
    keys = '- "question": one in {language}.\n- "code": {size} that answer it.\n'
    (prompts_copy / "code.txt").write_text("Task: {task}\n" + keys)
    (prompts_copy / "code.brainstorm.txt").write_text("Suggest {num_tasks} tasks of code search.\n")
    (prompts_copy / "headline.txt").write_text('- "text": news in {language}.\n- "label": their headline.\n')
    prompts = generate.load_prompts(prompts_copy)
    monkeypatch.setattr(generate, "load_prompts", lambda: prompts)

    assert not generate.main(["--dry-run", "--model", "m", "--n", "50"])
    text = capsys.readouterr().out
    assert all(f"--- {name}," in text for name in ("code, brainstorm", "code, generate", "headline, generate"))
    assert live(FaultServer()) == 0
    report = json.loads((live.folder / "report.json").read_text())
    assert report["type"]["code"] > 2 and report["type"]["headline"] > 2 and report["pool"]["code"] > 10
    out = capsys.readouterr().out
    assert re.search(r"^code +[\d.]+%", out, re.MULTILINE) and re.search(r"^headline +", out, re.MULTILINE)
    examples = [json.loads(line) for line in live.out.open(encoding="utf-8")]
    assert {row["prompt"] for row in examples if row["type"] == "headline"} == {"Find the headline."}

    answer = {"question": "Как вернуть площадь круга?", "code": "def area(r):\n    return math.pi * r ** 2"}
    row = {"id": 1, "step": "generate", "type": "code", "response": json.dumps(answer),
           "params": {"language": "Russian", "task": "Find code."}}
    assert generate.make_example(row, prompts)[0]["pos"] == [answer["code"]]
    row |= {"type": "headline", "response": '{"text": "A storm hit the coast.", "label": "storm"}'}
    row["params"]["language"] = "English"
    with pytest.raises(Reject, match="label in input"):
        generate.make_example(row, prompts)


# ---------------------------------------------------------------------------------- step 1: pools of tasks

A, B, C, D = [json.dumps([f"Given a {word}, find its opposite."]) for word in ("word", "name", "day", "map")]
NOTHING = "I cannot think of any."


@pytest.mark.parametrize("answers, size, patience, number, complete", [
    ([], 2, 2, 0, False),
    ([A], 2, 2, 1, False),
    ([A, B], 2, 2, 2, True),                       # as many as are asked for
    ([A, B, C], 2, 2, 2, True),
    ([A, A.upper(), A], 2, 2, 1, True),            # two in a row without a new task
    ([A, A, B, B], 3, 2, 2, False),                # not in a row
    ([A, NOTHING, A, B], 3, 2, 1, True),           # what comes after patience is up does not count
    ([NOTHING, NOTHING], 2, 2, 0, True),
    ([A, B, C, D], 4, 1, 4, True),
])
def test_a_pool_by_hand(answers, size, patience, number, complete):
    pool, whether = generate.pool_of(answers, size, patience)
    assert (len(pool), whether) == (number, complete)
    assert pool == [json.loads(answer)[0] for answer in (A, B, C, D)[:number]]


def test_a_pool_grows_behind_its_frozen_tasks():
    word, name, day = [json.loads(answer)[0] for answer in (A, B, C)]
    other = "Given a frozen task, keep it."
    assert generate.pool_of([A, B, C], 3, 2, [word, other]) == ([word, other, name], True)
    assert generate.pool_of([A, B], 4, 1, [word, name]) == ([word, name], False)   # neither was in vain
    assert generate.pool_of([A, A, C], 4, 1, [word, other]) == ([word, other], True)
    assert generate.pool_of([], 1, 1, [word, other]) == ([word, other], True)      # and never shrinks


def test_each_type_gets_its_share_of_the_tasks():
    assert generate.pool_sizes(PROMPTS, 150_000) == {
        "short-long": 78571, "long-short": 57143, "long-long": 7143, "short-short": 7143}
    assert set(generate.pool_sizes(PROMPTS, 1).values()) == {1}


def test_answers_are_read_in_the_order_of_their_requests():
    answers = {"sts-b1": "second", "sts-b3": "fourth", "sts-b0": "first", "long-long-b2": "another type's"}
    assert generate.answers_in_order(answers, "sts") == ["first", "second"]


def test_brainstorming_ends_when_nothing_new_comes(live):
    tasks = json.dumps([f"Given a {word}, find its opposite." for word in ("word", "name", "fact")])

    def script(number, body, headers):
        if body["messages"][0]["content"].startswith("Suggest"):
            return 200, {"choices": [{"message": {"content": tasks}, "finish_reason": "stop"}]}, {}

    server = FaultServer(scripted=script)
    assert live(server, "--patience", "3", "--tasks", "400", n=20) == 0
    assert len(rows_of(live.folder, "tasks")) == 4 * 3
    assert 4 * 4 <= len(raw_ids(live.folder, "brainstorm")) <= 4 * 4 + 400 // 20


def test_a_model_that_lists_no_tasks_is_named(live):
    server = FaultServer(scripted=lambda *_: (200, {"choices": [{"message": {"content": "No."}}]}, {}))
    with pytest.raises(UserError, match="no task could be read"):
        live(server)


# ------------------------------------------------------------------------------ step 2, and the whole run

def test_a_run_asks_each_index_once_and_extends(live):
    server = FaultServer()
    assert live(server) == 0
    assert sorted(raw_ids(live.folder)) == list(range(40))
    tasks = (live.folder / "tasks.jsonl").read_text()
    assert len(tasks.splitlines()) == 60
    first = {row["id"]: row for row in rows_of(live.folder)}
    asked = server.requests
    assert live(server) == 0 and server.requests == asked                  # nothing is asked twice
    assert live(server, n=70) == 0 and server.requests == asked + 30
    assert (live.folder / "tasks.jsonl").read_text() == tasks
    rows = {row["id"]: row for row in rows_of(live.folder)}
    assert sorted(raw_ids(live.folder)) == list(range(70))
    assert {key: rows[key] for key in first} == first
    generations = read_generations(live.folder)
    for i in range(70):                            # what was sent is what the settings say, and nothing else
        request = generate.request_at(i, 0, PROMPTS, generations, {"m": 1.0})
        assert {key: rows[i][key] for key in request} == request
        assert generate.render(PROMPTS, request) in server.answered


# ------------------------------------------------------------------------------- the request on the wire

def test_the_request_and_its_answer_on_the_wire(live):
    args = generate.options(["--model", "m", "--temperature", "0.5", "--max-answer-tokens", "77"])
    body = generate.request_body({"model": "m", "step": "generate"}, 'Say "é".', args)
    assert body == {"model": "m", "messages": [{"role": "user", "content": 'Say "é".'}], "temperature": 0.5,
                    "top_p": 1.0, "max_tokens": 77, "response_format": {"type": "json_object"}}
    assert "response_format" not in generate.request_body({"model": "m", "step": "brainstorm"}, "", args)

    choice = {"message": {"content": "é"}, "finish_reason": "stop"}
    answer = {"choices": [choice], "usage": {"prompt_tokens": 3}}
    server = FaultServer(scripted=lambda *_: (200, answer, {}))
    with requests.Session() as session:
        response = generate.post(session, server.url + "/chat/completions", KEY, body, seconds=5)
        assert generate.read_completion(response.json()) == ("é", "stop", {"prompt_tokens": 3})
        generate.post(session, server.url + "/chat/completions", "", body, seconds=5)
    server.close()
    assert server.bodies == [body, body]
    assert server.headers[0]["authorization"] == f"Bearer {KEY}" and "authorization" not in server.headers[1]
    assert server.headers[0]["content-type"] == "application/json"


# ------------------------------------------------------------------------------ an answer becomes an example

@pytest.mark.parametrize("kind", TYPES)
def test_an_example_of_each_type(kind):
    row = row_of(kind)
    if kind == "bitext":
        row["params"] |= {"source_language": "Welsh", "target_language": "English"}
    example, how = generate.make_example(row, PROMPTS)
    prompts = {"sts": "Retrieve semantically similar text.", "bitext": "Retrieve parallel sentences."}
    assert how == "clean" and example == {
        "prompt": prompts.get(kind, "Find it."),
        "query": "A first text.",
        "pos": ["Quite another text."],
        "neg": ["A third one."] if len(PROMPTS["task_types"][kind]["keys"]) == 3 else [],
        "type": kind,
        "language": "Welsh-English" if kind == "bitext" else "English",
        "id": 7}


@pytest.mark.parametrize("values, reason", [
    ({"S2": "  "}, "empty text"),
    ({"S2": "x y " * 6000}, "too long"),
    ({"S2": "a \ud800 b"}, "bad characters"),
    ({"S2": "a \f b"}, "bad characters"),
    ({"S2": "once more " * 80}, "repetition"),
    ({"S2": "I'm sorry, but I can't help with that."}, "refusal"),
    ({"S2": " a FIRST  text."}, "copy between fields"),
    ({"S3": "Quite another text."}, "copy between fields"),
    ({"S1": "the same topic with details that differ"}, "copy of the prompt"),
    ({"S1": "Это предложение написано по-русски."}, "wrong script"),
])
def test_rejected_texts(values, reason):
    assert reject_reason(row_of(**values)) == reason


@pytest.mark.parametrize("language, text, label, misleading_label, rejected", [
    ("English", "Untrue words were said.", "true", "false", False),        # no whole word
    ("English", "What he said is True.", "true", "false", True),
    ("English", "Not false at all.", "true", "false", True),
    ("Chinese", "这部电影很负面", "负面", "正面", True),                        # a script without spaces
])
def test_labels_inside_the_input(language, text, label, misleading_label, rejected):
    row = row_of("long-short", language, input_text=text, label=label, misleading_label=misleading_label)
    if rejected:
        assert reject_reason(row) == "label in input"
    else:
        generate.make_example(row, PROMPTS)


def test_short_texts_are_judged_together():
    row = row_of("short-short", "Polish", input="Час и закреплять", positive_document="Лалькусьий")
    assert reject_reason(row) == "wrong script"


def test_the_two_sides_of_bitext_have_scripts_of_their_own():
    row = row_of("bitext", S1="Это предложение написано по-русски.", S2="This is a sentence in English.",
                 S3="This is another sentence in English.")
    row["params"] |= {"source_language": "Russian", "target_language": "English"}
    assert generate.make_example(row, PROMPTS)[0]["language"] == "Russian-English"
    row["params"] |= {"source_language": "English", "target_language": "Russian"}
    assert reject_reason(row) == "wrong script"


def test_every_language_has_scripts_that_its_recorded_texts_use():
    assert set(PROMPTS["scripts"]) <= set(PROMPTS["languages"])
    dropped = collections.Counter()
    for row in recorded():
        if row["step"] == "generate":
            try:
                generate.make_example(row, PROMPTS)
            except Reject as reason:
                dropped[str(reason)] += 1
    assert dropped == {"label in input": 2}


def test_duplicates_are_seen_after_normalisation(tmp_path):
    rows = [row_of(), row_of(S1="a  FIRST text.", S3="Other."), row_of(S1="A new one.")]
    report = generate.write_examples(rows, PROMPTS, tmp_path / "out.jsonl")
    assert report["examples"] == 2 and report["dropped"] == {"duplicate": 1}
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def nested(levels: int) -> list:
    """[[[...]]], as deep as that."""
    value = ["text"]
    for _ in range(levels):
        value = [value]
    return value


def with_params(**params) -> dict:
    row = row_of("short-long")
    return row | {"params": row["params"] | params}


BITEXT = row_of("bitext") | {"params": {"source_language": "Thai", "target_language": 5}}


@pytest.mark.parametrize("row, words", [
    (row_of() | {"messages": [{"content": None}]}, "message is no text"),
    (row_of() | {"messages": [{"content": " "}]}, "message is no text"),
    (row_of() | {"messages": [{"content": nested(400)}]}, "inside one another"),
    (row_of() | {"messages": 5}, "no answer to our prompts"),
    (row_of() | {"messages": ["text"]}, "no answer to our prompts"),
    (row_of() | {"step": "brainstorm", "type": "sts"}, "no answer to our prompts"),
    (row_of() | {"step": "other"}, "step"),
    (row_of() | {"id": "\ud83d"}, "id is no text"),
    (with_params(task=None), "instruction is no text"),
    (with_params(task=5), "instruction is no text"),
    (with_params(task=["x"]), "instruction is no text"),
    (with_params(task="half \ud83d"), "message is no text"),
    (with_params(language=["English"]), "language is no text"),
    (with_params(language=5), "language is no text"),
    (with_params(language=nested(400)), "inside one another"),
    (BITEXT, "language is no text"),
    (BITEXT | {"params": {"source_language": "Thai"}}, "no answer to our prompts"),
])
def test_a_recorded_answer_without_its_texts_is_blamed(tmp_path, row, words):
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps(row_of()) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"answers.jsonl:2: .*{words}") as caught:
        generate.main(["--replay", str(file), "--out", str(tmp_path / "out.jsonl")])
    assert "\n" not in str(caught.value) and not (tmp_path / "out.jsonl").exists()


def test_recorded_messages_may_come_in_parts_or_not_at_all(tmp_path):
    parts = [{"type": "text", "text": "Write a "}, {"type": "text", "text": "sentence."}]
    rows = [row_of() | {"messages": [{"role": "user", "content": parts}]}, row_of() | {"messages": []}]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    messages = [row["messages"][0]["content"] for row in generate.read_answers(file, PROMPTS)]
    assert messages == ["Write a sentence.", generate.render(PROMPTS, rows[1])]


def test_replay_of_the_recorded_answers(tmp_path, capsys):
    assert generate.main(["--replay", str(RECORDED), "--out", str(tmp_path / "s.jsonl")]) == 0
    assert "label in input 2, duplicate 1" in capsys.readouterr().out
    examples = [json.loads(line) for line in (tmp_path / "s.jsonl").open(encoding="utf-8")]
    assert len(examples) == 4735
    for example in examples:
        assert set(example) == {"prompt", "query", "pos", "neg", "type", "language", "id"}
        assert example["prompt"] and example["query"] and len(example["pos"]) == 1
        assert all(example["pos"] + example["neg"])


# ---------------------------------------------------------------------------------------- the command line

BRAINSTORM, EXAMPLE = (next(row for row in recorded() if row["step"] == step)
                       for step in ("brainstorm", "generate"))
FILES = {"broken.jsonl": json.dumps(EXAMPLE).encode() + b"\n{torn\n",
         "foreign.jsonl": b'{"text": "hello"}\n',
         "unknown.jsonl": json.dumps(EXAMPLE | {"type": "verse"}).encode(),
         "unknown_brainstorm.jsonl": json.dumps(BRAINSTORM | {"type": "verse"}).encode(),
         "torn.jsonl.gz": RECORDED.read_bytes()[:5000],
         "afile": b""}


@pytest.mark.parametrize("flags, words", [
    ([], "--model"),
    (["--dry-run", "--report"], "--model"),
    (["--dry-run", "--replay", RECORDED], "--model"),
    (["--replay", "missing.jsonl"], "missing.jsonl"),
    (["--replay", "broken.jsonl"], "broken.jsonl:2"),
    (["--replay", "foreign.jsonl"], "foreign.jsonl:1"),
    (["--replay", "unknown.jsonl"], "unknown.jsonl:1: no answer to our prompts"),
    (["--replay", "unknown_brainstorm.jsonl"], "unknown_brainstorm.jsonl:1: no answer to our prompts"),
    (["--replay", "torn.jsonl.gz"], "torn.jsonl.gz"),
    (["--replay", RECORDED, "--out", "afile/x.jsonl"], "afile"),
    (["--model", "m", "--out", "afile/x.jsonl"], "afile"),
    (["--model", "a", "--model", "a"], "--model"),
    (["--model", "a:0.0"], "--model"),
    (["--model", "a", "--price", "a:1"], "--price"),
    (["--model", "a", "--price", "a:-1:1"], "--price"),
    (["--model", "a", "--model", "b", "--price", "a:1:2", "--budget-usd", "1"], "--price b:IN:OUT"),
    (["--model", "a", "--price", "b:1:2", "--dry-run"], "--price b: no --model is called so, only a"),
    (["--model", "a", "--price", "b:1:2"], "--price b: no --model is called so, only a"),
    (["--model", "a", "--tries", "0"], "--tries"),
    (["--model", "a", "--timeout", "1e10"], "--timeout"),
    (["--model", "a", "--backoff", "1e300"], "--backoff"),
    (["--model", "a", "--n", "0"], "--n"),
    (["--model", "a", "--n", "many"], "--n"),
    (["--model", "a", "--tasks", "0"], "--tasks"),
    (["--model", "a", "--temperature", "nan"], "--temperature"),
    (["--report", "--out", "none.jsonl"], "none"),
    (["--model", "a", "--out", "nosuffix"], "nosuffix"),
    (["--model", "a", "--out", "x.jsonl.gz"], "--out x.jsonl.gz: lines are written unpacked"),
    (["--replay", RECORDED, "--out", "afile.jsonl"], "afile: a file stands where a folder is wanted"),
])
def test_mistakes_get_one_line_and_leave_nothing(tmp_path, flags, words):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    environment = {**os.environ, "OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "OPENAI_API_KEY": KEY}
    done = subprocess.run([sys.executable, ROOT / "generate.py", *flags], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr, done
    assert {path.name for path in Path(tmp_path).iterdir() if path.is_file()} == set(FILES)


@pytest.mark.parametrize("link", [None, os.symlink])
@pytest.mark.parametrize("swapped", [False, True])
def test_answers_are_not_replaced_by_their_own_examples(tmp_path, link, swapped):
    answers, out = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl"
    answers.write_text(json.dumps(row_of()) + "\n")
    if link:
        out = tmp_path / "link.jsonl"
        link(answers, out)
    if swapped:
        answers, out = out, answers
    before = answers.read_bytes()
    with pytest.raises(UserError, match="--out .*: the answers of --replay are in it"):
        generate.main(["--replay", str(answers), "--out", str(out)])
    assert answers.read_bytes() == before == out.read_bytes()


@pytest.mark.parametrize("name", ["raw.jsonl", "new.jsonl"])
def test_examples_are_not_written_among_the_answers_of_a_run(live, name):
    assert live(FaultServer(), n=5) == 0
    before = (live.folder / "raw.jsonl").read_bytes()
    with pytest.raises(UserError, match=f"--out .*{name}: .*run is a run's own folder"):
        generate.main(["--replay", str(RECORDED), "--out", str(live.folder / name)])
    assert (live.folder / "raw.jsonl").read_bytes() == before


def test_what_is_in_the_way_of_the_folder_is_said_before_out_is_replaced(tmp_path):
    (tmp_path / "x").write_text("a file")
    (tmp_path / "x.jsonl").write_text("older examples")
    with pytest.raises(UserError, match="a file stands where a folder is wanted"):
        generate.main(["--replay", str(RECORDED), "--out", str(tmp_path / "x.jsonl")])
    assert (tmp_path / "x.jsonl").read_text() == "older examples"
    (tmp_path / "y.jsonl").mkdir()
    with pytest.raises(UserError, match="y.jsonl: a folder: name a file in it"):
        generate.options(["--model", "m", "--out", str(tmp_path / "y.jsonl")])
