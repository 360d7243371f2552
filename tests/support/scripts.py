"""Run the scripts and tools as a user would."""
import subprocess
import sys
from pathlib import Path

import pytest

from plumbing.errors import command

ROOT = Path(__file__).resolve().parents[2]


def run_tool(name: str, *args, **more) -> subprocess.CompletedProcess:
    """Run a tool, by its wing and name ("models.fetch"), as a user would; the caller looks at its exit code.

    more: of subprocess.run, such as env.
    """
    line = [sys.executable, "-m", f"tools.{name}", *map(str, args)]
    return subprocess.run(line, cwd=ROOT, **{"capture_output": True, "text": True, **more})


def complaint(capsys, main, *arguments) -> str:
    """The one line with which a script's `main` refuses its arguments, as a user sees it."""
    with pytest.raises(SystemExit) as stopped:
        command(lambda: main([str(argument) for argument in arguments]))
    printed, said = capsys.readouterr()
    assert not printed, "something was begun before the arguments were looked at"
    assert stopped.value.code == 2 and said.count("\n") == 1
    return said
