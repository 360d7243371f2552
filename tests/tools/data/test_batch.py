"""tools/batch.py against a batch API of ours that keeps count of what it would bill."""

import collections
import http.server
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import batch
import generate
import llm
from fault_server import KEY, answer_text

ROOT = Path(__file__).parent.parent


class BatchServer(http.server.ThreadingHTTPServer):
    """POST /files, POST /batches, GET /batches, /batches/ID, /files/ID/content, and live chat completions.

    slow: seconds between doing a thing and saying so. errors: share of requests that end in the error file.
    flaky: share of calls that are done and then answered with a 500. expire: batches that expire half done.
    """

    daemon_threads = True

    def __init__(self, slow=0.0, errors=0.0, flaky=0.0, expire=0, ready_after=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.slow, self.errors, self.flaky, self.expire = slow, errors, flaky, expire
        self.ready_after = ready_after
        self.files, self.batches, self.billed, self.live = {}, {}, collections.Counter(), 0
        self.rng, self.guard, self.fail_validation = random.Random(0), threading.Lock(), None
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def close(self):
        self.shutdown()
        self.server_close()

    def run_batch(self, identifier, file):
        """Answers all requests of a file: one output file, one error file."""
        output, errors, rows = [], [], [json.loads(line) for line in self.files[file].splitlines()]
        if self.fail_validation:
            return {"status": "failed", "errors": {"data": [{"message": self.fail_validation}]}}
        status = "completed"
        if self.expire > 0:
            self.expire, status, rows = self.expire - 1, "expired", rows[: len(rows) // 2]
        for row in rows:
            assert (row["method"], row["url"]) == ("POST", "/v1/chat/completions")
            if self.rng.random() < self.errors:
                body = {"error": {"message": "try later", "code": None}}
                errors.append({"custom_id": row["custom_id"], "response": {"status_code": 500, "body": body}})
                continue
            self.billed[row["custom_id"]] += 1
            message = row["body"]["messages"][0]["content"]
            choice = {"message": {"content": answer_text(message, self.rng)}, "finish_reason": "stop"}
            body = {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 50}}
            output.append({"custom_id": row["custom_id"], "response": {"status_code": 200, "body": body},
                           "error": None})
        self.rng.shuffle(output)
        result = {"status": status, "output_file_id": None, "error_file_id": None}
        for key, lines in (("output_file_id", output), ("error_file_id", errors)):
            if lines:
                result[key] = f"file-{identifier}-{key}"
                self.files[result[key]] = "".join(json.dumps(line) + "\n" for line in lines)
        return result


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Authorization"] == f"Bearer {KEY}"
        with server.guard:
            if self.path == "/v1/files":
                assert b'name="purpose"\r\n\r\nbatch' in body
                identifier = f"file-{len(server.files)}"
                server.files[identifier] = re.search(rb"\r\n\r\n(\{.*\n)\r\n--", body, re.DOTALL)[1].decode()
                value = {"id": identifier}
            elif self.path == "/v1/batches":
                file, identifier = json.loads(body)["input_file_id"], f"batch-{len(server.batches)}"
                value = {"id": identifier, "input_file_id": file, "status": "in_progress",
                         "at": time.monotonic(), "end": server.run_batch(identifier, file)}
                server.batches[identifier] = value
            else:
                server.live += 1
                text = answer_text(json.loads(body)["messages"][0]["content"], server.rng)
                value = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
        time.sleep(server.slow)
        self.reply(value)

    def do_GET(self):
        server = self.server
        path, _, query = self.path.removeprefix("/v1/").partition("?")
        if path.endswith("/content"):
            return self.reply(server.files[path.split("/")[1]].encode())
        if path == "batches":  # newest first, two a page
            ids = list(server.batches)[::-1]
            after = re.search(r"after=([\w-]+)", query)
            ids = ids[ids.index(after[1]) + 1 :] if after else ids
            return self.reply({"data": [server.batches[i] for i in ids[:2]], "has_more": len(ids) > 2})
        found = server.batches[path.split("/")[1]]
        if time.monotonic() - found["at"] >= server.ready_after:
            found = found | found["end"]
        self.reply(found)

    def reply(self, value):
        flaky = self.server.rng.random() < self.server.flaky
        payload = b"{}" if flaky else value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(500 if flaky else 200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


FAST = ["--poll", "0.02", "--part-size", "50"]


@pytest.fixture
def go(live):
    def run(server, *flags, n=120):
        return live(server, *FAST, *flags, n=n, main=batch.main)
    run.folder = live.folder
    return run


def answers(folder):
    rows = llm.read_jsonl(folder / "raw.jsonl")
    return collections.Counter(row["id"] for row in rows if row["step"] == "generate")


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
    with pytest.raises(llm.UserError, match="model m is not for batches"):
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


@pytest.mark.slow
def test_kills_at_random_moments_pay_nothing_twice(tmp_path):
    server, rng, n = BatchServer(slow=0.15, errors=0.05, ready_after=0.3), random.Random(2), 800
    command = [sys.executable, ROOT / "tools/batch.py", "--model", "m", "--n", str(n), "--tasks", "60",
               "--out", tmp_path / "run.jsonl", "--poll", "0.05", "--part-size", "20", "--backoff", "0.01"]
    environment = {**os.environ, "OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": KEY}
    kills = 0
    while kills < 30:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.4, 0.9))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert kills >= 15 and answers(tmp_path / "run") == dict.fromkeys(range(n), 1)
    assert set(server.billed.values()) == {1}
