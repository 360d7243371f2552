"""plumbing/cache.py: a rerun embeds nothing anew, whatever stands in the folder."""
import shutil

import pytest
import torch

import evaluate
from model import Embedder
from plumbing.cache import VectorCache
from plumbing.errors import UserError
from scoring import MINI, HashEmbedder, run

PROBES = 3        # calls of encode that no cache spares: two of the probe, one for the length of a vector


def test_vectors_come_back_and_each_model_has_its_own(tmp_path):
    pairs, vectors = [("instruction", "text"), ("", "text")], torch.randn(2, 5)
    cache = VectorCache(tmp_path / "new" / "folder", "a model")
    assert cache.get(pairs) is None
    cache.put(pairs, vectors, 1)
    again, truncated = VectorCache(tmp_path / "new" / "folder", "a model").get(pairs)
    assert again.equal(vectors) and truncated == 1
    assert cache.get(pairs[:1]) is cache.get(pairs[::-1]) is None
    assert VectorCache(tmp_path / "new" / "folder", "another model").get(pairs) is None
    assert all(path.suffix == ".npz" for path in tmp_path.rglob("*") if path.is_file())


def test_a_rerun_takes_its_vectors_from_the_cache(tmp_path):
    """Also one with other tasks before those that were scored."""
    cached, both = ("--cache", tmp_path / "cache"), tmp_path / "both"
    for name in ("Bitext", "STS"):
        shutil.copytree(MINI / name, both / name)
    first, second, bitext, third, other = (HashEmbedder() for _ in range(5))
    one, two = (run(MINI / "STS", *cached, embedder=embedder) for embedder in (first, second))
    assert one["tasks"] == two["tasks"] and second.calls == PROBES < first.calls
    run(MINI / "Bitext", embedder=bitext)
    assert run(both, *cached, embedder=third)["tasks"]["STS"] == one["tasks"]["STS"]
    assert third.calls == bitext.calls
    other.size = 48
    run(MINI / "STS", *cached, embedder=other)
    assert other.calls == first.calls


def test_a_cache_in_float16_gives_the_same_vectors_on_the_first_run_as_on_a_rerun(tmp_path):
    """And half the bytes; the score of STS lies within 0.002 of float32's."""
    small = "--cache", tmp_path / "small", "--cache-dtype", "float16"
    first, again, whole = run(MINI / "STS", *small), run(MINI / "STS", *small), run(
        MINI / "STS", "--cache", tmp_path / "whole")
    assert first["tasks"] == again["tasks"] and abs(first["average"] - whole["average"]) < 0.002
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).rglob("*.npz")) for name in ("small", "whole")]
    assert 0.4 < sizes[0] / sizes[1] < 0.6
    with pytest.raises(UserError, match="--cache-dtype float16: a vector's value is beyond 65,504"):
        VectorCache(tmp_path, "", "float16").put([("", "a")], torch.tensor([[1e5]]), 0)


def test_a_full_disk_ends_no_run(tmp_path, capsys):
    (tmp_path / "cache").write_text("a file stands where the folder should be")
    embedder = HashEmbedder()
    full = run(MINI / "STS", "--cache", tmp_path / "cache", embedder=embedder)
    said = capsys.readouterr().err
    assert said.count("goes on without it") == 1 and f"--cache {tmp_path / 'cache'}: " in said
    assert full["tasks"] == run(MINI / "STS")["tasks"]


@pytest.mark.parametrize("damage", [b"", b"PK\3\4 cut", b"\x80 no archive"])
def test_a_damaged_cache_file_is_made_anew(damage, tmp_path):
    flags = MINI / "STS", "--cache", tmp_path
    first, calls = run(*flags), []
    for content in (damage, None):
        for path in tmp_path.rglob("*.npz") if content is not None else ():
            path.write_bytes(content)
        embedder = HashEmbedder()
        assert run(*flags, embedder=embedder)["tasks"] == first["tasks"]
        calls.append(embedder.calls)
    assert calls[0] > calls[1] == PROBES


def identity(monkeypatch, *flags, embedder=None) -> str:
    """The name under which the cache would know this model."""
    names = []
    monkeypatch.setattr(evaluate, "VectorCache", lambda folder, identity, dtype: names.append(identity))
    args = evaluate.options(["m", "--cache", "unused", *flags])
    evaluate.score_model(embedder or HashEmbedder(), "m", args, [], None)
    return names[0]


def test_models_that_differ_only_past_the_probe_share_no_vectors(smollm2, monkeypatch):
    names = [identity(monkeypatch, embedder=Embedder.load(smollm2, device="cpu", sliding_window=window))
             for window in (None, None, 400)]
    other = Embedder.load(smollm2, device="cpu")
    other.tokenizer.add_tokens(["zzyzx"])
    assert names[0] == names[1] and len({*names, identity(monkeypatch, embedder=other)}) == 3
    assert identity(monkeypatch, embedder=HashEmbedder(48)) != identity(monkeypatch)


@pytest.mark.parametrize("flags", [["--max-length", "33"], ["--pooling", "mean"], ["--dtype", "float16"]])
def test_flags_that_change_vectors_are_in_the_models_identity(flags, monkeypatch):
    plain = identity(monkeypatch)
    assert identity(monkeypatch, *flags) != plain == identity(monkeypatch, "--batch-tokens", "99")
