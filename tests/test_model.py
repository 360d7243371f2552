"""model.py against transformers and peft, rung by rung: norm, rotary, attention, block, model, vector.

Tiny random models in float32 on the CPU; a difference is its norm over the reference's norm.
"""
import json
import resource

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers.models.mistral import modeling_mistral as hf

import model
from scripts import complaint
from model import Config, Embedder, UserError, causal_attention, load_decoder
from tiny import random_ids, random_model, relative, save, tiny_config

TOLERANCE = 1e-5
TEXTS = ["", "a", "Hello world", "Steep the leaves for three minutes, then pour.",
         "naïve café, 東京 🙂", "x " * 40, "The end </s> is not <|im_end|>",
         "one two three four five six seven eight nine ten " * 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, mistral_files):
    """A tiny Mistral with the real tokenizer and a window of 24, shorter than the longest texts."""
    config = tiny_config(vocab_size=32000, sliding_window=24)
    return save(random_model(config), tmp_path_factory.mktemp("tiny-mistral"), mistral_files)


@pytest.fixture(scope="module")
def embedder(folder):
    return Embedder.load(folder, device="cpu")


def ours_and_theirs(tmp_path, *args, causal_lm=False, **changes):
    theirs = random_model(tiny_config(*args, **changes), causal_lm=causal_lm)
    return load_decoder(save(theirs, tmp_path / "m"), "cpu", torch.float32), theirs


# --------------------------------------------------------------------------------------------- the ladder

def test_norm():
    theirs, ours = hf.MistralRMSNorm(64, 1e-5), model.RMSNorm(64, 1e-5)
    theirs.weight.data.uniform_(0.5, 1.5)
    ours.weight.data.copy_(theirs.weight)
    x = torch.randn(3, 7, 64) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    assert relative(ours(x), theirs(x)) <= TOLERANCE
    assert relative(ours.bfloat16()(x.bfloat16()), theirs.bfloat16()(x.bfloat16())) == 0


@pytest.mark.parametrize("head_dim, theta", [(16, 1e4), (24, 1e6)])
def test_rotary(head_dim, theta):
    config = tiny_config(head_dim=head_dim, rope_theta=theta)
    q, k = torch.randn(2, 4, 300, head_dim), torch.randn(2, 2, 300, head_dim)
    cos, sin = model.rotary_tables(300, head_dim, theta, torch.float32, "cpu")
    theirs = hf.apply_rotary_pos_emb(q, k, *hf.MistralRotaryEmbedding(config)(q, torch.arange(300)[None]))
    assert relative(model.rotate(q, cos, sin), theirs[0]) <= TOLERANCE
    assert relative(model.rotate(k, cos, sin), theirs[1]) <= TOLERANCE


def dense_mask(length: int, window: int | None) -> torch.Tensor:
    """What position i may see, written out: j <= i and, with a window, j > i - window. Additive [T, T]."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    seen = (j <= i) & (j > i - (window or length))
    return torch.zeros(length, length).masked_fill(~seen, float("-inf"))


@pytest.mark.parametrize("window", [None, 1, 5, 8])
@pytest.mark.parametrize("length", [1, 4, 5, 6, 8, 9, 16, 23, 40])
def test_attention_in_blocks_is_attention(length, window):
    q, k, v = torch.randn(2, 6, length, 16), torch.randn(2, 2, length, 16), torch.randn(2, 2, length, 16)
    scores = q @ k.repeat_interleave(3, 1).mT / 4 + dense_mask(length, window)
    wanted = scores.softmax(-1) @ v.repeat_interleave(3, 1)
    assert relative(causal_attention(q, k, v, window), wanted) <= TOLERANCE


@pytest.mark.parametrize("window, length", [(None, 21), (8, 8), (8, 21), (8, 24), (7, 40)])
@pytest.mark.parametrize("part", ["attention", "block"])
def test_attention_and_block(part, window, length, tmp_path):
    ours, theirs = ours_and_theirs(tmp_path, sliding_window=window, head_dim=24)
    x = torch.randn(2, length, 64)
    tables = model.rotary_tables(length, 24, 1e4, torch.float32, "cpu")
    rotary = theirs.rotary_emb(x, torch.arange(length)[None])
    mask = dense_mask(length, window)[None, None]
    if part == "attention":
        wanted = theirs.layers[1].self_attn(x, rotary, mask)[0]
        assert relative(ours.layers[1].self_attn(x, *tables), wanted) <= TOLERANCE
    else:
        wanted = theirs.layers[1](x, attention_mask=mask, position_embeddings=rotary)
        assert relative(ours.layers[1](x, *tables), wanted) <= TOLERANCE


@pytest.mark.parametrize("family, changes", [
    ("mistral", {}),
    ("mistral", {"sliding_window": 8}),
    ("mistral", {"sliding_window": 7, "head_dim": 24, "rope_theta": 1e6}),
    ("mistral", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"head_dim": 8, "tie_word_embeddings": True}),
    ("llama", {"num_attention_heads": 8, "num_key_value_heads": 2, "rope_theta": 5e5, "rms_norm_eps": 1e-6}),
])
def test_whole_model(family, changes, tmp_path):
    ours, theirs = ours_and_theirs(tmp_path, family, causal_lm=True, **changes)
    ids = random_ids(3, 37, 97)
    assert relative(ours(ids), theirs.model(ids).last_hidden_state) <= TOLERANCE


def test_smollm2(smollm2):
    """Real weights and a real tokenizer, through the whole Embedder."""
    theirs = transformers.AutoModel.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    embedder = Embedder.load(smollm2, device="cpu")
    for text, vector in zip(TEXTS, embedder.encode(TEXTS)):
        ids = [1, *tokenizer(text, split_special_tokens=True)["input_ids"], 2]
        state = theirs(torch.tensor([ids])).last_hidden_state[0, -1]
        assert relative(vector, F.normalize(state, dim=0)) <= TOLERANCE


def test_float64_stays_float64(tmp_path, folder):
    """A derivative by differences of 1e-6 fails as soon as one part rounds to float32."""
    ours, _ = ours_and_theirs(tmp_path, hidden_size=16, intermediate_size=24, sliding_window=3)
    block = ours.double().layers[0]
    tables = model.rotary_tables(5, 4, 1e4, torch.float64, "cpu")
    x = torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: block(x, *tables), x)
    assert Embedder.load(folder, device="cpu", dtype="float64").embed([[1, 5, 2]]).dtype == torch.float64


# ---------------------------------------------------------------------------- a vector and its neighbours

@pytest.mark.parametrize("pooling", model.POOLINGS)
def test_a_vector_does_not_depend_on_its_neighbours(folder, pooling):
    embedder = Embedder.load(folder, device="cpu", pooling=pooling)
    alone = torch.cat([embedder.encode([text]) for text in TEXTS])
    assert torch.allclose(alone.norm(dim=1), torch.ones(len(TEXTS)))
    for tokens_per_chunk in (1, 40, 100, 16384):
        assert relative(embedder.encode(TEXTS, tokens_per_chunk=tokens_per_chunk), alone) <= 1e-6
    order = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(1))
    assert relative(embedder.encode([TEXTS[i] for i in order]), alone[order]) <= 1e-6
    assert relative(alone[4], alone[3]) > 0.1                      # and it does depend on the text


@pytest.mark.parametrize("pooling", model.POOLINGS)
def test_padding_is_never_seen(embedder, pooling):
    """Whatever ids stand behind a text, below or past the window, its states and vector stay."""
    lengths = torch.tensor([3, 30, 61, 80])
    clean = random_ids(4, 80, 32000)
    poisoned = torch.where(torch.arange(80) < lengths[:, None], clean, random_ids(4, 80, 32000, seed=1))
    with torch.no_grad():
        states = [embedder.decoder(ids) for ids in (clean, poisoned)]
    pooled = [model.pool(state, lengths, pooling) for state in states]
    assert relative(pooled[1], pooled[0]) <= 1e-6
    for row, length in enumerate(lengths):
        assert relative(states[1][row, :length], states[0][row, :length]) <= 1e-6


def test_pooling_by_hand():
    hidden = torch.tensor([[[1.0, 0], [3, 2], [99, 99]], [[2, 4], [4, 2], [6, 9]]])
    lengths = torch.tensor([2, 3])
    assert model.pool(hidden, lengths, "last").tolist() == [[3, 2], [6, 9]]
    assert model.pool(hidden, lengths, "mean").tolist() == [[2, 1], [4, 5]]
    wanted = torch.tensor([[(1 + 2 * 3) / 3, (2 * 2) / 3],
                           [(2 + 2 * 4 + 3 * 6) / 6, (4 + 2 * 2 + 3 * 9) / 6]])
    assert torch.allclose(model.pool(hidden, lengths, "weighted-mean"), wanted)


def test_encode_options(embedder):
    vectors = embedder.encode(TEXTS)
    assert vectors.dtype == torch.float32 and vectors.shape == (len(TEXTS), 64)
    raw = embedder.encode(TEXTS, normalize=False)
    assert relative(F.normalize(raw, dim=1), vectors) <= 1e-6 and relative(raw, vectors) > 0.1
    assert relative(embedder.encode(TEXTS, dim=16), F.normalize(raw[:, :16], dim=1)) <= 1e-6
    assert embedder.encode([]).shape == (0, 64)
    prompts = ["" if i % 2 else f"Task {i}" for i in range(len(TEXTS))]
    by_hand = embedder.encode([f"Instruct: {p}\nQuery: {t}" if p else t for p, t in zip(prompts, TEXTS)])
    assert embedder.encode(TEXTS, prompt=prompts).equal(by_hand)
    assert embedder.encode(TEXTS, prompt="Task 0")[0].equal(by_hand[0])
    for dim in (0, 65):
        with pytest.raises(UserError, match="dim"):
            embedder.encode(TEXTS, dim=dim)


def test_length_chunks_hold_every_row_within_the_budget():
    lengths = [int(n) for n in torch.randint(1, 50, (200,), generator=torch.Generator().manual_seed(0))]
    chunks = model.length_chunks(lengths, 100)
    assert sorted(row for chunk in chunks for row in chunk) == list(range(200))
    assert all(len(chunk) * max(lengths[row] for row in chunk) <= 100 for chunk in chunks)
    assert model.length_chunks([500], 100) == [[0]]                # a text above the budget goes alone


def test_overrides_for_long_texts(folder, embedder):
    """The RoPE base and the window as load options (the paper's passkey test raises the base)."""
    long = TEXTS[-1:]
    plain = Embedder.load(folder, device="cpu", sliding_window=None)
    turned = Embedder.load(folder, device="cpu", rope_theta=100_000)
    assert relative(plain.encode(long), embedder.encode(long)) > 1e-3
    assert relative(turned.encode(long), embedder.encode(long)) > 1e-3
    assert plain.encode(["short"]).equal(embedder.encode(["short"]))       # within the window: no difference
    config = transformers.AutoConfig.from_pretrained(folder)
    config.sliding_window, config.rope_parameters["rope_theta"] = None, 1e5
    theirs = transformers.AutoModel.from_pretrained(folder, config=config, dtype=torch.float32)
    both = Embedder.load(folder, device="cpu", rope_theta=1e5, sliding_window=None)
    state = theirs(torch.tensor(both.tokenize(long))).last_hidden_state[0, -1]
    assert relative(both.encode(long)[0], F.normalize(state, dim=0)) <= TOLERANCE
    with pytest.raises(UserError, match="sliding_window"):
        Embedder.load(folder, device="cpu", sliding_window=0)
    with pytest.raises(UserError, match="rope_tetha: no setting of a model; there are vocab_size"):
        Embedder.load(folder, device="cpu", rope_tetha=1e5)


@pytest.mark.slow
def test_compiled_blocks_do_not_fall_back_to_eager(folder, embedder, monkeypatch):
    """Evaluation and training, one row and more, one to three windows: 12 graphs, traced but not compiled."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **kw: compile(block, backend="eager", **kw))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        ours = Embedder.load(folder, device="cpu").compile(True)
        ours.decoder.add_lora(rank=2)
        for train in (False, True):
            ours.decoder.train(train)
            for rows in (1, 3):
                for length in (9, 11, 30, 50):
                    ids = random_ids(rows, length, 32000).tolist()
                    with torch.set_grad_enabled(train):        # the fresh adapter changes nothing
                        assert relative(ours.embed(ids), embedder.embed(ids)) <= TOLERANCE


# -------------------------------------------------------------------------------------------------- LoRA

@pytest.mark.parametrize("options", [
    {"r": 4, "lora_alpha": 32},
    {"r": 8, "lora_alpha": 16, "use_rslora": True},
    {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]},
])
def test_lora_is_pefts_both_ways(options, tmp_path):
    options = {"lora_dropout": 0.1, "target_modules": list(model.PROJECTIONS), **options}
    base = save(random_model(tiny_config()), tmp_path / "base")
    ids = random_ids(2, 19, 97)
    theirs = peft.get_peft_model(transformers.AutoModel.from_pretrained(base),
                                 peft.LoraConfig(task_type="FEATURE_EXTRACTION", **options)).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = theirs(ids).last_hidden_state

    ours = load_decoder(base, "cpu", torch.float32)
    without = ours(ids)
    model.load_adapter(ours, tmp_path / "theirs")
    assert relative(ours(ids), wanted) <= TOLERANCE
    assert relative(without, wanted) > 0.01                        # the adapter matters

    Embedder(ours, empty_tokenizer(), base=str(base)).save_adapter(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(base), tmp_path / "ours")
    assert relative(back.eval()(ids).last_hidden_state, wanted) <= TOLERANCE
    saved, stored = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    assert saved.keys() == stored.keys() and all(saved[key].equal(stored[key]) for key in saved)
    described = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    for key, value in {**options, "task_type": "FEATURE_EXTRACTION", "bias": "none"}.items():
        assert described[key] == value


def empty_tokenizer():
    """The smallest tokenizer that the class takes, where no text is read."""
    return Tokenizer(BPE())


def test_a_fresh_adapter_changes_nothing_and_is_seeded(folder, embedder):
    first, second, other = (load_decoder(folder, "cpu", torch.float32) for _ in range(3))
    first.add_lora(seed=1), second.add_lora(seed=1), other.add_lora(seed=2)
    ids = random_ids(2, 9, 32000)
    assert first(ids).equal(embedder.decoder(ids))
    a, b, c = (list(decoder.lora_parameters().values()) for decoder in (first, second, other))
    assert all(x.equal(y) for x, y in zip(a, b)) and not a[0].equal(c[0])
    assert all(p.dtype == torch.float32 for p in a)
    assert [n for n, p in first.named_parameters() if p.requires_grad] == list(first.lora_parameters())


def test_a_run_finds_its_base_and_gives_the_trained_vectors(folder, tmp_path):
    trained = Embedder.load(folder, device="cpu")
    trained.decoder.add_lora(rank=4)
    for parameter in trained.decoder.lora_parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    trained.save_adapter(tmp_path / "run")
    wanted = trained.encode(TEXTS)
    for again in (Embedder.load(tmp_path / "run", device="cpu"),
                  Embedder.load(folder, adapter=tmp_path / "run", device="cpu")):
        assert again.encode(TEXTS).equal(wanted)
    assert relative(Embedder.load(folder, device="cpu").encode(TEXTS), wanted) > 0.01
    refused("a second one", Embedder.load, tmp_path / "run", adapter=tmp_path / "run")
    (tmp_path / "run/config.json").write_text('{"pooling": "mean"}')
    assert Embedder.load(tmp_path / "run", device="cpu").pooling == "mean"


# What the hub's intfloat/e5-mistral-7b-instruct says of its adapter, with what older versions of peft wrote.
PUBLISHED = {
    "auto_mapping": None, "base_model_name_or_path": "mistralai/Mistral-7B-v0.1", "bias": "none",
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layers_pattern": None,
    "layers_to_transform": None, "lora_alpha": 32, "lora_dropout": 0.1, "modules_to_save": None,
    "peft_type": "LORA", "r": 16, "revision": None, "target_modules": list(model.PROJECTIONS),
    "task_type": "FEATURE_EXTRACTION",
}


@pytest.fixture
def adapter(folder, tmp_path):
    """A folder like the published adapter's: its config, weights of the tiny base's shapes."""
    decoder = load_decoder(folder, "cpu", torch.float32)
    decoder.add_lora(16)
    tensors = {f"base_model.model.{name}.weight": torch.randn_like(p) / 10
               for name, p in decoder.lora_parameters().items()}
    path = tmp_path / "adapter"
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(PUBLISHED))
    return path


def edit(path, **changes):
    """Rewrite a JSON file with some keys changed; a value of KeyError drops the key."""
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not KeyError}))


def refused(words, call, *args, **options):
    """The call fails with one line for the user that names the cause."""
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_published_adapters_config_loads(folder, adapter, embedder):
    loaded = Embedder.load(folder, adapter=adapter, device="cpu")
    assert loaded.decoder.layers[0].mlp.up_proj.scaling == 2 and loaded.decoder.lora["lora_dropout"] == 0.1
    assert relative(loaded.encode(TEXTS), embedder.encode(TEXTS)) > 0.01
    refused("make base BASE=mistralai/Mistral-7B-v0.1", Embedder.load, adapter)


def test_a_base_that_make_built_is_asked_for_by_its_layers(tmp_path):
    for name, words in [("models/no-such-l3", "`make base`, with the BASE or LAYERS"), (5, "BASE=5")]:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
        refused(words, Embedder.load, tmp_path)


@pytest.mark.parametrize("changes, words", [
    ({"use_dora": True}, "DoRA"),
    ({"bias": "lora_only"}, "bias"),
    ({"lora_bias": True}, "lora_bias"),
    ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    ({"layers_to_transform": [0]}, "layers_to_transform"),
    ({"peft_type": "IA3"}, "IA3"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"init_lora_weights": "pissa_niter_16"}, "pissa"),
    ({"r": KeyError}, "r None"),
    ({"r": 8}, "shape"),
    *[({"r": value}, f"r {value!r}") for value in ("4", 0, -1, 4.0)],
    *[({"lora_alpha": value}, f"lora_alpha {value!r}") for value in ("8", None)],
    *[({"lora_dropout": value}, f"lora_dropout {value!r}") for value in (None, 2)],
])
def test_adapters_that_would_be_misread_are_refused(folder, adapter, changes, words):
    edit(adapter / "adapter_config.json", **changes)
    refused(words, Embedder.load, folder, adapter=adapter, device="cpu")


def test_adapter_files_that_do_not_fit_are_refused(folder, adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    one = next(iter(tensors))
    for changed, words in [
        ({**tensors, one.replace("q_proj", "norm").replace("down_proj", "norm"): torch.ones(1)}, "norm"),
        ({**tensors, one.replace("layers.0", "layers.9"): torch.ones(1)}, "layers.9"),
        ({key: value for key, value in tensors.items() if key != one}, "layers.0"),
        ({**tensors, one: tensors[one].to(torch.int8)}, f"{one} is I8"),
    ]:
        save_file(changed, file)
        refused(words, Embedder.load, folder, adapter=adapter, device="cpu")
    file.rename(adapter / "adapter_model.bin")
    refused("pickle", Embedder.load, folder, adapter=adapter, device="cpu")


# ------------------------------------------------------------------------------------------- checkpoints

@pytest.fixture
def checkpoint(tmp_path):
    """A tiny tied model as one file, with what the loader must give for it."""
    theirs = random_model(tiny_config(tie_word_embeddings=True), causal_lm=True)
    path = save(theirs, tmp_path / "checkpoint")
    return path, load_file(path / "model.safetensors"), theirs.model(random_ids(2, 9, 97)).last_hidden_state


def load(path, dtype=torch.float32):
    return load_decoder(path, "cpu", dtype)(random_ids(2, 9, 97))


def test_layouts(checkpoint, tmp_path):
    path, tensors, wanted = checkpoint
    assert relative(load(path), wanted) <= TOLERANCE
    bare = {key.removeprefix("model."): value for key, value in tensors.items()}
    tied = {**bare, "lm_head.weight": bare["embed_tokens.weight"].clone()}
    del tied["embed_tokens.weight"]
    other_head = {**tensors, "lm_head.weight": torch.randn(97, 64)}
    constants = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    for layout in (bare, tied, other_head, constants):
        save_file(layout, path / "model.safetensors")
        assert relative(load(path), wanted) <= TOLERANCE
    save_file(tensors, path / "model.safetensors")
    shards = tmp_path / "shards"
    transformers.AutoModelForCausalLM.from_pretrained(path).save_pretrained(shards, max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    save_file({"stray": torch.ones(1)}, shards / "other.safetensors")          # not in the index: not read
    assert relative(load(shards), wanted) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_checkpoints(checkpoint, dtype):
    path, tensors, wanted = checkpoint
    save_file({key: value.to(dtype) for key, value in tensors.items()}, path / "model.safetensors")
    theirs = transformers.AutoModel.from_pretrained(path, dtype=torch.float32)
    half = theirs(random_ids(2, 9, 97)).last_hidden_state
    assert relative(load(path), half) <= TOLERANCE                 # read into float32
    assert load(path, dtype).dtype == dtype                        # or computed as stored
    assert relative(load(path, dtype), half) < 0.05


def test_rope_base_in_old_and_new_configs(checkpoint):
    path, _, wanted = checkpoint
    edit(path / "config.json", rope_parameters=KeyError, rope_theta=10000.0)
    assert relative(load(path), wanted) <= TOLERANCE
    edit(path / "config.json", rope_theta=500.0)
    assert relative(load(path), wanted) > 1e-3
    new = {"rope_theta": 1e4, "rope_type": "default"}
    edit(path / "config.json", rope_theta=KeyError, rope_parameters=new)
    assert relative(load(path), wanted) <= TOLERANCE


def test_config_defaults_are_transformers_own(tmp_path):
    for family in ("mistral", "llama"):
        theirs = transformers.AutoConfig.for_model(family)
        needed = ("model_type", "vocab_size", "hidden_size", "intermediate_size",
                  "num_hidden_layers", "num_attention_heads")
        (tmp_path / "config.json").write_text(json.dumps({key: getattr(theirs, key) for key in needed}))
        ours = Config.load(tmp_path / "config.json")
        assert ours.num_key_value_heads == theirs.num_key_value_heads
        assert ours.sliding_window == getattr(theirs, "sliding_window", None)
        for same in ("rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id"):
            assert getattr(ours, same) == getattr(theirs, same)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.head_dim == theirs.hidden_size // theirs.num_attention_heads


def test_tensors_that_do_not_fit_are_named(checkpoint):
    path, tensors, _ = checkpoint
    name = "model.layers.1.mlp.up_proj.weight"
    less = {key: value for key, value in tensors.items() if key != name}
    for changed, words in [
        (less, "layers.1.mlp.up_proj.weight"),
        ({**less, name: torch.ones(2, 64)}, f"{name} has shape (2, 64), wanted (112, 64)"),
        ({**tensors, "model.layers.3.mlp.up_proj.weight": torch.ones(1)}, "model.layers.3.mlp.up_proj"),
        ({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, "q_proj.bias"),
        ({**less, name: tensors[name].to(torch.int8)}, f"{name} is I8"),
        ({**less, name: tensors[name].to(torch.float8_e4m3fn)}, f"{name} is F8_E4M3"),
    ]:
        save_file(changed, path / "model.safetensors")
        refused(words, load, path)


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "qwen2"}, "'qwen2'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled RoPE"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "scaled RoPE"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "scaled RoPE"),
    ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_type": "yarn"}}, "scaled RoPE"),
    ({"rope_scaling": "linear"}, "scaled RoPE"),
    ({"rope_parameters": [1]}, "scaled RoPE"),
    ({"attention_bias": True}, "biases"),
    ({"mlp_bias": True}, "biases"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"hidden_size": KeyError}, "hidden_size"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": "64", "head_dim": KeyError}, "hidden_size cannot be '64'"),
    ({"intermediate_size": 112.0}, "intermediate_size cannot be 112.0"),
    ({"num_attention_heads": 0, "head_dim": KeyError}, "num_attention_heads cannot be 0"),
    ({"num_hidden_layers": -1}, "num_hidden_layers cannot be -1"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"num_key_value_heads": -2}, "num_key_value_heads cannot be -2"),
    ({"head_dim": 15}, "head_dim cannot be 15"),
    ({"rope_theta": 0}, "rope_theta cannot be 0"),
    ({"rope_theta": -1}, "rope_theta cannot be -1"),
    ({"rope_theta": None}, "rope_theta cannot be None"),
    ({"eos_token_id": None}, "eos_token_id"),
    ({"eos_token_id": []}, "eos_token_id cannot be []"),
    ({"bos_token_id": 97}, "bos_token_id"),
])
def test_configs_that_would_be_misread_are_refused(checkpoint, changes, words):
    path, _, _ = checkpoint
    edit(path / "config.json", **{"rope_parameters": KeyError, **changes})
    refused(words, load, path)
    refused("config.json", load, path)


def test_files_that_cannot_be_read_are_named(folder, checkpoint, tmp_path):
    path, _, _ = checkpoint
    weights = path / "model.safetensors"
    refused("tokenizer.json", Embedder.load, path, device="cpu")
    (path / "tokenizer.json").write_text("{}")
    refused("tokenizer.json", Embedder.load, path, device="cpu")
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("model.safetensors", load, path)
    weights.rename(path / "pytorch_model.bin")
    refused("pickle", load, path)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001.safetensors"}}')
    refused("model-00001.safetensors", load, path)
    for names in ('["model.safetensors"]', "null", '{"a": 1}'):
        (path / "model.safetensors.index.json").write_text(f'{{"weight_map": {names}}}')
        refused("index.json: its weight_map", load, path)
    (path / "config.json").write_text("{")
    refused("config.json", load, path)
    (path / "config.json").write_text("[]")
    refused("config.json", load, path)
    refused("no such model folder", Embedder.load, tmp_path / "nowhere")
    for options, words in [({"pooling": "max"}, "pooling"), ({"max_length": 2}, "max_length"),
                           ({"dtype": "float7"}, "float7"), ({"device": "tpu9"}, "tpu9")]:
        refused(words, Embedder.load, folder, **options)


def test_a_tokenizer_with_ids_that_the_model_lacks_is_refused(checkpoint):
    """Embeddings are 0 to 96 here; fewer ids are usual, and an added padding token comes out of no text."""
    path, _, _ = checkpoint
    for last, added in ((96, []), (96, ["<pad>"]), (97, [])):
        tokenizer = Tokenizer(BPE({f"t{i}": i for i in range(last + 1)}, []))
        tokenizer.add_special_tokens(added)
        tokenizer.save(str(path / "tokenizer.json"))
        if last < 97:
            Embedder.load(path, device="cpu")
    refused("the id 97, the config's vocab_size is 97", Embedder.load, path, device="cpu")


def test_a_disk_that_fills_under_save_file_is_one_line(checkpoint, tmp_path, capsys):
    _, tensors, _ = checkpoint
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:                                          # a limit on the size of files stands in for the full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        said = complaint(capsys, lambda _: model.replace_file(tmp_path / "w", lambda p: save_file(tensors, p)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in said and not list(tmp_path.glob("w*"))
