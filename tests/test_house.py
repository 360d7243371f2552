"""What README promises of the whole: few packages, one direction of imports, files that are there."""
import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = {"torch", "tokenizers", "safetensors", "numpy", "requests", "urllib3"}      # urllib3 is requests' own
IMPORTS = {"model.py": set(), "metrics.py": set(), "llm.py": set(), "batches.py": {"model"},
           "train.py": {"batches", "model"}, "generate.py": {"llm"}, "evaluate.py": {"model", "metrics"}}


def imported(path: Path) -> set[str]:
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    nodes = [node for node in tree if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    return {name.split(".")[0] for name in names + [n.module for n in nodes if isinstance(n, ast.ImportFrom)]}


def test_the_core_is_these_files():
    assert {path.name for path in ROOT.glob("*.py")} == IMPORTS.keys()


@pytest.mark.parametrize("name", IMPORTS)
def test_the_core_needs_five_packages_and_no_tool(name):
    foreign = imported(ROOT / name) - set(sys.stdlib_module_names)
    ours = foreign & {path.stem for path in ROOT.glob("*.py")}
    assert ours <= IMPORTS[name] and foreign - ours <= RUNTIME


def test_requirements_are_the_five():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    found = {re.split("[=<>]", line)[0] for line in lines if line and not line.startswith("#")}
    assert found == RUNTIME - {"urllib3"}


def test_readmes_study_is_what_reproduce_wrote():
    readme, study = ((ROOT / name).read_text() for name in ("README.md", "results/study.md"))
    rows = [line for line in study.splitlines() if line.endswith("` |")]           # the last cell: models
    assert len(rows) > 10
    for row in rows:
        assert row.rsplit(" | ", 1)[0] + " |" in readme


def test_files_that_readme_names_are_here():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:tools/|tests/|results/)?\w+\.(?:py|md|sh)\b", readme))
    assert named and all((ROOT / name).exists() for name in named), named
