"""README's "Your own documents and questions" as it stands: its commands, in a clone, give its scores."""
import os
import re
import shutil
import subprocess
import sys

from readme import commands
from scripts import ROOT


def clone_of_the_house(folder):
    """What git has, a .venv that stands for these tests' own environment, and the base, if it is here."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / ".venv/bin/python").chmod(0o755)
    (folder / ".venv/bin/activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')
    (folder / ".venv/.installed").touch()
    if (ROOT / "models").is_dir():                                     # what lacks, `make base` builds
        (folder / "models").mkdir()
        for base in (ROOT / "models").iterdir():
            (folder / "models" / base.name).symlink_to(base.resolve())
    return folder


def test_the_section_gives_its_scores(tmp_path):
    clone = clone_of_the_house(tmp_path)
    script = "set -e\n" + "\n".join(commands("Your own documents and questions"))
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["sh", "-c", script], cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    row = r"^Questions +([\d.]+) +([\d.]+)$"
    before, after = map(float, re.search(row, done.stdout, re.MULTILINE).groups())
    told = re.search(row, (ROOT / "README.md").read_text(), re.MULTILINE)
    told_before, told_after = map(float, told.groups())
    assert abs(before - told_before) < 3                                # bfloat16 rounds otherwise on other CPUs
    assert after - before > (told_after - told_before) / 2 > 3
