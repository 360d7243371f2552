"""tools/study/peers.py: other people's packages give what the study takes from them."""
import json

import pytest
import torch

import evaluate
from model import Embedder
from plumbing.errors import UserError
from plumbing.table import read_recorded
from plumbing.tasks import find_tasks
from scoring import MINI, ROOT, HashEmbedder, write_task
from tools.study import peers


def test_bm25_ranks_shared_words_first(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\na\t2\t1\nb\t1\t1\n")
    documents = ["the kettle boils", "a heron fishes", "rain on slate roofs", "slate is a stone"]
    for name, rows in (("corpus", documents), ("queries", ["slate roof, rain?", "unknown"])):
        ids = "ab" if name == "queries" else "0123"
        lines = [json.dumps({"_id": i, "text": text}) + "\n" for i, text in zip(ids, rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    task = {"name": "T", "kind": "retrieval", "split": "test", "folder": tmp_path}
    found = peers.bm25([task, {"name": "S", "kind": "sts"}])
    # the first query finds its document at rank 1; all documents tie for the second, whose own is not last
    assert found.keys() == {"T"} and 0.5 + 0.5 * 0.43 <= found["T"] < 1


def test_minilm_is_a_real_embedder():
    model = peers.MiniLM("cpu", 128)
    v = model.encode(["A man plays a guitar.", "Someone is playing an instrument.", "Taxes rose in May."],
                     ["", "", ""], normalize=False)
    assert v.shape == (3, 384) and torch.allclose(v.norm(dim=1), torch.ones(3), atol=1e-5)
    assert v[0] @ v[1] > 0.4 > 0.2 > v[0] @ v[2]


def test_recorded_scores_stand_beside_new_ones_on_the_same_tasks_alone(tmp_path, monkeypatch, capsys):
    pairs = [("A man plays a guitar.", "Someone plays an instrument.", 4),
             ("A man plays a guitar.", "Taxes rose in May.", 0), ("Rain falls.", "It is raining.", 5)]
    rows = [dict(zip(("sentence1", "sentence2", "score"), pair)) for pair in pairs]
    write_task(tmp_path / "T" / "S", {"kind": "sts", "metric": "cosine_spearman"}, test=rows)
    write_task(tmp_path / "T" / "R", {"kind": "retrieval", "metric": "ndcg_at_10"},
               corpus=[{"_id": "1", "text": "rain on slate roofs"}, {"_id": "2", "text": "a heron fishes"}],
               queries=[{"_id": "a", "text": "roofs of slate"}], qrels="query-id\tcorpus-id\tscore\na\t1\t1\n")
    peers.main([str(tmp_path / "T"), "--out", str(tmp_path / "peers.json")])

    monkeypatch.setattr(Embedder, "load", lambda *_, **__: HashEmbedder())
    (tmp_path / "model").mkdir()
    flags = [str(tmp_path / "model"), "--tasks", str(tmp_path / "T"), "--beside", str(tmp_path / "peers.json")]
    capsys.readouterr()
    evaluate.main(flags)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["model", "MiniLM", "BM25"] in lines
    table = {line[0]: line[1:] for line in lines if line}
    assert table["S"][1:] == ["100.0", "-"] and table["R"][1:] == ["100.0", "100.0"]
    assert ["=", "Average", "of", "2", "tasks"] == next(line for line in lines if "Average" in line)[:5]
    assert table["MiniLM:"][:2] == ["all-MiniLM-L6-v2,", "22M"]

    (tmp_path / "T" / "S" / "test.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[2]) + "\n")
    with pytest.raises(UserError, match="--beside .*peers.json: made on other tasks, or on other versions"):
        evaluate.main(flags)


def test_the_demo_has_recorded_scores_of_its_own_tasks():
    recorded = read_recorded(ROOT / "results/peers_mini.json", find_tasks([str(MINI)]))
    assert recorded["MiniLM"]["tasks"].keys() == recorded["BM25"]["tasks"].keys()
    assert 0.5 < recorded["MiniLM"]["average"] < 0.6 and recorded["BM25"]["average"] is None
