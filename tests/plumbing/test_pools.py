"""plumbing/pools.py: generations of tasks on disk, through kills and changed files."""
import json

import pytest

import plumbing.pools
from plumbing.errors import UserError
from plumbing.pools import check_settings, freeze_generation, last_pools, read_generations, requests_covered

SETTINGS = {"seed": 0}
SMALL, LARGE = {"a": ["one"], "b": ["two"]}, {"a": ["one", "three"], "b": ["two"]}


@pytest.fixture
def folder(tmp_path):
    """A run that has settled on SMALL for its first ten requests."""
    check_settings(tmp_path, SETTINGS)
    assert read_generations(tmp_path) == [] and requests_covered([]) == 0 and last_pools([]) == {}
    assert freeze_generation(tmp_path, 10, SMALL) == [(10, SMALL)]
    return tmp_path


def test_generations_by_hand(folder):
    generations = freeze_generation(folder, 30, LARGE)
    assert generations == read_generations(folder) == [(10, SMALL), (30, LARGE)]
    assert requests_covered(generations) == 30 and last_pools(generations) == LARGE
    assert (folder / "tasks.jsonl").read_text().count("\n") == 2
    assert (folder / "tasks2.jsonl").read_text() == '{"type": "a", "task": "three"}\n'
    check_settings(folder, SETTINGS)               # which stand beside them, as before
    assert json.loads((folder / "header.json").read_text())["seed"] == 0


def test_a_kill_before_the_header_names_a_file_leaves_the_old_state(folder, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(plumbing.pools, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            freeze_generation(folder, 30, LARGE | {"a": ["one", "lost"]})
    assert (folder / "tasks2.jsonl").exists() and read_generations(folder) == [(10, SMALL)]
    assert freeze_generation(folder, 30, LARGE)[1] == (30, LARGE)


@pytest.mark.parametrize("change", ["append", "remove"])
@pytest.mark.parametrize("name", ["tasks.jsonl", "tasks2.jsonl"])
def test_a_changed_file_is_named(folder, change, name):
    freeze_generation(folder, 30, LARGE)
    path = folder / name
    if change == "append":
        path.write_text(path.read_text() + '{"type": "a", "task": "four"}\n')
    else:
        path.unlink()
    with pytest.raises(UserError, match=name):
        read_generations(folder)
