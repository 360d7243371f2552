"""The checks that users can run, run: tools/check_padding.py and tools/bench_memory.py."""
import re
import subprocess
import sys

import pytest

import check_padding
import model
from conftest import TOOLS
from tiny import random_model, save, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory, mistral_files):
    config = tiny_config(vocab_size=32000, sliding_window=24)
    return save(random_model(config), tmp_path_factory.mktemp("tiny-mistral"), mistral_files)


def test_vectors_hold_in_every_dtype(folder, capsys):
    check_padding.main([str(folder)])
    table = capsys.readouterr().out
    assert len(re.findall(r"^cpu +(?:float32|bfloat16|float16) .* to alone ", table, re.MULTILINE)) == 12
    assert "above" not in table and table.count("alone, to float32 on the cpu") == 2


def test_a_padding_fault_is_found(folder, monkeypatch, capsys):
    """The commonest fault: reading the last column, which is padding for all but the longest text."""
    monkeypatch.setattr(model, "pool", lambda hidden, lengths, pooling: hidden[:, -1])
    with pytest.raises(SystemExit) as stopped:
        check_padding.main([str(folder), "--dtypes", "float32"])
    assert stopped.value.code == 1 and "above" in capsys.readouterr().out


def bench(*arguments):
    done = subprocess.run([sys.executable, TOOLS / "bench_memory.py", *map(str, arguments)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_loading_needs_the_checkpoints_size_once(stored, tmp_path):
    """Two layers of the 7B shape. Beside the weights: Python and torch, and the largest tensor twice."""
    said = bench("load", "--layers", 2, "--stored", stored, "--folder", tmp_path / "checkpoint")
    size, used, before = (float(re.search(pattern, said)[1]) for pattern in (
        r"([\d.]+) GB in bfloat16", r"([\d.]+) GB when used", r"\(([\d.]+) GB of it Python"))
    assert used - before <= 1.1 * size + (0.3 if stored == "float16" else 0)
    assert "finite: True" in said and not (tmp_path / "checkpoint").exists()


@pytest.mark.slow
def test_memory_grows_with_the_length_and_not_with_its_square():
    ratios = re.findall(r"16,384 tokens need ([\d.]+) times what 8,192 need", bench("long"))
    assert len(ratios) == 2 and all(1 < float(ratio) <= 2.2 for ratio in ratios)
