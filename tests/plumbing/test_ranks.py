"""plumbing/ranks.py: three processes over gloo see the same sums, and one process sees nothing."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plumbing.errors import UserError
from plumbing.ranks import agree, gather, rank, start_ranks, sum_over_ranks, world_size

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import torch
from plumbing.errors import leave
from plumbing.ranks import *
assert start_ranks("cpu", minutes=1) == "cpu" and world_size() == 3
a, b = torch.full((2, 2), float(rank())), torch.tensor([1.0, 10.0 * rank()])
sum_over_ranks(a, b)
assert a.eq(3).all() and b.tolist() == [3, 30]
sum_over_ranks(a)
assert a.eq(9).all()
assert gather(torch.tensor([[rank()]]), 1).tolist() == [[0, 1, 2]]
assert agree(f"of rank {rank()}") == "of rank 0"
print0("once")
end_ranks()
leave(0)
"""


def test_three_ranks(tmp_path):
    (tmp_path / "ranks.py").write_text(CODE)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3",
                           tmp_path / "ranks.py"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "once\n"


def test_one_process_has_nothing_to_say():
    tensor = torch.ones(2)
    sum_over_ranks(tensor)
    assert (start_ranks("cpu"), rank(), world_size(), agree(7)) == ("cpu", 0, 1, 7)
    assert tensor.tolist() == [1, 1] and gather(tensor, 0) is tensor


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize("changes, words", [
    *[({name: ""}, f"WORLD_SIZE=2, but {name} not as torchrun") for name in TORCHRUN if name != "WORLD_SIZE"],
    ({"RANK": "x"}, "RANK not as"), ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two, but WORLD_SIZE not as"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0, but WORLD_SIZE not as"),
])
def test_a_world_that_torchrun_did_not_make_is_one_line(monkeypatch, changes, words):
    for name, value in (TORCHRUN | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{words}.*by torchrun, or unset WORLD_SIZE$"):
        start_ranks("cpu")


def test_a_timeout_beyond_all_bounds_is_one_line(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--timeout 1e\\+300: at most"):
        start_ranks("cpu", 1e300)


def test_an_empty_world_size_is_none(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    assert start_ranks("cpu") == "cpu" and world_size() == 1
