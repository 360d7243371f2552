"""tools/bench/memory.py: peak memory of loading a 7B checkpoint, of long texts, and of training, predicted.

    python -m tools.bench.memory load                  # Mistral-7B's shape, random weights: 14.2 GB of disk
    python -m tools.bench.memory load --stored float16 # as the published E5-Mistral is: all weights are cast
    python -m tools.bench.memory load --layers 2       # a small one, seconds
    python -m tools.bench.memory long                  # 8,192 and 16,384 tokens, windows of 4,096 and 1,024
    python -m tools.bench.memory train                 # Mistral-7B's shape: --tokens-per-chunk by GPU size
    python -m tools.bench.memory train --base models/NAME --measured results/gpu/train.json

`train` is arithmetic. The other two measure, each time in a process of its own, by its peak resident size,
mapped file pages included (Linux).
"""
import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from model import PROJECTIONS, Config, Decoder, load_decoder
from plumbing.checkpoint import read_config, save_tensors
from plumbing.errors import Parser, command, positive
from plumbing.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
MISTRAL_7B = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2,
}
SMALL = {**MISTRAL_7B, "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1536,
         "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
GIB = 2 ** 30
GPU_SIZES = (24, 40, 80, 141)     # GB of 10^9 bytes, as GPUs are sold


def load_config(path: Path) -> Config:
    return Config(**read_config(path, Config.__annotations__))


def peak_bytes() -> int:
    """This process's largest resident size so far. (getrusage would count its parent's too.)"""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def write_checkpoint(folder: Path, config: dict, dtype: torch.dtype, shard_bytes=2 * GIB) -> int:
    """Random weights of the config's shapes in shards with an index; one shard in memory. Returns bytes."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    with torch.device("meta"):
        decoder = Decoder(load_config(folder / "config.json"))
    weight_map, shard, total = {}, {}, 0
    for name, parameter in decoder.named_parameters():
        weight = torch.ones(parameter.shape) if "norm" in name else torch.randn(parameter.shape) * 0.02
        shard[name] = weight.to(dtype)
        total += shard[name].nbytes
        if sum(w.nbytes for w in shard.values()) > shard_bytes or name == "norm.weight":
            file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
            save_tensors(shard, folder / file)
            weight_map |= dict.fromkeys(shard, file)
            shard.clear()
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return total


def measured(*arguments) -> dict:
    """Run one measurement in a process of its own; it prints JSON."""
    line = [sys.executable, "-m", "tools.bench.memory", *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def measure_load(folder: Path) -> dict:
    """Load in bfloat16, then use every weight once: a mapped weight takes no memory before it is read."""
    before, begin = peak_bytes(), time.perf_counter()
    decoder = load_decoder(folder, "cpu", torch.bfloat16)
    loaded, seconds = peak_bytes(), time.perf_counter() - begin
    with torch.inference_mode():
        finite = bool(decoder(torch.tensor([[1, 5, 9, 2]])).isfinite().all())
    return {"before": before, "loaded": loaded, "used": peak_bytes(), "seconds": seconds, "finite": finite}


def measure_long(length: int, window: int) -> dict:
    """One text of so many tokens through two layers of 512 values."""
    config = shape_of({**SMALL, "sliding_window": window})
    decoder = Decoder(config)
    for name, parameter in decoder.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.02)
    with torch.inference_mode():
        decoder(torch.zeros(1, 16, dtype=torch.long))
        before = peak_bytes()
        finite = bool(decoder(torch.randint(1000, (1, length))).isfinite().all())
    return {"before": before, "used": peak_bytes(), "finite": finite}


def shape_of(raw: dict) -> Config:
    """A Config out of one of the shapes above."""
    return Config(**{"head_dim": raw["hidden_size"] // raw["num_attention_heads"],
                     "tie_word_embeddings": False, **{k: v for k, v in raw.items() if k != "model_type"}})


def kept_bytes_per_token(c: Config, rank: int, itemsize: int, compiled=True, mask=1) -> int:
    """Bytes that the graph of one padded token keeps until its backward pass, LoRA on all projections.

    itemsize: of the base's dtype. mask: bytes an element of a dropout mask (eager mode on a CPU keeps it in
    the dtype). Compiled blocks keep no float32 copy in norms, and compute silu(gate) and its product anew.
    """
    D, I, H = c.hidden_size, c.intermediate_size, c.num_attention_heads
    Q, b = H * c.head_dim, itemsize
    norms = 2 * (b if compiled else 4) * D + 2 * 4                 # input, in eager float32; 1 / rms
    inputs = (b + mask) * (D + Q + D)                              # LoRA's z of qkv, of o, of gate and up
    attention = 4 * b * Q + 4 * H                                  # q, k, v repeated, y; log of the sum
    mlp = (3 if compiled else 4) * b * I + mask * I                # gate, up, down's z; eager: silu(gate)
    layer = norms + inputs + attention + mlp + len(PROJECTIONS) * b * rank
    # the first block's input needs no gradient: no copy for its norm, no mask; the last norm is eager
    return c.num_hidden_layers * layer + 4 * D - (b if compiled else 4) * D - mask * D


def predicted_bytes(c: Config, tokens_per_chunk: int, rank=16, itemsize=2, batch=2048, documents=2,
                    compiled=True) -> float:
    """Peak of a training step: base, adapter, a chunk's graph and a layer's worth of work, vectors, scores.

    rank 16, itemsize 2 (bfloat16), batch queries with so many documents each. An estimate: the allocator's
    gaps and the libraries' work space are not in it.
    """
    with torch.device("meta"):
        decoder = Decoder(c)
    base = sum(p.numel() for p in decoder.parameters()) * itemsize
    lora = rank * sum(sum(projection.weight.shape) for projection in decoder.projections())
    token = kept_bytes_per_token(c, rank, itemsize, compiled) * (1 + 1 / c.num_hidden_layers)
    vectors = 3 * 4 * batch * (1 + documents) * c.hidden_size     # float32: vectors, gradient, one copy
    scores = 6 * 4 * batch * batch * documents                    # cosines, logits, softmax, their gradients
    # the adapter in float32, its gradient, Adam's two moments; and cast for the products
    return base + lora * (4 * 4 + itemsize) + tokens_per_chunk * token + vectors + scores


def recommended_chunk(c: Config, gigabytes: float, **settings) -> int:
    """The most tokens per chunk, in 256s, predicted to fit 92 % of a GPU less 0.6 GB for CUDA, or 0."""
    room = 0.92 * gigabytes * 1e9 - 0.6e9
    fixed = predicted_bytes(c, 0, **settings)
    token = (predicted_bytes(c, 1 << 20, **settings) - fixed) / (1 << 20)
    return max(0, int((room - fixed) / token)) // 256 * 256


def train_table(c: Config, measured: Path | None, **settings) -> None:
    """Print the recommended chunk of each GPU size, and the prediction beside each measurement of gpu.sh."""
    print("GPU, GB   --tokens-per-chunk   predicted GB   measured GB")
    report = read_json(measured, {"found": [dict]})["found"] if measured else []
    peaks = {one["tokens_per_chunk"]: one.get("peak_bytes") for one in report}         # None: it failed
    rows = [(f"{size}", recommended_chunk(c, size, **settings)) for size in GPU_SIZES]
    recommended = {tokens for _, tokens in rows}
    rows += [("", tokens) for tokens in peaks if tokens not in recommended]
    for name, tokens in rows:
        if name and not tokens:
            print(f"{name:>7}   {'too small for this base':>18}")
            continue
        predicted = predicted_bytes(c, tokens, **settings) / 1e9
        measured_gb = "-"
        if tokens in peaks:
            measured_gb = f"{peaks[tokens] / 1e9:.1f}" if peaks[tokens] else "failed"
        print(f"{name:>7}   {tokens:18,}   {predicted:12.1f}   {measured_gb:>11}")


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["load", "long", "train", "measure-load", "measure-long"])
    parser.add_argument("values", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=positive(int), default=32)
    parser.add_argument("--stored", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--folder", type=Path, default=Path("checkpoint.tmp"), help="written, then removed")
    parser.add_argument("--base", type=Path, help="train: a model folder (default: Mistral-7B's shape)")
    parser.add_argument("--rank", type=positive(int), default=16)
    parser.add_argument("--batch-size", type=positive(int), default=2048, help="train: queries a step")
    parser.add_argument("--eager", action="store_true", help="train: without torch.compile")
    parser.add_argument("--measured", type=Path, help="train: a report of tools.bench.gpu train --json")
    args = parser.parse_args()
    if args.what == "measure-load":
        print(json.dumps(measure_load(Path(args.values[0]))))
    elif args.what == "measure-long":
        print(json.dumps(measure_long(*map(int, args.values))))
    elif args.what == "train":
        config = load_config(args.base / "config.json") if args.base else shape_of(MISTRAL_7B)
        train_table(config, args.measured, rank=args.rank, batch=args.batch_size, compiled=not args.eager)
    elif args.what == "load":
        try:
            size = write_checkpoint(args.folder, {**MISTRAL_7B, "num_hidden_layers": args.layers},
                                    getattr(torch, args.stored))
            m = measured("measure-load", args.folder)
        finally:
            shutil.rmtree(args.folder, ignore_errors=True)
        size = size // getattr(torch, args.stored).itemsize * 2                # its size in bfloat16
        print(f"{args.layers} layers, {size / 1e9:.2f} GB in bfloat16, stored in {args.stored}: loaded in "
              f"{m['seconds']:.1f} s; peak {m['loaded'] / 1e9:.2f} GB when loaded, {m['used'] / 1e9:.2f} GB "
              f"when used: {m['used'] / size:.3f} times its size ({m['before'] / 1e9:.2f} GB of it Python "
              f"and torch, before); states finite: {m['finite']}")
    else:
        for window in (4096, 1024):
            added = []
            for length in (8192, 16384):
                m = measured("measure-long", length, window)
                added.append(m["used"] - m["before"])
                print(f"window {window}, {length} tokens: {added[-1] / 2**20:.0f} MiB above the model")
            print(f"window {window}: 16,384 tokens need {added[1] / added[0]:.2f} times what 8,192 need")


if __name__ == "__main__":
    command(main)
