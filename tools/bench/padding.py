"""tools/bench/padding.py: does a text's vector depend on its neighbours, chunks, device or dtype?

    python -m tools.bench.padding runs/demo                       # built-in texts of 2 to 512 tokens
    python -m tools.bench.padding runs/demo --texts mine.txt      # one text a line

Every text is embedded alone, in one batch with all the others, and at several chunk sizes, in every dtype on
every device there is. For each the table gives the largest relative difference (norm of the difference over
norm of the vector) and the least cosine to the same text alone, then to the first dtype on the first device:
float32 on the CPU, unless --dtypes and --devices say otherwise. Alone and together take other kernels, so
rounding differs in the dtype's last digits; a padding or mask fault shows in the first. Exits with 1 where a
difference is above the dtype's bound.
"""
from pathlib import Path

import torch

from model import Embedder
from plumbing.errors import Parser, check, command, positive
from tools.embed import read_lines

BOUNDS = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}    # neighbours must not move a vector further
CHUNKS = {"chunks of 1 tokens": 1, "chunks of 256 tokens": 256, "chunks of 2048 tokens": 2048,
          "one batch": 1 << 30}
TEXTS = ["", "a", "Hello world", "naïve café, 東京 🙂", "Steep the leaves for three minutes, then pour.",
         *["The quick brown fox jumps over the lazy dog. " * n for n in (1, 2, 5, 11, 23, 60)]]


def difference(vectors: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Largest relative difference and least cosine over the unit rows of two [n, D]."""
    vectors, reference = vectors.double(), reference.double()
    relative = (vectors - reference).norm(dim=1) / reference.norm(dim=1)
    return relative.max().item(), torch.cosine_similarity(vectors, reference).min().item()


def compare(path, texts: list[str], devices: list[str], dtypes: list[str], max_length: int) -> bool:
    """Print the table; returns whether every difference is within its dtype's bound."""
    truth, good = None, True
    print(f"{'device':8}{'dtype':10}{'compared':34}{'difference':>12}{'cosine':>12}")
    for device in devices:
        for dtype in dtypes:
            embedder = Embedder.load(path, device=device, dtype=dtype, max_length=max_length)
            alone = torch.cat([embedder.encode([text]) for text in texts])
            rows = [(f"{name}, to alone", embedder.encode(texts, tokens_per_chunk=chunk), alone)
                    for name, chunk in CHUNKS.items()]
            if truth is None:
                truth, to_truth = alone, f"alone, to {dtype} on the {device}"
            else:
                rows.append((to_truth, alone, truth))
            for what, vectors, reference in rows:
                relative, cosine = difference(vectors, reference)
                bad = reference is alone and not relative <= BOUNDS[dtype]
                good = good and not bad
                print(f"{device:8}{dtype:10}{what:34}{relative:12.1e}{cosine:12.7f}"
                      + (f"   above {BOUNDS[dtype]}" if bad else ""), flush=True)
    return good


def main(argv=None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a run, a Hugging Face folder or an exported one")
    parser.add_argument("--texts", type=Path, help="a file of texts, one a line")
    parser.add_argument("--dtypes", nargs="+", choices=list(BOUNDS), default=list(BOUNDS))
    parser.add_argument("--max-length", type=positive(int), default=512, help="tokens a text, BOS and EOS included")
    there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--devices", nargs="+", choices=there, default=there, help="the first is the reference")
    args = parser.parse_args(argv)
    texts = TEXTS
    if args.texts:
        with open(args.texts, "rb") as file:
            texts = list(read_lines(file))
    check(texts, f"{args.texts}: no texts")
    return 0 if compare(args.model, texts, args.devices, args.dtypes, args.max_length) else 1


if __name__ == "__main__":
    command(main)
