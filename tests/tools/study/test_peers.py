"""tools/study/peers.py: other people's packages give what the study takes from them."""
import json

import torch

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
