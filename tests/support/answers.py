"""Answers to test with: recorded ones, and one of each type by hand."""
import gzip
import json
import math
from pathlib import Path

import pytest

import generate
from plumbing.answers import Reject
from plumbing.files import read_jsonl

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "data/recorded.jsonl.gz"
SMOLLM2 = ROOT / "tests/data/smollm2_raw.jsonl.gz"
PROMPTS = generate.load_prompts()
POOLS = {kind: [f"Task {i} of {kind} for tests." for i in range(50)] for kind in PROMPTS["task_types"]}
GENERATIONS = [(math.inf, POOLS)]


def recorded() -> list[dict]:
    with gzip.open(RECORDED, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def row_of(kind="sts", language="English", task="Find it.", **values) -> dict:
    """A row as raw.jsonl has it, whose answer is a valid object of the type unless values say otherwise."""
    keys = PROMPTS["task_types"][kind]["keys"]
    texts = dict(zip(keys, ["A first text.", "Quite another text.", "A third one."]))
    only_this = PROMPTS | {"task_types": {kind: PROMPTS["task_types"][kind]}}
    params = generate.request_at(0, 0, only_this, GENERATIONS, {"m": 1})["params"]
    return {"id": 7, "step": "generate", "type": kind,
            "params": params | {"language": language, "task": task},
            "response": json.dumps(texts | values)}


def reject_reason(row: dict) -> str:
    with pytest.raises(Reject) as caught:
        generate.make_example(row, PROMPTS)
    return str(caught.value)


def rows_of(folder: Path, name="raw") -> list[dict]:
    """The rows of one of a run's logs."""
    return list(read_jsonl(folder / f"{name}.jsonl", log=True))


def raw_ids(folder: Path, step="generate") -> list:
    return [row["id"] for row in rows_of(folder) if row["step"] == step]


def ledger_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())["ledger"]
