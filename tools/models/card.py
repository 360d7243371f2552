"""tools/models/card.py: the README.md of an exported folder, which the hub shows as its model card.

It says what a reader of the folder alone can't know: the base and its licence, which texts carry a prompt,
and the arguments by which other libraries set it, since they embed queries bare unless told.
"""
import re
from pathlib import Path

from plumbing.files import OPTIONAL, read_json

# Bases that README names, by their folder's name: (name on the hub, licence).
KNOWN = {
    r"smollm2-135m(-l\d+)?": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    r"mistral-7b-v0\.1": ("mistralai/Mistral-7B-v0.1", "apache-2.0"),
}

FRONT = """\
---
library_name: {library}
pipeline_tag: feature-extraction
tags: [{library}, feature-extraction]
{more}---
# {name}

A text embedder: a decoder language model, fine-tuned with a contrastive loss. Texts in, unit vectors out.

| | |
| --- | --- |
| base | {base} |
| licence of the base | {licence} |
| trained on | {data} |
| values of a vector | {size} |
| tokens of a text, at most | {max_length}, BOS and EOS included |
| vector | {pooling}, then normalised |
| numbers | {dtype} |

A query carries its instruction in front, a document nothing:

{prompts}
"""

POOLING = {"last": "the last token's, EOS, which ends every text", "mean": "the mean over all tokens",
           "weighted-mean": "the mean over all tokens, each weighted by its place"}

LIBRARIES = """
## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
queries = model.encode(["how to brew tea"], prompt_name="query")
documents = model.encode(["Steep the leaves."])
scores = model.similarity(queries, documents)
```

Fewer values: `SentenceTransformer("{name}", truncate_dim=128)`, and `normalize_embeddings=True` in each
`encode`: a cut vector is no unit vector any more.

Other libraries embed queries bare unless told:

```python
# LangChain
HuggingFaceEmbeddings(model_name="{name}", query_encode_kwargs={{"prompt_name": "query"}})
# LlamaIndex
HuggingFaceEmbedding(
    model_name="{name}",
    query_instruction={query!r})
# mteb: the prompt `query` is set before queries; others only where they bear the name of a task or its type
mteb.evaluate(SentenceTransformer("{name}"), mteb.get_tasks(tasks=["SciFact"]))
```

ONNX, by optimum: the graph takes `position_ids` beside `input_ids` and `attention_mask`: 0, 1, 2, ... in
each row. llama.cpp wants another folder: `python -m tools.models.export ... --gguf`.
"""

GGUF = """
## Use

This folder is for llama.cpp's converter alone: its tokenizer.json is the base's, as the converter knows
it, and adds no EOS. With sentence-transformers and transformers it would give other vectors.

```
python convert_hf_to_gguf.py {name} --outfile {name}.gguf --outtype f16
{set_bos}llama-server -m {name}.gguf --embedding --pooling {pooling} -ub {max_length} -b {max_length}
```

Each query's text must carry its prompt. BOS and EOS are added by llama.cpp; texts must be cut to
{max_length} tokens before they are sent. A special token's name typed in a text is read as that token.
"""

# The converter takes every vocabulary of this size for that of a model without BOS.
NO_BOS_SIZE = 49152
SET_BOS = """\
gguf-set-metadata {name}.gguf tokenizer.ggml.add_bos_token true --force      # of the package gguf
"""


def known(base: Path) -> tuple[str | None, str | None]:
    """(name on the hub, licence) of a base's folder, as its own README.md or its name tells."""
    hub_name = licence = None
    for pattern, about in KNOWN.items():
        if re.fullmatch(pattern, base.name.lower()):
            hub_name, licence = about
    if base.parent.parent.name == "models":                # models/OWNER/NAME, as `make base` has it
        hub_name = f"{base.parent.name}/{base.name}"
    card = base / "README.md"
    if card.exists():
        text = card.read_text(encoding="utf-8", errors="replace")
        front = text.partition("---\n")[2].partition("\n---")[0]
        told = re.search(r"^license: *(\S+) *$", front, re.MULTILINE)
        licence = told[1] if told else licence
    return hub_name, licence


def described(base: Path) -> str:
    """The base in words: its name, and how many of its layers where only the first are here."""
    hub_name, _ = known(base)
    cut = re.fullmatch(r"smollm2-135m-l(\d+)", base.name)
    return f"{hub_name or base.name}{f', its first {cut[1]} layers' if cut else ''}"


def training_data(run: Path) -> str:
    """The names of the files that a run was trained on, as its config.json has them."""
    config = run / "config.json"
    files = read_json(config, {"data": ([str], OPTIONAL)}).get("data") if config.exists() else None
    return ", ".join(f"`{Path(file).name}`" for file in files or []) or "not told in its folder"


def card(name: str, run: Path, base: Path, embedder, dtype: str, prompts: dict, gguf=False) -> str:
    """README.md's text. prompts: {name: what stands before a query}."""
    hub_name, licence = known(base)
    more = f"base_model: {hub_name}\n" if hub_name else ""
    more += f"license: {licence}\n" if licence else ""
    files = sorted(path.name for path in base.glob("LICEN[CS]E*"))
    listed = "\n".join(f"- `{key}`: {text!r}" for key, text in prompts.items())
    config = embedder.decoder.config
    values = {
        "name": name, "more": more, "base": described(base), "data": training_data(run),
        "library": "llama.cpp" if gguf else "sentence-transformers",
        "licence": licence or " and ".join(files) or "not told by its files: look where it came from",
        "size": config.hidden_size, "max_length": embedder.max_length, "dtype": dtype, "prompts": listed,
    }
    text = FRONT.format(pooling=POOLING[embedder.pooling], **values)
    if not gguf:
        return text + LIBRARIES.format(name=name, query=prompts["query"])
    set_bos = SET_BOS.format(name=name) if config.vocab_size == NO_BOS_SIZE else ""
    return text + GGUF.format(name=name, pooling=embedder.pooling, max_length=embedder.max_length,
                              set_bos=set_bos)
