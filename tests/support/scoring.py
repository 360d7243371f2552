"""Stand-ins for a model and task folders made on the spot, for the tests of evaluate.py and its plumbing."""
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import evaluate
from plumbing.cache import VectorCache
from plumbing.tasks import find_tasks

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "data" / "mini"
# Public sets as task folders, far too large to commit; the tests that know them also run without.
EVALDATA = Path(os.environ.get("PLAIN_E5_EVALDATA", ROOT.parent / "shared" / "evaldata"))


class HashEmbedder:
    """Stands in for a model: the text alone decides its vector, word by word, so equal texts tie exactly."""
    device, words, truncated = torch.device("cpu"), {}, 0

    def __init__(self, size=64):
        self.size, self.calls = size, 0

    def vector(self, text):
        total = np.full(self.size, 1e-3, np.float32)
        for word in text.lower().split():
            if (word, self.size) not in self.words:
                seed = int.from_bytes(hashlib.md5(word.encode()).digest()[:4], "little")
                values = np.random.RandomState(seed).standard_normal(self.size)
                self.words[word, self.size] = values.astype(np.float32)
            total += self.words[word, self.size]
        return total

    def compile(self, wanted=None):
        return self

    def encode(self, texts, prompt="", normalize=True, dim=None, tokens_per_chunk=0):
        self.calls += 1
        vectors = torch.from_numpy(np.stack([self.vector(text) for text in texts]))
        return F.normalize(vectors, dim=1) if normalize else vectors


class Recorder(HashEmbedder):
    """Keeps what was embedded, with which instruction."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def encode(self, texts, prompt="", **flags):
        self.seen += zip([prompt] * len(texts) if isinstance(prompt, str) else prompt, texts)
        return super().encode(texts, prompt, **flags)


class Drawn(HashEmbedder):
    """Each text has the vector that the test gives it, for scores worked by hand: {text: [x, y]}."""

    def __init__(self, vectors: dict[str, list[float]]):
        super().__init__(size=2)
        self.vectors = vectors

    def vector(self, text):
        return np.array(self.vectors.get(text, [1, 1]), np.float32)


def run(folder, *flags, embedder=None) -> dict:
    """Score the tasks of a folder with a stand-in model."""
    args = evaluate.options(["model", "--tasks", str(folder), *map(str, flags)])
    tasks = find_tasks(args.tasks)
    result, = evaluate.score_model(embedder or HashEmbedder(), "model", args, tasks, None).values()
    return result


def encoder(*flags, embedder=None, identity="") -> evaluate.Encoder:
    args = evaluate.options(["model", *map(str, flags)])
    cache = VectorCache(args.cache, identity) if args.cache else None
    return evaluate.Encoder(embedder or HashEmbedder(), args, cache, args.dim[0], args.quantize[0])


def mini_task(kind: str) -> dict:
    """The task of this kind in data/mini."""
    task, = (task for task in find_tasks([str(MINI)]) if task["kind"] == kind)
    return task


def write_task(folder: Path, task: dict, **files) -> Path:
    """Write a task folder: a file's content is text, or rows for JSON lines; qrels: text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.json").write_text(json.dumps({"name": folder.name, "split": "test", **task}))
    for name, content in files.items():
        path = folder / ("qrels/test.tsv" if name == "qrels" else f"{name}.jsonl")
        path.parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(text, encoding="utf-8")
    return folder
