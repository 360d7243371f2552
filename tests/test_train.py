"""The proof of train.py: the loss is the paper's, the cached gradient is the gradient, a batch holds what it should."""
import argparse
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import get_linear_schedule_with_warmup

import train
from model import Embedder, load_decoder
from one_device import OneDevice
from plumbing.checkpoint import load_tokenizer
from plumbing.examples import Examples
from plumbing.run import Run
from runs import ROOT, options, read_log, record, run_train, write_lines


def test_the_defaults_are_the_papers():
    args = train.options(["--base", "b", "--data", "d", "--out", "o"])
    assert (args.batch_size, args.negatives, args.max_length, args.temperature) == (2048, 1, 512, 0.02)
    assert (args.lr, args.warmup_steps, args.weight_decay, args.epochs) == (1e-4, 100, 0.1, 1)
    assert (args.lora_rank, args.lora_alpha, args.lora_dropout, args.pooling) == (16, 32, 0.1, None)
    assert (args.instruction, args.both_sides, args.batches) == ("task", False, "mixed")


# ------------------------------------------------------------------------------------------------ the loss

def unit(rows, size, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, size, generator=generator, dtype=torch.float64), dim=-1)


def test_info_nce_is_equation_2():
    q, d = unit(5, 8, 0), unit(9, 8, 1)
    targets = torch.tensor([3, 0, 8, 1, 5])
    valid = torch.rand(5, 9, generator=torch.Generator().manual_seed(2)) > 0.3
    valid[torch.arange(5), targets] = True
    wanted = 0.0
    for i, target in enumerate(targets):
        phi = torch.exp(torch.cosine_similarity(q[i][None], d) / 0.02)         # Eq. 3
        wanted -= torch.log(phi[target] / phi[valid[i]].sum()) / 5             # Eq. 2
    assert torch.allclose(train.info_nce(q, d, targets, 0.02, valid), wanted, rtol=1e-12)
    assert train.info_nce(q, d, targets, 0.02).dtype == torch.float64
    assert train.info_nce(q.bfloat16(), d.bfloat16(), targets, 0.02).dtype == torch.float32


def test_margin_masks_what_scores_above_the_positive():
    q = torch.tensor([[1.0, 0.0]])
    d = torch.tensor([[0.8, 0.6], [1.0, 0.0], [0.0, 1.0]])                     # cosines 0.8 (its own), 1, 0
    left = torch.tensor([0.8, 0.0])
    loss = train.info_nce(q, d, torch.tensor([0]), 1.0, margin=0.1)
    assert torch.allclose(loss, torch.logsumexp(left, 0) - 0.8)
    assert train.info_nce(q, d, torch.tensor([0]), 1.0, margin=-0.9) == 0      # all others go, the target never


def test_matryoshka_averages_over_cuts():
    q, d, targets = unit(4, 8, 0), unit(4, 8, 1), torch.arange(4)

    def loss(a, b):
        return train.info_nce(a, b, targets, 0.1)

    short = loss(F.normalize(q[:, :3], dim=-1), F.normalize(d[:, :3], dim=-1))
    assert torch.allclose(train.matryoshka(loss, q, d, [3]), (loss(q, d) + short) / 2)
    assert torch.equal(train.matryoshka(loss, q, d, []), loss(q, d))


def test_accuracy_counts_ties_and_nan_as_misses():
    e, valid, targets = torch.eye(3), torch.ones(3, 3, dtype=torch.bool), torch.arange(3)
    assert train.in_batch_accuracy(e, e, targets, valid) == 1
    assert train.in_batch_accuracy(torch.ones(3, 3), torch.ones(3, 3), targets, valid) == 0
    assert train.in_batch_accuracy(e * torch.nan, e, targets, valid) == 0
    q = torch.tensor([[1.0, 0.1, 0.0], [0.1, 1.0, 0.0], [0.0, 0.0, 1.0]])
    swapped = e[[1, 0, 2]]
    assert train.in_batch_accuracy(q, swapped, targets, valid) == pytest.approx(1 / 3)
    valid[0, 1] = valid[1, 0] = False                                          # the better ones do not count
    assert train.in_batch_accuracy(q, swapped, targets, valid) == 1


def test_spread_is_the_mean_cosine_distance():
    v = unit(6, 4, 0)
    assert torch.allclose(train.spread(v), (1 - v @ v.T).mean())
    assert train.spread(v[:1].expand(5, 4)) == pytest.approx(0, abs=1e-12)


# ------------------------------------------------------------------------------------ the cached gradient

@pytest.fixture
def double(base, data, tmp_path):
    """A float64 embedder with a LoRA that does something, and a batch of 12 queries and 24 ragged documents."""
    embedder = Embedder.load(base, dtype="float64", max_length=32)
    embedder.decoder.add_lora(4, 8, 0.0)
    embedder.decoder.double().train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in embedder.decoder.lora_parameters().items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    args = options(base, data, tmp_path / "run")
    return embedder, train.prepare(Examples([str(data)]), np.arange(12), embedder.tokenize, args, step=0)


def loss_of(batch):
    targets = torch.arange(batch.query_count)
    return lambda v: train.info_nce(v[:batch.query_count], v[batch.query_count:], targets, 0.02, batch.valid)


def flat_gradient(embedder):
    return torch.cat([parameter.grad.flatten() for parameter in embedder.decoder.lora_parameters().values()])


def one_graph(embedder, batch, tokens_per_chunk, key):
    """The reference: the same chunks with the same dropout, in one ordinary graph -> (loss, gradient)."""
    embedder.decoder.zero_grad()
    vectors = [None] * batch.text_count
    for number, chunk in enumerate(train.make_chunks(batch, tokens_per_chunk, embedder.device)):
        train.seed_chunk(*key, number)
        for position, v in zip(chunk.indices, embedder.embed(chunk.token_ids)):
            vectors[position] = v
    loss = loss_of(batch)(torch.stack(vectors))
    loss.backward()
    return loss.detach(), flat_gradient(embedder)


def cached(embedder, batch, tokens_per_chunk, keep_tokens, key=(0,)):
    """(loss, gradient, vectors) by cached_gradients."""
    embedder.decoder.zero_grad()
    chunks = train.make_chunks(batch, tokens_per_chunk, embedder.device)
    kept = train.chunks_to_keep(chunks, keep_tokens)
    vectors = torch.zeros(batch.text_count, 32, dtype=torch.float64)
    loss = train.cached_gradients(embedder.embed, chunks, vectors, loss_of(batch), kept, key)
    return loss, flat_gradient(embedder), vectors


def close(value, reference):
    return (value - reference).norm() / reference.norm() <= 1e-9


def test_the_idea_alone_is_the_gradient(double):
    embedder, batch = double
    _, wanted = one_graph(embedder, batch, 10**9, (0,))
    rows = [None] * batch.text_count
    for position, row in zip(batch.indices, batch.token_ids):
        rows[position] = row
    embedder.decoder.zero_grad()
    train.cached_gradient_idea(embedder.embed, [rows[i:i + 5] for i in range(0, len(rows), 5)], loss_of(batch))
    assert close(flat_gradient(embedder), wanted)


@pytest.mark.parametrize("keep", [0, 100, 10**9])
@pytest.mark.parametrize("chunk", [1, 40, 100, 333, 10**9])
def test_cached_gradient_is_the_one_shot_gradient(double, chunk, keep):
    embedder, batch = double
    wanted_loss, wanted = one_graph(embedder, batch, 10**9, (0,))
    loss, gradient, _ = cached(embedder, batch, chunk, keep)
    assert loss.dtype == gradient.dtype == torch.float64
    assert torch.allclose(loss, wanted_loss, rtol=1e-9) and close(gradient, wanted)


@pytest.mark.parametrize("keep", [0, 100, 10**9])
def test_dropout_replays_in_the_second_pass(double, keep):
    embedder, batch = double
    for module in embedder.decoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    key = (7, 3, 0)
    wanted_loss, wanted = one_graph(embedder, batch, 100, key)
    seen, embed = {}, embedder.embed

    def watched(rows):
        v = embed(rows)
        seen.setdefault(str(rows), []).append(v.detach())
        return v

    embedder.embed = watched
    loss, gradient, _ = cached(embedder, batch, 100, keep, key)
    assert torch.equal(loss, wanted_loss) and close(gradient, wanted)
    for first, *second in seen.values():                                       # to the bit
        assert all(v.equal(first) for v in second) and (keep or second)
    assert cached(embedder, batch, 100, keep, (7, 4, 0))[0] != loss            # another step draws other masks


def test_kept_chunks_are_embedded_once(double):
    embedder, batch = double
    chunks = train.make_chunks(batch, 100, embedder.device)
    tokens = [chunk.tokens for chunk in chunks]
    assert tokens == [len(chunk.token_ids) * max(map(len, chunk.token_ids)) for chunk in chunks] and len(tokens) > 3
    passes = []
    embedder.decoder.register_forward_pre_hook(lambda *_: passes.append(1))
    for keep, again in ((10**9, 0), (0, len(chunks)), (tokens[0] + tokens[1], len(chunks) - 2)):
        passes.clear()
        cached(embedder, batch, 100, keep)
        assert len(passes) == len(chunks) + again


def test_activation_checkpointing_changes_nothing(double):
    embedder, batch = double
    _, wanted, _ = cached(embedder, batch, 100, 0)
    embedder.decoder.activation_checkpointing = True
    calls = []
    embedder.decoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    _, gradient, _ = cached(embedder, batch, 100, 0)
    chunks = train.make_chunks(batch, 100, embedder.device)
    assert close(gradient, wanted)
    assert len(calls) == 3 * len(chunks)                   # pass one, pass two, and again for its gradient


@pytest.mark.parametrize("queries, tokens, ranks", [
    (12, 100, 2), pytest.param(5, 60, 2, marks=pytest.mark.slow), pytest.param(1, 1000, 2, marks=pytest.mark.slow),
    (1, 1000, 4)])
def test_ranks_give_the_gradient_of_one(base, data, tmp_path, queries, tokens, ranks):
    """Real processes over gloo, float64; the 3 texts of 1 query leave two ranks uneven, and one of four idle."""
    results = []
    for world in (1, ranks):
        out = tmp_path / f"{world}.pt"
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world),
             ROOT / "tests/support/one_step.py", base, data, str(queries), str(tokens), out],
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
        results.append(torch.load(out))
    (loss, gradient, vectors), (loss2, gradient2, vectors2) = results
    assert torch.allclose(loss, loss2, rtol=1e-9) and torch.allclose(vectors, vectors2, rtol=1e-9)
    assert gradient.norm() > 0 and close(gradient2, gradient)


# ---------------------------------------------------------------------------- which examples make a batch

@pytest.mark.parametrize("homogeneous", [False, True])
def test_an_epoch_visits_each_example_once_in_another_order(data, homogeneous):
    examples = Examples([str(data)])
    first, again, second = (train.plan_epoch(examples, 5, homogeneous, 0, epoch) for epoch in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    flat = np.concatenate(first)
    assert sorted(flat) == list(range(24)) and not np.array_equal(flat, np.concatenate(second))
    if homogeneous:                     # 12 + 12 examples in batches of 5: two full ones a type, the rest mixed
        pure = [len(set(examples.groups[batch])) == 1 for batch in first if len(batch) == 5]
        assert sum(pure) == 4


def test_a_plan_ends_where_the_steps_do(data, base, tmp_path):
    examples = Examples([str(data)])                                           # three batches of eight an epoch
    plans = [train.plan_run(examples, options(base, data, tmp_path, *flags)) for flags in (
        ("--epochs", 10**5, "--max-steps", 4), ("--epochs", 2), ("--epochs", 2, "--max-steps", 10**9))]
    assert [len(plan) for plan in plans] == [4, 6, 6]
    assert all(np.array_equal(a, b) for a, b in zip(plans[0], plans[1]))


def test_a_share_draws_another_part_each_epoch(tmp_path):
    paths = [write_lines(tmp_path / name, [record(i, query=f"{name} {i}") for i in range(20)]) for name in "ab"]
    examples = Examples([f"{paths[0]}:0.25", str(paths[1])])
    epochs = [np.concatenate(train.plan_epoch(examples, 7, False, 0, epoch)) for epoch in range(3)]
    assert [sum(examples.files[numbers] == 0) for numbers in epochs] == [5, 5, 5]
    assert [sum(examples.files[numbers] == 1) for numbers in epochs] == [20, 20, 20]
    assert len({frozenset(numbers[examples.files[numbers] == 0]) for numbers in epochs}) == 3


def texts_of(examples, numbers, args, step=0):
    """A batch whose `rows` are texts instead of token ids, in the batch's order."""
    batch = train.prepare(examples, numbers, lambda texts, prompts: texts, args, step)
    return batch, [batch.token_ids[i] for i in batch.indices.argsort()]


def test_known_positives_are_masked_and_the_target_never_is(tmp_path, base):
    records = [
        {"prompt": "t", "query": "q", "pos": ["A"], "neg": ["B"]},       # B is a positive of the same query below
        {"prompt": "t", "query": "q", "pos": ["B"], "neg": ["C"]},
        {"prompt": "other", "query": "q", "pos": ["A"], "neg": ["D"]},   # another task: its A is its own
        {"prompt": "t", "query": "r", "pos": ["B", "B"], "neg": []},
    ]
    examples = Examples([str(write_lines(tmp_path / "a.jsonl", records))])
    args = options(base, "unread", tmp_path / "run")
    batch, texts = texts_of(examples, np.arange(4), args)
    assert texts == ["q", "q", "q", "r", "A", "B", "A", "B", "B", "C", "D"]    # queries, positives, negatives
    assert batch.valid.tolist() == [
        [True, False, False, False, False, True, True],     # A again in column 2, B in 1, 3 and 4
        [False, True, False, False, False, True, True],
        [False, True, True, True, True, True, True],        # its own A stays, the other A goes
        [True, False, True, True, False, True, True],
    ]
    args.no_mask = True
    assert texts_of(examples, np.arange(4), args)[0].valid.all()


def test_a_batch_is_a_function_of_the_step(tmp_path, base):
    records = [{"query": f"q{i}", "pos": [f"p{i}{k}" for k in range(4)], "neg": [f"n{i}{k}" for k in range(4)]}
               for i in range(6)]
    examples = Examples([str(write_lines(tmp_path / "a.jsonl", records))])
    args = options(base, "unread", tmp_path / "run", "--negatives", 2)
    third, again, fourth = (texts_of(examples, np.arange(6), args, step)[1] for step in (3, 3, 4))
    assert third == again != fourth and len(third) == 6 * (1 + 1 + 2)
    # The draws of step 3, as runs have had them since the first: a resume must not see others.
    assert third[6:12] == ["p03", "p10", "p22", "p33", "p42", "p50"]
    assert third[12:16] == ["n00", "n01", "n12", "n10"]


def test_ranks_share_a_batch_without_overlap(data, base, tmp_path):
    args = options(base, data, tmp_path)
    examples = Examples([str(data)])
    parts = [train.prepare(examples, np.arange(5), lambda t, p: t, args, 0, part, 3) for part in range(3)]
    assert sorted(np.concatenate([part.indices for part in parts])) == list(range(15))
    assert all(part.text_count == 15 and part.valid.equal(parts[0].valid) for part in parts)


@pytest.mark.parametrize("style, wanted", [
    ("task", [("T", "q")] * 4), ("none", [("", "q")] * 4),
    ("prefix", [("", "classify: q"), ("", "query: q"), ("", "q"), ("", "q")]),
])
def test_instruction_styles_of_the_ablation(style, wanted):
    kinds = ("long-short", "short-long", "sts", "bitext")
    examples = [{"prompt": "T", "query": "q", "type": kind} for kind in kinds]
    assert [train.with_instruction(example, style) for example in examples] == wanted


@pytest.mark.parametrize("style, wanted", [("task", ["T", "", "T"]), ("none", [""] * 3), ("prefix", [""] * 3)])
def test_documents_of_symmetric_tasks_get_the_instruction_if_queries_do(style, wanted):
    examples = [{"prompt": "T", "type": kind} for kind in ("sts", "short-long", "bitext")]
    args = argparse.Namespace(both_sides=True, instruction=style)
    assert [train.document_instruction(example, args) for example in examples] == wanted
    args.both_sides = False
    assert not any(train.document_instruction(example, args) for example in examples)


# --------------------------------------------------------------------------------------- steps and a run

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


@pytest.fixture
def meta_run(base, data, tmp_path, monkeypatch):
    """A run on `meta`, which stands for a GPU, and its first batch. tolist() gives ones, and counts."""
    args = options(base, data, tmp_path / "run", "--tokens-per-chunk", 32, "--keep-tokens", 64)
    decoder = load_decoder(base, torch.device("meta"), torch.float32)
    decoder.add_lora(4, 8, 0.1)
    decoder.train()
    embedder = Embedder(decoder, load_tokenizer(base, 32000), max_length=32)
    torch_optimizer = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(torch_optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    optimizer = torch.optim.AdamW(decoder.lora_parameters().values(), lr=args.lr, fused=True)
    examples = Examples([str(data)])
    run = Run(args, embedder, optimizer, examples, 1)
    run.step, run.waits = 1, 0

    def tolist(tensor):
        run.waits += 1
        return [1.0] * tensor.numel()

    batch = train.prepare(examples, np.arange(3), embedder.tokenize, args, step=0)
    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    return run, batch


def test_a_step_stays_on_its_device_and_waits_for_it_once(meta_run):
    run, batch = meta_run
    with OneDevice():
        train.worst_step(run)
        assert run.waits == 0
        line = train.training_step(run, batch, 0.0)
    assert run.waits == 1 and {"loss", "grad_norm", "tokens", "lr"} <= line.keys()
    assert all(state["exp_avg"].device.type == "meta" for state in run.optimizer.state.values())


@pytest.mark.parametrize("name, changed", [
    ("spread", lambda vectors: torch.tensor(vectors.mean().item())),                           # waits
    ("to_device", lambda tensor, device: tensor),                                  # stays on the CPU
    ("chunks_to_keep", lambda chunks, tokens: int(chunks[0].indices.max())),                   # waits
])
def test_what_waits_or_strays_is_seen(meta_run, monkeypatch, name, changed):
    run, batch = meta_run
    monkeypatch.setattr(train, name, changed)
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError), match="meta"), OneDevice():
        train.training_step(run, batch, 0.0)


def test_a_run_moves_lora_and_reloads(base, data, tmp_path):
    done = run_train(base, data, tmp_path / "run", "--epochs", 2)
    assert done.returncode == 0, done.stderr
    log = read_log(tmp_path / "run")
    assert [line["step"] for line in log] == list(range(1, 7))
    assert {"loss", "accuracy", "spread", "chance_loss", "lr", "tokens_per_second", "padding"} <= log[0].keys()
    tensors = load_file(tmp_path / "run/adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    assert all(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    trained, plain = Embedder.load(tmp_path / "run"), Embedder.load(base)
    again = Embedder.load(base, adapter=tmp_path / "run")
    texts = ["a question", "an answer that is longer"]
    assert torch.equal(trained.encode(texts), again.encode(texts))
    assert (trained.encode(texts) - plain.encode(texts)).norm() > 1e-3


def test_held_out_loss_by_hand(base, data, tmp_path):
    """Without dropout; of a file with a share, over the part that was drawn."""
    args = options(base, data, tmp_path, "--lora-dropout", 0.5, "--tokens-per-chunk", 64)
    embedder = train.load_model(args)
    for parameter in embedder.decoder.lora_parameters().values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    for spec, visits in ((str(data), 24), (f"{data}:0.25", 6)):
        examples, args.batch_size = Examples([spec]), 24
        scores = train.held_out(embedder, train.held_out_batches(examples, embedder, args), args)
        embedder.decoder.eval()
        numbers, = train.plan_epoch(examples, 24, False, 0, 0)
        rows = [examples[i] for i in numbers]
        q = embedder.encode([row["query"] for row in rows], [row["prompt"] for row in rows])
        d = embedder.encode([row["pos"][0] for row in rows] + [row["neg"][0] for row in rows])
        logits = (q @ d.T).double() / 0.02
        losses = logits.logsumexp(1) - logits.diagonal()
        hits = logits.argmax(1) == torch.arange(len(rows))
        assert len(rows) == visits
        assert scores["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
        assert scores["eval_accuracy"] == pytest.approx(hits.double().mean().item())
