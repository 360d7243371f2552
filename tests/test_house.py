"""What README promises of the whole: four lessons, the arrows between the folders, few packages, no guard in a lesson."""
import ast
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LESSONS = ("model.py", "train.py", "generate.py", "evaluate.py")
RUNTIME = {"torch", "tokenizers", "safetensors", "numpy", "requests", "urllib3"}      # urllib3 is requests' own
BY_PATH = ("tools/embed.py", "tools/plot.py")                                         # users call these by name


def code_files(folder: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py"))


PLUMBING, TOOLS = code_files("plumbing"), code_files("tools")


def nodes(name: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))))


def imported(name: str) -> set[str]:
    """The first words of all that a file imports."""
    modules = []
    for node in nodes(name):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            modules.append(node.module)
    return {module.split(".")[0] for module in modules}


def test_the_top_level_is_four_lessons():
    assert {path.name for path in ROOT.glob("*.py")} == set(LESSONS)


@pytest.mark.parametrize("name", [*LESSONS, *PLUMBING])
def test_the_core_needs_five_packages(name):
    ours = {"plumbing", "model"}
    assert imported(name) - set(sys.stdlib_module_names) - ours <= RUNTIME


@pytest.mark.parametrize("name, others", [("model.py", set()), ("train.py", {"model"}), ("generate.py", set()),
                                          ("evaluate.py", {"model"}), *[(name, set()) for name in PLUMBING]])
def test_arrows(name, others):
    """Lessons stand on plumbing, train and evaluate on model, plumbing on no lesson, and none of them on a tool."""
    above = {"model", "train", "generate", "evaluate", "tools"}
    assert imported(name) & above == others


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_neither_raises_nor_catches(name):
    guards = (ast.Raise, ast.Try, ast.Assert)
    assert not [f"{name}:{node.lineno}" for node in nodes(name) if isinstance(node, guards)]


@pytest.mark.parametrize("name", [*LESSONS, *PLUMBING, *TOOLS])
def test_lines_are_short_and_no_path_is_bent(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 109]
    assert name in BY_PATH or ("sys.path" not in text and "noqa" not in text)


@pytest.mark.parametrize("name", [*LESSONS, *PLUMBING, *TOOLS])
def test_each_file_says_why_it_exists(name):
    assert ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8")))


def test_plumbing_lists_its_files():
    head = (ROOT / "plumbing/__init__.py").read_text(encoding="utf-8")
    listed = set(re.findall(r"^    (\w+)  ", head, re.MULTILINE))
    assert listed == {Path(name).stem for name in PLUMBING} - {"__init__"}


def test_requirements_are_the_five():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if not line.startswith("#")]
    names = {one.name for one in wanted if not one.marker or one.marker.evaluate()}
    assert names == RUNTIME - {"urllib3"}
    too_old = [one for one in wanted if one.marker]                # pip can't get it, and says its name
    for version, refused in (("3.8", True), ("3.10", True), ("3.11", False), ("3.13", False)):
        assert any(one.marker.evaluate({"python_version": version}) for one in too_old) is refused
    assert all("3.11-or-newer" in one.url for one in too_old)


@pytest.mark.parametrize("name", ["README.md", "troubleshooting.md", "results/README.md"])
def test_files_that_readme_names_are_here(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:\w+/)*\w+\.(?:py|md|sh|svg|png)\b", text))
    folder = (ROOT / name).parent
    gone = [file for file in named if not (ROOT / file).exists() and not (folder / file).exists()]
    assert named and not gone
    modules = set(re.findall(r"python -m (tools(?:\.[a-z0-9_]+)+)", text))
    assert all((ROOT / (module.replace(".", "/") + ".py")).exists() for module in modules), modules
