"""evaluate.py: a model -> its scores on eight kinds of task: MTEB's seven and bitext mining (2401.00368).

    python evaluate.py models/smollm2-135m-l6 runs/demo --names base trained --pooling weighted-mean \\
        --max-length 96 --out results/mine.json                     # on the tasks of data/mini
    torchrun --nproc_per_node 8 evaluate.py runs/full --tasks data/mteb --benchmark eng-v1 --cache cache/full

A task is a folder: task.json (name, kind, metric, prompt, split) and JSON lines, laid out by kind:

    sts                  sentence1, sentence2, score
    pair-classification  sentence1, sentence2, label (1: same)
    bitext               sentence1, sentence2: line i of one side translates line i of the other
    classification       text, label, in train.jsonl and SPLIT.jsonl
    clustering           one set a line: sentences [..], labels [..]
    summarization        human_summaries [..], machine_summaries [..], relevance [..]
    reranking            query (or a list of them: the best counts), positive [..], negative [..]
    retrieval            corpus.jsonl (_id, title, text), queries.jsonl (_id, text), qrels/SPLIT.tsv

`prompt` is the task's instruction; a row's own overrides it. The output is a table of scores times 100, and
JSON with --out.

Read it in this order: who gets the instruction, how texts become vectors and which are normalised, one
function for each kind of task, the loop over tasks and models, the flags. The rest is in plumbing/:
metrics.py has the formulas (logistic.py and kmeans.py what is fitted), tasks.py reads and checks the files,
blocks.py embeds millions of texts (each once, with progress, shared among ranks), cache.py keeps vectors on
disk and finished.py scores, table.py has the published scores and prints.
"""
import argparse
import itertools
import math
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import Embedder
from plumbing import metrics
from plumbing.blocks import BlockEncoder
from plumbing.cache import DTYPES, VectorCache, probe, settings_of
from plumbing.checkpoint import find_model, vector_size
from plumbing.errors import Parser, at_least_0, check, command, positive
from plumbing.files import check_out, write_json
from plumbing.finished import ScoreLog
from plumbing.kmeans import kmeans
from plumbing.logistic import logistic_regression
from plumbing.ranks import end_ranks, print0, rank, start_ranks, world_size
from plumbing.table import (averages, missing_parts, only_of_benchmark, print_estimate, print_score,
                            print_table, read_benchmark, read_recorded)
from plumbing.tasks import (CATEGORIES, check_ids, check_task, document_text, find_tasks, look_up_ids,
                            read_distinct, read_queries, read_reranking, read_test, read_train_and_test)

TOP_K = 1000                          # documents kept for each query, as in mteb
BOOTSTRAP = 16384                     # documents of a k-means of MTEB's newer clustering tasks
EXPERIMENTS = 10                      # logistic regressions of a classification task, as in mteb


# ------------------------------------------------------------------------------ who gets the instruction

# How the released model was scored, which is the default here:
#
#   kind                 instruction on           vectors         metric
#   sts                  both sentences           unit length     cosine_spearman
#   pair-classification  both sentences           unit length     max_ap
#   bitext               both sentences           unit length     f1
#   classification       every text               as they come    accuracy
#   clustering           every text               unit length     v_measure
#   summarization        every summary            unit length     cosine_spearman
#   reranking            queries, candidates      unit length     map
#   retrieval            queries                  unit length     ndcg_at_10
#
# In reranking and retrieval one side searches the other; only retrieval's documents stay bare. In the six
# other kinds each text counts as a query, and gets the instruction unless --instruct is none.

INSTRUCTED = {                        # --instruct -> the sides that get the task's instruction
    "released": {"query", "candidate"},
    "queries": {"query"},
    "both": {"query", "candidate", "document"},              # all three, whichever two a task has
    "none": set(),
}


def side(key: str) -> str:
    """The side of the texts under a row's key.

    Two keys are special: "document", of retrieval's rows, and "candidates", of reranking's.
    """
    if key == "document":
        return "document"
    if key == "candidates":
        return "candidate"
    return "query"


def texts_of(row: dict, key: str) -> list[str]:
    """The texts under a row's key, which holds one or a list."""
    if isinstance(row[key], str):
        return [row[key]]
    return row[key]


def by_row(vectors: torch.Tensor, rows: list[dict], key: str):
    """The vectors of all texts under a key [n, D] -> those of each row."""
    sizes = [len(texts_of(row, key)) for row in rows]
    return vectors.split(sizes)


def with_instruction(task: dict, row: dict, key: str, instruct: str) -> list[tuple[str, str]]:
    """(instruction, text) of each text under a row's key.

    >>> task, row = {"prompt": "Find the answer"}, {"query": "Why?", "candidates": ["So.", "No."]}
    >>> with_instruction(task, row, "query", "queries")
    [('Find the answer', 'Why?')]
    >>> with_instruction(task, row, "candidates", "queries")
    [('', 'So.'), ('', 'No.')]
    """
    instruction = ""                                         # which leaves the text bare
    if side(key) in INSTRUCTED[instruct]:
        instruction = row.get("prompt")
        if instruction is None:
            instruction = task["prompt"]
    return [(instruction, text) for text in texts_of(row, key)]


# -------------------------------------------------------------------------------------- texts -> vectors

def is_normalized(kind: str, normalize: str) -> bool:
    """Whether vectors are divided by their length. For classification the released model's were not."""
    if normalize == "released":
        return kind != "classification"
    return normalize == "always"


def is_quantized(kind: str, key: str) -> bool:
    """Whether --quantize applies: to all texts but the queries of retrieval and reranking, which no store
    ever holds."""
    searches = kind in ("retrieval", "reranking") and side(key) == "query"
    return not searches


class Encoder:
    """Texts -> vectors, as an evaluation needs them. At its core it is

        vectors = embedder.encode(texts, instructions, normalize=False)
        vectors = F.normalize(vectors[:, :dim], dim=1)

    The texts may be millions, so a BlockEncoder stands in for the embedder.

    dim, quantize: what is stored of a vector; by default all of it. identity: tells the model from others.
    """

    def __init__(self, embedder, args, cache=None, dim=0, quantize="none", identity=""):
        self.device, self.args, self.identity = embedder.device, args, identity
        self.blocks = BlockEncoder(embedder, cache, args.batch_tokens)
        self.dim, self.quantize = dim, quantize
        self.rank, self.world = rank(), world_size()

    def embed(self, task: dict, rows: list[dict], *keys: str, label="", alone=False) -> list[torch.Tensor]:
        """The vectors of the texts under each key, in the order of the rows and their lists: [n, D] a key.

        The ranks share the work, and each gets all vectors. alone: this rank embeds all of these texts, and
        the others may be busy with theirs. label: names the work in lines of progress.
        """
        pairs, sizes = [], []                                # of all keys, one after the other
        for key in keys:
            of_key = []
            for row in rows:
                of_key += with_instruction(task, row, key, self.args.instruct)
            pairs += of_key
            sizes.append(len(of_key))
        vectors = self.blocks.encode(pairs, label or task["name"], alone)            # [sum of sizes, D]
        if self.dim:
            vectors = vectors[:, :self.dim]                  # Matryoshka: truncated before it is normalised
        if is_normalized(task["kind"], self.args.normalize):
            vectors = F.normalize(vectors, dim=1)
        columns = []
        for key, column in zip(keys, vectors.split(sizes)):
            if is_quantized(task["kind"], key):
                column = metrics.quantize(column, self.quantize)
            columns.append(column)
        return columns


# -------------------------------------------------------------------------------------- vectors -> scores
# One function for each kind: (task, encoder) -> {metric: score}. Each reads rows, embeds them, compares.
# `embed` returns a list with the vectors of each key; [vectors] = takes them from a list of one.

def score_sts(task, encoder):
    """Spearman's correlation of the pairs' cosines with their gold scores."""
    rows = read_test(task)
    a, b = encoder.embed(task, rows, "sentence1", "sentence2")           # [n, D] each
    cosines = metrics.paired_cosine(a.numpy(), b.numpy())                # [n]
    gold = [row["score"] for row in rows]
    return {"cosine_spearman": metrics.spearman(gold, cosines)}


def score_pair_classification(task, encoder):
    """Average precision: pairs that mean the same should lie closer than the others."""
    rows = read_test(task)
    a, b = encoder.embed(task, rows, "sentence1", "sentence2")
    labels = [row["label"] for row in rows]
    return metrics.pair_average_precisions(a.numpy(), b.numpy(), labels)


def score_bitext(task, encoder):
    """F1 of taking the nearest sentence of the other side for the translation, which is in the same row."""
    rows = read_test(task)
    a, b = encoder.embed(task, rows, "sentence1", "sentence2")
    nearest = metrics.nearest(a, b)                                      # [n] numbers of rows of b
    gold = np.arange(len(rows))
    return {"f1": metrics.weighted_f1(gold, nearest), "accuracy": float(np.mean(nearest == gold))}


def score_classification(task, encoder):
    """Accuracy of ten logistic regressions, each on a few samples a label, tested on the whole split."""
    train, test = read_train_and_test(task)
    labels = [row["label"] for row in train]
    # a list of row numbers for each experiment; no other training row is embedded
    samples = metrics.sample_per_label(labels, task["samples_per_label"], EXPERIMENTS)
    drawn = sorted(set(sum(samples, [])))
    [vectors] = encoder.embed(task, [train[number] for number in drawn] + test, "text")
    vectors = vectors.numpy()
    vector_of = dict(zip(drawn, vectors))                                # row number of train -> [D]
    test_vectors = vectors[len(drawn):]                                  # [test, D]
    gold = [row["label"] for row in test]
    accuracies = []
    for sample in samples:
        sample_labels = [labels[number] for number in sample]
        sample_vectors = np.stack([vector_of[number] for number in sample])          # [sample, D]
        predicted = logistic_regression(sample_vectors, sample_labels, test_vectors)
        correct = sum(p == g for p, g in zip(predicted, gold))
        accuracies.append(correct / len(gold))
    return {"accuracy": float(np.mean(accuracies)), "accuracies": accuracies}


def score_clustering(task, encoder):
    """V-measure of k-means with as many clusters as there are labels, mean over the sets."""
    if task.get("bootstraps"):
        return score_bootstrapped_clustering(task, encoder)
    scores = []
    for row in read_test(task):
        labels = row["labels"]
        clusters = len(set(labels))
        if clusters == 1:
            scores.append(1.0)                                           # by definition, as in mteb
            continue
        [vectors] = encoder.embed(task, [row], "sentences")
        groups = kmeans(vectors.numpy(), clusters)               # [sentences] cluster numbers
        scores.append(metrics.v_measure(labels, groups))
    return {"v_measure": float(np.mean(scores)), "v_measures": scores}


def score_bootstrapped_clustering(task, encoder):
    """The same as MTEB's newer tasks have it: a share of all documents, on which each k-means draws anew.

    task.json says how many `bootstraps`, which `sampled_share` is embedded, and whether labels have
    `levels`, as cs.AI, each of which is clustered for itself.
    """
    sentences, labels = [], []
    for row in read_test(task):
        sentences += row["sentences"]
        labels += row["labels"]
    draw = random.Random(42)                                             # one for all draws, in mteb's order
    numbers = range(len(sentences))
    if "sampled_share" in task:
        numbers = draw.sample(numbers, int(task["sampled_share"] * len(sentences)))
    [vectors] = encoder.embed(task, [{"sentences": [sentences[number] for number in numbers]}], "sentences")
    vectors = vectors.numpy()                                            # [numbers, D]
    scores = []
    for level in metrics.label_levels([labels[number] for number in numbers], task.get("levels")):
        for _ in range(task["bootstraps"]):
            drawn = draw.choices(range(len(level)), k=BOOTSTRAP)         # with replacement
            drawn_labels = [level[i] for i in drawn]
            groups = kmeans(vectors[drawn], len(set(level)), batch=512)
            scores.append(metrics.v_measure(drawn_labels, groups))
    return {"v_measure": float(np.mean(scores)), "v_measures": scores}


def score_summarization(task, encoder):
    """Spearman of the machine summaries' scores with their ratings, mean over the texts.

    The score of a machine summary is its highest cosine to a human summary of the same text.
    """
    rows = read_test(task)
    human, machine = encoder.embed(task, rows, "human_summaries", "machine_summaries")
    human = F.normalize(human, dim=1)        # again: --normalize never and --quantize leave other lengths
    machine = F.normalize(machine, dim=1)
    human = by_row(human, rows, "human_summaries")
    machine = by_row(machine, rows, "machine_summaries")
    correlations, p_values = [], []
    for row, humans, machines in zip(rows, human, machine):              # [h, D] and [m, D]
        # One summary at a time: a batched product rounds equal rows differently and loses their ties.
        scores = [float((summary[None] @ humans.T).max()) for summary in machines]
        if len(set(scores)) == 1 or len(set(row["relevance"])) == 1:
            continue                                                     # no ranking to compare: as in mteb
        rho = metrics.spearman(row["relevance"], scores)
        correlations.append(rho)
        p_values.append(metrics.spearman_p_value(rho, len(scores)))
    skipped = len(rows) - len(correlations)
    if skipped == len(rows):
        correlations, p_values = [math.nan], [math.nan]
    # mteb's first SummEval takes the mean of one list of the correlations and their p-values, and so do all
    # published scores of that task; see mteb's issue 1156.
    both = correlations + p_values                                       # a longer list, no sum
    return {"cosine_spearman": float(np.mean(correlations)),
            "cosine_spearman_with_p_values": float(np.mean(both)),
            "skipped": skipped}


def score_reranking(task, encoder):
    """Mean average precision over the rows that have both kinds of candidates."""
    rows, skipped = read_reranking(task)
    queries, candidates = encoder.embed(task, rows, "query", "candidates")
    queries = F.normalize(queries, dim=1)    # again: --normalize never and --quantize leave other lengths
    candidates = F.normalize(candidates, dim=1)
    queries = by_row(queries, rows, "query")
    candidates = by_row(candidates, rows, "candidates")
    average_precisions = []
    for row, row_queries, row_candidates in zip(rows, queries, candidates):
        cosines = row_queries @ row_candidates.T                         # [q, c]: q is 1, or a list's length
        best = cosines.max(0).values.tolist()                            # of several queries the best counts
        precision = metrics.reranked_average_precision(best, len(row["positive"]))
        average_precisions.append(precision)
    score = sum(average_precisions) / len(average_precisions)
    return {"map": rounded(score), "skipped": skipped}


def score_retrieval(task, encoder):
    """nDCG@10 of the documents nearest to each query by cosine, as in Table 1."""
    queries, qrels = read_queries(task)                                  # qrels: query id -> {id: grade}
    runs, unknown, repeated = search_corpus(task, encoder, queries, qrels)
    ndcg, reciprocal_rank, recall, average_precision = [], [], [], []
    for row, run in zip(queries, runs):
        if task.get("ignore_identical_ids"):
            run.pop(row["_id"], None)
        for document in row.get("excluded_ids") or ():                   # what the question was made from
            run.pop(document, None)
        ranking = metrics.trec_ranking(run)                              # ids, the best first
        relevance = qrels[row["_id"]]                                    # id -> grade
        ndcg.append(metrics.ndcg(relevance, ranking, 10))
        reciprocal_rank.append(metrics.reciprocal_rank(relevance, ranking, 10))
        recall.append(metrics.recall(relevance, ranking, 100))
        average_precision.append(metrics.ranked_average_precision(relevance, ranking))
    # As in mteb, a judged query that is missing is skipped, but a judged document that is missing counts as
    # one that was not retrieved.
    return {"ndcg_at_10": rounded(sum(ndcg) / len(queries)),
            "mrr_at_10": sum(reciprocal_rank) / len(queries),                # which mteb does not round
            "recall_at_100": rounded(sum(recall) / len(queries)),
            "map_at_1000": rounded(sum(average_precision) / len(queries)),
            "skipped": len(qrels) - len(queries),
            "unknown": len(unknown),
            "repeated": repeated}


def rounded(score: float) -> float:
    """As mteb rounds the scores of retrieval and reranking."""
    return round(score, 5)


def search_corpus(task, encoder, queries: list[dict], qrels: dict) -> tuple[list[dict], set[str], int]:
    """({document id: cosine} of the TOP_K best documents of each query, the judged ids that no document has,
    the number of documents that repeat another).

    Ten million documents pass in bounded memory: the corpus is read chunk by chunk, a chunk's vectors are
    compared with all queries and dropped, and each query keeps the TOP_K best documents so far, by their row
    number in the corpus. Numbers become ids at the end, when the corpus is read once more.
    """
    corpus = task["folder"] / "corpus.jsonl"
    size, repeated = check_ids(corpus)
    [query_vectors] = encoder.embed(task, queries, "text")
    query_vectors = query_vectors.to(encoder.device)                     # [Q, D]
    documents = read_distinct(corpus, repeated)
    size -= len(repeated)
    chunks = embed_corpus(task, encoder, documents, size)                # a generator: not yet embedded
    # search divides by the vectors' lengths, and joins what the ranks found
    scores, numbers = metrics.search(query_vectors, chunks, TOP_K, binary=encoder.quantize == "binary")
    judged = {document for row in queries for document in qrels[row["_id"]]}
    ids, unknown = look_up_ids(corpus, repeated, set(numbers.unique().tolist()), judged)     # number -> id
    runs = []
    for row_scores, row_numbers in zip(scores.tolist(), numbers.tolist()):           # TOP_K each
        run = {ids[n]: score for n, score in zip(row_numbers, row_scores) if n >= 0}     # -1: no document
        runs.append(run)
    return runs, unknown, len(repeated)


def embed_corpus(task, encoder, corpus, size: int):
    """For each of this rank's chunks, yield (row number of its first document, its vectors [n, D])."""
    share = math.ceil(size / encoder.world)
    chunk = min(encoder.args.corpus_chunk, share)                        # so that each rank has work
    for number, (first, rows) in enumerate(metrics.in_chunks(corpus, chunk)):
        if number % encoder.world != encoder.rank:
            continue
        documents = [{"document": document_text(row)} for row in rows]
        label = f"{task['name']}, documents from {first:,} of {size:,}"
        [vectors] = encoder.embed(task, documents, "document", label=label, alone=True)
        yield first, vectors.to(encoder.device)


KINDS = {
    "sts": score_sts,
    "pair-classification": score_pair_classification,
    "bitext": score_bitext,
    "classification": score_classification,
    "clustering": score_clustering,
    "summarization": score_summarization,
    "reranking": score_reranking,
    "retrieval": score_retrieval,
}


# ---------------------------------------------------------------------------------------- tasks and models

def score_task(task: dict, encoder: Encoder) -> dict:
    """{"main_score", what the kind's function gives, "texts", "cut", "seconds"}; None: an undefined score.

    cut: how many of the texts were longer than --max-length.
    """
    start = time.time()
    score_kind = KINDS[task["kind"]]
    scores = score_kind(task, encoder)
    for name, value in scores.items():
        if isinstance(value, float) and math.isnan(value):
            scores[name] = None                                          # JSON has no NaN
    texts, truncated = encoder.blocks.take_counts()
    seconds = round(time.time() - start, 1)
    main_score = scores[task["metric"]]
    scores = {"main_score": main_score, **scores, "texts": texts, "cut": truncated, "seconds": seconds}
    print_score(task["name"], task["metric"], scores, encoder.args.max_length)
    return scores


def score_or_reuse(task: dict, encoder: Encoder, log: ScoreLog, model: str) -> dict:
    """A task's scores: from the log, if this model has them with these settings; else made and logged."""
    args = encoder.args
    stored = [encoder.dim, encoder.quantize, args.cache_dtype]
    key = log.key(task, [encoder.identity, args.instruct, args.normalize, *stored])
    scores = log.get(key)
    if scores:
        print_score(task["name"], task["metric"], scores, args.max_length, before=True)
        return scores
    scores = score_task(task, encoder)
    log.put(key, model, task["name"], scores)
    return scores


def evaluate(encoder: Encoder, tasks: list[dict], benchmark=None, log=ScoreLog(), model="") -> dict:
    """Score one model: {"average", "categories", "tasks", "details", "missing"}.

    A benchmark's task may have parts (languages, sub-forums). If one is missing, the task gets no score, as
    in MTEB.
    """
    details = {task["name"]: score_or_reuse(task, encoder, log, model) for task in tasks}
    scores = {name: detail["main_score"] for name, detail in details.items()}
    missing = []
    if benchmark:
        missing, incomplete = missing_parts(benchmark, details)
        scores |= dict.fromkeys(incomplete)                              # None
    categories = {task["name"]: CATEGORIES[task["kind"]] for task in tasks}
    return {**averages(scores, categories), "details": details, "missing": missing}


def score_model(embedder, name: str, args, tasks, benchmark=None, log=ScoreLog()) -> dict[str, dict]:
    """Score one model in all combinations of --dim and --quantize -> {its name and the combination: result}.

    With a cache, its texts are embedded for the first of them alone.
    """
    identity, size, bytes_per_second = probe(embedder, settings_of(embedder, args))
    print_estimate(tasks, bytes_per_second * world_size())
    cache = VectorCache(args.cache, identity, args.cache_dtype) if args.cache else None
    results = {}
    for dim, quantize in itertools.product(args.dim, args.quantize):
        encoder = Encoder(embedder, args, cache, dim, quantize, identity)
        result = evaluate(encoder, tasks, benchmark, log, name)
        result["bytes_per_vector"] = metrics.bytes_per_vector(dim or size, quantize)
        label = name
        if dim:
            label += f" {dim}"
        if quantize != "none":
            label += f" {quantize}"
        results[label] = result
    return results


def score_models(args, tasks: list[dict], benchmark: dict | None) -> dict[str, dict]:
    """The results of all models. --out is written after each, and a log beside it after each task."""
    log = ScoreLog(args.out.with_suffix(".tasks.jsonl") if args.out else None)
    results = {}
    for model, name in zip(args.models, args.names):
        print0(f"{name}: {model}")
        embedder = Embedder.load(model, device=args.device, dtype=args.dtype, max_length=args.max_length,
                                 pooling=args.pooling)
        embedder.compile(args.compile)
        results |= score_model(embedder, name, args, tasks, benchmark, log)
        if args.out and rank() == 0:
            write_json(args.out, results)
    return results


# ---------------------------------------------------------------------------------------------- the flags

def options(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    # what goes in, what comes out
    add("models", nargs="+", help="run folders or Hugging Face folders")
    add("--names", nargs="+", help="what to call them (default: the folders' names)")
    add("--tasks", nargs="+", default=["data/mini"], help="task folders, or folders that hold some")
    add("--benchmark", help="a list in prompts/tasks.json, as eng-v1: shows published scores, missing tasks")
    add("--beside", type=Path, metavar="FILE",
        help="recorded scores of other systems on the same tasks (tools/study/peers.py), for the table")
    add("--out", type=Path,
        help="write the scores as JSON. A log beside it, .tasks.jsonl, has each task's once it is done: the "
             "same command goes on from there")
    # how texts become vectors
    add("--max-length", type=positive(int), default=512, help="tokens of a text, BOS and EOS included")
    add("--pooling", help="last, mean or weighted-mean (default: as the run was trained)")
    add("--instruct", default="released", choices=INSTRUCTED,
        help="who gets the instruction. released: all texts but retrieval's documents; queries: all but "
             "those and reranking's candidates; both: all; none: none")
    add("--normalize", default="released", choices=("released", "always", "never"),
        help="which vectors get length 1. released: those of all kinds but classification")
    add("--dim", type=at_least_0(int), nargs="+", default=[0],
        help="keep the first so many values of a vector (0: all)")
    add("--quantize", nargs="+", default=["none"], choices=("none", "int8", "binary"),
        help="how documents are stored; queries of retrieval and reranking stay whole. Several values here "
             "or in --dim: each model is scored in every combination")
    # the machine
    add("--device")
    add("--dtype", choices=("float32", "bfloat16", "float16"))
    add("--compile", action=argparse.BooleanOptionalAction, help="each block (default: on CUDA)")
    add("--batch-tokens", type=positive(int),
        help="tokens of a forward pass (default: 4096 on a CPU, 16384 on a GPU)")
    add("--corpus-chunk", type=positive(int), default=8192, help="documents held at a time")
    add("--cache", type=Path,
        help="keep vectors in this folder; a rerun goes on where the last one stopped. With 4,096 values a "
             "million texts take 16 GB, and eng-v1, 34 million, 550 GB")
    add("--cache-dtype", default="float32", choices=DTYPES,
        help="float16: half of that. Rounding moves scores by some 0.3 points, k-means by up to 2")
    args = parser.parse_args(argv)
    args.names = args.names or [Path(model).name for model in args.models]
    check(len(args.models) == len(args.names) == len(set(args.names)),
          f"--names: {len(args.models)} models need as many different names")
    return args


def main(argv=None):
    args = options(argv)
    # A rank that is done with its documents waits for the others, however long those take.
    args.device = start_ranks(args.device, minutes=24 * 60)
    tasks = find_tasks(args.tasks)
    benchmark = read_benchmark(args.benchmark) if args.benchmark else None
    if benchmark:
        tasks = only_of_benchmark(tasks, benchmark, args.benchmark)
    for model in args.models:                                # a wrong path shows now, not after an hour
        folder, _ = find_model(model)
        size = vector_size(folder)
        check(size is None or max(args.dim) <= size,
              f"--dim {max(args.dim)}: {model}'s vectors hold {size} values")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        check_out(args.out)
    for task in tasks:                                       # and a bad row of the last task shows now
        check_task(task)
    recorded = read_recorded(args.beside, tasks)
    with tempfile.TemporaryDirectory() as scratch:
        if len(args.dim) * len(args.quantize) > 1 and not args.cache:
            args.cache = Path(scratch)                       # a model embeds once for all combinations
        results = score_models(args, tasks, benchmark)
    print0()
    print_table(results, benchmark, recorded)
    for note in sorted({task["note"] for task in tasks if "note" in task}):
        print0(note)
    end_ranks()


if __name__ == "__main__":
    command(main)
