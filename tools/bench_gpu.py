"""tools/bench_gpu.py: Mistral-7B's shape on one GPU, with random weights and texts made in place.

    python tools/bench_gpu.py base work/7b                      # weights 14.2 GB, tokenizer, ragged examples
    python tools/bench_gpu.py train work/7b --tokens-per-chunk 8192 16384 --json train.json
    python tools/bench_gpu.py train work/7b --batch-size 2048 --tokens-per-chunk 1024 --memory-gib 22
    python tools/bench_gpu.py encode work/7b --json encode.json
    python tools/bench_gpu.py train work/7b --fp8                # the base's products in fp8: tools/fp8.py

Speed and memory do not depend on what the weights are, only on shapes. tools/gpu.sh runs all of it.
"""
import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # train.py stands one folder up
import fp8  # noqa: E402
import train  # noqa: E402
from bench_memory import MISTRAL_7B, peak_bytes, write_checkpoint  # noqa: E402
from model import Embedder, Linear, UserError, command, replace_file  # noqa: E402

TINY = {**MISTRAL_7B, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL = {**MISTRAL_7B, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 4,
         "num_attention_heads": 8, "num_key_value_heads": 2}
SHAPES = {"7b": MISTRAL_7B, "small": SMALL, "tiny": TINY}


def make_base(folder: Path, config: dict, dtype="bfloat16", device="cpu") -> None:
    """A Hugging Face folder: random weights, and a tokenizer of one token a word, w0 ... w31999."""
    with torch.device(device):                                   # on the GPU, 7B random numbers take seconds
        write_checkpoint(folder, config, getattr(torch, dtype))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config["vocab_size"])}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def ragged_examples(path: Path, rows: int, seed=0) -> None:
    """Rows of random words, lengths log-normal: queries of 40 words in the middle, documents of 150."""
    rng = np.random.default_rng(seed)

    def text(median: int) -> str:
        words = rng.integers(3, 32000, int(np.clip(rng.lognormal(np.log(median), 0.6), 2, 2000)))
        return " ".join(f"w{word}" for word in words)
    rows = [{"query": text(40), "pos": [text(150)], "neg": [text(150)]} for _ in range(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.with_name("texts.txt").write_text("".join(row["query"] + "\n" for row in rows[:12]))


def precision(s: dict):
    """The context in which a base is loaded: as it is, or with its products in fp8 (rounded so on a CPU)."""
    if s["fp8"] and s["device"] != "cpu":
        fp8.require_gpu()
    return fp8.loading() if s["fp8"] else contextlib.nullcontext()


def measure_train(s: dict) -> dict:
    """A few steps of train.py in this process: medians past the first step, and the peak memory."""
    device = "cuda" if torch.cuda.is_available() and s["device"] != "cpu" else "cpu"
    if s["memory_gib"] and device == "cuda":                     # as if the GPU were no larger than that
        torch.cuda.set_per_process_memory_fraction(
            s["memory_gib"] * 2 ** 30 / torch.cuda.get_device_properties(0).total_memory)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        args = train.options([
            "--base", s["base"], "--data", f"{s['base']}/examples.jsonl", "--out", str(out),
            "--device", device, "--dtype", s["dtype"], "--batch-size", str(s["batch_size"]),
            "--max-length", str(s["max_length"]), "--max-steps", str(s["steps"]),
            "--tokens-per-chunk", str(s["tokens_per_chunk"]), *s["train_flags"].split()])
        with precision(s):
            train.train(args)
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    timed = log[1:] or log                                       # the first step compiles
    figures = {key: statistics.median(line[key] for line in timed)
               for key in ("tokens_per_second", "padding", "seconds", "mfu", "mfu_useful") if key in log[0]}
    if device == "cuda":
        memory = {"peak_bytes": torch.cuda.max_memory_allocated(),
                  "reserved_bytes": torch.cuda.max_memory_reserved()}
    else:
        memory = {"peak_bytes": peak_bytes()}
    return {**s, **figures, **memory, "tokens": log[-1]["tokens"], "first_step_seconds": log[0]["seconds"],
            "replay_difference": max(line["replay_difference"] for line in log)}


def measure_encode(s: dict) -> dict:
    """Real tokens a second of Embedder.encode, compiled on a GPU, over the examples' documents: the median of
    three times past a first, which compiles."""
    with precision(s):
        embedder = Embedder.load(s["base"], device=None if s["device"] != "cpu" else "cpu", dtype=s["dtype"],
                                 max_length=s["max_length"])
    with open(f"{s['base']}/examples.jsonl") as file:
        texts = [json.loads(line)["pos"][0] for line in file][:s["batch_size"]]
    tokens = sum(map(len, embedder.tokenize(texts)))
    embedder.compile()
    seconds = []
    for part in (texts[::8], texts, texts, texts):
        begin = time.perf_counter()
        embedder.encode(part, tokens_per_chunk=s["tokens_per_chunk"])
        seconds.append(time.perf_counter() - begin)
    rate = tokens / statistics.median(seconds[1:])
    weights = sum(m.weight.numel() for m in embedder.decoder.modules() if isinstance(m, Linear))
    return {**s, "tokens_per_second": rate, "tokens": tokens, "texts": len(texts),
            "tflops_useful": 2 * weights * rate / 1e12,
            "peak_bytes": peak_bytes() if embedder.device.type == "cpu"
            else torch.cuda.max_memory_allocated()}


def bench(args) -> None:
    """One measurement for each chunk size, each in a process of its own; what fails is in the report too."""
    if not (args.base / "tokenizer.json").exists():
        raise UserError(f"{args.base}: not made yet: `python tools/bench_gpu.py base {args.base}`")
    found = []
    for size in args.tokens_per_chunk:
        settings = {**vars(args), "base": str(args.base), "json": None, "tokens_per_chunk": size}
        done = subprocess.run([sys.executable, __file__, "--one"], input=json.dumps(settings),
                              capture_output=True, text=True)
        lines = done.stdout.splitlines()
        one = json.loads(lines[-1]) if done.returncode == 0 else {
            **settings, "error": (done.stderr.strip().splitlines() or ["killed"])[-1], "rc": done.returncode}
        found.append(one)
        shown = ("tokens_per_chunk", "tokens_per_second", "mfu", "mfu_useful", "padding", "peak_bytes",
                 "reserved_bytes", "error")
        print(json.dumps({key: one[key] for key in shown if key in one}), flush=True)
        if args.json:                                            # after each, in case the time runs out
            gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
            report = {"torch": torch.__version__, "gpu": gpu, "found": found}
            replace_file(args.json, lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))
    if all("error" in one for one in found):
        sys.exit(1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("what", choices=("base", "train", "encode"))
    add("base", type=Path, help="the folder that `base` makes")
    add("--shape", choices=SHAPES, default="7b")
    add("--rows", type=int, default=2048, help="examples to make")
    add("--batch-size", type=int, default=256, help="encode: how many texts")
    add("--max-length", type=int, default=512)
    add("--steps", type=int, default=4)
    add("--tokens-per-chunk", type=int, nargs="+", default=[16384])
    add("--memory-gib", type=float, help="cap the GPU's memory, as if it were a smaller one")
    add("--dtype", default="bfloat16")
    add("--fp8", action="store_true", help="the base's products in fp8")
    add("--device", help="cpu, to test without a GPU")
    add("--train-flags", default="", help="more flags of train.py")
    add("--json", type=Path)
    args = parser.parse_args(argv)
    if args.what == "base":
        if args.base.exists():
            raise UserError(f"{args.base}: already there")
        device = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
        make_base(args.base, SHAPES[args.shape], args.dtype, device)
        ragged_examples(args.base / "examples.jsonl", args.rows)
    else:
        bench(args)


if __name__ == "__main__":
    if sys.argv[1:] == ["--one"]:                                # how `bench` calls this file
        asked = json.load(sys.stdin)
        try:
            print(json.dumps({"train": measure_train, "encode": measure_encode}[asked["what"]](asked)))
        except (UserError, torch.OutOfMemoryError) as error:
            sys.exit(f"error: {str(error).splitlines()[0]}")
    else:
        command(main)
