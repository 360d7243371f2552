"""plumbing/table.py: what is printed, and what goes into which mean."""
import doctest
import json
import shutil

import pytest

import evaluate
from model import Embedder
from plumbing import table
from plumbing.errors import UserError
from plumbing.finished import hash_of_task
from plumbing.table import averages, print_table, read_benchmark, read_recorded
from plumbing.tasks import find_tasks
from scoring import MINI, HashEmbedder


def test_docstring_examples():
    assert doctest.testmod(table).failed == 0


def test_the_table_shows_models_and_published_scores_and_names_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Embedder, "load", lambda *_, **__: HashEmbedder())
    for name, kind in (("STSBenchmark", "STS"), ("SciFact", "Retrieval"), ("Foreign", "Bitext")):
        shutil.copytree(MINI / kind, tmp_path / name)
        task = {**json.loads((MINI / kind / "task.json").read_text()), "name": name}
        (tmp_path / name / "task.json").write_text(json.dumps(task))
    out, models = tmp_path / "results" / "scores.json", [tmp_path / "models" / name for name in "ab"]
    for model in models:
        model.mkdir(parents=True)
    evaluate.main([*map(str, models), "--tasks", str(tmp_path), "--benchmark", "eng-v1", "--out", str(out),
                   "--dim", "0", "16", "--quantize", "none", "int8", "binary"])
    printed, scores = capsys.readouterr().out, json.loads(out.read_text())
    stored = ["", " int8", " binary", " 16", " 16 int8", " 16 binary"]
    assert list(scores) == [f"{model}{how}" for model in "ab" for how in stored]
    assert "1 tasks are not of eng-v1: left out" in printed
    assert set(scores["a"]["tasks"]) == {"SciFact", "STSBenchmark"} and len(scores["a"]["missing"]) == 54
    assert scores["a"]["average"] == pytest.approx(sum(scores["a"]["tasks"].values()) / 2)
    assert [scores[name]["bytes_per_vector"] for name in scores][:6] == [256, 68, 8, 64, 20, 2]
    table = printed[printed.index("previous best"):]
    row = next(line for line in table.splitlines() if line.startswith("STSBenchmark")).split()
    assert row[1] == f"{100 * scores['a']['tasks']['STSBenchmark']:.1f}" and row[-2] == "88.6"
    lines = table.splitlines()
    average = next(i for i, line in enumerate(lines) if line.startswith("= Average"))
    assert lines[average].split()[-3:] == ["64.2", "66.6", "63.1"]
    assert lines[average + 1].split() == ["of", "so", "many", "tasks", *["2"] * 12, *["56"] * 3]
    assert "54 tasks or parts missing, in no mean: AmazonCounterfactualClassification, " in table
    assert "written by an LLM" in table and "56 tasks; published: arXiv 2401.00368" in table


def test_the_table_says_whose_score_is_undefined(capsys):
    """The second model's average is over one task, and must not look like one over both."""
    def result(first, average):
        return {"tasks": {"S": first, "T": 0.25}, "categories": {"STS": average}, "average": average,
                "missing": []}
    print_table({"a": result(0.75, 0.5), "b": result(None, 0.25)}, None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in lines if "verage" in line or "so many" in line] == [
        ["50.0", "25.0"], ["2", "1"]]
    assert lines[-1] == "b: 1 tasks or parts undefined, in no mean: S"
    print_table({"a": result(None, 0.25), "b": result(None, 0.25)}, None)
    printed = capsys.readouterr().out
    assert "= Average of 1 tasks" in printed and printed.count("1 tasks or parts undefined") == 2


def test_a_model_that_is_called_like_a_published_one_stands_beside_it(capsys):
    benchmark = read_benchmark("eng-v1")
    name = next(iter(benchmark["published"]))
    result = {"tasks": {"STS12": 0.111}, "categories": {"STS": 0.111}, "average": 0.111, "missing": []}
    print_table({name: result}, benchmark)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].count(name) >= 2 and "11.1" in printed


def test_recorded_scores_stand_beside_published_ones(capsys):
    result = {"tasks": {"STS12": 0.111}, "categories": {"STS": 0.111}, "average": 0.111, "missing": []}
    other = {"tasks": {"STS12": 0.222}, "categories": {"STS": 0.222}, "average": 0.222, "source": "made by hand"}
    print_table({"ours": result}, read_benchmark("eng-v1"), {"other": other})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "ours" and lines[0].split()[-1] == "other"
    row = next(line for line in lines if line.startswith("STS12")).split()
    assert row[1] == "11.1" and row[-1] == "22.2" and "other: made by hand" in lines


@pytest.mark.parametrize("system, words", [
    ({}, "'categories'"), ([], "holds no JSON object"), ({"average": "high"}, "'average'"),
    ({"average": 0.5, "categories": {}, "tasks": {}}, "'source'"),
    ({"average": 0.5, "categories": {}, "tasks": {"S": "0.5"}, "source": "us"}, "no score of S"),
    ({"average": 0.5, "categories": {"STS": []}, "tasks": {}, "source": "us"}, "no score of STS"),
])
def test_recorded_scores_are_looked_at_before_anything_is_scored(tmp_path, system, words):
    tasks, path = find_tasks([str(MINI)]), tmp_path / "peers.json"
    hashes = {task["name"]: hash_of_task(task) for task in tasks}
    path.write_text(json.dumps({"hashes": hashes, "systems": {"theirs": system}}))
    with pytest.raises(UserError, match=f"--beside .*peers.json: theirs: .*{words}"):
        read_recorded(path, tasks)


def test_a_benchmark_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="--benchmark eng-v9: prompts/tasks.json has .*eng-v1"):
        read_benchmark("eng-v9")


def test_a_task_with_an_undefined_part_has_no_score_and_is_in_no_mean():
    scores = {"A/de": 0.2, "A/fr": None, "B": 0.6}
    means = averages(scores, dict.fromkeys(scores, "STS"))
    assert means == {"average": 0.6, "categories": {"STS": 0.6}, "tasks": {"A": None, "B": 0.6}}


def test_the_newer_english_list_has_the_released_models_scores():
    """Its average on mteb's leaderboard is 67.97."""
    benchmark = read_benchmark("eng-v2")
    released = benchmark["published"]["E5-mistral"]
    assert len(benchmark["tasks"]) == len(released["tasks"]) == 41 and released["average"] == 0.6797
    assert sum(released["tasks"].values()) / 41 == pytest.approx(0.6797, abs=1e-4)
    assert released["tasks"]["STSBenchmark"] == 0.886
