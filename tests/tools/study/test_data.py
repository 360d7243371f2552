"""tools/study/data.py: which examples a study trains on."""
import json
import shutil

import pytest

from plumbing.errors import UserError
from scoring import MINI
from tools.study import data


def test_one_language_can_be_chosen_beside_all(tmp_path):
    rows = [{"query": q, "pos": [f"{q} is this"], "language": language}
            for q, language in (("a", "English"), ("b", "Dutch"))]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(MINI / "STS", tmp_path / "sets/STS")

    def prepare(language):
        return data.prepare_data(tmp_path / "all.jsonl", None, tmp_path / "sets", tmp_path / "data", language,
                                 all_languages=True)
    for language, query in (("Dutch", "b"), ("English", "a")):                    # another one is made anew
        files = prepare(language)
        assert [json.loads(line)["query"] for line in open(files["synthetic"]["file"])] == [query]
        assert files["synthetic"]["other languages"] == 1 and files["all-languages"]["kept"] == 2
    with pytest.raises(UserError, match="--language Latin: no example"):
        prepare("Latin")


def test_public_files_count_alike_and_balance_the_synthetic_set():
    files = {"synthetic": {"kept": 100}, "a": {"kept": 1000}, "b": {"kept": 20}, "none": {"kept": 0}}
    assert data.mixture("synthetic", files) == {"synthetic": 1.0}
    assert data.mixture("public", files) == {"a": 0.05, "b": 1}
    assert data.mixture("both", files) == {"synthetic": 1.0, "a": 0.05, "b": 1}
    files["all-languages"] = {"kept": 300}
    assert data.mixture("both", files) == {"synthetic": 1.0, "a": 0.05, "b": 1}
    assert data.mixture("all-languages", files) == {"all-languages": 1.0}
    files["a"]["kept"] = 6000
    assert data.mixture("mined", files) == {"synthetic": 1.0, "a": 0.25, "b": 1}     # 1,500 of each


def test_a_smaller_draw_is_part_of_a_larger_one(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text("".join(f'{{"id": {i}}}\n' for i in range(20)))
    info = {"file": str(path), "key": "k", "kept": 20}
    few, more = (data.draw_examples(info, number) for number in (5, 12))
    lines = {info["kept"]: open(info["file"]).readlines() for info in (few, more)}
    assert len(lines[5]) == 5 and lines[12][:5] == lines[5] and len(set(lines[12])) == 12
    with pytest.raises(UserError, match="s.jsonl: 20 examples, of which 21 cannot be drawn"):
        data.draw_examples(info, 21)
