"""tools/eval/mteb_adapter.py: run the mteb package (2.x) on one of our models, to see its scores beside
ours.

    python -m tools.eval.mteb_adapter runs/full STSBenchmark SciFact --out results/mteb

mteb fetches the data itself. `MTEBModel` is all that its EncoderProtocol asks for; from code:

    mteb.evaluate(MTEBModel(Embedder.load("runs/full")), mteb.get_tasks(tasks=["STSBenchmark"]))
"""
import argparse
import hashlib
import sys
from pathlib import Path

import numpy as np
import torch

try:
    import mteb
    from mteb.models.model_meta import ModelMeta, ScoringFunction
    from mteb.similarity_functions import cos_sim, pairwise_cos_sim
    from mteb.types import PromptType
except ImportError as error:
    print(f"mteb_adapter.py: {error}: `pip install -r requirements-dev.txt`", file=sys.stderr)
    sys.exit(2)

from model import Embedder
from plumbing.errors import Parser, UserError, command, positive
from plumbing.files import read_json

TASKS = read_json(Path(__file__).resolve().parents[2] / "prompts" / "tasks.json")["tasks"]


class MTEBModel:
    """An Embedder as mteb sees one. Instructions and normalisation follow evaluate.py's `released` rule:
    an instruction on all texts but retrieval's documents, unit vectors for all but classification.

    revision: by default the weights and settings decide, as mteb takes a score of the same name and revision
    from its cache, however old.
    """

    def __init__(self, embedder, name="plain-e5/model", revision=None):
        self.embedder = embedder
        revision = revision or revision_of(embedder)
        self.mteb_model_meta = ModelMeta.create_empty(overwrites={
            "name": name, "revision": revision, "modalities": ["text"],
            "similarity_fn_name": ScoringFunction.COSINE})

    def encode(self, inputs, *, task_metadata, prompt_type=None, **_) -> np.ndarray:
        """mteb's batches of {"text": [..]} -> float32 [n, D]."""
        texts = [text for batch in inputs for text in batch["text"]]
        bare = prompt_type == PromptType.document and "Reranking" not in task_metadata.type
        prompt = "" if bare else instruction(task_metadata)
        return self.embedder.encode(texts, prompt, normalize="Classification" != task_metadata.type).numpy()

    def similarity(self, a, b):
        return cos_sim(a, b)

    def similarity_pairwise(self, a, b):
        return pairwise_cos_sim(a, b)


def revision_of(embedder) -> str:
    """40 digits: a hash of the weights, and of what else may change a vector."""
    if not hasattr(embedder, "decoder"):                 # a stand-in of the tests
        return "0"
    settings = [embedder.max_length, embedder.pooling, embedder.decoder.config, embedder.tokenizer.to_str()]
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in embedder.decoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:40]


def instruction(task_metadata) -> str:
    """The task's instruction: evaluate.py's, where prompts/tasks.json has the task; else mteb's own, a
    string or {"query": string}, of which STS, bitext and summaries share one a kind."""
    name = task_metadata.name
    if name.startswith("CQADupstack"):                   # each of the twelve forums is a task to mteb
        name = "CQADupstackRetrieval"
    if name in TASKS:
        return TASKS[name]["prompt"]
    prompt = task_metadata.prompt
    if isinstance(prompt, dict):
        prompt = prompt.get("query")
    shared = {"STS": "Retrieve semantically similar text.", "BitextMining": "Retrieve parallel sentences.",
              "Summarization": "Given a news summary, retrieve other semantically similar summaries"}
    return prompt or shared.get(task_metadata.type, "")


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw)
    parser.add_argument("model", help="a run folder or a Hugging Face folder")
    parser.add_argument("tasks", nargs="+", help="mteb's names of tasks")
    parser.add_argument("--out", default="results/mteb", help="folder for mteb's result files")
    parser.add_argument("--max-length", type=positive(int), default=512)
    args = parser.parse_args(argv)
    try:
        tasks = mteb.get_tasks(tasks=args.tasks)
    except KeyError as error:
        raise UserError(f"mteb: {error.args[0].removeprefix('KeyError: ')}") from None
    embedder = Embedder.load(args.model, max_length=args.max_length)
    model = MTEBModel(embedder, f"plain-e5/{Path(args.model).name}")
    results = mteb.evaluate(model, tasks, cache=mteb.ResultCache(args.out))
    for result in results.task_results:
        print(f"{result.task_name:<40} {100 * result.get_score():.2f}")


if __name__ == "__main__":
    command(main)
