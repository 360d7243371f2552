"""plumbing/kmeans.py: the same seed, the same labels as scikit-learn's MiniBatchKMeans."""
import doctest
import warnings

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from clouds import clouds
from plumbing import kmeans as module
from plumbing.kmeans import kmeans


def test_docstring_examples():
    assert doctest.testmod(module).failed == 0


def reference(x, k, seed=42):
    from sklearn.cluster import MiniBatchKMeans
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # fewer distinct points than clusters
        return MiniBatchKMeans(k, batch_size=500, n_init="auto", random_state=seed).fit(x).labels_


@pytest.fixture(autouse=True)
def one_thread():
    """With several, scikit-learn's sums round otherwise, and some of 400 clusters' labels with them."""
    with threadpool_limits(1):
        yield


SETS = [(2, 30, 1.0), (10, 80, 0.6), (10, 80, 1.5), (77, 10, 1.5), (180, 12, 2.0), (400, 3, 1.0)]   # many starve


@pytest.mark.parametrize("k, each, spread", SETS)
def test_labels_are_scikit_learns(k, each, spread):
    for dtype in (np.float32, np.float64):
        x, _ = clouds(np.random.default_rng(k), k, each, 32, spread, dtype=dtype)
        assert (kmeans(x, k) == reference(x, k)).all()
    assert (kmeans(x, k, seed=7) == reference(x, k, 7)).all()


def test_equal_rows_and_as_many_clusters_as_rows():
    for x, k in (np.ones((5, 2), np.float32), 3), (np.eye(6, dtype=np.float32), 6):
        assert (kmeans(x, k) == reference(x, k)).all()
