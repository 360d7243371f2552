"""tools/bench/eval.py: how fast texts become vectors, and vectors results, beside the usual libraries.

    python -m tools.bench.eval models/smollm2-135m-l10
    python -m tools.bench.eval models/smollm2-135m-l10 --vectors 0        # encoding only

Encoding: our Embedder against sentence-transformers (batches of 32, its default) on the same weights and the
mini benchmark's corpus and queries, whose lengths are as ragged as real ones. The two take turns and the
best of their rounds counts; their vectors must agree. Search: our streaming top-k over generated vectors
against numpy and faiss-cpu (an exact flat index). Ratios above 1 mean that ours is faster.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import metrics
from model import Embedder
from plumbing.errors import Parser, UserError, at_least_0, check, command, positive
from plumbing.files import read_jsonl

ROOT = Path(__file__).resolve().parents[2]

def best(rounds: int, **runs) -> dict[str, float]:
    """Seconds of the fastest of `rounds` turns of each run; they alternate, so a busy machine hits both."""
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in seconds.items()}


def sentence_transformer(folder: str, max_length: int, device):
    """The same weights under sentence-transformers: last token, normalised."""
    try:
        from sentence_transformers import SentenceTransformer, models
    except ImportError as error:
        raise UserError(f"{error}: `pip install -r requirements-dev.txt`, or --texts 0") from None
    body = models.Transformer(folder, max_seq_length=max_length)
    body.modality_config.pop("message", None)     # a chat template would wrap every text in a conversation
    body.tokenizer.padding_side = "right"
    body.tokenizer.pad_token = body.tokenizer.pad_token or body.tokenizer.eos_token
    pooling = models.Pooling(body.get_word_embedding_dimension(), pooling_mode="lasttoken")
    modules = [body, pooling, models.Normalize()]
    return SentenceTransformer(modules=modules, device=str(device)), body.tokenizer


def encoding(args) -> None:
    ours = Embedder.load(args.model, max_length=args.max_length)
    theirs, tokenizer = sentence_transformer(args.model, args.max_length, ours.device)
    texts = []
    for name in ("corpus", "queries"):
        documents = read_jsonl(ROOT / "data" / "mini" / "Retrieval" / f"{name}.jsonl", {"text": str})
        texts += [document["text"] for document in documents][:args.texts // 2]
    rows = ours.tokenize(texts)
    # The same tokens for both: texts cut short of the limit, BOS and EOS as text where the other adds none.
    bos, eos = ours.decoder.config.bos_token_id, ours.decoder.config.eos_token_id
    texts = [ours.tokenizer.decode(row[bos is not None:-2]) for row in rows]
    rows = ours.tokenize(texts)
    for front in ("", tokenizer.convert_ids_to_tokens(bos or 0)):
        closed = [front + text + tokenizer.convert_ids_to_tokens(eos) for text in texts]
        if tokenizer(closed)["input_ids"] == rows:
            break
    else:
        print("  the two tokenisers disagree on some text: the comparison is approximate")
    tokens = sum(map(len, rows))
    a = ours.encode(texts, tokens_per_chunk=args.batch_tokens)
    b = torch.tensor(theirs.encode(closed, batch_size=32))
    agree = float((a * b).sum(1).median())
    check(agree > 0.999,
          f"{args.model}: the two give not the same vectors (median cosine {agree:.4f}), so "
          "their speeds mean nothing; give a model whose vector is its last token's")
    seconds = best(args.rounds, ours=lambda: ours.encode(texts, tokens_per_chunk=args.batch_tokens),
                   theirs=lambda: theirs.encode(closed, batch_size=32))
    lengths = sorted(map(len, rows))
    print(f"encode {len(texts)} texts, {tokens} tokens (shortest {lengths[0]}, longest {lengths[-1]}), "
          f"{ours.device}, {torch.get_num_threads()} threads, median cosine of the two {agree:.6f}")
    print(f"  ours                   {tokens / seconds['ours']:9.0f} tokens/s")
    print(f"  sentence-transformers  {tokens / seconds['theirs']:9.0f} tokens/s")
    print(f"  ratio                  {seconds['theirs'] / seconds['ours']:9.2f}")


def searching(args) -> None:
    generator = torch.Generator().manual_seed(0)
    documents = F.normalize(torch.randn(args.vectors, args.dim, generator=generator), dim=1)
    queries = F.normalize(torch.randn(100, args.dim, generator=generator), dim=1)
    d, q = documents.numpy(), queries.numpy()

    def ours():
        chunks = ((i, documents[i:i + 8192]) for i in range(0, len(documents), 8192))
        return metrics.search(queries, chunks, 10)[1].numpy()

    def with_numpy():
        scores = q @ d.T
        few = np.argpartition(-scores, 10, axis=1)[:, :10]
        return np.take_along_axis(few, np.argsort(-np.take_along_axis(scores, few, 1), axis=1), 1)

    runs = {"ours": ours, "numpy": with_numpy}
    try:
        import faiss
        index = faiss.IndexFlatIP(args.dim)
        index.add(d)
        runs["faiss"] = lambda: index.search(q, 10)[1]
    except ImportError:
        print("  faiss-cpu is not installed: left out")
    results = {name: run() for name, run in runs.items()}
    seconds = best(args.rounds, **runs)
    threads = torch.get_num_threads()
    print(f"search {args.vectors} vectors of {args.dim}, 100 queries, best 10, {threads} threads")
    for name, value in seconds.items():
        same, ratio = np.mean(results[name] == results["ours"]), value / seconds["ours"]
        print(f"  {name:<10} {value:8.2f} s   ratio {ratio:5.2f}   same documents {100 * same:.1f} %")


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("model", help="a Hugging Face folder")
    add("--texts", type=at_least_0(int), default=256)
    add("--max-length", type=positive(int), default=512)
    add("--batch-tokens", type=positive(int), default=4096)
    add("--vectors", type=at_least_0(int), default=1_000_000, help="0: no search")
    add("--dim", type=positive(int), default=256)
    add("--rounds", type=positive(int), default=3)
    args = parser.parse_args(argv)
    check(args.texts != 1, "--texts: 0 (no encoding) or at least 2, of which half are queries")
    if args.texts:
        encoding(args)
    if args.vectors:
        searching(args)


if __name__ == "__main__":
    command(main)
