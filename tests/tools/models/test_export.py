"""tools/models/export.py: sentence-transformers and transformers give our vectors from its folder."""
import json
import os
import re
import resource
import shutil
import stat

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from tokenizers.models import BPE

from model import Embedder
from plumbing.errors import UserError
from plumbing.files import write_json
from scripts import ROOT, complaint
from tiny import random_model, relative, save, tiny_config
from tools.models import card, export
from tools.workflow import DEFAULTS

MAX_LENGTH = 48
TEXTS = ["", "a", "Hello world", "naïve café · Быстрая лиса · 我喜欢在周末看书 · مرحبا", "🙂🚀 👨‍👩‍👧 🇩🇪",
         "An end </s> in the middle <s>", "</s>", "  two  spaces ", "line\nbreak",
         *["tea " * n for n in (MAX_LENGTH - 3, MAX_LENGTH - 2, MAX_LENGTH - 1, MAX_LENGTH, 300)]]


def run_export(*arguments):
    export.main([str(argument) for argument in arguments])


def make_run(folder, base, pooling="last"):
    """A run with a visible adapter, as train.py leaves it."""
    embedder = Embedder.load(base, device="cpu", max_length=MAX_LENGTH, pooling=pooling)
    embedder.decoder.add_lora(rank=4, alpha=8)
    generator = torch.Generator().manual_seed(0)
    for parameter in embedder.decoder.lora_parameters().values():
        parameter.data.normal_(std=0.02, generator=generator)
    embedder.save_adapter(folder)
    (folder / "config.json").write_text(json.dumps({"pooling": pooling}))
    return folder


@pytest.fixture(scope="module", params=["mistral", "smollm2"])
def base(request, tmp_path_factory, mistral_files, smollm2):
    """A tiny random Mistral with the real Mistral tokenizer and a short window, or the real SmolLM2."""
    if request.param == "smollm2":
        return smollm2
    model = random_model(tiny_config(vocab_size=32000, sliding_window=16), causal_lm=True)
    return save(model, tmp_path_factory.mktemp("base") / "m", mistral_files)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "demo", base)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "out"
    run_export(run, out, "--max-length", MAX_LENGTH, "--prompt", "tea=Find a tea", "--shard-gb", 0.004)
    return out


@pytest.fixture(scope="module")
def ours(run):
    return Embedder.load(run, device="cpu", max_length=MAX_LENGTH)


def test_sentence_transformers_gives_our_vectors(exported, ours, base):
    theirs = SentenceTransformer(str(exported), device="cpu")
    assert theirs.max_seq_length == MAX_LENGTH
    assert relative(theirs.encode(TEXTS, convert_to_tensor=True), ours.encode(TEXTS)) <= 1e-5
    for text in TEXTS:
        assert relative(theirs.encode([text], convert_to_tensor=True), ours.encode([text])) <= 1e-5
    for name, prompt in [("tea", "Find a tea"), ("document", ""), ("query", export.QUERY.split("=")[1])]:
        named = theirs.encode(TEXTS, prompt_name=name, convert_to_tensor=True)
        assert relative(named, ours.encode(TEXTS, prompt=prompt)) <= 1e-5
    bare = Embedder.load(base, device="cpu", max_length=MAX_LENGTH)
    assert relative(bare.encode(TEXTS), ours.encode(TEXTS)) > 1e-3


def test_transformers_gives_our_ids_and_vectors(exported, ours):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    theirs = transformers.AutoModel.from_pretrained(exported, dtype=torch.float32).eval()
    cut = tokenizer(TEXTS, truncation=True)["input_ids"]
    assert cut == ours.tokenize(TEXTS)
    eos = ours.decoder.config.eos_token_id
    assert all(ids[-1] == eos for ids in cut) and max(map(len, cut)) == MAX_LENGTH
    whole = tokenizer(TEXTS[-1])["input_ids"]                       # uncut, it still ends in EOS
    assert len(whole) > 300 and whole[-1] == eos
    batch = tokenizer(TEXTS, truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = theirs(**batch).last_hidden_state
    last = hidden[torch.arange(len(TEXTS)), batch["attention_mask"].sum(1) - 1]
    assert relative(F.normalize(last, dim=1), ours.encode(TEXTS)) <= 1e-5


def test_our_own_loader_reads_the_export(exported, ours):
    again = Embedder.load(exported, device="cpu")
    assert again.max_length == MAX_LENGTH and relative(again.encode(TEXTS), ours.encode(TEXTS)) <= 1e-5
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1 and all((exported / name).exists() for name in files)
    assert sum(p.nbytes for p in again.decoder.parameters()) == index["metadata"]["total_size"]
    assert not list(exported.glob("shard-*"))


def test_bfloat16_merged_against_unmerged(run, ours, tmp_path, capsys):
    """The merge rounds the adapter to bfloat16's eight bits: the worst cosine says what that costs."""
    run_export(run, tmp_path / "out", "--dtype", "bfloat16", "--compare")
    told = float(re.search(r"worst cosine of \d+ texts ([0-9.]+)", capsys.readouterr().out)[1])
    assert 0.98 < told < 1
    merged = Embedder.load(tmp_path / "out", device="cpu", dtype="bfloat16", max_length=MAX_LENGTH)
    unmerged = Embedder.load(run, device="cpu", dtype="bfloat16", max_length=MAX_LENGTH)
    worst = {name: (other.encode(TEXTS) * merged.encode(TEXTS)).sum(1).min().item()
             for name, other in [("bfloat16 unmerged", unmerged), ("float32 unmerged", ours)]}
    print(f"bfloat16 merged, worst cosine against {worst}")
    assert min(worst.values()) > 0.98


@pytest.mark.parametrize("pooling", ["mean", "weighted-mean"])
def test_other_poolings(pooling, base, tmp_path):
    run = make_run(tmp_path / "run", base, pooling)
    run_export(run, tmp_path / "out", "--max-length", MAX_LENGTH)
    ours = Embedder.load(run, device="cpu", max_length=MAX_LENGTH).encode(TEXTS)
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS, convert_to_tensor=True)
    assert relative(theirs, ours) <= 1e-5
    again = Embedder.load(tmp_path / "out", device="cpu", max_length=MAX_LENGTH)
    assert again.pooling == pooling and relative(again.encode(TEXTS), ours) <= 1e-5
    run_export(run, tmp_path / "small", "--adapter")
    assert Embedder.load(tmp_path / "small", device="cpu").pooling == pooling


@pytest.mark.parametrize("pooling", ["last", "weighted-mean"])
def test_what_sentence_transformers_saves_again_is_read(pooling, mistral_files, tmp_path):
    """It names the pooling in another way than its older versions did."""
    base = save(random_model(tiny_config(vocab_size=32000)), tmp_path / "base", mistral_files)
    run = make_run(tmp_path / "run", base, pooling)
    run_export(run, tmp_path / "out", "--max-length", MAX_LENGTH)
    SentenceTransformer(str(tmp_path / "out"), device="cpu").save_pretrained(str(tmp_path / "again"))
    ours, again = (Embedder.load(tmp_path / name, device="cpu") for name in ("out", "again"))
    assert again.pooling == pooling and relative(again.encode(TEXTS), ours.encode(TEXTS)) <= 1e-6


def test_a_pooling_that_is_not_here_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "cls")
    write_json(tmp_path / "cls" / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True})
    with pytest.raises(UserError, match="pooling_mode_cls_token True: not known here"):
        Embedder.load(tmp_path / "cls", device="cpu")
    assert Embedder.load(tmp_path / "cls", device="cpu", pooling="mean").pooling == "mean"


def test_the_bases_dtype_is_kept_and_mistakes_are_one_line(mistral_files, tmp_path, capsys):
    base = save(random_model(tiny_config(vocab_size=32000)).bfloat16(), tmp_path / "base", mistral_files)
    tokenizer = base / "tokenizer.json"
    tokenizer.write_bytes(b"\xef\xbb\xbf" + tokenizer.read_bytes())         # as some editors leave it
    run_export(base, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert transformers.AutoModel.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    capsys.readouterr()
    strange = save(random_model(tiny_config()), tmp_path / "strange", mistral_files)
    save_file({"stray": torch.ones(1)}, strange / "model.safetensors")
    other = shutil.copytree(base, tmp_path / "other")
    Tokenizer(BPE({"a": 0}, [])).save(str(other / "tokenizer.json"))
    for arguments, words in [((tmp_path / "no", tmp_path / "o"), "no such model folder"),
                             ((base, tmp_path / "out"), "already there"),
                             ((base, tmp_path / "o", "--prompt", "nameless"), "NAME=INSTRUCTION"),
                             ((base, tmp_path / "o", "--prompt", "document=Find"), "choose another name"),
                             ((base, tmp_path / "o", "--max-length", 2), "max_length"),
                             ((base, tmp_path / "o", "--shard-gb", "nan"), "--shard-gb: nan: must be above"),
                             ((base, tmp_path / "o", "--shard-gb", 0), "--shard-gb: 0: must be above 0"),
                             ((base, tmp_path / "o.\udce9"), "not in UTF-8"),
                             ((base, tmp_path / "o", "--prompt", "faq=f\udcfcr"), "not in UTF-8"),
                             ((other, tmp_path / "o"), "tokenizer.json: has no token 1"),
                             ((strange, tmp_path / "o"), "stray")]:
        assert words in complaint(capsys, export.main, *arguments)
        assert not list(tmp_path.glob("o.*")) and not (tmp_path / "o").exists()


def test_both_generations_of_transformers_find_ropes_base(mistral_files, tmp_path):
    """Version 5 reads and writes it in rope_parameters alone, version 4 reads it beside them alone."""
    config = tiny_config(vocab_size=32000, rope_theta=5e4)
    base = save(random_model(config), tmp_path / "base", mistral_files)
    assert "rope_theta" not in json.loads((base / "config.json").read_text())
    run_export(base, tmp_path / "out", "--max-length", 20)
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 5e4
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ours = Embedder.load(base, device="cpu", max_length=20)
    state = theirs(torch.tensor(ours.tokenize(TEXTS[2:3]))).last_hidden_state[0, -1]
    assert relative(F.normalize(state, dim=0), ours.encode(TEXTS[2:3])[0]) <= 1e-5
    run_export(tmp_path / "out", tmp_path / "again")                # an export's own length is the default
    assert Embedder.load(tmp_path / "again", device="cpu").max_length == 20


def test_the_folder_for_llama_cpp_has_the_bases_tokenizer_and_two_flags(base, run, ours, tmp_path, capsys):
    """tests/slow/test_llama_cpp.py gives such a folder to the converter."""
    if base.name == "m":                                           # Mistral's
        assert "m/tokenizer.model is missing" in complaint(capsys, export.main, run, tmp_path / "o", "--gguf")
        (base / "tokenizer.model").write_text("scores")
    run_export(run, tmp_path / "out", "--gguf", "--max-length", MAX_LENGTH)
    out = tmp_path / "out"
    assert (out / "tokenizer.model").exists() is (base.name == "m")
    before, after = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (base, out))
    assert [e.ids for e in before.encode_batch(TEXTS)] == [e.ids for e in after.encode_batch(TEXTS)]
    settings = json.loads((out / "tokenizer_config.json").read_text())
    config = json.loads((out / "config.json").read_text())
    assert settings["add_bos_token"] is settings["add_eos_token"] is True
    assert config["architectures"][0] in ("LlamaForCausalLM", "MistralForCausalLM")
    assert not (out / "modules.json").exists()                     # sentence-transformers would forget EOS
    again = Embedder.load(out, device="cpu", max_length=MAX_LENGTH)
    assert relative(again.encode(TEXTS), ours.encode(TEXTS)) <= 1e-5
    set_bos = "gguf-set-metadata out.gguf tokenizer.ggml.add_bos_token true"
    assert (set_bos in (out / "README.md").read_text()) is (config["vocab_size"] == 49152)
    (run / "config.json").write_text('{"pooling": "weighted-mean"}')
    capsys.readouterr()
    try:
        for flags, words in [(["--adapter"], "--gguf and --adapter"),
                             ([], "llama.cpp has no weighted-mean")]:
            assert words in complaint(capsys, export.main, run, tmp_path / "o", "--gguf", *flags)
    finally:
        (run / "config.json").write_text('{"pooling": "last"}')
    assert not (tmp_path / "o").exists()


def test_all_files_are_for_other_users_too(exported, run, tmp_path):
    """As the umask has it: a server may run as another user."""
    run_export(run, tmp_path / "small", "--adapter")
    old = os.umask(0o027)
    try:
        run_export(run, tmp_path / "group")
    finally:
        os.umask(old)
    for folder, umask in [(exported, old), (tmp_path / "small", old), (tmp_path / "group", 0o027)]:
        for path in (folder, *folder.rglob("*")):
            wanted = (0o777 if path.is_dir() else 0o666) & ~umask
            assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_the_card_tells_what_the_folder_alone_cannot(run, exported, base, ours):
    text = (exported / "README.md").read_text()
    assert f"| base | {base.name} |" in text and "| licence of the base | not told by its files" in text
    assert f"| values of a vector | {ours.decoder.config.hidden_size} |" in text
    assert f"| tokens of a text, at most | {MAX_LENGTH}, BOS and EOS included |" in text
    assert "- `tea`: 'Instruct: Find a tea\\nQuery: '\n" in text and "- `query`: " in text
    assert f'SentenceTransformer("{exported.name}")' in text and "the last token's, EOS" in text


def test_a_base_is_known_by_its_name_or_its_own_card(tmp_path):
    told = {"models/smollm2-135m-l6": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
            "models/mistralai/Mistral-7B-v0.1": ("mistralai/Mistral-7B-v0.1", "apache-2.0"),
            "models/somebody/model": ("somebody/model", None), "elsewhere/model": (None, None)}
    for name, about in told.items():
        (tmp_path / name).mkdir(parents=True)
        assert card.known(tmp_path / name) == about
    assert card.described(tmp_path / "models/smollm2-135m-l6").endswith("-Instruct, its first 6 layers")
    front = "---\nbase_model: x\nlicense: mit\n---\n# model\nlicense: of-the-text\n"
    (tmp_path / "models/somebody/model/README.md").write_text(front)
    assert card.known(tmp_path / "models/somebody/model") == ("somebody/model", "mit")
    (tmp_path / "config.json").write_text('{"data": ["data/mine.jsonl", "/x/more.jsonl:0.5"]}')
    assert card.training_data(tmp_path) == "`mine.jsonl`, `more.jsonl:0.5`"


def test_a_dtype_that_overflows_is_one_line_and_leaves_nothing(mistral_files, tmp_path, capsys):
    model = random_model(tiny_config(vocab_size=32000))
    model.embed_tokens.weight.data *= 1e7
    base = save(model, tmp_path / "base", mistral_files)
    said = complaint(capsys, export.main, base, tmp_path / "out", "--dtype", "float16", "--compare")
    assert "NaN or infinity" in said and [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("limit, flags", [(4096, ["--adapter"]), (4096, []), (4_000_000, [])])
def test_a_full_disk_leaves_nothing_and_takes_nothing(limit, flags, mistral_files, tmp_path, capsys):
    """A limit on the size of files stands in for it: adapter, tokenizer and weights are too large."""
    base = save(random_model(tiny_config(vocab_size=32000)), tmp_path / "base", mistral_files)
    run = make_run(tmp_path / "run", base)
    (tmp_path / "out.tmp").mkdir()                # a user's own
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        assert "File too large" in complaint(capsys, export.main, run, tmp_path / "out", *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out.tmp", "run"]
    run_export(run, tmp_path / "out", *flags)
    assert (tmp_path / "out.tmp").exists() and Embedder.load(tmp_path / "out", device="cpu")


def test_an_adapter_alone_in_16_bits_gives_nearly_the_same_vectors(base, tmp_path):
    run = make_run(tmp_path / "run", base)
    run_export(run, tmp_path / "small", "--adapter")
    small, whole = (tmp_path / name / "adapter_model.safetensors" for name in ("small", "run"))
    assert small.stat().st_size < 0.6 * whole.stat().st_size
    texts = TEXTS[1:6]
    before, after, bare = (Embedder.load(path, device="cpu").encode(texts)
                           for path in (run, tmp_path / "small", base))
    assert 0 < relative(after, before) < 5e-3 < relative(bare, before)


def test_a_base_has_no_adapter_to_write(base, tmp_path, capsys):
    with pytest.raises(UserError, match="has no adapter"):
        run_export(base, tmp_path / "out", "--adapter")


def test_the_shipped_adapter_fits_the_default_base():
    folder = ROOT / "data" / "adapter"
    described = json.loads((folder / "adapter_config.json").read_text())
    layers = DEFAULTS["LAYERS"]
    assert described["base_model_name_or_path"] == f"models/smollm2-135m-l{layers}"
    tensors = load_file(folder / "adapter_model.safetensors")
    sizes = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    assert {t.dtype for t in tensors.values()} == {torch.float32}            # as it was trained
    assert sum(t.numel() for t in tensors.values()) == int(layers) * 16 * sum(map(sum, sizes))
    assert (folder / "adapter_model.safetensors").stat().st_size <= 12e6
    assert all(t.float().abs().max() > 0 for t in tensors.values())      # B starts at zero
