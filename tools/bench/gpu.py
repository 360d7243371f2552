"""tools/bench/gpu.py: Mistral-7B's shape on one GPU, with random weights and texts made in place.

    python -m tools.bench.gpu base work/7b                      # weights 14.2 GB, tokenizer, ragged examples
    python -m tools.bench.gpu train work/7b --tokens-per-chunk 8192 16384 --json train.json
    python -m tools.bench.gpu train work/7b --batch-size 2048 --tokens-per-chunk 1024 --memory-gib 22
    python -m tools.bench.gpu train work/7b --cudnn              # attention may take cuDNN's kernels
    python -m tools.bench.gpu train work/7b --pad 64             # lengths are padded to multiples of 64
    python -m tools.bench.gpu train work/7b --train-flags=--no-compile
    python -m tools.bench.gpu encode work/7b --json encode.json
    python -m tools.bench.gpu train work/7b --fp8                # the base's products in fp8

Speed and memory do not depend on what the weights are, only on shapes. tools/bench/gpu.sh runs all of it.

Why --cudnn and --pad: from torch 2.11 on, attention prefers cuDNN on Hopper and newer, which builds a plan
for each (texts, length) that it has not seen. The product switches it off (plumbing/checkpoint.py); padding
to multiples would leave few shapes. The compiler's time is in "first_step_seconds", and not in
"slowest_step_seconds".
"""
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
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers

import train
from model import Decoder, Embedder
from plumbing.errors import Parser, check, command, positive
from plumbing.files import read_jsonl, write_json, write_jsonl, write_text
from tools.bench.memory import MISTRAL_7B, peak_bytes, write_checkpoint
from tools.models import fp8

ROOT = Path(__file__).resolve().parents[2]
TINY = {**MISTRAL_7B, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL = {**MISTRAL_7B, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 4,
         "num_attention_heads": 8, "num_key_value_heads": 2}
SHAPES = {"7b": MISTRAL_7B, "small": SMALL, "tiny": TINY}
PRINTED = ("tokens_per_chunk", "tokens_per_second", "mfu", "mfu_useful", "padding", "shapes", "peak_bytes",
           "reserved_bytes", "first_step_seconds", "slowest_step_seconds", "error")


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
    write_jsonl(path, rows)
    write_text(path.with_name("texts.txt"), "".join(row["query"] + "\n" for row in rows[:12]))


def precision(s: dict):
    """The context in which a base is loaded: as it is, or with its products in fp8 (rounded so on a CPU)."""
    if s["fp8"] and s["device"] != "cpu":
        fp8.require_gpu()
    return fp8.loading() if s["fp8"] else contextlib.nullcontext()


def set_up(s: dict) -> set:
    """What --cudnn and --pad change, in this process alone -> the shapes (texts, length) as they are met."""
    if s["cudnn"]:
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cuda.enable_cudnn_sdp = lambda enabled: None        # the product would switch it off
    shapes, forward = set(), Decoder.forward

    def padded(decoder, ids):
        ids = F.pad(ids, (0, -ids.shape[1] % s["pad"]))                        # no real token looks there
        shapes.add(tuple(ids.shape))
        return forward(decoder, ids)

    Decoder.forward = padded
    return shapes


def measure_train(s: dict) -> dict:
    """A few steps of train.py in this process: medians past the first step, and the peak memory."""
    shapes = set_up(s)
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
        log = list(read_jsonl(out / "log.jsonl"))
    timed = log[1:] or log                                       # the first step compiles
    figures = {key: statistics.median(line[key] for line in timed)
               for key in ("tokens_per_second", "padding", "seconds", "mfu", "mfu_useful") if key in log[0]}
    if device == "cuda":
        memory = {"peak_bytes": torch.cuda.max_memory_allocated(),
                  "reserved_bytes": torch.cuda.max_memory_reserved()}
    else:
        memory = {"peak_bytes": peak_bytes()}
    slowest = max(line["seconds"] for line in timed)
    return {**s, **figures, **memory, "tokens": log[-1]["tokens"], "shapes": len(shapes),
            "first_step_seconds": log[0]["seconds"], "slowest_step_seconds": slowest}


def measure_encode(s: dict) -> dict:
    """Real tokens a second of Embedder.encode, compiled on a GPU, over the examples' documents: the median
    of three times past a first, which compiles."""
    shapes = set_up(s)
    with precision(s):
        embedder = Embedder.load(s["base"], device=None if s["device"] != "cpu" else "cpu", dtype=s["dtype"],
                                 max_length=s["max_length"])
    rows = read_jsonl(f"{s['base']}/examples.jsonl")
    texts = [row["pos"][0] for row in rows][:s["batch_size"]]
    tokens = sum(map(len, embedder.tokenize(texts)))
    embedder.compile()
    seconds = []
    for part in (texts[::8], texts, texts, texts):
        begin = time.perf_counter()
        embedder.encode(part, tokens_per_chunk=s["tokens_per_chunk"])
        seconds.append(time.perf_counter() - begin)
    rate = tokens / statistics.median(seconds[1:])
    weights = sum(projection.weight.numel() for projection in embedder.decoder.projections())
    return {**s, "tokens_per_second": rate, "tokens": tokens, "texts": len(texts), "shapes": len(shapes),
            "tflops_useful": 2 * weights * rate / 1e12,
            "peak_bytes": peak_bytes() if embedder.device.type == "cpu"
            else torch.cuda.max_memory_allocated()}


def bench(args) -> int:
    """One measurement for each chunk size, each in a process of its own; what fails is in the report too.

    Returns the exit code: 1 where all have failed.
    """
    check((args.base / "tokenizer.json").exists(),
          f"{args.base}: not made yet: `python -m tools.bench.gpu base {args.base}`")
    reports = []
    for size in args.tokens_per_chunk:
        settings = {**vars(args), "base": str(args.base), "json": None, "tokens_per_chunk": size}
        done = subprocess.run([sys.executable, "-m", "tools.bench.gpu", "--one"], cwd=ROOT,
                              input=json.dumps(settings), capture_output=True, text=True)
        if done.returncode == 0:
            one = json.loads(done.stdout.splitlines()[-1])
        else:
            said = done.stderr.strip().splitlines() or ["killed"]
            one = {**settings, "error": said[-1], "rc": done.returncode}
        reports.append(one)
        print(json.dumps({key: one[key] for key in PRINTED if key in one}), flush=True)
        if args.json:                                            # after each, in case the time runs out
            gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
            write_json(args.json, {"torch": torch.__version__, "gpu": gpu, "found": reports})
    return 1 if all("error" in one for one in reports) else 0


def one_measurement() -> None:
    """What `bench` starts: settings on standard input, figures on standard output."""
    settings = json.load(sys.stdin)
    measure = {"train": measure_train, "encode": measure_encode}[settings["what"]]
    print(json.dumps(measure(settings)))


def main(argv=None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("what", choices=("base", "train", "encode"))
    add("base", type=Path, help="the folder that `base` makes")
    add("--shape", choices=SHAPES, default="7b")
    add("--rows", type=positive(int), default=2048, help="examples to make")
    add("--batch-size", type=positive(int), default=256, help="encode: how many texts")
    add("--max-length", type=positive(int), default=512)
    add("--steps", type=positive(int), default=4)
    add("--tokens-per-chunk", type=positive(int), nargs="+", default=[16384])
    add("--memory-gib", type=positive(float), help="cap the GPU's memory, as if it were a smaller one")
    add("--dtype", default="bfloat16")
    add("--fp8", action="store_true", help="the base's products in fp8")
    add("--cudnn", action="store_true", help="leave cuDNN's attention on, as torch has it")
    add("--pad", type=positive(int), default=1, metavar="N", help="pad lengths to multiples of N")
    add("--device", help="cpu, to test without a GPU")
    add("--train-flags", default="", help="more flags of train.py")
    add("--json", type=Path)
    args = parser.parse_args(argv)
    if args.what != "base":
        return bench(args)
    check(not args.base.exists(), f"{args.base}: already there")
    device = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
    make_base(args.base, SHAPES[args.shape], args.dtype, device)
    ragged_examples(args.base / "examples.jsonl", args.rows)
    return 0


if __name__ == "__main__":
    command(one_measurement if sys.argv[1:] == ["--one"] else main)
