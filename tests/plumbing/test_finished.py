"""plumbing/finished.py: what is scored is in the key of a score, and nothing else."""
import pytest

from plumbing.finished import ScoreLog
from plumbing.tasks import read_task
from scoring import write_task

ROW = {"sentence1": "a", "sentence2": "b", "score": 1}


def key(folder, log) -> str:
    return ScoreLog(log).key(read_task(folder / "task.json"), ["settings"])


@pytest.fixture
def folder(tmp_path):
    return write_task(tmp_path / "T", {"kind": "sts"}, test=[ROW])


def test_other_rows_have_another_key(folder, tmp_path):
    first = key(folder, tmp_path / "scores.tasks.jsonl")
    write_task(folder, {"kind": "sts"}, test=[{**ROW, "score": 2}])
    assert key(folder, tmp_path / "scores.tasks.jsonl") != first


def test_a_log_in_the_task_folder_changes_no_key(folder):
    path = folder / "scores.tasks.jsonl"
    log = ScoreLog(path)
    task = read_task(folder / "task.json")
    log.put(log.key(task, ["settings"]), "model", "T", {"main_score": 0.5})
    assert ScoreLog(path).get(key(folder, path)) == {"main_score": 0.5}
