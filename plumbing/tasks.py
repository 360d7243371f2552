"""plumbing/tasks.py: task folders on disk -> rows that are known to be whole.

evaluate.py's docstring shows the layouts. Here stand the schemas of the eight kinds, and beside them the
readers, which name file and line of what does not fit. A corpus is never held in memory: it is read as often
as it is needed.
"""
from collections import Counter
from pathlib import Path

import numpy as np

from plumbing.errors import check
from plumbing.files import OPTIONAL, parse_line, read_json, read_lines, text_hash

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

METRICS = {                           # kind -> its headline metric, and others that task.json may name instead
    "classification": ("accuracy",),
    "clustering": ("v_measure",),
    "pair-classification": ("max_ap", "cosine_ap", "dot_ap", "euclidean_ap", "manhattan_ap"),
    "reranking": ("map",),
    "retrieval": ("ndcg_at_10", "recall_at_100", "map_at_1000"),
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
}
DEFAULTS = {"prompt": "", "split": "test", "samples_per_label": 8}

PAIR = {"sentence1": str, "sentence2": str}
ROWS = {                              # kind -> the schema of a row
    "classification": {"text": str, "label": (int, str, bool)},
    "clustering": {"sentences": [str], "labels": ([int], [str])},
    "pair-classification": {**PAIR, "label": (int, bool)},
    "reranking": {"query": (str, [str]), "positive": [str], "negative": [str]},
    "retrieval": {"_id": str, "text": str},                            # of the queries and of the corpus
    "sts": {**PAIR, "score": float},
    "summarization": {"human_summaries": [str], "machine_summaries": [str], "relevance": [float]},
    "bitext": PAIR,
}


# ------------------------------------------------------------------------------------------------- tasks

def find_tasks(folders: list[str]) -> list[dict]:
    """The tasks in or below the folders, by category and name. UserError: none, or two of one name."""
    tasks = {}
    for folder in folders:
        paths = sorted(Path(folder).rglob("task.json"))
        check(paths, f"{folder}: no task.json in or below it")
        for path in paths:
            task = read_task(path)
            known = tasks.setdefault(task["name"], task)
            same = known["folder"].resolve() == path.parent.resolve()
            check(same, f"{path}: {known['folder']} also calls itself {task['name']}")
    kinds = list(CATEGORIES)
    return sorted(tasks.values(), key=lambda task: (kinds.index(task["kind"]), task["name"]))


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
    check(task["samples_per_label"] > 0, f"{path}: 'samples_per_label' must be above 0")
    check(any(path.parent.glob("*.jsonl")), f"{path.parent}: no .jsonl file in it")
    return task


# -------------------------------------------------------------------------------------------------- rows

def read_rows(path: Path, schema: dict = {}, check_row=None):
    """Yield the objects of a JSON-lines file. UserError: it is empty, or a line does not fit the schema.

    Any row may have its own `prompt`. check_row(row, where) checks what a schema cannot say.
    """
    empty = True
    for number, line in read_lines(path):
        empty = False
        where = f"{path}:{number}"
        row = parse_line(line, where, {**schema, "prompt": (str, OPTIONAL)})
        if check_row:
            check_row(row, where)
        yield row
    check(not empty, f"{path}: empty")


def read_test(task: dict) -> list[dict]:
    """The rows of the task's split."""
    path = task["folder"] / f"{task['split']}.jsonl"
    return list(read_rows(path, ROWS[task["kind"]], ROW_CHECKS.get(task["kind"])))


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


# --------------------------------------------------------------------------------------------- retrieval

def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """BEIR's judgements: query id -> {document id: grade}; query-id, corpus-id, score between tabs."""
    qrels = {}
    for number, line in read_lines(path):
        try:
            query, document, grade = line.decode().split("\t")
            grade = int(float(grade))
        except (ValueError, OverflowError):                            # infinity is no whole number
            check(number == 1, f"{path}:{number}: needs query-id, corpus-id, score between tabs, in UTF-8")
            continue                                                   # the header
        qrels.setdefault(query, {})[document] = grade
    check(qrels, f"{path}: no judgements")
    return qrels


def read_queries(task: dict) -> tuple[list[dict], dict[str, dict[str, int]]]:
    """(the queries that are judged, all judgements) of a retrieval task."""
    qrels = read_qrels(task["folder"] / "qrels" / f"{task['split']}.tsv")
    path = task["folder"] / "queries.jsonl"
    check_ids(path)
    queries = [row for row in read_rows(path) if row["_id"] in qrels]
    check(queries, f"{path}: none is judged in qrels/{task['split']}.tsv")
    return queries, qrels


def check_ids(path: Path) -> int:
    """Read a corpus or queries once -> the number of rows. UserError: a row is not whole, two share an _id.

    Of a row stay 8 bytes, a hash of its id, so that a corpus of any size passes.
    """
    hashes = np.fromiter((text_hash(row["_id"]) for row in read_rows(path, ROWS["retrieval"])), np.int64)
    hashes.sort()
    twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if twice:                                              # equal ids, or different ids with equal hashes
        suspects = Counter(row["_id"] for row in read_rows(path) if text_hash(row["_id"]) in twice)
        name, times = suspects.most_common(1)[0]
        check(times == 1, f"{path}: two rows have the _id {name!r}: remove or rename one")
    return len(hashes)


def look_up_ids(path: Path, numbers: set[int], judged: set[str]) -> tuple[dict[int, str], set[str]]:
    """Read a corpus once more -> (the ids of these row numbers, the judged ids that no row has)."""
    ids, unknown = {}, set(judged)
    for i, row in enumerate(read_rows(path)):
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
