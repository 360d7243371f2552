"""tools/tour.py on the real answers and a small real model: README shows what it prints; its sums hold."""
import gzip
import io
import json
import math
import re
from contextlib import redirect_stdout

import pytest
import torch

from model import Embedder
from plumbing.errors import UserError
from scripts import ROOT, complaint
from tools import tour

RECORDED = ROOT / "data/recorded.jsonl.gz"


def toured(*arguments) -> str:
    """What the tour prints."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        tour.main([str(argument) for argument in arguments])
    return printed.getvalue().strip("\n")


@pytest.fixture(scope="module")
def adapter(smollm2, tmp_path_factory):
    """A random adapter on the first three layers of SmolLM2."""
    folder = tmp_path_factory.mktemp("adapter")
    embedder = Embedder.load(smollm2, device="cpu")
    embedder.decoder.add_lora(rank=4)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in embedder.decoder.lora_parameters().items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    embedder.save_adapter(folder)
    return folder


@pytest.fixture(scope="module")
def printed(adapter):
    return toured("--model", adapter)


@pytest.fixture(scope="module")
def few_answers(tmp_path_factory):
    """Ten answers of each type, as a run's raw.jsonl has them."""
    taken, lines = {}, []
    with gzip.open(RECORDED, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            key = row["step"], row["type"]
            taken.setdefault(key, []).append(row)
            if len(taken[key]) <= 10:
                lines.append(line)
    path = tmp_path_factory.mktemp("run") / "raw.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path, {kind: rows for (step, kind), rows in taken.items() if step == "generate"}


def test_readme_shows_the_tours_data_and_tokens(printed):
    """All that does not depend on the model; the scores: see tests/slow/test_shipped_adapter.py."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```\n(1\. A task.*?)\n```", readme, re.DOTALL)[1]
    head, _, _ = printed.partition("\n    document ")
    assert head.count("\n") > 30 and block.startswith(head)


def test_the_loss_follows_from_the_printed_digits(printed):
    rows = re.findall(r"^    query \d  (.*)$", printed, re.MULTILINE)
    cosines = [list(map(float, row.split())) for row in rows]
    mask = list(map(int, re.search(r"^    mask (.*)$", printed, re.MULTILINE)[1].split()))
    assert len(cosines) == 4 and 0 in mask and 1 in mask and mask[0] == 1
    own = cosines[0][0]
    terms = [m * math.exp((cosine - own) / 0.02) for m, cosine in zip(mask, cosines[0])]
    said = float(re.search(r"log\(sum\) = ([\d.]+)", printed)[1])
    assert abs(math.log(sum(terms)) - said) < 2e-3
    losses = list(map(float, re.search(r"\(([\d. +]+)\) / 4", printed)[1].split(" + ")))
    whole = float(re.search(r"/ 4 = ([\d.]+)", printed)[1])
    assert losses[0] == said and abs(sum(losses) / 4 - whole) < 2e-4


@pytest.mark.parametrize("kind, negatives", [("sts", True), ("long-long", False)])
def test_any_example_can_be_followed(adapter, few_answers, kind, negatives):
    path, rows = few_answers
    row = rows[kind][1]
    text = toured("--model", adapter, "--answers", path, "--example", row["id"])
    assert row["messages"][0]["content"].split("\n")[0][:60] in text
    assert f'"id": {row["id"]}}}' in " ".join(text.split())
    assert ("hard negatives: 4" in text) == negatives
    assert re.search(r"trained .* \d+ +[01]\.\d{4}$", text)


def test_what_cannot_be_followed_is_said(adapter, few_answers, smollm2, capsys, tmp_path):
    path, rows = few_answers
    assert "has no answer of that id" in complaint(capsys, tour.main, "--model", adapter, "--answers", path,
                                                   "--example", "b0")
    brainstorms = tmp_path / "brainstorms.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    of_step_1 = [line for line in lines if json.loads(line)["step"] == "brainstorm"]
    brainstorms.write_text("".join(of_step_1), encoding="utf-8")
    assert "has no answer of step 2" in complaint(capsys, tour.main, "--model", adapter,
                                                  "--answers", brainstorms)
    assert "a base without an adapter" in complaint(capsys, tour.main, "--model", smollm2)
    row = dict(rows["sts"][0], response='{"S1": "a cat", "S2": "a cat", "S3": "a dog"}')
    dropped = tmp_path / "raw.jsonl"
    dropped.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="became no example: copy between fields"):
        toured("--model", adapter, "--answers", dropped, "--example", row["id"])
