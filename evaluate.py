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

A row's own `prompt` overrides the task's. The output is a table of scores times 100, and JSON with --out.

Read it in this order: who gets the instruction, which vectors are normalised, how texts become vectors, one
function for each kind of task, the loop over tasks and models. The rest is in plumbing/: metrics.py has the
formulas, tasks.py reads and checks the files, blocks.py embeds millions of texts (each once, with progress,
shared among ranks), cache.py keeps vectors on disk, table.py has the published scores and prints.
"""
import argparse
import itertools
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import Embedder
from plumbing import metrics
from plumbing.blocks import BlockEncoder
from plumbing.cache import VectorCache, probe
from plumbing.checkpoint import find_model
from plumbing.errors import Parser, at_least_0, check, command, positive
from plumbing.files import write_json
from plumbing.ranks import end_ranks, print0, rank, start_ranks, world_size
from plumbing.table import averages, missing_parts, only_of_benchmark, read_benchmark
from plumbing.table import print_score, print_table
from plumbing.tasks import CATEGORIES, check_ids, document_text, find_tasks, look_up_ids
from plumbing.tasks import read_queries, read_rows, read_test, read_train_and_test

TOP_K = 1000                          # documents kept for each query, as in mteb
DAY = 24 * 60                         # minutes


def options(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    # what goes in, what comes out
    add("models", nargs="+", help="run folders or Hugging Face folders")
    add("--names", nargs="+", help="what to call them (default: the folders' names)")
    add("--tasks", nargs="+", default=["data/mini"], help="task folders, or folders that hold some")
    add("--benchmark", help="a list in prompts/tasks.json, as eng-v1: shows published scores, missing tasks")
    add("--out", type=Path, help="write the scores as JSON")
    # how texts become vectors
    add("--max-length", type=positive(int), default=512, help="tokens of a text, BOS and EOS included")
    add("--pooling", help="last, mean or weighted-mean (default: as the run was trained)")
    add("--instruct", default="released", choices=INSTRUCTED,
        help="texts with the instruction: all but retrieval's documents; nor reranking's; all; none")
    add("--normalize", default="released", choices=("released", "always", "never"),
        help="unit vectors: for all kinds but classification; for all; for none")
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
    add("--cache", type=Path, help="keep vectors in this folder; a rerun goes on where the last one stopped")
    args = parser.parse_args(argv)
    args.names = args.names or [Path(model).name for model in args.models]
    check(len(args.models) == len(args.names) == len(set(args.names)),
          f"--names: {len(args.models)} models need as many different names")
    return args


# ------------------------------------------------------------------------------ who gets the instruction

# Retrieval has queries and documents, reranking has queries and candidates. In the six other kinds no side
# searches the other, and every text counts as a query: both sentences of a pair, all summaries, all texts to
# be classified or clustered.
INSTRUCTED = {                        # --instruct -> the sides that get the task's instruction
    "released": {"query", "candidate"},                      # as the released model was scored
    "queries": {"query"},
    "both": {"query", "candidate", "document"},
    "none": set(),
}


def side(key: str) -> str:
    """The side of the texts under a row's key. embed_corpus and score_reranking make the two special keys."""
    if key == "document":
        return "document"
    if key == "candidates":
        return "candidate"
    return "query"


def texts_of(row: dict, key: str) -> list[str]:
    """The texts under a row's key, which holds one or a list."""
    return [row[key]] if isinstance(row[key], str) else row[key]


def instructed(task: dict, row: dict, key: str, instruct: str) -> list[tuple[str, str]]:
    """(instruction, text) of each text under a row's key.

    >>> task, row = {"prompt": "Find the answer"}, {"query": "Why?", "candidates": ["So.", "No."]}
    >>> instructed(task, row, "query", "queries")
    [('Find the answer', 'Why?')]
    >>> instructed(task, row, "candidates", "queries")
    [('', 'So.'), ('', 'No.')]
    """
    prompt = ""                                              # which leaves the text bare
    if side(key) in INSTRUCTED[instruct]:
        prompt = row.get("prompt")
        if prompt is None:
            prompt = task["prompt"]
    return [(prompt, text) for text in texts_of(row, key)]


# -------------------------------------------------------------------------------------- texts -> vectors

def is_normalized(kind: str, normalize: str) -> bool:
    """Whether vectors are divided by their length. For classification the released model's were not."""
    if normalize == "released":
        return kind != "classification"
    return normalize == "always"


def is_stored(kind: str, key: str) -> bool:
    """Whether --quantize applies. A query that searches is never stored, so it stays whole."""
    searches = kind in ("retrieval", "reranking") and side(key) == "query"
    return not searches


class Encoder:
    """Texts -> vectors, as an evaluation needs them. At its core it is

        vectors = embedder.encode(texts, instructions, normalize=False)
        vectors = F.normalize(vectors[:, :dim], dim=1)

    The texts may be millions, so a BlockEncoder stands in for the embedder. dim, quantize: what is stored of
    a vector; by default all of it.
    """

    def __init__(self, embedder, args, cache: VectorCache | None = None, dim=0, quantize="none"):
        self.device, self.args = embedder.device, args
        self.blocks = BlockEncoder(embedder, cache, args.batch_tokens)
        self.dim, self.quantize = dim, quantize
        self.rank, self.world = rank(), world_size()

    def embed(self, task: dict, rows: list[dict], *keys: str, label="", alone=False) -> list[torch.Tensor]:
        """The vectors of the texts under each key, in the order of the rows and of their lists: [n, D] a key.

        label: names the work in lines of progress. alone: this rank does it all. UserError: NaN or infinity.
        """
        pairs, sizes = [], []
        for key in keys:
            column = [pair for row in rows for pair in instructed(task, row, key, self.args.instruct)]
            pairs += column
            sizes.append(len(column))
        vectors = self.blocks.encode(pairs, label or task["name"], alone)            # [sum of sizes, D]
        check(vectors.isfinite().all(),
              f"{task['name']}: the model yields infinities or NaN; try --dtype float32")
        if self.dim:
            vectors = vectors[:, :self.dim]                  # Matryoshka: truncated before it is normalised
        if is_normalized(task["kind"], self.args.normalize):
            vectors = F.normalize(vectors, dim=1)
        columns = []
        for key, column in zip(keys, vectors.split(sizes)):
            if is_stored(task["kind"], key):
                column = metrics.quantize(column, self.quantize)
            columns.append(column)
        return columns


# -------------------------------------------------------------------------------------- vectors -> scores
# One function for each kind: (task, encoder) -> {metric: score}. Each reads rows, embeds them, compares.

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
    """Accuracy of ten logistic regressions, each on a few samples a label, each tested on the whole split."""
    train, test = read_train_and_test(task)
    samples = metrics.sample_per_label([row["label"] for row in train], task["samples_per_label"])
    used = sorted(set(sum(samples, [])))                                 # no other training row is embedded
    row_of = {number: row for row, number in enumerate(used)}
    [vectors] = encoder.embed(task, [train[number] for number in used] + test, "text")
    x = vectors[:len(used)].numpy()                                      # [used, D]
    test_x = vectors[len(used):].numpy()                                 # [test, D]
    gold = [row["label"] for row in test]
    accuracies = []
    for sample in samples:
        labels = [train[number]["label"] for number in sample]
        sample_x = x[[row_of[number] for number in sample]]              # [labels * samples_per_label, D]
        predicted = metrics.logistic_regression(sample_x, labels, test_x)
        correct = sum(p == g for p, g in zip(predicted, gold))
        accuracies.append(correct / len(gold))
    return {"accuracy": float(np.mean(accuracies)), "accuracies": accuracies}


def score_clustering(task, encoder):
    """V-measure of k-means with as many clusters as there are labels, mean over the sets."""
    scores = []
    for row in read_test(task):
        labels = row["labels"]
        clusters = len(set(labels))
        if clusters == 1:
            scores.append(1.0)                                           # by definition, as in mteb
            continue
        [vectors] = encoder.embed(task, [row], "sentences")
        groups = metrics.kmeans(vectors.numpy(), clusters)               # [sentences] cluster numbers
        scores.append(metrics.v_measure(labels, groups))
    return {"v_measure": float(np.mean(scores)), "v_measures": scores}


def by_row(vectors: torch.Tensor, rows: list[dict], key: str):
    """The vectors of all texts under a key [n, D] -> those of each row."""
    return vectors.split([len(texts_of(row, key)) for row in rows])


def score_summarization(task, encoder):
    """Spearman of the machine summaries' scores with their ratings, mean over the texts.

    The score of a machine summary is its highest cosine to a human summary of the same text.
    """
    rows = read_test(task)
    human, machine = encoder.embed(task, rows, "human_summaries", "machine_summaries")
    human = by_row(F.normalize(human, dim=1), rows, "human_summaries")
    machine = by_row(F.normalize(machine, dim=1), rows, "machine_summaries")
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
    # mteb's first SummEval averages the correlations together with their p-values, and so do all published
    # scores of that task; see mteb's issue 1156.
    return {"cosine_spearman": float(np.mean(correlations)),
            "cosine_spearman_with_p_values": float(np.mean(correlations + p_values)),
            "skipped": skipped}


def score_reranking(task, encoder):
    """Mean average precision over the rows that have both kinds of candidates."""
    rows = read_test(task)
    used = [row for row in rows if row["positive"] and row["negative"]]
    check(used, f"{task['folder']}: no row has both positive and negative texts")
    used = [{**row, "candidates": row["positive"] + row["negative"]} for row in used]
    queries, candidates = encoder.embed(task, used, "query", "candidates")
    queries = by_row(F.normalize(queries, dim=1), used, "query")
    candidates = by_row(F.normalize(candidates, dim=1), used, "candidates")
    precisions = []
    for row, row_queries, row_candidates in zip(used, queries, candidates):
        cosines = row_queries @ row_candidates.T                         # [q, c]: q is 1, or a list's length
        best = cosines.max(0).values.tolist()                            # of several queries the best counts
        precisions.append(metrics.reranked_average_precision(best, len(row["positive"])))
    return {"map": round(sum(precisions) / len(precisions), 5), "skipped": len(rows) - len(used)}


def score_retrieval(task, encoder):
    """nDCG@10 of the documents nearest to each query by cosine.

    Ten million documents pass in bounded memory: the corpus is read chunk by chunk, a chunk's vectors are
    compared with all queries and dropped, and each query keeps the TOP_K best documents so far, by number.
    Numbers become ids at the end, when the corpus is read once more.
    """
    corpus = task["folder"] / "corpus.jsonl"
    queries, qrels = read_queries(task)
    size = check_ids(corpus)
    [query_vectors] = encoder.embed(task, queries, "text")
    query_vectors = query_vectors.to(encoder.device)            # [Q, D]
    chunks = embed_corpus(task, encoder, corpus, size)                   # a generator: not yet embedded
    binary = encoder.quantize == "binary"
    scores, numbers = metrics.search(query_vectors, chunks, TOP_K, binary)           # [Q, TOP_K] each

    judged = {document for row in queries for document in qrels[row["_id"]]}
    ids, unknown = look_up_ids(corpus, set(numbers.unique().tolist()), judged)
    ndcg, recall, average_precision = [], [], []
    for row, row_scores, row_numbers in zip(queries, scores.tolist(), numbers.tolist()):
        run = {ids[n]: score for n, score in zip(row_numbers, row_scores) if n >= 0}     # -1: no document
        if task.get("ignore_identical_ids"):
            run.pop(row["_id"], None)
        ranking = metrics.trec_ranking(run)                              # ids, the best first
        relevance = qrels[row["_id"]]                                    # id -> grade
        ndcg.append(metrics.ndcg(relevance, ranking, 10))
        recall.append(metrics.recall(relevance, ranking, 100))
        average_precision.append(metrics.ranked_average_precision(relevance, ranking))
    # As in mteb, a judged query that is missing is skipped, but a judged document that is missing counts as
    # one that was not retrieved.
    return {"ndcg_at_10": round(sum(ndcg) / len(queries), 5),
            "recall_at_100": round(sum(recall) / len(queries), 5),
            "map_at_1000": round(sum(average_precision) / len(queries), 5),
            "skipped": len(qrels) - len(queries),
            "unknown": len(unknown)}


def embed_corpus(task, encoder, corpus: Path, size: int):
    """Yield (number of the first document, vectors [n, D] on the device) of each chunk of this rank's."""
    share = math.ceil(size / encoder.world)
    chunk = min(encoder.args.corpus_chunk, share)                        # so that each rank has work
    for number, (first, rows) in enumerate(metrics.in_chunks(read_rows(corpus), chunk)):
        if number % encoder.world != encoder.rank:
            continue
        documents = [{"document": document_text(row)} for row in rows]
        label = f"{task['name']}, documents from {first:,} of {size:,}"
        [vectors] = encoder.embed(task, documents, "document", label=label, alone=True)
        yield first, vectors.to(encoder.device)


KINDS = {                             # kind -> its function, and its metric unless task.json names another
    "classification": (score_classification, "accuracy"),
    "clustering": (score_clustering, "v_measure"),
    "pair-classification": (score_pair_classification, "max_ap"),
    "reranking": (score_reranking, "map"),
    "retrieval": (score_retrieval, "ndcg_at_10"),
    "sts": (score_sts, "cosine_spearman"),
    "summarization": (score_summarization, "cosine_spearman"),
    "bitext": (score_bitext, "f1"),
}


# ---------------------------------------------------------------------------------------- tasks and models

def score_task(task: dict, encoder: Encoder) -> dict:
    """{"main_score", what the kind's function gives, "texts", "cut", "seconds"}; None: an undefined score."""
    start = time.time()
    score, metric = KINDS[task["kind"]]
    metric = task.get("metric") or metric
    scores = score(task, encoder)
    known = [name for name, value in scores.items() if isinstance(value, float)]
    check(metric in known,
          f"{task['folder']}/task.json: metric {metric!r}; {task['kind']} has {', '.join(known)}")
    for name in known:
        if math.isnan(scores[name]):
            scores[name] = None                                          # JSON has no NaN
    texts, truncated = encoder.blocks.take_counts()
    seconds = round(time.time() - start, 1)
    scores = {"main_score": scores[metric], **scores, "texts": texts, "cut": truncated, "seconds": seconds}
    print_score(task["name"], metric, scores, encoder.args.max_length)
    return scores


def evaluate(encoder: Encoder, tasks: list[dict], benchmark: dict | None = None) -> dict:
    """Score one model: {"average", "categories", "tasks", "details", "missing"}.

    A task of the benchmark of which some parts (languages, sub-forums) are missing has no score, as in MTEB.
    """
    details = {task["name"]: score_task(task, encoder) for task in tasks}
    scores = {name: detail["main_score"] for name, detail in details.items()}
    missing = []
    if benchmark:
        missing, incomplete = missing_parts(benchmark, details)
        scores |= dict.fromkeys(incomplete)                              # None
    categories = {task["name"]: CATEGORIES[task["kind"]] for task in tasks}
    return {**averages(scores, categories), "details": details, "missing": missing}


def score_model(embedder, name: str, args, tasks: list[dict], benchmark: dict | None) -> dict[str, dict]:
    """{the model's name and how its vectors are stored: result}, for each --dim with each --quantize."""
    # The cache knows a model by its vectors of some texts, and by what may show only in others: its settings,
    # such as a window, and its tokenizer.
    settings = f"{args.max_length} {args.pooling} {args.dtype}"
    if isinstance(embedder, Embedder):
        settings += f"{embedder.decoder.config}{embedder.tokenizer.to_str()}"
    identity, size, rate = probe(embedder, settings)
    check(max(args.dim) <= size, f"--dim {max(args.dim)}: this model's vectors hold {size} values")
    characters = sum(path.stat().st_size for task in tasks for path in task["folder"].glob("*.jsonl"))
    minutes = characters / (rate * world_size()) / 60
    print0(f"  {len(tasks)} tasks, {characters / 1e6:.1f} MB, about {minutes:.1f} minutes")
    cache = VectorCache(args.cache, identity) if args.cache else None
    results = {}
    for dim, quantize in itertools.product(args.dim, args.quantize):
        encoder = Encoder(embedder, args, cache, dim, quantize)
        result = evaluate(encoder, tasks, benchmark)
        values = dim or size
        stored_bytes = {"none": 4 * values, "int8": values + 4, "binary": math.ceil(values / 8)}
        result["bytes_per_vector"] = stored_bytes[quantize]
        label = name
        if dim:
            label += f" {dim}"
        if quantize != "none":
            label += f" {quantize}"
        results[label] = result
    return results


def score_models(args, tasks: list[dict], benchmark: dict | None) -> dict[str, dict]:
    """The results of all models; --out is written after each."""
    results = {}
    for model, name in zip(args.models, args.names):
        print0(f"{name}: {model}")
        embedder = Embedder.load(model, device=args.device, dtype=args.dtype, max_length=args.max_length,
                                 pooling=args.pooling)
        embedder.compile(args.compile)
        results |= score_model(embedder, name, args, tasks, benchmark)
        if args.out and rank() == 0:
            write_json(args.out, results)
    return results


def main(argv=None):
    args = options(argv)
    # A rank that is done with its documents waits for the others', however long those take.
    args.device = start_ranks(args.device, minutes=DAY)
    tasks = find_tasks(args.tasks)
    benchmark = read_benchmark(args.benchmark) if args.benchmark else None
    if benchmark:
        tasks = only_of_benchmark(tasks, benchmark, args.benchmark)
    for model in args.models:                                # a wrong path shows now, not after an hour
        find_model(model)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        check(not args.out.is_dir(), f"--out {args.out}: a folder; name a file in it")
    with tempfile.TemporaryDirectory() as scratch:
        if len(args.dim) * len(args.quantize) > 1 and not args.cache:
            args.cache = Path(scratch)                       # a model embeds once for all combinations
        results = score_models(args, tasks, benchmark)
    print0()
    print_table(results, benchmark)
    for note in sorted({task["note"] for task in tasks if "note" in task}):
        print0(note)
    end_ranks()


if __name__ == "__main__":
    command(main)
