"""tools/data/batch.py, killed again and again."""
import os
import random
import subprocess
import sys
import time

from batch_server import BatchServer, answers
from fault_server import KEY
from scripts import ROOT


def test_kills_at_random_moments_pay_nothing_twice(tmp_path):
    server, rng, n = BatchServer(slow=0.15, errors=0.05, ready_after=0.3), random.Random(2), 800
    command = [sys.executable, "-m", "tools.data.batch", "--model", "m", "--n", str(n), "--tasks", "60",
               "--out", tmp_path / "run.jsonl", "--poll", "0.05", "--part-size", "20", "--backoff", "0.01"]
    environment = {**os.environ, "OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": KEY}
    kills = 0
    while kills < 30:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.4, 0.9))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert kills >= 15 and answers(tmp_path / "run") == dict.fromkeys(range(n), 1)
    assert set(server.billed.values()) == {1}
