"""tools/data/public_data.py and prompts/public.json: the public mixture, from a stand-in hub to training."""
import json
import shlex
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import train
from hub_standin import Hub
from plumbing.examples import Examples
from scripts import ROOT, complaint, run_tool
from tools.data import public_data

TABLE = json.loads((ROOT / "prompts" / "public.json").read_text(encoding="utf-8"))
SPLITS = ("eli5", "hotpotqa", "fever", "miracl_es", "miracl_sw", "mr_tydi_thai", "nq", "squad", "trivia",
          "nli", "msmarco_passage", "msmarco_document", "quora_duplicates", "dureader", "t2ranking")


def rows(split: str, number: int) -> list[dict]:
    """Rows with the columns of the copy's card."""
    return [{"query": f"{split} question {i} 世界", "pos": [f"{split} answer {i}"],
             "neg": [f"wrong {i}", f"bad {i}"], "category": "text", "type": "retrieval",
             "prompt": "Some wording of its own", "pos_scores": [1.0], "neg_scores": [0.5, 0.25]}
            for i in range(number)]


@pytest.fixture
def copy(tmp_path):
    """A repository with the real one's names and columns: parquet, one split in two parts, one in JSON."""
    folder = tmp_path / "copy"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("card")
    for split in SPLITS:
        for part in range(2 if split == "eli5" else 1):
            table = pyarrow.Table.from_pylist(rows(split, 20))
            name = f"{split}-0000{part}-of-0000{2 if split == 'eli5' else 1}.parquet"
            pyarrow.parquet.write_table(table, folder / "data" / name)
    (folder / "data" / "arguana.jsonl").write_text(json.dumps(rows("arguana", 1)[0]) + "\n")
    return folder


def fetch(hub, tmp_path, *more):
    return run_tool("data.public_data", "--out", tmp_path / "public", *more,
                    env=hub.environment(tmp_path / "cache") | {"HF_HUB_OFFLINE": "0"})


def refused(done) -> str:
    """The one line that is ours: `hf` says things of its own."""
    *before, last = done.stderr.strip().splitlines()
    assert done.returncode == 2 and last.startswith("public_data.py: ") and "Traceback" not in done.stderr
    assert not any(line.startswith("public_data.py") for line in before)
    return last


def serve(copy):
    return Hub({f"datasets/{TABLE['hub']}": copy}, revisions=("main", TABLE["revision"]))


def test_shares_are_the_papers():
    """Section 4.2 and Table 14."""
    shares = {name: one["share"] for name, one in TABLE["sets"].items()}
    sampled = {"eli5": 0.1, "msmarco-passage": 0.5, "msmarco-document": 0.2, "quora": 0.1, "t2ranking": 0.5}
    assert {name: share for name, share in shares.items() if share != 1} == sampled
    assert len(shares) == 14                                  # 13 sets, MS MARCO as passages and as documents
    assert {n for n, one in TABLE["sets"].items() if len(one["instructions"]) == 2} == {"nli", "quora"}


def test_the_mixture_is_fetched_and_train_reads_it(copy, tmp_path):
    with serve(copy) as hub:
        done = fetch(hub, tmp_path)
        assert done.returncode == 0, done.stderr
        asked = len(hub.requests)
        again = fetch(hub, tmp_path)                          # all is there: nothing is asked for
        assert again.returncode == 0 and len(hub.requests) == asked
    out = tmp_path / "public"
    assert {p.stem for p in out.glob("*.jsonl")} == TABLE["sets"].keys() and not [*out.glob("*.tmp")]
    assert "not used: arguana" in done.stdout
    assert "the copy may be sampled already" in done.stdout   # 320 rows are not 1.3 million
    assert (out / "miracl.jsonl").read_text(encoding="utf-8").count("\n") == 40          # both languages
    flags = shlex.split((out / "flags").read_text())
    args = train.options([*flags, "--base", "b", "--out", "o"])
    examples = Examples(args.data)
    assert len(examples) == 16 * 20 and len(examples.group_names) == 14                  # a group a set
    drawn = np.concatenate(train.plan_epoch(examples, 64, False, 0, 0))
    count = {path.stem: int((examples.files[drawn] == i).sum()) for i, path in enumerate(examples.paths)}
    assert count == {name: round(one["share"] * (40 if name in ("eli5", "miracl") else 20))
                     for name, one in TABLE["sets"].items()}
    nli = [json.loads(line) for line in (out / "nli.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in nli[:4]] == TABLE["sets"]["nli"]["instructions"] * 2
    assert nli[0] == {"prompt": nli[0]["prompt"], "query": "nli question 0 世界", "pos": ["nli answer 0"],
                      "neg": ["wrong 0", "bad 0"]}


def test_a_missing_set_is_named_and_may_be_left_out(copy, tmp_path):
    (copy / "data/squad-00000-of-00001.parquet").unlink()
    (copy / "data/nq-00000-of-00001.parquet").unlink()
    with serve(copy) as hub:
        assert "no files for nq, squad, only arguana, dureader" in refused(fetch(hub, tmp_path))
        assert not (tmp_path / "public" / "flags").exists()
        done = fetch(hub, tmp_path, "--partial")
        assert done.returncode == 0 and "missing: nq, squad" in done.stdout
    assert len(shlex.split((tmp_path / "public" / "flags").read_text())) == 12 * 2


@pytest.mark.parametrize("row, complaint", [
    ({"question": "q", "answers": ["a"]}, "fever.jsonl: a row has no query and pos, but question, answers"),
    ({"query": " ", "pos": ["a"]}, "no examples"),
])
def test_a_file_of_another_kind_is_named_and_nothing_half_written_stays(copy, tmp_path, row, complaint):
    (copy / "data/fever-00000-of-00001.parquet").unlink()
    (copy / "data/fever.jsonl").write_text(json.dumps(row) + "\n")
    with serve(copy) as hub:
        assert complaint in refused(fetch(hub, tmp_path))
    assert {p.name for p in (tmp_path / "public").iterdir()} == {"eli5.jsonl", "hotpotqa.jsonl"}


@pytest.mark.slow
def test_an_unreachable_hub_is_one_error(copy, tmp_path):
    with serve(copy) as hub:
        pass
    done = fetch(hub, tmp_path)                               # `hf` may print a traceback of its own
    assert done.returncode == 2 and not (tmp_path / "public").exists()
    assert done.stderr.splitlines()[-1].startswith("public_data.py: ")


ELI5 = TABLE["sets"]["eli5"]


@pytest.mark.parametrize("change, words", [
    ({"examples": 0}, "table.json: examples: 0"),
    ({"examples": 10**400}, "table.json: examples: 1000"),
    ({"sets": {"eli5": []}}, "table.json: eli5: holds no JSON object"),
    ({"sets": {"eli5": ELI5 | {"share": "1"}}}, "table.json: eli5: 'share'"),
    ({"sets": {"eli5": ELI5 | {"instructions": []}}}, "table.json: eli5: its instructions"),
])
def test_a_broken_table_is_refused_before_anything_is_fetched(tmp_path, capsys, change, words):
    (tmp_path / "table.json").write_text(json.dumps(TABLE | change))
    said = complaint(capsys, public_data.main, "--table", tmp_path / "table.json", "--out", tmp_path / "public")
    assert words in said and not (tmp_path / "public").exists()


def test_instructions_of_the_paper_stay_and_others_give_way(tmp_path):
    path, count = tmp_path / "nli.jsonl", public_data.Counter()
    wanted = ["first", "second"]
    lines = [{"query": "q", "pos": "p", "prompt": p} for p in ("second", "other", None, "first")]
    lines[0]["neg"] = "n"
    odd = [{"query": "q", "pos": []}, {"query": 5, "pos": ["p"]}, {"query": "q", "pos": [None]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *odd]))
    found = list(public_data.examples([path], wanted, count))
    assert [row["prompt"] for row in found] == ["second", "second", "first", "first"]
    assert found[0] == {"prompt": "second", "query": "q", "pos": ["p"], "neg": ["n"]}
    assert count == {"other instruction": 1, "without text": 3, "examples": 4}


def test_names_are_claimed_by_one_set_or_none():
    def names(*stems):
        paths = [Path(f"data/{name}-00000-of-00001.parquet") for name in stems]
        found, left = public_data.assign(paths, TABLE["sets"])
        return {name: [public_data.stem(f) for f in files] for name, files in found.items() if files}, left
    found, left = names("MSMARCO_passage", "en_NLI_data", "mr-tydi_ar", "mrtydi", "natural_questions", "xnot")
    assert found == {"msmarco-passage": ["MSMARCO_passage"], "nli": ["en_NLI_data"],
                     "mrtydi": ["mr-tydi_ar", "mrtydi"], "nq": ["natural_questions"]}
    assert [public_data.stem(path) for path in left] == ["xnot"]
