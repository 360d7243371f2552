"""tools/data/public_data.py: the paper's 13 public training sets from the Hugging Face hub, for train.py.

    python -m tools.data.public_data --out data/public   # or: make data PUBLIC=1; tens of GB
    python train.py $(cat data/public/flags) --data data/synthetic.jsonl --base ... --out runs/paper

prompts/public.json names the copy on the hub, and of each set the files, the share that is drawn (Table 14)
and the instructions. OUT gets one file a set, {"prompt", "query", "pos", "neg"} a line, and `flags`:
train.py's --data FILE:SHARE for all of them. A set that stands in OUT is left alone, so a rerun goes on.
The copy is checked: a set without files, a row without its columns or texts, more or fewer examples than the
paper's.
"""
import argparse
import fnmatch
import re
from collections import Counter
from pathlib import Path

from plumbing.errors import Parser, UserError, check, command
from plumbing.files import fields, read_json, write_jsonl, write_text
from tools.eval.hub import FORMATS, download, read

ROOT = Path(__file__).resolve().parents[2]


def stem(path: Path) -> str:
    """A file's name without its part number and format.

    >>> stem(Path("data/miracl_es-00000-of-00001.parquet"))
    'miracl_es'
    """
    return re.sub(r"(-\d+-of-\d+)?\.(parquet|jsonl?(\.gz)?|json\.gz)$", "", path.name)


def read_table(path: Path) -> dict:
    """The table of sets, prompts/public.json."""
    table = read_json(path, {"sets": dict, "hub": str, "examples": int})
    examples = table["examples"]
    check(0 < examples < 2**53, f"{path}: examples: {examples!s:.30}: wanted is the paper's number, above 0")
    for name, one in table["sets"].items():
        fields(one, f"{path}: {name}", {"files": [str], "share": float, "instructions": [str]})
        check(one["instructions"], f"{path}: {name}: its instructions are an empty list: write one or more")
    return table


def assign(files: list[Path], sets: dict) -> tuple[dict[str, list[Path]], list[Path]]:
    """({set: its files}, the files that no set claims). Upper case is the same as lower."""
    files_of, left = {name: [] for name in sets}, []
    for file in files:
        owners = [name for name, one in sets.items()
                  if any(fnmatch.fnmatchcase(stem(file).lower(), pattern) for pattern in one["files"])]
        if len(owners) == 1:
            files_of[owners[0]].append(file)
        else:
            left.append(file)
    return files_of, left


def as_list(texts) -> list:
    """The texts of a column that may hold one, several or none."""
    return [texts] if isinstance(texts, str) else list(texts or ())


def examples(files: list[Path], instructions: list[str], count: Counter):
    """Yield a set's rows as train.py reads them. An instruction that is not the paper's gives way to it."""
    number = 0
    for file in files:
        for row in read(file, ""):
            check(isinstance(row, dict), f"{file.name}: a row is no object, but {row!r:.60}")
            check({"query", "pos"} <= row.keys(),
                  f"{file.name}: a row has no query and pos, but {', '.join(row)}")
            query, positives, negatives = row["query"], as_list(row["pos"]), as_list(row.get("neg"))
            texts = [query, *positives, *negatives]
            all_text = all(isinstance(text, str) for text in texts)
            if not all_text or not query.strip() or not "".join(positives).strip():
                count["without text"] += 1
                continue
            prompt = row.get("prompt")
            if prompt not in instructions:
                count["other instruction"] += bool(prompt)
                prompt = instructions[number % len(instructions)]
            number += 1
            # no "type": train.py's homogeneous batches then go by file, which is by set
            yield {"prompt": prompt, "query": query, "pos": positives, "neg": negatives}
    count["examples"] = number


def convert(files: list[Path], out: Path, instructions: list[str]) -> Counter:
    """Write one set, whole or not at all; returns what was counted."""
    count = Counter()

    def rows():
        yield from examples(files, instructions, count)
        check(count["examples"], f"{', '.join(file.name for file in files)}: no examples")
    write_jsonl(out, rows())
    return count


def fetch(out: Path, table: dict, partial: bool) -> None:
    """Fill `out` from the copy on the hub, and write `flags` once every set is there."""
    sets, drawn, flags, missing = table["sets"], 0, [], []
    absent = [name for name in sets if not (out / f"{name}.jsonl").exists()]
    files_of = {}
    if absent:
        source = download(table)
        files = sorted(path for path in source.rglob("*") if path.name.endswith(FORMATS))
        files_of, left = assign(files, sets)
        missing = [name for name in absent if not files_of[name]]
        names = sorted({stem(file) for file in files})
        check(partial or not missing,
              f"{table['hub']} has no files for {', '.join(missing)}, only {', '.join(names)}: "
              "mend `files` in prompts/public.json, or --partial goes on without")
        if left:
            print(f"not used: {', '.join(sorted({stem(file) for file in left}))}")
    out.mkdir(parents=True, exist_ok=True)
    for name, one in sets.items():
        path = out / f"{name}.jsonl"
        if name in missing:
            continue
        count = convert(files_of[name], path, one["instructions"]) if not path.exists() else Counter()
        if not count["examples"]:
            with open(path, "rb") as lines:
                count["examples"] = sum(1 for _ in lines)
        drawn += count["examples"] * one["share"]
        flags.append(f"--data {path}:{one['share']}")
        notes = [f"{count[key]:,} {what}" for key, what in (
            ("without text", "rows without text left out"),
            ("other instruction", "had another instruction, and got the paper's")) if count[key]]
        print(f"{name:17}{count['examples']:10,} x {one['share']:<4}" + "; ".join(notes), flush=True)
    if missing:
        print(f"missing: {', '.join(missing)}")
    ratio = drawn / table["examples"]
    print(f"{'drawn an epoch':17}{drawn:10,.0f}, {ratio:.2f} of the paper's {table['examples']:,}"
          + (": the copy may be sampled already; then make the shares in prompts/public.json 1"
             if ratio < 0.7 else ": more than the paper's" if ratio > 1.3 else ""))
    write_text(out / "flags", " ".join(flags) + "\n")


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path("data/public"))
    parser.add_argument("--table", type=Path, default=ROOT / "prompts" / "public.json")
    parser.add_argument("--partial", action="store_true", help="go on where the copy lacks a set")
    args = parser.parse_args(argv)
    table = read_table(args.table)
    try:
        fetch(args.out, table, args.partial)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{args.out}: not made ({type(error).__name__}: {error})") from None


if __name__ == "__main__":
    command(main)
