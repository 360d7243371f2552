"""plumbing/finished.py: the scores of tasks that are done, on disk at once, so that a run of days goes on
from there.

A line of the log holds one task's scores and a key, a hash of all that may change them: the model, the
settings, the task's files and this code. So a score is never out of date: whatever changes it changes the
key.
"""
import json
from pathlib import Path

from plumbing.files import append, open_log, read_jsonl, sha256
from plumbing.ranks import agree, rank
from plumbing.remembered import hash_code, hash_files

LINE = {"key": str, "model": str, "task": str, "scores": dict}


def hash_of_task(task: dict) -> str:
    """A hash of all that is scored: the description of the task, and its files.

    A score log is none of them, though --out may put it there: it grows with each task that is scored.
    """
    folder = task["folder"]
    described = {key: value for key, value in task.items() if key != "folder"}
    rows = [path for path in folder.glob("*.jsonl") if not path.name.endswith(".tasks.jsonl")]
    data = hash_files([*rows, *folder.glob("qrels/*.tsv")])
    return sha256(json.dumps([described, data], sort_keys=True).encode())


class ScoreLog:
    """get and put scores by key. No path: nothing is kept. With several ranks, rank 0 reads and writes for
    all."""

    def __init__(self, path: Path | None = None):
        self.scores, self.file, self.data = {}, None, {}
        if path is None:
            return
        self.code = hash_code("evaluate.py", "model.py")
        if rank() == 0:
            self.file = open_log(path)                               # a line torn by a kill is dropped
            self.scores = {row["key"]: row["scores"] for row in read_jsonl(path, LINE, log=True)}

    def key(self, task: dict, settings: list) -> str:
        """settings: what is JSON, and names the model and all flags that may change a score."""
        if self.file is None:                                        # no log, or not this rank's
            return ""
        if task["folder"] not in self.data:                          # hashed once for all models
            self.data[task["folder"]] = hash_of_task(task)
        content = json.dumps([settings, self.data[task["folder"]], self.code], sort_keys=True)
        return sha256(content.encode())

    def get(self, key: str) -> dict | None:
        return agree(self.scores.get(key))

    def put(self, key: str, model: str, task: str, scores: dict) -> None:
        if self.file:
            append(self.file, {"key": key, "model": model, "task": task, "scores": scores})
            self.scores[key] = scores
