"""tools/eval/hub.py: public test sets from the Hugging Face hub, as the task folders that evaluate.py reads.

    python -m tools.eval.hub STSBenchmark SciFact --out data/mteb
    python -m tools.eval.hub eng-v1                     # a benchmark of prompts/tasks.json: all of its tasks
    python -m tools.eval.hub eng-v2                     # mteb's newer English list
    python -m tools.eval.hub SciFact --zip scifact.zip  # from a BEIR archive instead

prompts/tasks.json names repository, revision, split and instruction of each task. `hf download` fetches and
caches; a task that already stands in OUT is left alone. Read are JSON lines, plain or gzipped, tab-separated
files and, with pyarrow, parquet. Revisions differ in layout, so files are chosen by the words in their
paths.
"""
import argparse
import functools
import json
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from plumbing.errors import Parser, UserError, check, command
from plumbing.files import read_json, read_jsonl, read_lines, write_json, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
FORMATS = (".jsonl", ".jsonl.gz", ".json.gz", ".json", ".tsv", ".tsv.gz", ".parquet")
COLUMNS = {                                       # kind -> our column: what other layouts call it
    "sts": {"sentence1": (), "sentence2": (), "score": ()},
    "pair-classification": {"sentence1": ("sent1",), "sentence2": ("sent2",), "label": ("labels",)},
    "bitext": {"sentence1": (), "sentence2": ()},
    "classification": {"text": (), "label": ()},
    "clustering": {"sentences": (), "labels": ()},
    "summarization": {"text": (), "human_summaries": (), "machine_summaries": (), "relevance": ()},
    "reranking": {"query": (), "positive": (), "negative": ()},
    "corpus": {"_id": ("id", "docid"), "title": (), "text": ()},
    "queries": {"_id": ("id", "query_id"), "text": ("query",)},
    "qrels": {"query-id": ("query_id",), "corpus-id": ("corpus_id", "docid"), "score": ()},
    "top_ranked": {"query-id": ("query_id",), "corpus-ids": ("corpus_ids",)},
}
HEADLESS = {                                      # columns of tab-separated files without a header
    "queries": ["_id", "text"], "qrels": ["query-id", "corpus-id", "score"],
    "trec": ["query-id", "", "corpus-id", "score"],
}


def has_word(path: str, *words: str, between="/._-") -> bool:
    """Whether a word stands in the path, between its ends and separators.

    >>> has_word("data/test-00000-of-00001.parquet", "test"), has_word("contest.jsonl", "test")
    (True, False)
    """
    return any(re.search(rf"(^|[{between}]){re.escape(word)}([{between}]|$)", path) for word in words)


def of_subset(names: list[str], subset: str) -> list[str]:
    """The paths of a subset. A whole name goes before a part of one: en is neither en-ext nor de-en.

    >>> of_subset(["en/test.jsonl", "en-ext/test.jsonl"], "en"), of_subset(["v1.0-sw/dev.tsv"], "sw")
    (['en/test.jsonl'], ['v1.0-sw/dev.tsv'])
    """
    for separators in ("/.", "/._", "/._-"):
        matching = [name for name in names if has_word(name, subset, between=separators)]
        if matching:
            return matching
    return []


def read(path: Path, role: str):
    """Yield the rows of a file as dicts."""
    if path.suffix == ".parquet":
        yield from read_parquet(path)
    elif ".tsv" in path.suffixes:
        yield from read_table(path, role)
    elif ".json" in path.suffixes and starts_an_array(path):
        yield from json.loads(b"".join(line for _, line in read_lines(path)))
    else:
        yield from read_jsonl(path)


def read_parquet(path: Path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingPackage(f"{path.name} is parquet: `pip install pyarrow`") from None
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def read_table(path: Path, role: str):
    """Rows of a tab-separated file: no quotes, fields of any length; its first row or HEADLESS names
    them."""
    rows = (line.decode().rstrip("\r\n").split("\t") for _, line in read_lines(path))
    first = next(rows, [])
    names = first
    if not set(first) & {"query-id", "corpus-id", "_id", "text"}:                # no header
        names = HEADLESS.get("trec" if role == "qrels" and len(first) == 4 else role, first)
        yield dict(zip(names, first))
    for row in rows:
        yield dict(zip(names, row))


def starts_an_array(path: Path) -> bool:
    return next((line for _, line in read_lines(path)), b"").startswith(b"[")


class MissingPackage(UserError):
    """The file is fine, but what reads it isn't installed."""


def whole(path: Path, rows):
    """Yield the rows of a file. One cut short by a full disk or a killed download is named."""
    try:
        yield from rows
    except MissingPackage:
        raise
    except UserError as error:                    # names the file, and the line where there are lines
        raise UserError(f"{error}: remove {path.resolve()} and run this again") from None
    except ValueError as error:
        raise UserError(f"{path}: broken ({error}): remove {path.resolve()} and run this again") from None


def renamed(row: dict, role: str) -> dict:
    """Only the columns of our layout, under our names."""
    ours = {}
    check(isinstance(row, dict), f"a {role} row is no object, but {row!r:.60}")
    for column, others in COLUMNS[role].items():
        name = next((name for name in (column, *others) if name in row), None)
        check(name or column == "title", f"a {role} row has no {column!r}, but {', '.join(row)}")
        ours[column] = row[name] if name else ""
    for column in ("_id", "query-id", "corpus-id"):
        if column in ours:
            ours[column] = str(ours[column])
    return ours


def rows_of(folder: Path, role: str, words: tuple, split: str, subset: str | None):
    """Yield the rows of one role (a kind, or corpus, queries, qrels, top_ranked) of a repository.

    words: what the paths of the role hold. Then the split and the subset choose, where any path holds them.
    """
    paths = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*"))
             if p.name.endswith(FORMATS) and not p.name.startswith((".", "dataset_info"))}
    other = [w for w in ("corpus", "docs", "queries", "topics", "qrels", "top_ranked") if w not in words]
    names = [n for n in paths if not has_word(n, *other) and (not words or has_word(n, *words))]
    if role == "qrels" and not names:             # some uploads keep them in the default configuration
        names = [n for n in paths if not has_word(n, *other)]
    in_path = of_subset(names, subset) if subset else []
    names = in_path or names                      # else all languages lie in one file, whose rows say which
    of_split = [n for n in names if has_word(n, split)]
    names = of_split or (names if role in ("corpus", "queries") else [])     # these often serve all splits
    formats = [f for f in FORMATS if any(n.endswith(f) for n in names)]
    check(formats, f"no file for {role}, split {split}, among {', '.join(paths) or 'nothing'}")
    chosen = [n for n in names if n.endswith(formats[0])]
    rows = 0
    for name in chosen:
        for row in whole(paths[name], read(paths[name], role)):
            ours = renamed(row, role)
            if subset and not in_path:
                language = row.get("lang", row.get("language"))
                check(language,
                      f"no file for {role}, {subset}: neither a path nor a row of {name} names a language")
                if language != subset:
                    continue
            rows += 1
            if role == "pair-classification" and isinstance(ours["label"], list):        # three lists
                yield from (dict(zip(ours, values)) for values in zip(*ours.values()))
            else:
                yield ours
    check(rows, f"no row for {role}, split {split}{f', {subset}' if subset else ''}, in {', '.join(chosen)}")


def as_reranking(folder: Path, split: str, subset: str | None, sub_queries=False):
    """Queries, corpus, judgements and candidates -> query, positive, negative.

    sub_queries: those whose ids are X_0, X_1 and so on are one row's. Other tasks have such ids and mean
    nothing by them.
    """
    corpus = {row["_id"]: row["text"] for row in rows_of(folder, "corpus", ("corpus",), split, subset)}
    queries = {row["_id"]: row["text"] for row in rows_of(folder, "queries", ("queries",), split, subset)}
    relevant, merged = {}, {}
    for row in rows_of(folder, "qrels", ("qrels",), split, subset):
        relevant.setdefault(row["query-id"], {})[row["corpus-id"]] = float(row["score"])
    for row in rows_of(folder, "top_ranked", ("top_ranked",), split, subset):
        query = row["query-id"]
        grades = relevant.get(query, {})
        positive = [corpus[document] for document in row["corpus-ids"] if grades.get(document, 0) > 0]
        negative = [corpus[document] for document in row["corpus-ids"] if not grades.get(document, 0) > 0]
        name = query.rsplit("_", 1)[0] if sub_queries else query
        entry = merged.setdefault(name, {"query": [], "positive": positive, "negative": negative})
        entry["query"].append(queries[query])
    for row in merged.values():
        yield {**row, "query": row["query"] if sub_queries else row["query"][0]}


def as_documents(rows, task: dict) -> dict:
    """Sets of a clustering task -> one, prepared as mteb's newer tasks are before anything is drawn from
    them.

    task: `drop_single_labels` leaves out labels that stand there once; `documents` takes so many, drawn at
    random or, if `stratified`, of each label its share.
    """
    sentences, labels = [], []
    for row in rows:
        one = isinstance(row["sentences"], str)                      # some uploads have one document a row
        sentences += [row["sentences"]] if one else row["sentences"]
        labels += [row["labels"]] if one else row["labels"]
    numbers = list(range(len(sentences)))
    if task.get("drop_single_labels"):
        count = Counter(labels)
        numbers = [number for number in numbers if count[labels[number]] > 1]
    if task.get("documents", len(numbers)) < len(numbers):
        chosen = stratified if task.get("stratified") else shuffled
        numbers = [numbers[i] for i in chosen([labels[number] for number in numbers], task["documents"])]
    return {"sentences": [sentences[number] for number in numbers],
            "labels": [labels[number] for number in numbers]}


def shuffled(labels: list, size: int) -> list[int]:
    return np.random.default_rng(42).permutation(len(labels))[:size].tolist()


def stratified(labels: list, size: int) -> list[int]:
    """Row numbers, as the package that mteb reads its data with draws them."""
    try:
        from datasets import ClassLabel, Dataset
    except ImportError:
        raise MissingPackage("a stratified sample: `pip install datasets`") from None
    names = [str(label) for label in labels]
    data = Dataset.from_dict({"number": range(len(names)), "label": names})
    data = data.cast_column("label", ClassLabel(names=sorted(set(names))))
    return data.train_test_split(test_size=size, seed=42, stratify_by_column="label")["test"]["number"]


def convert(source: Path, out: Path, name: str, task: dict) -> None:
    """Write the task folder `out` from a repository's or an archive's files, whole or not at all."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    kind, split, subset = task["kind"], task["split"], task.get("subset")
    if kind == "retrieval":
        write_jsonl(part / "corpus.jsonl", rows_of(source, "corpus", ("corpus", "docs"), split, subset))
        write_jsonl(part / "queries.jsonl", rows_of(source, "queries", ("queries", "topics"), split, subset))
        (part / "qrels").mkdir()
        with open(part / "qrels" / f"{split}.tsv", "w", encoding="utf-8") as file:
            file.write("query-id\tcorpus-id\tscore\n")
            for row in rows_of(source, "qrels", ("qrels",), split, subset):
                grade = float(row["score"])
                check(grade.is_integer(), f"qrels: a grade is a whole number, not {grade}")
                file.write(f"{row['query-id']}\t{row['corpus-id']}\t{int(grade)}\n")
    elif kind == "reranking" and any(has_word(p.name, "corpus") for p in source.rglob("*")):
        write_jsonl(part / f"{split}.jsonl", as_reranking(source, split, subset, task.get("sub_queries")))
    elif task.get("bootstraps"):
        write_jsonl(part / f"{split}.jsonl", [as_documents(rows_of(source, kind, (), split, subset), task)])
    else:
        splits = ("train", split) if kind == "classification" else (split,)
        for name_of_split in splits:
            write_jsonl(part / f"{name_of_split}.jsonl", rows_of(source, kind, (), name_of_split, subset))
    kept = ("kind", "metric", "prompt", "split", "samples_per_label", "ignore_identical_ids", "bootstraps",
            "sampled_share", "levels")
    described = {"name": name, **{key: task[key] for key in kept if key in task}}
    write_json(part / "task.json", described)
    part.rename(out)


def download(task: dict) -> Path:
    """The repository's folder in the hub's cache, downloaded by `hf download` unless it is there."""
    hf = Path(sys.executable).with_name("hf")
    check(hf.exists() or shutil.which("hf"), "`hf` is not installed: `pip install huggingface_hub`")
    arguments = ["download", task["hub"], "--type", "dataset", "--revision", task["revision"], "--quiet"]
    done = subprocess.run([hf if hf.exists() else "hf", *arguments], stdout=subprocess.PIPE, text=True)
    folder = Path(done.stdout.strip() or "nowhere")                  # all that --quiet prints
    check(done.returncode == 0 and folder.is_dir(),
          f"{task['hub']} was not downloaded, for the reason above. HF_ENDPOINT sets a mirror, and a rerun "
          "goes on where this stopped")
    return folder


@functools.cache
def extracted(archive: Path) -> Path:
    folder = archive.with_suffix("")
    zipfile.ZipFile(archive).extractall(folder)
    return folder


def unpacked(archive: Path, task: dict) -> Path:
    """The task's folder in a BEIR archive, by its name; else its root. cqadupstack.zip holds twelve."""
    folder, beir = extracted(archive), task.get("beir", "")
    if (folder / "corpus.jsonl").exists() and "/" not in beir:       # a forum is never alone in its archive
        return folder
    name = Path(beir).name
    check(name, "BEIR has no archive of it")
    folders = [path for path in sorted(folder.rglob(name)) if path.is_dir()]
    check(folders, f"{archive}: holds no folder {name!r}")
    return folders[0]


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw)
    parser.add_argument("tasks", nargs="+", help="tasks or benchmarks named in prompts/tasks.json")
    parser.add_argument("--out", type=Path, default=Path("data/mteb"))
    parser.add_argument("--zip", type=Path, help="a BEIR archive to take the (one) task from")
    args = parser.parse_args(argv)
    table = read_json(ROOT / "prompts" / "tasks.json")
    names = [n for name in args.tasks for n in table["benchmarks"].get(name, {"tasks": [name]})["tasks"]]
    check(not args.zip or len(names) == 1, f"--zip {args.zip}: holds one task, not {len(names)}")
    for name in names:
        check(name in table["tasks"], f"{name}: neither a task nor a benchmark in prompts/tasks.json")
    for name in names:
        for part, more in table["tasks"][name].get("parts", {"": {}}).items():
            full, task = f"{name}/{part}" if part else name, {**table["tasks"][name], **more}
            if (args.out / full).exists():
                continue
            try:
                source = unpacked(args.zip, task) if args.zip else download(task)
                convert(source, args.out / full, full, task)
            except UserError as error:
                raise UserError(f"{full}: {error}") from None
            except (OSError, ValueError, KeyError, TypeError, OverflowError, EOFError, zlib.error,
                    zipfile.BadZipFile, RuntimeError) as error:         # the last: an encrypted archive
                raise UserError(f"{full}: cannot be converted ({type(error).__name__}: {error})") from None
            print(args.out / full, flush=True)


if __name__ == "__main__":
    command(main)
