"""plumbing/table.py: from the scores of tasks to the table that stands beside the paper's."""
from collections import defaultdict
from pathlib import Path

from plumbing.errors import check
from plumbing.files import OPTIONAL, fields, fits, read_json
from plumbing.finished import hash_of_task
from plumbing.ranks import print0

SCORE = (float, OPTIONAL)                                # None: undefined
SYSTEM = {"average": SCORE, "categories": dict, "tasks": dict, "source": str}
PUBLISHED = Path(__file__).resolve().parents[1] / "prompts" / "tasks.json"


# ---------------------------------------------------------------------------------------------- averages

def averages(scores: dict[str, float | None], category_of: dict[str, str]) -> dict:
    """Means over tasks, by category and in all; parts NAME/PART make one task, None is left out.

    MTEB's and the paper's average is over tasks: a category of twelve tasks weighs twelve times one of one.

    >>> categories = {"A/de": "X", "A/fr": "X", "B": "Y", "C": "Y"}
    >>> result = averages({"A/de": 0.2, "A/fr": 0.4, "B": 0.6, "C": None}, categories)
    >>> result["tasks"], result["categories"], result["average"]     # doctest: +ELLIPSIS
    ({'A': 0.3..., 'B': 0.6, 'C': None}, {'X': 0.3..., 'Y': 0.6}, 0.45)
    """
    parts = defaultdict(list)                            # (task, category) -> the scores of its parts
    for name, score in scores.items():
        task = name.split("/")[0]
        parts[task, category_of[name]].append(score)
    by_task, by_category = {}, defaultdict(list)
    for (task, category), values in parts.items():
        by_task[task] = None if None in values else mean(values)
        by_category[category].append(by_task[task])
    return {
        "average": mean(by_task.values()),
        "categories": {category: mean(values) for category, values in by_category.items()},
        "tasks": by_task,
    }


def mean(values) -> float | None:
    """The mean of the values that are not None; None where there are none."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


# --------------------------------------------------------------------------------------------- benchmark

def read_benchmark(name: str) -> dict:
    """A list of prompts/tasks.json: its tasks' names, their parts' names, published scores by system."""
    table = read_json(PUBLISHED)
    known = ", ".join(table["benchmarks"])
    check(name in table["benchmarks"], f"--benchmark {name}: prompts/tasks.json has {known}")
    benchmark = table["benchmarks"][name]
    benchmark["parts"] = {}
    for task in benchmark["tasks"]:
        parts = [f"{task}/{part}" for part in table["tasks"][task].get("parts", ())]
        benchmark["parts"][task] = parts or [task]
    released = benchmark["published"].get("E5-mistral")
    if released and "tasks" not in released:             # the only system with scores by task
        released["tasks"] = {task: table["tasks"][task]["released"] for task in benchmark["tasks"]}
    return benchmark


def only_of_benchmark(tasks: list[dict], benchmark: dict, name: str) -> list[dict]:
    """The tasks that belong to a benchmark; says how many do not. UserError: none does."""
    names = set(sum(benchmark["parts"].values(), []))
    chosen = [task for task in tasks if task["name"] in names]
    check(chosen, f"--tasks: none of the {len(tasks)} tasks found is one of {name}'s")
    if len(chosen) < len(tasks):
        print0(f"{len(tasks) - len(chosen)} tasks are not of {name}: left out")
    return chosen


def missing_parts(benchmark: dict, scored) -> tuple[list[str], list[str]]:
    """(what of a benchmark was not scored, the scored parts of tasks of which others are missing).

    >>> missing_parts({"parts": {"A": ["A/de", "A/fr"], "B": ["B"], "C": ["C"]}}, ["A/de", "C"])
    (['A/fr', 'B'], ['A/de'])
    """
    missing, incomplete = [], []
    for task, parts in benchmark["parts"].items():
        here = [part for part in parts if part in scored]
        gone = [part for part in parts if part not in scored]
        if not here:
            missing.append(task)                         # by one name, not by that of each part
        elif gone:
            missing += gone
            incomplete += here
    return missing, incomplete


# -------------------------------------------------------------------------------- scores of other systems

def read_recorded(path: Path | None, tasks: list[dict]) -> dict[str, dict]:
    """Scores that tools/study/peers.py recorded: {system: {"average", "categories", "tasks", "source"}}.

    Raises UserError where they were made on other tasks, or on other versions of these.
    """
    if path is None:
        return {}
    recorded = read_json(path, {"systems": dict, "hashes": dict})
    check(recorded["hashes"] == {task["name"]: hash_of_task(task) for task in tasks},
          f"--beside {path}: made on other tasks, or on other versions of them: leave it out, or make it "
          "anew with `python -m tools.study.peers`")
    for name, system in recorded["systems"].items():
        where = f"--beside {path}: {name}"
        fields(system, where, SYSTEM)
        for task, score in [*system["categories"].items(), *system["tasks"].items()]:
            check(fits(score, SCORE), f"{where}: {score!r:.40} is no score of {task}: mend it")
    return recorded["systems"]


# ------------------------------------------------------------------------------------------------- table

def percent(score: float | None) -> str:
    return "-" if score is None else f"{100 * score:.1f}"


def print_estimate(tasks: list[dict], bytes_per_second: float) -> None:
    """How long these tasks may take: the size of their files over the measured rate."""
    size = sum(path.stat().st_size for task in tasks for path in task["folder"].glob("*.jsonl"))
    minutes = size / bytes_per_second / 60
    print0(f"  {len(tasks)} tasks, {size / 1e6:.1f} MB, about {minutes:.1f} minutes")


def print_score(name: str, metric: str, scores: dict, max_length: int, before=False) -> None:
    """The line of a task that is done, with what its user should know. before: an earlier run scored it."""
    notes = [f"{scores['seconds']:.0f} s"]
    if before:
        notes = ["scored before"]
    if scores.get("skipped"):
        notes.append(f"{scores['skipped']} rows or queries skipped")
    if scores.get("unknown"):
        notes.append(f"{scores['unknown']} judged documents are not in the corpus")
    if scores.get("repeated"):
        notes.append(f"{scores['repeated']} documents stand there twice and count once")
    if scores["cut"]:
        notes.append(f"{scores['cut']} of {scores['texts']} texts cut at {max_length} tokens")
    print0(f"  {name}: {metric} {percent(scores['main_score'])} ({', '.join(notes)})")


def print_table(results: dict[str, dict], benchmark: dict | None, recorded: dict = {}) -> None:
    """Models side by side, scores times 100; beside them published scores, then recorded ones."""
    published = benchmark["published"] if benchmark else {}
    names = [*results, *published, *recorded]
    columns = [*results.values(), *published.values(), *recorded.values()]
    width = max(7, *map(len, names))
    first = next(iter(results.values()))

    def line(label, values):
        print0(f"{label:<36}" + "".join(f"  {value:>{width}}" for value in values))

    def scores(group, name):
        return [percent(column.get(group, {}).get(name)) for column in columns]

    line("", names)
    for name in first["tasks"]:
        line(name, scores("tasks", name))
    if benchmark or len(first["tasks"]) > len(first["categories"]):
        for category in first["categories"]:
            line(f"= {category}", scores("categories", category))
    # A published average is over the whole benchmark, ours over the tasks that have a score.
    counts = [sum(score is not None for score in column["tasks"].values()) for column in results.values()]
    counts += [len(benchmark["tasks"]) for _ in published]
    same = len(set(counts)) == 1
    label = f"= Average of {counts[0]} tasks" if same else "= Average"
    line(label, [percent(column["average"]) for column in columns])
    if not same:
        line("  of so many tasks", counts)
    for name, system in recorded.items():
        print0(f"{name}: {system['source']}")
    if len(results) > 1:
        line("Bytes a vector", [column.get("bytes_per_vector", "") for column in columns])
    print_what_is_left_out(results)
    if benchmark:
        print0(benchmark["about"])


def print_what_is_left_out(results: dict[str, dict]) -> None:
    """The tasks that have no score, by name, as they are in no mean."""
    for name, result in results.items():
        undefined = [task for task, score in result["tasks"].items() if score is None]
        if undefined:
            print0(f"{name}: {len(undefined)} tasks or parts undefined, in no mean: {', '.join(undefined)}")
    missing = next(iter(results.values()))["missing"]
    if missing:
        print0(f"{len(missing)} tasks or parts missing, in no mean: {', '.join(missing)}")
