"""plumbing/tasks.py: which folders are tasks, and one clear line for each file that is not whole."""
import doctest
import json
import math
import os
from pathlib import Path

import pytest

from plumbing import tasks
from plumbing.errors import UserError
from plumbing.tasks import (CATEGORIES, check_ids, find_tasks, look_up_ids, read_distinct, read_qrels, read_rows,
                            task_files)
from scoring import MINI, run, write_task

STS_ROW = '{"sentence1": "a", "sentence2": "b", "score": 1}\n'
QUERY = [{"_id": "q", "text": "a"}]


def test_docstring_examples():
    assert doctest.testmod(tasks).failed == 0


def test_tasks_come_by_category_and_name_with_what_they_leave_out(tmp_path):
    for name, kind in (("B", "sts"), ("A", "sts"), ("C", "classification")):
        write_task(tmp_path / name, {"kind": kind, "prompt": None}, test=STS_ROW)
    least = '\ufeff{"name": "A", "kind": "sts", "split": null}'
    (tmp_path / "A" / "task.json").write_text(least, encoding="utf-8")
    found = find_tasks([str(tmp_path), str(tmp_path / "A")])               # named twice, there once
    assert [task["name"] for task in found] == ["C", "A", "B"]
    assert found[1] == {"name": "A", "kind": "sts", "metric": "cosine_spearman", "prompt": "", "split": "test",
                        "samples_per_label": 8, "folder": tmp_path / "A"}
    assert {task["kind"] for task in find_tasks([str(MINI)])} == CATEGORIES.keys()


def test_two_folders_of_one_name_and_folders_without_a_task_are_refused(tmp_path):
    with pytest.raises(UserError, match="no task.json in or below it"):
        find_tasks([str(tmp_path)])
    for folder in "ab":
        write_task(tmp_path / folder, {"kind": "sts", "name": "Same"}, test=STS_ROW)
    with pytest.raises(UserError, match="b/task.json: .*/a also calls itself Same"):
        find_tasks([str(tmp_path)])
    with pytest.raises(UserError, match="empty: no .jsonl file in it"):
        find_tasks([str(write_task(tmp_path / "empty", {"kind": "sts"}))])


BAD_TASKS = [
    ({"kind": "poetry"}, "needs a name and a kind, one of classification"),
    ({"kind": "sts", "name": ""}, "needs a name and a kind"),
    ({"kind": "sts", "name": 3}, "'name' is missing or not a string"),
    ({"kind": ["sts"]}, "'kind' is missing or not a string"),
    ({"kind": "sts", "prompt": 3}, "'prompt' is missing or not a string"),
    ({"kind": "sts", "note": ["a"]}, "'note' is missing or not a string"),
    ({"kind": "sts", "split": "a\0b"}, "'split' holds a NUL"),
    ({"kind": "sts", "name": "n\ud83d"}, "not readable as JSON .*surrogates"),
    ({"kind": "sts", "split": "sub/test"}, "'split' is 'sub/test', but names a file of this folder"),
    ({"kind": "sts", "split": "../T/test"}, "'split' is '../T/test'"),
    ({"kind": "sts", "split": "/tmp/test"}, "'split' is '/tmp/test'"),
    ({"kind": "sts", "split": ""}, "'split' is ''"),
    ({"kind": "sts", "split": "scores.tasks"}, "'split' is 'scores.tasks'"),
    ({"kind": "clustering", "bootstraps": -1}, "'bootstraps' must be above 0"),
    ({"kind": "clustering", "sampled_share": 2.0}, "'sampled_share' must be above 0 and at most 1"),
    ({"kind": "clustering", "sampled_share": -1}, "'sampled_share' must be above 0 and at most 1"),
    ({"kind": "clustering", "sampled_share": 0}, "'sampled_share' must be above 0 and at most 1"),
    ({"kind": "classification", "samples_per_label": "8"}, "'samples_per_label' is missing or not a whole"),
    ({"kind": "classification", "samples_per_label": 0}, "'samples_per_label' must be above 0"),
    ({"kind": "retrieval", "ignore_identical_ids": "false"}, "'ignore_identical_ids' is missing or not true"),
]


@pytest.mark.parametrize("task, message", BAD_TASKS)
def test_a_bad_task_json_gets_one_line(task, message, tmp_path):
    write_task(tmp_path / "T", task, test=STS_ROW)
    with pytest.raises(UserError, match=f"T/task.json: {message}") as raised:
        find_tasks([str(tmp_path)])
    assert "\n" not in str(raised.value)


BAD_FILES = [
    # lines that are no rows
    ("sts", {"filler": "{}\n"}, "test.jsonl: cannot be read .No such file"),
    ("sts", {"test": "\n"}, "test.jsonl: empty"),
    ("sts", {"test": STS_ROW + "{oops\n"}, "test.jsonl:2: not JSON"),
    ("sts", {"test": STS_ROW + "[1]\n"}, "test.jsonl:2: holds no JSON object"),
    ("sts", {"test": STS_ROW + STS_ROW.replace('"a"', '"a\\ud800"')}, "test.jsonl:2: not JSON .*surrogates"),
    ("sts", {"test": STS_ROW + '{"score": ' + "[" * 200_000 + "\n"}, "test.jsonl:2: not JSON"),
    # rows without what their kind needs
    ("sts", {"test": STS_ROW + '{"sentence1": "a", "score": 1}\n'}, "test.jsonl:2: 'sentence2' is missing"),
    ("sts", {"test": STS_ROW + STS_ROW.replace(": 1", ": NaN")}, "test.jsonl:2: 'score' is"),
    ("sts", {"test": STS_ROW + STS_ROW.replace(": 1", ": 1" + 400 * "0")}, "test.jsonl:2: 'score' is"),
    ("sts", {"test": STS_ROW.replace(": 1", ": -Infinity")}, "test.jsonl:1: 'score' is"),
    ("sts", {"test": STS_ROW[:-2] + ', "prompt": 3}\n'}, "test.jsonl:1: 'prompt' is"),
    ("pair-classification", {"test": STS_ROW}, "test.jsonl:1: 'label' is"),
    ("bitext", {"test": '{"sentence1": "a"}\n'}, "test.jsonl:1: 'sentence2' is"),
    ("classification", {"test": [{"text": "a", "label": 1}]}, "train.jsonl: cannot be read"),
    ("classification", {"test": [{"text": "a", "label": "1"}], "train": [{"text": "a", "label": 1}]},
     "T: labels are numbers in some rows and strings in others"),
    ("clustering", {"test": [{"sentences": [], "labels": []}]}, "test.jsonl:1: 0 sentences, 0 labels"),
    ("clustering", {"test": [{"sentences": ["a", "b"], "labels": [1]}]}, "test.jsonl:1: 2 sentences, 1 label"),
    ("clustering", {"test": [{"sentences": ["a", "b"], "labels": [1, "1"]}]}, "test.jsonl:1: 'labels' is"),
    ("summarization", {"test": [{"human_summaries": [], "machine_summaries": ["b"], "relevance": [1]}]},
     "test.jsonl:1: a text needs a human summary"),
    ("summarization", {"test": [{"human_summaries": ["a"], "machine_summaries": ["b"], "relevance": []}]},
     "test.jsonl:1: 1 machine summaries, 0 ratings"),
    ("summarization", {"test": [{"human_summaries": ["a"], "machine_summaries": [], "relevance": [math.inf]}]},
     "test.jsonl:1: 'relevance' is"),
    ("reranking", {"test": [{"query": "q", "positive": ["a"], "negative": [1]}]}, "jsonl:1: 'negative' is"),
    ("reranking", {"test": [{"query": [1], "positive": [], "negative": []}]}, "test.jsonl:1: 'query' is"),
    ("reranking", {"test": [{"query": [], "positive": ["a"], "negative": ["b"]}]}, "jsonl:1: the query is"),
    ("reranking", {"test": [{"query": "q", "positive": [], "negative": []}]}, "T: no row has both"),
    # retrieval's three files
    ("retrieval", {"queries": QUERY}, "test.tsv: cannot be read"),
    ("retrieval", {"queries": QUERY, "qrels": ""}, "test.tsv: no judgements"),
    ("retrieval", {"queries": QUERY, "qrels": "query-id\tcorpus-id\tscore\n"}, "test.tsv: no judgements"),
    *(("retrieval", {"queries": QUERY, "qrels": f"{first}\nq\td\t1\n"}, "test.tsv:1: needs query-id, corpus-id")
      for first in ("q d\t1", "q\td", "q\t0\td\t1", "q\td\tone")),
    ("retrieval", {"queries": QUERY, "qrels": "query-id\tcorpus-id\tscore\nq d 1\n"}, "test.tsv:2: needs"),
    ("retrieval", {"queries": QUERY, "qrels": "query-id\tcorpus-id\tscore\nq\td\tinf\n"}, "test.tsv:2: needs"),
    ("retrieval", {"queries": QUERY, "qrels": "x\td\t1\n"}, "queries.jsonl: none is judged"),
    ("retrieval", {"queries": QUERY, "qrels": "query-id\tcorpus-id\tscore\nq\td\t0.5\n"}, "test.tsv:2: needs a whole number as score"),
    ("retrieval", {"queries": [*QUERY, {"_id": "q", "text": "b"}], "qrels": "q\td\t1\n"},
     "queries.jsonl: two rows have the _id 'q' and different texts"),
    ("retrieval", {"queries": [{**QUERY[0], "excluded_ids": "d"}], "qrels": "q\td\t1\n"},
     "queries.jsonl:1: 'excluded_ids' is"),
    ("retrieval", {"queries": QUERY, "qrels": "q\td\t1\n", "corpus": [{"_id": "d", "text": text} for text in "ab"]},
     "corpus.jsonl: two rows have the _id 'd'"),
    ("retrieval", {"queries": QUERY, "qrels": "q\td\t1\n", "corpus": [{"_id": "d"}]},
     "corpus.jsonl:1: 'text' is"),
]


@pytest.mark.parametrize("kind, files, message", BAD_FILES)
def test_a_bad_file_gets_one_line(kind, files, message, tmp_path):
    write_task(tmp_path / "T", {"kind": kind}, **files)
    with pytest.raises(UserError, match=message) as raised:
        run(tmp_path)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("task, message", [
    ({"bootstraps": 1, "sampled_share": 0.1}, "test.jsonl: 'sampled_share' 0.1 of 3 sentences is none: raise it"),
    ({"bootstraps": 1, "levels": True}, "test.jsonl:1: 'labels' is missing or not a list of strings"),
])
def test_a_sample_of_nothing_and_numbers_with_levels_are_refused(tmp_path, task, message):
    write_task(tmp_path / "T", {"kind": "clustering", **task}, test=[{"sentences": [*"abc"], "labels": [1, 2, 1]}])
    with pytest.raises(UserError, match=message):
        run(tmp_path)


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    for folder in ("sets/B", "elsewhere/A", "elsewhere/deep/C"):
        write_task(tmp_path / folder, {"kind": "sts"}, test=STS_ROW)
    (tmp_path / "sets/links").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere/deep/up").symlink_to(tmp_path / "sets", target_is_directory=True)
    (tmp_path / "sets/nowhere").symlink_to(tmp_path / "gone", target_is_directory=True)
    paths = [path.relative_to(tmp_path).as_posix() for path in task_files(tmp_path / "sets")]
    assert paths == ["sets/B/task.json", "sets/links/A/task.json", "sets/links/deep/C/task.json"]
    assert [task["name"] for task in find_tasks([str(tmp_path / "sets")])] == ["A", "B", "C"]


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    write_task(tmp_path / "A", {"kind": "sts"}, test=STS_ROW)
    locked, scandir = tmp_path / "locked", os.scandir
    locked.mkdir()

    def refused(path):                                             # root may read all folders
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match="locked: cannot be read .Permission denied"):
        find_tasks([str(tmp_path)])


def test_ids_whose_hashes_agree_are_told_apart(tmp_path, monkeypatch):
    rows = [{"_id": name, "text": "a"} for name in "dexyz"]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check_ids(path) == (5, set())
    monkeypatch.setattr(tasks, "text_hash", lambda _: 7)
    assert check_ids(path) == (5, set())
    with open(path, "a") as file:
        file.write('{"_id": "e", "text": "twin"}\n')
    with pytest.raises(UserError, match="two rows have the _id 'e'"):
        check_ids(path)


def test_ids_are_looked_up_by_row_number_and_judged_documents_that_are_missing_are_named(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(f'{{"_id": "{name}"}}\n' for name in "abc"))
    assert look_up_ids(path, set(), {0, 2}, {"a", "b", "gone"}) == ({0: "a", 2: "c"}, {"gone"})


def test_qrels_are_read_with_and_without_a_header(tmp_path):
    path = tmp_path / "test.tsv"
    for header in ("", "query-id\tcorpus-id\tscore\n", "\ufeffqid\tdocid\tRelevance\r\n"):
        path.write_text(header + "q\td\t1\nq\te\t0.0\r\nr\td\t-1\n")
        assert read_qrels(path) == {"q": {"d": 1, "e": 0}, "r": {"d": -1}}


def test_labels_may_be_true_and_false(tmp_path):
    rows = [{"text": "a", "label": True}, {"text": "b", "label": False}]
    task = write_task(tmp_path / "T", {"kind": "classification"}, train=rows, test=rows)
    assert run(task)["average"] == 1.0 and len(list(read_rows(task / "test.jsonl"))) == 2


def test_a_document_that_stands_twice_word_by_word_counts_once(tmp_path):
    rows = [{"_id": name, "text": text} for name, text in ("ax", "by", "ax", "cz", "ax")]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check_ids(path) == (5, {2, 4})
    assert [row["_id"] for row in read_distinct(path, {2, 4})] == ["a", "b", "c"]
    assert look_up_ids(path, {2, 4}, {2}, {"c"}) == ({2: "c"}, set())


def test_a_corpus_is_checked_again_only_if_it_has_changed(tmp_path, monkeypatch):
    path, reads, read_rows = tmp_path / "corpus.jsonl", [], tasks.read_rows
    monkeypatch.setattr(tasks, "read_rows", lambda *args: reads.append(1) or read_rows(*args))
    path.write_text('{"_id": "a", "text": "b"}\n')
    assert check_ids(path) == check_ids(path) == (1, set()) and len(reads) == 1
    with open(path, "a") as file:
        file.write('{"_id": "a", "text": "b"}\n')
    assert check_ids(path) == (2, {1})
