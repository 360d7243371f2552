"""The tokenizers that this project makes: the real Mistral tokenizer.json gives SentencePiece's ids, SmolLM2's its own."""
import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from answers import recorded
from model import Embedder

BOS = 1

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
    """Texts of every language among the recorded answers, awkward ones, and mixtures of both."""
    texts = set()
    for row in recorded():
        if row["step"] == "generate" and row["params"].get("language") != "English":
            texts |= {value for value in json.loads(row["response"]).values() if isinstance(value, str)}
    rng = random.Random(0)
    texts = rng.sample(sorted(texts), 300) + AWKWARD + ["", " ", "\n\n\n", "a\r\nb", "a" * 50]
    texts += [" " * n + "x" * (n % 2) for n in range(1, 60)]
    words = [word for text in texts for word in text.split(" ")]
    return texts + [" ".join(rng.choices(words, k=8)) for _ in range(200)]


@pytest.fixture(scope="session")
def tokenizer(mistral_files):
    return Tokenizer.from_file(str(mistral_files / "tokenizer.json"))


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
