"""generate.py against kills, ten thousand faulty requests, a grader of clients and a real LLM server."""
import collections
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import generate
from answers import PROMPTS, ROOT, ledger_of, raw_ids, rows_of
from plumbing.files import append, open_log

FAULT_SERVER = ROOT / "tests/support/fault_server.py"


class Process:
    """A server in its own process, up once it has printed a line that holds its port or address."""

    def __init__(self, *command):
        self.process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT,
                                        stdout=subprocess.PIPE, text=True)
        self.line = self.process.stdout.readline().strip()

    def __enter__(self):
        return self.line

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)


def start(url, folder, *flags):
    """generate.py, with folder/run as its run."""
    environment = {**os.environ, "OPENAI_BASE_URL": url, "OPENAI_API_KEY": ""}
    command = [sys.executable, ROOT / "generate.py", "--model", "m", "--out", folder / "run.jsonl", *flags]
    return subprocess.Popen([*map(str, command)], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def freeze_tasks(folder):
    """Put one brainstorm a type into raw.jsonl, for servers that cannot write any."""
    folder.mkdir(parents=True)
    with open_log(folder / "raw.jsonl") as file:
        for kind in generate.asymmetric_types(PROMPTS):
            tasks = json.dumps([f"Given a {kind} text, find its number {i}." for i in range(20)])
            request = generate.brainstorm_at(kind, 0, 0, PROMPTS, {"m": 1})
            append(file, request | {"response": tasks, "usage": {"prompt_tokens": 0, "completion_tokens": 0}})


def test_kills_at_random_moments_lose_and_double_nothing(tmp_path):
    concurrency, n, kills, rng = 8, 4000, 0, random.Random(1)
    log, folder = tmp_path / "billed", tmp_path / "run"
    flags = "--n", n, "--tasks", 400, "--concurrency", concurrency
    faults = "--fault", "status-429=0.02", "--fault", "no-usage=0.02"
    with Process(FAULT_SERVER, "--delay", 0.03, "--log", log, *faults) as port:
        url = f"http://127.0.0.1:{port}/v1"
        while kills < 32:
            process = start(url, tmp_path, *flags)
            time.sleep(rng.uniform(0.3, 0.9))
            assert process.poll() is None, process.communicate()[0]    # else the kills stop meaning anything
            process.kill()
            process.wait()
            kills += 1
        process = start(url, tmp_path, *flags)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    rows = rows_of(folder)
    counts = collections.Counter(row["id"] for row in rows)
    assert set(counts.values()) == {1}
    assert {row["id"] for row in rows if row["step"] == "generate"} == set(range(n))
    billed = len(log.read_text().splitlines())
    lost = ledger_of(folder)["tries perhaps paid without an answer"]
    assert billed - len(rows) <= lost <= kills * concurrency   # whatever was paid and lost, the ledger shows
    assert lost > 0 and len(rows) < billed                     # the kills did hit answers under way
    examples = [json.loads(line)["id"] for line in (tmp_path / "run.jsonl").open()]
    assert len(examples) == len(set(examples)) > n / 2


def test_ten_thousand_requests_through_all_faults(tmp_path):
    n = 10_000
    faults = {"status-429": 0.03, "status-500": 0.03, "cut": 0.02, "garbage": 0.02, "truncated": 0.02,
              "headless": 0.02, "reset": 0.02, "half-headers": 0.02, "no-usage": 0.03, "drip": 0.001,
              "hang": 0.001}
    log, words = tmp_path / "billed", []
    for name, share in faults.items():
        words += ["--fault", f"{name}={share}"]
    with Process(FAULT_SERVER, "--log", log, *words) as port:
        process = start(f"http://127.0.0.1:{port}/v1", tmp_path, "--n", n, "--tasks", 500, "--timeout", 1,
                        "--backoff", 0.02, "--concurrency", 32)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert collections.Counter(raw_ids(tmp_path / "run")) == dict.fromkeys(range(n), 1)
    billed = collections.Counter(log.read_text().split())
    pools = collections.defaultdict(list)
    for row in rows_of(tmp_path / "run", "tasks"):
        pools[row["type"]].append(row["task"])
    asked = collections.Counter()
    for i in range(n):
        message = generate.render(PROMPTS, generate.request_at(i, 0, PROMPTS, [(n, pools)], {"m": 1}))
        asked[hashlib.sha256(message.encode()).hexdigest()] += 1
    assert all(billed[digest] == number for digest, number in asked.items())   # nothing was paid for twice


def test_llmock_has_nothing_to_say_against_the_client(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("llmock"), "serve", "--port", port, "--log-level", "error",
               "--error-rate", "429=0.08", "--error-rate", "500=0.04", "--error-rate", "503=0.04"]
    server = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              cwd=tmp_path)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(100):
            try:
                urllib.request.urlopen(f"{url}/_llmock/verdict")
                break
            except OSError:
                time.sleep(0.1)
        freeze_tasks(tmp_path / "run")
        # With seed 1 no two have the same text, which llmock would take for one request and its retry.
        process = start(f"{url}/v1", tmp_path, "--n", 120, "--seed", 1, "--tasks", 20, "--backoff", 0.5,
                        "--concurrency", 4)
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out
        verdict = json.load(urllib.request.urlopen(f"{url}/_llmock/verdict"))
    finally:
        server.terminate()
        server.wait(20)
    assert verdict["faults_injected"] >= 10 and verdict["calls"] >= 120
    # Two waits of the second that its Retry-After asks for look to llmock like a constant interval.
    findings = [finding for finding in verdict["findings"] if finding["code"] != "no_backoff"]
    assert verdict["passed"] and not findings, json.dumps(findings, indent=1)


def test_a_real_llm_server_end_to_end(tmp_path):
    with Process("-m", "tools.models.serve", "--port", 0, "--threads", 1) as address:
        freeze_tasks(tmp_path / "run")
        process = start(address, tmp_path, "--n", 6, "--tasks", 20, "--max-answer-tokens", 150,
                        "--concurrency", 2)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert sorted(raw_ids(tmp_path / "run")) == list(range(6))
    for row in rows_of(tmp_path / "run"):
        if row["step"] == "brainstorm":            # by hand
            continue
        assert row["response"] and row["finish_reason"] in ("stop", "length")
        assert "estimated" not in row["usage"]
        assert 0 < row["usage"]["completion_tokens"] <= 150 and row["usage"]["prompt_tokens"] > 50


def test_the_parser_properties_at_length():
    properties = "survives or lose_nothing or never_an_example or breaks_the_parser"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", properties,
         "tests/plumbing/test_answers.py"],
        cwd=ROOT, env={**os.environ, "PARSER_EXAMPLES": "5000"}, capture_output=True, text=True)
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout


def test_ctrl_c_at_random_moments_takes_in_what_is_under_way(tmp_path):
    rng, log = random.Random(3), tmp_path / "billed"
    flags = "--n", 100_000, "--tasks", 8, "--concurrency", 8
    with Process(FAULT_SERVER, "--delay", 0.3, "--log", log) as port:
        for _ in range(20):
            process = start(f"http://127.0.0.1:{port}/v1", tmp_path, *flags)
            before = len(log.read_text()) if log.exists() else 0
            while len(log.read_text()) == before:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1))
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=30)
            assert process.returncode == 130 and "Traceback" not in out, out
            assert len(log.read_text().splitlines()) == len(rows_of(tmp_path / "run"))
