"""tools/bench/gpu.sh and gpu.py: what they refuse. tests/slow runs all of it, dry."""
import torch

from gpu_script import gpu_sh
from scripts import run_tool


def test_user_errors_are_one_line(tmp_path):
    done = gpu_sh(tmp_path, "--fast")
    assert done.returncode == 2 and done.stderr == "error: gpu.sh --fast: takes --dry or nothing\n"
    if not torch.cuda.is_available():
        done = gpu_sh(tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: no CUDA device here")
    done = run_tool("bench.gpu", "base", tmp_path)
    assert done.returncode == 2 and "already there" in done.stderr and done.stderr.count("\n") == 1
