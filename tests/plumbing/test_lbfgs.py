"""plumbing/lbfgs.py takes scipy's steps."""
import doctest

import numpy as np
import pytest
from scipy.optimize import minimize, rosen, rosen_der

from plumbing import lbfgs

CURVES = np.logspace(0, 4, 30)


def valley(x):
    return float(rosen(x)), rosen_der(x)


def bowl(x):
    return float(CURVES @ (x - 1) ** 2), 2 * CURVES * (x - 1)


def ripples(x):
    """Its line searches go through all cases."""
    return float(np.sum(x * x / 50 - np.cos(3 * x))), x / 25 + 3 * np.sin(3 * x)


def test_docstring_examples():
    assert doctest.testmod(lbfgs).failed == 0


@pytest.mark.parametrize("loss, steps", [
    (valley, 1), (valley, 4), (valley, 15), (valley, 100), (bowl, 1), (bowl, 4), (bowl, 15),
    (ripples, 1), (ripples, 4), (ripples, 100)])
def test_the_same_steps_as_scipys(loss, steps):
    """As many values asked for, and the same place, whether the limit or the gradient ended it."""
    for seed in range(5):
        start = np.random.default_rng(seed).uniform(-4, 4, 30 if loss is bowl else 6)
        asked = []

        def counted(x):
            asked.append(x)
            return loss(x)

        x = lbfgs.minimize(counted, start, steps)
        expected = minimize(loss, start, method="L-BFGS-B", jac=True, options={
            "maxiter": steps, "gtol": 1e-4, "ftol": 64 * lbfgs.EPSILON, "maxls": 50})
        assert np.allclose(x, expected.x, rtol=1e-4, atol=1e-6)
        assert abs(len(asked) - expected.nfev) <= (2 if steps == 100 else 0)
