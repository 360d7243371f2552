"""tools/eval/mteb_adapter.py and mteb_results.py against the mteb package, which takes seconds to import."""
import json

import pytest

from model import Embedder
from scoring import MINI, run
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
