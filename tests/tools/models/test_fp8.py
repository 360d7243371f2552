"""tools/models/fp8.py: rounding, product and gradient, emulated on a CPU. What a GPU adds is in tests/gpu."""
import pytest
import torch

import model
import train
from model import Embedder, Linear
from plumbing.errors import UserError
from tiny import random_model, relative, save, tiny_config
from tools.models import fp8

WIDTHS = {"vocab_size": 32000, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def base(tmp_path_factory, mistral_files):
    return save(random_model(tiny_config(**WIDTHS)), tmp_path_factory.mktemp("base") / "tiny", mistral_files)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(f'{{"query": "question {i} {"word " * (i % 7)}", "pos": ["answer {i * i}"], '
                            f'"neg": ["wrong {i} {"long " * (i % 5)}"]}}\n' for i in range(16)))
    return path


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e5])
def test_rounding_is_within_a_sixteenth_whatever_the_rows_scale(scale):
    x = random(50, 300) * torch.logspace(-3, 3, 50)[:, None] * scale
    q, s = fp8.rowwise(x)
    assert q.dtype == torch.float8_e4m3fn and s.shape == (50, 1) and q.float().isfinite().all()
    assert ((q.float() * s - x).abs() <= torch.maximum(x.abs() / 16, s * 2 ** -10) * 1.0001).all()
    if scale > 1e-12:
        assert torch.equal(q.float().abs().amax(1), torch.full((50,), fp8.E4M3_MAX))      # no range is wasted
    assert torch.equal(fp8.rowwise(torch.zeros(2, 8))[0].float(), torch.zeros(2, 8))


def test_product_and_input_gradient_are_float_maths_on_rounded_factors():
    """Exactly so for the rounded factors, and within 5 % of the unrounded product, as 3 bits allow."""
    x, w, dy = random(40, 96).requires_grad_(), random(64, 96, seed=1), random(40, 64, seed=2)
    by_row, by_column = fp8.rowwise(w), fp8.rowwise(w.T)
    y = fp8.Product.apply(x, *by_row, *by_column)
    y.backward(dy)

    def rounded(t):
        q, s = fp8.rowwise(t)
        return (q.double() * s.double())
    assert relative(y, rounded(x.detach()) @ rounded(w).T) < 1e-6
    assert relative(x.grad, rounded(dy) @ rounded(w.T).T) < 1e-6
    assert 0.01 < relative(y, x @ w.T) < 0.05 and 0.01 < relative(x.grad, dy @ w) < 0.05


def test_the_emulation_is_what_scaled_mm_computes():
    """On CPUs whose torch has the kernel, the very call that a GPU makes."""
    a, b = fp8.rowwise(random(32, 64)), fp8.rowwise(random(48, 64, seed=1))
    try:
        found = torch._scaled_mm(a[0], b[0].T, scale_a=a[1], scale_b=b[1].T, out_dtype=torch.bfloat16,
                                 use_fast_accum=True)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"no such kernel here: {error}")
    assert relative(found, fp8.product(*a, *b, torch.float32)) < 2 ** -8           # bfloat16's rounding


def test_a_quantised_decoder_trains_lora_near_the_original(base, data):
    m = fp8.measure(base, data, queries=8, max_length=32, device="cpu")
    assert 0.005 < m["vectors"] < 0.3 and 0.005 < m["lora_gradients"] < 0.5 and m["gradient_cosine"] > 0.9


def test_quantise_replaces_every_projection_and_only_those(base):
    embedder = Embedder.load(base, device="cpu")
    shapes = [m.weight.shape for m in embedder.decoder.projections()]
    fp8.quantise(embedder.decoder)
    made = embedder.decoder.projections()
    assert [m.weight.shape for m in made] == shapes and len(made) == 3 * 7
    for m in made:
        assert type(m) is fp8.Fp8Linear and m.weight.dtype == m.by_column.dtype == torch.float8_e4m3fn
        assert not m.weight.requires_grad and m.by_column.shape == m.weight.T.shape
    embedder.decoder.add_lora(4, 8)
    assert all(m.lora_A.shape == (4, m.weight.shape[1]) for m in made)  # adapters still find their shapes
    assert embedder.decoder.embed_tokens.weight.dtype == torch.float32


def test_what_loads_inside_the_context_is_quantised_and_nothing_after(base):
    with fp8.loading():
        inside = Embedder.load(base, device="cpu")
    outside, load = Embedder.load(base, device="cpu"), model.load_decoder
    kinds = [{type(m) for m in e.decoder.projections()} for e in (inside, outside)]
    assert kinds == [{fp8.Fp8Linear}, {Linear}] and load.__module__ == "model"
    texts = ["a text", "another, longer text"]
    assert 0.001 < relative(inside.encode(texts), outside.encode(texts)) < 0.3


def test_a_run_in_fp8_does_not_go_on_in_another_precision(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda number, handler: None)      # pytest keeps its own
    flags = ["--base", str(base), "--data", str(data), "--out", str(tmp_path / "run"), "--device", "cpu",
             "--batch-size", "8", "--max-length", "16", "--max-steps", "1"]
    with fp8.loading():
        assert train.main(flags) == 0
    with pytest.raises(UserError, match="made with another base_dtype"):
        train.main([*flags, "--resume"])
    with fp8.loading():
        assert train.main([*flags, "--resume"]) == 0


def test_odd_widths_are_refused(tmp_path, mistral_files):
    config = tiny_config(**{**WIDTHS, "intermediate_size": 100})
    odd = save(random_model(config), tmp_path / "odd", mistral_files)
    with pytest.raises(UserError, match="sixteens"):
        fp8.quantise(Embedder.load(odd, device="cpu").decoder)
