"""plumbing/examples.py: one reader of training examples; files of any size; what is no example is named."""
import json
import re

import pytest

from plumbing.errors import UserError
from plumbing.examples import Examples, read_example
from runs import record, write_lines


def test_examples_are_found_by_byte_offset(tmp_path):
    records = [record(i, query=q) for i, q in enumerate(["plain", "Grüße, 世界 🙂", "line\u2028separator", "last"])]
    text = "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records)      # blank lines, no final newline
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    examples = Examples([str(tmp_path / "a.jsonl")])
    assert [examples[i]["query"] for i in (3, 1, 0, 2)] == ["last", "Grüße, 世界 🙂", "plain", "line\u2028separator"]


# Each is refused by train.py and by every tool, with these words behind file and line.
BAD_LINES = [
    (b"{broken", "not JSON in UTF-8: Expecting property name"),
    (b"a,b", "one JSON object a line is wanted"),
    (b"[1]", "holds no JSON object"),
    (b"3", "holds no JSON object"),
    (b'{"query": 3, "pos": ["a"]}', "'query' is missing or not a string"),
    (b'{"pos": ["a"]}', "'query' is missing"),
    (b'{"query": "a"}', "'pos' is missing or not a list of strings"),
    (b'{"query": "a", "pos": "xyz"}', "'pos' is missing or not a list of strings"),
    (b'{"query": "a", "pos": [1]}', "'pos' is missing or not a list of strings"),
    (b'{"query": "a", "pos": null}', "'pos' is missing or not"),
    (b'{"query": "a", "pos": []}', "must hold text"),
    (b'{"query": " ", "pos": ["a"]}', "must hold text"),
    (b'{"query": "a", "pos": ["b"], "neg": "c"}', "'neg'"),
    (b'{"query": "a", "pos": ["b"], "prompt": 1}', "'prompt'"),
    (b'{"query": "a", "pos": ["b"], "type": ["c"]}', "'type'"),
    (rb'{"query": "a", "pos": ["\ud83d"]}', "surrogate"),
    ('{"query": "a", "pos": ["b"]}'.encode("utf-16"), "not JSON in UTF-8"),
    (b"[" * 200_000, "not JSON in UTF-8"),
]


@pytest.mark.parametrize("line, words", BAD_LINES)
def test_a_bad_line_is_named_or_counted(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(record(0)).encode() + b"\n" + line + b"\n" + json.dumps(record(1)).encode() + b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: .*" + re.escape(words)) as caught:
        Examples([str(path)])
    assert "\n" not in str(caught.value)
    examples = Examples([str(path)], skip_bad_lines=True)
    assert (len(examples), examples.skipped, examples[1]["query"]) == (2, 1, record(1)["query"])


def test_keys_that_nobody_reads_and_negatives_are_counted(tmp_path):
    more = [{"negs": ["n"]}, {"negs": ["n"], "language": "en", "id": 3}, {"score": 1, "neg": [" "]}, {}]
    path = write_lines(tmp_path / "a.jsonl", [record(i, **keys) for i, keys in enumerate(more)])
    examples = Examples([str(path)])
    assert examples.unread == {"negs": 2, "score": 1} and examples.with_negatives == 3


def test_what_may_be_missing():
    assert read_example(b'{"query": "q", "pos": ["p", " "], "neg": null, "other": 1}', "the task") == {
        "prompt": "the task", "query": "q", "pos": ["p"], "neg": [], "type": None}
    assert read_example(b'{"query": "q", "pos": ["p"], "prompt": ""}', "the task")["prompt"] == ""


def test_a_byte_order_mark_and_blank_lines_are_no_part_of_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"query": "q", "pos": ["p"]}\r\n\n  \n{"query": "r", "pos": ["p"]}')
    examples = Examples([str(path)])
    assert [examples[i]["query"] for i in (0, 1)] == ["q", "r"]


@pytest.mark.parametrize("share", ["2", "0", "x", "-1", "nan"])
def test_a_share_is_a_part(data, share):
    with pytest.raises(UserError, match="share"):
        Examples([f"{data}:{share}"])


def test_nothing_to_train_on_is_said(tmp_path):
    with pytest.raises(UserError, match="empty.jsonl: no examples"):
        Examples([str(write_lines(tmp_path / "empty.jsonl", []))])
    with pytest.raises(UserError, match="no such file"):
        Examples([str(tmp_path / "nowhere.jsonl")])
