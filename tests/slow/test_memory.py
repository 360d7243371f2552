"""Peak memory, measured by tools/bench/memory.py: of loading a checkpoint and of long texts."""
import re

import pytest

from scripts import run_tool


def bench(*arguments):
    done = run_tool("bench.memory", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_loading_needs_the_checkpoints_size_once(stored, tmp_path):
    """Two layers of the 7B shape. Beside the weights: Python and torch, and the largest tensor twice."""
    said = bench("load", "--layers", 2, "--stored", stored, "--folder", tmp_path / "checkpoint")
    size, used, before = (float(re.search(pattern, said)[1]) for pattern in (
        r"([\d.]+) GB in bfloat16", r"([\d.]+) GB when used", r"\(([\d.]+) GB of it Python"))
    assert used - before <= 1.1 * size + (0.3 if stored == "float16" else 0)
    assert "finite: True" in said and not (tmp_path / "checkpoint").exists()


def test_memory_grows_with_the_length_and_not_with_its_square():
    ratios = re.findall(r"16,384 tokens need ([\d.]+) times what 8,192 need", bench("long"))
    assert len(ratios) == 2 and all(1 < float(ratio) <= 2.2 for ratio in ratios)
