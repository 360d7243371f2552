"""A small study on data/mini, which stands for the full test sets: lists of rows as in data/study.json."""
from scripts import ROOT
from tools.study.subsets import file_hash

MINI = ROOT / "data" / "mini"
SUMMARIES = {"human_summaries": [0]}
TEST = {
    "Classification": {
        "train.jsonl": [1, 3, 5, 6, 11, 13, 15, 26, 29, 32, 34, 38, 41, 49, 51, 52, 53, 54, 56, 63, 69, 72,
                        74, 75, 79, 84, 95],
        "test.jsonl": [17, 20, 30, 34, 40, 49, 59, 60, 97, 99, 100, 101]},
    "Clustering": {
        "test.jsonl": [[0, {"sentences labels": [3, 5, 71, 72, 79, 90, 101, 103, 104, 109, 114, 122]}]]},
    "PairClassification": {"test.jsonl": [10, 12, 13, 19, 22, 28, 33, 41, 55, 59, 67, 69]},
    "Reranking": {
        "test.jsonl": [[17, {"positive": [0], "negative": [0]}], [26, {"positive": [0], "negative": [0, 1]}],
                       [52, {"positive": [0], "negative": [0, 1]}]]},
    "Retrieval": {
        "queries.jsonl": [2, 35, 45, 83, 99],
        "corpus.jsonl": [1, 16, 24, 57, 75, 82, 90, 143, 149, 153, 188, 190, 191, 202, 213, 215, 306, 376,
                         449, 566]},
    "STS": {"test.jsonl": [1, 11, 22, 24, 26, 29, 35, 37, 46, 55, 59, 60]},
    "Summarization": {"test.jsonl": [[1, SUMMARIES], [3, SUMMARIES], [6, SUMMARIES]]},
    "Bitext": {"test.jsonl": [0, 23, 41, 60, 63, 68]},
}
DEV = {
    "STS": {"test.jsonl": [4, 5, 6, 19, 21, 30, 41, 50, 52, 53, 63, 64]},
    "Bitext": {"test.jsonl": [2, 4, 6, 7, 15, 57]},
}


def small_study() -> dict:
    """As data/study.json. The counts of tokens are made up."""
    files = [f"{task}/{file}" for task, files in TEST.items() for file in files]
    subsets = {name: {"tasks": tasks, "tokens by task": dict.fromkeys(tasks, 1), "tokens": len(tasks)}
               for name, tasks in (("test", TEST), ("dev", DEV))}
    return {"max_length": 64, "sources": {file: file_hash(MINI / file) for file in files}, "subsets": subsets}
