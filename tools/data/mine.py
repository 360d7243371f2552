"""tools/data/mine.py: hard negatives for training files, found by a model that embeds already.

    python -m tools.data.mine runs/demo data/pairs.jsonl --out data/mined.jsonl
    python -m tools.data.mine BASE nq.jsonl fever.jsonl --out mined.jsonl --ranks 30 200 --margin 0.05 --sample

The corpus is every distinct positive and negative of the files. Each query ranks it by cosine; known
positives of the same instruction and query, and the query's own text, leave the ranking; of what stands at
ranks FIRST to LAST and scores at least --margin below the row's lowest positive, --negatives become the
row's "neg". The best-ranked are often unlabelled positives: hence the window and the margin. The paper mined
with another, smaller embedder (mE5-base); so may you.

Vectors of the corpus lie in a temporary file on the disk (4 * D bytes a text), texts stay in their files:
memory holds one chunk of queries and of the corpus, and some 200 bytes a text while these are counted.
"""
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from metrics import search
from model import Embedder
from plumbing.errors import Parser, check, command, finite, positive, seed
from plumbing.examples import Examples
from plumbing.files import BOM, parse_line, replace_file, text_hash


class Corpus:
    """The distinct texts of the examples, numbered as they come; texts are read on demand."""

    def __init__(self, examples: Examples):
        self.examples, seen, hashes, places = examples, set(), [], []
        for i in range(len(examples)):
            for slot, text in enumerate(documents_of(examples[i])):
                key = text_hash(text)
                if text.strip() and key not in seen:
                    seen.add(key)
                    hashes.append(key)
                    places.append((i, slot))
        self.hashes = np.array(hashes, np.int64)                     # [C]
        self.places = np.array(places, np.int32)                     # [C, 2]: example, which of its texts
        self.order = np.argsort(self.hashes)

    def __len__(self):
        return len(self.hashes)

    def __getitem__(self, number: int) -> str:
        i, slot = self.places[number]
        return documents_of(self.examples[i])[slot]

    def numbers(self, hashes) -> np.ndarray:
        """Numbers of texts by their hashes; any number for a text that is not in the corpus."""
        place = np.searchsorted(self.hashes, hashes, sorter=self.order)
        return self.order[np.minimum(place, len(self) - 1)]


def documents_of(example: dict) -> list[str]:
    return example["pos"] + example["neg"]


def embed_corpus(embedder: Embedder, corpus: Corpus, chunk: int, path: Path) -> np.ndarray:
    """Vectors [C, D], float32, mapped from `path`."""
    shape = len(corpus), embedder.decoder.config.hidden_size
    vectors = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    for first in range(0, len(corpus), chunk):
        last = min(first + chunk, len(corpus))
        vectors[first:last] = embedder.encode([corpus[n] for n in range(first, last)]).numpy()
        say(f"corpus {last:,} of {len(corpus):,} texts")
    return vectors


def choose(scores, numbers, barred: set[int], ceiling: float, args, rng) -> list[int]:
    """The negatives of one query from its ranking: scores and document numbers, best first.

    Ranks count from 1 among what is not barred; then the margin, then the best or a random draw.
    """
    ranked = [(-score, n) for score, n in zip(scores, numbers) if n >= 0 and n not in barred]
    first, last = args.ranks
    window = [n for score, n in sorted(ranked)[first - 1:last] if -score <= ceiling]
    if args.sample and len(window) > args.negatives:
        return [window[k] for k in sorted(rng.choice(len(window), args.negatives, replace=False))]
    return window[:args.negatives]


def mine(args, embedder: Embedder, examples: Examples, out) -> tuple[int, int]:
    """Write every row with its mined negatives; returns how many, and rows with fewer than wanted."""
    corpus, found, short = Corpus(examples), 0, 0
    device = embedder.device
    with tempfile.TemporaryDirectory(dir=args.out.parent, suffix=".tmp") as folder:
        vectors = embed_corpus(embedder, corpus, args.chunk, Path(folder) / "corpus.npy")

        def chunks():
            for start in range(0, len(vectors), args.chunk):
                yield start, torch.from_numpy(vectors[start:start + args.chunk]).to(device)

        for start in range(0, len(examples), args.chunk):
            rows = range(start, min(start + args.chunk, len(examples)))
            read = [examples[i] for i in rows]
            queries = embedder.encode([e["query"] for e in read], [e["prompt"] for e in read])     # [q, D]
            barred = [barred_numbers(corpus, examples, i) for i in rows]
            k = min(args.ranks[1] + max(map(len, barred)), len(corpus))       # LAST is reached without them
            scores, numbers = search(queries.to(device), chunks(), k)         # [q, k]
            for i, example, query, out_of, s, n in zip(
                    rows, read, queries, barred, scores.tolist(), numbers.tolist()):
                ceiling = np.inf
                if args.margin is not None:
                    positives = corpus.numbers([text_hash(t) for t in example["pos"] if t.strip()])
                    ceiling = float((vectors[positives] @ query.numpy()).min()) - args.margin
                chosen = choose(s, n, out_of, ceiling, args, np.random.default_rng((args.seed, i)))
                negatives = [corpus[number] for number in chosen]
                found, short = found + len(chosen), short + (len(chosen) < args.negatives)
                if args.keep:
                    negatives = example["neg"] + [text for text in negatives if text not in example["neg"]]
                out.write(json.dumps({**raw_row(examples, i), "neg": negatives}, ensure_ascii=False) + "\n")
            say(f"queries {rows.stop:,} of {len(examples):,}")
        del vectors
    return found, short


def barred_numbers(corpus: Corpus, examples: Examples, i: int) -> set[int]:
    """What can't be a negative of example i: its known positives, and its query's text."""
    hashes = np.append(examples.known_positives(i), text_hash(examples[i]["query"]))
    numbers = corpus.numbers(hashes)
    return set(numbers[corpus.hashes[numbers] == hashes].tolist())


def raw_row(examples: Examples, i: int) -> dict:
    """The line as it stands in its file, with the keys that training doesn't read."""
    handle = examples.handles[examples.files[i]]
    handle.seek(examples.offsets[i])
    return parse_line(handle.readline().removeprefix(BOM), examples.where(i))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", help="a run, a Hugging Face folder or an exported one")
    add("data", nargs="+", help="training files (JSON lines)")
    add("--out", required=True, type=Path, help="the file to write: every row, in order")
    add("--negatives", type=positive(int), default=1, help="wanted for each row")
    add("--ranks", type=positive(int), nargs=2, default=(11, 100), metavar=("FIRST", "LAST"),
        help="the window; 1 is the best")
    add("--margin", type=finite, help="a negative's cosine is so far below the lowest positive's")
    add("--sample", action="store_true", help="draw from the window instead of taking its best")
    add("--keep", action="store_true", help="append to a row's negatives instead of replacing them")
    add("--prompt", default="", help="instruction of rows that bring none")
    add("--skip-bad-lines", action="store_true")
    add("--seed", type=seed, default=0)
    add("--chunk", type=positive(int), default=4096, help="texts embedded and compared at once")
    add("--max-length", type=positive(int), default=512, help="tokens a text, BOS and EOS included")
    add("--dtype", help="float32, bfloat16, float16 (default: float32 on a CPU)")
    add("--device", help="default: cuda where there is one")
    args = parser.parse_args(argv)
    first, last = args.ranks
    check(first <= last, f"--ranks {first} {last}: LAST must not be before FIRST")
    for path in args.data:
        check(Path(path).is_file(), f"{path}: no such file")
    check(args.out.parent.is_dir(), f"--out {args.out}: no such folder {args.out.parent}")
    examples = Examples(args.data, args.prompt, args.skip_bad_lines)
    embedder = Embedder.load(args.model, device=args.device, dtype=args.dtype,
                             max_length=args.max_length)
    counts = []

    def write(path):
        with open(path, "w", encoding="utf-8") as file:
            counts.append(mine(args, embedder, examples, file))
    replace_file(args.out, write)
    found, short = counts[0]
    print(f"{args.out}: {len(examples):,} rows, {found:,} negatives mined, {short:,} rows with fewer than "
          f"{args.negatives}, {examples.skipped:,} lines skipped")


if __name__ == "__main__":
    command(main)
