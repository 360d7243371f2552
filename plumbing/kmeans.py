"""plumbing/kmeans.py: the mini-batch k-means that MTEB scores clustering with, draw for draw as in
scikit-learn 1.9.

Two seeds give v-measures that lie 0.04 apart, now and then 0.28, so a score equals mteb's only if each draw
does: MiniBatchKMeans(k, batch_size=500, n_init="auto", random_state=42) draws a set that it does not use
with one start, then rows for k-means++ (Arthur & Vassilvitskii 2007), then a batch a step (Sculley 2010),
and new places for centres that own next to nothing. Vectors and centres have the precision of x, as there.
"""
import math

import numpy as np

STARVED = 0.01                   # a centre with fewer rows than this share of the largest gets a new place
PATIENCE = 10                         # steps without a better inertia


def kmeans(x: np.ndarray, k: int, seed: int = 42, batch: int = 500) -> np.ndarray:
    """Cluster numbers [n] of x [n, d].

    >>> groups = kmeans(np.array([[0.], [0.1], [5.], [5.1]]), 2)
    >>> bool(groups[0] == groups[1] != groups[2] == groups[3])
    True
    """
    draw = np.random.RandomState(seed)
    n = len(x)
    batch = min(batch, n)
    centres = first_centres(x, k, batch, draw)                       # [k, d]
    counts = np.zeros(k, x.dtype)                                    # rows that each centre has drawn so far
    even = np.ones(n, x.dtype) / n
    unchecked = 0                                            # rows since the last look for starved centres
    smoothed, lowest, worse = None, math.inf, 0
    for step in range(100 * n // batch):
        rows = x[draw.choice(n, batch, p=even)]
        unchecked += batch
        look = bool((counts == 0).any()) or unchecked >= 10 * k
        nearest = nearest_centres(rows, centres)
        inertia = squared_error(rows, centres, nearest) / batch
        centres = moved(centres, counts, rows, nearest)
        if look:
            unchecked = 0
            reseat(centres, counts, rows, draw)
        if step == 0:
            continue
        share = min(1, 2 * batch / (n + 1))
        smoothed = inertia if smoothed is None else smoothed * (1 - share) + inertia * share
        worse = 0 if smoothed < lowest else worse + 1
        lowest = min(lowest, smoothed)
        if worse == PATIENCE:
            break
    return nearest_centres(x, centres)


def first_centres(x: np.ndarray, k: int, batch: int, draw: np.random.RandomState) -> np.ndarray:
    """k-means++ on some rows of x [n, d] -> [k, d]: each new centre is likelier the farther it lies from the
    others.

    >>> first_centres(np.array([[0.], [0.], [9.]]), 2, 3, np.random.RandomState(0)).tolist()
    [[0.0], [9.0]]
    """
    n = len(x)
    size = 3 * batch if 3 * batch >= k else 3 * k
    size = min(size, n)
    draw.randint(0, n, size)                             # scikit-learn compares starts on these; here is one
    sample = x[draw.randint(0, n, size)] if size < n else x
    even = np.ones(size, x.dtype)                        # weights, of which sums round as they do there
    centres = np.empty((k, x.shape[1]), x.dtype)
    centres[0] = sample[draw.choice(size, p=even / even.sum())]
    distance = squared_distances(centres[:1], sample)[0]             # of each row to its nearest centre
    total = distance @ even
    for j in range(1, k):                                # the best of a few draws
        marks = draw.uniform(size=2 + int(np.log(k))) * total
        candidates = np.searchsorted(np.cumsum(even * distance), marks).clip(max=size - 1)
        left = np.minimum(distance, squared_distances(sample[candidates], sample))   # [candidates, size]
        totals = left @ even.reshape(-1, 1)
        best = totals.argmin()
        centres[j] = sample[candidates[best]]
        distance, total = left[best], totals[best]
    return centres


def moved(centres: np.ndarray, counts: np.ndarray, rows: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """The centres [k, d] as the means of all rows that each ever drew; counts [k] are raised in place."""
    new = centres.copy()
    for j in np.unique(nearest):
        drawn = rows[nearest == j]
        new[j] *= counts[j]
        for row in drawn:                                # one after the other: so the sum rounds as there
            new[j] += row
        counts[j] += len(drawn)
        new[j] *= counts.dtype.type(1) / counts[j]
    return new


def reseat(centres: np.ndarray, counts: np.ndarray, rows: np.ndarray, draw: np.random.RandomState) -> None:
    """Put centres that own next to nothing on rows of the batch, at most half of them, all in place."""
    starved = counts < STARVED * counts.max()
    most = int(0.5 * len(rows))
    if starved.sum() > 0.5 * len(rows):
        starved[np.argsort(counts)[most:]] = False
    if starved.any():
        centres[starved] = rows[draw.choice(len(rows), replace=False, size=int(starved.sum()))]
    counts[starved] = counts[~starved].min()             # not 0, or they would move at once again


def nearest_centres(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """For each row of x [n, d] the number of its nearest centre [k, d]: |c|^2 - 2 x c decides."""
    norms = np.einsum("kd,kd->k", centres, centres)
    nearest = [(norms - 2 * part @ centres.T).argmin(1) for part in np.split(x, range(256, len(x), 256))]
    return np.concatenate(nearest)


def squared_error(x: np.ndarray, centres: np.ndarray, nearest: np.ndarray) -> float:
    """Sum of |x - its centre|^2."""
    difference = x - centres[nearest]
    return float(np.einsum("nd,nd->n", difference, difference).sum(dtype=np.float64))


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a_i - b_j|^2: [m, d], [n, d] -> [m, n], summed in float64.

    >>> squared_distances(np.array([[0., 0.]]), np.array([[3., 4.]])).tolist()
    [[25.0]]
    """
    precision = a.dtype
    a, b = a.astype(np.float64), b.astype(np.float64)
    squares = -2 * a @ b.T
    squares += np.einsum("nd,nd->n", a, a)[:, None]
    squares += np.einsum("nd,nd->n", b, b)
    return np.maximum(squares, 0).astype(precision)        # rounding may take a 0 below 0
