"""Run the scripts and tools as a user would."""
import subprocess
import sys
from pathlib import Path

import pytest

from plumbing.errors import command

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def run_tool(name: str, *args) -> subprocess.CompletedProcess:
    """Run one of tools/ as a user would; the caller looks at its exit code."""
    return subprocess.run([sys.executable, TOOLS / name, *map(str, args)], capture_output=True, text=True)


def complaint(capsys, main, *arguments) -> str:
    """The one line with which a script's `main` refuses its arguments, as a user sees it."""
    with pytest.raises(SystemExit) as stopped:
        command(lambda: main([str(argument) for argument in arguments]))
    printed, said = capsys.readouterr()
    assert not printed, "something was begun before the arguments were looked at"
    assert stopped.value.code == 2 and said.count("\n") == 1
    return said
