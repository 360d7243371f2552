"""tools/data/clean.py: near-duplicates and evaluation texts in training examples."""
import gzip
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbing.examples import Examples
from plumbing.files import BOM
from scripts import ROOT, complaint, run_tool
from tools.data import clean

ALPHABETS = {
    "latin": "abcdefghijklmnopqrstuvwxyz",
    "han": "".join(map(chr, range(0x4E00, 0x4F00))),
    "devanagari": "".join(map(chr, range(0x905, 0x940))),
}


def words(rng, number, alphabet="latin"):
    return " ".join("".join(rng.choices(ALPHABETS[alphabet], k=rng.randint(2, 9))) for _ in range(number))


def example(query, positive="A positive text.", *negatives):
    return {"prompt": "p", "query": query, "pos": [positive], "neg": list(negatives)}


def run(tmp_path, examples, *folders, **options):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples), "utf-8")
    report = clean.clean(tmp_path / "in.jsonl", tmp_path / "out.jsonl", folders, batch=7, **options)
    kept = [json.loads(line)["query"] for line in (tmp_path / "out.jsonl").open(encoding="utf-8")]
    return report, kept


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab字\U0001f600"), max_size=12), min_size=1, max_size=6))
def test_equal_windows_and_no_others_have_equal_hashes(texts):
    windows = clean.Windows(3)
    hashes, owner = windows(texts)
    expected = [(i, text[j : j + 3]) for i, text in enumerate(texts) for j in range(len(text) - 2)]
    assert list(owner) == [i for i, _ in expected]
    by_text = {}
    for value, (_, text) in zip(hashes.tolist(), expected):
        assert by_text.setdefault(text, value) == value
    assert len(set(by_text.values())) == len(by_text)


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_signatures_estimate_the_jaccard_similarity(alphabet):
    rng, errors = random.Random(0), []
    for _ in range(60):
        text = words(rng, 80, alphabet).split(" ")
        other = [
            word if rng.random() > rng.choice([0.02, 0.1]) else words(rng, 1, alphabet) for word in text
        ]
        a, b = " ".join(text), " ".join(other)
        shingles = [{t[i : i + 5] for i in range(len(t) - 4)} for t in (a, b)]
        jaccard = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
        sketch = clean.signatures([a, b])
        errors.append((sketch[0] == sketch[1]).mean() - jaccard)
    assert abs(np.mean(errors)) < 0.03 and np.std(errors) < 0.1


def test_near_duplicates_go_and_the_first_stays(tmp_path):
    rng = random.Random(0)
    originals = [(words(rng, 12), words(rng, rng.choice([20, 100]))) for _ in range(200)]
    rows = [example(*pair) for pair in originals]
    for query, positive in originals[:50]:  # one word in forty replaced
        changed = positive.split(" ")
        for _ in range(max(1, len(changed) // 40)):
            changed[rng.randrange(len(changed))] = "other"
        rows.append(example(query, " ".join(changed)))
    rows += [example(originals[0][0].upper(), originals[0][1])]  # case doesn't count
    rows += [example(words(rng, 12), originals[1][1][:20]), example("?", "!"), example("!", "?")]
    report, kept = run(tmp_path, rows)
    assert kept[:200] == [query for query, _ in originals]
    assert 49 <= report["near-duplicates"] <= 51 and kept[-3:] == [rows[-3]["query"], "?", "!"]
    assert run(tmp_path, rows, threshold=1.01)[0]["near-duplicates"] == 0


def task_folder(tmp_path, name, files):
    folder = tmp_path / "sets" / name
    folder.mkdir(parents=True)
    (folder / "task.json").write_text("{}")
    for file, row in files.items():
        (folder / file).write_text(json.dumps(row) + "\n", "utf-8")


LAYOUTS = {
    "corpus.jsonl": lambda t: {"_id": "1", "title": "x", "text": t},
    "queries.jsonl": lambda t: {"_id": "1", "text": t},
    "test.jsonl": lambda t: {"sentence1": "x", "sentence2": t, "score": 1},
    "reranking": lambda t: {"query": "x", "positive": ["y"], "negative": ["z", t]},
    "clustering": lambda t: {"sentences": ["x", t], "labels": ["a", "b"]},
    "summaries": lambda t: {
        "text": "x",
        "human_summaries": [t],
        "machine_summaries": ["y"],
        "relevance": [1],
    },
    "classes": lambda t: {"text": t, "label": 3},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_texts_go_in_every_layout(tmp_path, layout):
    rng = random.Random(layout)
    secret, other = words(rng, 10), words(rng, 10)
    file = layout if layout.endswith("jsonl") else "train.jsonl"
    task_folder(tmp_path, "Task", {file: LAYOUTS[layout](secret)})
    rows = [
        example(other),
        example("q1", f"  {secret.upper()}!"),
        example("q2", "p", "n"),
        example("q3", "p3", secret),
    ]
    report, kept = run(tmp_path, rows, tmp_path / "sets")
    assert kept == [other, "q2"] and report["by task"] == {"Task (text)": 2}


def test_shared_runs_go_and_short_or_common_texts_stay(tmp_path):
    rng = random.Random(5)
    documents = [words(rng, 60) for _ in range(100)]
    task_folder(tmp_path, "A", {"corpus.jsonl": {"_id": "1", "text": "thank you"}})
    folder = tmp_path / "sets" / "A" / "corpus.jsonl"
    folder.write_text(
        "".join(json.dumps({"_id": str(i), "text": d}) + "\n" for i, d in enumerate(documents))
    )
    runs = [
        example(f"r{i}", f"{words(rng, 20)} {d[50:190].upper()} {words(rng, 20)}")
        for i, d in enumerate(documents)
    ]
    short = [
        example(f"s{i}", f"{words(rng, 20)} {d[50:95]} {words(rng, 20)}") for i, d in enumerate(documents)
    ]
    report, kept = run(tmp_path, [*runs, *short, example("thank you", "you are welcome")], tmp_path / "sets")
    assert report["contaminated"] >= 98 and report["by task"] == {"A (run)": report["contaminated"]}
    assert sum(query.startswith("s") for query in kept) == 100 and "thank you" in kept


def test_one_language_can_be_kept(tmp_path):
    rows = [example("one") | {"language": "English"}, example("twee") | {"language": "Dutch"},
            example("three") | {"language": "English-Dutch"}, example("four")]
    report, kept = run(tmp_path, rows, language="English")
    assert kept == ["one"] and report["other languages"] == 3 and report["examples"] == 4
    done = run_tool("data.clean", tmp_path / "in.jsonl", "--out", tmp_path / "latin.jsonl", "--language", "Latin")
    assert done.returncode == 2 and "--language Latin: no example of" in done.stderr
    assert not (tmp_path / "latin.jsonl").exists()


def test_the_recorded_examples_are_clean_of_the_mini_benchmark(tmp_path):
    subprocess.run([sys.executable, ROOT / "generate.py", "--replay", ROOT / "data/recorded.jsonl.gz",
                    "--out", tmp_path / "s.jsonl"], check=True, stdout=subprocess.DEVNULL)
    report = clean.clean(tmp_path / "s.jsonl", tmp_path / "c.jsonl", [ROOT / "data/mini"])
    assert (report["examples"], report["near-duplicates"], report["contaminated"]) == (4735, 0, 0)
    assert (tmp_path / "c.jsonl").read_bytes() == (tmp_path / "s.jsonl").read_bytes()


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content)


GOOD = b'{"query": "a question", "pos": ["an answer"]}\n'
READ = {  # what train.py takes: {file: (its content, lines that stay)}
    "null.jsonl": (b'{"query": "q", "pos": ["p"], "neg": null, "prompt": null}\n', 1),
    "bom.jsonl": (b"\xef\xbb\xbf" + GOOD, 1),
    "joined.jsonl": (BOM + GOOD + BOM + GOOD.replace(b"question", b"riddle of another kind"), 2),
    "blank.jsonl": (b"\n" + GOOD + b" \n\n", 1),
    "no-end.jsonl": (GOOD + GOOD.strip().replace(b"question", b"riddle of another kind"), 2),
    "crlf.jsonl": (GOOD.replace(b"\n", b"\r\n"), 1),
    "packed.jsonl.gz": (gzipped(GOOD), 1),
    "empty.jsonl": (b"", 0),
}


@pytest.mark.parametrize("name", READ)
def test_what_train_py_reads_is_read(tmp_path, name):
    content, kept = READ[name]
    (tmp_path / name).write_bytes(content)
    report = clean.clean(tmp_path / name, tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    assert report["kept"] == len(lines) == kept and all(line.endswith(b"}\n") for line in lines)
    if kept and not name.endswith(".gz"):
        assert len(Examples([str(tmp_path / name)])) == len(Examples([str(tmp_path / "out.jsonl")])) == kept


BAD = {  # {file: (its content, what is said)}
    "no-query.jsonl": (GOOD + b"{}\n", ":2: 'query' is missing or not a string"),
    "letters.jsonl": (b'{"query": "q", "pos": "xyz"}\n', ":1: 'pos' is missing or not a list of strings"),
    "no-pos.jsonl": (b'{"query": "q", "pos": []}\n', ':1: "query" and "pos" must hold text'),
    "number.jsonl": (b'{"query": 5, "pos": ["p"]}\n', ":1: 'query' is missing or not a string"),
    "null.jsonl": (b"null\n", ":1: holds no JSON object"),
    "list.jsonl": (b"[1]\n", ":1: holds no JSON object"),
    "torn.jsonl": (GOOD + b'{"query": "q"', ":2: not JSON in UTF-8"),
    "utf16.jsonl": (GOOD.decode().encode("utf-16"), ":1: not JSON in UTF-8"),
    "surrogate.jsonl": (b'{"query": "\\ud800", "pos": ["p"]}\n', ":1: not JSON in UTF-8"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", ":1: not JSON in UTF-8"),
    "no-gzip.jsonl.gz": (GOOD, "cannot be read (Not a gzipped file"),
    "cut.jsonl.gz": (gzipped(GOOD * 99)[:-9], "cannot be read (Compressed file ended"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_example_gets_one_line(tmp_path, capsys, name):
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content)
    said = complaint(capsys, clean.main, tmp_path / name, "--out", tmp_path / "out.jsonl")
    assert f"{tmp_path / name}" in said and words in said
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("flags, words", [
    (["--eval", "EMPTY"], "no task.json in or below it"),
    (["--eval", "BAD"], "test.jsonl:1: 'text' is missing or not a"),
    (["--threshold", "1.5"], "--threshold: 1.5: must be 0 to 1"), (["--min-chars", "-1"], "--min-chars: -1"),
    (["--out", "out.jsonl.gz"], "a name without .gz"),
    (["--out", "."], ".: a folder: name a file in it"), (["--report", "."], ".: a folder: name a file in it"),
    (["--report", "IN"], "in.jsonl: would replace the examples"),
    (["--report", "OUT"], "out.jsonl: would replace the examples"),
])
def test_mistakes_get_one_line(tmp_path, capsys, flags, words):
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    (tmp_path / "empty").mkdir()
    task_folder(tmp_path, "Task", {"test.jsonl": {"text": 5}})
    names = {"EMPTY": tmp_path / "empty", "BAD": tmp_path / "sets", "IN": tmp_path / "in.jsonl",
             "OUT": tmp_path / "out.jsonl"}
    flags = [names.get(flag, flag) for flag in flags]
    said = complaint(capsys, clean.main, tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", *flags)
    assert words in said
    assert not (tmp_path / "out.jsonl").exists() and (tmp_path / "in.jsonl").read_bytes() == GOOD


def test_an_out_that_cannot_be_is_said_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clean, "clean", lambda *args, **options: pytest.fail("the work has begun"))
    assert "a folder" in complaint(capsys, clean.main, tmp_path / "in.jsonl", "--out", tmp_path)


def test_texts_of_linked_evaluation_sets_go(tmp_path):
    task_folder(tmp_path / "elsewhere", "Task", {"test.jsonl": {"text": "a text that nobody may train on"}})
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/Task").symlink_to(tmp_path / "elsewhere/sets/Task", target_is_directory=True)
    report, kept = run(tmp_path, [example("a text that nobody may train on"), example("another one")],
                       tmp_path / "linked")
    assert kept == ["another one"] and report["by task"] == {"Task (text)": 1}


def test_a_missing_file_is_said_from_the_shell(tmp_path):
    done = run_tool("data.clean", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"clean.py: {tmp_path / 'in.jsonl'}: cannot be read (No such file")


def test_all_keys_of_a_line_survive(tmp_path):
    rows = [{**example("the only question"), "language": "Dutch", "id": 7, "neg_scores": [0.5, 1]}]
    run(tmp_path, rows)
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").open()] == rows
