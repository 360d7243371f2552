"""data/adapter on the base it was trained for."""
import torch

from model import Embedder
from scripts import ROOT, run_tool


def test_the_shipped_adapter_finds_what_is_asked(tmp_path):
    done = run_tool("models.smollm2", tmp_path / "base", "--layers", 20)
    assert done.returncode == 0, done.stderr
    pairs = {"how to brew tea": "Steep the leaves in hot water for three minutes, then pour.",
             "bad weather": "Rain falls on the roof all night and the gutters overflow.",
             "monetary policy against rising prices": "The central bank raised interest rates to slow down inflation.",
             "how to warm up for jogging": "Stretch your legs before a long run to avoid injuries.",
             "why does my internet keep failing": "Restart the router and check the cable if the connection drops.",
             "opening hours of the gallery": "The museum opens at nine and closes at five, except on Mondays."}
    right = {}
    for adapter in (None, ROOT / "data" / "adapter"):
        embedder = Embedder.load(tmp_path / "base", adapter=adapter, device="cpu")
        queries = embedder.encode(list(pairs), "Given a question, retrieve passages that answer it")
        scores = queries @ embedder.encode(list(pairs.values())).T
        right[adapter is not None] = (scores.argmax(1) == torch.arange(len(pairs))).sum().item()
    assert right[True] >= 5 and right[False] <= 2
