"""tools/eval/mteb_adapter.py and mteb_results.py against the mteb package, which takes seconds to import."""
import json
import random

import pytest

from model import Embedder
from scoring import MINI, HashEmbedder, run, write_task
from scripts import complaint

pytestmark = pytest.mark.slow


def test_the_adapter_refuses_what_mteb_does_not_know(capsys):
    from tools.eval import mteb_adapter
    assert "mteb: 'STSBenchmrk' not found. Did you mean" in complaint(
        capsys, mteb_adapter.main, "no/such/model", "STSBenchmrk")
    assert "no/such/model: no such model folder" in complaint(
        capsys, mteb_adapter.main, "no/such/model", "STSBenchmark")


def test_mteb_reads_the_result_files(tmp_path):
    import mteb

    from tools.eval import mteb_results
    result = run(MINI)
    result["details"]["STSBenchmark"] = result["details"].pop("STS")
    files = mteb_results.write({"base": result}, {"base": "me/base"}, "1", tmp_path)
    assert len(files) == 8 and files[0].parent == tmp_path / "results" / "me__base" / "1"
    read = mteb.results.TaskResult.from_disk(next(path for path in files if path.stem == "STSBenchmark"))
    assert read.get_score() == pytest.approx(result["details"]["STSBenchmark"]["main_score"], abs=1e-6)


def test_mteb_loads_the_models_of_make_eval(tmp_path, capsys):
    """As the help says, on a file with two models, written before there were seconds."""
    import mteb

    from tools.eval import mteb_results
    result = run(MINI)
    for scores in result["details"].values():
        del scores["seconds"]
    demo = tmp_path / "demo.json"
    demo.write_text(json.dumps({"base": result, "trained": result}))
    mteb_results.main([str(demo), "--name", "me", "--revision", "1", "--out", str(tmp_path / "all")])
    mteb_results.main([str(demo), "--model", "trained", "--name", "me/my-model", "--out", str(tmp_path / "one")])
    loaded = [mteb.ResultCache(tmp_path / name).load_results(include_remote=False) for name in ("all", "one")]
    names = [[model.model_name for model in results.model_results] for results in loaded]
    assert sorted(names[0]) == ["me/base", "me/trained"] and names[1] == ["me/my-model"]
    assert all(len(model.task_results) == 8 for results in loaded for model in results.model_results)
    capsys.readouterr()
    assert "choose one by --model" in complaint(capsys, mteb_results.main, demo, "--name", "me/x")


def test_another_model_has_another_revision(smollm2):
    """Under one, mteb's cache would print the old model's score."""
    from tools.eval.mteb_adapter import MTEBModel

    def revision(change=None, **flags):
        embedder = Embedder.load(smollm2, device="cpu", **flags)
        if change:
            change(embedder.decoder)
        return MTEBModel(embedder).mteb_model_meta.revision

    def retrain(decoder):
        decoder.layers[0].mlp.down_proj.weight[0, 0] += 1e-3

    first = revision()
    assert len(first) == 40 and revision() == first
    assert len({first, revision(retrain), revision(max_length=99), revision(pooling="mean"),
                revision(dtype="bfloat16"), revision(sliding_window=9)}) == 6


def test_the_twelve_forums_get_our_instruction():
    import mteb

    from tools.eval.mteb_adapter import TASKS, instruction
    for forum in TASKS["CQADupstackRetrieval"]["parts"]:
        task = mteb.get_task(f"CQADupstack{forum.capitalize()}Retrieval")
        assert instruction(task.metadata) == TASKS["CQADupstackRetrieval"]["prompt"]


NEWER = ["ArXivHierarchicalClusteringS2S", "StackExchangeClustering.v2", "StackExchangeClusteringP2P.v2",
         "TwentyNewsgroupsClustering.v2"]


@pytest.mark.parametrize("name", NEWER)
def test_newer_clustering_tasks_are_prepared_and_scored_as_in_mteb(name, tmp_path, monkeypatch):
    """From the files as uploaded, through the hub's tool and evaluate.py, against mteb's own preparation."""
    import mteb
    from datasets import Dataset, DatasetDict

    from tools.eval import hub
    from tools.eval.mteb_adapter import TASKS, MTEBModel
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    draw = random.Random(0)
    labels = [f"{label}.{draw.choice('xy')}" if draw.random() < 0.8 else label for label in draw.choices("abcde", k=2500)]
    texts = [f"{label} {label} {draw.choice('pqrst')} {i % 99}" for i, label in enumerate(labels)]
    if name == "StackExchangeClusteringP2P.v2":
        labels[7] = "alone"
    sets = [{"sentences": texts[:900], "labels": labels[:900]}, {"sentences": texts[900:], "labels": labels[900:]}]
    write_task(tmp_path / "uploaded", {}, test=sets)
    (tmp_path / "uploaded" / "task.json").unlink()
    hub.convert(tmp_path / "uploaded", tmp_path / "task", name, TASKS[name])
    ours = run(tmp_path / "task")["details"][name]
    harness, = mteb.get_tasks(tasks=[name])
    harness.dataset = DatasetDict({"test": Dataset.from_list(sets)})
    monkeypatch.setattr(f"{type(harness).__module__}._check_label_distribution", lambda _: None, raising=False)
    harness.dataset_transform()
    harness.data_loaded = True
    result = mteb.evaluate(MTEBModel(HashEmbedder()), [harness], cache=None, show_progress_bar=False)
    theirs = result.task_results[0].scores["test"][0]
    assert ours["v_measure"] == pytest.approx(theirs["v_measure"], abs=1e-9) and 0.1 < ours["v_measure"] < 1
