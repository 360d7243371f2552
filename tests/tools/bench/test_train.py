"""tools/bench/train.py: what it counts and refuses. tests/slow/test_peer.py runs both sides."""
import json

import pytest

from ragged import write_rows
from scripts import run_tool
from tiny import random_model, save, tiny_config
from tools.bench import train as bench


@pytest.fixture(scope="module")
def base(tmp_path_factory, mistral_files):
    config = tiny_config(vocab_size=32000, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    return save(random_model(config), tmp_path_factory.mktemp("base") / "tiny", mistral_files)


def test_tokens_are_the_real_ones_of_the_timed_steps(base, tmp_path):
    rows = [{"prompt": "", "query": "tea " * n, "pos": ["tea"], "neg": ["tea tea"]} for n in (1, 5, 300, 2)]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    s = {"base": str(base), "dtype": "float32", "max_length": 24, "folder": str(tmp_path), "batch_size": 2,
         "seed": 0, "negatives": 1, "lr": 1e-4, "steps": 2, "tokens_per_chunk": 64, "device": "cpu",
         "keep_tokens": None, "train_flags": ""}
    tokens = bench.count_tokens(s)
    # BOS and EOS, a token for the space that ends each query, and the cut at 24
    assert len(tokens) == 2 and sum(tokens) == (4 + 8 + 24 + 5) + 4 * 3 + 4 * 4


@pytest.mark.parametrize("more, complaint", [
    (("--steps", 1), "--steps 1: must be above --warmup 1"), (("--rounds", 0), "--rounds: 0: must be above 0"),
    (("--steps", 9), "20 usable rows, 36 wanted"),
    (("--steps", 2, "--train-flags", "--lora-dropout 2"), "--lora-dropout: 2: must be"),
    (("--base-of-another-name",), "--base-of-another-name"),
])
def test_user_errors_are_one_line(base, tmp_path, more, complaint):
    data = write_rows(tmp_path / "rows.jsonl", 20)
    done = run_tool("bench.train", base, "--data", data, "--batch-size", 4, "--variants",
                    "--device", "cpu", *more)
    assert done.returncode == 2 and complaint in done.stderr and done.stderr.count("\n") == 1, done.stderr
