"""evaluate.py: a model -> its scores on MTEB's seven kinds of task and bitext mining (arXiv 2401.00368).

    python evaluate.py models/smollm2-135m-l20 runs/demo --names base trained --tasks data/mini \\
        --out results/demo.json
    torchrun --nproc_per_node 8 evaluate.py runs/full --tasks data/mteb --benchmark eng-v1 --cache cache/full

A task is a folder: task.json (name, kind, metric, prompt, split) and JSON lines, laid out by kind:

    retrieval            corpus.jsonl (_id, title, text), queries.jsonl (_id, text), qrels/SPLIT.tsv
    reranking            query (or a list of them: the best counts), positive [..], negative [..]
    sts                  sentence1, sentence2, score
    pair-classification  sentence1, sentence2, label (1: same)
    bitext               sentence1, sentence2: line i of one side translates line i of the other
    classification       text, label, in train.jsonl and SPLIT.jsonl
    clustering           one set a line: sentences [..], labels [..]
    summarization        human_summaries [..], machine_summaries [..], relevance [..]

A row's own `prompt` overrides the task's. As the released model was scored, all texts get the instruction
except retrieval's documents, and all vectors are normalised except classification's. The metrics are in
metrics.py and agree with the mteb package's on the same vectors.
"""
import argparse
import hashlib
import itertools
import json
import math
import operator
import os
import sys
import tempfile
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import metrics
from model import Embedder, UserError, command, find_model, read_json, replace_file

CATEGORIES = {                        # kind -> MTEB's name for it, in the order of the paper's Table 1
    "classification": "Classification", "clustering": "Clustering",
    "pair-classification": "PairClassification", "reranking": "Reranking", "retrieval": "Retrieval",
    "sts": "STS", "summarization": "Summarization", "bitext": "BitextMining",
}
BLOCK = 256                           # texts: the unit of progress, of the cache and of sharing among ranks
TOP_K = 1000                          # documents kept for each query, as in mteb
NUMBER, LABEL = (int, float), (int, str)
TEXTS = {"text", "query", "positive", "negative", "sentence1", "sentence2", "sentences", "human_summaries",
         "machine_summaries"}         # the keys of a row whose values are embedded


def parse_arguments(argv):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("models", nargs="+", help="run folders or Hugging Face folders")
    add("--names", nargs="+", help="what to call them (default: the folders' names)")
    add("--tasks", nargs="+", default=["data/mini"], help="task folders, or folders that hold some")
    add("--benchmark", help="a list in prompts/tasks.json, as eng-v1: shows published scores, missing tasks")
    add("--out", type=Path, help="write the scores as JSON")
    add("--max-length", type=int, default=512, help="tokens of a text, BOS and EOS included")
    add("--pooling", help="last, mean or weighted-mean (default: as the run was trained)")
    add("--device")
    add("--dtype", choices=("float32", "bfloat16", "float16"))
    add("--compile", action=argparse.BooleanOptionalAction, help="each block (default: on CUDA)")
    add("--batch-tokens", type=int, help="tokens of a forward pass (default: 4096 on a CPU, 16384 on a GPU)")
    add("--corpus-chunk", type=int, default=8192, help="documents held at a time")
    add("--instruct", default="released", choices=("released", "queries", "both", "none"),
        help="texts with the instruction: all but retrieval's documents; nor reranking's; all; none")
    add("--normalize", default="released", choices=("released", "always", "never"),
        help="unit vectors: for all kinds but classification; for all; for none")
    add("--dim", type=int, nargs="+", default=[0], help="keep the first so many values of a vector (0: all)")
    add("--quantize", nargs="+", default=["none"], choices=("none", "int8", "binary"),
        help="how documents are stored; queries of retrieval and reranking stay whole. Several values here "
             "or in --dim: each model is scored in every combination")
    add("--cache", type=Path, help="keep vectors in this folder; a rerun goes on where the last one stopped")
    args = parser.parse_args(argv)
    args.names = args.names or [Path(model).name for model in args.models]
    if len(args.names) != len(args.models) or len(set(args.names)) < len(args.names):
        raise UserError(f"--names: {len(args.models)} models need as many different names")
    if min(args.dim) < 0 or args.corpus_chunk < 1:
        raise UserError("--dim: 0 (all) or a number of values; --corpus-chunk: at least 1")
    return args


# -------------------------------------------------------------------------------------- reading tasks

def find_tasks(folders: list[str]) -> list[dict]:
    """The task.json of every task folder in or below `folders`, its `folder` added, by category and name."""
    tasks = {}
    for folder in folders:
        found = sorted(Path(folder).rglob("task.json"))
        if not found:
            raise UserError(f"{folder}: no task.json in or below it")
        for path in found:
            given = {key: value for key, value in read_json(path).items() if value is not None}
            task = {"prompt": "", "split": "test", "samples_per_label": 8, **given, "folder": path.parent}
            for key in ("name", "kind", "prompt", "split", "metric"):
                if not fits(task.get(key, ""), str) or "\0" in task.get(key, ""):
                    raise UserError(f"{path}: {key!r} must be a string, without NUL")
            if task.get("kind") not in CATEGORIES or not task.get("name"):
                raise UserError(f"{path}: needs a name and a kind, one of {', '.join(CATEGORIES)}")
            if not fits(task["samples_per_label"], int) or task["samples_per_label"] < 1:
                raise UserError(f"{path}: 'samples_per_label' must be a whole number above 0")
            other = tasks.setdefault(task["name"], task)["folder"]
            if other.resolve() != path.parent.resolve():
                raise UserError(f"{path}: {other} also calls itself {task['name']}")
            if not any(path.parent.glob("*.jsonl")):
                raise UserError(f"{path.parent}: no .jsonl file in it")
    return sorted(tasks.values(), key=lambda task: (list(CATEGORIES).index(task["kind"]), task["name"]))


def fits(value, kind) -> bool:
    """kind: a type, a list of one for a list, or a tuple of such, any of which will do; NaN, infinity: no.

    >>> fits(["a", "b"], [str]), fits(["a", 1], (str, [str])), fits([2, 0.5], [(int, float)])
    (True, False, True)
    """
    if isinstance(kind, tuple):
        return any(fits(value, one) for one in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(item, kind[0]) for item in value)
    return isinstance(value, kind) and (not isinstance(value, float) or math.isfinite(value))


def read_lines(path: Path):
    """Yield (number, line) of each line that is not blank."""
    try:
        with open(path, encoding="utf-8") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if not line.isspace())
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def read_rows(path: Path, **kinds):
    """Yield the objects of a JSON lines file; each must hold the given keys, with values that fit."""
    row, kinds = None, {**kinds, "prompt": (str, type(None))}
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
            if "\\u" in line:                        # half a surrogate pair is JSON, but no text
                json.dumps(row, ensure_ascii=False).encode()
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON in UTF-8 ({error})") from None
        for key, kind in kinds.items():
            if not isinstance(row, dict) or not fits(row.get(key), kind):
                raise UserError(f"{path}:{number}: {key!r} is missing or of the wrong type")
        yield row
    if row is None:
        raise UserError(f"{path}: empty")


def read_test(task: dict, **kinds) -> list[dict]:
    return list(read_rows(task["folder"] / f"{task['split']}.jsonl", **kinds))


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """BEIR's judgements: query id -> {document id: grade}; query-id, corpus-id, score between tabs."""
    qrels = {}
    for number, line in read_lines(path):
        try:
            query, document, grade = line.split("\t")
            qrels.setdefault(query, {})[document] = int(float(grade))
        except (ValueError, OverflowError):                          # infinity is no whole number
            if number > 1:                                           # the first line may be a header
                raise UserError(f"{path}:{number}: needs query-id, corpus-id, score between tabs") from None
    if not qrels:
        raise UserError(f"{path}: no judgements")
    return qrels


def check_ids(path: Path) -> int:
    """Read a corpus or queries once -> number of rows: all must be whole, and no two may share an _id.

    Held are 8 bytes a row, the hash of its id; where two agree, a second look tells whether the ids do.
    """
    hashes = np.fromiter((hash(row["_id"]) for row in read_rows(path, _id=str, text=str)), np.int64)
    hashes.sort()
    twice, seen = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist()), set()
    for row in read_rows(path) if twice else ():
        if row["_id"] in seen:
            raise UserError(f"{path}: two rows have the _id {row['_id']!r}: remove or rename one")
        if hash(row["_id"]) in twice:
            seen.add(row["_id"])
    return len(hashes)


# ------------------------------------------------------------------------------------- texts -> vectors

PROBE = [f"{i}. The ferry left the harbour at {i} past seven, a little late, as it does on most mornings in "
         "winter. Why? Nobody on board could say; the captain, who has crossed this strait for thirty years, "
         "blamed the tide, the crew blamed the captain, and the tide came in." for i in range(32)]


def bytes_to_embed(task: dict, args) -> int:
    """Size of a task's texts with their instructions; too high, as keys count, and equal texts twice."""
    size, instruction = 0, 0 if args.instruct == "none" else len(task["prompt"].encode())
    files = {"retrieval": ("corpus", "queries"), "classification": ("train", task["split"])}
    for name in files.get(task["kind"], (task["split"],)):
        path, labels = task["folder"] / f"{name}.jsonl", []
        part = path.stat().st_size if path.exists() else 0           # a missing file gets its line later
        sampled = task["kind"] == "classification" and name == "train"
        if part and (sampled or instruction and (name != "corpus" or args.instruct == "both")):
            for row in read_rows(path):
                texts = [value for key, value in row.items() if key in TEXTS]
                part += instruction * sum(len(text) if isinstance(text, list) else 1 for text in texts)
                labels.append(str(row.get("label")))
        if labels and sampled:                                       # ten draws of a few rows of each label
            part *= min(1, 10 * task["samples_per_label"] * len(set(labels)) / len(labels))
        size += part
    return size


class Encoder:
    """An Embedder with what a long evaluation needs: progress, a cache on disk, several processes."""

    def __init__(self, embedder, args, tasks: list[dict]):
        self.embedder, self.args = embedder, args
        self.rank, self.world = rank_and_world()
        self.dim, self.quantize = 0, "none"
        self.texts = self.cut = 0                                    # embedded so far; cut at max_length
        embedder.encode(PROBE[:1])                                   # the first call pays for start-up
        start = time.time()
        probe = embedder.encode(PROBE, normalize=False)
        rate = len("".join(PROBE)) / (time.time() - start) * self.world
        size = sum(bytes_to_embed(task, args) for task in tasks)
        say(f"  {len(tasks)} tasks, {size / 1e6:.1f} MB, at most about {size / rate / 60:.1f} minutes")
        # What names a model in the cache is what it does: its vectors of the probe, bit for bit; and what may
        # show only in longer or other texts, such as a window, or another tokenizer.
        settings = f"{args.max_length} {args.pooling} {args.dtype}"
        if isinstance(embedder, Embedder):
            settings += f"{embedder.decoder.config}{embedder.tokenizer.to_str()}"
        self.identity = hashlib.sha256(settings.encode() + probe.numpy().tobytes()).hexdigest()
        self.size = probe.shape[1]
        if max(args.dim) > self.size:
            raise UserError(f"--dim {max(args.dim)}: this model's vectors hold {self.size} values")

    def variant(self) -> tuple[str, int]:
        """What sets this run of the model apart, and the bytes of a stored vector."""
        size = self.dim or self.size
        stored = {"none": 4 * size, "int8": size + 4, "binary": math.ceil(size / 8)}[self.quantize]
        return "".join(f" {what}" for what in (self.dim, self.quantize) if what not in (0, "none")), stored

    def embed(self, task, pairs, share=True):
        """Embed each distinct (prompt, text) once, longest first -> a function: n of the pairs -> [n, D].

        share: the ranks split the blocks and exchange vectors; otherwise this rank does all of them.
        """
        pairs = sorted(set(pairs), key=lambda pair: (-len(pair[0]) - len(pair[1]), pair))
        blocks = [slice(i, i + BLOCK) for i in range(0, len(pairs), BLOCK)]
        if share:
            blocks = blocks[self.rank::self.world]
        matrix, start, shown = torch.zeros(len(pairs), self.size), time.time(), time.time()
        for done, block in enumerate(blocks):
            matrix[block] = self.block(pairs[block])
            if self.rank == 0 and time.time() - shown > 5:
                shown = time.time()
                left = (shown - start) / (done + 1) * (len(blocks) - done - 1)     # the longest come first
                print(f"  {task['name']}: {done + 1} of {len(blocks)} blocks of {BLOCK} texts, "
                      f"{shown - start:.0f} s, at most {left:.0f} s left", file=sys.stderr, flush=True)
        matrix = self.sum_over_ranks(matrix) if share else matrix    # rows of other ranks are zero here
        if not matrix.isfinite().all():
            raise UserError(f"{task['name']}: the model yields infinities or NaN; try --dtype float32")
        matrix = matrix[:, :self.dim or None]                        # Matryoshka cut, before the norm
        unit = {"always": True, "never": False}.get(self.args.normalize, task["kind"] != "classification")
        matrix = F.normalize(matrix, dim=1) if unit else matrix
        row = {pair: i for i, pair in enumerate(pairs)}
        return lambda wanted: matrix[[row[pair] for pair in wanted]]

    def block(self, pairs) -> torch.Tensor:
        """Vectors of one block, from the cache if they lie there, unnormalised: [n, D]."""
        key = hashlib.sha256(json.dumps([self.identity, pairs]).encode()).hexdigest()
        path = (self.args.cache or Path()) / key[:2] / f"{key}.npz"
        vectors = None
        if self.args.cache:
            with suppress(Exception), np.load(path) as found:        # absent, or damaged in one of many ways
                vectors, cut = torch.from_numpy(found["vectors"]), int(found["cut"])
        if vectors is None:
            prompts, texts = map(list, zip(*pairs))
            before = self.embedder.cut
            vectors = self.embedder.encode(texts, prompts, normalize=False,
                                           tokens_per_chunk=self.args.batch_tokens)
            cut = self.embedder.cut - before
            if self.args.cache:
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path.with_suffix(f".{self.rank}.tmp"), "wb") as file:
                    np.savez(file, vectors=vectors.numpy(), cut=cut)
                os.replace(file.name, path)
        self.texts, self.cut = self.texts + len(pairs), self.cut + cut
        return vectors

    def sum_over_ranks(self, matrix: torch.Tensor) -> torch.Tensor:
        if self.world == 1:
            return matrix
        matrix = matrix.to(self.embedder.device)
        dist.all_reduce(matrix)
        return matrix.cpu()


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


# ------------------------------------------------------------------------------------ vectors -> scores
# One function a kind: (task, encoder, args) -> {metric: score}.

def prompted(task: dict, row: dict, texts, args, document=False) -> list[tuple[str, str]]:
    """Put each text beside the prompt that it is embedded with. document: the side that is searched."""
    bare = {"released": ("retrieval",), "queries": ("retrieval", "reranking"), "both": ()}
    if args.instruct == "none" or (document and task["kind"] in bare[args.instruct]):
        prompt = ""
    else:
        prompt = task["prompt"] if row.get("prompt") is None else row["prompt"]
    return [(prompt, text) for text in ([texts] if isinstance(texts, str) else texts)]


def embed_columns(task, rows, encoder, args, *columns) -> list[torch.Tensor]:
    """One [n, D] for each of the columns that hold a text a row."""
    pairs = [[pair for row in rows for pair in prompted(task, row, row[column], args)] for column in columns]
    vectors = encoder.embed(task, sum(pairs, []))
    return [metrics.quantize(vectors(column), encoder.quantize) for column in pairs]


def score_sts(task, encoder, args):
    rows = read_test(task, sentence1=str, sentence2=str, score=NUMBER)
    a, b = embed_columns(task, rows, encoder, args, "sentence1", "sentence2")
    cosine = metrics.paired_cosine(a.numpy(), b.numpy())
    return {"cosine_spearman": metrics.spearman([row["score"] for row in rows], cosine)}


def score_pair_classification(task, encoder, args):
    rows = read_test(task, sentence1=str, sentence2=str, label=int)
    a, b = embed_columns(task, rows, encoder, args, "sentence1", "sentence2")
    return metrics.pair_average_precisions(a.numpy(), b.numpy(), [row["label"] for row in rows])


def score_bitext(task, encoder, args):
    rows = read_test(task, sentence1=str, sentence2=str)
    a, b = embed_columns(task, rows, encoder, args, "sentence1", "sentence2")
    found = metrics.nearest(a, b)
    gold = np.arange(len(rows))
    return {"f1": metrics.weighted_f1(gold, found), "accuracy": float(np.mean(found == gold))}


def score_classification(task, encoder, args):
    """Ten logistic regressions, each on a few samples per label, each tested on the whole split."""
    train = list(read_rows(task["folder"] / "train.jsonl", text=str, label=LABEL))
    test = read_test(task, text=str, label=LABEL)
    if len({type(row["label"]) for row in train + test}) > 1:        # 1 is never "1": all would be wrong
        raise UserError(f"{task['folder']}: labels are numbers in some rows and strings in others")
    samples = metrics.sample_per_label([row["label"] for row in train], task["samples_per_label"])
    used = sorted(set(sum(samples, [])))                             # the training rows that are embedded
    place = {row: i for i, row in enumerate(used)}
    x, = embed_columns(task, [train[row] for row in used] + test, encoder, args, "text")
    x, test_x, gold = x[:len(used)].numpy(), x[len(used):].numpy(), [row["label"] for row in test]
    accuracies = []
    for sample in samples:
        labels = [train[row]["label"] for row in sample]
        predicted = metrics.logistic_regression(x[[place[row] for row in sample]], labels, test_x)
        accuracies.append(sum(map(operator.eq, gold, predicted)) / len(gold))
    return {"accuracy": float(np.mean(accuracies)), "accuracies": accuracies}


def score_clustering(task, encoder, args):
    """V-measure of k-means with as many clusters as labels, mean over the sets."""
    found = []
    for row in read_test(task, sentences=[str], labels=([int], [str])):
        sizes = len(row["sentences"]), len(row["labels"])
        if sizes[0] != sizes[1] or not sizes[0]:
            raise UserError(f"{task['folder']}: {sizes[0]} sentences, {sizes[1]} labels")
        if len(set(row["labels"])) < 2:
            found.append(1.0)                                        # by definition, as in mteb
            continue
        vectors, = embed_columns(task, [{**row, "text": s} for s in row["sentences"]], encoder, args, "text")
        groups = metrics.kmeans(vectors.numpy(), len(set(row["labels"])))
        found.append(metrics.v_measure(row["labels"], groups))
    return {"v_measure": float(np.mean(found)), "v_measures": found}


def score_summarization(task, encoder, args):
    """Spearman of each machine summary's best cosine to a human one and its rating, mean over the texts."""
    rows = read_test(task, human_summaries=[str], machine_summaries=[str], relevance=[NUMBER])
    for row in rows:
        if not row["human_summaries"] or len(row["machine_summaries"]) != len(row["relevance"]):
            raise UserError(f"{task['folder']}: a text needs human summaries, and a rating for each other")
    sides = [[prompted(task, row, row[side], args) for row in rows]
             for side in ("human_summaries", "machine_summaries")]
    vectors = encoder.embed(task, [pair for side in sides for row in side for pair in row])
    found, p_values = [], []
    for row, human, machine in zip(rows, *sides):
        human, machine = (metrics.quantize(vectors(side), encoder.quantize) for side in (human, machine))
        human, machine = F.normalize(human, dim=1), F.normalize(machine, dim=1)
        # One summary at a time: a batched product rounds equal rows differently and loses their ties.
        predicted = [float((row[None] @ human.T).max()) for row in machine]
        if len(set(predicted)) == 1 or len(set(row["relevance"])) == 1:
            continue                                                 # no ranking to compare: as in mteb
        found.append(metrics.spearman(row["relevance"], predicted))
        p_values.append(metrics.spearman_p_value(found[-1], len(predicted)))
    # mteb's first SummEval averages the correlations together with their p-values, and so do all published
    # scores of that task; see mteb's issue 1156.
    return {"cosine_spearman": float(np.mean(found)) if found else math.nan,
            "cosine_spearman_with_p_values": float(np.mean(found + p_values)) if found else math.nan,
            "skipped": len(rows) - len(found)}


def score_reranking(task, encoder, args):
    """Mean average precision over the rows that have both kinds of candidates."""
    rows = read_test(task, query=(str, [str]), positive=[str], negative=[str])
    used = [row for row in rows if row["positive"] and row["negative"]]
    if not used or [] in [row["query"] for row in used]:
        what = "a row's query is an empty list" if used else "no row has both positive and negative texts"
        raise UserError(f"{task['folder']}: {what}")
    queries = [prompted(task, row, row["query"], args) for row in used]
    documents = [prompted(task, row, row["positive"] + row["negative"], args, document=True) for row in used]
    vectors = encoder.embed(task, [pair for row in queries + documents for pair in row])
    found = []
    for row, query, document in zip(used, queries, documents):
        query = F.normalize(vectors(query), dim=1)
        document = F.normalize(metrics.quantize(vectors(document), encoder.quantize), dim=1)
        scores = (query @ document.T).max(0).values.tolist()         # the best of several sub-queries
        found.append(metrics.reranked_average_precision(scores, len(row["positive"])))
    return {"map": round(sum(found) / len(found), 5), "skipped": len(rows) - len(used)}


def document_text(row: dict) -> str:
    """BEIR's rule: title, a space, text."""
    return f"{row.get('title') or ''} {row['text']}".strip()


def score_retrieval(task, encoder, args):
    """nDCG@10 of the best documents by cosine. The corpus passes through in chunks; see `search`."""
    qrels = read_qrels(task["folder"] / "qrels" / f"{task['split']}.tsv")
    corpus, asked = task["folder"] / "corpus.jsonl", task["folder"] / "queries.jsonl"
    check_ids(asked)
    queries = [row for row in read_rows(asked) if row["_id"] in qrels]
    if not queries:
        raise UserError(f"{asked}: none is judged in qrels/{task['split']}.tsv")
    size = check_ids(corpus)
    pairs = [prompted(task, row, row["text"], args)[0] for row in queries]
    query_vectors = encoder.embed(task, pairs)(pairs).to(encoder.embedder.device)

    def chunks():
        """(number of the first document, vectors [n, D]) of this rank's share of the corpus."""
        chunk = min(args.corpus_chunk, math.ceil(size / encoder.world))          # no rank without work
        for number, (first, rows) in enumerate(metrics.in_chunks(read_rows(corpus), chunk)):
            if number % encoder.world == encoder.rank:
                pairs = [prompted(task, {}, document_text(row), args, document=True)[0] for row in rows]
                part = {**task, "name": f"{task['name']}, documents from {first:,} of {size:,}"}
                vectors = encoder.embed(part, pairs, share=False)
                yield first, metrics.quantize(vectors(pairs).to(encoder.embedder.device), encoder.quantize)

    scores, numbers = metrics.search(query_vectors, chunks(), TOP_K, encoder.quantize == "binary")
    # Ids are looked up only now, by reading the corpus again, so that memory does not grow with it.
    wanted, ids = set(numbers.unique().tolist()), {}
    unknown = {document for row in queries for document in qrels[row["_id"]]}
    for i, row in enumerate(read_rows(corpus)):
        unknown.discard(row["_id"])
        if i in wanted:
            ids[i] = row["_id"]
    found = {"ndcg_at_10": [], "recall_at_100": [], "map_at_1000": []}
    for row, row_scores, row_numbers in zip(queries, scores, numbers):
        run = {ids[n]: score for n, score in zip(row_numbers.tolist(), row_scores.tolist()) if n >= 0}
        if task.get("ignore_identical_ids"):
            run.pop(row["_id"], None)
        ranking, relevance = metrics.trec_ranking(run), qrels[row["_id"]]
        found["ndcg_at_10"].append(metrics.ndcg(relevance, ranking, 10))
        found["recall_at_100"].append(metrics.recall(relevance, ranking, 100))
        found["map_at_1000"].append(metrics.ranked_average_precision(relevance, ranking))
    means = {name: round(sum(values) / len(values), 5) for name, values in found.items()}
    # Judged queries that are not there are skipped; such documents stay in the ideal ranking, as in mteb.
    return {**means, "skipped": len(qrels) - len(queries), "unknown": len(unknown)}


SCORERS = {
    "classification": score_classification, "clustering": score_clustering, "reranking": score_reranking,
    "pair-classification": score_pair_classification, "retrieval": score_retrieval, "sts": score_sts,
    "summarization": score_summarization, "bitext": score_bitext,
}


# ------------------------------------------------------------------------------------------------ main

def evaluate(encoder: Encoder, tasks: list[dict], args, benchmark=None) -> dict:
    """Score one model: {"average", "categories", "tasks", "details", "missing"}; None: a score is undefined.

    A task of the benchmark of which some parts (languages, sub-forums) are missing has no score, as in MTEB.
    """
    details, missing = {}, []
    for task in tasks:
        start, texts, cut = time.time(), encoder.texts, encoder.cut
        scores = SCORERS[task["kind"]](task, encoder, args)
        metric = task.get("metric") or next(iter(scores))
        has = [name for name, score in scores.items() if isinstance(score, float)]
        if metric not in has:
            has = f"{task['kind']} has {', '.join(has)}"
            raise UserError(f"{task['folder']}/task.json: metric {metric!r}; {has}")
        scores = {"main_score": scores[metric], **scores}
        scores = {name: score if score == score else None for name, score in scores.items()}        # not nan
        counts = encoder.sum_over_ranks(torch.tensor([encoder.texts - texts, encoder.cut - cut])).tolist()
        seconds = time.time() - start
        details[task["name"]] = {**scores, "texts": counts[0], "cut": counts[1], "seconds": round(seconds, 1)}
        notes = [f"{seconds:.0f} s"]
        for count, what in ((scores.get("skipped"), "rows or queries skipped"),
                            (scores.get("unknown"), "judged documents are not in the corpus"),
                            (counts[1], f"of {counts[0]} texts cut at {args.max_length} tokens")):
            notes += [f"{count} {what}"] if count else []
        say(f"  {task['name']}: {metric} {percent(scores['main_score'])} ({', '.join(notes)})")
    scores = {name: score["main_score"] for name, score in details.items()}
    categories = {task["name"]: CATEGORIES[task["kind"]] for task in tasks}
    for task, parts in benchmark["parts"].items() if benchmark else ():
        gone = [part for part in parts if part not in details]
        missing += gone if len(gone) < len(parts) else [task]
        scores |= {part: None for part in parts if gone and part in details}
    return {**metrics.averages(scores, categories), "details": details, "missing": missing}


def percent(score) -> str:
    return "-" if score is None else f"{100 * score:.1f}"


def print_table(results: dict[str, dict], benchmark: dict | None) -> None:
    """Models side by side, scores times 100; with a benchmark, the published scores beside them."""
    columns = {**results, **(benchmark["published"] if benchmark else {})}
    first, width = next(iter(results.values())), max(7, *map(len, columns))

    def line(label, values):
        say(f"{label:<36}" + "".join(f"  {value:>{width}}" for value in values))

    def scores(group, name):
        return [percent(column.get(group, {}).get(name)) for column in columns.values()]

    line("", columns)
    for name in first["tasks"]:
        line(name, scores("tasks", name))
    if benchmark or len(first["tasks"]) > len(first["categories"]):
        for category in first["categories"]:
            line(f"= {category}", scores("categories", category))
    # A published average is over the whole benchmark, ours over the tasks that have a score.
    counts = [sum(score is not None for score in column["tasks"].values()) if name in results
              else len(benchmark["tasks"]) for name, column in columns.items()]
    same = len(set(counts)) == 1
    line(f"= Average of {counts[0]} tasks" if same else "= Average",
         [percent(column["average"]) for column in columns.values()])
    if not same:
        line("  of so many tasks", counts)
    if len(results) > 1:
        line("Bytes a vector", [column.get("bytes_per_vector", "") for column in columns.values()])
    for name, column in results.items():
        undefined = [task for task, score in column["tasks"].items() if score is None]
        if undefined:
            say(f"{name}: {len(undefined)} tasks or parts undefined, in no mean: {', '.join(undefined)}")
    if first["missing"]:
        say(f"{len(first['missing'])} tasks or parts missing, in no mean: {', '.join(first['missing'])}")
    if benchmark:
        say(benchmark["about"])


def read_benchmark(name: str) -> dict:
    """A list of prompts/tasks.json: its tasks' names, their parts' names, published scores by system."""
    table = read_json(Path(__file__).parent / "prompts" / "tasks.json")
    if name not in table["benchmarks"]:
        raise UserError(f"--benchmark {name}: prompts/tasks.json has {', '.join(table['benchmarks'])}")
    benchmark = table["benchmarks"][name]
    benchmark["parts"] = {task: [f"{task}/{part}" for part in table["tasks"][task].get("parts", ())] or [task]
                          for task in benchmark["tasks"]}
    released = benchmark["published"].get("E5-mistral")
    if released:                                                     # the only system with scores by task
        released["tasks"] = {task: table["tasks"][task]["released"] for task in benchmark["tasks"]}
    return benchmark


def say(line: str) -> None:
    if rank_and_world()[0] == 0:
        print(line, flush=True)


def main(argv=None):
    args = parse_arguments(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        cuda = torch.cuda.is_available() and args.device != "cpu"
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # A rank that is done with its documents waits for the others', however long those take.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))
    tasks = find_tasks(args.tasks)
    benchmark = read_benchmark(args.benchmark) if args.benchmark else None
    if benchmark:
        named = set(sum(benchmark["parts"].values(), []))
        found, tasks = len(tasks), [task for task in tasks if task["name"] in named]
        if not tasks:
            raise UserError(f"--tasks: none of the {found} tasks found is one of {args.benchmark}'s")
        if len(tasks) < found:
            say(f"{found - len(tasks)} tasks are not of {args.benchmark}: left out")
    if len(args.dim) * len(args.quantize) > 1 and not args.cache:    # the variants share a model's vectors
        scratch = tempfile.TemporaryDirectory()
        args.cache = Path(scratch.name)
    for model in args.models:                        # what is not there is missed now, not after an hour
        find_model(model)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        if args.out.is_dir():
            raise UserError(f"--out {args.out}: a folder; name a file in it")
    results = {}
    for model, name in zip(args.models, args.names):
        say(f"{name}: {model}")
        embedder = Embedder.load(model, device=args.device, dtype=args.dtype, max_length=args.max_length,
                                 pooling=args.pooling)
        embedder.compile(args.compile)
        encoder = Encoder(embedder, args, tasks)
        for encoder.dim, encoder.quantize in itertools.product(args.dim, args.quantize):
            result = evaluate(encoder, tasks, args, benchmark)
            suffix, result["bytes_per_vector"] = encoder.variant()
            results[name + suffix] = result
        if args.out and rank_and_world()[0] == 0:
            replace_file(args.out, lambda path: path.write_text(json.dumps(results, indent=1)))
    say("")
    print_table(results, benchmark)
    for note in sorted({task["note"] for task in tasks if "note" in task}):
        say(note)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    command(main)
