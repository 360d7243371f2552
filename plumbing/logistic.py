"""plumbing/logistic.py: the logistic regression that MTEB scores classification with, as scikit-learn 1.9
fits it.

LogisticRegression(max_iter=100) minimises, with W the weights and the bias free,

    mean cross-entropy of softmax(x W^T + bias) + |W|^2 / 2n

and stops early, so its answers depend on the path: plumbing/lbfgs.py follows it. Products with x, and what
each row gives to the loss, have x's precision; the sums over W and the minimiser have float64. The order of
the operations is scikit-learn's, as in float32 another order rounds, and in the end answers, otherwise.
"""
import numpy as np

from plumbing.lbfgs import minimize


def logistic_regression(x: np.ndarray, labels: list, test: np.ndarray) -> list:
    """Fit on x [n, d], predict the labels of test [m, d].

    >>> logistic_regression(np.array([[-1.], [1.]]), ["low", "high"], np.array([[-9.], [0.1]]))
    ['low', 'high']
    """
    classes, targets = np.unique(labels, return_inverse=True)
    if len(classes) == 1:
        return classes.tolist() * len(test)
    if len(classes) == 2:
        weights, bias = fit_two(x, targets)
        answers = (test @ weights + bias > 0).astype(int)
    else:
        weights, bias = fit_softmax(x, targets, len(classes))
        answers = (test @ weights.T + bias).argmax(1)
    return classes[answers].tolist()


def fit_two(x: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One weight vector [d] and bias: a row's logit is x w + bias for the second class, 0 for the first."""
    n, d = x.shape
    strength = 1 / n
    is_second = targets == 1

    def loss(flat):                                                  # [d + 1]: the weights, the bias
        weights = flat[:d]
        logits = x @ weights.astype(x.dtype) + flat[d].astype(x.dtype)
        margins = np.where(is_second, logits, -logits).astype(np.float64)       # above 0: on the right side
        small = np.exp(-np.abs(margins))                             # never overflows
        losses = np.log1p(small) + np.maximum(-margins, 0)
        wrong = np.where(margins > 0, small, 1) / (1 + small)        # the probability of the other class
        slopes = np.where(is_second, -wrong, wrong).astype(x.dtype)
        slopes /= n
        gradient = np.empty(d + 1)
        gradient[:d] = x.T @ slopes + strength * weights
        gradient[d] = slopes.sum()
        mean = losses.astype(x.dtype).sum() / n
        return float(mean) + 0.5 * strength * float(weights @ weights), gradient

    flat = minimize(loss, np.zeros(d + 1)).astype(x.dtype)
    return flat[:d], flat[d]


def fit_softmax(x: np.ndarray, targets: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights [classes, d] and bias [classes]."""
    n, d = x.shape
    strength = 1 / n
    rows = np.arange(n)

    def loss(flat):                                                  # [(d + 1) * classes]
        both = flat.reshape(d + 1, classes).T                        # a column of biases is the last
        weights = both[:, :d]
        logits = x @ weights.astype(x.dtype).T + both[:, d].astype(x.dtype)              # [n, classes]
        highest = logits.max(1).astype(np.float64)
        shares = np.exp(logits.astype(np.float64) - highest[:, None]).astype(x.dtype)
        totals = shares.sum(1, dtype=np.float64).astype(x.dtype)
        losses = (np.log(totals.astype(np.float64)) + highest).astype(x.dtype) - logits[rows, targets]
        slopes = shares / totals[:, None]                        # probabilities, less 1 for the right class
        slopes[rows, targets] -= 1
        slopes /= n
        gradient = np.empty((d + 1, classes)).T
        gradient[:, :d] = slopes.T @ x + strength * weights
        gradient[:, d] = slopes.sum(0)
        flat_weights = weights.ravel(order="K")
        penalty = 0.5 * strength * float(flat_weights @ flat_weights)
        return float(losses.sum() / n) + penalty, gradient.ravel(order="F")

    flat = minimize(loss, np.zeros((d + 1) * classes))
    both = np.ascontiguousarray(flat.reshape(d + 1, classes).T).astype(x.dtype)
    return both[:, :d], both[:, d]
