"""tools/data/batch.py against a batch API of ours that keeps count of what it would bill."""
import json

import pytest

import generate
from batch_server import BatchServer, answers
from fault_server import KEY, answer_text
from plumbing.errors import UserError
from tools.data import batch

FAST = ["--poll", "0.02", "--part-size", "50"]


@pytest.fixture
def go(live):
    def run(server, *flags, n=120):
        return live(server, *FAST, *flags, n=n, main=batch.main)
    run.folder = live.folder
    return run


def test_a_batch_run_answers_each_request_once(go):
    server = BatchServer()
    assert go(server) == 0
    assert answers(go.folder) == dict.fromkeys(range(120), 1)
    assert len(server.batches) == 3 and set(server.billed.values()) == {1}
    sent = [json.loads(line) for file in list(server.files)[:6] for line in server.files[file].splitlines()]
    body = next(row["body"] for row in sent if row["custom_id"] == "7" and "body" in row)
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 1.0, 4096)
    assert go(server) == 0 and len(server.batches) == 3  # nothing is asked twice
    assert go(server, n=130) == 0 and len(server.batches) == 4 and set(server.billed.values()) == {1}
    report = json.loads((go.folder / "report.json").read_text())
    assert report["ledger"]["tokens in"] >= 130 * 100 and report["answers"]["generate"] == 130
    assert not any(KEY.encode() in path.read_bytes() for path in go.folder.rglob("*") if path.is_file())


def test_live_and_batch_runs_take_turns(go):
    server = BatchServer()
    assert go(server, n=30) == 0 and len(server.billed) == 30
    live = server.live
    assert generate.main(["--model", "m", "--n", "60", "--out", f"{go.folder}.jsonl"]) == 0
    assert server.live == live + 30
    assert go(server, n=90) == 0 and len(server.billed) == 60
    assert answers(go.folder) == dict.fromkeys(range(90), 1)


def test_two_models_go_into_files_of_their_own(go):
    server = BatchServer()
    assert go(server, "--model", "m", "--model", "other") == 0
    for file in list(server.files)[:6]:
        rows = map(json.loads, server.files[file].splitlines())
        assert len({row["body"]["model"] for row in rows if "body" in row}) <= 1
    assert answers(go.folder) == dict.fromkeys(range(120), 1)


def test_errors_expiry_and_flaky_calls_end_in_further_batches(go):
    server = BatchServer(errors=0.2, flaky=0.2, expire=2)
    assert go(server) == 0
    assert answers(go.folder) == dict.fromkeys(range(120), 1)
    assert set(server.billed.values()) == {1}  # a batch created but answered with 500 isn't created again


def test_no_progress_ends_the_run(go):
    server = BatchServer(errors=1.0)
    assert go(server) == 1 and len(server.batches) == 3


def test_a_refused_batch_is_named_and_can_be_sent_again(go):
    server = BatchServer()
    server.fail_validation = "model m is not for batches"
    with pytest.raises(UserError, match="model m is not for batches"):
        go(server)
    server.fail_validation = None
    assert go(server) == 0 and answers(go.folder) == dict.fromkeys(range(120), 1)


def test_the_budget_counts_what_waits_in_batches(go):
    server = BatchServer()
    budget, flags = 30_000, ("--max-answer-tokens", "500", "--part-size", "10")
    assert go(server, "--budget-tokens", str(budget), *flags, n=1000) == 0
    ledger = json.loads((go.folder / "report.json").read_text())["ledger"]
    assert 0.9 * budget < ledger["tokens"] <= budget
    assert len(server.batches) > 1  # each as large as the budget allows if all answers use their most


def test_half_a_surrogate_pair_in_a_paid_answer_costs_no_batch(go, monkeypatch):
    """JSON can hold what UTF-8 cannot; such an answer is kept as the others are."""
    monkeypatch.setattr("batch_server.answer_text", lambda message, rng: answer_text(message, rng) + "\ud83d")
    server = BatchServer()
    assert go(server) == 0 and answers(go.folder) == dict.fromkeys(range(120), 1)
