"""plumbing/blocks.py: texts in any number, each embedded once, in the order asked for."""
import json

import torch

import evaluate
from plumbing.blocks import BLOCK, BlockEncoder
from scoring import HashEmbedder, Recorder, encoder, write_task


def test_vectors_come_in_the_order_of_the_rows_and_equal_texts_are_embedded_once():
    embedder = Recorder()
    scorer = encoder(embedder=embedder)
    rows = [{"one": "b", "many": ["a", "a much longer text"]}, {"one": "a", "many": ["b"]}]
    one, many = scorer.embed({"name": "", "kind": "sts", "prompt": ""}, rows, "one", "many")
    assert one.equal(embedder.encode(["b", "a"]))
    assert many.equal(embedder.encode(["a", "a much longer text", "b"]))
    assert scorer.blocks.take_counts() == (3, 0)


def test_long_texts_come_first_and_go_in_blocks():
    embedder = Recorder()
    pairs = [("", "word " * (i % 10)) for i in range(3)] + [("p", f"{i:05}") for i in range(BLOCK)]
    blocks = BlockEncoder(embedder)
    embedder.seen, embedder.calls = [], 0
    vectors = blocks.encode(pairs, "Task")
    expected = HashEmbedder().encode([text for _, text in pairs], normalize=False)
    assert embedder.calls == 2 and vectors.equal(expected)
    lengths = [len(prompt) + len(text) for prompt, text in embedder.seen]
    assert lengths == sorted(lengths, reverse=True) and sorted(embedder.seen) == sorted(pairs)
    assert blocks.encode([], "Task").shape == torch.Size([0, 64])


def test_texts_longer_than_the_limit_are_counted_and_reported(smollm2, tmp_path, capsys):
    """The texts are "short", two long ones and one that stands twice: 2 of 3 are truncated, cached or not."""
    rows = [{"sentence1": "short", "sentence2": "word " * 20, "score": 0},
            {"sentence1": "short", "sentence2": "another " * 6, "score": 1}]
    write_task(tmp_path / "S", {"kind": "sts"}, test=rows)
    write_task(tmp_path / "T", {"kind": "sts"}, test=[{**rows[0], "sentence2": "brief"}] * 2)
    out = tmp_path / "o.json"
    for _ in range(2):
        evaluate.main([str(smollm2), "--tasks", str(tmp_path), "--max-length", "6", "--device", "cpu",
                       "--cache", str(tmp_path / "cache"), "--out", str(out)])
        tasks = json.loads(out.read_text())[smollm2.name]["details"]
        assert [(tasks[name]["cut"], tasks[name]["texts"]) for name in "ST"] == [(2, 3), (0, 2)]
        assert capsys.readouterr().out.count("2 of 3 texts cut at 6 tokens") == 1
