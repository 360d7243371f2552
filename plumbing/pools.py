"""plumbing/pools.py: what decides a run's requests: its settings, and the tasks of step 1, frozen.

A request that was answered must stay what it was, also when a larger --n asks for more tasks. So pools grow
in generations. Each has the tasks of the one before and more, and serves the requests from where that one
ended:

    header.json    the settings, and "tasks": [{"requests": 1000, "sha256": of tasks.jsonl},
                                               {"requests": 500000, "sha256": of tasks2.jsonl}]
    tasks.jsonl    the tasks of the first generation: requests 0 to 999 draw from them
    tasks2.jsonl   those that the second one added: requests 1000 to 499999 draw from both files

A file counts once header.json names it, which is written last: a kill in between leaves the old state. In
runs of earlier versions "tasks" is the hash of tasks.jsonl, and that one generation serves all requests.

Generations are a list of (requests, pools): the number of the first request that is no longer theirs, and
{type: [task, ...]}.
"""
import math

from plumbing.errors import check
from plumbing.files import fields, file_sha256, read_json, read_jsonl, write_json, write_jsonl

TASK = {"type": str, "task": str}
GENERATION = {"requests": int, "sha256": str}


def check_settings(folder, settings: dict) -> None:
    """Note the settings of a new run; refuse others than an old run's own, as far as it noted them."""
    path = folder / "header.json"
    if not path.exists():
        write_json(path, settings | {"tasks": []})
    header = read_json(path)
    for key, value in settings.items():
        check(header.get(key, value) == value,
              f"{path}: the run was begun with {key} {header.get(key)}, not {value}: go back to that, or "
              "choose another --out")


def read_generations(folder) -> list:
    """The generations on which a run has settled so far: [(requests, {type: [task, ...]}), ...]."""
    if not (folder / "header.json").exists():
        return []
    generations = []
    pools = {}
    for number, (requests, sha256) in enumerate(read_header(folder), 1):
        path = tasks_file(folder, number)
        check(path.exists() and file_sha256(path) == sha256,
              f"{path} is not as it was when the run settled on it: restore it, or choose another --out")
        pools = {kind: list(tasks) for kind, tasks in pools.items()}
        for row in read_jsonl(path, TASK):
            pools.setdefault(row["type"], []).append(row["task"])
        generations.append((requests, pools))
    return generations


def read_header(folder) -> list:
    """[(requests, sha256 of its tasks file)] of each generation."""
    path = folder / "header.json"
    tasks = read_json(path).get("tasks") or []
    if isinstance(tasks, str):                         # of an earlier version
        return [(math.inf, tasks)]
    check(isinstance(tasks, list), f"{path}: 'tasks' is no list: restore it, or choose another --out")
    generations = [fields(generation, path, GENERATION) for generation in tasks]
    return [(generation["requests"], generation["sha256"]) for generation in generations]


def tasks_file(folder, number: int):
    """Of generation 1, 2, ..."""
    return folder / ("tasks.jsonl" if number == 1 else f"tasks{number}.jsonl")


def freeze_generation(folder, requests: int, pools: dict) -> list:
    """Settle on larger pools for the requests from the last generation's end to `requests`. Returns all
    generations."""
    generations = read_generations(folder)
    before = last_pools(generations)
    rows = []
    for kind, tasks in pools.items():
        new = tasks[len(before.get(kind, [])):]        # a pool begins with the tasks it had
        rows += [{"type": kind, "task": task} for task in new]
    path = tasks_file(folder, len(generations) + 1)
    write_jsonl(path, rows)
    header = read_json(folder / "header.json")
    header["tasks"] = [*(header["tasks"] or []), {"requests": requests, "sha256": file_sha256(path)}]
    write_json(folder / "header.json", header)
    return read_generations(folder)


def requests_covered(generations: list) -> float:
    """How many requests have a generation to draw from."""
    return generations[-1][0] if generations else 0


def last_pools(generations: list) -> dict:
    return generations[-1][1] if generations else {}
