"""tools/bench_memory.py: peak memory of loading a 7B checkpoint, and of long texts, on this machine's CPU.

    python tools/bench_memory.py load                   # Mistral-7B's shape, random weights: 14.2 GB of disk
    python tools/bench_memory.py load --stored float16  # as the published E5-Mistral is: all weights are cast
    python tools/bench_memory.py load --layers 2        # a small one, seconds
    python tools/bench_memory.py long                   # 8,192 and 16,384 tokens, windows of 4,096 and 1,024

Each measurement is a process of its own and reads its peak resident size, mapped file pages included (Linux).
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
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # model.py stands one folder up
from model import Config, Decoder, load_decoder  # noqa: E402

MISTRAL_7B = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2,
}
SMALL = {**MISTRAL_7B, "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1536,
         "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
GIB = 2 ** 30


def peak_bytes() -> int:
    """This process's largest resident size so far. (getrusage would count its parent's too.)"""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def write_checkpoint(folder: Path, config: dict, dtype: torch.dtype, shard_bytes=2 * GIB) -> int:
    """Random weights of the config's shapes in shards with an index; one shard in memory. Returns bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        decoder = Decoder(Config.load(folder / "config.json"))
    weight_map, shard, total = {}, {}, 0
    for name, parameter in decoder.named_parameters():
        weight = torch.ones(parameter.shape) if "norm" in name else torch.randn(parameter.shape) * 0.02
        shard[name] = weight.to(dtype)
        total += shard[name].nbytes
        if sum(w.nbytes for w in shard.values()) > shard_bytes or name == "norm.weight":
            file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard.clear()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def measured(*arguments) -> dict:
    """Run one measurement in a process of its own; it prints JSON."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


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
    config = Config(**{key: value for key, value in SMALL.items() if key != "model_type"}
                    | {"sliding_window": window, "head_dim": 64, "tie_word_embeddings": False})
    decoder = Decoder(config)
    for name, parameter in decoder.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.02)
    with torch.inference_mode():
        decoder(torch.zeros(1, 16, dtype=torch.long))
        before = peak_bytes()
        finite = bool(decoder(torch.randint(1000, (1, length))).isfinite().all())
    return {"before": before, "used": peak_bytes(), "finite": finite}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["load", "long", "measure-load", "measure-long"])
    parser.add_argument("values", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--stored", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--folder", type=Path, default=Path("checkpoint.tmp"), help="written, then removed")
    args = parser.parse_args()
    if args.what == "measure-load":
        print(json.dumps(measure_load(Path(args.values[0]))))
    elif args.what == "measure-long":
        print(json.dumps(measure_long(*map(int, args.values))))
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
    main()
