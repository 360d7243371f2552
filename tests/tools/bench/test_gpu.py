"""tools/bench/gpu.sh and gpu.py: what they refuse. tests/slow runs all of it, dry."""
import torch

from gpu_script import gpu_sh
from model import Decoder, Embedder
from scripts import run_tool
from tiny import relative
from tools.bench import gpu


def test_padded_lengths_change_no_vector(tmp_path, monkeypatch):
    """And cuDNN's attention stays on only where --cudnn says so."""
    gpu.make_base(tmp_path / "base", gpu.TINY, "float32")
    embedder = Embedder.load(tmp_path / "base", device="cpu")
    ids = [[1, *range(5, 5 + length), 2] for length in (9, 30, 70)]
    with torch.no_grad():
        wanted = [embedder.embed([one]) for one in ids]
        monkeypatch.setattr(Decoder, "forward", Decoder.forward)              # given back at the end
        monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", torch.backends.cuda.enable_cudnn_sdp)
        shapes = gpu.set_up({"cudnn": True, "pad": 64})
        for one, vector in zip(ids, wanted):
            assert relative(embedder.embed([one]), vector) <= 1e-6
    torch.backends.cuda.enable_cudnn_sdp(False)
    assert shapes == {(1, 64), (1, 128)} and torch.backends.cuda.cudnn_sdp_enabled()


def test_user_errors_are_one_line(tmp_path):
    done = gpu_sh(tmp_path, "--fast")
    assert done.returncode == 2 and done.stderr == "error: gpu.sh --fast: takes --dry or nothing\n"
    if not torch.cuda.is_available():
        done = gpu_sh(tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: no CUDA device here")
    done = run_tool("bench.gpu", "base", tmp_path)
    assert done.returncode == 2 and "already there" in done.stderr and done.stderr.count("\n") == 1
