"""plumbing/cache.py: vectors on disk, so that a rerun goes on where the last one stopped.

A file holds one block of texts. Its name is a hash of the model's identity, the instructions and the texts, so a file
is never out of date: whatever changes the vectors changes the name.
"""
import hashlib
import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from plumbing.files import replace_file


class VectorCache:
    """Blocks of vectors below `folder`. identity: a string that tells one model and its settings from all others."""

    def __init__(self, folder: Path, identity: str):
        self.folder, self.identity = Path(folder), identity

    def path(self, pairs: list[tuple[str, str]]) -> Path:
        key = hashlib.sha256(json.dumps([self.identity, pairs]).encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.npz"

    def get(self, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, int] | None:
        """(vectors [n, D] of these (instruction, text) pairs, how many of the texts were truncated), if kept."""
        with suppress(Exception), np.load(self.path(pairs)) as file:   # absent, or damaged in one of many ways
            return torch.from_numpy(file["vectors"]), int(file["cut"])
        return None

    def put(self, pairs: list[tuple[str, str]], vectors: torch.Tensor, truncated: int) -> None:
        def write(beside):
            with open(beside, "wb") as file:                           # to a name, numpy would add .npz
                np.savez(file, vectors=vectors.numpy(), cut=truncated)

        replace_file(self.path(pairs), write)
