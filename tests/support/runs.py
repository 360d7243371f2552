"""Training runs of seconds, for the tests: data, flags, train.py as a process, as two ranks, or in this process."""
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

import train

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--batch-size", "8", "--max-length", "32", "--device", "cpu"]


def write_lines(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def record(i: int, **more) -> dict:
    return {"prompt": f"task {i % 3}", "query": f"question number {i} " + "word " * (i % 7),
            "pos": [f"answer {i} ✓ " + "long " * (i % 5)], "neg": [f"wrong {i}"],
            "type": ("sts", "long-short")[i % 2], **more}


def options(base, data, out, *more):
    """train.py's flags, parsed."""
    paths = ["--base", str(base), "--data", str(data), "--out", str(out)]
    return train.options([*paths, *FLAGS, *map(str, more)])


def train_command(base, data, out, *more) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), "--base", str(base), "--data", str(data), "--out", str(out),
            *FLAGS, "--lr", "1e-3", "--warmup-steps", "2", *map(str, more)]


def run_train(base, data, out, *more, **settings) -> subprocess.CompletedProcess:
    """train.py as a user runs it."""
    return subprocess.run(train_command(base, data, out, *more), capture_output=True, text=True, **settings)


@contextlib.contextmanager
def two_ranks(base, data, out, *flags, code=(ROOT / "train.py",)):
    """Two processes over gloo, ended with the block. They train for ever, unless the flags say otherwise."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in (0, 1):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
                       "PYTHONPATH": str(ROOT)}
        ranks.append(subprocess.Popen(
            [sys.executable, *code, "--base", base, "--data", data, "--out", out, *FLAGS, "--epochs", "10000", *flags],
            cwd=ROOT, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def checkpoint_state(run: Path) -> dict:
    """{"step", "scaler"} of a run's checkpoint."""
    with safe_open(run / "checkpoint.safetensors", "pt") as file:
        return json.loads(file.metadata()["state"])


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two runs hold the same checkpoint and adapter, bit for bit."""
    for name in ("checkpoint.safetensors", "adapter_model.safetensors"):
        a, b = load_file(first / name), load_file(second / name)
        if a.keys() != b.keys() or not all(a[key].equal(b[key]) for key in a):
            return False
    return True


@contextlib.contextmanager
def signals_restored():
    """train.py listens to signals; a test that runs it in this process gives them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
