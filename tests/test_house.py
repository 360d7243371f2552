"""What README promises of the whole: few packages, one direction of imports, a help that lists every target."""
import ast
import json
import re
import shutil
import subprocess
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


def test_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY:(.*)$", makefile, re.MULTILINE)[1].split()) - {"always"}
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and {line.split()[0] for line in done.stdout.splitlines()} == targets


def test_readmes_study_is_what_reproduce_wrote():
    readme, study = ((ROOT / name).read_text() for name in ("README.md", "results/study.md"))
    rows = [line for line in study.splitlines() if line.endswith("` |")]           # the last cell: models
    assert len(rows) > 10
    for row in rows:
        assert row.rsplit(" | ", 1)[0] + " |" in readme


@pytest.mark.parametrize("goal, wanted", [
    (["base", "LAYERS=8"], "tools/smollm2.py models/smollm2-135m-l8 --layers 8"),
    (["base", "BASE=owner/name"], "tools/fetch.py owner/name models/name"),
    (["data", "LLM=some-model", "N=50"], "generate.py --model some-model --n 50 --out data/llm.jsonl"),
    (["train", "PRESET=paper", "RUN=big", "BASE=owner/name"],
     "train.py --base models/name --data data/synthetic.jsonl --out runs/big --resume"),
    (["eval", "TASKS=SciFact"], "--tasks data/mteb/SciFact --out results/demo-SciFact.json"),
    (["eval", "TASKS=eng-v1"], "--tasks data/mteb --benchmark eng-v1 --out results/demo-eng-v1.json"),
])
def test_make_runs_what_readme_says(goal, wanted):
    done = subprocess.run(["make", "-nB", *goal], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and wanted in done.stdout, done.stdout + done.stderr


def test_make_scores_a_finished_run_without_its_training_flags(tmp_path):
    """Neither is it trained anew with the demo's, nor is the demo's base set beside it."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    made = [".venv/.installed", "requirements.txt", "runs/big/.finished", "data/mini/t/task.json", "evaluate.py",
            "train.py", "batches.py", "metrics.py", "model.py", "generate.py", "llm.py", "data/recorded.jsonl.gz"]
    for path in (tmp_path / name for name in made):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    config = {"base": "models/Mistral-7B-v0.1", "data": ["a.jsonl"]}
    (tmp_path / "runs/big/config.json").write_text(json.dumps(config, indent=2))
    done = subprocess.run(["make", "-n", "eval", "RUN=big"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "train.py" not in done.stdout, done.stdout + done.stderr
    assert "evaluate.py models/Mistral-7B-v0.1 runs/big --names base trained" in done.stdout


def test_files_that_readme_names_are_here():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:tools/|tests/|results/)?\w+\.(?:py|md|sh)\b", readme))
    assert named and all((ROOT / name).exists() for name in named), named
