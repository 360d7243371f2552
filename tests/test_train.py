"""train.py: what goes into a batch, the loss, cached gradients, the run's folder and its errors."""
import argparse
import contextlib
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import get_linear_schedule_with_warmup

import bench_memory
import train
from batches import Examples, document_instruction, plan_epoch, prepare, with_instruction
from model import Config, Decoder, Embedder, UserError
from tiny import random_model, save, tiny_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory, mistral_files):
    """A tiny random Mistral with the real tokenizer."""
    config = tiny_config(vocab_size=32000, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    return save(random_model(config), tmp_path_factory.mktemp("base") / "tiny", mistral_files)


def write_lines(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def record(i: int, **more) -> dict:
    return {"prompt": f"task {i % 3}", "query": f"question number {i} " + "word " * (i % 7),
            "pos": [f"answer {i} ✓ " + "long " * (i % 5)], "neg": [f"wrong {i}"], "type": ("sts", "long-short")[i % 2], **more}


@pytest.fixture
def data(tmp_path):
    return write_lines(tmp_path / "data.jsonl", [record(i) for i in range(24)])


def options(base, data, out, *more):
    return train.options(["--base", str(base), "--data", str(data), "--out", str(out), "--batch-size", "8",
                          "--max-length", "32", "--device", "cpu", *map(str, more)])


def command(base, data, out, *more, **run):
    return subprocess.run([sys.executable, ROOT / "train.py", "--base", base, "--data", data, "--out", out,
                           "--batch-size", "8", "--max-length", "32", "--lr", "1e-3", "--warmup-steps", "2",
                           "--device", "cpu", *map(str, more)], capture_output=True, text=True, **run)


# ------------------------------------------------------------------------------------------------ data

def test_examples_are_found_by_byte_offset(tmp_path):
    records = [record(i, query=q) for i, q in enumerate(["plain", "Grüße, 世界 🙂", "line\u2028separator", "last"])]
    text = "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records)      # blank lines, no final newline
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    examples = Examples([str(tmp_path / "a.jsonl")])
    assert [examples[i]["query"] for i in (3, 1, 0, 2)] == ["last", "Grüße, 世界 🙂", "plain", "line\u2028separator"]


@pytest.mark.parametrize("line, complaint", [
    ("{broken", "Expecting property name"), ("[1]", "not a JSON object"), ('{"query": 3, "pos": ["a"]}', '"query"'),
    ('{"query": "a"}', '"pos"'), ('{"query": "a", "pos": []}', "must hold text"), ('{"query": " ", "pos": ["a"]}', "must"),
    ('{"query": "a", "pos": ["b"], "neg": "c"}', '"neg"'), ('{"query": "a", "pos": ["b"], "prompt": 1}', '"prompt"'),
    ('{"query": "a", "pos": ["b"], "type": ["c"]}', '"type"'), (r'{"query": "a", "pos": ["\ud83d"]}', "surrogate"),
])
def test_a_bad_line_is_named_or_counted(tmp_path, line, complaint):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record(0)) + "\n" + line + "\n" + json.dumps(record(1)) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: .*" + complaint):
        Examples([str(path)])
    examples = Examples([str(path)], skip_bad_lines=True)
    assert (len(examples), examples.skipped, examples[1]["query"]) == (2, 1, record(1)["query"])


def test_missing_prompt_falls_back(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"query": "q", "pos": ["p"]}, {"query": "q", "pos": ["p"], "prompt": ""}])
    examples = Examples([str(path)], default_prompt="the task")
    assert [examples[i]["prompt"] for i in (0, 1)] == ["the task", ""]


@pytest.mark.parametrize("homogeneous", [False, True])
def test_an_epoch_visits_each_example_once_in_another_order(data, homogeneous):
    examples = Examples([str(data)])
    first, again, second = (plan_epoch(examples, 5, homogeneous, 0, epoch) for epoch in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    flat = np.concatenate(first)
    assert sorted(flat) == list(range(24)) and not np.array_equal(flat, np.concatenate(second))
    if homogeneous:                     # 12 + 12 examples in batches of 5: two whole ones a type, the rest mixed
        pure = [len(set(examples.groups[batch])) == 1 for batch in first if len(batch) == 5]
        assert sum(pure) == 4


def test_a_share_draws_another_part_each_epoch(tmp_path):
    paths = [write_lines(tmp_path / name, [record(i, query=f"{name} {i}") for i in range(20)]) for name in "ab"]
    examples = Examples([f"{paths[0]}:0.25", str(paths[1])])
    parts = [np.concatenate(plan_epoch(examples, 7, False, 0, epoch)) for epoch in range(3)]
    assert [sum(examples.files[p] == 0) for p in parts] == [5, 5, 5]
    assert [sum(examples.files[p] == 1) for p in parts] == [20, 20, 20]
    assert len({frozenset(p[examples.files[p] == 0]) for p in parts}) == 3
    for bad in ("2", "0", "x", "-1"):
        with pytest.raises(UserError, match="share"):
            Examples([f"{paths[0]}:{bad}"])


def test_known_positives_are_masked_and_the_target_never_is(tmp_path, base):
    records = [
        {"prompt": "t", "query": "q", "pos": ["A"], "neg": ["B"]},       # B is a positive of the same query below
        {"prompt": "t", "query": "q", "pos": ["B"], "neg": ["C"]},
        {"prompt": "other", "query": "q", "pos": ["A"], "neg": ["D"]},   # another task: its A is its own
        {"prompt": "t", "query": "r", "pos": ["B", "B"], "neg": []},
    ]
    path = write_lines(tmp_path / "a.jsonl", records)
    args = options(base, path, tmp_path / "run")
    batch = prepare(Examples([str(path)]), np.arange(4), lambda texts, prompts: texts, args, step=0)
    # columns: the positives A B A B, then the negatives B C D
    assert batch.valid.tolist() == [
        [True, False, False, False, False, True, True],     # A again in column 2, B in 1, 3 and 4
        [False, True, False, False, False, True, True],
        [False, True, True, True, True, True, True],        # its own A stays, the other A goes
        [True, False, True, True, False, True, True],
    ]
    args.no_mask = True
    assert prepare(Examples([str(path)]), np.arange(4), lambda t, p: t, args, step=0).valid.all()


def test_a_batch_is_a_function_of_the_step(tmp_path, base):
    path = write_lines(tmp_path / "a.jsonl", [{"query": f"q{i}", "pos": [f"p{i}{k}" for k in range(4)],
                                               "neg": [f"n{i}{k}" for k in range(4)]} for i in range(6)])
    args = options(base, path, tmp_path / "run", "--negatives", 2)
    examples = Examples([str(path)])
    texts = [prepare(examples, np.arange(6), lambda t, p: t, args, step).rows for step in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 6 * (1 + 1 + 2)


@pytest.mark.parametrize("style, wanted", [
    ("task", [("T", "q")] * 4), ("none", [("", "q")] * 4),
    ("prefix", [("", "classify: q"), ("", "query: q"), ("", "q"), ("", "q")]),
])
def test_instruction_styles_of_the_ablation(style, wanted):
    kinds = ("long-short", "short-long", "sts", "bitext")
    assert [with_instruction({"prompt": "T", "query": "q", "type": k}, style) for k in kinds] == wanted


@pytest.mark.parametrize("style, wanted", [("task", ["T", "", "T"]), ("none", [""] * 3), ("prefix", [""] * 3)])
def test_documents_of_symmetric_tasks_get_the_instruction_if_queries_do(style, wanted):
    examples = [{"prompt": "T", "type": kind} for kind in ("sts", "short-long", "bitext")]
    args = argparse.Namespace(both_sides=True, instruction=style)
    assert [document_instruction(example, args) for example in examples] == wanted
    args.both_sides = False
    assert not any(document_instruction(example, args) for example in examples)


def test_the_defaults_are_the_papers():
    args = train.options(["--base", "b", "--data", "d", "--out", "o"])
    assert (args.batch_size, args.negatives, args.max_length, args.temperature) == (2048, 1, 512, 0.02)
    assert (args.lr, args.warmup_steps, args.weight_decay, args.epochs) == (1e-4, 100, 0.1, 1)
    assert (args.lora_rank, args.lora_alpha, args.lora_dropout, args.pooling) == (16, 32, 0.1, "last")
    assert (args.instruction, args.both_sides, args.batches) == ("task", False, "mixed")


# ------------------------------------------------------------------------------------------------ loss

def unit(rows, dims, seed):
    return torch.nn.functional.normalize(torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed),
                                                     dtype=torch.float64), dim=-1)


def test_info_nce_is_equation_2(seed=0):
    q, d = unit(5, 8, seed), unit(9, 8, seed + 1)
    targets = torch.tensor([3, 0, 8, 1, 5])
    valid = torch.rand(5, 9, generator=torch.Generator().manual_seed(2)) > 0.3
    valid[torch.arange(5), targets] = True
    wanted = 0.0
    for i, t in enumerate(targets):
        phi = torch.exp(torch.cosine_similarity(q[i][None], d) / 0.02)
        wanted -= torch.log(phi[t] / phi[valid[i]].sum()) / 5
    assert torch.allclose(train.info_nce(q, d, targets, 0.02, valid), wanted, rtol=1e-12)
    assert train.info_nce(q, d, targets, 0.02).dtype == torch.float64
    assert train.info_nce(q.bfloat16(), d.bfloat16(), targets, 0.02).dtype == torch.float32


def test_margin_masks_what_scores_above_the_positive():
    q = torch.tensor([[1.0, 0.0]])
    d = torch.tensor([[0.8, 0.6], [1.0, 0.0], [0.0, 1.0]])             # cosines .8 (own), 1, 0
    logits = torch.tensor([0.8, 0.0])
    assert torch.allclose(train.info_nce(q, d, torch.tensor([0]), 1.0, margin=0.1),
                          torch.logsumexp(logits, 0) - 0.8)
    assert train.info_nce(q, d, torch.tensor([0]), 1.0, margin=-0.9) == 0          # all others go, the target never


def test_matryoshka_averages_over_cuts():
    q, d, t = unit(4, 8, 0), unit(4, 8, 1), torch.arange(4)

    def loss(a, b):
        return train.info_nce(a, b, t, 0.1)
    cut = loss(torch.nn.functional.normalize(q[:, :3], dim=-1), torch.nn.functional.normalize(d[:, :3], dim=-1))
    assert torch.allclose(train.matryoshka(loss, q, d, [3]), (loss(q, d) + cut) / 2)
    assert torch.equal(train.matryoshka(loss, q, d, []), loss(q, d))


def test_accuracy_counts_ties_and_nan_as_misses():
    e, valid = torch.eye(3), torch.ones(3, 3, dtype=torch.bool)
    targets = torch.arange(3)
    assert train.in_batch_accuracy(e, e, targets, valid) == 1
    assert train.in_batch_accuracy(torch.ones(3, 3), torch.ones(3, 3), targets, valid) == 0
    assert train.in_batch_accuracy(e * torch.nan, e, targets, valid) == 0
    q = torch.tensor([[1.0, 0.1, 0.0], [0.1, 1.0, 0.0], [0.0, 0.0, 1.0]])
    swapped = e[[1, 0, 2]]
    assert train.in_batch_accuracy(q, swapped, targets, valid) == pytest.approx(1 / 3)
    valid[0, 1] = valid[1, 0] = False                                  # the better ones do not count
    assert train.in_batch_accuracy(q, swapped, targets, valid) == 1


def test_spread_is_the_mean_cosine_distance():
    v = unit(6, 4, 0)
    assert torch.allclose(train.spread(v), (1 - v @ v.T).mean())
    assert train.spread(v[:1].expand(5, 4)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 4])
def test_schedule_is_the_usual_linear_one(warmup, base, tmp_path, steps=12):
    args = options(base, tmp_path, tmp_path, "--warmup-steps", warmup)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.lr)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps):
        if step >= warmup:
            assert train.learning_rate(step, steps, args) == pytest.approx(schedule.get_last_lr()[0])
        else:                           # theirs spends the first step at a rate of zero, ours does not
            assert train.learning_rate(step, steps, args) == pytest.approx(args.lr * (step + 1) / warmup)
        optimizer.step()
        schedule.step()


# ------------------------------------------------------------------------------------ cached gradients

def gradients_of(embedder, batch, tokens_per_chunk, keep_tokens, key=(7, 3, 0)):
    targets = torch.arange(batch.queries)
    for p in embedder.decoder.lora_parameters().values():
        p.grad = None
    loss, vectors, counts, drift = train.cached_gradients(
        embedder.embed, batch, lambda v: train.info_nce(v[:batch.queries], v[batch.queries:], targets, 0.02, batch.valid),
        tokens_per_chunk, keep_tokens, key)
    return loss, torch.cat([p.grad.flatten() for p in embedder.decoder.lora_parameters().values()]), drift, counts


@pytest.fixture
def double(base, data, tmp_path):
    """A float64 embedder with a LoRA that does something, and a batch of ragged texts."""
    embedder = Embedder.load(base, dtype="float64", max_length=32)
    embedder.decoder.add_lora(4, 8, 0.0)
    embedder.decoder.double().train()
    generator = torch.Generator().manual_seed(1)
    for name, p in embedder.decoder.lora_parameters().items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.1, generator=generator)
    args = options(base, data, tmp_path / "run")
    return embedder, prepare(Examples([str(data)]), np.arange(12), embedder.tokenize, args, step=0)


def autograd_reference(embedder, batch, tokens_per_chunk, key):
    """The same chunks with the same dropout seeds in one ordinary graph."""
    rows = {}
    for number, chunk in enumerate(train.length_chunks([len(r) for r in batch.rows], tokens_per_chunk)):
        train.seed_chunk(*key, number)
        v = embedder.embed([batch.rows[i] for i in chunk])
        rows.update(zip(batch.place[chunk].tolist(), v))
    v = torch.stack([rows[i] for i in range(batch.texts)])
    loss = train.info_nce(v[:batch.queries], v[batch.queries:], torch.arange(batch.queries), 0.02, batch.valid)
    return loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(embedder.decoder.lora_parameters().values()))])


def close(found, wanted):
    return (found - wanted).norm() / wanted.norm() <= 1e-9


@pytest.mark.parametrize("keep", [0, 100, 10 ** 9])
@pytest.mark.parametrize("chunk", [1, 40, 100, 333, 10 ** 9])
def test_cached_gradient_is_the_one_shot_gradient(double, chunk, keep):
    embedder, batch = double
    wanted_loss, wanted = autograd_reference(embedder, batch, 10 ** 9, (0,))
    loss, found, drift, _ = gradients_of(embedder, batch, chunk, keep)
    assert loss.dtype == found.dtype == torch.float64
    assert torch.allclose(loss, wanted_loss, rtol=1e-9) and close(found, wanted) and drift < 1e-12


@pytest.mark.parametrize("keep", [0, 100, 10 ** 9])
def test_dropout_replays_in_the_second_pass(double, keep):
    embedder, batch = double
    for module in embedder.decoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    key = (7, 3, 0)
    loss, found, drift, _ = gradients_of(embedder, batch, 100, keep, key)
    wanted_loss, wanted = autograd_reference(embedder, batch, 100, key)
    assert drift == 0 and torch.equal(loss, wanted_loss) and close(found, wanted)
    other, _, _, _ = gradients_of(embedder, batch, 100, keep, (7, 4, 0))
    assert other != loss                                               # another step draws other masks


def test_kept_chunks_are_embedded_once(double):
    embedder, batch = double
    sizes = [len(c) * max(len(batch.rows[i]) for i in c) for c in train.length_chunks([len(r) for r in batch.rows], 100)]
    assert gradients_of(embedder, batch, 100, 10 ** 9)[3] == (sum(sizes), 0)
    assert gradients_of(embedder, batch, 100, 0)[3] == (sum(sizes), sum(sizes))
    assert gradients_of(embedder, batch, 100, sizes[0])[3] == (sum(sizes), sum(sizes[1:]))


def test_activation_checkpointing_changes_nothing(double):
    embedder, batch = double
    _, wanted, _, _ = gradients_of(embedder, batch, 100, 0)
    embedder.decoder.activation_checkpointing = True
    calls, block = [], embedder.decoder.layers[0]
    watch = block.register_forward_pre_hook(lambda *_: calls.append(1))
    assert close(gradients_of(embedder, batch, 100, 0)[1], wanted)
    watch.remove()
    embedder.decoder.activation_checkpointing = False
    chunks = len(train.length_chunks([len(row) for row in batch.rows], 100))
    assert len(calls) == 3 * chunks                       # pass one, pass two, and again for its gradient


@pytest.mark.parametrize("queries, tokens, ranks", [
    (12, 100, 2), pytest.param(5, 60, 2, marks=pytest.mark.slow), pytest.param(1, 1000, 2, marks=pytest.mark.slow),
    (1, 1000, 4)])
def test_ranks_give_the_gradient_of_one(base, data, tmp_path, queries, tokens, ranks):
    """Real processes over gloo, float64; the 3 texts of 1 query leave two ranks uneven, and one of four idle."""
    results = []
    for world in (1, ranks):
        out = tmp_path / f"{world}.pt"
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world),
                               ROOT / "tests/support/one_step.py", base, data, str(queries), str(tokens), out],
                              capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        results.append(torch.load(out))
    (loss, gradient, vectors), (loss2, gradient2, vectors2) = results
    assert torch.allclose(loss, loss2, rtol=1e-9) and torch.allclose(vectors, vectors2, rtol=1e-9)
    assert gradient.norm() > 0 and close(gradient2, gradient)


# train.py, whose rank 1 gets SIGTERM in step 3, just after the ranks have told each other of signals
LATE_SIGNAL = """
import os, signal, sys, train
tell, told = train.sum_over_ranks, []
def tell_then_signal(tensors):
    tell(tensors)
    told.append(1)
    if os.environ["RANK"] == "1" and len(told) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
train.sum_over_ranks = tell_then_signal
train.leave(train.main())
"""


@contextlib.contextmanager
def two_ranks(base, data, out, *flags, code=(ROOT / "train.py",)):
    """Two processes over gloo, ended with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [subprocess.Popen(
        [sys.executable, *code, "--base", base, "--data", data, "--out", out, "--batch-size", "8",
         "--max-length", "32", "--device", "cpu", "--epochs", "10000", *flags], cwd=ROOT, text=True,
        env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in (0, 1)]
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("how, lost, reason", [(signal.SIGKILL, 0, "onnection"), (signal.SIGKILL, 1, "onnection"),
                                               (signal.SIGSTOP, 1, "Timed out")])
def test_a_lost_rank_ends_the_other_within_the_timeout(base, data, tmp_path, how, lost, reason):
    """One of two is killed in mid-run, or stopped so that it no longer answers."""
    with two_ranks(base, data, tmp_path / "run", "--timeout", "0.05") as ranks:            # 3 seconds
        assert any(line.startswith("step 3/") for line in ranks[0].stdout), ranks[0].stderr.read()
        ranks[lost].send_signal(how)
        sent = time.monotonic()
        _, said = ranks[1 - lost].communicate(timeout=60)
        assert time.monotonic() - sent < 3 + 10                            # the timeout, and leaving
        assert ranks[1 - lost].returncode == 2 and said.count("\n") == 1, said
        assert said.startswith(f"train.py: rank {1 - lost} lost another rank (") and reason in said
        assert "--resume goes on" in said


@pytest.mark.parametrize("steps, last, code", [
    ("10", 4, 128 + signal.SIGTERM), pytest.param("3", 3, 0, marks=pytest.mark.slow)])
def test_a_late_signal_stops_both_ranks_after_the_next_step(base, data, tmp_path, steps, last, code):
    """What comes after the sum counts in the next step; if there is none, the run is done."""
    flags = "--max-steps", steps, "--timeout", "0.5"
    with two_ranks(base, data, tmp_path / "run", *flags, code=("-c", LATE_SIGNAL)) as ranks:
        said = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [code, code], said
    with safe_open(tmp_path / "run/checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["state"])["step"] == last


def test_two_ranks_train_the_adapter_of_one(base, data, tmp_path):
    """train.py as it is: three steps, the last of them of one query."""
    flags = ("--lora-dropout", "0", "--epochs", "1", "--max-steps", "3", "--lr", "1e-3", "--warmup-steps", "0")
    lines = data.read_text().splitlines(True)
    data.write_text("".join(lines[:17]))
    with two_ranks(base, data, tmp_path / "two", *flags) as ranks:
        said = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert command(base, data, tmp_path / "one", *flags).returncode == 0
    one, two = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("one", "two"))
    fresh = Embedder.load(base, device="cpu")
    fresh.decoder.add_lora(16, 32, 0.0, seed=0)
    for name, start in fresh.decoder.lora_parameters().items():
        a, b = (run[f"base_model.model.{name}.weight"] for run in (one, two))
        assert (a - b).norm() < 1e-3 * (a - start.detach()).norm()
    logs = [[json.loads(line) for line in open(tmp_path / run / "log.jsonl")] for run in ("one", "two")]
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["tokens"] == b["tokens"]


# -------------------------------------------------------------------------------------- the run's folder

@pytest.fixture
def here(base, data, tmp_path):
    """here(name, *flags): train.py in this process -> (exit code, the log's lines)."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(name, *flags):
        code = train.main(["--base", str(base), "--data", str(data), "--out", str(tmp_path / name), "--device", "cpu",
                           "--batch-size", "8", "--max-length", "32", "--max-steps", "2", "--warmup-steps", "0",
                           "--lr", "1e-3", *map(str, flags)])
        log = tmp_path / name / "log.jsonl"
        return code, [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def test_float16_scales_its_loss(here, tmp_path):
    """A step whose scaled gradient overflows is left out and the scale halved; the others are unscaled."""
    code, log = here("half", "--dtype", "float16", "--max-steps", 12, "--epochs", 4)
    assert code == 0 and all(math.isfinite(line["loss"]) for line in log)
    norms = [line["grad_norm"] for line in log if math.isfinite(line["grad_norm"])]
    assert norms and max(norms) < 1e4                         # the scale itself is 65,536 at the start
    with safe_open(tmp_path / "half/checkpoint.safetensors", "pt") as file:
        scaler = json.loads(file.metadata()["state"])["scaler"]
        moved = [file.get_tensor(name) for name in file.keys() if name.endswith("lora_B")]
    assert scaler["scale"] == 2.0 ** 16 / 2 ** (len(log) - len(norms))
    assert all(tensor.abs().max() > 0 for tensor in moved)


def test_mfu_counts_what_is_done(here):
    """Forward 2N a token and pass, backward 2N; a checkpointed block runs forward once more."""
    for name, flags, passes in (("once", ("--keep-tokens", 10 ** 6), 2), ("twice", ("--keep-tokens", 0), 3),
                                ("more", ("--keep-tokens", 0, "--activation-checkpointing"), 4)):
        code, (line, *_) = here(name, "--peak-tflops", 1e-3, *flags)
        weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
        per_second = 2 * weights * passes * line["tokens"] / (1 - line["padding"]) / line["seconds"]
        assert code == 0 and line["mfu"] == pytest.approx(per_second / 1e9, rel=1e-4)
        assert line["mfu_useful"] == pytest.approx(4 * weights * line["tokens_per_second"] / 1e9, rel=1e-4)


@pytest.mark.parametrize("flags", [("--instruction", "none"), ("--pooling", "mean"), ("--negatives", 0)])
def test_options_of_the_vectors_reach_them(here, flags):
    assert here("plain")[1][0]["spread"] != here("changed", *flags)[1][0]["spread"]


def test_each_step_and_chunk_draws_its_own_dropout_and_replays_it(here, monkeypatch):
    keys, seed_chunk = [], train.seed_chunk
    monkeypatch.setattr(train, "seed_chunk", lambda *key: (keys.append(key), seed_chunk(*key)))
    assert here("run", "--tokens-per-chunk", 64, "--keep-tokens", 0)[0] == 0
    first, second = ([key for key in keys if key[1] == step] for step in (0, 1))
    assert len(keys) == len(first) + len(second) and len(set(first)) > 2
    assert all(keys.count(key) == 2 for key in keys)


def test_the_next_batch_is_read_during_a_step(here, monkeypatch):
    """The reading of step 2 ends, in its own thread, before step 1 does."""
    read, prepare = threading.Event(), train.prepare

    def prepare_and_tell(examples, numbers, tokenize, args, step, *more):
        batch = prepare(examples, numbers, tokenize, args, step, *more)
        if step == 1:
            read.set()
        return batch

    def slow(*args):
        assert read.wait(20)
        return step(*args)
    step = train.training_step
    monkeypatch.setattr(train, "prepare", prepare_and_tell)
    monkeypatch.setattr(train, "training_step", slow)
    assert here("run")[0] == 0


@pytest.mark.parametrize("flags", [("--matryoshka", 8, 16), ("--mask-margin", 0.0), ("--temperature", 0.1)])
def test_options_of_the_loss_reach_it(here, flags):
    plain, changed = here("plain")[1], here("changed", *flags)[1]
    assert plain[0]["loss"] != changed[0]["loss"] and plain[0]["spread"] == changed[0]["spread"]


def test_an_adapter_lost_by_a_kill_is_written_again(here, tmp_path):
    assert here("run")[0] == 0
    adapter = tmp_path / "run/adapter_model.safetensors"
    wanted = load_file(adapter)
    adapter.unlink()                                          # as if the end had come between the two files
    assert here("run", "--resume")[0] == 0
    assert all(torch.equal(wanted[name], tensor) for name, tensor in load_file(adapter).items())


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(here, tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(Path(b).name), replace(a, b)))
    assert here("run")[0] == 0
    assert calls[calls.index("checkpoint.safetensors") - 1] == "fsync"


def test_a_run_goes_on_with_the_same_inputs_in_another_spelling(here, base, data, tmp_path, monkeypatch, capsys):
    assert here("run", "--checkpoint-every", 1)[0] == 0
    monkeypatch.chdir(base.parent)
    data = data.rename(tmp_path / "moved.jsonl")
    flags = ["--out", str(tmp_path / "run"), "--device", "cpu", "--batch-size", "8", "--max-length", "32",
             "--max-steps", "2", "--warmup-steps", "0", "--lr", "1e-3", "--resume"]
    assert train.main([*flags, "--base", base.name, "--data", str(data)]) == 0
    assert train.main([*flags, "--base", base.name, "--data", str(data), "--prompt", "."]) == 2      # no path
    assert "another prompt" in capsys.readouterr().err
    assert train.main([*flags, "--base", base.name, "--data", f"{data}:0.5"]) == 2
    assert "another data_shares" in capsys.readouterr().err


def test_a_run_goes_on_in_smaller_chunks(here):
    """What the message about a full GPU advises."""
    assert here("run", "--max-steps", 3, "--checkpoint-every", 1)[0] == 0
    code, log = here("run", "--max-steps", 3, "--resume", "--tokens-per-chunk", 40, "--keep-tokens", 0)
    assert code == 0 and len(log) == 3


def test_no_memory_is_said_with_the_flag_to_lower(here, monkeypatch, capsys):
    def full(args):
        raise torch.OutOfMemoryError
    monkeypatch.setattr(train, "train", full)
    assert here("run", "--tokens-per-chunk", 4096)[0] == 2
    said = capsys.readouterr().err
    assert "lower --tokens-per-chunk (now 4096)" in said and said.count("\n") == 1


def test_a_base_too_large_for_the_gpu_is_another_message(here, monkeypatch, capsys):
    def full(args):
        raise torch.OutOfMemoryError
    monkeypatch.setattr(train, "load_model", full)
    assert here("run")[0] == 2
    said = capsys.readouterr().err
    assert "too small for its weights alone" in said and "tokens-per-chunk" not in said and said.count("\n") == 1


def test_the_line_of_a_step_tells_the_time_left(capsys):
    line = dict.fromkeys(("loss", "chance_loss", "accuracy", "spread", "lr", "grad_norm", "tokens_per_second",
                          "padding"), 0.5)
    train.show(line | {"step": 3, "seconds": 20.5}, 10)
    assert "step 3/10" in (said := capsys.readouterr().out) and said.endswith("left 2m23s\n")


@pytest.mark.parametrize("tokens, length, keep, shapes", [
    (100, 32, 300, [(4, 25)] * 3), (768, 512, None, [(2, 384)]), (100, 512, 700, [(1, 512), (1, 188)])])
def test_the_dry_step_holds_the_tokens_of_the_worst_one(tokens, length, keep, shapes):
    found, weight = [], torch.ones(1, requires_grad=True)

    class Watched:
        decoder, device = argparse.Namespace(config=argparse.Namespace(hidden_size=4)), torch.device("cpu")

        def embed(self, rows):
            found.append((len(rows), len(rows[0])))
            return weight * 2
    train.dry_step(Watched(), argparse.Namespace(max_length=length, tokens_per_chunk=tokens, keep_tokens=keep,
                                                 batch_size=3, negatives=1, temperature=0.02))
    assert found == shapes and weight.grad == 2 * len(shapes)              # all of them with their graphs at once


def test_a_run_moves_lora_and_reloads(base, data, tmp_path):
    done = command(base, data, tmp_path / "run", "--epochs", 2)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 7))
    wanted = {"loss", "accuracy", "spread", "chance_loss", "lr", "tokens_per_second", "padding", "replay_difference"}
    assert wanted <= log[0].keys() and all(line["replay_difference"] == 0 for line in log)
    tensors = load_file(tmp_path / "run/adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2 and all(t.abs().max() > 0 for n, t in tensors.items() if "lora_B" in n)
    trained, plain = Embedder.load(tmp_path / "run"), Embedder.load(base)
    again = Embedder.load(base, adapter=tmp_path / "run")
    texts = ["a question", "an answer that is longer"]
    assert torch.equal(trained.encode(texts), again.encode(texts))
    assert (trained.encode(texts) - plain.encode(texts)).norm() > 1e-3


def test_resume_after_sigterm_is_bit_identical(base, data, tmp_path):
    flags = ("--epochs", 8, "--checkpoint-every", 5)                       # 24 steps
    whole = command(base, data, tmp_path / "whole", *flags)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "--base", base, "--data", data, "--out", tmp_path / "cut",
                                "--batch-size", "8", "--max-length", "32", "--lr", "1e-3", "--warmup-steps", "2",
                                "--device", "cpu", *map(str, flags)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 7/"):
            for _ in range(3):                                             # make and torchrun pass them on too
                process.send_signal(signal.SIGTERM)
                time.sleep(0.01)
    assert process.wait() == 128 + signal.SIGTERM
    done = command(base, data, tmp_path / "cut", *flags, "--resume")
    assert done.returncode == 0, done.stderr
    for name in ("checkpoint.safetensors", "adapter_model.safetensors"):
        a, b = (load_file(tmp_path / run / name) for run in ("whole", "cut"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    steps = [[json.loads(x)["step"] for x in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("whole", "cut")]
    assert steps[0] == steps[1] == list(range(1, 25))


def test_a_run_is_not_overwritten_unasked(base, data, tmp_path):
    out = tmp_path / "run"
    assert command(base, data, out).returncode == 0
    before = (out / "checkpoint.safetensors").read_bytes()
    for more, complaint in [((), "a run is here already"), (("--resume", "--seed", 5), "made with another seed")]:
        done = command(base, data, out, *more)
        assert done.returncode == 2 and complaint in done.stderr and done.stderr.count("\n") == 1
        assert (out / "checkpoint.safetensors").read_bytes() == before
    done = command(base, data, out, "--resume")                            # nothing left to do
    assert done.returncode == 0 and (out / "checkpoint.safetensors").read_bytes() == before
    write_lines(data, [record(i) for i in range(16)])
    done = command(base, data, out, "--resume")
    assert done.returncode == 2 and "data_fingerprint" in done.stderr
    (out / "log.jsonl").unlink()
    (out / "config.json.tmp").touch()                                      # a kill came while it was written
    done = command(base, data, out, "--resume", "--overwrite")             # what make does when its inputs changed
    assert done.returncode == 0 and (out / "checkpoint.safetensors").read_bytes() != before


def test_a_second_interrupt_leaves_at_once_but_not_its_echo(monkeypatch):
    now, signals = [100.0], []
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        train.heed(number, signals)
    now[0] += 5
    train.heed(signal.SIGTERM, signals)
    with pytest.raises(SystemExit, match="130"):
        train.heed(signal.SIGINT, signals)
    assert [number for number, _ in signals] == [signal.SIGINT] * 2 + [signal.SIGTERM] * 2


def test_a_models_folder_is_never_overwritten(base, data, here, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "precious")
    assert here("precious", "--overwrite")[0] == 2
    assert "a model's folder, not a run's" in capsys.readouterr().err
    assert (tmp_path / "precious/model.safetensors").exists()


def test_a_kill_in_a_runs_first_moment_leaves_a_usable_folder(here, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json.tmp").touch()
    assert here("run", "--resume")[0] == 0


def test_a_torn_line_of_the_log_is_cut(here, tmp_path):
    assert here("run", "--checkpoint-every", 1)[0] == 0
    log = tmp_path / "run/log.jsonl"
    lines = log.read_text().splitlines(True)
    log.write_text(lines[0] + lines[1][:30] + "\n" + lines[1])
    code, left = here("run", "--resume")
    assert code == 0 and [line["step"] for line in left] == [1]


def test_a_full_disk_is_one_line(base, data, tmp_path):
    """Files of at most 40 kB: the first checkpoint does not fit."""
    done = command(base, data, tmp_path / "run", preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (40_000, 40_000)))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "train.py: " in done.stderr, done.stderr
    assert not (tmp_path / "run/checkpoint.safetensors").exists()


@pytest.mark.slow
def test_what_one_rank_refuses_all_say(base, data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").touch()
    with two_ranks(base, data, tmp_path / "run") as ranks:
        said = [process.communicate(timeout=60)[1] for process in ranks]
    assert all("not empty and not a run" in line and line.count("\n") == 1 for line in said), said
    assert [process.returncode for process in ranks] == [2, 2]


def test_nan_stops_the_run_and_names_the_batch(base, data, tmp_path):
    assert command(base, data, tmp_path / "first").returncode == 0
    adapter = tmp_path / "first/adapter_model.safetensors"
    from safetensors.torch import save_file
    save_file({k: t * torch.nan for k, t in load_file(adapter).items()}, adapter)
    done = command(base, data, tmp_path / "second", "--init-adapter", tmp_path / "first")
    assert done.returncode == 2 and "step 1: loss nan" in done.stderr and done.stderr.count("\n") == 1
    assert "data.jsonl" in done.stderr and not (tmp_path / "second/checkpoint.safetensors").exists()
    with pytest.raises(UserError, match="first checkpoint"):
        Embedder.load(tmp_path / "second")
    assert len(json.loads((tmp_path / "second/bad_batch.json").read_text())["examples"]) == 8


def not_a_number(value, vectors):
    return value * torch.nan


def infinite(value, vectors):
    return value + torch.inf


def steep(value, vectors):
    return value + (vectors.sum() * 0).sqrt()                 # a loss like any other, its gradient is 0 / 0


@pytest.mark.parametrize("broken, said", [(not_a_number, "loss nan"), (infinite, "loss inf"),
                                          (steep, "gradient norm nan")])
def test_what_is_not_finite_leaves_the_last_good_checkpoint(here, tmp_path, monkeypatch, capsys, broken, said):
    steps, info_nce = [], train.info_nce

    def third_is_broken(q, d, *more):
        steps.append(len(steps) + 1)
        value = info_nce(q, d, *more)
        return broken(value, q) if len(steps) == 3 else value
    monkeypatch.setattr(train, "info_nce", third_is_broken)
    assert here("run", "--max-steps", 3, "--checkpoint-every", 1)[0] == 2
    err = capsys.readouterr().err
    assert "step 3: " in err and said in err and err.count("\n") == 1
    with safe_open(tmp_path / "run/checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["state"])["step"] == 2
    for name in ("checkpoint.safetensors", "adapter_model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "run" / name).values())


def test_training_goes_on_from_an_adapter(base, data, tmp_path):
    assert command(base, data, tmp_path / "first").returncode == 0
    done = command(base, data, tmp_path / "second", "--init-adapter", tmp_path / "first", "--lr", "1e-9")
    assert done.returncode == 0, done.stderr
    a, b = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("first", "second"))
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


def test_mistral_7b_at_rank_16_trains_41_943_040_parameters(base, tmp_path):
    """The paper's figure, on the meta device, where 7B parameters take no memory."""
    (tmp_path / "config.json").write_text(json.dumps(bench_memory.MISTRAL_7B))
    with torch.device("meta"):
        decoder = Decoder(Config.load(tmp_path / "config.json"))
    decoder.add_lora(16)
    assert train.lora_size(decoder) == (32 * 7, 41_943_040)
    decoder.add_lora(8, targets=("q_proj", "v_proj"))                  # over the first: five projections keep rank 16
    with pytest.raises(UserError, match="would be trained"):
        train.lora_size(decoder)


def test_a_run_checks_what_it_trains_before_it_starts(base, data, tmp_path, monkeypatch):
    load = train.load_model

    def with_another_parameter(args):
        embedder = load(args)
        embedder.decoder.norm.weight.requires_grad_()
        return embedder
    monkeypatch.setattr(train, "load_model", with_another_parameter)
    with pytest.raises(UserError, match="does not fit this base"):
        train.train(options(base, data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more, complaint", [
    (("--batch-size", 0), "--batch-size 0"), (("--lora-dropout", 1.5), "--lora-dropout"), (("--max-length", 2), "max_length 2"),
    (("--data", "nowhere.jsonl"), "nowhere.jsonl"), (("--init-adapter", "nowhere"), "nowhere"),
    (("--seed", -1), "--seed -1"), (("--out", "/proc/nope"), "/proc/nope"), (("--negatives", -1), "--negatives -1"), (("--matryoshka", 9999), "--matryoshka 9999"),
])
def test_user_errors_are_one_line(base, data, tmp_path, more, complaint):
    done = command(base, data, tmp_path / "run", *more)
    assert done.returncode == 2 and complaint in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_held_out_examples_are_scored(base, data, tmp_path):
    done = command(base, data, tmp_path / "run", "--eval-data", data, "--eval-every", 2)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert ["eval_loss" in line for line in log] == [False, True, False]
    plain = command(base, data, tmp_path / "plain")                        # scoring must not disturb training
    assert plain.returncode == 0
    a, b = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("run", "plain"))
    assert all(torch.equal(a[k], b[k]) for k in a)


READ = """
import re, sys
from pathlib import Path
from batches import Examples
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
examples = Examples([sys.argv[1]])
assert examples[len(examples) - 1]["query"] == f"question {len(examples) - 1}"
print(peak() - before)
"""


@pytest.mark.slow
def test_a_large_file_is_not_held_in_memory(tmp_path):
    """300 MB of examples; what stays is 48 bytes a line."""
    with open(tmp_path / "large.jsonl", "w") as file:
        for i in range(50_000):
            file.write(json.dumps({"query": f"question {i}", "pos": [f"answer {i}"], "neg": ["x" * 6000]}) + "\n")
    done = subprocess.run([sys.executable, "-c", READ, tmp_path / "large.jsonl"], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    assert int(done.stdout) < 20_000, done.stdout             # kB


def test_the_held_out_loss_is_the_mean_over_what_is_visited(base, data, tmp_path):
    """By hand, without dropout; of a file with a share, over the part that was drawn."""
    args = options(base, data, tmp_path, "--lora-dropout", 0.5, "--tokens-per-chunk", 64)
    embedder = train.load_model(args)
    for name, parameter in embedder.decoder.lora_parameters().items():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    for spec, visits in ((str(data), 24), (f"{data}:0.25", 6)):
        examples, args.batch_size, total, hits = Examples([spec]), 24, 0.0, 0.0
        found = train.held_out(embedder, examples, args)
        embedder.decoder.eval()
        for numbers in plan_epoch(examples, 24, False, 0, 0):
            rows = [examples[i] for i in numbers]
            q = embedder.encode([row["query"] for row in rows], [row["prompt"] for row in rows])
            d = embedder.encode([row["pos"][0] for row in rows] + [row["neg"][0] for row in rows])
            scores = (q @ d.T).double() / 0.02
            own = scores.diagonal()
            total += float((scores.logsumexp(1) - own).sum())
            hits += int((scores.argmax(1) == torch.arange(len(rows))).sum())
        assert len(rows) == visits and found == pytest.approx((total / visits, hits / visits), rel=1e-4)


@pytest.mark.slow
def test_resume_after_kills_is_bit_identical(base, data, tmp_path):
    """SIGKILL and SIGTERM at random moments, checkpoints at every step so that some fall inside a save."""
    flags = ("--epochs", 20, "--checkpoint-every", 1)                      # 60 steps
    assert command(base, data, tmp_path / "whole", *flags).returncode == 0
    rng, kills = np.random.default_rng(0), 0
    while True:
        process = subprocess.Popen([sys.executable, ROOT / "train.py", "--base", base, "--data", data, "--out", tmp_path / "cut",
                                    "--batch-size", "8", "--max-length", "32", "--lr", "1e-3", "--warmup-steps", "2", "--device",
                                    "cpu", "--resume", *map(str, flags)], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:                                        # wait for the first step, then a random while
            if line.startswith("step ") and kills < 20:
                time.sleep(rng.uniform(0, 0.3))
                process.send_signal([signal.SIGKILL, signal.SIGTERM][kills % 2])
                kills += 1
                break
        process.stdout.read()
        if process.wait() == 0:
            break
    assert kills >= 8
    for name in ("checkpoint.safetensors", "adapter_model.safetensors"):
        a, b = (load_file(tmp_path / run / name) for run in ("whole", "cut"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    steps = [json.loads(x)["step"] for x in (tmp_path / "cut/log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))
