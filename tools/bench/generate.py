"""tools/bench/generate.py: how many requests a second does generate.py's client send, with a server that answers at once?

    python -m tools.bench.generate [--n 5000] [--concurrency 16]

The server runs in a process of its own and competes for the same cores, so the figure is a lower bound. Each
request goes the whole way: drawn, rendered, logged as started, posted, its answer checked and appended to
raw.jsonl.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from plumbing.errors import Parser, command, positive

ROOT = Path(__file__).resolve().parents[2]


def main():
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--n", type=positive(int), default=5000, help="example requests")
    parser.add_argument("--concurrency", type=positive(int), default=16)
    args = parser.parse_args()
    server = subprocess.Popen([sys.executable, ROOT / "tests/support/fault_server.py"], stdout=subprocess.PIPE,
                              text=True)
    try:
        port = server.stdout.readline().strip()
        environment = {**os.environ, "OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1", "OPENAI_API_KEY": ""}
        with tempfile.TemporaryDirectory() as folder:
            def generate(*flags):
                line = [sys.executable, ROOT / "generate.py", *flags, "--out", f"{folder}/run.jsonl"]
                return subprocess.run(line, env=environment, check=True, capture_output=True, text=True)
            out = generate("--model", "m", "--n", str(args.n), "--tasks", "100",
                           "--concurrency", str(args.concurrency))
            begun = time.monotonic()
            generate("--report")
            building = time.monotonic() - begun
    finally:
        server.terminate()
        server.wait()
    rate = float(re.search(rf"^{args.n:,} of {args.n:,}, ([\d.]+)/s", out.stdout, re.MULTILINE)[1])
    print(json.dumps({"requests per second": rate,
                      "answers built into examples per second": round(args.n / building),
                      "n": args.n, "concurrency": args.concurrency, "cores": os.cpu_count(),
                      "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}))


if __name__ == "__main__":
    command(main)
