"""plumbing/metrics.py against scipy, scikit-learn and trec_eval, on random data with ties."""
import doctest
import math
import time
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from plumbing import metrics


def test_docstring_examples():
    assert doctest.testmod(metrics).failed == 0


def with_ties(random, n, levels=7):
    """Random values; half of the time from few levels, so that most of them tie."""
    return (
        random.integers(0, levels, n).astype(float) if random.random() < 0.5 else random.standard_normal(n)
    )


def test_whole_numbers_past_64_bits_are_ranked_as_others():
    assert metrics.spearman([1, 10**20, 3, 2], [1, 3, 4, 2]) == metrics.spearman([1, 9, 3, 2], [1, 3, 4, 2])


def test_spearman_and_its_p_value_equal_scipy():
    from scipy.stats import spearmanr
    random = np.random.default_rng(0)
    for _ in range(300):
        n = int(random.integers(2, 40))
        x, y = with_ties(random, n), with_ties(random, n)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = spearmanr(x, y)
        rho = metrics.spearman(x, y)
        assert rho == pytest.approx(expected.statistic, abs=1e-12, nan_ok=True)
        assert metrics.spearman_p_value(rho, n) == pytest.approx(
            expected.pvalue, abs=1e-7 if abs(rho) > 0.999 else 1e-12, nan_ok=True
        )


def test_undefined_correlations_are_nan():
    assert math.isnan(metrics.spearman([1, 1, 1], [1, 2, 3])) and math.isnan(metrics.spearman([1], [2]))
    assert math.isnan(metrics.spearman_p_value(math.nan, 5))


def test_nan_gives_nan_and_no_rank():
    assert math.isnan(metrics.spearman([1, 2, 3], [1, math.nan, 3]))
    assert math.isnan(metrics.average_precision([1, 0], [math.nan, 1]))


def test_a_list_comes_in_chunks_and_ends():
    assert list(metrics.in_chunks(["a", "b", "c"], 2)) == [(0, ["a", "b"]), (2, ["c"])]


def test_average_precision_equals_scikit_learn():
    from sklearn.metrics import average_precision_score
    random = np.random.default_rng(1)
    for _ in range(300):
        n = int(random.integers(1, 60))
        labels, scores = random.integers(0, 2, n), with_ties(random, n)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                          # no positive at all: 0, with a warning
            expected = average_precision_score(labels, scores)
        assert metrics.average_precision(labels, scores) == pytest.approx(expected, abs=1e-12)


def test_pair_scores_equal_scikit_learn_bit_for_bit():
    from sklearn.metrics.pairwise import paired_cosine_distances
    random = np.random.default_rng(2)
    a, b = random.standard_normal((2, 500, 48)).astype(np.float32)
    a[3] = 0
    b[5] = a[5]
    assert (metrics.paired_cosine(a, b) == 1 - paired_cosine_distances(a, b)).all()


def test_ranking_metrics_equal_trec_eval():
    import pytrec_eval
    random = np.random.default_rng(3)
    qrels, runs = {}, {}
    for q in range(300):
        documents = [f"d{i}" for i in range(int(random.integers(1, 30)))]
        judged = random.permutation(documents + ["never-retrieved"])[:int(random.integers(1, 12))]
        qrels[f"q{q}"] = {str(d): int(random.integers(-1, 4)) for d in judged}
        runs[f"q{q}"] = dict(zip(documents, with_ties(random, len(documents)).tolist()))
    expected = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "map_cut.1000", "recall.5", "recip_rank"}).evaluate(
        runs
    )
    for q, run_ in runs.items():
        ranking = metrics.trec_ranking(run_)
        assert metrics.ndcg(qrels[q], ranking, 10) == pytest.approx(expected[q]["ndcg_cut_10"], abs=1e-12)
        assert metrics.ranked_average_precision(qrels[q], ranking) == pytest.approx(
            expected[q]["map_cut_1000"], abs=1e-12
        )
        assert metrics.reciprocal_rank(qrels[q], ranking, 999) == pytest.approx(
            expected[q]["recip_rank"], abs=1e-12)
        assert metrics.recall(qrels[q], ranking, 5) == pytest.approx(expected[q]["recall_5"], abs=1e-12)


def test_scores_that_differ_only_past_float32_tie():
    assert metrics.trec_ranking({"a": 0.1 + 1e-12, "b": 0.1}) == ["b", "a"]


def test_weighted_f1_and_v_measure_equal_scikit_learn():
    from sklearn.metrics import f1_score, v_measure_score
    random = np.random.default_rng(4)
    for _ in range(200):
        n = int(random.integers(1, 50))
        x, y = random.integers(0, random.integers(1, 9), (2, n))
        expected = f1_score(x, y, average="weighted", zero_division=0)
        assert metrics.weighted_f1(x, y) == pytest.approx(expected, abs=1e-12)
        assert metrics.v_measure(x, y) == pytest.approx(v_measure_score(x, y), abs=1e-12)


def test_weighted_f1_of_as_many_labels_as_rows_takes_no_quadratic_time():
    """Bitext of 50,000 pairs: 20 s where each label looks through all rows."""
    labels = np.arange(50_000)
    start = time.time()
    assert metrics.weighted_f1(labels, labels) == 1 and metrics.weighted_f1(labels, np.roll(labels, 1)) == 0
    assert time.time() - start < 2


def test_samples_are_drawn_in_mtebs_order():
    """The same permutation applied again and again to one list, worked out here by its powers."""
    labels = np.random.default_rng(5).integers(0, 4, 60).tolist()
    step = list(range(60))
    np.random.RandomState(42).shuffle(step)
    order = list(range(60))
    for sample in metrics.sample_per_label(labels, 3):
        order = [order[i] for i in step]
        expected = [i for n, i in enumerate(order) if [labels[j] for j in order[:n]].count(labels[i]) < 3]
        assert sample == expected


def test_int8_keeps_255_levels_and_the_largest_value():
    vectors = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    stored, scale = metrics.quantize(vectors, "int8"), vectors.abs().amax(1, keepdim=True) / 127
    levels = stored / scale
    assert torch.allclose(levels, levels.round(), atol=1e-4) and levels.abs().max() <= 127.001
    assert ((stored - vectors).abs() <= 0.501 * scale).all() and not stored.equal(vectors)


def test_binary_search_rescores_the_nearest_by_hamming_distance():
    generator = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(5, 64, generator=generator), torch.randn(300, 64, generator=generator)
    signs = metrics.quantize(documents, "binary")
    scores, numbers = metrics.search(queries, [(0, signs[:100]), (100, signs[100:])], 20, binary=True)
    for q in range(5):
        hamming = (metrics.quantize(queries[q:q + 1], "binary") != signs).sum(1)
        nearest = set(hamming.argsort(stable=True)[:15].tolist())  # 15 of 20: ties at the edge may differ
        found = numbers[q].tolist()
        expected = F.normalize(queries[q], dim=0) @ F.normalize(signs[found], dim=1).T
        assert len(nearest & set(found)) >= 13 and torch.allclose(scores[q], expected, atol=1e-6)
