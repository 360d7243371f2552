"""tools/bench_train.py: both sides run, on the same batches, and the report says so."""
import json

import pytest

import bench_train
from scripts import run_tool
from test_peer import write_rows
from tiny import random_model, save, tiny_config


@pytest.fixture(scope="module")
def base(tmp_path_factory, mistral_files):
    config = tiny_config(vocab_size=32000, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    return save(random_model(config), tmp_path_factory.mktemp("base") / "tiny", mistral_files)


@pytest.mark.slow
def test_both_sides_take_their_turn(base, tmp_path, capsys):
    data, out = write_rows(tmp_path / "rows.jsonl", 20), tmp_path / "bench.json"
    bench_train.main([str(base), "--data", str(data), "--batch-size", "4", "--max-length", "24",
                      "--steps", "2", "--rounds", "1", "--variants", "sorted-tokens",
                      "--tokens-per-chunk", "64", "--threads", "1", "--device", "cpu", "--json", str(out)])
    report = json.loads(out.read_text())
    ours, theirs = report["sides"]["ours"], report["sides"]["sorted-tokens"]
    assert ours["ours_is_faster"] == 1 and theirs["ours_is_faster"] > 0
    assert len(ours["losses"]) == 2 and theirs["loss_difference"] < 1e-4 and ours["losses"][0] > 0.1
    assert 0 < ours["before_bytes"] < ours["peak_bytes"] < theirs["peak_bytes"]        # fewer imports
    table = capsys.readouterr().out
    assert f"{report['tokens']:,} real tokens" in table and "sorted-tokens" in table


def test_tokens_are_the_real_ones_of_the_timed_steps(base, tmp_path):
    rows = [{"prompt": "", "query": "tea " * n, "pos": ["tea"], "neg": ["tea tea"]} for n in (1, 5, 300, 2)]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    s = {"base": str(base), "dtype": "float32", "max_length": 24, "folder": str(tmp_path), "batch_size": 2,
         "seed": 0, "negatives": 1, "lr": 1e-4, "steps": 2, "tokens_per_chunk": 64, "device": "cpu",
         "keep_tokens": None, "train_flags": ""}
    tokens = bench_train.count_tokens(s)
    # BOS and EOS, a token for the space that ends each query, and the cut at 24
    assert len(tokens) == 2 and sum(tokens) == (4 + 8 + 24 + 5) + 4 * 3 + 4 * 4


@pytest.mark.parametrize("more, complaint", [
    (("--steps", 1), "--steps 1: must be above --warmup 1"), (("--rounds", 0), "--rounds 0"),
    (("--steps", 9), "20 usable rows, 36 wanted"),
    (("--steps", 2, "--train-flags", "--lora-dropout 2"), "--lora-dropout 2"),
])
def test_user_errors_are_one_line(base, tmp_path, more, complaint):
    data = write_rows(tmp_path / "rows.jsonl", 20)
    done = run_tool("bench_train.py", base, "--data", data, "--batch-size", 4, "--variants",
                    "--device", "cpu", *more)
    assert done.returncode == 2 and complaint in done.stderr and done.stderr.count("\n") == 1, done.stderr
