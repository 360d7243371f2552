"""tools/mteb_adapter.py and tools/mteb_results.py against the mteb package, which takes seconds to import."""
import pytest

from scoring import MINI, run
from scripts import complaint

pytestmark = pytest.mark.slow


def test_the_adapter_refuses_what_mteb_does_not_know(capsys):
    import mteb_adapter
    assert "mteb: 'STSBenchmrk' not found. Did you mean" in complaint(
        capsys, mteb_adapter.main, "no/such/model", "STSBenchmrk")
    assert "no/such/model: no such model folder" in complaint(
        capsys, mteb_adapter.main, "no/such/model", "STSBenchmark")


def test_mteb_reads_the_result_files(tmp_path):
    import mteb
    import mteb_results
    result = run(MINI)
    result["details"]["STSBenchmark"] = result["details"].pop("STS")
    files = mteb_results.write({"base": result}, {"base": "me/base"}, "1", tmp_path)
    assert len(files) == 8 and files[0].parent == tmp_path / "me__base" / "1"
    read = mteb.results.TaskResult.from_disk(next(path for path in files if path.stem == "STSBenchmark"))
    assert read.get_score() == pytest.approx(result["details"]["STSBenchmark"]["main_score"], abs=1e-6)
