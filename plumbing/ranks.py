"""plumbing/ranks.py: several processes as one, started by torchrun. With one, each call does nothing.

A lesson says what is summed or gathered, and no autograd passes through a collective.
"""
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from plumbing.errors import check, say, torchrun_number


def start_ranks(device: str | None = None, minutes: float = 30) -> str | None:
    """Join the others, if torchrun started any: one GPU each, or gloo on CPUs -> the device to use.

    minutes: after so long without an answer, a rank counts as lost.
    """
    if (os.environ.get("WORLD_SIZE") or "1") == "1":
        return device
    check_environment()
    check(minutes <= 10**6, f"--timeout {minutes:g}: at most 1,000,000 minutes")
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if on_gpu:
        gpu, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        check(gpu < gpus, f"rank {os.environ['RANK']}: there are {gpus} GPUs here: --nproc-per-node {gpus}")
        device = f"cuda:{gpu}"
        torch.cuda.set_device(device)
        # A lost rank raises where it is waited for; NCCL's own watchdog would abort the process. The price
        # is that the host waits for each collective.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=minutes))
    return device


def check_environment() -> None:
    """Refuse a WORLD_SIZE that is not torchrun's: the other ranks would be waited for in vain."""
    bad = [] if os.environ.get("MASTER_ADDR") else ["MASTER_ADDR"]
    for name, least in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0), ("MASTER_PORT", 1)):
        if torchrun_number(name, -1) < least:
            bad.append(name)
    check(not bad,
          f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but {', '.join(bad)} not as torchrun sets it: start "
          "this by torchrun, or unset WORLD_SIZE")


def end_ranks() -> None:
    """Leave together: a rank that ends early looks lost to the others."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(*tensors: torch.Tensor) -> None:
    """Add up each tensor over the ranks, in place and in one message. All are of one dtype and device."""
    if world_size() == 1:
        return
    if len(tensors) == 1:
        dist.all_reduce(tensors[0])
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts):
        tensor.copy_(part.view_as(tensor))


def gather(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The ranks' tensors, all of one shape, side by side along `dim`."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts, dim)


def agree(value):
    """Rank 0's value, on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def print0(line: str = "") -> None:
    """Print a line once, not once a rank."""
    if rank() == 0:
        say(line)
