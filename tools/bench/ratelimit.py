"""tools/bench/ratelimit.py: how much of a rate limit generate.py's client reaches.

    python -m tools.bench.ratelimit              # 2, 4, 8, 12, 20 a second, with and without Retry-After
    python -m tools.bench.ratelimit --tokens --header x-ratelimit-reset --seconds 60

A server of ours holds a token bucket for requests and one for tokens, as the limits of paid accounts work:
it refills all the time, a second's worth fits in, and who finds it empty gets a 429. Answers take a second.
All flags of generate.py have their defaults, but for --concurrency: 16, its default, or a quarter more than
the limit can keep busy, so that the limit is what decides.

"reached" counts the answers after the first five seconds, "allowed" is what the bucket gives meanwhile.
"""
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from plumbing.errors import Parser, command, positive

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ("Retry-After", "retry-after-ms", "x-ratelimit-reset", "none")
TOKENS = 1000                   # that the server counts for each request
WARM_UP = 5                     # seconds


class Bucket:
    """Refills by `rate` a second, up to `size`."""

    def __init__(self, rate: float, size: float):
        self.rate, self.size, self.level, self.filled = rate, size, size, time.monotonic()

    def missing(self, amount: float) -> float:
        """Seconds until it holds the amount; 0 if it does now."""
        now = time.monotonic()
        self.level = min(self.size, self.level + self.rate * (now - self.filled))
        self.filled = now
        return max(0.0, (amount - self.level) / self.rate)


class LimitedServer(ThreadingHTTPServer):
    """rate: requests a second. header: how it says when to come again. answer: seconds that an answer takes.
    burst: seconds' worth that fit into the buckets."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, rate: float, header="Retry-After", answer=1.0, tokens=False, burst=1.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.header, self.answer = header, answer
        size = max(1, burst * rate)
        self.requests = Bucket(1000 * rate if tokens else rate, size)
        self.tokens = Bucket(rate * TOKENS if tokens else 1e12, size * TOKENS)
        self.guard, self.answered, self.refused = threading.Lock(), [], 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def take(self) -> float:
        """Take a request's share of both buckets -> 0, or the seconds until there is one."""
        with self.guard:
            seconds = max(self.requests.missing(1), self.tokens.missing(TOKENS))
            if seconds:
                self.refused += 1
            else:
                self.requests.level -= 1
                self.tokens.level -= TOKENS
            return seconds

    def handle_error(self, *_):
        """A killed client's connections break."""

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        if seconds := server.take():
            error = {"error": {"message": "too many requests"}}
            return self.reply(429, error, wait_header(server.header, seconds))
        time.sleep(server.answer)
        with server.guard:
            server.answered.append(time.monotonic())
            number = len(server.answered)
        tasks = json.dumps([f"Given text {number}-{i}, find its like, {message[:10]}." for i in range(20)])
        self.reply(200, {"choices": [{"message": {"content": tasks}, "finish_reason": "stop"}],
                         "usage": {"prompt_tokens": 300, "completion_tokens": 700}}, {})

    def reply(self, status: int, value: dict, headers: dict):
        payload = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers | {"Content-Length": str(len(payload))}).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(payload)


def wait_header(name: str, seconds: float) -> dict:
    """The header of a 429, as servers write it: whole seconds, milliseconds, or a duration such as 250ms."""
    milliseconds = round(seconds * 1000) + 1
    return {"Retry-After": {"Retry-After": str(int(seconds) + 1)},
            "retry-after-ms": {"retry-after-ms": str(milliseconds)},
            "x-ratelimit-reset": {"x-ratelimit-reset-requests": f"{milliseconds}ms",
                                  "x-ratelimit-remaining-requests": "0"},
            "none": {}}[name]


def measure(rate: float, header: str, args) -> dict:
    """One run against one limit -> what it reached of what was allowed."""
    server = LimitedServer(rate, header, tokens=args.tokens)
    concurrency = max(16, round(1.25 * rate))
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, ROOT / "generate.py", "--model", "m", "--n", "1000000", "--tasks", "20",
             "--concurrency", str(concurrency), "--out", f"{folder}/run.jsonl"],
            env={**os.environ, "OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": ""},
            stdout=subprocess.DEVNULL)
        while not server.answered:                 # the interpreter starts
            time.sleep(0.01)
        begin = server.answered[0] + WARM_UP
        time.sleep(max(0, begin + args.seconds - time.monotonic()))
        process.kill()
        process.wait()
    end = begin + args.seconds
    reached = sum(begin <= moment < end for moment in server.answered) / args.seconds
    server.close()
    return {"allowed": rate, "header": header, "reached": round(reached, 2),
            "share": round(reached / rate, 3), "refused": server.refused, "concurrency": concurrency}


def main():
    parser = Parser(description=__doc__.partition("\n")[0])
    rates = [2, 4, 8, 12, 20]
    parser.add_argument("--rates", type=positive(float), nargs="+", default=rates, help="a second")
    parser.add_argument("--header", choices=HEADERS, action="append", help="default: Retry-After, then none")
    parser.add_argument("--tokens", action="store_true", help="the limit is on tokens, not on requests")
    parser.add_argument("--seconds", type=positive(float), default=30, help="of each run, after 5 more")
    args = parser.parse_args()
    worst = 1.0
    for header in args.header or ["Retry-After", "none"]:
        for rate in args.rates:
            result = measure(rate, header, args)
            worst = min(worst, result["share"])
            print(json.dumps(result), flush=True)
    print(json.dumps({"worst share": worst, "date": time.strftime("%Y-%m-%d")}))


if __name__ == "__main__":
    command(main)
