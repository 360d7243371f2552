"""tools/study/data.py: which examples a study trains on."""
import json

import pytest

from plumbing.errors import UserError
from tools.study import data


def test_one_language_can_be_chosen(tmp_path):
    rows = [{"query": q, "language": language} for q, language in (("a", "English"), ("b", "Dutch"))]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = data.in_language(tmp_path / "all.jsonl", "Dutch", tmp_path / "dutch.jsonl")
    assert [json.loads(line)["query"] for line in open(out)] == ["b"]
    with pytest.raises(UserError, match="--language Latin: no example"):
        data.in_language(tmp_path / "all.jsonl", "Latin", out)
    (tmp_path / "broken.jsonl").write_text("{}\n{broken\n")
    with pytest.raises(UserError, match="broken.jsonl:2: not JSON"):
        data.in_language(tmp_path / "broken.jsonl", "Dutch", out)


def test_public_files_count_alike_and_balance_the_synthetic_set():
    files = {"synthetic": {"kept": 100}, "a": {"kept": 1000}, "b": {"kept": 20}, "none": {"kept": 0}}
    assert data.mixture("synthetic", files) == {"synthetic": 1.0}
    assert data.mixture("public", files) == {"a": 0.05, "b": 1}
    assert data.mixture("both", files) == {"synthetic": 1.0, "a": 0.05, "b": 1}
