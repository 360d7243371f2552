"""plumbing/pools.py: what decides a run's requests: prompts/, its settings, and the tasks of step 1, frozen.

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
from plumbing.files import (OPTIONAL, fields, file_sha256, fits, read_json, read_jsonl, write_json,
                            write_jsonl)

TASK_TYPE = {"weight": float, "brainstorm": bool, "keys": [str], "instruction": (str, OPTIONAL)}
TASK = {"type": str, "task": str}
GENERATION = {"requests": int, "sha256": str}


# ------------------------------------------------------------------------------------------------ prompts/

def check_prompts(prompts: dict, folder) -> None:
    """Refuse, before anything is sent, values from which no request could be drawn or no example be made.

    prompts: as generate.py's load_prompts gives it.
    """
    where = folder / "values.json"
    task_types = prompts["task_types"]
    for kind, task_type in task_types.items():
        fields(task_type, f"{where}: {kind}", TASK_TYPE)
        keys = task_type["keys"]
        check(len(set(keys)) == len(keys) >= 2 and all(key.strip() for key in keys),
              f"{where}: {kind}: keys {keys}: wanted are two or more, all different: query, positive, ...")
        words = task_type.get("words", [])
        check(isinstance(words, list) and all(fits(one, (str, int)) for one in words),
              f"{where}: {kind}: words {words!r:.60}: wanted is a list of numbers or placeholders' names")
        for name, choices in prompts["placeholders"][kind].items():
            check_choices(choices, f"{where}: {kind}: {name}")
    weights = {kind: task_type["weight"] for kind, task_type in task_types.items()}
    check_weights(weights, f"{where}: task_types")
    of_step_1 = {kind: weights[kind] for kind in weights if task_types[kind]["brainstorm"]}
    if of_step_1:
        check_weights(of_step_1, f"{where}: task_types with step 1")
    numbers = prompts["num_tasks"]
    numbers = numbers if isinstance(numbers, list) else [numbers]
    check(numbers and all(fits(number, int) and number > 0 for number in numbers),
          f"{where}: num_tasks {numbers!r:.60}: wanted is a whole number above 0, or a list of such")
    check_languages(prompts, folder / "languages.json")


def check_languages(prompts: dict, where) -> None:
    languages = prompts["languages"]
    check_weights(languages, f"{where}: weights")
    for language in languages:
        check(language.strip(), f"{where}: {language!r} is no language's name")
    for language, scripts in prompts["scripts"].items():
        check(scripts and fits(scripts, [str]), f"{where}: scripts: {language!r} has no list of strings")
    for kind in prompts["task_types"]:
        pairs = "{source_language}" in prompts["templates"][kind]
        check(not pairs or sum(weight > 0 for weight in languages.values()) >= 2,
              f"{where}: {kind}: a translation needs two languages with a weight above 0")


def check_choices(choices, where: str) -> None:
    """The values of one placeholder: a list, a {value: weight} object, or a single value."""
    if isinstance(choices, dict):
        check_weights(choices, where)
        return
    values = choices if isinstance(choices, list) else [choices]
    check(values and all(fits(value, (str, float)) for value in values),
          f"{where}: {choices!r:.60}: wanted are one or more strings or numbers")


def check_weights(weights: dict, where: str) -> None:
    """Odds: numbers of at least 0, and one of them above it."""
    values = weights.values()
    good = all(fits(weight, float) and weight >= 0 for weight in values) and any(values)
    check(good, f"{where}: weights {list(values)!r:.60}: wanted are numbers of at least 0, not all 0")


# ---------------------------------------------------------------------------------------------- the settings

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


# --------------------------------------------------------------------------------------------- generations

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
