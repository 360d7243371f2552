"""tools/study/subsets.py: the committed lists, and the task folders that are made of lists."""
import json

import pytest

from plumbing.errors import UserError
from plumbing.tasks import find_tasks, read_qrels, read_rows
from scripts import complaint
from study_lists import MINI, TEST, small_study
from tools.study import subsets


def items(entries: list) -> set:
    """What the entries keep, one by one: row numbers, and (row, item) of those kept in part."""
    kept = set()
    for entry in entries:
        if isinstance(entry, int):
            kept.add(entry)
        else:
            kept |= {(entry[0], item) for item in entry[1].get("sentences labels", [0])}
    return kept


def test_the_committed_subsets_are_small_and_disjoint():
    study = subsets.read_study(subsets.STUDY)
    test, dev = study["subsets"]["test"], study["subsets"]["dev"]
    for subset in (test, dev):
        assert subset["tokens"] == sum(subset["tokens by task"].values()) <= 170_000
        assert subset["tokens by task"].keys() == subset["tasks"].keys()
    for task, files in dev["tasks"].items():
        for file, entries in files.items():
            ours, theirs = items(entries), items(test["tasks"][task][file])
            assert ours and theirs and not ours & theirs, (task, file)


def test_subsets_are_task_folders_with_the_listed_rows(tmp_path):
    folders = subsets.make(small_study(), MINI, tmp_path)
    assert [folder.name for folder in folders] == ["test", "dev"]
    tasks = {task["name"]: task for task in find_tasks([str(folders[0])])}
    assert tasks.keys() == TEST.keys() and all("Fixed subsets" in task["note"] for task in tasks.values())

    def rows(name, file="test.jsonl"):
        return list(read_rows(tasks[name]["folder"] / file))
    for file in ("STS/test.jsonl", "Classification/train.jsonl", "Retrieval/corpus.jsonl"):
        name, file = file.split("/")
        source = list(read_rows(MINI / name / file))
        assert rows(name, file) == [source[number] for number in TEST[name][file]]
    cluster, = rows("Clustering")
    source, = read_rows(MINI / "Clustering" / "test.jsonl")
    kept = TEST["Clustering"]["test.jsonl"][0][1]["sentences labels"]
    for column in ("sentences", "labels"):
        assert cluster[column] == [source[column][i] for i in kept]
    assert [len(row["human_summaries"]) for row in rows("Summarization")] == [1, 1, 1]
    assert min(len(row["machine_summaries"]) for row in rows("Summarization")) > 1


def test_the_judgements_of_what_is_kept_are_kept(tmp_path):
    folder = subsets.make(small_study(), MINI, tmp_path)[0] / "Retrieval"
    qrels, full = (read_qrels(path / "qrels" / "test.tsv") for path in (folder, MINI / "Retrieval"))
    kept = {row["_id"] for row in read_rows(folder / "corpus.jsonl")}
    assert len(qrels) == 5 and len(kept) == 20
    for query, judged in qrels.items():
        assert {document for document, grade in full[query].items() if grade > 0} <= judged.keys() <= kept


def test_another_version_of_a_file_and_a_foreign_folder_are_refused(tmp_path):
    study = small_study()
    changed = {**study, "sources": study["sources"] | {"STS/test.jsonl": "0" * 16}}
    with pytest.raises(UserError, match="STS/test.jsonl: not the file"):
        subsets.make(changed, MINI, tmp_path)
    with pytest.raises(UserError, match="no such file; give the folder"):
        subsets.make(study, tmp_path, tmp_path)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "mine.txt").touch()
    with pytest.raises(UserError, match="not written by subsets.py"):
        subsets.make(study, MINI, tmp_path)
    assert (tmp_path / "test" / "mine.txt").exists()


def test_the_tool_says_what_it_made(tmp_path, capsys):
    (tmp_path / "lists.json").write_text(json.dumps(small_study()))
    subsets.main([str(MINI), "--out", str(tmp_path / "out"), "--study", str(tmp_path / "lists.json")])
    said = capsys.readouterr().out
    assert f"{tmp_path / 'out' / 'test'}: 8 tasks of 8 categories, 8 tokens" in said and "  STS: 1\n" in said
    (tmp_path / "other.json").write_text("{}")
    assert "other.json: 'max_length' is missing" in complaint(
        capsys, subsets.main, MINI, "--study", tmp_path / "other.json")
