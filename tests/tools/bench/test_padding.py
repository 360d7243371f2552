"""tools/bench/padding.py: a text's vector does not depend on its neighbours, and a fault would be seen."""
import re

import pytest

import model
from scripts import complaint
from tiny import random_model, save, tiny_config
from tools.bench import padding


@pytest.fixture(scope="module")
def folder(tmp_path_factory, mistral_files):
    config = tiny_config(vocab_size=32000, sliding_window=24)
    return save(random_model(config), tmp_path_factory.mktemp("tiny-mistral"), mistral_files)


def test_vectors_hold_in_every_dtype(folder, capsys):
    assert padding.main([str(folder)]) == 0
    table = capsys.readouterr().out
    assert len(re.findall(r"^cpu +(?:float32|bfloat16|float16) .* to alone ", table, re.MULTILINE)) == 12
    assert "above" not in table and table.count("alone, to float32 on the cpu") == 2


def test_a_padding_fault_is_found(folder, monkeypatch, capsys):
    """The commonest fault: reading the last column, which is padding for all but the longest text."""
    monkeypatch.setattr(model, "pool", lambda hidden, lengths, pooling: hidden[:, -1])
    assert padding.main([str(folder), "--dtypes", "float32"]) == 1
    assert "above" in capsys.readouterr().out


def test_texts_that_are_not_utf8_are_one_line(folder, tmp_path, capsys):
    (tmp_path / "texts").write_bytes(b"fine\n\xff\n")
    said = complaint(capsys, padding.main, folder, "--texts", tmp_path / "texts")
    assert "texts:2: not UTF-8" in said
