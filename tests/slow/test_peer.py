"""train.py against the peer people use, sentence-transformers + peft: the same losses, step by step."""
import argparse
import json
import signal

import pytest

from ragged import write_rows
from tiny import random_model, save, tiny_config
from tools.bench import train as bench

@pytest.fixture(scope="module", params=["mistral", "smollm2"])
def base(request, tmp_path_factory, mistral_files, smollm2):
    """A tiny random Mistral with the real tokenizer and a short window, or the real SmolLM2, cut."""
    if request.param == "smollm2":
        return smollm2
    model = random_model(tiny_config(vocab_size=32000, sliding_window=12))
    return save(model, tmp_path_factory.mktemp("base") / "tiny", mistral_files)


def settings(base, data, folder) -> dict:
    folder.mkdir()
    return bench.prepare(argparse.Namespace(
        base=str(base), data=[str(data)], batch_size=8, max_length=40, negatives=1, steps=20, warmup=1,
        rounds=1, variants=["stock"], tokens_per_chunk=200, keep_tokens=None, peer_rows=3, lora_rank=4,
        lora_dropout=0.0, lr=1e-3, seed=0, dtype="float32", device="cpu", threads=1, train_flags="",
        json=None), folder)


@pytest.fixture
def signals():
    """train.train sets handlers of its own, for a process of its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_losses_of_20_steps_are_the_peers(base, tmp_path, signals):
    s = settings(base, write_rows(tmp_path / "rows.jsonl", 170), tmp_path / "work")
    ours, _ = bench.run_ours(s)
    moved = max(ours) - min(ours)
    for variant in bench.VARIANTS:
        theirs, _ = bench.run_peer({**s, "variant": variant})
        difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        print(variant, f"max difference {difference:.1e}, losses from {ours[0]:.4f} to {ours[-1]:.4f}")
        assert len(ours) == 20 and difference <= 1e-4 < 0.1 < moved


def test_both_sides_take_their_turn(tmp_path, mistral_files, capsys):
    config = tiny_config(vocab_size=32000, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    base = save(random_model(config), tmp_path / "tiny", mistral_files)
    data, out = write_rows(tmp_path / "rows.jsonl", 20), tmp_path / "bench.json"
    bench.main([str(base), "--data", str(data), "--batch-size", "4", "--max-length", "24",
                      "--steps", "2", "--rounds", "1", "--variants", "sorted-tokens",
                      "--tokens-per-chunk", "64", "--threads", "1", "--device", "cpu", "--json", str(out)])
    report = json.loads(out.read_text())
    ours, theirs = report["sides"]["ours"], report["sides"]["sorted-tokens"]
    assert ours["ours_is_faster"] == 1 and theirs["ours_is_faster"] > 0
    assert len(ours["losses"]) == 2 and theirs["loss_difference"] < 1e-4 and ours["losses"][0] > 0.1
    assert 0 < ours["before_bytes"] < ours["peak_bytes"] < theirs["peak_bytes"]        # fewer imports
    table = capsys.readouterr().out
    assert f"{report['tokens']:,} real tokens" in table and "sorted-tokens" in table
