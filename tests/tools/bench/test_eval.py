"""tools/bench_eval.py: encoding and search beside the packages that users know."""
import re
import sys

import pytest

import bench_eval
from model import Embedder
from plumbing.errors import UserError
from scripts import complaint


def test_our_search_finds_what_numpy_finds(capsys):
    bench_eval.main(["no model", "--texts", "0", "--vectors", "20000", "--dim", "16", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert re.search(r"numpy +\d.* same documents 100.0 %", printed), printed


def test_a_comparison_that_cannot_be_made_gets_one_line(smollm2, monkeypatch, capsys):
    assert "--texts: 0 (no encoding) or at least 2" in complaint(capsys, bench_eval.main, "m", "--texts", 1)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert "`pip install -r requirements-dev.txt`" in complaint(
        capsys, bench_eval.main, smollm2, "--texts", 2)


@pytest.mark.slow
def test_encoding_is_compared_only_where_the_vectors_agree(smollm2, monkeypatch, capsys):
    flags, load = [str(smollm2), "--texts", "6", "--vectors", "0", "--rounds", "1"], Embedder.load
    bench_eval.main(flags)
    printed = capsys.readouterr().out
    assert re.search(r"encode 6 texts.* median cosine of the two 1\.0", printed) and "ratio" in printed
    monkeypatch.setattr(bench_eval.Embedder, "load", lambda *a, **more: load(*a, **more, pooling="mean"))
    with pytest.raises(UserError, match="not the same vectors"):
        bench_eval.main(flags)
