"""exercises.md: without its solution, each exercise's check says "not yet"; with it, "solved"."""
import contextlib
import importlib
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest

from plumbing.errors import UserError
from scripts import complaint
from tools import exercise

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "exercises.md").read_text("utf-8")
PATCHES = sorted((ROOT / "exercises").glob("*.patch"))
PARTS = ("plumbing", "prompts", "tools", "tests/data/run_of_2026_11/base")


def patched_tree(folder: Path, patch: Path) -> Path:
    """A copy of what the checks need, with a solution applied as a reader would."""
    for lesson in ROOT.glob("*.py"):
        shutil.copy(lesson, folder)
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}     # of any repository
    done = subprocess.run(["git", "apply", patch], cwd=folder, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, f"refresh {patch.name}: {done.stderr}"
    return folder


def ours(name: str) -> bool:
    return name.split(".")[0] in ("model", "train", "generate", "evaluate", "plumbing", "tools")


@contextlib.contextmanager
def code_of(tree: Path):
    """tools.exercise and all of ours that it imports, out of another folder. torch stays loaded."""
    before = {name: module for name, module in sys.modules.items() if ours(name)}
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(tree))
    try:
        module = importlib.import_module("tools.exercise")
        assert Path(module.__file__).is_relative_to(tree)
        assert Path(module.train.__file__).is_relative_to(tree)
        yield module
    finally:
        sys.path.remove(str(tree))
        for name in [name for name in sys.modules if ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)


@pytest.mark.parametrize("patch", PATCHES, ids=[patch.stem for patch in PATCHES])
def test_the_check_fails_without_the_solution_and_passes_with_it(patch, tmp_path, capsys):
    number = str(int(patch.stem[:2]))
    with pytest.raises(UserError, match=f"^exercise {number}, not yet: "):
        exercise.main([number])
    with code_of(patched_tree(tmp_path, patch)) as patched:
        patched.main([number])
    assert capsys.readouterr().out.startswith(f"exercise {number}, solved: ")


def test_a_task_type_is_data():
    patch = (ROOT / "exercises/04-seventh-type.patch").read_text()
    files = re.findall(r"^\+\+\+ b/(.*)$", patch, re.MULTILINE)
    assert files and all(file.startswith("prompts/") for file in files)


def test_the_text_has_for_each_exercise_a_check_a_hint_and_its_solution():
    sections = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
    numbered = [section for section in sections if re.match(r"\d+\. ", section)]
    assert len(numbered) == len(PATCHES) == len(exercise.CHECKS) == 10
    for number, (section, patch) in enumerate(zip(numbered, PATCHES), 1):
        assert section.startswith(f"{number}. ")
        for words in (f"python -m tools.exercise {number}\n", f"exercises/{patch.name}", "**Do.**",
                      "**See.**", "**Hint.**"):
            assert words in section, (number, words)


def commands() -> list[tuple[str, str]]:
    """(solution, command) of each train.py and evaluate.py in the text; the solution may bring its flags."""
    text = TEXT.replace("\\\n", " ")
    found, variables = [], dict(re.findall(r'^([A-Z]+)="(.*?)"$', text, re.MULTILINE))
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        patch = re.search(r"^Solution: `exercises/(\S+)\.patch", section, re.MULTILINE)
        for line in section.splitlines():
            if re.match(r"python (train|evaluate)\.py ", line):
                found.append((patch[1] if patch else "", string.Template(line).substitute(variables)))
    return found


def test_commands_in_the_text_have_flags_that_exist(tmp_path):
    """Also those that a solution brings: --pooling first, --accumulate."""
    assert len(commands()) >= 10 and len({patch for patch, _ in commands()}) >= 7
    for patch in sorted({patch for patch, _ in commands()}):
        (tmp_path / patch).mkdir(exist_ok=True)
        tree = patched_tree(tmp_path / patch, ROOT / f"exercises/{patch}.patch") if patch else None
        with code_of(tree) if patch else contextlib.nullcontext(exercise) as code:
            for of, line in commands():
                if of == patch:
                    script, *flags = shlex.split(line, comments=True)[1:]
                    getattr(code, script.removesuffix(".py")).options(flags)


def test_a_number_that_is_no_exercise_is_refused(capsys):
    assert "invalid choice: 11" in complaint(capsys, exercise.main, "11")
