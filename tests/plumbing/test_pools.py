"""plumbing/pools.py: generations of tasks on disk, through kills and changed files."""
import json
import math

import pytest

import plumbing.pools
from answers import raw_ids, rows_of
from fault_server import FaultServer
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


@pytest.mark.parametrize("tasks", [5, [5], [{"requests": "ten"}], {"requests": 1}])
def test_a_broken_header_is_one_line(folder, tasks):
    (folder / "header.json").write_text(json.dumps(SETTINGS | {"tasks": tasks}))
    with pytest.raises(UserError, match="header.json"):
        read_generations(folder)


# ---------------------------------------------------------------------------------------- in whole runs

def test_more_requests_draw_from_more_tasks_and_the_first_stay_what_they_were(live, capsys):
    server = FaultServer()
    assert live(server, "--tasks", "20", n=40) == 0
    first = {row["id"]: row for row in rows_of(live.folder)}
    asked = server.requests
    assert live(server, "--tasks", "210", n=40) == 0 and server.requests == asked
    assert "20 tasks serve these requests, as the run has settled; not 210" in capsys.readouterr().out

    assert live(server, "--tasks", "210", n=400) == 0
    rows = {row["id"]: row for row in rows_of(live.folder)}
    assert {key: rows[key] for key in first} == first and sorted(raw_ids(live.folder)) == list(range(400))
    (end_1, small), (end_2, large) = read_generations(live.folder)
    assert (end_1, end_2) == (40, 400)
    for kind in large:
        assert large[kind][:len(small[kind])] == small[kind]               # a pool grows at its end
        of_kind = [rows[i] for i in range(40) if rows[i]["type"] == kind]
        assert all(row["params"]["task"] in small[kind] for row in of_kind)
    used = {row["params"].get("task") for row in rows.values() if row["step"] == "generate"}
    assert len(used) > 60
    pool = {kind: len(tasks) for kind, tasks in large.items()}
    assert sum(pool.values()) == 210
    assert json.loads((live.folder / "report.json").read_text())["pool"] == pool
    assert "tasks in the pool: short-long 110" in capsys.readouterr().out

    asked = server.requests
    (live.folder / "raw.jsonl").write_text("")     # all are asked the same again
    (live.folder / "started.jsonl").write_text("")
    assert live(server, "--tasks", "210", n=400) == 0 and server.requests == asked + 400
    again = {row["id"]: row["params"] for row in rows_of(live.folder)}
    assert again == {key: rows[key]["params"] for key in again}


def test_a_run_of_an_earlier_version_keeps_its_one_generation(live, capsys):
    server = FaultServer()
    assert live(server, n=20) == 0
    header = json.loads((live.folder / "header.json").read_text())
    header["tasks"] = header["tasks"][0]["sha256"]         # how it was written before there were generations
    (live.folder / "header.json").write_text(json.dumps(header))
    asked = server.requests
    assert live(server, "--tasks", "300", n=50) == 0 and server.requests == asked + 30
    (end, pools), = read_generations(live.folder)
    assert end == math.inf and sum(map(len, pools.values())) == 60
    assert "60 tasks serve these requests" in capsys.readouterr().out
