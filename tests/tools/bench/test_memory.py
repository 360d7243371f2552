"""tools/bench/memory.py: the predicted peaks. tests/slow/test_memory.py measures."""
import json
import re

import pytest
import torch

import model
from scripts import run_tool
from tiny import random_model, save, tiny_config
from tools.bench import memory


@pytest.fixture(scope="module")
def folder(tmp_path_factory, mistral_files):
    config = tiny_config(vocab_size=32000, sliding_window=24)
    return save(random_model(config), tmp_path_factory.mktemp("tiny-mistral"), mistral_files)


def bench(*arguments):
    done = run_tool("bench.memory", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    config = memory.shape_of({**memory.SMALL, "hidden_size": 128, "intermediate_size": 320,
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
    wanted = memory.kept_bytes_per_token(config, 8, dtype.itemsize, compiled, mask)
    assert (many - few) / (16 * 32) == pytest.approx(wanted, rel=0.02)


def test_predictions_add_up():
    c = memory.shape_of(memory.MISTRAL_7B)
    settings = {"rank": 16, "batch": 2048, "compiled": True}
    fixed = memory.predicted_bytes(c, 0, **settings)
    weights, lora = 7_110_660_096 * 2, 41_943_040 * (16 + 2)      # both counts are published
    assert 0 < fixed - weights - lora < 1e9
    chunks = [memory.recommended_chunk(c, size, **settings) for size in (16, *memory.GPU_SIZES)]
    assert chunks[0] == 0 and chunks[1] >= 512 and sorted(chunks) == chunks
    for size, chunk in zip(memory.GPU_SIZES, chunks[1:]):
        assert memory.predicted_bytes(c, chunk, **settings) <= 0.92e9 * size - 0.6e9
        assert memory.predicted_bytes(c, chunk + 256, **settings) > 0.92e9 * size - 0.6e9
    assert memory.recommended_chunk(c, 80, **settings, itemsize=4) < chunks[3]
    assert memory.recommended_chunk(c, 80, **{**settings, "compiled": False}) < chunks[3]


def test_the_table_shows_what_was_measured_and_what_failed(folder, tmp_path):
    report = tmp_path / "train.json"
    report.write_text(json.dumps({"found": [{"tokens_per_chunk": 1000, "peak_bytes": 12_340_000_000},
                                            {"tokens_per_chunk": 9000, "error": "out of memory"}]}))
    lines = bench("train", "--measured", report).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["24", "40", "80", "141"]
    assert all(re.search(r"\d\.\d +-$", line) for line in lines[1:5])
    assert re.search(r"^ +1,000 +\d+\.\d +12\.3$", lines[5]) and re.search(r"^ +9,000 .* failed$", lines[6])
    assert float(bench("train", "--base", folder).splitlines()[1].split()[2]) < 24
    done = run_tool("bench.memory", "train", "--base", tmp_path / "none")
    assert done.returncode == 2 and done.stderr.startswith("memory.py: ") and done.stderr.count("\n") == 1
