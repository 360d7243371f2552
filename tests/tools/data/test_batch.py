"""tools/data/batch.py against a batch API of ours that keeps count of what it would bill."""
import collections
import itertools
import json
import time

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


# ------------------------------------------------------------------------------ a provider that misbehaves

def spoiled(server, spoil):
    """Let `spoil(number, row)` change each line of the server's output files; number counts the lines."""
    run_batch, counter = server.run_batch, itertools.count()

    def run(identifier, file):
        result = run_batch(identifier, file)
        name = result.get("output_file_id")
        if name:
            rows = map(json.loads, server.files[name].splitlines())
            lines = [spoil(next(counter), row) for row in rows]
            texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
            server.files[name] = "".join(text + "\n" for text in texts)
        return result

    server.run_batch = run
    return server


def refusal(status, message, **more):
    return {"response": {"status_code": status, "body": {"error": {"message": message, **more}}}}


BAD_LINES = [
    {"custom_id": None}, {"custom_id": "x"}, {"custom_id": "99999"}, {"custom_id": [1]}, {"response": None},
    {"response": "text"}, {"response": {}}, {"response": {"status_code": 200, "body": None}},
    {"response": {"status_code": 200, "body": "<html>"}}, {"response": {"status_code": None, "body": {}}},
    "not json", "[]", "null",
    refusal(400, "an odd prompt"), refusal(402, "no credit"),
    refusal(429, "quota", code="insufficient_quota"), refusal(401, "who are you"),
]


def test_bad_lines_stop_no_other_and_stay_open(go):
    def spoil(number, row):
        bad = BAD_LINES[number] if number < len(BAD_LINES) else {}
        return bad if isinstance(bad, str) else row | bad

    server = spoiled(BatchServer(), spoil)
    assert go(server, n=40) == 0
    assert answers(go.folder) == dict.fromkeys(range(40), 1)
    assert len(server.batches) == 2                # a second one, for the open requests alone
    assert collections.Counter(server.billed.values()) == {1: 40 - len(BAD_LINES), 2: len(BAD_LINES)}


def test_a_moderated_line_is_recorded(go):
    bad = refusal(400, "no", code="data_inspection_failed")
    server = spoiled(BatchServer(), lambda number, row: row | bad if number == 3 else row)
    assert go(server, n=20) == 0 and len(server.batches) == 1
    report = json.loads((go.folder / "report.json").read_text())
    assert report["dropped"]["content filter"] == 1


def test_lines_that_stay_refused_end_the_run_in_good_order(go, capsys):
    def spoil(number, row):
        return row | refusal(400, "an odd prompt") if row["custom_id"] == "3" else row

    server = spoiled(BatchServer(), spoil)
    for _ in range(2):
        assert go(server, n=20) == 1
        assert "an odd prompt" in capsys.readouterr().out
        assert answers(go.folder) == {key: 1 for key in range(20) if key != 3}


def test_a_field_that_lines_refuse_is_left_out_of_the_next_batch(go):
    """Each line is judged by its own body, as it was sent."""
    server = BatchServer()

    def bodies():
        rows = [json.loads(line) for file in server.files.values() for line in file.splitlines()]
        return {row["custom_id"]: row["body"] for row in rows if "method" in row}

    def spoil(number, row):
        refused = "temperature" in bodies()[row["custom_id"]]
        return row | refusal(400, "temperature is not supported") if refused else row

    assert go(spoiled(server, spoil), n=20) == 0 and len(server.batches) == 2
    assert answers(go.folder) == dict.fromkeys(range(20), 1)


def reply_first(server, path, *bodies):
    """Let the first GETs or POSTs of a path be answered by these bytes, at status 200."""
    left, calls = list(bodies), []
    handler = server.RequestHandlerClass

    class First(handler):
        def reply(self, value):
            if self.path.partition("?")[0] == f"/v1{path}":
                calls.append(self.path)
                if self.command == "GET" and left:
                    value = left.pop(0)
            super().reply(value)

    server.RequestHandlerClass = First
    return calls


@pytest.mark.parametrize("body", [
    b"<html>busy</html>", b"null", b'{"data": null}', b'{"data": [], "has_more": true}',
    b'{"data": [null, {}], "has_more": true}',
])
def test_odd_pages_of_the_list_of_batches(go, body):
    server = BatchServer()
    reply_first(server, "/batches", body)
    assert go(server, n=20) == 0 and answers(go.folder) == dict.fromkeys(range(20), 1)
    assert set(server.billed.values()) == {1}


@pytest.mark.parametrize("body", [b"<html>busy</html>", b"{}", b'{"status": null}',
                                  b'{"status": "validating"}'])
def test_odd_words_on_a_batch(go, body):
    server = BatchServer()
    reply_first(server, "/batches/batch-0", body)
    assert go(server, n=20) == 0 and answers(go.folder) == dict.fromkeys(range(20), 1)


def test_a_page_in_place_of_the_output_file_is_fetched_again(go):
    server = BatchServer()
    reply_first(server, "/files/file-batch-0-output_file_id/content", b"<html>busy</html>")
    assert go(server, n=20) == 0 and len(server.batches) == 1 and set(server.billed.values()) == {1}


def test_an_api_version_stays_at_the_end_of_every_address(go, monkeypatch):
    server = BatchServer()
    paths = []
    handler = server.RequestHandlerClass

    class Azure(handler):
        def reply(self, value):
            paths.append(self.path)
            super().reply(value)

        def do_POST(self):
            self.full, self.path = self.path, self.path.partition("?")[0]
            super().do_POST()

        def do_GET(self):
            self.path, _, query = self.path.partition("?")
            assert "api-version=1" in query.split("&")
            self.path += "?" + query
            if "/content" in self.path or "batch-" in self.path:
                self.path = self.path.partition("?")[0]
            super().do_GET()

    server.RequestHandlerClass = Azure
    server.url += "?api-version=1"
    assert go(server, n=20) == 0 and answers(go.folder) == dict.fromkeys(range(20), 1)
    assert any("api-version=1&limit=100" in path for path in paths)


def test_a_file_is_awaited_until_it_is_processed(go):
    server = BatchServer()
    states = ["uploaded", "running", "processed"]
    handler = server.RequestHandlerClass
    order = []

    class Slow(handler):
        def reply(self, value):
            if self.command == "POST" and self.path == "/v1/files":
                value = value | {"status": "pending"}
            if self.command == "POST" and self.path == "/v1/batches":
                order.append("batch")
            super().reply(value)

        def do_GET(self):
            if self.path == "/v1/files/file-0":
                order.append(states[0])
                return self.reply({"id": "file-0", "status": states.pop(0)})
            super().do_GET()

    server.RequestHandlerClass = Slow
    assert go(server, n=20) == 0 and order == ["uploaded", "running", "processed", "batch"]


def test_parts_that_a_full_queue_refuses_go_one_after_another(go):
    server = BatchServer(ready_after=0.4)
    run_batch, under_way = server.run_batch, []

    def run(identifier, file):
        now = time.monotonic()
        under_way[:] = [moment for moment in under_way if moment > now - 0.4]
        if under_way:
            error = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached for m"}
            return {"status": "failed", "errors": {"data": [error]}}
        under_way.append(now)
        return run_batch(identifier, file)

    server.run_batch = run
    assert go(server) == 0                         # three parts of 50, 50 and 20
    assert answers(go.folder) == dict.fromkeys(range(120), 1) and set(server.billed.values()) == {1}
    assert len(server.batches) > 3


def test_a_part_too_large_for_the_queue_is_named(go):
    server = BatchServer()
    server.fail_validation = "Enqueued token limit reached for m"
    with pytest.raises(UserError, match="0001.jsonl: too large for the provider's queue.*--part-size"):
        go(server, "--tries", "3", n=20)


def test_a_killed_batch_run_and_a_live_run_pay_nothing_twice(go, monkeypatch, capsys):
    server = BatchServer()

    def killed(self, client):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(batch.Part, "poll", killed)
        go(server, n=30)
    live, argv = server.live, ["--model", "m", "--n", "40", "--tasks", "60", "--out", f"{go.folder}.jsonl"]
    assert generate.main(argv) == 1 and server.live == live + 10
    assert "30 requests wait in" in capsys.readouterr().out
    assert go(server, n=40) == 0 and set(server.billed.values()) == {1} and len(server.billed) == 30
    assert answers(go.folder) == dict.fromkeys(range(40), 1)
