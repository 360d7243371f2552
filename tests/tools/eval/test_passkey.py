"""tools/eval/passkey.py: keys hidden in texts of a given length, found again or not."""
import doctest
import json
import random
import re

import pytest
import torch

from model import Embedder
from scripts import complaint
from tools.eval import passkey


def test_docstring_examples():
    assert doctest.testmod(passkey).failed == 0


def test_passkeys_are_hidden_in_texts_of_the_wanted_length_and_ties_are_misses():

    class Words:
        """Each word is a token; a document's vector is its rarest words', so the key's owner decides."""

        def tokenize(self, texts):
            return [text.split() for text in texts]

        def encode(self, texts, prompt=""):
            names = [f"{first} {last}" for first in passkey.FIRST for last in passkey.LAST]
            return torch.tensor([[float(name in text) for name in names] for text in texts])

    for tokens in (64, 500):
        text = passkey.document("Ada Greco", 4711, tokens, lambda t: len(t.split()), random.Random(tokens))
        assert tokens - 10 < len(text.split()) <= tokens and text.count("4711") == 2
    assert passkey.accuracy(Words(), 128, 20, 50, "", 0) == 1.0
    assert passkey.top1(torch.ones(3, 4), [0, 1, 2]) == 0.0


def test_passkeys_accuracies_are_printed_and_written(smollm2, tmp_path, capsys):
    out = tmp_path / "new" / "passkey.json"
    passkey.main([str(smollm2), "--lengths", "64", "80", "--queries", "2", "--candidates", "3",
                  "--device", "cpu", "--rope-theta", "1e5", "--sliding-window", "0", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["rope_theta"] == 1e5 and found["sliding_window"] is None
    assert set(found["accuracy"]) == {"64", "80"} and set(found["accuracy"].values()) <= {0.0, 0.5, 1.0}
    assert capsys.readouterr().out.count("by luck 33.3") == 2


def test_passkeys_model_is_changed_as_asked_and_facts_and_answers_stand_anywhere(tmp_path, monkeypatch):
    loaded, asked, depths = [], [], []

    class Words:
        """Each word is a token; vectors mean nothing here."""

        def tokenize(self, texts):
            return [text.split() for text in texts]

        def encode(self, texts, prompt=""):
            asked.extend(text for text in texts if prompt)
            depths.extend(text.index("'s pass key") / len(text) for text in texts if not prompt)
            return torch.ones(len(texts), 1)

    monkeypatch.setattr(Embedder, "load", lambda path, **flags: loaded.append(flags) or Words())
    flags = ["--lengths", "700", "--queries", "9", "--candidates", "30", "--rope-theta", "1e5"]
    for window in ([], ["--sliding-window", "0"], ["--sliding-window", "9"]):
        passkey.main(["m", *flags, *window])
    assert [flags.pop("max_length") for flags in loaded] == [1400] * 3           # no key is cut off
    assert [{key: value for key, value in flags.items() if key not in ("device", "dtype")}
            for flags in loaded] == [{"rope_theta": 1e5}, {"rope_theta": 1e5, "sliding_window": None},
                                     {"rope_theta": 1e5, "sliding_window": 9}]
    assert min(depths) < 0.2 and max(depths) > 0.8
    names = random.Random("0 700").sample([f"{first} {last}" for first in passkey.FIRST
                                           for last in passkey.LAST], 30)
    gold = [names.index(re.search("for (.*)[?]", question)[1]) for question in asked[:9]]
    assert gold != sorted(gold) and max(gold) > 15


@pytest.mark.parametrize("flags, said", [
    (["--candidates", 201], "--candidates: at most 200"), (["--queries", 101], "--queries: at most as many"),
    (["--queries", 0], "--queries: 0: must be above 0"),
    (["--lengths", 8], "--lengths: 8: must be at least 64"),
    (["--rope-theta", 0], "--rope-theta: 0: must be above 0"),
    (["--sliding-window", -1], "--sliding-window: -1: must be at least 0"),
    (["--out", "."], ".: a folder: name a file in it"),
    ([], "no/such/model: no such model folder")])
def test_passkeys_mistakes_get_one_line(flags, said, capsys):
    assert said in complaint(capsys, passkey.main, "no/such/model", *flags)
