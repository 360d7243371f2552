"""plumbing/tasks.py: task folders on disk -> rows that are known to be whole.

evaluate.py's docstring shows the layouts. Here stand the schemas of the eight kinds, and beside them the
readers, which name file and line of what does not fit. A corpus is never held in memory: it is read as often
as it is needed.
"""
import functools
import os
from pathlib import Path

import numpy as np

from plumbing.errors import UserError, check
from plumbing.files import OPTIONAL, read_json, read_lines, read_located, text_hash

CATEGORIES = {                        # kind -> MTEB's name for it, in the order of the paper's Table 1
    "classification": "Classification",
    "clustering": "Clustering",
    "pair-classification": "PairClassification",
    "reranking": "Reranking",
    "retrieval": "Retrieval",
    "sts": "STS",
    "summarization": "Summarization",
    "bitext": "BitextMining",
}

METRICS = {                      # kind -> its headline metric, and others that task.json may name instead
    "classification": ("accuracy",),
    "clustering": ("v_measure",),
    "pair-classification": ("max_ap", "cosine_ap", "dot_ap", "euclidean_ap", "manhattan_ap"),
    "reranking": ("map",),
    "retrieval": ("ndcg_at_10", "mrr_at_10", "recall_at_100", "map_at_1000"),
    "sts": ("cosine_spearman",),
    "summarization": ("cosine_spearman", "cosine_spearman_with_p_values"),
    "bitext": ("f1", "accuracy"),
}

TASK = {
    "name": str,
    "kind": str,
    "prompt": (str, OPTIONAL),
    "split": (str, OPTIONAL),
    "metric": (str, OPTIONAL),
    "note": (str, OPTIONAL),
    "samples_per_label": (int, OPTIONAL),
    "ignore_identical_ids": (bool, OPTIONAL),
    "bootstraps": (int, OPTIONAL),               # of clustering; see evaluate.score_bootstrapped_clustering
    "sampled_share": (float, OPTIONAL),
    "levels": (bool, OPTIONAL),
}
DEFAULTS = {"prompt": "", "split": "test", "samples_per_label": 8}

QRELS_SCORES = ("score", "relevance", "label", "grade", "rating")     # what a header calls its third column

PAIR = {"sentence1": str, "sentence2": str}
ROWS = {                              # kind -> the schema of a row
    "classification": {"text": str, "label": (int, str, bool)},
    "clustering": {"sentences": [str], "labels": ([int], [str])},
    "pair-classification": {**PAIR, "label": (int, bool)},
    "reranking": {"query": (str, [str]), "positive": [str], "negative": [str]},
    # of the queries and of the corpus; a query may name documents that don't count for it, as in BRIGHT
    "retrieval": {"_id": str, "text": str, "title": (str, OPTIONAL), "excluded_ids": ([str], OPTIONAL)},
    "sts": {**PAIR, "score": float},
    "summarization": {"human_summaries": [str], "machine_summaries": [str], "relevance": [float]},
    "bitext": PAIR,
}


# ------------------------------------------------------------------------------------------------- tasks

def find_tasks(folders: list[str]) -> list[dict]:
    """The tasks in or below the folders, by category and name. UserError: none, or two of one name."""
    tasks = {}
    for folder in folders:
        for path in task_files(folder):
            task = read_task(path)
            known = tasks.setdefault(task["name"], task)
            same = known["folder"].resolve() == path.parent.resolve()
            check(same, f"{path}: {known['folder']} also calls itself {task['name']}")
    kinds = list(CATEGORIES)
    return sorted(tasks.values(), key=lambda task: (kinds.index(task["kind"]), task["name"]))


def task_files(folder: str | Path) -> list[Path]:
    """Each task.json in or below a folder, sorted. Links to folders are followed, each folder once.

    UserError: there is none, or a folder cannot be read: what is passed over is missing in averages, and in
    the texts that training must not see.
    """
    def refuse(error):
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    check(Path(folder).is_dir(), f"{folder}: no such folder")
    paths, visited = [], set()
    for path, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(path)
        if real in visited:                                # a link to a folder above would never end
            folders.clear()
            continue
        visited.add(real)
        folders.sort()                                     # of two ways to a folder, the same one each time
        if "task.json" in files:
            paths.append(Path(path) / "task.json")
    check(paths, f"{folder}: no task.json in or below it")
    return sorted(paths)


def read_task(path: Path) -> dict:
    """A task.json, with the defaults of what it leaves out and its `folder`."""
    given = read_json(path, TASK)
    given = {key: value for key, value in given.items() if value is not None}
    task = {**DEFAULTS, **given, "folder": path.parent}
    check(task["name"] and task["kind"] in CATEGORIES,
          f"{path}: needs a name and a kind, one of {', '.join(CATEGORIES)}")
    metrics = METRICS[task["kind"]]
    task.setdefault("metric", metrics[0])
    check(task["metric"] in metrics,
          f"{path}: metric {task['metric']!r}; {task['kind']} has {', '.join(metrics)}")
    for key in ("name", "prompt", "split"):
        check("\0" not in task[key], f"{path}: {key!r} holds a NUL")
    split = task["split"]                     # names files in the folder, which a score's key is a hash of
    check(split and "/" not in split and not split.endswith(".tasks"),
          f"{path}: 'split' is {split!r}, but names a file of this folder: a plain name, such as test")
    for key in ("samples_per_label", "bootstraps"):
        check(task.get(key, 1) > 0, f"{path}: {key!r} must be above 0")
    check(0 < task.get("sampled_share", 1) <= 1, f"{path}: 'sampled_share' must be above 0 and at most 1")
    check(any(path.parent.glob("*.jsonl")), f"{path.parent}: no .jsonl file in it")
    return task


# -------------------------------------------------------------------------------------------------- rows

def read_rows(path: Path, schema: dict = {}, check_row=None):
    """Yield the objects of a JSON-lines file. UserError: it is empty, or a line does not fit the schema.

    Any row may have its own `prompt`. check_row(row, where) checks what a schema cannot say.
    """
    empty = True
    for where, row in read_located(path, {**schema, "prompt": (str, OPTIONAL)}):
        empty = False
        if check_row:
            check_row(row, where)
        yield row
    check(not empty, f"{path}: empty")


def read_test(task: dict) -> list[dict]:
    """The rows of the task's split."""
    path = task["folder"] / f"{task['split']}.jsonl"
    kind = task["kind"]
    schema = ROWS[kind]
    if kind == "clustering" and task.get("levels"):
        schema = {**schema, "labels": [str]}               # a number has no levels
    rows = list(read_rows(path, schema, ROW_CHECKS.get(kind)))
    if kind == "clustering":
        share, sentences = task.get("sampled_share", 1), sum(len(row["sentences"]) for row in rows)
        check(int(share * sentences) > 0,
              f"{path}: 'sampled_share' {share} of {sentences} sentences is none: raise it in task.json")
    return rows


def check_reranking(row: dict, where: str) -> None:
    check(row["query"] != [], f"{where}: the query is an empty list")


def check_clustering(row: dict, where: str) -> None:
    sentences, labels = len(row["sentences"]), len(row["labels"])
    check(sentences == labels and sentences > 0,
          f"{where}: {sentences} sentences, {labels} labels: a set needs one label a sentence")


def check_summarization(row: dict, where: str) -> None:
    check(row["human_summaries"], f"{where}: a text needs a human summary at least")
    summaries, ratings = len(row["machine_summaries"]), len(row["relevance"])
    check(summaries == ratings and summaries > 0,
          f"{where}: {summaries} machine summaries, {ratings} ratings: each summary needs a rating")


ROW_CHECKS = {
    "reranking": check_reranking,
    "clustering": check_clustering,
    "summarization": check_summarization,
}


def read_train_and_test(task: dict) -> tuple[list[dict], list[dict]]:
    """The rows of train.jsonl and of the split of a classification task."""
    train = list(read_rows(task["folder"] / "train.jsonl", ROWS["classification"]))
    test = read_test(task)
    types = {type(row["label"]) for row in train + test}
    # 1 is never "1": every answer would count as wrong.
    check(len(types) == 1, f"{task['folder']}: labels are numbers in some rows and strings in others")
    return train, test


def read_reranking(task: dict) -> tuple[list[dict], int]:
    """(the rows with both positive and negative texts, these together as `candidates`; how many rows have
    one side)."""
    rows = read_test(task)
    used = [row for row in rows if row["positive"] and row["negative"]]
    check(used, f"{task['folder']}: no row has both positive and negative texts")
    used = [{**row, "candidates": row["positive"] + row["negative"]} for row in used]
    return used, len(rows) - len(used)


def check_task(task: dict) -> None:
    """Read all of a task's rows. UserError: one is not whole."""
    if task["kind"] == "retrieval":
        read_queries(task)
        check_ids(task["folder"] / "corpus.jsonl")
    elif task["kind"] == "classification":
        read_train_and_test(task)
    elif task["kind"] == "reranking":
        read_reranking(task)
    else:
        read_test(task)


# --------------------------------------------------------------------------------------------- retrieval

def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """BEIR's judgements: query id -> {document id: grade}; query-id, corpus-id, score between tabs."""
    qrels = {}
    for number, line in read_lines(path):
        try:
            query, document, grade = line.decode().split("\t")
            if number == 1 and grade.strip().lower() in QRELS_SCORES:
                continue                                               # the header
            grade = float(grade)
        except ValueError:
            raise UserError(f"{path}:{number}: needs query-id, corpus-id, score between tabs, in UTF-8") \
                from None
        check(grade.is_integer(), f"{path}:{number}: needs a whole number as score, not {grade}")
        qrels.setdefault(query, {})[document] = int(grade)
    check(qrels, f"{path}: no judgements")
    return qrels


def read_queries(task: dict) -> tuple[list[dict], dict[str, dict[str, int]]]:
    """(the queries that are judged, all judgements) of a retrieval task."""
    qrels = read_qrels(task["folder"] / "qrels" / f"{task['split']}.tsv")
    path = task["folder"] / "queries.jsonl"
    _, repeated = check_ids(path)
    queries = [row for row in read_distinct(path, repeated) if row["_id"] in qrels]
    check(queries, f"{path}: none is judged in qrels/{task['split']}.tsv")
    return queries, qrels


def check_ids(path: Path) -> tuple[int, set[int]]:
    """Read a corpus or queries once -> (number of rows, numbers of those that repeat another word by word).

    Of a row stay 8 bytes, a hash of its id, so that a corpus of any size passes. Every model asks, but the
    file is read again only if it has changed. UserError: a row is not whole, or two have one _id and
    different texts.
    """
    stamp = (path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else None
    return checked_ids(path, stamp)


@functools.cache
def checked_ids(path: Path, stamp) -> tuple[int, set[int]]:
    """check_ids of a file as it is at this size and time."""
    hashes = np.fromiter((text_hash(row["_id"]) for row in read_rows(path, ROWS["retrieval"])), np.int64)
    hashes.sort()
    twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    first, repeated = {}, set()                            # first: id -> the text that it had first
    if not twice:
        return len(hashes), repeated
    for number, row in enumerate(read_rows(path)):
        if text_hash(row["_id"]) in twice:                 # equal ids, or different ids with equal hashes
            text = document_text(row)
            if row["_id"] in first:
                repeated.add(number)
            check(first.setdefault(row["_id"], text) == text,
                  f"{path}: two rows have the _id {row['_id']!r} and different texts: remove or rename one")
    return len(hashes), repeated


def read_distinct(path: Path, repeated: set[int]):
    """Yield the rows of a corpus or of queries but those whose numbers are in `repeated`."""
    for number, row in enumerate(read_rows(path)):
        if number not in repeated:
            yield row


def look_up_ids(path: Path, repeated: set[int], numbers: set[int], judged: set[str]):
    """Read a corpus once more -> ({row number: id} of these distinct rows, the judged ids that no row
    has)."""
    ids, unknown = {}, set(judged)
    for i, row in enumerate(read_distinct(path, repeated)):
        unknown.discard(row["_id"])
        if i in numbers:
            ids[i] = row["_id"]
    return ids, unknown


def document_text(row: dict) -> str:
    """BEIR's rule: title, a space, text.

    >>> document_text({"title": "Ferries", "text": "They are late."}), document_text({"text": "None."})
    ('Ferries They are late.', 'None.')
    """
    return f"{row.get('title') or ''} {row['text']}".strip()
