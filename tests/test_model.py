"""The proof of model.py: equal to transformers and peft, rung by rung: norm, rotary, attention, block, model, vector.

Tiny random models in float32 on the CPU; a difference is its norm over the reference's norm.
"""
import json
import re

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers.models.mistral import modeling_mistral as hf

import model
from model import Embedder, causal_attention, load_decoder
from plumbing.checkpoint import POOLINGS
from plumbing.errors import UserError
from tiny import random_ids, random_model, relative, save, tiny_config

TOLERANCE = 1e-5
BOS, EOS = 1, 2
TEXTS = ["", "a", "Hello world", "Steep the leaves for three minutes, then pour.",
         "naïve café, 東京 🙂", "x " * 40, "The end </s> is not <|im_end|>",
         "one two three four five six seven eight nine ten " * 5]


@pytest.fixture(scope="module")
def short(folder):
    """The same model with at most 32 tokens a text."""
    return Embedder.load(folder, device="cpu", max_length=32)


def ours_and_theirs(tmp_path, *args, causal_lm=False, **changes):
    theirs = random_model(tiny_config(*args, **changes), causal_lm=causal_lm)
    return load_decoder(save(theirs, tmp_path / "m"), "cpu", torch.float32), theirs


# -------------------------------------------------------------------------------------------- the ladder

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


def test_the_idea_in_five_lines_is_what_the_embedder_does(embedder):
    for text in TEXTS[:5]:
        vector = model.embed_one(embedder.decoder, embedder.tokenizer, text, "Find it")
        assert relative(vector, embedder.encode([text], "Find it")[0]) <= TOLERANCE


# ------------------------------------------------------------------------------------------------ tokens

def test_bos_once_and_eos_once_after_the_cut(short, sentencepiece):
    """Every length around the limit, in words and in bytes of emoji that are cut apart."""
    for word in ("tea ", "🙂"):
        lengths = set()
        for repeats in range(41):
            ids = short.tokenize([word * repeats])[0]
            assert ids == [BOS, *sentencepiece.encode(word * repeats)[:30], EOS]
            lengths.add(len(ids))
        assert {2, 32} <= lengths and max(lengths) == 32
    for text in TEXTS:
        ids = short.tokenize([text])[0]
        assert ids == [BOS, *sentencepiece.encode(text)[:30], EOS]
        assert ids.count(BOS) == ids.count(EOS) == 1


def test_special_tokens_typed_in_a_text_are_text(short, sentencepiece):
    for text in ("</s>", "<s> a </s> b", "ends in </s>", "<unk>", "a</s>"):
        ids = short.tokenize([text])[0]
        assert ids == [BOS, *sentencepiece.encode(text), EOS]
        assert not {0, BOS, EOS} & set(ids[1:-1])


def test_the_prompt_is_the_papers(short, sentencepiece):
    wanted = [BOS, *sentencepiece.encode("Instruct: Find tea\nQuery: how hot"), EOS]
    assert short.tokenize(["how hot"], "Find tea") == [wanted]
    bare = [BOS, *sentencepiece.encode("how hot"), EOS]
    assert short.tokenize(["how hot"] * 2, ["", "Find tea"]) == [bare, wanted]
    with pytest.raises(UserError, match="1 instructions for 2 texts"):
        short.tokenize(["a", "b"], ["one prompt"])


def test_what_is_no_text_is_named(short):
    for texts, prompt in [(["fine", "caf\udce9"], ""), (["fine", None], "Find tea"), (["fine", b"a"], "")]:
        with pytest.raises(UserError, match=re.escape(f"text 1: no UTF-8 text: {texts[1]!r}")):
            short.tokenize(texts, prompt)
    with pytest.raises(UserError, match=r"text 0: .*prompt '\\udcff'$"):
        short.tokenize(["x" * 1000], "\udcff")
    for texts in ("one text", None, 7):
        with pytest.raises(TypeError, match="a list of texts"):
            short.encode(texts)
    with pytest.raises(TypeError, match="prompt: one string"):
        short.encode(["one text"], 7)


def test_without_bos_and_with_a_list_of_eos(tmp_path, mistral_files, sentencepiece):
    config = tiny_config(vocab_size=32000, hidden_size=16, num_hidden_layers=1)
    folder = save(random_model(config), tmp_path, mistral_files)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"bos_token_id": None, "eos_token_id": [2, 7]}))
    embedder = Embedder.load(folder, device="cpu", max_length=4)
    assert embedder.tokenize(["Hello", "Hello world and more"]) == [
        [*sentencepiece.encode("Hello"), EOS], [*sentencepiece.encode("Hello world and more")[:3], EOS]]


def test_a_tokenizer_files_own_cut_padding_and_eos_are_put_aside(tmp_path, mistral_files, short):
    """Some published files truncate, pad, or add their own EOS; ours is the only rule."""
    tokenizer = Tokenizer.from_file(str(mistral_files / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=20)
    bare = tokenizer.to_str()
    text = "one two three four five six seven eight"
    other = Embedder(short.decoder, Tokenizer.from_str(bare), max_length=32)
    assert other.tokenize([text, "a"]) == short.tokenize([text, "a"])


# --------------------------------------------------------------------------- a vector and its neighbours

@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_vector_does_not_depend_on_its_neighbours(folder, pooling):
    embedder = Embedder.load(folder, device="cpu", pooling=pooling)
    alone = torch.cat([embedder.encode([text]) for text in TEXTS])
    assert torch.allclose(alone.norm(dim=1), torch.ones(len(TEXTS)))
    for tokens_per_chunk in (1, 40, 100, 16384):
        assert relative(embedder.encode(TEXTS, tokens_per_chunk=tokens_per_chunk), alone) <= 1e-6
    order = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(1))
    assert relative(embedder.encode([TEXTS[i] for i in order]), alone[order]) <= 1e-6
    assert relative(alone[4], alone[3]) > 0.1                      # and it does depend on the text


@pytest.mark.parametrize("pooling", POOLINGS)
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
    assert embedder.encode((text for text in TEXTS), prompt=None).equal(vectors)
    assert embedder.encode(iter(TEXTS), prompt=(p or None for p in prompts)).equal(by_hand)
    for dim in (0, 65):
        with pytest.raises(UserError, match="dim"):
            embedder.encode(TEXTS, dim=dim)


def test_a_classifier_can_be_trained_on_the_vectors(embedder):
    """They are plain tensors, which autograd may save for its backward."""
    vectors = embedder.encode(TEXTS)
    head = torch.nn.Linear(64, 2)
    head(vectors).square().sum().backward()
    assert head.weight.grad.norm() > 0 and not vectors.is_inference()


def test_slices_of_a_long_list_are_joined(embedder, monkeypatch, capsys):
    wanted = embedder.encode(TEXTS, [f"Task {i}" for i in range(len(TEXTS))])
    monkeypatch.setattr(model, "SLICE", 3)
    assert relative(embedder.encode(TEXTS, [f"Task {i}" for i in range(len(TEXTS))], progress=True), wanted) <= 1e-6


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_vector_that_is_no_number_is_refused_with_its_text(folder, dtype):
    embedder = Embedder.load(folder, device="cpu", dtype=dtype)
    embedder.decoder.embed_tokens.weight[embedder.tokenizer.encode("tea", add_special_tokens=False).ids[-1]] = torch.inf
    with pytest.raises(UserError, match="NaN or infinity for 1 of 2 texts, the first is 'tea': --dtype bfloat16"):
        embedder.encode(["water", "tea"])


def test_an_instruction_that_leaves_no_room_for_the_text_is_refused(short):
    with pytest.raises(UserError, match="the instruction alone has .* fills --max-length 32"):
        short.encode(["a question", "another"], ["", "task " * 30])
    assert short.encode(["a question", "another"], "task " * 15)[0].ne(0).any()          # cut, but not empty


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
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for length in (31, 37, 45):                    # two windows, as 30 has: no graph for each length
            ours.embed(random_ids(3, length, 32000).tolist())
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


# -------------------------------------------------------------------------------------------------- LoRA

def empty_tokenizer():
    """The smallest tokenizer that the class takes, where no text is read."""
    return Tokenizer(BPE())


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
    ours.load_lora(tmp_path / "theirs")
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


def test_a_fresh_adapter_changes_nothing_and_is_seeded(folder, embedder):
    first, second, other = (load_decoder(folder, "cpu", torch.float32) for _ in range(3))
    first.add_lora(seed=1), second.add_lora(seed=1), other.add_lora(seed=2)
    ids = random_ids(2, 9, 32000)
    assert first(ids).equal(embedder.decoder(ids))
    a, b, c = (list(decoder.lora_parameters().values()) for decoder in (first, second, other))
    assert all(x.equal(y) for x, y in zip(a, b)) and not a[0].equal(c[0])
    assert all(p.dtype == torch.float32 for p in a)
    assert [n for n, p in first.named_parameters() if p.requires_grad] == list(first.lora_parameters())


def test_every_projection_reads_what_dropout_left(folder):
    """Where dropout leaves nothing, the adapter adds nothing, and its gradient is zero."""
    embedder = Embedder.load(folder, device="cpu")
    ids = random_ids(2, 9, 32000).tolist()
    wanted = embedder.embed(ids)
    embedder.decoder.add_lora(rank=4)
    for parameter in embedder.decoder.lora_parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    assert relative(embedder.embed(ids), wanted) > 0.01
    for module in embedder.decoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 1.0
    assert embedder.decoder.train() and relative(embedder.embed(ids), wanted) <= 1e-6
