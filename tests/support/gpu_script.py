"""Run tools/bench/gpu.sh as a user would."""
import os
import subprocess
import sys

from scripts import ROOT

STEPS = "base train paper_batch_22gib encode small_base padding peer fp8_train fp8_encode fp8_effect memory"


def gpu_sh(out, *arguments, steps=STEPS):
    return subprocess.run(["bash", ROOT / "tools/bench/gpu.sh", *arguments], capture_output=True, text=True, env={
        **os.environ, "OUT": str(out), "STEPS": steps, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"})
