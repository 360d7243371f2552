"""plumbing/metrics.py: vectors -> scores. What MTEB measures, as short pure functions of numpy and torch.

Every function shows an example small enough to check by hand, and tests/plumbing/test_metrics.py compares it
with scipy, scikit-learn or pytrec_eval on random data with ties. The procedures around them (which texts,
with which instruction) are in evaluate.py, the two that are fitted in logistic.py and kmeans.py. Vectors are
[n, d] float32 arrays; scores are floats from 0 to 1, correlations from -1 to 1, and nan where the
reference's is undefined.
"""
import math
from collections import Counter, defaultdict
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F

from plumbing.ranks import gather, world_size


# ------------------------------------------------------------------------------ STS and summarization

def average_ranks(values) -> np.ndarray:
    """Ranks from 1; equal values share the mean of the ranks that they fill.

    >>> average_ranks([0.3, 0.1, 0.3, 0.9]).tolist()
    [2.5, 1.0, 2.5, 4.0]
    """
    _, distinct, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)                              # the highest rank that each distinct value fills
    mean = last - (count - 1) / 2
    return mean[distinct]


def spearman(x, y) -> float:
    """Pearson's correlation of the ranks; nan if a side is constant or holds fewer than two values.

    >>> spearman([1, 2, 3, 4], [10, 30, 20, 40])         # 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15)
    0.8
    """
    x, y = np.asarray(x, float), np.asarray(y, float)    # of whole numbers past 64 bits, numpy makes objects
    if np.isnan(x).any() or np.isnan(y).any():
        return math.nan
    x, y = average_ranks(x), average_ranks(y)
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt((x @ x) * (y @ y))
    if norm == 0:
        return math.nan
    return float(np.clip(x @ y / norm, -1, 1))


def spearman_p_value(rho: float, n: int) -> float:
    """Two-sided p-value of a Spearman correlation of n pairs: Student's t with n - 2 degrees of freedom.

    The distribution has a finite cosine series for whole degrees (Abramowitz & Stegun 26.7.3-4).

    >>> round(spearman_p_value(0.5, 4), 12)              # two degrees of freedom: p = 1 - |rho|
    0.5
    """
    degrees = n - 2
    if degrees < 1 or math.isnan(rho):
        return math.nan
    sine = abs(rho)                                      # of the angle atan(t / sqrt(degrees))
    cosine = math.sqrt((1 + rho) * (1 - rho))
    odd = degrees % 2 == 1
    if degrees == 1:
        term = 0.0                                       # the series is empty
    elif odd:
        term = cosine
    else:
        term = 1.0
    series = term
    for i in range(3 if odd else 2, degrees - 1, 2):
        term *= (i - 1) / i * cosine * cosine
        series += term
    inside = sine * series                               # the probability of a smaller |t|
    if odd:
        inside = 2 / math.pi * (math.atan2(sine, cosine) + inside)
    return max(0.0, 1 - inside)


def paired_cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows: [n, d], [n, d] -> [n].

    Written as 1 - |a/|a| - b/|b||^2 / 2, like scikit-learn, because a dot product rounds otherwise and so
    ties other pairs; a row of zeros stays zero.

    >>> paired_cosine(np.array([[3., 0.], [0., 2.]]), np.array([[0., 1.], [0., 5.]])).tolist()
    [0.0, 1.0]
    """
    def unit(x):
        norm = np.sqrt(np.einsum("nd,nd->n", x, x))
        return x / np.where(norm == 0, 1, norm)[:, None]
    difference = unit(a) - unit(b)
    return 1 - 0.5 * np.einsum("nd,nd->n", difference, difference)


# -------------------------------------------------------------------------------- pair classification

def average_precision(labels, scores) -> float:
    """Sum over distinct thresholds of precision * the recall gained there; ties share a threshold.

    >>> average_precision([1, 0, 1, 0], [0.9, 0.8, 0.8, 0.1])        # 1/1 * 1/2 + 2/3 * 1/2
    0.8333333333333333
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    if np.isnan(scores).any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    labels, scores = labels[order], scores[order]
    drops = np.flatnonzero(scores[1:] != scores[:-1])
    ends = np.append(drops, len(scores) - 1)             # the last row of each tie
    hits = np.cumsum(labels == 1)[ends]                  # positives at or above each threshold
    if hits[-1] == 0:
        return 0.0
    gained = np.diff(hits, prepend=0) / hits[-1]         # recall, threshold by threshold
    return float(np.sum(gained * hits / (ends + 1)))


def pair_average_precisions(a: np.ndarray, b: np.ndarray, labels) -> dict[str, float]:
    """Average precision by cosine, dot product and two distances; MTEB's headline is the highest.

    >>> pair_average_precisions(np.eye(2), np.array([[1., 0.], [1., 0.]]), [1, 0])["max_ap"]
    1.0
    """
    scores = {
        "cosine_ap": average_precision(labels, paired_cosine(a, b)),
        "dot_ap": average_precision(labels, np.array([x @ y for x, y in zip(a, b)])),
        "euclidean_ap": average_precision(labels, -np.sqrt(np.einsum("nd,nd->n", a - b, a - b))),
        "manhattan_ap": average_precision(labels, -np.abs(a - b).sum(-1)),
    }
    return {"max_ap": max(scores.values()), **scores}


# ------------------------------------------------------------------------------------ stored vectors

def quantize(vectors: torch.Tensor, how: str) -> torch.Tensor:
    """What a store gives back for vectors [n, D]: "int8" has one scale a vector, "binary" only signs.

    >>> quantize(torch.tensor([[1.0, -0.3]]), "binary").tolist()
    [[1.0, -1.0]]
    >>> (quantize(torch.tensor([[1.0, -0.3]]), "int8") * 127).tolist()
    [[127.0, -38.0]]
    """
    if how == "int8":
        scale = vectors.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        return (vectors / scale).round() * scale
    if how == "binary":
        return torch.where(vectors < 0, -1.0, 1.0)
    return vectors


def bytes_per_vector(values: int, how: str) -> int:
    """What a store keeps of a vector: float32, int8 with one float32 scale, or bits.

    >>> [bytes_per_vector(4096, how) for how in ("none", "int8", "binary")]
    [16384, 4100, 512]
    """
    return {"none": 4 * values, "int8": values + 4, "binary": math.ceil(values / 8)}[how]


# ---------------------------------------------------------------------------- retrieval and reranking

def in_chunks(rows, size: int):
    """Yield (number of the first row, up to `size` rows).

    >>> list(in_chunks(iter("abc"), 2))
    [(0, ['a', 'b']), (2, ['c'])]
    """
    first, rows = 0, iter(rows)                      # of a list, islice would take the same rows for ever
    while chunk := list(islice(rows, size)):
        yield first, chunk
        first += len(chunk)


def search(queries: torch.Tensor, chunks, k: int, binary=False) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best documents of each query, over all ranks: cosines and document numbers, [Q, k] each.

    chunks yields (number of the first document, vectors [n, D]). Only the running best are kept, so memory
    is Q * k and a chunk, however large the corpus. Places that no document fills hold -inf and -1.
    binary: documents are signs; the k nearest by Hamming distance are rescored with the whole query.

    >>> scores, numbers = search(torch.eye(2), [(0, torch.eye(2)), (2, torch.tensor([[0.6, 0.8]]))], 2)
    >>> numbers.tolist()
    [[0, 2], [1, 2]]
    """
    def best(ranked_by, scores, numbers):                # the k columns that are highest in the first
        ranked_by, columns = ranked_by.topk(k, dim=1)
        return ranked_by, scores.gather(1, columns), numbers.gather(1, columns)

    queries = F.normalize(queries, dim=1)
    device = queries.device
    scores = torch.full((len(queries), k), -math.inf, device=device)
    numbers = torch.full((len(queries), k), -1, dtype=torch.long, device=device)
    ranked_by = scores.clone()                           # the cosine, or how many signs agree
    for first, documents in chunks:
        documents = F.normalize(documents, dim=1)
        new = torch.arange(first, first + len(documents), device=device)
        for part in torch.arange(len(queries), device=device).split(1024):
            cosine = queries[part] @ documents.T         # [q, n]
            agreement = cosine
            if binary:
                signs = torch.where(queries[part] < 0, -1.0, 1.0)
                agreement = signs @ documents.T
            all_agreements = torch.cat((ranked_by[part], agreement), 1)                  # [q, k + n]
            all_scores = torch.cat((scores[part], cosine), 1)
            all_numbers = torch.cat((numbers[part], new.expand(len(part), -1)), 1)
            ranked_by[part], scores[part], numbers[part] = best(all_agreements, all_scores, all_numbers)
    if world_size() > 1:                                 # each rank has seen its share of the documents
        ranked_by, scores, numbers = best(gather(ranked_by, 1), gather(scores, 1), gather(numbers, 1))
    return scores.cpu(), numbers.cpu()


def trec_ranking(scores: dict[str, float]) -> list[str]:
    """Document ids, best first, as trec_eval sorts them: by score in float32, ties by id, both descending.

    >>> trec_ranking({"a": 0.5, "c": 0.1, "b": 0.5})
    ['b', 'a', 'c']
    """
    rounded = np.array(list(scores.values()), np.float32).tolist()
    return [document for _, document in sorted(zip(rounded, scores), reverse=True)]


def ndcg(relevance: dict[str, int], ranking: list[str], k: int) -> float:
    """Discounted gain of the best k over that of the ideal ranking: gain = grade, discount = log2(rank + 1).

    >>> round(ndcg({"a": 2, "b": 1}, ["x", "a", "b"], 10), 4)        # (2/1.585 + 1/2) / (2/1 + 1/1.585)
    0.6697
    """
    def gain(grades):
        return sum(grade / math.log2(rank + 1) for rank, grade in enumerate(grades, 1))

    positive = [grade for grade in relevance.values() if grade > 0]
    ideal = gain(sorted(positive, reverse=True)[:k])
    if not ideal:
        return 0.0
    return gain(max(relevance.get(document, 0), 0) for document in ranking[:k]) / ideal


def ranked_average_precision(relevance: dict[str, int], ranking: list[str], k: int = 1000) -> float:
    """Mean, over the relevant documents, of the precision at each one's rank; 0 for those not in the best k.

    >>> ranked_average_precision({"a": 1, "b": 1}, ["a", "x", "b"])         # (1/1 + 2/3) / 2
    0.8333333333333333
    """
    relevant = sum(grade > 0 for grade in relevance.values())
    hits, total = 0, 0.0
    for rank, document in enumerate(ranking[:k], 1):
        if relevance.get(document, 0) > 0:
            hits += 1
            total += hits / rank
    return total / relevant if relevant else 0.0


def reranked_average_precision(scores: list[float], positives: int) -> float:
    """Average precision of candidates, the first `positives` relevant; negatives win ties, as in mteb.

    >>> reranked_average_precision([0.9, 0.5, 0.5], 2)               # ranks 1 and 3: (1/1 + 2/3) / 2
    0.8333333333333333
    """
    # trec_ranking breaks ties by id, the higher first: so positives are named a, negatives b.
    names = [f"{'a' if i < positives else 'b'}{i:05}" for i in range(len(scores))]
    relevance = {name: 1 for name in names[:positives]}
    return ranked_average_precision(relevance, trec_ranking(dict(zip(names, scores))))


def reciprocal_rank(relevance: dict[str, int], ranking: list[str], k: int) -> float:
    """1 / the rank of the first relevant document; 0 if it is not among the best k.

    >>> reciprocal_rank({"a": 0, "b": 1}, ["a", "b"], 10)
    0.5
    """
    for rank, document in enumerate(ranking[:k], 1):
        if relevance.get(document, 0) > 0:
            return 1 / rank
    return 0.0


def recall(relevance: dict[str, int], ranking: list[str], k: int) -> float:
    """Share of the relevant documents among the best k.

    >>> recall({"a": 1, "b": 1}, ["a", "x", "b"], 2)
    0.5
    """
    relevant = {document for document, grade in relevance.items() if grade > 0}
    return len(relevant & set(ranking[:k])) / len(relevant) if relevant else 0.0


# ------------------------------------------------------------------------------------- classification

def sample_per_label(labels: list, samples: int, experiments: int = 10) -> list[list[int]]:
    """Row numbers of the training samples of each experiment: the first `samples` rows of each label.

    As in MTEB, one list of row numbers is shuffled again before every experiment, each time by a
    generator freshly seeded with 42; so the file's order of rows matters.

    >>> sample_per_label(["x", "y", "x", "x", "y"], 1, 2)
    [[1, 2], [4, 3]]
    """
    rows = list(range(len(labels)))
    drawn = []
    for _ in range(experiments):
        np.random.RandomState(42).shuffle(rows)
        taken, sample = defaultdict(int), []
        for row in rows:
            if taken[labels[row]] < samples:
                taken[labels[row]] += 1
                sample.append(row)
        drawn.append(sample)
    return drawn


# ----------------------------------------------------------------------------------------- clustering

def label_levels(labels: list, split: bool | None) -> list[list]:
    """The labels of each level: one, or as many as the longest label has parts. What a label lacks is -1, a
    label too.

    >>> label_levels(["cs.AI", "math"], True), label_levels(["cs.AI", "math"], False)
    ([['cs', 'math'], ['AI', '-1']], [['cs.AI', 'math']])
    """
    if not split:
        return [labels]
    parts = [label.split(".") for label in labels]
    depth = max(map(len, parts))
    return [[part[level] if len(part) > level else "-1" for part in parts] for level in range(depth)]


def v_measure(labels, groups) -> float:
    """Harmonic mean of homogeneity (a group holds one label) and completeness (a label lies in one group).

    With entropies H and mutual information I: I / H(labels) and I / H(groups), 1 where an entropy is 0.

    >>> round(v_measure(["x", "x", "y", "y"], [0, 0, 1, 2]), 4)      # 1 and ln 2 / 1.04
    0.8
    """
    _, labels = np.unique(labels, return_inverse=True)
    _, groups = np.unique(groups, return_inverse=True)
    table = np.zeros((labels.max() + 1, groups.max() + 1))
    np.add.at(table, (labels, groups), 1 / len(labels))  # joint probabilities

    def entropy(p):
        return -np.sum(p * np.log(p)) if len(p) > 1 else 0.0

    by_label, by_group = table.sum(1), table.sum(0)
    independent = np.outer(by_label, by_group)           # the table, if labels said nothing of groups
    seen = table > 0
    mutual = max(0.0, np.sum(table[seen] * np.log(table[seen] / independent[seen])))
    homogeneity = mutual / entropy(by_label) if entropy(by_label) else 1.0
    completeness = mutual / entropy(by_group) if entropy(by_group) else 1.0
    if homogeneity + completeness == 0:
        return 0.0
    return float(2 * homogeneity * completeness / (homogeneity + completeness))


# --------------------------------------------------------------------------------------------- bitext

def nearest(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """For each row of a [n, d] the number of the row of b [m, d] with the highest cosine.

    >>> nearest(torch.eye(2), torch.tensor([[0., 3.], [2., 0.]])).tolist()
    [1, 0]
    """
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    numbers = []
    for rows in a.split(100):                            # so that memory holds 100 x m cosines
        cosines = rows @ b.T
        numbers.append(torch.topk(cosines, 1).indices[:, 0])
    return torch.cat(numbers).numpy()


def weighted_f1(labels, predictions) -> float:
    """F1 of each label, averaged by how often the label occurs.

    >>> weighted_f1([0, 1, 2], [0, 2, 2])                # F1: 1, 0, 2/3
    0.5555555555555555
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    occurs = Counter(labels.tolist())
    predicted = Counter(predictions.tolist())
    hits = Counter(labels[labels == predictions].tolist())
    total = 0.0
    for label in sorted(occurs):
        total += occurs[label] * 2 * hits[label] / (occurs[label] + predicted[label])
    return float(total / len(labels))
