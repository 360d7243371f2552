"""train.py against the peer people use, sentence-transformers + peft: the same losses, step by step."""
import argparse
import json
import signal

import pytest
import torch

import bench_train
from tiny import random_model, save, tiny_config

WORDS = ("tea", "river", "stone", "¿qué?", "Быстрая лиса", "周末看书", "quickly", "under the bridge", "42", "né")


@pytest.fixture(scope="module", params=["mistral", "smollm2"])
def base(request, tmp_path_factory, mistral_files, smollm2):
    """A tiny random Mistral with the real tokenizer and a short window, or the real SmolLM2, cut."""
    if request.param == "smollm2":
        return smollm2
    model = random_model(tiny_config(vocab_size=32000, sliding_window=12))
    return save(model, tmp_path_factory.mktemp("base") / "tiny", mistral_files)


def write_rows(path, rows: int):
    """Ragged texts, some of them cut at the maximum length, each row with one negative."""
    generator = torch.Generator().manual_seed(3)

    def text():
        length = int(torch.randint(1, 30, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator))
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            file.write(json.dumps({"prompt": ("", "Find the reply")[i % 2], "query": text(), "pos": [text()],
                                   "neg": [text()]}, ensure_ascii=False) + "\n")
    return path


def settings(base, data, folder) -> dict:
    folder.mkdir()
    return bench_train.prepare(argparse.Namespace(
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


@pytest.mark.slow
def test_losses_of_20_steps_are_the_peers(base, tmp_path, signals):
    s = settings(base, write_rows(tmp_path / "rows.jsonl", 170), tmp_path / "work")
    ours, _ = bench_train.run_ours(s)
    moved = max(ours) - min(ours)
    for variant in bench_train.VARIANTS:
        theirs, _ = bench_train.run_peer({**s, "variant": variant})
        difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        print(variant, f"max difference {difference:.1e}, losses from {ours[0]:.4f} to {ours[-1]:.4f}")
        assert len(ours) == 20 and difference <= 1e-4 < 0.1 < moved
