"""Kills at random moments, and files too large for memory."""
import json
import signal
import subprocess
import sys
import time

import numpy as np

from runs import ROOT, read_log, run_train, same_tensors, train_command


def test_resume_after_kills_is_bit_identical(base, data, tmp_path):
    """SIGKILL and SIGTERM at random moments, checkpoints at every step so that some fall inside a save."""
    flags = ("--epochs", 20, "--checkpoint-every", 1)                          # 60 steps
    assert run_train(base, data, tmp_path / "whole", *flags).returncode == 0
    rng, kills = np.random.default_rng(0), 0
    while True:
        command = train_command(base, data, tmp_path / "killed", *flags, "--resume")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:                                            # a random while after the first step
            if line.startswith("step ") and kills < 20:
                time.sleep(rng.uniform(0, 0.3))
                process.send_signal([signal.SIGKILL, signal.SIGTERM][kills % 2])
                kills += 1
                break
        process.stdout.read()
        if process.wait() == 0:
            break
    assert kills >= 8
    assert same_tensors(tmp_path / "whole", tmp_path / "killed")
    assert [line["step"] for line in read_log(tmp_path / "killed")] == list(range(1, 61))


READ = """
import re, sys
from pathlib import Path
from plumbing.examples import Examples
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
examples = Examples([sys.argv[1]])
assert examples[len(examples) - 1]["query"] == f"question {len(examples) - 1}"
print(peak() - before)
"""


def test_a_large_file_is_not_held_in_memory(tmp_path):
    """300 MB of examples; what stays is 48 bytes a line."""
    with open(tmp_path / "large.jsonl", "w") as file:
        for i in range(50_000):
            file.write(json.dumps({"query": f"question {i}", "pos": [f"answer {i}"], "neg": ["x" * 6000]}) + "\n")
    done = subprocess.run([sys.executable, "-c", READ, tmp_path / "large.jsonl"], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    assert int(done.stdout) < 20_000, done.stdout             # kB
