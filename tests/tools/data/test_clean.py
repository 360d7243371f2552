"""tools/clean.py: near-duplicates and evaluation texts in training examples."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clean

ROOT = Path(__file__).parent.parent
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


def test_the_recorded_examples_are_clean_of_the_mini_benchmark(tmp_path):
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "generate.py"),
            "--replay",
            str(ROOT / "data/recorded.jsonl.gz"),
            "--out",
            str(tmp_path / "s.jsonl"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    report = clean.clean(tmp_path / "s.jsonl", tmp_path / "c.jsonl", [ROOT / "data/mini"])
    assert (report["examples"], report["near-duplicates"], report["contaminated"]) == (2030, 0, 0)
    assert (tmp_path / "c.jsonl").read_bytes() == (tmp_path / "s.jsonl").read_bytes()


@pytest.mark.parametrize(
    "content, flags, words", [("{}\n", [], ":1"), ("", ["--eval", "."], "task.json"), (None, [], "in.jsonl")]
)
def test_mistakes_get_one_line(tmp_path, content, flags, words):
    if content is not None:
        (tmp_path / "in.jsonl").write_text(content)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/clean.py"), "in.jsonl", "--out", "out.jsonl", *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()
