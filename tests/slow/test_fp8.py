"""tools/models/fp8.py from the shell, without a GPU."""
import os
import re

from scripts import run_tool
from tiny import random_model, save, tiny_config


def run(*arguments):
    return run_tool("models.fp8", *arguments, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


def test_from_the_shell(tmp_path, mistral_files):
    config = tiny_config(vocab_size=32000, hidden_size=64, intermediate_size=112, num_hidden_layers=3)
    base = save(random_model(config), tmp_path / "tiny", mistral_files)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"query": "question {i}", "pos": ["answer {i * i}"], "neg": ["wrong {i}"]}}\n'
                            for i in range(16)))
    done = run("measure", base, "--data", data, "--emulate", "--queries", 4, "--max-length", 24)
    assert done.returncode == 0, done.stderr
    assert re.search(r"4 queries, 12 texts: fp8 moves vectors by \d\.\de-\d+ and LoRA grad", done.stdout)
    training = ("train", "--base", base, "--data", data, "--out", "nowhere")
    for more in (("measure", base, "--data", data), training):
        done = run(*more)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith("fp8.py: fp8 needs an Ada")
