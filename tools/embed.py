"""tools/embed.py: vectors and search from the shell.

    python tools/embed.py encode runs/demo < documents.txt > vectors.jsonl              # one text a line
    python tools/embed.py encode runs/demo --out vectors.npy --prompt "..." < queries.txt
    python tools/embed.py search runs/demo --docs documents.txt "how to brew tea"

Texts stream through: neither the file nor its vectors need to fit in memory (a search keeps the best of what
it has seen). A GPU is used where there is one. To serve: another program's pipe, with --at-once 1, or any
server of sentence-transformers, vLLM or TEI on the folder that `python -m tools.models.export` writes.
"""
import json
import signal
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run by path, it looks in tools/ alone

from model import Embedder
from plumbing.checkpoint import POOLINGS
from plumbing.errors import Parser, UserError, check, command, positive
from plumbing.files import BOM, replace_file
from plumbing.progress import EVERY

QUERY_PROMPT = "Given a web search query, retrieve relevant passages that answer the query"


def read_lines(file):
    """Yield the lines of a binary file as text; an empty line is an empty text.

    No BOM becomes part of a text: one stands at the file's start, or where files were joined.
    """
    for number, line in enumerate(file, 1):
        try:
            yield line.removeprefix(BOM).decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{file.name}:{number}: not UTF-8 ({error})") from None


def encoded(embedder: Embedder, texts, prompt: str, at_once: int, dim: int | None = None):
    """Yield (texts, vectors [n, D]) for the next `at_once` texts, again and again; tell stderr how many."""
    texts = iter(texts)
    done, start = 0, time.monotonic()
    said = start
    while batch := list(islice(texts, at_once)):
        yield batch, embedder.encode(batch, prompt, dim=dim)
        done += len(batch)
        now = time.monotonic()
        if now - said > EVERY:
            said = now
            print(f"  {done:,} texts, {now - start:.0f} s", file=sys.stderr, flush=True)


def write_npy(path: Path, batches, width: int) -> int:
    """Stream rows into a float32 .npy [n, width]; n goes into the header at the end, in the same space."""
    rows = 0
    with open(path, "wb") as file:
        def header():
            file.seek(0)
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f4", "fortran_order": False, "shape": (rows, width)})
            return file.tell()

        begin = header()
        for _, vectors in batches:
            file.write(vectors.numpy().astype("<f4").tobytes())
            rows += len(vectors)
        assert header() == begin                # numpy leaves room for the first axis to grow
    return rows


def encode(args, embedder: Embedder) -> None:
    width = embedder.encode([], dim=args.dim).shape[1]           # --dim is refused before a text comes
    batches = encoded(embedder, read_lines(sys.stdin.buffer), args.prompt or "", args.at_once, args.dim)
    if args.out:
        rows = []
        replace_file(args.out, lambda path: rows.append(write_npy(path, batches, width)))
        print(f"{args.out}: {rows[0]} vectors of {width} values", file=sys.stderr)
        return
    for texts, vectors in batches:
        for text, vector in zip(texts, vectors):
            values = [float(f"{value:.9g}") for value in vector.tolist()]      # float32 holds no more digits
            print(json.dumps({"text": text, "vector": values}, ensure_ascii=False))
        sys.stdout.flush()                      # whoever reads a pipe has these before the next are there


def search(args, embedder: Embedder) -> None:
    prompt = QUERY_PROMPT if args.prompt is None else args.prompt
    queries = embedder.encode(args.query, prompt, dim=args.dim)              # [Q, D]
    best = [[] for _ in args.query]                                          # (-score, number, text), sorted
    number = 0
    with open(args.docs, "rb") as file:
        for texts, vectors in encoded(embedder, read_lines(file), "", args.at_once, args.dim):
            top = (queries @ vectors.T).topk(min(args.top, len(texts)))      # of [Q, n]
            for q in range(len(queries)):
                for score, i in zip(top.values[q].tolist(), top.indices[q].tolist()):
                    best[q].append((-score, number + i + 1, texts[i]))
                best[q] = sorted(best[q])[:args.top]
            number += len(texts)
    for query, lines in zip(args.query, best):
        if len(args.query) > 1:
            print(f"# {query}")
        for score, line, text in lines:
            print(f"{-score:.4f}\t{line}\t{text}")


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    encode_parser = verbs.add_parser("encode", help="texts on standard input -> vectors")
    search_parser = verbs.add_parser("search", help="the lines of a file that answer a query best")
    encode_parser.add_argument("--out", type=Path, help="a .npy file [n, D] (default: JSON lines on stdout)")
    search_parser.add_argument("--docs", required=True, type=Path, help="documents, one a line")
    search_parser.add_argument("--top", type=positive(int), default=10, help="lines a query")
    for sub in (encode_parser, search_parser):
        sub.add_argument("model", help="a run, a Hugging Face folder or an exported one")
        sub.add_argument("--prompt", help="the instruction (encode: none unless given; search: web search)")
        sub.add_argument("--max-length", type=positive(int),
                         help="tokens a text, BOS and EOS included (default: as an export says, else 512)")
        sub.add_argument("--pooling", choices=POOLINGS, help="default: as run or export say, else last")
        sub.add_argument("--dim", type=int, help="keep the first so many values (Matryoshka)")
        sub.add_argument("--dtype", help="float32, bfloat16, float16 (default: float32 on a CPU)")
        sub.add_argument("--device", help="default: cuda where there is one")
        sub.add_argument("--compile", action="store_true", help="a minute more at the start, then faster")
        sub.add_argument("--at-once", type=positive(int), default=1024,
                         help="texts sorted by length together")
    search_parser.add_argument("query", nargs="+")
    args = parser.parse_args(argv)
    out = getattr(args, "out", None)
    check(not out or out.suffix == ".npy",
          f"--out {out}: a name that ends in .npy, or leave it out for JSON lines")
    check(sys.stdin or args.verb == "search", "encode: standard input is closed: texts come from it, < FILE")
    check(sys.stdout or out, "standard output is closed: the result goes there, > FILE")
    embedder = Embedder.load(args.model, device=args.device, dtype=args.dtype,
                             max_length=args.max_length, pooling=args.pooling)
    embedder.compile(args.compile)
    {"encode": encode, "search": search}[args.verb](args, embedder)


if __name__ == "__main__":
    if sys.stdout:                                      # it may be closed, of which main tells
        sys.stdout.reconfigure(encoding="utf-8")        # as the texts came in, whatever the locale says
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `| head` ends it quietly
    command(main)
