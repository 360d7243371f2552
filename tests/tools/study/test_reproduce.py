"""tools/study/reproduce.py: a study resumes, and its rows reach training and scoring."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train as train_py
from plumbing.errors import UserError
from plumbing.files import read_json
from plumbing.tasks import document_text, find_tasks, read_rows
from scripts import ROOT, run_tool
from study_lists import MINI, small_study
from tiny import random_model, save, tiny_config
from tools.study import reproduce, subsets
from tools.study.table import CATEGORIES


@pytest.fixture(scope="module")
def base(tmp_path_factory, mistral_files):
    model = random_model(tiny_config(vocab_size=32000, hidden_size=32, num_hidden_layers=2))
    return save(model, tmp_path_factory.mktemp("base") / "tiny", mistral_files)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Rows of two task types with a negative each, one of them a text of the test sets."""
    path = tmp_path_factory.mktemp("data") / "synthetic.jsonl"
    rows = [{"prompt": "Find the reply", "query": f"question {i * i} about {chr(97 + i) * 5}",
             "pos": [f"the answer {chr(98 + i) * 7} to {i}"], "neg": [f"no reply {i} {chr(99 + i) * 3}"],
             "type": ("sts", "long-short")[i % 2]} for i in range(13)]
    rows[5]["query"] = next(read_rows(MINI / "STS" / "test.jsonl"))["sentence1"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_prefix_stands_straight_before_the_text(tmp_path):
    tasks = find_tasks([str(subsets.make(small_study(), MINI, tmp_path)[0])])
    seen = {}

    class Recorder:
        device, truncated = torch.device("cpu"), 0

        def encode(self, texts, **settings):
            seen.update(dict.fromkeys(texts))
            return torch.randn(len(texts), 4)
    tasks = [task for task in tasks if task["name"] in ("Clustering", "Retrieval", "STS")]
    reproduce.score(Recorder(), tasks, reproduce.ROWS["task-type-prefix"], 128)
    rows = {task["name"]: task["folder"] for task in tasks}

    def first(name, file):
        return next(read_rows(rows[name] / file))
    assert f"classify: {first('Clustering', 'test.jsonl')['sentences'][0]}" in seen
    assert f"query: {first('Retrieval', 'queries.jsonl')['text']}" in seen
    assert document_text(first("Retrieval", "corpus.jsonl")) in seen
    assert first("STS", "test.jsonl")["sentence1"] in seen
    assert not any("Instruct" in text for text in seen)


@pytest.fixture
def study(base, examples, tmp_path):
    """Run the study as a user would, in this process, on tiny models: study("--rows", ...) -> its JSON."""
    (tmp_path / "lists.json").write_text(json.dumps(small_study()))
    (tmp_path / "pairs").mkdir()
    row = json.loads(examples.read_text().splitlines()[0])
    for name in ("snli_triplets", "other"):
        rows = [{**row, "query": f"{name} {i}{'xyz'[i] * 9}", "type": None} for i in range(3)]
        (tmp_path / "pairs" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def run(*flags, recipe="--batch-size 6 --max-length 24 --lr 1e-2 --both-sides --max-steps 2"):
        reproduce.main([
            "--evaldata", str(MINI), "--synthetic", str(examples), "--base", str(base),
            "--study", str(tmp_path / "lists.json"), "--work", str(tmp_path / "runs"),
            "--out", str(tmp_path / "study.json"), "--recipe", recipe, "--language", "all", *flags])
        return json.loads((tmp_path / "study.json").read_text())
    return run


@pytest.mark.parametrize("number, to_all", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_lets_training_end_first(number, to_all):
    """Ctrl-C goes to the whole group; a supervisor's SIGTERM to this process alone."""
    child = ("import signal, sys, time\n"
             f"signal.signal({int(number)}, lambda *_: (time.sleep(1), sys.exit(7)))\n"
             "print('ready', flush=True)\ntime.sleep(60)")
    parent = ("import sys\nfrom tools.study import reproduce\n"
              f"sys.exit(reproduce.wait_for([sys.executable, '-c', {child!r}]))")
    run = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, start_new_session=True,
                           cwd=ROOT)
    assert run.stdout.readline() == b"ready\n"
    (os.killpg if to_all else os.kill)(run.pid, number)
    assert run.wait(timeout=30) == 7


def test_a_study_resumes_and_runs_again_what_changed(study, tmp_path, capfd):
    found = study("--rows", "base-cut,synthetic,bm25", "--seeds", "2")
    rows = found["rows"]
    assert list(rows) == ["base-cut", "synthetic", "bm25"] and list(rows["synthetic"]["runs"]) == ["0", "1"]
    assert found["data"]["synthetic"]["contaminated"] == 1 and rows["synthetic"]["examples"] == 12
    assert rows["synthetic"]["mean"].keys() == {"Average", *CATEGORIES, "BitextMining"}
    assert rows["bm25"]["mean"]["Average"] is None and rows["bm25"]["mean"]["Retrieval"] > 0.1
    runs = rows["synthetic"]["runs"]
    assert runs["0"]["scores"] != rows["base-cut"]["runs"]["0"]["scores"]
    config = read_json(Path(runs["1"]["model"]) / "config.json")
    assert config["seed"] == 1 and config["both_sides"] and config["max_steps"] == 2
    text = (tmp_path / "study.md").read_text()
    assert (tmp_path / "study.png").stat().st_size > 10_000
    for shown in ("untrained, the first layers", runs["1"]["model"], "| synthetic | 13 |"):
        assert shown in text

    capfd.readouterr()
    again = study("--rows", "base-cut,synthetic,bm25", "--seeds", "2")
    assert again == found and capfd.readouterr().out.count("done before") == 4
    changed = study("--rows", "base-cut,synthetic", recipe="--batch-size 4 --max-length 24 --max-steps 1")
    out = capfd.readouterr().out
    assert "base-cut, seed 0: done before" in out and "synthetic, seed 0: done before" not in out
    new = changed["rows"]["synthetic"]["runs"]
    config = read_json(Path(new["0"]["model"]) / "config.json")
    assert list(new) == ["0"] and config["batch_size"] == 4 and not config["both_sides"]
    assert "†" not in (tmp_path / "study.md").read_text()


def test_rows_differ_by_their_examples_languages_and_layers(base, tmp_path):
    files = {name: {"file": f"{name}.jsonl", "kept": 100} for name in ("synthetic", "all-languages", "pairs")}
    args = reproduce.options(["--evaldata", "x", "--base", str(base), "--rows", "synthetic"])

    def train(name):
        args.base_30 = Path("models/small")
        return train_py.options([*reproduce.train_flags(name, 0, files, args), "--out", "x"])
    plain = train("synthetic")
    assert plain.base == str(base) and plain.data == ["synthetic.jsonl:1.0"] and plain.max_steps == 240
    assert train("all-languages").data == ["all-languages.jsonl:1.0"]
    assert train("layers-20").base == "models/small-l20" and train("layers-20").max_steps == 72
    assert train("steps-250").epochs == 20 and train("steps-250").max_steps == 240
    assert train("epochs-250").epochs == 2 and train("epochs-250").max_steps == 1000


@pytest.mark.slow
def test_ablations_and_public_data_reach_training(study, tmp_path):
    found = study("--rows", "both,mean-pooling,task-type-prefix", "--subset", "test",
                  "--traindata", str(tmp_path / "pairs"))
    configs = {name: read_json(Path(row["runs"]["0"]["model"]) / "config.json")
               for name, row in found["rows"].items()}
    assert [Path(spec.rpartition(":")[0]).stem for spec in configs["both"]["data"]] == [
        "synthetic", "other", "snli_triplets"]
    types = [json.loads(line)["type"] for line in open(found["data"]["snli_triplets"]["file"])]
    assert types and set(types) == {"sts"}
    assert configs["mean-pooling"]["pooling"] == "mean" and configs["mean-pooling"]["both_sides"]
    prefix = configs["task-type-prefix"]
    assert prefix["instruction"] == "prefix" and not prefix["both_sides"]
    assert all(row["mean"]["Average"] is not None for row in found["rows"].values())


@pytest.mark.slow
def test_the_long_row_trains_on_negatives_that_the_study_mined(study, tmp_path):
    (tmp_path / "many").mkdir()
    words = "apple beech cedar dahlia elder fern ginger hazel iris juniper kale lilac maple nettle oak".split()
    rows = [{"prompt": "Find the reply", "query": f"who grew the {word}", "pos": [f"{word * 3} was mine"]}
            for word in words]
    for name in ("snli_triplets", "other", "tanaka_enja"):
        (tmp_path / "many" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = [{**row, "neg": ["nobody did"]} for row in rows]
    flags = ["--traindata", str(tmp_path / "many"), "--dtype", "float32"]
    with pytest.raises(UserError, match="both-weighted-mean-s0: not trained yet"):
        study("--rows", "long", *flags)
    found = study("--rows", "both-weighted-mean,long", *flags)
    config = read_json(Path(found["rows"]["long"]["runs"]["0"]["model"]) / "config.json")
    assert config["pooling"] == "weighted-mean" and config["batch_size"] == 64
    synthetic, *mined = [spec.rpartition(":")[0] for spec in config["data"]]
    assert synthetic == found["data"]["synthetic"]["file"]
    assert [Path(file).name for file in mined] == [
        "other.15.mined.jsonl", "snli_triplets.15.mined.jsonl"]                      # and no translations
    negatives = [[row["neg"] for row in read_rows(Path(file))] for file in mined]
    assert all(old == "nobody did" and new for old, new in negatives[0])             # one kept, one mined
    assert all(len(texts) == 1 for texts in negatives[1])
    assert found["rows"]["long"]["examples"] == 12 + 15 + 15
    before = [Path(file).stat().st_mtime_ns for file in mined]
    study("--rows", "long", *flags, "--seeds", "1", recipe="--max-length 24 --both-sides")
    assert before == [Path(file).stat().st_mtime_ns for file in mined]               # mined once


@pytest.mark.parametrize("flags, complaint", [
    (["--rows", "nonsense"], "--rows nonsense: there are base-30"), (["--rows", "both"], "needs --traindata"),
    (["--rows", "base-cut", "--seeds", "0"], "--seeds: 0: must be above 0"),
    (["--rows", "synthetic", "--synthetic", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
])
def test_what_a_user_can_mistake_is_said(flags, complaint, study, tmp_path):
    with pytest.raises(UserError, match=complaint):
        study(*flags)
    assert not (tmp_path / "study.json").exists()


def test_user_errors_are_one_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"query": 1}\n')
    done = run_tool("study.reproduce", "--evaldata", MINI, "--synthetic", tmp_path / "bad.jsonl",
                    "--work", tmp_path / "runs", "--out", tmp_path / "study.json")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--traindata" in done.stderr
    done = run_tool("study.reproduce", "--evaldata", MINI, "--synthetic", tmp_path / "bad.jsonl",
                    "--work", tmp_path / "runs", "--out", tmp_path / "study.json", "--rows", "synthetic",
                    "--base", tmp_path, "--language", "all")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "bad.jsonl:1: 'query' is" in done.stderr
    assert not (tmp_path / "study.json").exists()
