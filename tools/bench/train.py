"""tools/bench/train.py: train.py and its peer, sentence-transformers + peft, side by side.

    python -m tools.bench.train models/smollm2-135m-l10 --data data/synthetic.jsonl --threads 2
    python -m tools.bench.train BASE --data FILE --batch-size 2048 --max-length 512 \\
        --tokens-per-chunk 16384 --warmup 3 --json bench.json                # a GPU: bfloat16, compiled

Both sides get the same base, LoRA start, batches, precision, optimizer and schedule, and take turns; each
turn is a process of its own, so that its peak memory is its own. The peer is used as its documentation shows
it, SentenceTransformerTrainer with CachedMultipleNegativesRankingLoss at scale 1 / temperature, on the
folder that tools/models/export.py writes, in these variants:

    stock           chunks of --peer-rows rows, in the order of the batch
    tokens          its token-budget chunks (mini_batch_num_tokens) of --tokens-per-chunk
    sorted          each batch is handed over sorted by length, which changes nothing in the loss
    sorted-tokens   both

Tokens are real ones, padding not counted; time runs from the end of step --warmup to the last step's end.
"""
import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import train
from model import Embedder
from plumbing.errors import Parser, UserError, at_least_0, check, command, positive, probability, seed
from plumbing.examples import Examples
from plumbing.files import read_json, read_jsonl, write_json, write_jsonl
from tools.bench.memory import peak_bytes
from tools.models import export

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ("stock", "tokens", "sorted", "sorted-tokens")


def write_examples(files: list[str], rows: int, negatives: int, seed: int, out: Path) -> None:
    """A shuffled mixture of the files with one positive and `negatives` (0 or 1) negatives a row."""
    examples, usable = Examples(files), []
    for i in np.concatenate(train.plan_epoch(examples, 1024, False, seed, 0)):
        if len(usable) == rows:
            break
        example = examples[i]
        if len(example["neg"]) >= negatives:                         # the peer wants as many in every row
            usable.append({**example, "pos": example["pos"][:1], "neg": example["neg"][:negatives]})
    ways_out = "fewer --steps, a smaller --batch-size"
    if negatives:
        ways_out += ", or --negatives 0, which needs no negatives"
    check(len(usable) == rows, f"--data: {len(usable)} usable rows, {rows} wanted: {ways_out}")
    write_jsonl(out, usable)


def prepare(args, folder: Path) -> dict:
    """Write what both sides read: examples, the fresh adapter, the exported base. Returns the settings."""
    write_examples(args.data, args.batch_size * args.steps, args.negatives, args.seed,
                   folder / "examples.jsonl")
    write_start(args, folder)
    if args.variants:
        write_exported(args, folder)
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    return {**settings, "folder": str(folder), "variant": "ours"}


def write_start(args, folder: Path) -> None:
    """folder/init: the fresh adapter with which both sides begin.

    args: base, dtype, max_length, seed, lora_rank, lora_dropout.
    """
    embedder = Embedder.load(args.base, device="cpu", dtype=args.dtype, max_length=args.max_length)
    embedder.decoder.add_lora(args.lora_rank, 2 * args.lora_rank, args.lora_dropout, seed=args.seed)
    embedder.save_adapter(folder / "init")


def write_exported(args, folder: Path) -> None:
    """folder/exported: the base as sentence-transformers reads it. args: base, dtype, max_length."""
    with contextlib.redirect_stdout(sys.stderr):
        export.main([str(args.base), str(folder / "exported"), "--dtype", args.dtype,
                     "--max-length", str(args.max_length)])


def train_options(s: dict) -> argparse.Namespace:
    """train.py's flags for these settings; the peer's optimizer and schedule are made from them too."""
    folder = Path(s["folder"])
    flags = {"base": s["base"], "data": folder / "examples.jsonl", "out": folder / "run",
             "init-adapter": folder / "init", "warmup-steps": min(10, s["steps"]),
             "checkpoint-every": 10 ** 9}
    flags |= {name.replace("_", "-"): s[name] for name in (
        "batch_size", "max_length", "negatives", "lr", "tokens_per_chunk", "keep_tokens", "dtype",
        "device", "seed")}
    flags = [(f"--{name}", str(value)) for name, value in flags.items() if value is not None]
    return train.options([*sum(flags, ()), "--no-mask", "--overwrite", *s["train_flags"].split()])


def run_ours(s: dict) -> tuple[list[float], list[float]]:
    """train.py as it is; returns the loss of each step and the time at which each step had ended."""
    args = train_options(s)
    train.train(args)
    log = list(read_jsonl(args.out / "log.jsonl"))
    return [line["loss"] for line in log], list(itertools.accumulate(line["seconds"] for line in log))


def batches_of(args) -> list[list[dict]]:
    """The examples of each of train.py's steps with these flags."""
    examples = Examples(args.data, args.prompt)
    return [[examples[i] for i in batch] for batch in train.plan_run(examples, args)]


def row_length(row: dict) -> int:
    return sum(map(len, [row["query"], *row["pos"], *row["neg"]]))


def run_peer(s: dict) -> tuple[list[float], list[float]]:
    """The same steps by the peer; imported here: our side must not carry its packages in memory."""
    from tools.bench.peer import train_peer
    args = train_options(s)
    batches = batches_of(args)
    if s["variant"].startswith("sorted"):
        batches = [sorted(batch, key=row_length) for batch in batches]
    return train_peer(s, args, batches)


def count_tokens(s: dict) -> list[int]:
    """Real tokens of each step, counted once for both sides."""
    tokenize = Embedder.load(s["base"], device="cpu", dtype=s["dtype"], max_length=s["max_length"]).tokenize
    tokens = []
    for batch in batches_of(train_options(s)):
        queries = tokenize([row["query"] for row in batch], [row["prompt"] for row in batch])
        documents = tokenize([text for row in batch for text in row["pos"] + row["neg"]])
        tokens.append(sum(map(len, queries + documents)))
    return tokens


def turn(s: dict) -> dict:
    """One side's turn, in this process."""
    cuda = s["device"].startswith("cuda")
    before = 0 if cuda else peak_bytes()
    losses, ended = (run_ours if s["variant"] == "ours" else run_peer)(s)
    assert len(losses) == len(ended) == s["steps"]
    return {"losses": losses, "seconds": ended[-1] - ended[s["warmup"] - 1], "before_bytes": before,
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else peak_bytes()}


def in_own_process(s: dict) -> dict:
    out = Path(s["folder"]) / "turn.json"
    environment = {**os.environ, "OMP_NUM_THREADS": str(s["threads"]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "tools.bench.train", "--turn", out], cwd=ROOT,
                          env=environment, input=json.dumps(s), text=True, capture_output=True)
    if done.returncode == 2:                                # a user's mistake, already in one line
        said = done.stderr.strip().splitlines()[-1]
        raise UserError(f"{s['variant']}: " + said.removeprefix("train.py: "))
    if done.returncode:
        raise RuntimeError(f"{s['variant']}: exit code {done.returncode}\n"
                           f"{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return read_json(out)


def one_turn() -> None:
    """What `in_own_process` starts: settings on standard input, figures into the file that --turn names."""
    write_json(sys.argv[2], turn(json.load(sys.stdin)))


def summarize(turns: dict[str, list[dict]], tokens: int) -> dict:
    """Medians over the rounds, beside ours."""
    ours = statistics.median(tokens / t["seconds"] for t in turns["ours"])
    table = {}
    for side, of_side in turns.items():
        rate = statistics.median(tokens / t["seconds"] for t in of_side)
        losses, our_losses = of_side[0]["losses"], turns["ours"][0]["losses"]
        table[side] = {"tokens_per_second": rate, "ours_is_faster": ours / rate,
                       "peak_bytes": statistics.median(t["peak_bytes"] for t in of_side),
                       "before_bytes": statistics.median(t["before_bytes"] for t in of_side),
                       "loss_difference": max(abs(a - b) for a, b in zip(losses, our_losses)),
                       "losses": losses}
    return table


def show(table: dict, s: dict, tokens: int) -> None:
    print(f"{s['base']} in {s['dtype']} on {s['device']}: {s['steps'] - s['warmup']} timed steps of "
          f"{s['batch_size']} queries, {tokens:,} real tokens, at most {s['max_length']} a text; "
          f"median of {s['rounds']}\n")
    print(f"{'':15}{'real tok/s':>11}{'ours is':>9}{'peak GB':>9}{'before':>8}{'max loss difference':>21}")
    for side, row in table.items():
        print(f"{side:15}{row['tokens_per_second']:11,.0f}{row['ours_is_faster']:8.2f}x"
              f"{row['peak_bytes'] / 1e9:9.2f}{row['before_bytes'] / 1e9:8.2f}"
              f"{row['loss_difference']:21.1e}")
    print(f"\n{'loss':5}" + "".join(f"{side:>15}" for side in table))
    for step, losses in enumerate(zip(*(row["losses"] for row in table.values())), 1):
        print(f"{step:5}" + "".join(f"{loss:15.5f}" for loss in losses))


def bench(args) -> None:
    check(args.steps > args.warmup, f"--steps {args.steps}: must be above --warmup {args.warmup}")
    with tempfile.TemporaryDirectory() as folder:
        settings = prepare(args, Path(folder))
        tokens = sum(count_tokens(settings)[args.warmup:])
        turns = {side: [] for side in ("ours", *args.variants)}
        for number in range(args.rounds):
            for side in list(turns)[::-1 if number % 2 else 1]:    # nobody always runs on the warm machine
                turns[side].append(in_own_process({**settings, "variant": side}))
                print(f"round {number + 1}/{args.rounds}  {side}: {turns[side][-1]['seconds']:.1f} s",
                      file=sys.stderr)
    table = summarize(turns, tokens)
    show(table, settings, tokens)
    if args.json:
        write_json(args.json, {"settings": {**settings, "folder": None}, "torch": torch.__version__,
                               "tokens": tokens, "sides": table})


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("base", help="a Hugging Face folder")
    add("--data", required=True, action="append", metavar="FILE[:SHARE]",
        help="training files, as for train.py")
    add("--batch-size", type=positive(int), default=64)
    add("--max-length", type=positive(int), default=128)
    add("--negatives", type=int, choices=(0, 1), default=1, help="0: pairs; 1: only rows with a negative")
    add("--steps", type=positive(int), default=6)
    add("--warmup", type=positive(int), default=1, help="steps before the clock starts")
    add("--rounds", type=positive(int), default=3)
    add("--variants", nargs="*", choices=VARIANTS, default=["stock", "tokens", "sorted"], help="of the peer")
    add("--tokens-per-chunk", type=positive(int), default=2048, help="ours, and the peer's token budget")
    add("--keep-tokens", type=at_least_0(int), help="train.py's: tokens whose first pass is kept")
    add("--peer-rows", type=positive(int), default=32, help="the peer's mini_batch_size (32 is its default)")
    add("--lora-rank", type=positive(int), default=16)
    add("--lora-dropout", type=probability, default=0.0, help="0 lets the loss curves be compared")
    add("--lr", type=positive(float), default=1e-4)
    add("--seed", type=seed, default=0)
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=positive(int), default=os.cpu_count(), help="of the CPU, for either side")
    add("--train-flags", default="", help="more flags of train.py, for ours alone: \"--no-compile\"")
    add("--json", type=Path, help="write everything here too")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    bench(args)


if __name__ == "__main__":
    command(one_turn if sys.argv[1:2] == ["--turn"] else main)
