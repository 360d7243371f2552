"""Run tools/bench/gpu.sh as a user would."""
import os
import subprocess
import sys

from scripts import ROOT

STEPS = ("base train cudnn cudnn_padded padded eager encode paper_batch_22gib peer fp8_train fp8_encode "
         "small_base padding fp8_effect memory")


def gpu_sh(out, *arguments, steps=STEPS):
    settings = {"OUT": str(out), "STEPS": steps, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", ROOT / "tools/bench/gpu.sh", *arguments], env={**os.environ, **settings},
                          capture_output=True, text=True)
