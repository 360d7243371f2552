"""`make base BASE=org/name`: tools/models/fetch.py and `hf download` against a local stand-in of the hub."""
import pytest

from hub_standin import Hub
from model import Embedder
from scripts import run_tool
from tiny import random_model, save, tiny_config


def fetch(hub, tmp_path, base="org/tiny"):
    return run_tool("models.fetch", base, tmp_path / "models" / "tiny",
                    env=hub.environment(tmp_path / "cache") | {"HF_HUB_OFFLINE": "0"})


@pytest.fixture
def repository(tmp_path, mistral_files):
    """A repository as the hub has them: shards, an index, and what nobody here wants."""
    model = random_model(tiny_config(vocab_size=32000, hidden_size=32), causal_lm=True)
    folder = save(model, tmp_path / "repository", mistral_files, max_shard_size="5MB")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "README.md"):
        (folder / name).write_bytes(b"x" * 1000)
    assert (folder / "model.safetensors.index.json").exists()
    return folder


def refused(done, tmp_path):
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert not (tmp_path / "models" / "tiny").exists()
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("fetch.py: ")
    return last


def test_a_hub_model_is_fetched_and_loads(repository, tmp_path):
    with Hub({"models/org/tiny": repository}) as hub:
        done = fetch(hub, tmp_path)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "models" / "tiny"
        assert not [*folder.glob("*.bin"), *folder.glob("consolidated*")]
        ours, source = (Embedder.load(place).encode(["a text"]) for place in (folder, repository))
        assert ours.equal(source)
        again = fetch(hub, tmp_path)
        assert again.returncode == 2 and "already there" in again.stderr


def test_an_unknown_model_says_what_to_do(repository, tmp_path):
    with Hub({"models/org/tiny": repository}) as hub:
        assert "hf auth login" in refused(fetch(hub, tmp_path, "org/none"), tmp_path)


def test_a_model_that_cannot_run_here_is_refused_before_its_weights_travel(repository, tmp_path):
    (repository / "config.json").write_text('{"model_type": "bert"}')
    with Hub({"models/org/tiny": repository}) as hub:
        assert "'bert'" in refused(fetch(hub, tmp_path), tmp_path)
        assert not [request for request in hub.requests if "safetensors" in request]


def test_a_lost_hub_is_no_success_and_a_rerun_goes_on(repository, tmp_path):
    """`hf download` exits 0 when the folder exists and the hub does not answer."""
    (repository / "tokenizer.json").rename(repository / "kept")
    with Hub({"models/org/tiny": repository}) as hub:
        assert "tokenizer.json did not arrive" in refused(fetch(hub, tmp_path), tmp_path)
    refused(fetch(hub, tmp_path), tmp_path)                       # nobody answers any more
    (repository / "kept").rename(repository / "tokenizer.json")
    with Hub({"models/org/tiny": repository}) as hub:
        assert fetch(hub, tmp_path).returncode == 0
        assert not [r for r in hub.requests if r.startswith("GET") and "00001" in r]      # it was there
