"""README's "Your own documents and questions" in little: its commands on a tiny random model, for two steps.

tests/slow/test_example.py runs them as they stand, on the shipped adapter.
"""
import importlib
import json
import shlex
import shutil

import pytest
import torch

from model import Embedder
from plumbing.files import read_jsonl
from readme import commands
from runs import signals_restored
from scripts import ROOT
from tools import workflow

EXAMPLE = ROOT / "data" / "example"


def in_this_process(words: list[str]) -> None:
    """`python tools/embed.py ...`, `python -m tools.data.mine ...`: the script's main, with its flags."""
    module, *flags = words[1:] if words[0] == "-m" else words
    importlib.import_module(module.removesuffix(".py").replace("/", ".")).main(flags)


@pytest.fixture
def clone(base, tmp_path, monkeypatch):
    """The example, prompts, and as data/adapter one of a tiny model. Nothing is typed."""
    shutil.copytree(EXAMPLE, tmp_path / "data/example")
    shutil.copytree(ROOT / "prompts", tmp_path / "prompts")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tiny").symlink_to(base)
    for name in (*workflow.DEFAULTS, "MAKEFLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    embedder = Embedder.load("models/tiny", device="cpu")
    embedder.decoder.add_lora(rank=2, alpha=4)
    for parameter in embedder.decoder.lora_parameters().values():
        torch.nn.init.normal_(parameter, std=0.02)
    embedder.save_adapter("data/adapter")
    return tmp_path


def test_the_sections_commands_run(clone, monkeypatch, capsys):
    monkeypatch.setattr(workflow, "run", lambda typed, *words: in_this_process(list(map(str, words))))
    lines = commands("Your own documents and questions")
    assert lines[0].startswith("make base ") and lines[1].startswith(". .venv/bin/activate ")
    with signals_restored():
        for line in lines[2:]:
            program, *words = shlex.split(line, comments=True)
            if program == "make":
                short = [word + " --max-steps 2" * word.startswith("TRAIN_FLAGS") for word in words]
                workflow.main([*short, "DTYPE=float32"])
            else:
                in_this_process(words)
    said = capsys.readouterr().out
    assert said.count("\t") >= 6 and "before    after" in said and "Questions " in said
    mined = list(read_jsonl(clone / "data/mined.jsonl"))
    assert len(mined) == 50 and all(len(row["neg"]) == 1 for row in mined)
    trained = json.loads((clone / "runs/mined/config.json").read_text())
    assert trained["init_adapter"] == "data/adapter" and trained["base"] == "models/tiny"


def test_what_is_asked_has_one_answer_that_training_has_not_seen():
    passages = (EXAMPLE / "docs.txt").read_text().splitlines()
    corpus = {row["_id"]: row["text"] for row in read_jsonl(EXAMPLE / "questions/corpus.jsonl")}
    assert passages == list(corpus.values()) and len(set(passages)) == len(passages) == 171
    pairs = list(read_jsonl(EXAMPLE / "pairs.jsonl"))
    queries = {row["_id"]: row["text"] for row in read_jsonl(EXAMPLE / "questions/queries.jsonl")}
    qrels = (EXAMPLE / "questions/qrels/test.tsv").read_text().splitlines()
    right = [line.split("\t") for line in qrels[1:]]
    answers = {text for row in pairs for text in row["pos"]}
    tested = {corpus[passage] for _, passage, _ in right}
    assert len(pairs) == len(answers) == 50 and len(queries) == len(right) == len(tested) == 40
    assert answers <= set(passages) and not answers & tested
    asked = [row["query"] for row in pairs] + list(queries.values())
    assert len(set(asked)) == 90


def test_no_two_passages_are_near_duplicates():
    """By the check that guards training data: shared runs of characters."""
    words = [set(text.lower().split()) for text in (EXAMPLE / "docs.txt").read_text().splitlines()]
    worst = max(len(a & b) / len(a | b) for i, a in enumerate(words) for b in words[:i])
    assert worst < 0.35
