"""tools/subsets.py: the study's fixed development and test subsets of public test sets.

    python tools/subsets.py make EVALDATA --out data/study       # -> data/study/dev, data/study/test
    python tools/subsets.py draw EVALDATA --base models/smollm2-135m-l10      # draws data/study.json anew

EVALDATA holds the full sets as task folders (evaluate.py describes them). data/study.json holds no text: row
numbers from 0 of each file, and hashes of the files that these count in. A row that is kept in part stands as
[row, {"columns": items}]. No text is in both, training rows and documents included.

How rows are drawn (SIZES says how many): by chance, from generators seeded by subset and task, test first;
    classification, clustering   some labels, as many rows of each; order of rows as in the source
    pair-classification          a third of them positive: the full set's fifth would leave too few
    reranking                    rows with both kinds; at most so many of each kind
    retrieval                    queries with all their relevant documents, and other documents
    summarization                texts with all machine summaries, the first human ones
"""
import argparse
import contextlib
import hashlib
import json
import random
import shutil
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from clean import squeeze  # noqa: E402
from evaluate import (CATEGORIES, Encoder, document_text, evaluate, find_tasks, parse_arguments,  # noqa: E402
                      read_qrels, read_rows)
from model import Embedder, UserError, command, read_json, replace_file  # noqa: E402

STUDY = ROOT / "data" / "study.json"
MAX_LENGTH = 128                      # tokens of a text in the study: what the budgets below are counted with
BUDGET = {"test": 170_000, "dev": 80_000}         # tokens that an evaluation embeds, instructions included
NOTE = "Fixed subsets (data/study.json): scores compare models, and are not those of the full sets."
SIZES = {
    "test": {
        "Banking77Classification": {"labels": 15, "train": 10, "test": 16},
        "StackOverflowClustering": {"labels": 12, "each": 18},
        "BiomedicalClustering": {"labels": 10, "each": 16},
        "TwitterURLCorpus": {"rows": 129},
        "TrecQAReranking": {"rows": 32, "positive": 2, "negative": 5},
        "SciFact": {"queries": 50, "documents": 260},
        "STSBenchmark": {"rows": 300},
        "SummEval": {"rows": 40, "human": 2},
        "Tatoeba/deu-eng": {"rows": 40},
    },
    "dev": {
        "Banking77Classification": {"labels": 10, "train": 10, "test": 10},
        "StackOverflowClustering": {"labels": 10, "each": 12},
        "TwitterURLCorpus": {"rows": 60},
        "TrecQAReranking": {"rows": 15, "positive": 2, "negative": 5},
        "SciFact": {"queries": 25, "documents": 120},
        "STSBenchmark": {"rows": 150},
        "SummEval": {"rows": 20, "human": 2},
    },
}


# --------------------------------------------------------------------------------------------- drawing

class Pool:
    """One task's rows for one subset: what is free of the texts that are taken, in an order by chance."""

    def __init__(self, folder: Path, subset: str, name: str, taken: set[str]):
        self.folder, self.taken, self.rng = folder, taken, random.Random(f"{subset} {name}")

    def rows(self, file: str, *columns: str) -> list[tuple[int, dict]]:
        """(number, row) of the rows whose texts in these columns are all free."""
        rows = list(enumerate(read_rows(self.folder / file)))
        self.rng.shuffle(rows)
        return [(number, row) for number, row in rows if self.free(*(row[column] for column in columns))]

    def free(self, *values) -> bool:
        return not any(squeeze(text) in self.taken for text in flat(values))


def flat(values) -> list[str]:
    return [text for value in values for text in ([value] if isinstance(value, str) else value)]


def draw_rows(pool: Pool, rows: int) -> dict:
    """sts, bitext."""
    return {"test.jsonl": [number for number, _ in pool.rows("test.jsonl", "sentence1", "sentence2")[:rows]]}


def draw_pairs(pool: Pool, rows: int) -> dict:
    found = pool.rows("test.jsonl", "sentence1", "sentence2")
    sides = [[number for number, row in found if row["label"] == label] for label in (1, 0)]
    return {"test.jsonl": sides[0][:rows // 3] + sides[1][:rows - rows // 3]}


def draw_classification(pool: Pool, labels: int, train: int, test: int) -> dict:
    """So many rows of each label from either file; both files keep the same labels."""
    found = {file: pool.rows(file, "text") for file in ("train.jsonl", "test.jsonl")}
    known = sorted({row["label"] for _, row in found["test.jsonl"]})
    kept = pool.rng.sample(known, labels)
    return {file: [number for label in kept for number in
                   [n for n, row in found[file] if row["label"] == label][:size]]
            for file, size in (("train.jsonl", train), ("test.jsonl", test))}


def draw_clustering(pool: Pool, labels: int, each: int) -> dict:
    """One set, drawn from the first of the source."""
    row = next(read_rows(pool.folder / "test.jsonl"))
    kept = pool.rng.sample(sorted(set(row["labels"])), labels)
    free = [i for i, text in enumerate(row["sentences"]) if pool.free(text)]
    pool.rng.shuffle(free)
    items = [i for label in kept for i in [i for i in free if row["labels"][i] == label][:each]]
    return {"test.jsonl": [[0, {"sentences labels": sorted(items)}]]}


def draw_reranking(pool: Pool, rows: int, positive: int, negative: int) -> dict:
    entries = []
    for number, row in pool.rows("test.jsonl", "query", "positive", "negative"):
        if row["positive"] and row["negative"]:
            kept = {side: sorted(pool.rng.sample(range(len(row[side])), min(size, len(row[side]))))
                    for side, size in (("positive", positive), ("negative", negative))}
            entries.append([number, kept])
    return {"test.jsonl": entries[:rows]}


def draw_retrieval(pool: Pool, queries: int, documents: int) -> dict:
    qrels = read_qrels(pool.folder / "qrels" / "test.tsv")
    corpus = {row["_id"]: number for number, row in enumerate(read_rows(pool.folder / "corpus.jsonl"))
              if pool.free(document_text(row))}
    asked, kept = [], {}                                              # kept: ids in order, as a dict's keys
    for number, row in pool.rows("queries.jsonl", "text"):
        relevant = [document for document, grade in qrels.get(row["_id"], {}).items() if grade > 0]
        if relevant and all(document in corpus for document in relevant) and len(asked) < queries:
            asked.append(number)
            kept.update(dict.fromkeys(relevant))
    others = [document for document in sorted(corpus) if document not in kept]
    kept.update(dict.fromkeys(pool.rng.sample(others, max(0, documents - len(kept)))))
    return {"queries.jsonl": asked, "corpus.jsonl": [corpus[document] for document in kept]}


def draw_summarization(pool: Pool, rows: int, human: int) -> dict:
    found = pool.rows("test.jsonl", "human_summaries", "machine_summaries")[:rows]
    return {"test.jsonl": [[number, {"human_summaries": list(range(human))}] for number, _ in found]}


DRAW = {"sts": draw_rows, "bitext": draw_rows, "pair-classification": draw_pairs,
        "classification": draw_classification, "clustering": draw_clustering, "reranking": draw_reranking,
        "retrieval": draw_retrieval, "summarization": draw_summarization}


def draw(evaldata: Path, sizes=None) -> dict:
    """{"max_length", "sources": {file: hash}, "subsets": {subset: {"tasks": {task: {file: entries}}}}}."""
    study = {"max_length": MAX_LENGTH, "sources": {}, "subsets": {}}
    taken: dict[str, set[str]] = {}
    for subset, tasks in (sizes or SIZES).items():
        drawn = {}
        for name, size in tasks.items():
            task, texts = read_json(evaldata / name / "task.json"), taken.setdefault(name, set())
            drawn[name] = DRAW[task["kind"]](Pool(evaldata / name, subset, name, texts), **size)
            drawn[name] = {file: sorted(entries, key=row_number) for file, entries in drawn[name].items()}
            for file, entries in drawn[name].items():
                study["sources"][f"{name}/{file}"] = file_hash(evaldata / name / file)
                for row in kept_rows(evaldata / name / file, entries):
                    texts.update(map(squeeze, row_texts(row)))
        study["subsets"][subset] = {"tasks": drawn}
    return study


def row_number(entry) -> int:
    return entry if isinstance(entry, int) else entry[0]


def row_texts(row: dict) -> list[str]:
    """Every text that a row brings into a subset, a document with its title."""
    row = {**row, "text": document_text(row)} if "title" in row else row
    keys = ("text", "sentence1", "sentence2", "query", "positive", "negative", "sentences",
            "human_summaries", "machine_summaries")
    return flat(row[key] for key in keys if key in row)


# ----------------------------------------------------------------------------------------- materialising

def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def kept_rows(path: Path, entries: list) -> list[dict]:
    """The rows that the entries name, in the entries' order, partial ones cut to their items."""
    wanted = set(map(row_number, entries))
    rows = {number: row for number, row in enumerate(read_rows(path)) if number in wanted}
    found = []
    for entry in entries:
        number, parts = (entry, {}) if isinstance(entry, int) else entry
        row = dict(rows[number])
        for columns, items in parts.items():
            row.update({column: [row[column][i] for i in items] for column in columns.split()})
        found.append(row)
    return found


def make(study: dict, evaldata: Path, out: Path) -> list[Path]:
    """Write OUT/SUBSET/TASK for every subset; returns OUT/SUBSET of each. Raises UserError."""
    for file, wanted in study["sources"].items():
        if not (evaldata / file).is_file():
            raise UserError(f"{evaldata / file}: no such file; give the folder of the full test sets")
        if file_hash(evaldata / file) != wanted:
            raise UserError(f"{evaldata / file}: not the file that data/study.json counts rows in; get that "
                            "version, or draw other subsets with `subsets.py draw`")
    folders = []
    for subset, drawn in study["subsets"].items():
        folder = out / subset
        if folder.exists() and not (folder / "subset.json").exists():
            raise UserError(f"{folder}: not written by subsets.py: choose another --out")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "subset.json").write_text(json.dumps(drawn))
        for name, files in drawn["tasks"].items():
            source, target = evaldata / name, folder / name
            target.mkdir(parents=True)
            (target / "task.json").write_text(json.dumps(read_json(source / "task.json") | {"note": NOTE}))
            for file, entries in files.items():
                rows = kept_rows(source / file, entries)
                lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
                (target / file).write_text("".join(lines), encoding="utf-8")
            if "queries.jsonl" in files:
                write_qrels(source, target)
        folders.append(folder)
    return folders


def write_qrels(source: Path, target: Path) -> None:
    """Keep the judgements between queries and documents that are both kept."""
    queries, documents = ({row["_id"] for row in read_rows(target / file)}
                          for file in ("queries.jsonl", "corpus.jsonl"))
    lines = ["query-id\tcorpus-id\tscore\n"]
    for query, judged in read_qrels(source / "qrels" / "test.tsv").items():
        lines += [f"{query}\t{document}\t{grade}\n" for document, grade in judged.items()
                  if query in queries and document in documents]
    (target / "qrels").mkdir()
    (target / "qrels" / "test.tsv").write_text("".join(lines), encoding="utf-8")


# ----------------------------------------------------------------------------------------------- counting

class TokenCounter:
    """Takes an Embedder's place: counts the tokens of what it is to embed; its vectors are noise."""

    def __init__(self, embedder: Embedder):
        self.embedder, self.device, self.cut, self.tokens = embedder, torch.device("cpu"), 0, 0

    def encode(self, texts, prompt="", **ignored) -> torch.Tensor:
        self.tokens += sum(map(len, self.embedder.tokenize(texts, prompt)))
        return torch.randn(len(texts), 8, generator=torch.Generator().manual_seed(0))


def count(folder: Path, embedder: Embedder) -> dict[str, int]:
    """Tokens that evaluate.py embeds for each task below a folder."""
    tokens, tasks = {}, find_tasks([str(folder)])
    counter, args = TokenCounter(embedder), parse_arguments(["model"])
    encoder = Encoder(counter, args, tasks)
    for task in tasks:
        counter.tokens = 0
        evaluate(encoder, [task], args)
        tokens[task["name"]] = counter.tokens
    return tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="what", required=True)
    for what, text in (("make", "write the task folders"), ("draw", "write data/study.json anew")):
        sub = verbs.add_parser(what, help=text)
        sub.add_argument("evaldata", type=Path, help="folder of the full sets")
        sub.add_argument("--out", type=Path, default=Path("data/study"), help="folder for dev and test")
        sub.add_argument("--study", type=Path, default=STUDY, help="the lists of rows")
    sub.add_argument("--base", required=True, help="model folder whose tokenizer counts")
    args = parser.parse_args()
    study = draw(args.evaldata) if args.what == "draw" else read_json(args.study)
    folders = make(study, args.evaldata, args.out)
    for folder, (subset, drawn) in zip(folders, study["subsets"].items()):
        if args.what == "draw":
            embedder = Embedder.load(args.base, device="cpu", max_length=study["max_length"])
            with contextlib.redirect_stdout(sys.stderr):
                drawn["tokens by task"] = count(folder, embedder)
            drawn["tokens"] = sum(drawn["tokens by task"].values())
        kinds = {CATEGORIES[task["kind"]] for task in find_tasks([str(folder)])}
        print(f"{folder}: {len(drawn['tasks'])} tasks of {len(kinds)} categories, {drawn['tokens']:,} tokens")
        for name, tokens in drawn["tokens by task"].items():
            print(f"  {name}: {tokens:,}")
        if args.what == "draw" and drawn["tokens"] > BUDGET[subset]:
            raise UserError(f"{subset}: {drawn['tokens']:,} tokens, above {BUDGET[subset]:,}: lower SIZES")
    if args.what == "draw":
        replace_file(args.study, lambda path: path.write_text(compact(study) + "\n"))


def compact(study: dict) -> str:
    """JSON with a line for each file's entries, so that a change shows where it is."""
    lines = json.dumps(study, indent=1)
    decoder, out, i = json.JSONDecoder(), [], 0
    while i < len(lines):                                             # a list goes on one line, whole
        if lines[i] == "[":
            value, end = decoder.raw_decode(lines, i)
            out.append(json.dumps(value, separators=(",", ":")))
            i = end
        else:
            out.append(lines[i])
            i += 1
    return "".join(out)


if __name__ == "__main__":
    command(main)
