"""The checks that users can run, run: tools/check_padding.py and tools/bench_memory.py."""
import json
import re
import subprocess
import sys

import pytest
import torch

import bench_memory
import check_padding
import model
from scripts import TOOLS, complaint
from tiny import random_model, save, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory, mistral_files):
    config = tiny_config(vocab_size=32000, sliding_window=24)
    return save(random_model(config), tmp_path_factory.mktemp("tiny-mistral"), mistral_files)


def test_vectors_hold_in_every_dtype(folder, capsys):
    check_padding.main([str(folder)])
    table = capsys.readouterr().out
    assert len(re.findall(r"^cpu +(?:float32|bfloat16|float16) .* to alone ", table, re.MULTILINE)) == 12
    assert "above" not in table and table.count("alone, to float32 on the cpu") == 2


def test_a_padding_fault_is_found(folder, monkeypatch, capsys):
    """The commonest fault: reading the last column, which is padding for all but the longest text."""
    monkeypatch.setattr(model, "pool", lambda hidden, lengths, pooling: hidden[:, -1])
    with pytest.raises(SystemExit) as stopped:
        check_padding.main([str(folder), "--dtypes", "float32"])
    assert stopped.value.code == 1 and "above" in capsys.readouterr().out


def test_texts_that_are_not_utf8_are_one_line(folder, tmp_path, capsys):
    (tmp_path / "texts").write_bytes(b"fine\n\xff\n")
    said = complaint(capsys, check_padding.main, folder, "--texts", tmp_path / "texts")
    assert "texts:2: not UTF-8" in said


def bench(*arguments):
    done = subprocess.run([sys.executable, TOOLS / "bench_memory.py", *map(str, arguments)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_loading_needs_the_checkpoints_size_once(stored, tmp_path):
    """Two layers of the 7B shape. Beside the weights: Python and torch, and the largest tensor twice."""
    said = bench("load", "--layers", 2, "--stored", stored, "--folder", tmp_path / "checkpoint")
    size, used, before = (float(re.search(pattern, said)[1]) for pattern in (
        r"([\d.]+) GB in bfloat16", r"([\d.]+) GB when used", r"\(([\d.]+) GB of it Python"))
    assert used - before <= 1.1 * size + (0.3 if stored == "float16" else 0)
    assert "finite: True" in said and not (tmp_path / "checkpoint").exists()


@pytest.mark.slow
def test_memory_grows_with_the_length_and_not_with_its_square():
    ratios = re.findall(r"16,384 tokens need ([\d.]+) times what 8,192 need", bench("long"))
    assert len(ratios) == 2 and all(1 < float(ratio) <= 2.2 for ratio in ratios)


def kept_bytes(decoder, rows: int, length: int) -> int:
    """What autograd keeps of one forward pass, the decoder's own tensors aside, each piece of memory once."""
    own = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    kept = {}                                     # holds the tensors, so that no address is used twice

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = decoder(torch.randint(3, 500, (rows, length)))
    assert states.requires_grad
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"head_dim": 48, "num_key_value_heads": 8,
                                          "intermediate_size": 200}])
def test_predicted_bytes_per_token_are_those_that_autograd_keeps(dtype, compiled, changes):
    config = bench_memory.shape_of({**bench_memory.SMALL, "hidden_size": 128, "intermediate_size": 320,
                                    "num_hidden_layers": 3, **changes})
    decoder = model.Decoder(config).to(dtype).train()
    for name, p in decoder.named_parameters():
        torch.nn.init.normal_(p.requires_grad_(False), std=0.02)
    decoder.add_lora(8, 16, 0.1)
    if compiled:
        torch._dynamo.reset()
        for block in decoder.layers:
            block.compile(dynamic=True)
    few, many = (kept_bytes(decoder, rows, 32) for rows in (4, 20))     # less what no token adds to
    mask = 1 if compiled else dtype.itemsize
    wanted = bench_memory.kept_bytes_per_token(config, 8, dtype.itemsize, compiled, mask)
    assert (many - few) / (16 * 32) == pytest.approx(wanted, rel=0.02)


def test_predictions_add_up():
    c = bench_memory.shape_of(bench_memory.MISTRAL_7B)
    settings = {"rank": 16, "batch": 2048, "compiled": True}
    fixed = bench_memory.predicted_bytes(c, 0, **settings)
    weights, lora = 7_110_660_096 * 2, 41_943_040 * (16 + 2)      # both counts are published
    assert 0 < fixed - weights - lora < 1e9
    chunks = [bench_memory.recommended_chunk(c, size, **settings) for size in (16, *bench_memory.GPU_SIZES)]
    assert chunks[0] == 0 and chunks[1] >= 512 and sorted(chunks) == chunks
    for size, chunk in zip(bench_memory.GPU_SIZES, chunks[1:]):
        assert bench_memory.predicted_bytes(c, chunk, **settings) <= 0.92e9 * size - 0.6e9
        assert bench_memory.predicted_bytes(c, chunk + 256, **settings) > 0.92e9 * size - 0.6e9
    assert bench_memory.recommended_chunk(c, 80, **settings, itemsize=4) < chunks[3]
    assert bench_memory.recommended_chunk(c, 80, **{**settings, "compiled": False}) < chunks[3]


def test_the_table_shows_what_was_measured_and_what_failed(folder, tmp_path):
    report = tmp_path / "train.json"
    report.write_text(json.dumps({"found": [{"tokens_per_chunk": 1000, "peak_bytes": 12_340_000_000},
                                            {"tokens_per_chunk": 9000, "error": "out of memory"}]}))
    lines = bench("train", "--measured", report).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["24", "40", "80", "141"]
    assert all(re.search(r"\d\.\d +-$", line) for line in lines[1:5])
    assert re.search(r"^ +1,000 +\d+\.\d +12\.3$", lines[5]) and re.search(r"^ +9,000 .* failed$", lines[6])
    assert float(bench("train", "--base", folder).splitlines()[1].split()[2]) < 24
    done = subprocess.run([sys.executable, TOOLS / "bench_memory.py", "train", "--base", tmp_path / "none"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("bench_memory.py: ") and done.stderr.count("\n") == 1
