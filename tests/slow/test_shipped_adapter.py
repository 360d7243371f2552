"""data/adapter on the base it was trained for."""
import re
import shutil

import pytest
import torch

from model import Embedder
from plumbing.files import read_json
from scripts import ROOT, run_tool

FLOAT = re.compile(r"-?\d+\.\d{4,}")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """(the folder of its base, a copy of the adapter that finds it there)."""
    folder = tmp_path_factory.mktemp("shipped")
    adapter = folder / "data" / "adapter"
    shutil.copytree(ROOT / "data" / "adapter", adapter)
    base = read_json(adapter / "adapter_config.json")["base_model_name_or_path"]     # models/smollm2-135m-l6
    done = run_tool("models.smollm2", folder / base, "--layers", base.rpartition("-l")[2])
    assert done.returncode == 0, done.stderr
    return folder / base, adapter


def test_the_shipped_adapter_finds_what_is_asked(shipped):
    base, _ = shipped
    pairs = {
        "how to brew tea": "Steep the leaves in hot water for three minutes, then pour.",
        "bad weather": "Rain falls on the roof all night and the gutters overflow.",
        "monetary policy against rising prices":
            "The central bank raised interest rates to slow down inflation.",
        "how to warm up for jogging": "Stretch your legs before a long run to avoid injuries.",
        "why does my internet keep failing":
            "Restart the router and check the cable if the connection drops.",
        "opening hours of the gallery": "The museum opens at nine and closes at five, except on Mondays.",
    }
    right = {}
    for adapter in (None, ROOT / "data" / "adapter"):
        embedder = Embedder.load(base, adapter=adapter, device="cpu")
        queries = embedder.encode(list(pairs), "Given a question, retrieve passages that answer it")
        scores = queries @ embedder.encode(list(pairs.values())).T
        right[adapter is not None] = (scores.argmax(1) == torch.arange(len(pairs))).sum().item()
    assert right[True] == 6 and right[False] <= 4            # of 6


def test_readme_shows_what_the_tour_prints(shipped):
    """Text exactly; numbers but for the last digits, in which CPUs differ."""
    _, adapter = shipped
    done = run_tool("tour", "--model", adapter)
    assert done.returncode == 0, done.stderr
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```\n(1\. A task.*?)\n```", readme, re.DOTALL)[1]
    printed = done.stdout.strip("\n")
    assert FLOAT.sub("#", block).split() == FLOAT.sub("#", printed).split()
    shown, made = (list(map(float, FLOAT.findall(text))) for text in (block, printed))
    assert made == pytest.approx(shown, rel=5e-4, abs=2e-4)
