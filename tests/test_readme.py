"""README as a lesson: its equations, tests, messages and figures are those of the code and of results/."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PLACEHOLDER = "..."                          # in a quoted message: whatever the code fills in


def section(title: str) -> str:
    """The text below a heading, up to the next one."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]


def table_rows(text: str) -> list[list[str]]:
    """The cells of each row of a Markdown table, without its heading."""
    rows = [line.strip().strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


# ------------------------------------------------------------------------------------ paper, code and proof

EQUATIONS = table_rows(section("The paper in the code"))


def definition(name: str) -> str:
    """The source of "file.py:function" or "file.py:Class.method"."""
    file, path = name.split(":")
    source = (ROOT / file).read_text(encoding="utf-8")
    node = ast.parse(source)
    for part in path.split("."):
        [node] = [child for child in node.body if getattr(child, "name", None) == part]
    return ast.get_source_segment(source, node)


@pytest.mark.parametrize("where, idea, code, proof", EQUATIONS)
def test_an_equation_is_named_where_it_is_computed_and_has_its_test(where, idea, code, proof):
    source = " ".join(definition(code.strip("`")).lower().split())
    for number in where.split(", "):
        assert number.lower() in source
    file, test = proof.strip("`").split(":")
    assert test.startswith("test_") and definition(f"{file}:{test}")


def test_the_table_of_equations_is_whole():
    assert len(EQUATIONS) >= 14
    assert {"Eq. 1", "Eq. 2 and 3"} <= {number for where, *_ in EQUATIONS for number in where.split(", ")}


# ----------------------------------------------------------------------------------------------- messages

def strings(file: Path) -> list[str]:
    """All strings of a file, adjoining ones joined, with "..." for what an f-string fills in."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else PLACEHOLDER
                                 for part in node.values))
    return found


def test_the_troubleshooting_lists_messages_are_what_the_code_says():
    files = [*ROOT.glob("*.py"), *(ROOT / "plumbing").glob("*.py"), *(ROOT / "tools").rglob("*.py")]
    said = [text for file in files for text in strings(file)]
    rows = table_rows((ROOT / "troubleshooting.md").read_text(encoding="utf-8"))
    assert len(rows) >= 14
    for pain, sign, _ in rows:
        messages = re.findall(r"`([^`]+)`", sign)
        assert messages, pain
        for message in messages:
            assert any(message in text for text in said), f"{pain}: no code says {message!r}"


# -------------------------------------------------------------------------------------------------- figures

def test_readmes_rows_of_the_study_are_what_reproduce_wrote():
    """A row of results/study.md without its last cell, the models. After a rerun this says what to paste."""
    study = {}
    for line in (ROOT / "results/study.md").read_text(encoding="utf-8").splitlines():
        if name := re.search(r"\(`([\w-]+)`\)", line):
            study[name[1]] = line.rsplit(" | ", 1)[0] + " |"
    rows = re.findall(r"^\|.*\(`([\w-]+)`\).*$", README, re.MULTILINE)
    assert len(rows) >= 4
    for name in rows:
        assert study[name] in README.splitlines()


def test_a_reader_gets_through_it():
    assert len(README.splitlines()) < 340
    assert not [line for line in README.splitlines() if len(line) > 120 and not line.startswith("|")]
