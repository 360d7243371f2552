"""Golden token ids: the real Mistral tokenizer against SentencePiece; BOS once, EOS once, after the cut."""
import json
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from model import Embedder, UserError
from tiny import random_model, save, tiny_config

BOS, EOS = 1, 2

AWKWARD = """\
Instruct: Given a web search query, retrieve relevant passages that answer the query
Query: how much protein should a female eat
def f(x):\treturn x ** 2  # two  spaces,   three
https://example.org/path?x=1&y=2#frag  1,000,000 -42 1e-5 0x1F
naïve café déjà vu · El niño comió piñas; ¿por qué? ¡Olé!
Übergrößenträger Straße ẞ · Zażółć gęślą jaźń · Árvíztűrő tükörfúrógép
Tiếng Việt có dấu thanh điệu: phở, bánh mì · İstanbul'da ılık bir gün
Быстрая коричневая лиса · Українська: їжак, ґанок, є · Ελληνικό κείμενο
שלום עולם, מה שלומך? · مرحبا بالعالم، كيف حالك؟ · سلام دنیا
नमस्ते दुनिया · বাংলা লেখা · தமிழ் எழுத்து · తెలుగు వచనం · ไทยไม่มีช่องว่าง
日本語のテキストです。ﾊﾝｶｸ · 我喜欢在周末看书和喝咖啡。 · 한국어 문장입니다.
ქართული · Հայերեն · አማርኛ · မြန်မာစာ · ភាសាខ្មែរ · 𐌰𐌱𐌲
🙂🚀 👨‍👩‍👧 🇩🇪 ✈️ e\u0301 é zero\u200bwidth nbsp\u00a0here ＡＢＣ １２３
∑_{i=1}^n x_i ≤ ∞ “curly” «guillemets» – — … € £ ₹ ┌─┐ \u2581\u2581
 leading, trailing \t\x01\x07 \U0010ffff\ue000""".split("\n")


def multilingual_texts() -> list[str]:
    """Sentences of every language in the committed mini benchmark, awkward ones, and mixtures of both."""
    texts = set()
    for path in sorted(Path("data/mini").rglob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            texts |= {value for value in json.loads(line).values() if isinstance(value, str)}
    rng = random.Random(0)
    texts = rng.sample(sorted(texts), 300) + AWKWARD + ["", " ", "\n\n\n", "a\r\nb", "a" * 50]
    texts += [" " * n + "x" * (n % 2) for n in range(1, 60)]
    words = [word for text in texts for word in text.split(" ")]
    return texts + [" ".join(rng.choices(words, k=8)) for _ in range(200)]


@pytest.fixture(scope="session")
def tokenizer(mistral_files):
    return Tokenizer.from_file(str(mistral_files / "tokenizer.json"))


@pytest.fixture(scope="session")
def embedder(tmp_path_factory, mistral_files):
    config = tiny_config(vocab_size=32000, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    folder = save(random_model(config), tmp_path_factory.mktemp("tiny"), mistral_files)
    return Embedder.load(folder, device="cpu", max_length=32)


def test_golden_ids(tokenizer, sentencepiece):
    texts = multilingual_texts()
    assert len(texts) > 500 and len({char for text in texts for char in text}) > 500
    for text in texts:
        encoded = tokenizer.encode(text, add_special_tokens=False).ids
        assert encoded == sentencepiece.encode(text), text
        assert tokenizer.decode(encoded) == sentencepiece.decode(encoded)
    assert tokenizer.encode("Hello world").ids == [BOS, 22557, 1526]         # by hand: <s>, ▁Hello, ▁world


@settings(max_examples=1000, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30))
def test_golden_ids_of_random_code_points(tokenizer, sentencepiece, text):
    assert tokenizer.encode(text, add_special_tokens=False).ids == sentencepiece.encode(text)


def test_bos_once_and_eos_once_after_the_cut(embedder, sentencepiece):
    """Every length around the limit, in words and in bytes of emoji that are cut apart."""
    for word in ("tea ", "🙂"):
        lengths = set()
        for repeats in range(41):
            ids = embedder.tokenize([word * repeats])[0]
            assert ids == [BOS, *sentencepiece.encode(word * repeats)[:30], EOS]
            lengths.add(len(ids))
        assert {2, 32} <= lengths and max(lengths) == 32
    for text in multilingual_texts():
        ids = embedder.tokenize([text])[0]
        assert ids == [BOS, *sentencepiece.encode(text)[:30], EOS]
        assert ids.count(BOS) == ids.count(EOS) == 1


def test_special_tokens_typed_in_a_text_are_text(embedder, sentencepiece):
    for text in ("</s>", "<s> a </s> b", "ends in </s>", "<unk>", "a</s>"):
        ids = embedder.tokenize([text])[0]
        assert ids == [BOS, *sentencepiece.encode(text), EOS]
        assert not {0, BOS, EOS} & set(ids[1:-1])


def test_the_prompt_is_the_papers(embedder, sentencepiece):
    wanted = [BOS, *sentencepiece.encode("Instruct: Find tea\nQuery: how hot"), EOS]
    assert embedder.tokenize(["how hot"], "Find tea") == [wanted]
    bare = [BOS, *sentencepiece.encode("how hot"), EOS]
    assert embedder.tokenize(["how hot"] * 2, ["", "Find tea"]) == [bare, wanted]
    with pytest.raises(ValueError):
        embedder.tokenize(["a", "b"], ["one prompt"])


def test_what_is_no_text_is_named(embedder):
    for texts, prompt in [(["fine", "caf\udce9"], ""), (["fine", None], "Find tea"), (["fine", b"a"], "")]:
        with pytest.raises(UserError, match=re.escape(f"text 1: no UTF-8 text: {texts[1]!r}")):
            embedder.tokenize(texts, prompt)
    with pytest.raises(UserError, match=r"text 0: .*prompt '\\udcff'$"):
        embedder.tokenize(["x" * 1000], "\udcff")
    with pytest.raises(TypeError, match="a list of texts"):
        embedder.encode("one text")


def test_without_bos_and_with_a_list_of_eos(tmp_path, mistral_files, sentencepiece):
    config = tiny_config(vocab_size=32000, hidden_size=16, num_hidden_layers=1)
    folder = save(random_model(config), tmp_path, mistral_files)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"bos_token_id": None, "eos_token_id": [2, 7]}))
    embedder = Embedder.load(folder, device="cpu", max_length=4)
    assert embedder.tokenize(["Hello", "Hello world and more"]) == [
        [*sentencepiece.encode("Hello"), EOS], [*sentencepiece.encode("Hello world and more")[:3], EOS]]


def test_a_tokenizer_files_own_cut_padding_and_eos_are_put_aside(tmp_path, mistral_files, embedder):
    """Some published files truncate, pad, or add their own EOS; ours is the only rule."""
    tokenizer = Tokenizer.from_file(str(mistral_files / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=20)
    bare = tokenizer.to_str()
    text = "one two three four five six seven eight"
    other = Embedder(embedder.decoder, Tokenizer.from_str(bare), max_length=32)
    assert other.tokenize([text, "a"]) == embedder.tokenize([text, "a"])


def test_smollm2_ids(smollm2):
    """The byte-level BPE: BOS <|im_start|> = 1, EOS <|im_end|> = 2, which is also what pads."""
    embedder = Embedder.load(smollm2, device="cpu", max_length=8)
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    for text in ["", "Hello world", "<|im_end|>", "2026", *AWKWARD]:
        ids = embedder.tokenize([text])[0]
        assert ids == [1, *tokenizer.encode(text).ids[:6], 2] and ids.count(2) == 1
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert torch.isfinite(embedder.encode([""])).all()
