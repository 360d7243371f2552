"""plumbing/client.py against servers that fail, on real sockets of 127.0.0.1."""
import collections
import email.utils
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

import generate
from answers import ROOT, ledger_of, raw_ids, rows_of
from fault_server import KEY, FaultServer
from plumbing.errors import UserError
from tools.bench.ratelimit import LimitedServer


# ------------------------------------------------------------------------------------------ what is sent

def test_connections_are_reused(live):
    server = FaultServer()
    live(server, "--concurrency", "4", n=200)
    assert server.requests > 200
    assert server.connections <= 4 * 5             # four threads, a few waves of brainstorming


def test_models_share_the_requests(live):
    server = FaultServer()
    live(server, "--model", "big:0.75", "--model", "llama3:8b:0.25", n=200)
    counts = collections.Counter(body["model"] for body in server.bodies)
    assert counts["big"] / server.requests == pytest.approx(0.75, abs=0.12)
    assert set(counts) == {"big", "llama3:8b"}


FIELDS = [
    ("max_tokens",
     "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."),
    ("temperature", "Unsupported value: 'temperature' does not support 1.0 with this model."),
    ("response_format", "json_object mode is not available"),
]


@pytest.mark.parametrize("field, message", FIELDS)
def test_fields_that_a_server_refuses_are_left_out_from_then_on(live, field, message):
    def script(number, body, headers):
        if field in body:
            return 400, {"error": {"message": message}}, {}

    server = FaultServer(scripted=script)
    assert live(server, "--concurrency", "3", n=30) == 0
    refused = sum(field in body for body in server.bodies)
    assert 1 <= refused <= 3                       # at most once a thread
    assert ("max_completion_tokens" in server.bodies[-1]) == (field == "max_tokens")
    assert sorted(raw_ids(live.folder)) == list(range(30))


def test_a_field_refused_under_both_names_stops(live):
    refusal = 400, {"error": {"message": "max_tokens, max_completion_tokens: no"}}, {}
    server = FaultServer(scripted=lambda *_: refusal)
    with pytest.raises(UserError, match="max_completion_tokens"):
        live(server, "--concurrency", "1")
    assert server.requests == 2


def test_a_field_is_given_up_only_if_an_answer_comes_without_it(live):
    """The text of one prompt may sound like a refusal of a field."""
    def script(number, body, headers):
        if number == 12:
            script.refused = body["messages"]
        if number >= 12 and body["messages"] == script.refused:
            return 400, {"error": {"message": "temperature: is not allowed as a topic"}}, {}

    server = FaultServer(scripted=script)
    assert live(server, "--concurrency", "1", n=30) == 1
    assert len(raw_ids(live.folder)) == 29
    assert sum("temperature" not in body for body in server.bodies) == 1


def test_of_two_fields_that_exclude_each_other_the_users_stays(live):
    def script(number, body, headers):
        if "temperature" in body and "top_p" in body:
            return 400, {"error": {"message": "temperature and top_p cannot both be specified"}}, {}

    server = FaultServer(scripted=script)
    assert live(server, "--concurrency", "1", "--top-p", "0.9", n=5) == 0
    assert server.bodies[-1]["top_p"] == 0.9 and "temperature" not in server.bodies[-1]


def test_more_fields_join_the_body(live, capsys):
    server = FaultServer()
    fields = '{"chat_template_kwargs": {"enable_thinking": false}, "top_k": 3}'
    assert live(server, "--body", fields, n=5) == 0
    assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body in server.bodies)
    assert {body["top_k"] for body in server.bodies} == {3}


@pytest.mark.parametrize("text, words", [("[1]", "an object"), ("{", "not JSON"),
                                         ('{"stream": true}', "stream"),
                                         ('{"max_tokens": 3}', "--max-answer-tokens")])
def test_a_body_that_cannot_be_is_refused(text, words):
    with pytest.raises(UserError, match=words):
        generate.options(["--model", "m", "--body", text])


@pytest.mark.parametrize("value", ["0", "-5", "1001", "1000000"])
def test_absurd_numbers_are_refused(value):
    with pytest.raises(UserError, match="--concurrency"):
        generate.options(["--model", "m", "--concurrency", value])


# ---------------------------------------------------------------------------------------- what comes back

def completion(message, **more):
    return {"choices": [{"message": message, "finish_reason": "stop"}]} | more


def only_examples(*answers):
    """A script: brainstorms as ever, then these answers (status, object, headers), the last one for good."""
    left = list(answers)

    def script(number, body, headers):
        if "JSON object" in body["messages"][0]["content"]:
            return left.pop(0) if len(left) > 1 else left[0]
    return script


@pytest.mark.parametrize("message, text", [
    ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
    ({"content": None, "reasoning_content": "c"}, "c"),
    ({"content": "d", "reasoning_content": "e"}, "d"),
])
def test_the_whole_message_is_kept(live, message, text):
    hidden = message | {"note": f"for {KEY}"}
    live(FaultServer(scripted=only_examples((201, completion(hidden), {}))), n=2)
    rows = [row for row in rows_of(live.folder) if row["step"] == "generate"]
    assert [row["response"] for row in rows] == [text] * 2
    assert rows[0]["message"] == message | {"note": "for [key]"}


def test_tokens_of_thoughts_count_against_the_budget(live):
    usage = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 1030}
    server = FaultServer(scripted=only_examples((200, completion({"content": "{}"}, usage=usage), {})))
    live(server, "--budget-tokens", "20_000", "--max-answer-tokens", "1000", "--concurrency", "1")
    rows = [row for row in rows_of(live.folder) if row["step"] == "generate"]
    assert {row["usage"]["completion_tokens"] for row in rows} == {1020} and 10 < len(rows) < 20
    assert 18_000 < ledger_of(live.folder)["tokens"] <= 20_000


ERROR = {"choices": [{"message": {"content": ""}, "finish_reason": "error", "error": {"message": "no"}}]}


@pytest.mark.parametrize("status, value, paid", [
    (200, ERROR, 1),
    (400, {"error": {"message": "could not make JSON", "code": "json_validate_failed"}}, 1),
    (504, {}, 1), (520, {}, 1), (522, {}, 1), (524, {}, 1), (408, {}, 1),      # a gateway's; perhaps billed
    (502, {}, 0), (521, {}, 0), (530, {}, 0), (498, {}, 0), (429, {}, 0),
])
def test_what_passes_is_tried_again_and_what_may_be_billed_is_counted(live, status, value, paid):
    def script(number, body, headers):
        return (status, value, {}) if number == 0 else None

    server = FaultServer(scripted=script)
    assert live(server, n=4) == 0 and sorted(raw_ids(live.folder)) == list(range(4))
    assert ledger_of(live.folder)["tries perhaps paid without an answer"] == paid


@pytest.mark.parametrize("status", [400, 403])
def test_one_hopeless_prompt_does_not_stop_the_others(live, status):
    def script(number, body, headers):
        if number == 12:
            return status, {"error": {"message": "an odd prompt"}}, {}

    server = FaultServer(scripted=script)
    assert live(server, n=30) == 1
    assert len(raw_ids(live.folder)) == 29
    assert live(server, n=30) == 0                 # asked again, by a later run
    assert ledger_of(live.folder)["tries perhaps paid without an answer"] == 0


def deep(levels: int):
    """A list in lists, as JSON."""
    return b"[" * levels + b"]" * levels


@pytest.mark.parametrize("status, answer, headers", [
    (302, b"", {"Location": "http://[bad"}),
    (200, b'{"choices": [{"message": {"content": %s}}]}' % deep(400), {}),
    (200, b'{"choices": [{"message": {"content": "x", "more": %s}}]}' % deep(900), {}),
])
def test_what_cannot_be_read_is_asked_again(live, status, answer, headers):
    server = FaultServer(scripted=lambda number, *_: (status, answer, headers) if number % 3 == 0 else None)
    assert live(server, "--concurrency", "2", n=10) == 0
    assert sorted(raw_ids(live.folder)) == list(range(10))


def test_a_redirect_names_its_target(live):
    server = FaultServer(scripted=lambda *_: (307, {}, {"Location": f"/v2/chat/completions?key={KEY}"}))
    target = r"http://127.0.0.1:\d+/v2/chat/completions \("
    with pytest.raises(UserError, match="answered 307: it sends us to " + target):
        live(server)


def test_a_servers_words_do_not_steer_the_terminal(live, capfd):
    words = "\x1b[2J\x1b]0;title\x07 lone \ud800 pair\r\n\u202e"
    server = FaultServer(scripted=lambda *_: (503, {"error": {"message": words}}, {}))
    assert live(server, "--tries", "1") == 1
    with pytest.raises(UserError) as caught:
        live(FaultServer(scripted=lambda *_: (401, {"error": {"message": words}}, {})), n=5)
    for text in ("".join(capfd.readouterr()), str(caught.value)):
        assert "lone" in text and "title" in text
        assert not {"\x1b", "\x07", "\ud800", "\r", "\u202e"} & set(text)


# -------------------------------------------------------------------------------------- retries and waits

@pytest.mark.parametrize("header", ["retry-after-ms", "none"])
def test_a_rate_limit_is_used_to_the_full(live, header):
    """At a twentieth of the times of tools/bench/ratelimit.py: 80 a second, answers of 0.05 s."""
    server = LimitedServer(80, header, answer=0.05, burst=0.05)
    assert live(server, n=80, backoff=0.05) == 0
    seconds = server.answered[-1] - server.answered[0]
    assert server.refused and len(server.answered) / seconds > 0.6 * 80
    ids = raw_ids(live.folder)
    assert sorted(ids) == list(range(80))


def test_a_model_that_is_always_refused_does_not_hold_up_another(live):
    def script(number, body, headers):
        if body["model"] == "busy":
            return 429, {"error": {"message": "too large for its limit"}}, {}

    server = FaultServer()
    live(server, "--model", "m", "--model", "busy", n=1)           # the brainstorms
    server = FaultServer(scripted=script)
    assert live(server, "--model", "m", "--model", "busy", "--tries", "2", "--concurrency", "30", n=30) == 1
    assert {row["model"] for row in rows_of(live.folder) if row["id"] in range(1, 30)} == {"m"}


def test_a_limit_of_a_few_requests_a_minute_ends_with_all_answered(live):
    server = LimitedServer(8, "none", answer=0, burst=0)
    assert live(server, "--tries", "5", "--concurrency", "8", n=8, backoff=0.01) == 0
    assert sorted(raw_ids(live.folder)) == list(range(8)) and server.refused > 8 * 5

def test_faults_lose_and_double_nothing(live):
    faults = dict.fromkeys(["status-429", "status-500", "cut", "garbage", "truncated", "headless", "reset",
                            "half-headers", "no-usage"], 0.05) | {"drip": 0.01, "hang": 0.01}
    server = FaultServer(faults, hang=6)
    assert live(server, "--timeout", "2.5", "--tries", "20", n=300, backoff=0.002) == 0    # 42 % of tries fail
    assert sorted(raw_ids(live.folder)) == list(range(300))
    counts = server.fault_counts
    assert all(counts.get(name) for name in faults)
    unpaid = counts["status-429"] + counts["status-500"]
    ledger = ledger_of(live.folder)
    perhaps_paid = sum(counts[name] for name in faults) - unpaid - counts["no-usage"]
    assert ledger["tries perhaps paid without an answer"] == perhaps_paid
    assert ledger["answers with estimated usage"] == counts["no-usage"]
    assert sum("refused" in row for row in rows_of(live.folder, "started")) == unpaid


@pytest.mark.parametrize("as_date", [False, True])
def test_all_threads_obey_retry_after(live, as_date):
    limited = []

    def script(number, body, headers):
        if number == 10:
            limited.append(time.monotonic())
            value = email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "1"
            return 429, {"error": {"message": "slow down"}}, {"Retry-After": value}

    server = FaultServer(scripted=script, delay=0.01)
    assert live(server, "--concurrency", "2", n=60) == 0
    after = [moment - limited[0] for moment in server.times if moment > limited[0] + 0.2]
    assert min(after) >= 0.95                      # a date has whole seconds, so two are one at least


def test_a_server_that_asks_to_wait_for_long_ends_the_run(live):
    server = FaultServer(scripted=lambda *_: (503, {"error": {"message": "later"}}, {"Retry-After": "3600"}))
    with pytest.raises(UserError, match="asks to wait 3600 s"):
        live(server)


def test_waits_grow_and_tries_are_bounded(live):
    server = FaultServer({"status-503": 1.0})
    assert live(server, "--tries", "4", "--concurrency", "1", "--tasks", "1", n=1, backoff=0.1) == 1
    gaps = [after - before for before, after in zip(server.times, server.times[1:])]
    assert all(gap >= 0.05 * 2**i for i, gap in enumerate(gaps[:3]))       # chance takes up to a half
    assert gaps[0] < 0.15
    assert not live.out.exists()
    assert server.requests <= 4 * 2                # a dead server stops the run early


# ----------------------------------------------------------------------------------- what no retry can help

@pytest.mark.parametrize("status, error, words", [
    (400, {"message": "bad body"}, "bad body"),
    (401, {"message": f"Incorrect API key {KEY} provided"}, "check OPENAI_API_KEY"),
    (403, {"message": "forbidden"}, "403"),
    (404, {"message": "no such model"}, "--model"),
    (302, {"message": "moved"}, "302"),
    (429, {"message": "no money", "code": "insufficient_quota"}, "quota"),
    (429, {"message": "no money", "type": "insufficient_quota", "code": None}, "quota"),
])
def test_hopeless_answers_stop_at_once(live, status, error, words):
    server = FaultServer(scripted=lambda *_: (status, {"error": error}, {"Location": "http://127.0.0.1:1/"}))
    with pytest.raises(UserError) as caught:
        live(server, "--concurrency", "2")
    assert words in str(caught.value) and "\n" not in str(caught.value) and KEY not in str(caught.value)
    assert server.requests <= 2
    rows = rows_of(live.folder, "started")
    refused = {row["id"] for row in rows if "refused" in row}
    assert all(row["id"] in refused for row in rows)           # nothing counts as perhaps paid


@pytest.mark.parametrize("status, answer", [
    (400, {"error": {"message": "filtered", "code": "content_filter"}}),
    (400, {"error": {"message": "no", "code": "data_inspection_failed"}}),
    (403, {"error": {"message": "the input was flagged", "code": 403}}),
    (200, {"choices": [{"finish_reason": "content_filter: PROHIBITED"}]}),
])
def test_a_filtered_prompt_counts_as_answered(live, status, answer):
    server = FaultServer(scripted=only_examples((status, answer, {})))
    assert live(server, n=10) == 0
    asked = server.requests
    assert live(server, n=10) == 0 and server.requests == asked
    report = json.loads((live.folder / "report.json").read_text())
    assert report["dropped"] == {"content filter": 10}


# --------------------------------------------------------------------------------- the key and the address

def test_the_key_appears_nowhere(live, capfd):
    def script(number, body, headers):
        assert headers["authorization"] == f"Bearer {KEY}"
        if number % 5 == 0:
            return 500, {"error": {"message": f"your key {KEY} is fine, we are not"}}, {}
        if number % 5 == 1 and "JSON object" in body["messages"][0]["content"]:
            text = json.dumps({"choices": [{"message": {"content": f"key {KEY}"}, "finish_reason": KEY}]})
            return 200, text.replace("sk-", "\\u0073k-").encode(), {}

    live(FaultServer(scripted=script), n=30)
    for path in live.folder.parent.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in "".join(capfd.readouterr())


@pytest.mark.parametrize("url, key, words", [
    ("http://example.com/v1", KEY, "--allow-http"),
    ("ftp://example.com/v1", KEY, "OPENAI_BASE_URL"),
    ("https://user:pass@example.com/v1", KEY, "OPENAI_BASE_URL"),
    ("http://[", KEY, "OPENAI_BASE_URL"),
    ("", "", "OPENAI_API_KEY"),
    ("https://example.com/v1", "sk-\nfoo-bar-baz", "OPENAI_API_KEY"),
    ("https://example.com/v1", "sk-é-foo-bar-baz", "OPENAI_API_KEY"),
])
def test_unsafe_or_broken_settings_are_refused(tmp_path, monkeypatch, url, key, words):
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError) as caught:
        generate.main(["--model", "m", "--out", str(tmp_path / "x.jsonl")])
    line = str(caught.value)
    assert words in line and "pass" not in line and (not key or key not in line)


def test_a_proxy_is_used_and_netrc_is_not(live, monkeypatch, tmp_path):
    proxy = FaultServer()
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("default login someone password secret\n")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("no_proxy", "")
    direct = FaultServer()
    direct.url = "http://llm.invalid/v1"
    assert live(direct, "--allow-http", n=5) == 0
    assert proxy.requests >= 5 and proxy.headers[0]["authorization"] == f"Bearer {KEY}"
    proxy.close()


# ------------------------------------------------------------------------------------- many threads, Ctrl-C

def start(folder, server, *flags):
    environment = {**os.environ, "OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": KEY}
    fixed = "--model", "m", "--tasks", "4", "--out", "run.jsonl"
    return subprocess.Popen([sys.executable, ROOT / "generate.py", *fixed, *flags], cwd=folder, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_stops_cleanly_and_the_rerun_finishes(tmp_path):
    server = FaultServer(delay=0.3)
    flags = "--n", "60", "--concurrency", "4"
    process = start(tmp_path, server, *flags)
    while len(server.answered) < 10:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err and "stopping" in out
    assert len(rows_of(tmp_path / "run")) == len(server.answered)          # what was under way was taken in
    server.delay = 0
    process = start(tmp_path, server, *flags)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert sorted(raw_ids(tmp_path / "run")) == list(range(60))
    assert len(server.answered) == 60 + 4
    server.close()


def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    server = FaultServer({"hang": 1.0}, hang=60)
    process = start(tmp_path, server, "--n", "4")
    while not server.requests:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() + process.stdout.readline() and process.poll() is None
    begun = time.monotonic()
    while process.poll() is None and time.monotonic() < begun + 20:
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.returncode not in (None, 0) and time.monotonic() < begun + 10
    process.communicate()
    server.close()


def test_a_reader_that_leaves_loses_nothing(tmp_path):
    """As in `python generate.py ... | head -1`."""
    server = FaultServer(delay=0.02)
    process = start(tmp_path, server, "--n", "40", "--concurrency", "4")
    process.stdout.readline()
    process.stdout.close()
    process.stderr.read()
    process.wait(30)
    assert len(rows_of(tmp_path / "run")) == len(server.answered)
    assert sorted(raw_ids(tmp_path / "run")) == list(range(40))            # and the run goes on to its end
    server.close()


def test_progress_is_plain_lines_where_the_output_is_no_terminal(tmp_path):
    server = FaultServer()
    out, _ = start(tmp_path, server, "--n", "10", "--price", "m:1:2").communicate(timeout=30)
    assert re.search(r"^10 of 10, [\d.]+/s, [\d,]+ tokens, \$0\.0\d, 0:00:00 left$", out, re.MULTILINE)
    assert "\r" not in out
    server.close()


def test_ctrl_c_while_the_threads_are_started_waits_for_the_answer_under_way(live, monkeypatch):
    def start_one_and_interrupt(threads):
        threading.Thread(target=threads.work, daemon=True).start()
        while not threads.under_way:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr("plumbing.threads.Threads.start", start_one_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        live(FaultServer(delay=0.3), n=4)
    assert len((live.folder / "raw.jsonl").read_text().splitlines()) == 1
