"""A GPU for tests on a machine without one: tensors on `meta`, which have shapes and no numbers.

Whatever would wait for the GPU's numbers (.item(), .tolist(), .cpu(), a Python `if`) raises there by itself,
and `OneDevice` sees to it that no operation mixes tensors of two devices.
"""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)


class OneDevice(TorchDispatchMode):
    """with OneDevice(): AssertionError where an operation, copies aside, reads tensors of two devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        devices = set()
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                devices.add(value.device.type)
        assert len(devices) <= 1 or func.overloadpacket in COPIES, f"{func} of tensors on {sorted(devices)}"
        return func(*args, **(kwargs or {}))
