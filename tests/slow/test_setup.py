"""`make setup` with pip itself, on wheels of a torch made for the purpose: which build it takes."""
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scripts import ROOT
from tools import workflow

pytestmark = pytest.mark.skipif(workflow.has_gpu() or sys.platform != "linux",
                                reason="which build is taken is a question without a GPU alone")


def wheel(folder: Path, version: str) -> None:
    folder.mkdir(exist_ok=True)
    about = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as file:
        file.writestr("torch/__init__.py", "")
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")


def make_setup(clone: Path, wheels: Path, *words) -> tuple[str, str]:
    """`make setup` where pip knows these wheels alone -> (which torch is there then, what was said)."""
    shutil.rmtree(clone / ".venv", ignore_errors=True)
    env = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(clone),
           "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null", "PIP_FIND_LINKS": str(wheels)}
    done = subprocess.run(["make", "setup", *words], cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = list(clone.glob(".venv/lib/*/site-packages/torch-*.dist-info"))
    return found[0].name.removesuffix(".dist-info"), done.stdout


def test_the_cpu_build_is_taken_where_pip_knows_one(tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "plumbing", clone / "plumbing")
    (clone / "tools").mkdir()
    for name in ("Makefile", "tools/__init__.py", "tools/workflow.py"):
        shutil.copy(ROOT / name, clone / name)
    (clone / "requirements.txt").write_text("torch==9.9.9\n")
    wheel(tmp_path / "both", "9.9.9")
    wheel(tmp_path / "both", "9.9.9+cpu")
    wheel(tmp_path / "cuda", "9.9.9")
    version, said = make_setup(clone, tmp_path / "both")
    assert version == "torch-9.9.9+cpu" and "4.8 GB" not in said
    version, said = make_setup(clone, tmp_path / "cuda")
    assert version == "torch-9.9.9" and said.index("4.8 GB") < said.index("install -r requirements.txt")
    assert "make setup PIP_EXTRA_INDEX_URL=ADDRESS" in said
    typed = f"PIP_FIND_LINKS={tmp_path / 'both'}"                     # as PIP_EXTRA_INDEX_URL would be
    version, said = make_setup(clone, tmp_path / "cuda", typed)
    assert version == "torch-9.9.9+cpu" and "4.8 GB" not in said
    version, said = make_setup(clone, tmp_path / "cuda", "TORCH=torch==9.9.9")
    assert version == "torch-9.9.9" and "4.8 GB" not in said
