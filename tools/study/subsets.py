"""tools/study/subsets.py: the study's fixed development and test subsets of public test sets.

    python -m tools.study.subsets EVALDATA --out data/study       # -> data/study/dev, data/study/test

EVALDATA holds the full sets as task folders (evaluate.py describes them). data/study.json is the record of
what was drawn. It holds no text: row numbers from 0 of each file, and hashes of the files that these count
in. A row that is kept in part stands as [row, {"columns": items}]. No text is in both subsets, training rows
and documents included.

The rows were drawn by chance, test first:
    classification, clustering   some labels, as many rows of each; order of rows as in the source
    pair-classification          a third of them positive: the full set's fifth would leave too few
    reranking                    rows with both kinds; at most so many of each kind
    retrieval                    queries with all their relevant documents, and other documents
    summarization                texts with all machine summaries, the first human ones
"""
import json
import shutil
from pathlib import Path

from plumbing.errors import Parser, check, command
from plumbing.files import file_sha256, read_json, write_json, write_jsonl, write_text
from plumbing.tasks import CATEGORIES, find_tasks, read_qrels, read_rows

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "data" / "study.json"
NOTE = "Fixed subsets (data/study.json): scores compare models, and are not those of the full sets."


def read_study(path: Path) -> dict:
    """{"max_length", "sources": {file: hash}, "subsets": {subset: {"tasks": {task: {file: entries}}}}}."""
    return read_json(path, {"max_length": int, "sources": dict, "subsets": dict})


def file_hash(path: Path) -> str:
    return file_sha256(path)[:16]


def row_number(entry) -> int:
    return entry if isinstance(entry, int) else entry[0]


def kept_rows(path: Path, entries: list) -> list[dict]:
    """The rows that the entries name, in the entries' order, partial ones with their items alone."""
    numbers = set(map(row_number, entries))
    rows = {number: row for number, row in enumerate(read_rows(path)) if number in numbers}
    kept = []
    for entry in entries:
        number, parts = (entry, {}) if isinstance(entry, int) else entry
        row = dict(rows[number])
        for columns, items in parts.items():
            for column in columns.split():
                row[column] = [row[column][i] for i in items]
        kept.append(row)
    return kept


def make(study: dict, evaldata: Path, out: Path) -> list[Path]:
    """Write OUT/SUBSET/TASK for every subset; returns OUT/SUBSET of each."""
    for file, known in study["sources"].items():
        source = evaldata / file
        check(source.is_file(), f"{source}: no such file; give the folder of the full test sets")
        check(file_hash(source) == known,
              f"{source}: not the file that data/study.json counts rows in; get that version")
    folders = []
    for subset, drawn in study["subsets"].items():
        folder = out / subset
        check(not folder.exists() or (folder / "subset.json").exists(),
              f"{folder}: not written by subsets.py: choose another --out")
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / "subset.json", drawn)
        for name, files in drawn["tasks"].items():
            write_task(evaldata / name, folder / name, files)
        folders.append(folder)
    return folders


def write_task(source: Path, target: Path, files: dict[str, list]) -> None:
    """One task's folder. files: {file: entries}."""
    described = read_json(source / "task.json") | {"note": NOTE}
    write_text(target / "task.json", json.dumps(described))         # by their bytes, results know their sets
    for file, entries in files.items():
        write_jsonl(target / file, kept_rows(source / file, entries))
    if "queries.jsonl" in files:
        write_qrels(source, target)


def write_qrels(source: Path, target: Path) -> None:
    """Keep the judgements between queries and documents that are both kept."""
    queries = {row["_id"] for row in read_rows(target / "queries.jsonl")}
    documents = {row["_id"] for row in read_rows(target / "corpus.jsonl")}
    lines = ["query-id\tcorpus-id\tscore\n"]
    for query, judged in read_qrels(source / "qrels" / "test.tsv").items():
        lines += [f"{query}\t{document}\t{grade}\n" for document, grade in judged.items()
                  if query in queries and document in documents]
    write_text(target / "qrels" / "test.tsv", "".join(lines))


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("evaldata", type=Path, help="folder of the full sets")
    parser.add_argument("--out", type=Path, default=Path("data/study"), help="folder for dev and test")
    parser.add_argument("--study", type=Path, default=STUDY, help="the lists of rows")
    args = parser.parse_args(argv)
    study = read_study(args.study)
    for folder, subset in zip(make(study, args.evaldata, args.out), study["subsets"].values()):
        tasks = find_tasks([str(folder)])
        kinds = {CATEGORIES[task["kind"]] for task in tasks}
        print(f"{folder}: {len(tasks)} tasks of {len(kinds)} categories, {subset['tokens']:,} tokens")
        for name, tokens in subset["tokens by task"].items():
            print(f"  {name}: {tokens:,}")


if __name__ == "__main__":
    command(main)
