"""tools/embed.py as a user runs it: pipes in, vectors and ranked lines out, equal to Embedder's."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from model import Decoder, Embedder
from scripts import ROOT, complaint
from tiny import relative
from tools import embed as tool

LINES = ["Steep the leaves for three minutes.", "", "El té verde se prepara a 80 °C. 🍵",
         "Rain falls on the roof.", "Tea came to Europe in 1610.", "Ein  Satz mit  Lücken", "x",
         "The river rises in spring."]


def embed(*arguments, text=b""):
    """A locale that knows ASCII alone must not matter: texts come and go as UTF-8."""
    return subprocess.run([sys.executable, ROOT / "tools/embed.py", *map(str, arguments)],
                          input=text, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})


def test_it_runs_by_its_path_and_as_a_module(tmp_path):
    ways = (ROOT, ["tools/embed.py"]), (tmp_path, [ROOT / "tools/embed.py"]), (ROOT, ["-m", "tools.embed"])
    for folder, line in ways:
        done = subprocess.run([sys.executable, *line, "search", "no/model", "--docs", "d", "q"], cwd=folder,
                              capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("embed.py: no/model: no such model folder")


@pytest.fixture(scope="module")
def embedder(smollm2):
    return Embedder.load(smollm2, device="cpu")


@pytest.fixture
def docs(tmp_path):
    path = tmp_path / "docs.txt"
    path.write_bytes("\n".join(LINES).encode() + b"\n")
    return path


def test_encode_to_json_lines_and_to_npy(smollm2, embedder, docs, tmp_path):
    out = tmp_path / "vectors.npy"
    done = embed("encode", smollm2, "--device", "cpu", "--at-once", 3, text=docs.read_bytes())
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [row["text"] for row in rows] == LINES
    by_line = np.array([row["vector"] for row in rows], dtype=np.float32)
    assert relative(embedder.encode(LINES), embedder.encode(LINES).new_tensor(by_line)) <= 1e-6

    done = embed("encode", smollm2, "--device", "cpu", "--at-once", 3, "--out", out, "--prompt", "Find tea",
                 "--dim", 64, text=docs.read_bytes())
    assert done.returncode == 0 and b"8 vectors of 64 values" in done.stderr
    stored = np.load(out, mmap_mode="r")
    assert stored.shape == (8, 64) and stored.dtype == np.float32
    wanted = embedder.encode(LINES, "Find tea", dim=64)
    assert relative(wanted.new_tensor(np.array(stored)), wanted) <= 1e-6
    assert [path.name for path in tmp_path.glob("vectors*")] == ["vectors.npy"]


def test_readmes_python_example(smollm2, tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(smollm2, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    lines = [line.split(" ", 1) for line in capsys.readouterr().out.splitlines()]
    assert {text for _, text in lines} == {LINES[0], LINES[3]}
    assert 1 >= float(lines[0][0]) >= float(lines[1][0]) >= -1


def test_search_ranks_as_the_whole_matrix_would(smollm2, embedder, docs):
    queries = ["how to brew tea", "weather"]
    done = embed("search", smollm2, "--device", "cpu", "--docs", docs, "--at-once", 3, "--top", 4, *queries)
    assert done.returncode == 0, done.stderr
    prompt = "Given a web search query, retrieve relevant passages that answer the query"
    scores = embedder.encode(queries, prompt) @ embedder.encode(LINES).T
    wanted = []
    for query, row in zip(queries, scores):
        best = row.argsort(descending=True)[:4]
        wanted += [f"# {query}", *(f"{row[i]:.4f}\t{i + 1}\t{LINES[i]}" for i in best)]
    assert done.stdout.decode().splitlines() == wanted


def test_streams(smollm2):
    """The first vectors are there before the last text is."""
    run = subprocess.Popen([sys.executable, "-m", "tools.embed", "encode", smollm2, "--device", "cpu",
                            "--at-once", "2"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    run.stdin.write(b"one\ntwo\n")
    run.stdin.flush()
    assert json.loads(run.stdout.readline())["text"] == "one"
    run.stdin.close()
    assert json.loads(run.stdout.readline())["text"] == "two" and run.wait() == 0


def test_mistakes_are_one_line_and_leave_nothing(smollm2, docs, tmp_path, tmp_path_factory, monkeypatch,
                                                 capsys):
    for arguments, text, words in [
        (("encode", tmp_path / "nowhere"), b"", "no such model folder"),
        (("encode", smollm2, "--out", tmp_path / "v.npy"), b"fine\n\xff\n", ":2: not UTF-8"),
        (("encode", smollm2, "--out", tmp_path / "v.txt"), b"", ".npy"),
        (("encode", smollm2, "--out", docs / "v.npy"), b"a\n", "docs.txt"),
        (("encode", smollm2, "--at-once", 0), b"a\n", "--at-once: 0: must be above 0"),
        (("encode", smollm2, "--at-once", 10**30), b"a\n", "must be below 2^63"),
        (("encode", smollm2, "--dim", 9999), b"", "dim 9999"),
        (("encode", smollm2, "--dim", -5, "--out", tmp_path / "v.npy"), b"", "dim -5"),
        (("encode", smollm2, "--prompt", "\udcff"), b"a\n", r"'\udcff': not in UTF-8"),
        (("search", smollm2, "--docs", docs, "\udcff"), b"", r"'\udcff': not in UTF-8"),
        (("search", smollm2, "--docs", tmp_path / "none.txt", "q"), b"", "none.txt"),
    ]:
        stdin = tmp_path_factory.mktemp("stdin") / "texts"
        stdin.write_bytes(text)
        monkeypatch.setattr(sys, "stdin", open(stdin))
        assert words in complaint(capsys, tool.main, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["docs.txt"]


def test_no_bom_is_part_of_a_text(tmp_path):
    path = tmp_path / "texts"
    path.write_bytes("\ufeffone\r\n\n\ufefftwo \ufeff\n".encode())
    with open(path, "rb") as file:
        assert list(tool.read_lines(file)) == ["one", "", "two \ufeff"]


def test_closed_streams_are_one_line(docs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed" in complaint(capsys, tool.main, "encode", "no/model")
    assert "no such model" in complaint(capsys, tool.main, "search", "no/model", "--docs", docs, "tea")
    line = f"{sys.executable} {ROOT / 'tools/embed.py'} search no/model --docs {docs} tea >&-"
    done = subprocess.run(line, shell=True, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "embed.py: standard output is closed: the result goes there, > FILE\n")


@pytest.mark.parametrize("verb", ["encode", "search"])
def test_vectors_that_are_no_numbers_are_one_line(smollm2, docs, tmp_path, monkeypatch, capsys, verb):
    monkeypatch.setattr(Decoder, "forward", lambda self, ids: torch.full((*ids.shape, 576), torch.nan))
    monkeypatch.setattr(sys, "stdin", open(docs))
    more = ["--out", tmp_path / "v.npy"] if verb == "encode" else ["--docs", docs, "tea"]
    assert "NaN or infinity" in complaint(capsys, tool.main, verb, smollm2, "--device", "cpu", *more)
    assert [path.name for path in tmp_path.iterdir()] == ["docs.txt"]


def test_progress_is_told_on_stderr(embedder, monkeypatch, capsys):
    assert sum(len(texts) for texts, _ in tool.encoded(embedder, LINES, "", 3)) == 8
    assert capsys.readouterr().err == ""                               # within five seconds
    monkeypatch.setattr(tool, "EVERY", -1)
    assert sum(len(texts) for texts, _ in tool.encoded(embedder, LINES, "", 3)) == 8
    said = capsys.readouterr()
    told = [line.split(" texts")[0].strip() for line in said.err.splitlines()]
    assert said.out == "" and told == ["3", "6", "8"]


def test_every_option_reaches_the_embedder(docs, monkeypatch, capsys):
    said = []

    class Spy:
        def load(model, **options):
            said.append((model, options))
            return Spy()

        def compile(self, wanted):
            said.append(wanted)

        def encode(self, texts, prompt="", dim=None):
            said.append((len(texts), prompt, dim))
            return torch.ones(len(texts), dim)

    monkeypatch.setattr(tool, "Embedder", Spy)
    tool.main(["search", "m", "--docs", str(docs), "--prompt", "Find tea", "--max-length", "99",
               "--dim", "7", "--dtype", "float16", "--device", "cuda:1", "--compile", "--at-once", "5",
               "--pooling", "mean", "a", "b"])
    options = {"device": "cuda:1", "dtype": "float16", "max_length": 99, "pooling": "mean"}
    assert said == [("m", options), True,
                    (2, "Find tea", 7), (5, "", 7), (3, "", 7)]
