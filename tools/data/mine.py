"""tools/data/mine.py: hard negatives for training files, by a model that embeds already.

    python -m tools.data.mine runs/demo data/pairs.jsonl --out data/mined.jsonl
    python -m tools.data.mine BASE nq.jsonl fever.jsonl --out mined.jsonl --ranks 30 200 --margin 0.05
    python -m tools.data.mine runs/demo pairs.jsonl --corpus documents.txt --out mined.jsonl

The corpus is every distinct positive and negative of the files, and each line of --corpus. Each
query ranks it by cosine; known positives of the same instruction and query, and the query's own text, leave
the ranking; of what stands at ranks FIRST to LAST and scores at least --margin below the row's lowest
positive, --negatives become the row's "neg" (what other tools noted beside the old ones, such as neg_scores,
goes); a row for which there are none stays as it is. The best-ranked are often unlabelled positives: hence
the window and the margin. The paper mined with another, smaller embedder (mE5-base); so may you.

Vectors of the corpus lie in a temporary file on the disk (4 * D bytes a text), texts stay in their files:
memory holds one chunk of queries and of the corpus, and some 200 bytes a text while these are counted.
"""
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from model import Embedder
from plumbing.errors import Parser, check, command, finite, positive, seed
from plumbing.examples import Examples, read_row
from plumbing.files import check_lines_out, replace_file, same_file, text_hash
from plumbing.metrics import search
from tools.embed import read_lines


class Corpus:
    """The distinct texts of the examples, then of a file, numbered as they come; they are read on demand."""

    def __init__(self, examples: Examples, file: Path | None = None):
        self.examples = examples
        self.lines = open(file, "rb") if file else None
        hashes, places = [], []
        seen = set()
        for text, place in self.all_texts():
            key = text_hash(text)
            if text.strip() and key not in seen:
                seen.add(key)
                hashes.append(key)
                places.append(place)
        self.hashes = np.array(hashes, np.int64)                     # [C]
        self.places = np.array(places, np.int64)           # [C, 2]: example, which of its texts; or -1, byte
        self.order = np.argsort(self.hashes)

    def all_texts(self):
        """Yield each text and its place."""
        for i in range(len(self.examples)):
            for slot, text in enumerate(documents_of(self.examples[i])):
                yield text, (i, slot)
        if self.lines:
            begin = 0
            for text in read_lines(self.lines):
                yield text, (-1, begin)
                begin = self.lines.tell()

    def __len__(self):
        return len(self.hashes)

    def __getitem__(self, number: int) -> str:
        i, slot = self.places[number]
        if i >= 0:
            return documents_of(self.examples[i])[slot]
        self.lines.seek(slot)
        return next(read_lines(self.lines))

    def numbers(self, hashes) -> np.ndarray:
        """Numbers of texts by their hashes; any number for a text that is not in the corpus."""
        position = np.searchsorted(self.hashes, hashes, sorter=self.order)
        return self.order[np.minimum(position, len(self) - 1)]


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


def mine(args, embedder: Embedder, examples: Examples, out) -> tuple[int, int, int]:
    """Write every row with its mined negatives -> how many, rows with fewer than wanted, rows with none."""
    corpus = Corpus(examples, args.corpus)
    first, last = args.ranks
    check(len(corpus) > first,
          f"the corpus has {len(corpus)} texts, so that none stands at --ranks {first} to {last} of a "
          "query: --ranks 1 20, or more texts by --corpus")
    mined = short = none = 0
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
                mined += len(chosen)
                short += len(chosen) < args.negatives
                none += not chosen
                if args.keep:
                    negatives = example["neg"] + [text for text in negatives if text not in example["neg"]]
                row = read_row(examples.line(i), examples.where(i))    # with keys that training ignores
                if chosen:
                    row = with_negatives(row, negatives)
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            say(f"queries {rows.stop:,} of {len(examples):,}")
        del vectors
    check(mined, f"no row has a text at --ranks {first} to {last} and --margin below its positive, of "
                 f"{len(corpus)} texts: --ranks 1 100, or a smaller --margin")
    return mined, short, none


def with_negatives(row: dict, negatives: list[str]) -> dict:
    """The row with these negatives, without what other tools noted of the old ones (neg_scores, neg_ids)."""
    kept = {key: value for key, value in row.items() if not key.startswith(("neg_", "negative_"))}
    return {**kept, "neg": negatives}


def barred_numbers(corpus: Corpus, examples: Examples, i: int) -> set[int]:
    """What can't be a negative of example i: its known positives, and its query's text."""
    hashes = np.append(examples.known_positives(i), text_hash(examples[i]["query"]))
    numbers = corpus.numbers(hashes)
    return set(numbers[corpus.hashes[numbers] == hashes].tolist())


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
    add("--corpus", type=Path, metavar="TXT", help="more texts to mine from, one a line")
    add("--prompt", default="", help="instruction of rows that bring none")
    add("--skip-bad-lines", action="store_true")
    add("--seed", type=seed, default=0)
    add("--chunk", type=positive(int), default=4096, help="texts embedded and compared at once")
    add("--max-length", type=positive(int),
        help="tokens a text, BOS and EOS included (default: as an exported folder says, else 512)")
    add("--dtype", help="float32, bfloat16, float16 (default: float32 on a CPU)")
    add("--device", help="default: cuda where there is one")
    args = parser.parse_args(argv)
    first, last = args.ranks
    check(first <= last, f"--ranks {first} {last}: LAST must not be before FIRST")
    for path in args.data:
        check(Path(path).is_file(), f"{path}: no such file")
    check(args.corpus is None or args.corpus.is_file(), f"--corpus {args.corpus}: no such file")
    check(args.out.parent.is_dir(), f"--out {args.out}: no such folder {args.out.parent}")
    check_lines_out(args.out)
    # A single training file may be replaced by its own rows, mined; a corpus or one file of several is lost.
    inputs = args.data if len(args.data) > 1 else []
    for path in [*inputs, *filter(None, [args.corpus])]:
        check(not same_file(path, args.out), f"--out {args.out}: would replace what is read: another name")
    examples = Examples(args.data, args.prompt, args.skip_bad_lines)
    embedder = Embedder.load(args.model, device=args.device, dtype=args.dtype,
                             max_length=args.max_length)
    counts = []

    def write(path):
        with open(path, "w", encoding="utf-8") as file:
            counts.append(mine(args, embedder, examples, file))
    replace_file(args.out, write)
    mined, short, none = counts[0]
    print(f"{args.out}: {len(examples):,} rows, {mined:,} negatives mined, {short:,} rows with fewer than "
          f"{args.negatives}, {none:,} rows as they were, for want of any, {examples.skipped:,} lines "
          "skipped")


if __name__ == "__main__":
    command(main)
