"""plumbing/files.py: what fits no schema is named with its line, and a file is written whole or not at all."""
import errno
import gzip
import os
import re
import resource

import pytest
import torch
from safetensors.torch import save_file

from plumbing.errors import UserError
from plumbing.files import (OPTIONAL, append, fits, open_log, read_json, read_jsonl, replace_file, same_file,
                            text_hash, write_json, write_jsonl, write_text)
from scripts import complaint

SCHEMA = {"text": str, "pos": ([str], OPTIONAL), "score": (float, OPTIONAL)}


@pytest.mark.parametrize("value, kind, answer", [
    ("a", str, True), (1, str, False), (None, str, False), (None, (str, OPTIONAL), True),
    (1, int, True), (1.0, int, False), (True, int, False), (True, bool, True), (1, bool, False),
    (1, float, True), (10**20, float, True), (10**400, float, False), (-10**400, float, False),
    ([1, 10**400], [float], False), (10**400, int, True), (1.5, float, True),
    (float("nan"), float, False), (float("inf"), (int, float), False),
    (["a"], [str], True), ("a", [str], False), ([], [str], True), (["a", 1], [str], False), (["a", 1], [(str, int)], True),
])
def test_fits(value, kind, answer):
    assert fits(value, kind) is answer


# A bad second line of a JSON-lines file, and what is said of it behind "FILE:2: ".
BAD_LINES = [
    (b"{broken", "not JSON in UTF-8"),
    (b"text,score", "one JSON object a line is wanted"),
    (b"[]", "holds no JSON object"),
    (b"null", "holds no JSON object"),
    (b'{"pos": []}', "'text' is missing or not a string"),
    (b'{"text": "a", "pos": "b"}', "'pos' is missing or not a list of strings"),
    (b'{"text": "a", "score": "1"}', "'score' is missing or not a number"),
    (b'{"text": "a", "score": NaN}', "'score' is missing or not a number"),
    (b'{"text": "a", "score": true}', "'score' is missing or not a number"),
    (rb'{"text": "\ud800"}', "not JSON in UTF-8"),
    (b'{"text": "\xff"}', "not JSON in UTF-8"),
    (b'{"text": "a"}{"text": "b"}', "not JSON in UTF-8"),
    (b"[" * 200_000, "not JSON in UTF-8"),
]


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("line, words", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, line, words, gzipped):
    path = tmp_path / ("rows.jsonl.gz" if gzipped else "rows.jsonl")
    content = b'{"text": "good"}\n' + line + b"\n"
    path.write_bytes(gzip.compress(content) if gzipped else content)
    with pytest.raises(UserError, match="^" + re.escape(f"{path}:2: ") + ".*" + re.escape(words)) as caught:
        list(read_jsonl(path, SCHEMA))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    plain = tmp_path / "plain.jsonl.gz"
    plain.write_bytes(b'{"text": "a"}\n')
    for path in (torn, plain, tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(UserError, match=re.escape(str(path))):
            list(read_jsonl(path))
    for content in (b"{", b"[]", b"\xff", b"[" * 200_000, rb'{"name": "\ud83d"}'):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(UserError, match="a.json"):
            read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "nowhere.json")


def test_byte_order_marks_blank_lines_and_odd_line_ends_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b"}\r\n\n  \n{"text": "c"}'.encode())
    assert [row["text"] for row in read_jsonl(path)] == ["a\u2028b", "c"]
    (tmp_path / "a.json").write_bytes("\ufeff{}".encode())
    assert read_json(tmp_path / "a.json") == {}


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "folder" / "a.json"
    write_json(path, {"é": 1})

    def fail(beside):
        beside.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"a.json: cannot be written \(No space left"):
        replace_file(path, fail)
    assert read_json(path) == {"é": 1} and [p.name for p in path.parent.iterdir()] == ["a.json"]
    write_jsonl(path, ({"n": n} for n in range(2)))
    assert list(read_jsonl(path)) == [{"n": 0}, {"n": 1}]


def test_of_a_link_the_target_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk/target", tmp_path / "link"
    link.symlink_to("disk/target")
    for text in ("new", "newer"):                                  # at first the target is not there yet
        write_text(link, text)
        assert link.is_symlink() and target.read_text() == text
    assert same_file(link, target) and not same_file(link, tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"] and os.listdir(tmp_path / "disk") == ["target"]


@pytest.mark.parametrize("name, words", [(".", "a folder"), ("folder", "a folder"), ("pipe", "a device or a pipe"),
                                         ("to_pipe", "a device or a pipe")])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("pipe", "to_pipe")
    os.mkdir("folder")
    with pytest.raises(UserError, match=re.escape(name) + f": {words}: name a file"):
        write_text(name, "text")
    assert sorted(os.listdir()) == ["folder", "pipe", "to_pipe"] and not os.path.isfile("pipe")


@pytest.mark.parametrize("write", [
    lambda path: write_json(path, {"n\ud83d": 1}), lambda path: write_text(path, "\ud83d"),
    lambda path: write_jsonl(path, [{"a": 1}, {"a": "\ud83d"}])])
def test_half_a_surrogate_pair_is_one_line_and_no_file(tmp_path, write):
    with pytest.raises(UserError, match="out: cannot be written .*surrogates"):
        write(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_under_save_file_is_one_line(tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:                                          # a limit on the size of files stands in for the full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        tensors = {"a": torch.zeros(10_000)}
        said = complaint(capsys, lambda _: replace_file(tmp_path / "w", lambda path: save_file(tensors, path)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in said and not list(tmp_path.glob("w*"))


def test_a_log_survives_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    with open_log(path) as file:
        append(file, {"text": "whole \ud800"})                   # a server's words may hold half a pair
    with open(path, "ab") as file:
        file.write(b'{"text": "torn' + b"x" * 200_000)
    assert [row["text"] for row in read_jsonl(path, log=True)] == ["whole \ud800"]
    with open_log(path) as file:
        append(file, {"text": "next"})
    assert [row["text"] for row in read_jsonl(path, log=True)] == ["whole \ud800", "next"]


def test_a_full_disk_leaves_a_log_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_log(path) as file:
        append(file, {"n": 1})
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
            with pytest.raises(UserError, match="log.jsonl: the disk is full"):
                append(file, {"n": "x" * 1000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        append(file, {"n": 2})
    assert path.read_text() == '{"n": 1}\n{"n": 2}\n'


def test_hashes_are_the_same_on_every_machine():
    """Draws, masks and fingerprints of runs hang on them."""
    assert text_hash("") == -5426141060434712860 and text_hash("é") == text_hash("\u00e9") != text_hash("e\u0301")

