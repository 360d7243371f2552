import signal
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

import generate
import train
from fault_server import KEY
from model import Embedder
from runs import FLAGS, read_log, record, signals_restored, write_lines
from scripts import run_tool
from tiny import random_model, save, tiny_config
from tools.models import mistral_tokenizer

# A shell's background job ignores Ctrl-C, and so would every process that these tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items):
    """tests/slow/ and tests/gpu/ are marked as what they are named."""
    for item in items:
        for name in ("slow", "gpu"):
            if TESTS / name in item.path.parents:
                item.add_marker(name)


@pytest.fixture
def live(tmp_path, monkeypatch):
    """live(server, *flags) runs generate.main, or another main, against a server; live.folder is its run."""
    servers = []

    def run(server, *flags, n=40, backoff=0.01, main=generate.main):
        servers.append(server)
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        model = () if "--model" in flags else ("--model", "m")
        return main([*model, "--n", str(n), "--tasks", "60", "--out", str(run.out), "--backoff", str(backoff),
                     *flags])

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    run.out, run.folder = tmp_path / "run.jsonl", tmp_path / "run"
    yield run
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def sentencepiece():
    """Mistral's own tokenizer, as SentencePiece runs it: the reference."""
    return SentencePieceProcessor(model_file=str(mistral_tokenizer.packaged_model()))


@pytest.fixture(scope="session")
def mistral_files(tmp_path_factory):
    """A folder with the real Mistral tokenizer.json and tokenizer_config.json."""
    folder = tmp_path_factory.mktemp("mistral-tokenizer")
    done = run_tool("models.mistral_tokenizer", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """The real SmolLM2, its first three layers, built as `make base LAYERS=3` would."""
    folder = tmp_path_factory.mktemp("models") / "smollm2-l3"
    done = run_tool("models.smollm2", folder, "--layers", 3)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory, mistral_files):
    """A tiny random Mistral with the real tokenizer, to train."""
    config = tiny_config(vocab_size=32000, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    return save(random_model(config), tmp_path_factory.mktemp("base") / "tiny", mistral_files)


@pytest.fixture
def data(tmp_path):
    """24 training examples of two types."""
    return write_lines(tmp_path / "data.jsonl", [record(i) for i in range(24)])


@pytest.fixture
def here(base, data, tmp_path):
    """here(name, *flags): two steps of train.py in this process, in the folder `name` -> (exit code, the log)."""
    def run(name, *flags):
        code = train.main(["--base", str(base), "--data", str(data), "--out", str(tmp_path / name), *FLAGS,
                           "--max-steps", "2", "--warmup-steps", "0", "--lr", "1e-3", *map(str, flags)])
        return code, read_log(tmp_path / name)

    with signals_restored():
        yield run


@pytest.fixture(scope="module")
def folder(tmp_path_factory, mistral_files):
    """A tiny Mistral with the real tokenizer and a window of 24, shorter than the longest texts."""
    config = tiny_config(vocab_size=32000, sliding_window=24)
    return save(random_model(config), tmp_path_factory.mktemp("tiny-mistral"), mistral_files)


@pytest.fixture(scope="module")
def embedder(folder):
    return Embedder.load(folder, device="cpu")
