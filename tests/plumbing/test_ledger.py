"""plumbing/ledger.py: what was asked, answered and paid, through kills, budgets and changed settings."""
import json

import pytest

import generate
from answers import PROMPTS, ledger_of, raw_ids, rows_of
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
    assert model_share("llama3:8b") == ("llama3:8b", 1.0)
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
