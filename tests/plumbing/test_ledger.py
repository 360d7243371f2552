"""plumbing/ledger.py: what was asked, answered and paid, through kills, budgets and changed settings."""
import json
import os
import subprocess
import sys

import pytest

import generate
from answers import PROMPTS, ROOT, ledger_of, raw_ids, rows_of
from fault_server import FaultServer
from plumbing.errors import UserError
from plumbing.files import append, open_log
from plumbing.ledger import BudgetReached, Ledger, Stopping, model_price, model_share

REQUEST = {"id": 1, "step": "generate", "type": "sts", "params": {}, "model": "m"}


def answer_to(request, tokens_in=10, tokens_out=20, response="x"):
    return request | {"response": response,
                      "usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}}


# --------------------------------------------------------------------------------------- the books, by hand

def test_a_try_ends_with_an_answer_a_refusal_or_neither(tmp_path):
    with Ledger(tmp_path, {("m", "in"): 1.0, ("m", "out"): 2.0}) as ledger:
        for key, end in enumerate([{"refused": 429}, {}, {"refused": "unsent"}, {}]):
            request = REQUEST | {"id": key}
            ledger.start(request, 100, 1000)
            assert ledger.reserved.total() == 1100
            ledger.end(request, **end)
        ledger.start(REQUEST, 100, 1000)
        ledger.end(REQUEST, answer_to(REQUEST))
    for books in (ledger, Ledger(tmp_path, ledger.prices, read_only=True)):        # in memory, and from disk
        assert books.answered == {1} and books.reserved.total() == 0
        assert books.spent == {("m", "in"): 10, ("m", "out"): 20} and books.cost(books.spent) == 50
        assert books.tries_lost == 2 and books.lost.total() == 2200
        assert books.summary()["models"] == {"m": {"in": 10, "out": 20}}


@pytest.mark.parametrize("lines, answered, lost", [
    ("", False, 0),
    ("s", True, 0),                                # started, answered
    ("s", False, 1),                               # started, and then a kill
    ("sr", False, 0),                              # refused
    ("srs", True, 0),
    ("ss", True, 1),                               # the first was lost, the second answered
    ("sssr", True, 1),
    ("sssr", False, 2),
])
def test_lost_tries_are_the_started_that_were_neither_refused_nor_answered(tmp_path, lines, answered, lost):
    rows = {"s": {"id": 1, "model": "m", "tokens_in": 3, "tokens_out": 4}, "r": {"id": 1, "refused": 500}}
    with open_log(tmp_path / "started.jsonl") as file:
        for letter in lines:
            append(file, rows[letter])
    with open_log(tmp_path / "raw.jsonl") as file:
        if answered:
            append(file, answer_to(REQUEST))
    books = Ledger(tmp_path, {}, read_only=True)
    assert (books.tries_lost, books.lost.total()) == (lost, 7 * lost)


@pytest.mark.parametrize("error, code", [(BudgetReached("used up"), 0), (Stopping("interrupted"), 1)])
def test_a_stopping_ends_the_block_and_is_printed(tmp_path, capsys, error, code):
    with Ledger(tmp_path, {}) as ledger:
        raise error
    assert ledger.exit_code == code and ledger.lock.closed
    assert capsys.readouterr().out == (
        f"stopped: {error}; what was answered stays, and the same command goes on from there\n")


def test_other_errors_pass_and_close_the_books(tmp_path):
    with pytest.raises(UserError):
        with Ledger(tmp_path, {}) as ledger:
            raise UserError("a mistake")
    assert ledger.lock.closed


def test_flags_of_models_and_prices():
    assert model_share("a:0.5") == ("a", 0.5) and model_share("a") == ("a", 1.0)
    assert model_share("llama3:8b") == ("llama3:8b", 1.0) and model_share("qwen2:72") == ("qwen2:72", 1.0)
    assert model_share("llama3:8b:0.5") == ("llama3:8b", 0.5)
    assert model_price("llama3:8b:1:2") == {("llama3:8b", "in"): 1e-6, ("llama3:8b", "out"): 2e-6}


# ----------------------------------------------------------------------------------------------- budgets

@pytest.mark.parametrize("name, flags, limit", [
    ("tokens", ["--budget-tokens", "40_000"], 40_000),
    ("usd", ["--budget-usd", "0.05", "--price", "m:1:2"], 0.05),
])
def test_budgets_are_never_passed(live, name, flags, limit):
    server = FaultServer(delay=0.002)
    assert live(server, *flags, "--max-answer-tokens", "500", n=1000) == 0
    ledger = ledger_of(live.folder)
    assert ledger["tokens in"] == sum(len(body["messages"][0]["content"]) // 4 for body in server.bodies)
    assert 0.9 * limit < ledger[name] <= limit
    asked = server.requests
    assert live(server, *flags, "--max-answer-tokens", "500", n=1000) == 0
    assert server.requests - asked < 10            # only what there is still room for
    ids = raw_ids(live.folder)
    assert len(ids) == len(set(ids)) < 1000


def test_tries_that_may_be_paid_count_against_the_budget(live):
    server = FaultServer({"cut": 1.0})
    assert live(server, "--budget-tokens", "5000", "--max-answer-tokens", "1000", "--tries", "1000") == 0
    assert server.requests == 4                    # of about 1,150 each


def test_a_server_that_is_down_costs_nothing(live):
    server = FaultServer()
    server.close()
    assert live(server, "--tries", "2", "--budget-tokens", "20_000") == 1
    rows = rows_of(live.folder, "started")
    assert sum("tokens_in" in row for row in rows) == sum(row.get("refused") == "unsent" for row in rows) > 0
    assert Ledger(live.folder, {}, read_only=True).summary()["tries perhaps paid without an answer"] == 0


# -------------------------------------------------------------------------------------------- the files

def test_torn_lines_are_removed_and_asked_again(live):
    server = FaultServer()
    live(server, n=20)
    asked, raw = server.requests, live.folder / "raw.jsonl"
    whole = raw.read_bytes()
    for torn in (1, 7, len(whole.splitlines(keepends=True)[-1]) - 1):
        raw.write_bytes(whole[:-torn])
        assert live(server, n=20) == 0
        asked += 1
        assert server.requests == asked
        assert sorted(raw_ids(live.folder)) == list(range(20))
    assert ledger_of(live.folder)["tries perhaps paid without an answer"] == 3


@pytest.mark.parametrize("line, words", [
    (b"garbage\n", "not JSON"),
    (b'{"id": 3}\n', "'step' is missing"),
    (json.dumps(answer_to(REQUEST) | {"usage": {}}).encode() + b"\n", "mend or delete"),
])
def test_a_broken_line_in_the_middle_is_named(live, line, words):
    live(FaultServer(), n=5)
    raw = live.folder / "raw.jsonl"
    lines = raw.read_bytes().splitlines(keepends=True)
    lines[2] = line
    raw.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"raw\.jsonl:3.*" + words):
        live(FaultServer(), n=5)


def test_any_characters_that_a_server_sends_are_kept(live):
    answer = {"choices": [{"message": {"content": "half a pair \ud800, a break \u2028 and \r"}}]}
    brainstorms = FaultServer()
    live(brainstorms, n=1)
    assert live(FaultServer(scripted=lambda *_: (200, answer, {})), n=3) == 0
    assert [row["response"] for row in rows_of(live.folder) if row["id"] in (1, 2)] == [
        answer["choices"][0]["message"]["content"]] * 2
    assert generate.main(["--replay", str(live.folder / "raw.jsonl"), "--out", str(live.out)]) == 0


def test_a_full_disk_leaves_no_torn_line(tmp_path):
    class Full:
        """A file that takes ten bytes of each line."""

        def __init__(self, path):
            self.file, self.name = open(path, "ab+", buffering=0), str(path)

        def write(self, data):
            return self.file.write(data[:10])

        def __getattr__(self, name):
            return getattr(self.file, name)

    append(open(tmp_path / "log", "ab", buffering=0), {"a": 1})
    with pytest.raises(UserError, match="disk"):
        append(Full(tmp_path / "log"), {"b": "long enough"})
    assert (tmp_path / "log").read_text() == '{"a": 1}\n'


# ------------------------------------------------------------------------------------ one run, one setting

@pytest.mark.parametrize("flags, words", [
    (["--seed", "1"], "seed"), (["--model", "other"], "models"), (["--temperature", "0.5"], "temperature"),
    (["--top-p", "0.5"], "top_p"),
])
def test_other_settings_are_refused(live, flags, words):
    server = FaultServer()
    live(server, n=5)
    asked = server.requests
    with pytest.raises(UserError, match=words):
        live(server, *flags, n=5)
    assert server.requests == asked


def test_changed_tasks_or_prompts_are_refused(live, monkeypatch):
    server = FaultServer()
    live(server, n=5)
    with (live.folder / "tasks.jsonl").open("a") as file:
        file.write('{"type": "sts", "task": "More."}\n')
    with pytest.raises(UserError, match="tasks.jsonl"):
        live(server, n=6)
    with monkeypatch.context() as patch:
        patch.setattr(generate, "load_prompts", lambda: PROMPTS | {"num_tasks": 21})
        with pytest.raises(UserError, match="prompts"):
            live(server, n=6)
    other_order = dict(reversed(PROMPTS["languages"].items()))             # by which the draws go
    monkeypatch.setattr(generate, "load_prompts", lambda: PROMPTS | {"languages": other_order})
    with pytest.raises(UserError, match="order in prompts"):
        live(server, n=6)


def test_one_process_at_a_time(live):
    with Ledger(live.folder, {}):
        with pytest.raises(UserError, match="another process"):
            live(FaultServer())
    assert live(FaultServer(), n=5) == 0


# ------------------------------------------------------------------------------- batches beside a live run

def part(folder, ids, status="submitted"):
    """A part of requests that wait at a batch API, as tools/data/batch.py writes it."""
    (folder / "batches").mkdir(parents=True, exist_ok=True)
    rows = [{"custom_id": str(key), "body": {"model": "m", "messages": [{"content": "x"}]}} for key in ids]
    (folder / "batches/0001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    state = {"status": status, "model": "m", "tokens_in": 100, "tokens_out": 1000}
    (folder / "batches/0001.json").write_text(json.dumps(state))


def test_a_lost_try_stays_lost_when_a_batch_answers_its_request(tmp_path):
    with open_log(tmp_path / "started.jsonl") as file:
        append(file, {"id": 1, "model": "m", "tokens_in": 3, "tokens_out": 4})
    with open_log(tmp_path / "raw.jsonl") as file:
        append(file, answer_to(REQUEST) | {"batch": "b"})
    books = Ledger(tmp_path, {}, read_only=True)
    assert books.answered == {1} and (books.tries_lost, books.lost.total()) == (1, 7)


def test_a_live_run_leaves_alone_what_waits_in_batches(live, capsys):
    part(live.folder, range(5, 15))
    server = FaultServer()
    assert live(server, n=20) == 1
    assert sorted(raw_ids(live.folder)) == [*range(5), *range(15, 20)]
    assert "10 requests wait in" in capsys.readouterr().out
    part(live.folder, range(5, 15), status="joined")
    assert live(server, n=20) == 0 and sorted(raw_ids(live.folder)) == list(range(20))


def test_a_used_up_budget_says_what_is_only_reserved(tmp_path):
    part(tmp_path, [3])
    prices = {("m", "in"): 1e-6, ("m", "out"): 1e-3}
    with Ledger(tmp_path, prices, budget_usd=1.5) as ledger:
        with pytest.raises(BudgetReached, match=r"\$0\.0000 spent.*\$1\.0001 only reserved, for what waits"):
            ledger.start(REQUEST, 10, 1000)
    with Ledger(tmp_path, prices, budget_tokens=1200) as ledger:
        with pytest.raises(BudgetReached, match="1,100 tokens only reserved"):
            ledger.start(REQUEST, 10, 1000)


# ------------------------------------------------------------------------------------ truncated answers

def test_truncated_answers_are_asked_again_with_more_room(live):
    def script(number, body, headers):
        if body["max_tokens"] < 200 and "JSON object" in body["messages"][0]["content"] and number % 2:
            answer = {"message": {"content": '{"S1": "cut'}, "finish_reason": "length"}
            return 200, {"choices": [answer], "usage": {"prompt_tokens": 10, "completion_tokens": 100}}, {}

    server = FaultServer(scripted=script)
    assert live(server, "--max-answer-tokens", "100", "--concurrency", "1", n=20) == 0
    truncated = [row["id"] for row in rows_of(live.folder) if row["finish_reason"] == "length"]
    asked, before = server.requests, ledger_of(live.folder)["tokens"]
    assert 5 < len(truncated) < 15
    assert live(server, "--max-answer-tokens", "100", "--again-truncated", n=20) == 0      # no more room
    assert live(server, "--max-answer-tokens", "400", n=20) == 0                           # not asked for
    assert server.requests == asked
    raw = (live.folder / "raw.jsonl").read_bytes()
    assert live(server, "--max-answer-tokens", "400", "--again-truncated", n=20) == 0
    assert server.requests == asked + len(truncated)
    assert sorted(raw_ids(live.folder)) == list(range(20))
    assert not any(row["finish_reason"] == "length" for row in rows_of(live.folder))
    after = ledger_of(live.folder)
    assert after["tokens"] >= before + 100 * len(truncated)
    assert after["tries perhaps paid without an answer"] == 0
    assert live(server, "--max-answer-tokens", "400", "--again-truncated", n=20) == 0
    assert server.requests == asked + len(truncated) and ledger_of(live.folder) == after
    (live.folder / "raw.jsonl").write_bytes(raw)               # as if a kill had come between the two files
    books = Ledger(live.folder, {}, read_only=True)
    assert books.spent.total() == before and len(books.answered & set(range(20))) == 20


# ----------------------------------------------------------------------------------------- broken files

@pytest.mark.parametrize("name, content, words", [
    ("header.json", "{", "header.json: not readable"),
    ("header.json", '{"tasks": 3}', "'tasks'"),
    ("header.json", "[]", "no JSON object"),
    ("tasks.jsonl", None, "tasks.jsonl is not as it was"),
    ("started.jsonl", '{"id": 1}\n', "'model' is missing"),
    ("started.jsonl", "[]\n", "no JSON object"),
    ("raw.jsonl", json.dumps(answer_to(REQUEST, tokens_in=-1)) + "\n", "mend or delete"),
    ("raw.jsonl", json.dumps(answer_to(REQUEST, tokens_in=10**400)) + "\n", "mend or delete"),
    ("raw.jsonl", json.dumps(answer_to(REQUEST) | {"usage": {}}) + "\n", "mend or delete"),
    ("truncated.jsonl", json.dumps(answer_to(REQUEST) | {"usage": {}}) + "\n", "truncated.jsonl:1.*mend or"),
    ("truncated.jsonl", json.dumps(answer_to(REQUEST, tokens_in=-1)) + "\n", "truncated.jsonl:1.*mend or"),
    ("started.jsonl", json.dumps({"id": 1, "model": "m", "tokens_in": 10**400, "tokens_out": 1}) + "\n",
     "started.jsonl.*mend or delete"),
    ("batches/0001.json", "{", "0001.json: not readable"),
    ("batches/0001.json", json.dumps({"status": "new", "model": "m", "tokens_in": 10**400, "tokens_out": 1}),
     "0001.json.*mend or delete"),
    ("batches/0001.jsonl", '{"custom_id": 3}\n', "'custom_id'"),
    ("batches/0001.jsonl", '{"custom_id": "abc", "body": {}}\n', "0001.jsonl:1.*abc.*mend or delete"),
])
def test_broken_files_are_named_in_one_line(live, name, content, words):
    live(FaultServer(), n=5)
    part(live.folder, [1], status="new")
    path = live.folder / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        live(FaultServer(), "--price", "m:1:2", n=6)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", [["--price", "m:-1:2"], ["--price", "m:nan:2"], ["--price", "m:1"],
                                  ["--model", "m:-1.0"], ["--tasks", "-5"], ["--budget-usd", "-1"],
                                  ["--n", "0"]])
def test_numbers_that_cannot_be_are_refused(flag):
    with pytest.raises(UserError, match=flag[0]):
        generate.options(["--model", "m", *flag])


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_disk_that_fills_up_leaves_whole_lines(tmp_path, blocks):
    """A process whose files may not grow past a block boundary, as on a full disk."""
    limit = 4096 * blocks + 500
    code = ("import resource, sys; from plumbing.errors import command; import generate; "
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, -1)); command(generate.main)")
    server = FaultServer()
    done = subprocess.run([sys.executable, "-c", code, "--model", "m", "--n", "60", "--tasks", "60", "--out",
                           tmp_path / "run.jsonl"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": ""})
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "cannot be written" in done.stderr or "full" in done.stderr
    for path in (tmp_path / "run").glob("*.jsonl"):
        assert path.read_bytes()[-1:] in (b"", b"\n")
        assert all(json.loads(line) for line in path.open())
    assert not list(tmp_path.rglob("*.tmp"))
    server.close()
