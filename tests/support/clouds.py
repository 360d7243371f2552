"""Labelled vectors around random centres, for the tests of what is fitted to them."""
import numpy as np


def clouds(random, classes, each, size, spread, norm=1.0, dtype=np.float32):
    """[classes * each, size] around `classes` random centres, each about as long as `norm`; and their labels."""
    centres = random.standard_normal((classes, size))
    labels = np.repeat(np.arange(classes), each)
    x = centres[labels] + spread * random.standard_normal((len(labels), size))
    x *= norm * random.uniform(0.9, 1.1, (len(x), 1)) / np.linalg.norm(x, axis=1, keepdims=True)
    order = random.permutation(len(labels))
    return x.astype(dtype)[order], labels[order]
