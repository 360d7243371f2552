"""tools/models/smollm2.py: no folder of another's is replaced, and a file that is no model is one line.

That the model is right, tests/test_model.py shows.
"""
import pytest

from gguf import GGUFWriter
from scripts import complaint
from tools.models import smollm2


@pytest.fixture
def nothing_read(monkeypatch):
    monkeypatch.setattr(smollm2, "read_gguf", lambda path: pytest.fail("the model is being read"))


@pytest.mark.parametrize("files, link", [
    (["thesis.txt"], False), (["config.json"], False), (["thesis.txt"], True),
    (["config.json", "model.safetensors", "tokenizer.json", "thesis.txt"], False),
])
def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys, nothing_read, files, link):
    (tmp_path / "folder").mkdir()
    for name in files:
        (tmp_path / "folder" / name).write_text("mine")
    out = tmp_path / ("link" if link else "folder")
    if link:
        out.symlink_to("folder", target_is_directory=True)
    assert "remove it, or choose another name" in complaint(capsys, smollm2.main, out, "--gguf", tmp_path / "g")
    assert {path.name: path.read_text() for path in out.iterdir()} == dict.fromkeys(files, "mine")


def test_a_file_and_the_folder_one_stands_in_are_left_alone(tmp_path, monkeypatch, capsys, nothing_read):
    (tmp_path / "file").write_text("mine")
    assert "a file stands there" in complaint(capsys, smollm2.main, tmp_path / "file", "--gguf", "g")
    monkeypatch.chdir(tmp_path)
    assert "already there" in complaint(capsys, smollm2.main, ".", "--gguf", "g")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("files", [[], ["config.json", "model.safetensors", "tokenizer.json"]])
def test_an_empty_folder_and_a_model_may_be_replaced(tmp_path, files):
    for name in files:
        (tmp_path / name).touch()
    smollm2.check_folder(tmp_path)
    smollm2.check_folder(tmp_path / "new")


def without_a_tokenizer(path):
    writer = GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("write, words", [
    (lambda path: path.write_bytes(b""), "not a whole GGUF file"),
    (lambda path: path.write_bytes(b"garbage " * 99), "not a whole GGUF file"),
    (lambda path: path.write_bytes(b"GGUF\3\0\0\0"), "not a whole GGUF file"),
    (lambda path: path.write_bytes(b"GGUF\3\0\0\0" + b"\1\0\0\0\0\0\0\0" * 2), "not a whole GGUF file"),
    (without_a_tokenizer, "(KeyError('tokenizer.ggml.model')): --gguf wants the file of a whole Llama model"),
    (lambda path: None, "No such file"),
])
def test_a_file_that_is_no_model_is_one_line_and_nothing_is_written(tmp_path, capsys, write, words):
    path = tmp_path / "model.gguf"
    write(path)
    there = list(tmp_path.iterdir())
    said = complaint(capsys, smollm2.main, tmp_path / "models/out", "--gguf", path)
    assert said.startswith(said.partition(":")[0] + f": {path}") and words in said
    assert list(tmp_path.iterdir()) == there
