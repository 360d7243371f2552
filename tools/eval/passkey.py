"""tools/eval/passkey.py: is a fact found anywhere in a long text? Passkey retrieval, section 5.2.

    python -m tools.eval.passkey runs/full --lengths 256 512 1024 2048 4096 8192 16384 32768
    python -m tools.eval.passkey runs/full --rope-theta 1e5 --sliding-window 32768 --out results/passkey.json

A document of a given number of tokens is filler with one person's pass key hidden at a random depth; a query
asks for that person's key. Every document of the length is a candidate. Documents are generated, so none
are downloaded. --rope-theta and --sliding-window (0: none) repeat the paper's Figure 5, which changes the
model so without training it. Reported is the top-1 accuracy; a tie or an undefined score is a miss.

Documents are written and embedded a few at a time, so memory is that of one forward pass: one text of 32,768
tokens at the longest.
"""
import argparse
import math
import random
import sys
import time
from pathlib import Path

import torch

from model import Embedder
from plumbing.errors import Parser, at_least_0, bounded, check, command, positive
from plumbing.files import check_out, write_json

FILLER = ("The meadow is wide. ", "The clouds drift past. ", "The river is slow. ", "We walk along it. ",
          "Then we walk home. ")
FIRST = ("Ada", "Bruno", "Chidi", "Dora", "Emil", "Farah", "Gustav", "Hana", "Ivo", "Jun", "Kemi", "Luis",
         "Mina", "Nils", "Olga", "Pavel", "Quinn", "Rosa", "Said", "Tove")
LAST = ("Abbott", "Brandt", "Castro", "Duarte", "Eriksen", "Fofana", "Greco", "Haddad", "Ivanova", "Jansen")
AT_ONCE = 16384                                       # tokens written and embedded before the next documents
QUESTION = "what is the pass key for {name}?"


def document(name: str, key: int, tokens: int, count, draw: random.Random) -> str:
    """Filler of at most `tokens` tokens around the key. count: text -> its number of tokens."""
    fact = f"{name}'s pass key is {key}. Remember it. {key} is the pass key for {name}. "
    cost = (count("".join(FILLER * 20)) - count("")) / (20 * len(FILLER))        # tokens of a sentence
    sentences = max(0, int((tokens - count(fact)) / cost))
    while True:
        lines = [FILLER[i % len(FILLER)] for i in range(sentences)]
        lines.insert(draw.randint(0, len(lines)), fact)
        text = "".join(lines).strip()
        over = count(text) - tokens
        if over <= 0 or sentences == 0:
            return text
        sentences = max(0, sentences - max(1, int(over / cost)))


def top1(scores: torch.Tensor, gold: list[int]) -> float:
    """Share of the rows [queries, documents] in which the gold column alone is highest.

    >>> top1(torch.tensor([[0.9, 0.1], [0.5, 0.5], [float("nan"), 0.2]]), [0, 0, 0])
    0.3333333333333333
    """
    hits = 0
    for row, column in zip(scores, gold):
        others = torch.cat((row[:column], row[column + 1:]))
        hits += bool(torch.isfinite(row).all() and (row[column] > others).all())
    return hits / len(gold)


def accuracy(embedder, tokens: int, queries: int, candidates: int, prompt: str, seed: int) -> float:
    draw = random.Random(f"{seed} {tokens}")
    names = draw.sample([f"{first} {last}" for first in FIRST for last in LAST], candidates)

    def count(text):
        return len(embedder.tokenize([text])[0])
    asked = draw.sample(range(candidates), queries)              # the gold document may stand anywhere
    q = embedder.encode([QUESTION.format(name=names[i]) for i in asked], prompt)
    at_once, vectors = max(1, AT_ONCE // tokens), []
    start = last_line = time.time()
    for first in range(0, candidates, at_once):
        texts = [document(name, draw.randint(100, 99_999), tokens, count, draw)
                 for name in names[first:first + at_once]]
        vectors.append(embedder.encode(texts))
        done, now = min(first + at_once, candidates), time.time()
        if now - last_line > 5 and done < candidates:
            left, last_line = (now - start) * (candidates - done) / done, now
            print(f"{tokens:>6} tokens: {done} of {candidates} documents, about {left:.0f} s left",
                  file=sys.stderr, flush=True)
    return top1(q @ torch.cat(vectors).T, asked)


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("model", help="a run folder or a Hugging Face folder")
    add("--lengths", type=bounded(int, lambda tokens: tokens >= 64, "at least 64"), nargs="+",
        default=[2 ** i for i in range(8, 16)], help="in tokens")
    add("--queries", type=positive(int), default=50)
    add("--candidates", type=positive(int), default=100, help="documents of each length, at most 200")
    add("--prompt", default="Given a question, retrieve passages that answer it", help="of the queries")
    add("--rope-theta", type=positive(float), help="the base of the rotary angles, in place of the model's")
    add("--sliding-window", type=at_least_0(int),
        help="the attention window, in place of the model's; 0: none")
    add("--device")
    add("--dtype", choices=("float32", "bfloat16", "float16"))
    add("--seed", type=int, default=0)
    add("--out", type=Path, help='write {"model", "accuracy": {length: share}} as JSON')
    args = parser.parse_args(argv)
    check(args.queries <= args.candidates <= len(FIRST) * len(LAST),
          f"--candidates: at most {len(FIRST) * len(LAST)}; --queries: at most as many")
    if args.out:
        check_out(args.out)
    overrides = {"rope_theta": args.rope_theta, "sliding_window": args.sliding_window}
    overrides = {key: value or None for key, value in overrides.items() if value is not None}
    embedder = Embedder.load(args.model, device=args.device, dtype=args.dtype,
                             max_length=2 * max(args.lengths), **overrides)      # a cut could hide a key
    accuracies = {}
    for tokens in args.lengths:
        start = time.time()
        accuracies[tokens] = accuracy(embedder, tokens, args.queries, args.candidates, args.prompt,
                                      args.seed)
        seconds, chance = time.time() - start, 1 / args.candidates
        deviation = math.sqrt(chance * (1 - chance) / args.queries)
        print(f"{tokens:>6} tokens: top-1 {100 * accuracies[tokens]:5.1f} ({seconds:.0f} s, by luck "
              f"{100 * chance:.1f} +- {100 * deviation:.1f})", flush=True)
        if args.out:
            write_json(args.out, {"model": args.model, **overrides, "accuracy": accuracies})


if __name__ == "__main__":
    command(main)
