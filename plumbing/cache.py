"""plumbing/cache.py: vectors on disk, so that a rerun goes on where the last one stopped.

A file holds one block of texts. Its name is a hash of the model's identity, the instructions and the texts,
so a file is never out of date: whatever changes the vectors changes the name. In float32 a vector of 4,096
values takes 16 KB, and the 34 million documents of MTEB (eng, v1) 550 GB; in float16 half of that. With an
untrained model of three layers, float16 moved the scores of data/mini by 1.9 points in clustering (k-means
takes another path), 0.4 in classification, 0.3 in STS, and by less than 0.1 in the other kinds.
"""
import json
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from plumbing.errors import UserError, check
from plumbing.files import replace_file, sha256

DTYPES = {"float32": torch.float32, "float16": torch.float16}

PROBE = [f"{i}. The ferry left the harbour at {i} past seven, a little late, as it does on most mornings in "
         "winter. Why? Nobody on board could say; the captain, who has crossed this strait for thirty "
         "years, blamed the tide, the crew blamed the captain, and the tide came in." for i in range(32)]


def settings_of(embedder, args) -> str:
    """What may change the vectors of other texts than the PROBE: the flags, the tokenizer, a window.

    A stand-in for a model, as the tests have one, may lack decoder and tokenizer.
    """
    settings = f"{args.max_length} {args.pooling} {args.dtype}"
    if hasattr(embedder, "decoder"):
        settings += f"{embedder.decoder.config}{embedder.tokenizer.to_str()}"
    return settings


def probe(embedder, settings: str) -> tuple[str, int, float]:
    """Embed the PROBE -> (the model's identity, values of a vector, bytes of text embedded a second).

    The identity is a hash of the vectors to the last bit, and so of the weights, and of the settings.
    """
    embedder.encode(PROBE[:1])                                           # the first call pays for start-up
    start = time.time()
    vectors = embedder.encode(PROBE, normalize=False)
    seconds = time.time() - start
    identity = sha256(settings.encode() + vectors.numpy().tobytes())
    return identity, vectors.shape[1], len("".join(PROBE)) / seconds


class VectorCache:
    """Blocks of vectors below `folder`.

    identity: what tells a model and its settings from all others. dtype: what is stored, and so what comes
    back.
    """

    def __init__(self, folder: Path, identity: str, dtype="float32"):
        self.folder, self.dtype = Path(folder), DTYPES[dtype]
        self.identity = identity if dtype == "float32" else f"{identity} {dtype}"
        self.full = False

    def path(self, pairs: list[tuple[str, str]]) -> Path:
        key = sha256(json.dumps([self.identity, pairs]).encode())
        return self.folder / key[:2] / f"{key}.npz"

    def get(self, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, int] | None:
        """(vectors [n, D], number of truncated texts) as put for these (instruction, text) pairs, or
        None."""
        with suppress(Exception), np.load(self.path(pairs)) as file:     # absent, or damaged in many ways
            return torch.from_numpy(file["vectors"]).float(), int(file["cut"])
        return None

    def put(self, pairs: list[tuple[str, str]], vectors: torch.Tensor, truncated: int) -> torch.Tensor:
        """Store a block -> its vectors, rounded as `get` will give them back.

        A disk that is full ends no run: it goes on, and stores no more.
        """
        stored = vectors.to(self.dtype)
        check(stored.isfinite().all(),
              "--cache-dtype float16: a vector's value is beyond 65,504: take float32")

        def write(beside):
            with open(beside, "wb") as file:                             # to a name, numpy would add .npz
                np.savez(file, vectors=stored.numpy(), cut=truncated)

        if not self.full:
            try:
                replace_file(self.path(pairs), write)
            except (OSError, UserError) as error:
                self.full = True
                print(f"--cache {self.folder}: goes on without it, and stores no more vectors ({error})",
                      file=sys.stderr, flush=True)
        return stored.float()
