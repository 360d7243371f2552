"""tools/bench/gpu.sh and gpu.py, run dry: the steps, their reports and their failures."""
import json

from gpu_script import gpu_sh


def test_every_measurement_reports(tmp_path):
    done = gpu_sh(tmp_path, "--dry")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [s["exit_code"] for s in summary.values()] == [0] * 15 and list(summary)[0] == "base"
    for name, sizes in (("train", [64, 128]), ("cudnn", [64]), ("cudnn_padded", [64]), ("padded", [64]),
                        ("eager", [64]), ("paper_batch_22gib", [64]), ("encode", [64, 128]),
                        ("fp8_train", [64]), ("fp8_encode", [64])):
        found = json.loads((tmp_path / f"{name}.json").read_text())["found"]
        assert [one["tokens_per_chunk"] for one in found] == sizes
        assert all(one["tokens_per_second"] > 0 and one["tokens"] > 0 for one in found)
        assert all(one["fp8"] is name.startswith("fp8") for one in found)
        assert all(2 ** 26 < one["peak_bytes"] < 2 ** 32 for one in found)
        assert all(one["cudnn"] is name.startswith("cudnn") for one in found)
        assert all((one["pad"] == 64) is name.endswith("padded") for one in found)
    assert {"ours", "tokens"} <= json.loads((tmp_path / "peer.json").read_text())["sides"].keys()
    padding = (tmp_path / "padding.log").read_text()
    assert "one batch, to alone" in padding and "above" not in padding


def test_a_step_that_fails_ends_neither_the_rest_nor_quietly(tmp_path):
    """Without its base, training fails; the next step still runs, and the exit code tells."""
    done = gpu_sh(tmp_path, "--dry", steps="train encode")
    assert done.returncode == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name: s["exit_code"] for name, s in summary.items()} == {"train": 2, "encode": 2}
    assert "not made yet" in (tmp_path / "train.log").read_text()
