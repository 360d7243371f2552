"""What only a GPU shows: 16-bit vectors, torch.compile, and dropout that replays under it.

GPU_TESTS_ON=cpu runs the same tests without one (minutes: the compiler is slow), to check the tests.
They need no package beyond the run-time ones and pytest: `pytest --noconftest -m gpu tests/gpu/test_gpu.py`.
"""
import os
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from model import Embedder, to_device
from plumbing.examples import Examples
from tools.bench import gpu as bench
from tools.models import fp8

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
absent = DEVICE == "cuda" and not torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(absent, reason="needs a CUDA device")]
CONFIG = {**bench.TINY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
LENGTHS = (3, 17, 40, 64, 9, 128, 33)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "small"
    torch.manual_seed(0)
    bench.make_base(folder, CONFIG, "float32")
    bench.ragged_examples(folder / "examples.jsonl", 24)
    return folder


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def load(base, dtype="float32", compiled=False, dropout=0.0, device=DEVICE, **overrides) -> Embedder:
    """An embedder with an adapter that does something, as train.py sets it up."""
    embedder = Embedder.load(base, device=device, dtype=dtype, max_length=128, **overrides)
    embedder.decoder.add_lora(8, 16, dropout)
    generator = torch.Generator().manual_seed(1)
    for name, p in embedder.decoder.lora_parameters().items():
        if name.endswith("lora_B"):
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    return embedder.compile(compiled)


def texts():
    rng = np.random.default_rng(0)
    return [" ".join(f"w{word}" for word in rng.integers(3, 32000, length)) for length in LENGTHS]


def relative(found, wanted) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("dtype, limit", [("bfloat16", 0.03), ("float16", 0.004)])
def test_16_bit_vectors_are_near_float32s(base, dtype, limit):
    wanted, found = load(base).encode(texts()), load(base, dtype).encode(texts())
    print(f"{dtype} to float32: {relative(found, wanted):.1e}")
    assert 0 < relative(found, wanted) < limit


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has no cuDNN")
def test_attention_leaves_cudnn_alone(base):
    """It builds a plan for each new (texts, length), which takes longer than the product itself."""
    load(base)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("dtype, limit", [("float32", 1e-5), ("bfloat16", 0.02)])
def test_compiled_vectors_are_the_same(base, dtype, limit):
    wanted, found = load(base, dtype).encode(texts()), load(base, dtype, compiled=True).encode(texts())
    print(f"compiled to eager in {dtype}: {relative(found, wanted):.1e}")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0          # it did compile
    assert relative(found, wanted) < limit


@pytest.mark.parametrize("compiled", [False, True])
def test_texts_beyond_the_window_are_as_on_the_cpu(base, compiled):
    wanted = load(base, device="cpu", sliding_window=24).encode(texts())
    found = load(base, compiled=compiled, sliding_window=24).encode(texts())
    assert relative(found, wanted) < 1e-4 < relative(load(base).encode(texts()), wanted)


def gradient(embedder, base, keep_tokens, seed=0):
    """One cached-gradient step -> (loss, gradient, the most by which a value differs between its passes)."""
    examples = Examples([str(base / "examples.jsonl")])
    args = train.options(["--base", str(base), "--data", str(base / "examples.jsonl"), "--out", "unused"])
    batch = train.prepare(examples, np.arange(8), embedder.tokenize, args, step=0)
    embedder.decoder.train()
    parameters = list(embedder.decoder.lora_parameters().values())
    for p in parameters:
        p.grad = None
    valid = to_device(batch.valid, embedder.device)
    chunks = train.make_chunks(batch, 512, embedder.device)
    kept = train.chunks_to_keep(chunks, keep_tokens)
    vectors = torch.zeros(batch.text_count, CONFIG["hidden_size"], device=embedder.device)
    passes = {}                                        # a chunk's first text -> its vectors, of each pass

    def embed(rows):
        v = embedder.embed(rows)
        passes.setdefault(tuple(rows[0]), []).append(v.detach())
        return v

    def loss_of(v):
        return train.batch_loss(v, 8, valid, args)
    loss = train.cached_gradients(embed, chunks, vectors, loss_of, kept, (seed,))
    assert all(len(seen) == (1 if kept else 2) for seen in passes.values()) and kept in (0, len(chunks))
    drift = max((seen[-1] - seen[0]).abs().max() for seen in passes.values())
    return loss.item(), torch.cat([p.grad.flatten() for p in parameters]), drift.item()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype, limit", [("float32", 1e-5), ("bfloat16", 0.01)])
def test_dropout_masks_replay_in_the_second_pass(base, dtype, limit, compiled):
    embedder = load(base, dtype, compiled, dropout=0.3)
    loss, once, drift = gradient(embedder, base, keep_tokens=0)
    _, kept, none = gradient(embedder, base, keep_tokens=10 ** 9)      # one pass: nothing to replay
    other, _, _ = gradient(embedder, base, keep_tokens=0, seed=1)
    print(f"{dtype}, compiled={compiled}: passes differ by {drift:.1e}, "
          f"gradients by {relative(once, kept):.1e}")
    assert drift <= limit and none == 0
    assert abs(other - loss) > 0.01                                    # another seed draws other masks
    assert relative(once, kept) < 0.1


def begin(base, out, *flags):
    """A run of four steps that is ready for the first -> (run, its batches)."""
    args = train.options(["--base", str(base), "--data", str(base / "examples.jsonl"), "--out", str(out),
                          "--device", DEVICE, "--batch-size", "6", "--max-length", "128", "--max-steps", "4",
                          *flags])
    examples = Examples(args.data)
    plan = train.plan_run(examples, args)
    run = train.start(args, train.load_model(args), examples, len(plan))
    return run, train.batches_ahead(examples, plan, 0, run.embedder.tokenize, args)


def step(run, batch):
    run.step += 1
    return train.training_step(run, batch, 0.0)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has nobody to wait for")
def test_a_step_waits_for_the_gpu_once(base, tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda number, handler: None)  # pytest keeps its own
    run, batches = begin(base, tmp_path / "run", "--dtype", "bfloat16", "--keep-tokens", "0")
    step(run, next(batches))                                           # compiles
    batch = next(batches)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            step(run, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(wait.message) for wait in waits if "synchroniz" in str(wait.message)]
    assert len(waits) == 1, waits                                      # for the log's figures


@pytest.mark.parametrize("flags", [("--dtype", "bfloat16"), ("--dtype", "float16"),
                                   ("--dtype", "float32", "--activation-checkpointing", "--compile")])
def test_a_run_that_stops_goes_on(base, tmp_path, monkeypatch, flags):
    """On a GPU sums come in any order, so the adapter is nearly the same; on a CPU it is the same."""
    monkeypatch.setattr("signal.signal", lambda number, handler: None)  # pytest keeps its own
    tried, step, worst_step = [], train.training_step, train.worst_step
    monkeypatch.setattr(train, "worst_step", lambda run: (tried.append(1), worst_step(run)))
    line = ["--base", str(base), "--data", str(base / "examples.jsonl"), *flags, "--device", DEVICE,
            "--lr", "1e-3", "--batch-size", "6", "--max-length", "128", "--max-steps", "4",
            "--checkpoint-every", "2", "--resume"]

    def third_is_stopped(run, batch, started):
        if run.step == 3:
            raise KeyboardInterrupt
        return step(run, batch, started)
    assert train.main([*line, "--out", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(train, "training_step", third_is_stopped)
    with pytest.raises(KeyboardInterrupt):
        train.main([*line, "--out", str(tmp_path / "stopped")])
    monkeypatch.setattr(train, "training_step", step)
    assert train.main([*line, "--out", str(tmp_path / "stopped")]) == 0

    def adapter(run):
        tensors = load_file(tmp_path / run / "adapter_model.safetensors").values()
        return torch.cat([tensor.flatten() for tensor in tensors])
    assert adapter("whole").isfinite().all() and relative(adapter("stopped"), adapter("whole")) < 1e-2
    assert len(tried) == (3 if DEVICE == "cuda" else 0)


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)         # it would go on, uncompiled
def test_many_lengths_do_not_recompile(base):
    """After the first few shapes, no new ones: lengths and rows are dynamic."""
    embedder, rng = load(base, "bfloat16", compiled=True), np.random.default_rng(0)
    embedder.decoder.train()
    stats = torch._dynamo.utils.counters["stats"]

    def step(rows, length):
        ids = [[1] + rng.integers(3, 32000, length - 2).tolist() + [2]] * rows
        with torch.no_grad():
            embedder.embed(ids)
        embedder.embed(ids).sum().backward()
    for rows, length in ((4, 32), (2, 57), (1, 100), (7, 11)):
        step(rows, length)
    before = stats["unique_graphs"]
    for _ in range(30):
        step(int(rng.integers(2, 12)), int(rng.integers(3, 128)))
    print(f"{before} graphs for the first four shapes, {stats['unique_graphs'] - before} for thirty more")
    assert before <= 8 and stats["unique_graphs"] == before


def needs_fp8():
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8 units")


def test_fp8_products_are_their_emulation():
    """Forward and input gradient: the chip's kernel, then the same rounding and float32 on the CPU."""
    needs_fp8()
    generator = torch.Generator().manual_seed(0)
    shapes = ((70, 256), (512, 256), (70, 512))
    x, w, dy = (torch.randn(*shape, generator=generator).bfloat16() for shape in shapes)
    found = []
    for device in (DEVICE, "cpu"):
        ours = x.to(device, copy=True).requires_grad_()
        y = fp8.Product.apply(ours, *fp8.rowwise(w.to(device)), *fp8.rowwise(w.to(device).T.contiguous()))
        y.backward(dy.to(device))
        found.append((y.detach().cpu(), ours.grad.cpu()))
    assert relative(found[0][0], found[1][0]) < 0.005 and relative(found[0][1], found[1][1]) < 0.005
    assert 0.01 < relative(found[0][0], x.double() @ w.double().T) < 0.06


@pytest.mark.parametrize("compiled", [False, True])
def test_fp8_vectors_and_gradients_are_near(base, compiled):
    needs_fp8()
    plain = load(base, "bfloat16")
    with fp8.loading():
        rounded = load(base, "bfloat16", compiled)
    (_, wanted, _), (_, found, drift) = (gradient(e, base, keep_tokens=0) for e in (plain, rounded))
    vectors = relative(rounded.encode(texts()), plain.encode(texts()))
    print(f"fp8, compiled={compiled}: vectors differ by {vectors:.1e}, gradients by "
          f"{relative(found, wanted):.1e}, passes by {drift:.1e}")
    assert 0 < vectors < 0.15 and 0 < relative(found, wanted) < 0.6 and drift < 0.02
