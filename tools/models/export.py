"""tools/models/export.py: a run -> one folder that sentence-transformers, transformers, vLLM and TEI read.

    python -m tools.models.export runs/demo out/                        # in the dtype of the base's weights
    python -m tools.models.export runs/demo out/ --dtype bfloat16 --prompt "faq=Find the question's answer"
    python -m tools.models.export runs/demo out-gguf/ --gguf            # for llama.cpp's converter

The adapter is merged into the weights, and the rules that model.py keeps in code go into files: BOS and EOS
into tokenizer.json's post-processor (the one place that every reader obeys; `add_eos_token` in
tokenizer_config.json is ignored by some tokenizer classes and overridden by transformers 5), the cut before
EOS, pooling, normalisation and prompts into sentence-transformers' files. Queries carry their prompt:

    SentenceTransformer("out").encode(queries, prompt_name="query")        # documents: no prompt
    vllm serve out/ --runner pooling                  # each query's input must carry the prompt itself
    text-embeddings-router --model-id out/ --dtype float16 --pooling last-token      # Mistral on CUDA only

llama.cpp's converter knows a tokenizer by what it makes of a sample text, and does not know one that adds
BOS and EOS. With --gguf the base's own tokenizer.json goes into the folder, and into tokenizer_config.json
two flags by which llama.cpp adds both itself. The folder's README.md, its model card, has the commands.

What vLLM and TEI need is from their documentation and source; neither is run by this project's tests. Texts
over the limit must be cut before they are sent: vLLM's `truncate_prompt_tokens` keeps a text's end, and BOS
and instruction are lost.
"""
import os
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from model import Embedder, instruct
from plumbing.checkpoint import POOLINGS, find_model, open_safetensors, read_tokenizer, save_tensors
from plumbing.errors import Parser, check, command, positive
from plumbing.files import read_json, write_json, write_text
from tools.bench.padding import TEXTS
from tools.models.card import card

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
QUERY = "query=Given a web search query, retrieve relevant passages that answer the query"


def stored_dtype(base: Path) -> str:
    """The dtype in which the base's matrices lie on disk."""
    file = min(base.glob("model*.safetensors"), default=base / "model.safetensors")
    with open_safetensors(file) as tensors:
        return DTYPES.get(tensors.get_slice(min(tensors.keys())).get_dtype(), "float32")


def merged(decoder):
    """Yield (name, tensor): the weights with LoRA's B A added in float32, in the weights' dtype."""
    for name, weight in decoder.state_dict().items():
        if name.endswith(("lora_A", "lora_B")):
            continue
        module = decoder.get_submodule(name.rpartition(".")[0])
        if getattr(module, "lora_A", None) is not None:
            weight = (weight.float() + module.scaling * module.lora_B @ module.lora_A).to(weight.dtype)
        yield name, weight


def save_weights(decoder, out: Path, shard_bytes: float) -> int:
    """Write model.safetensors, or shards with their index as the hub has them; returns the total size.

    Only one shard is held in memory.
    """
    shards, shard, index, total = [], {}, {}, 0

    def close():
        shards.append(out / f"shard-{len(shards)}")
        save_tensors(shard, shards[-1])
        shard.clear()

    with torch.no_grad():
        for name, weight in merged(decoder):
            if shard and sum(w.nbytes for w in shard.values()) + weight.nbytes > shard_bytes:
                close()
            shard[name], index[name] = weight.contiguous(), len(shards)
            total += weight.nbytes
        close()
    if len(shards) == 1:
        shards[0].rename(out / "model.safetensors")
        return total
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for shard_file, name in zip(shards, names):
        shard_file.rename(out / name)
    write_json(out / "model.safetensors.index.json", {
        "metadata": {"total_size": total}, "weight_map": {name: names[i] for name, i in index.items()}})
    return total


def save_tokenizer(base: Path, out: Path, bos: int | None, eos: int, max_length: int, gguf: bool) -> None:
    """tokenizer.json that adds BOS and EOS itself, after its own cut, and what the wrappers need to know.

    gguf: the base's tokenizer.json, and flags by which llama.cpp adds them.
    """
    tokenizer = read_tokenizer(base / "tokenizer.json")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ends = {i: tokenizer.id_to_token(i) for i in (bos, eos) if i is not None}
    for i, token in ends.items():
        check(token is not None, f"{base / 'tokenizer.json'}: has no token {i}, the config's BOS or EOS")
    begin = [] if bos is None else [ends[bos]]
    if not gguf:
        tokenizer.post_processor = TemplateProcessing(
            single=[*begin, "$A", ends[eos]], pair=[*begin, "$A", ends[eos], *begin, "$B", ends[eos]],
            special_tokens=[(token, i) for i, token in ends.items()])
    write_text(out / "tokenizer.json", tokenizer.to_str(pretty=True))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": ends[eos], "pad_token": ends[eos],
        "padding_side": "right", "truncation_side": "right", "model_max_length": max_length,
        "split_special_tokens": True,            # "</s>" typed in a text is text, as in model.py
        "clean_up_tokenization_spaces": False,
    }
    if gguf:
        copy_sentencepiece(base, out, tokenizer)
        settings |= {"add_bos_token": bos is not None, "add_eos_token": True}
    write_json(out / "tokenizer_config.json", settings | ({} if bos is None else {"bos_token": ends[bos]}))


def copy_sentencepiece(base: Path, out: Path, tokenizer) -> None:
    """tokenizer.model, where the tokenizer once was SentencePiece's: llama.cpp needs its scores. Without
    them it splits some texts otherwise and does not say so."""
    file = base / "tokenizer.model"
    if getattr(tokenizer.model, "byte_fallback", False):
        check(file.exists(), f"--gguf: {file} is missing, and llama.cpp cuts texts into tokens by it: put "
                             "the base's own there")
        shutil.copyfile(file, out / file.name)


def save_sentence_transformers(out: Path, embedder: Embedder, prompts: dict[str, str]) -> None:
    """The three modules under the names that old and new readers know, and the prompts."""
    write_json(out / "modules.json", [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling"),
                                          ("2_Normalize", "Normalize")])])
    write_json(out / "sentence_bert_config.json", {"max_seq_length": embedder.max_length,
                                                   "do_lower_case": False})
    save_pooling(out, embedder)
    (out / "2_Normalize").mkdir()
    write_json(out / "config_sentence_transformers.json", {
        "prompts": {**prompts, "document": ""}, "default_prompt_name": None, "similarity_fn_name": "cosine"})


def save_pooling(out: Path, embedder: Embedder) -> None:
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens",
             "lasttoken")
    write_json(out / "1_Pooling" / "config.json", {
        "word_embedding_dimension": embedder.decoder.config.hidden_size,
        **{f"pooling_mode_{mode}": mode == POOLINGS[embedder.pooling] for mode in modes},
        "include_prompt": True})


def save_model(embedder: Embedder, base: Path, out: Path, dtype: str, prompts, shard_bytes: float,
               gguf=False) -> int:
    """Write the merged model with all that its readers need; returns the weights' size."""
    config, c = read_json(base / "config.json"), embedder.decoder.config
    for name in ("dtype", "rope_scaling"):
        config.pop(name, None)
    # RoPE's base under both names: transformers 4 reads the first alone, and would take 10,000 without it.
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    config |= {"rope_theta": c.rope_theta, "rope_parameters": rope}
    kind = "ForCausalLM" if gguf else "Model"                    # the converter has a list of the former
    config |= {"architectures": [f"{config['model_type'].capitalize()}{kind}"], "torch_dtype": dtype}
    write_json(out / "config.json", config)
    save_tokenizer(base, out, c.bos_token_id, c.eos_token_id, embedder.max_length, gguf)
    if not gguf:
        save_sentence_transformers(out, embedder, prompts)
    return save_weights(embedder.decoder, out, shard_bytes)


def named_prompts(texts: list[str]) -> dict[str, str]:
    """NAME=INSTRUCTION, several times -> {name: what stands before a query}."""
    prompts = {}
    for text in texts:
        name, _, instruction = text.partition("=")
        check(name and instruction, f"--prompt {text!r}: write NAME=INSTRUCTION")
        check(name != "document", f"--prompt {text!r}: documents go without a prompt: choose another name")
        prompts[name] = instruct(instruction, "")
    return prompts


def export(args) -> None:
    prompts = named_prompts([QUERY, *args.prompt])
    check(not (args.gguf and args.adapter), "--gguf and --adapter: the converter wants a whole model")
    check(not args.out.exists(), f"{args.out}: already there: remove it, or choose another name")
    base, _ = find_model(args.model)
    dtype = "float32" if args.adapter else args.dtype or stored_dtype(base)
    embedder = Embedder.load(args.model, device="cpu", dtype=dtype, max_length=args.max_length)
    check(embedder.decoder.lora or not args.adapter, f"{args.model}: has no adapter")
    check(not args.gguf or embedder.pooling != "weighted-mean",
          f"{args.model}: llama.cpp has no weighted-mean pooling: export it without --gguf")

    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{args.out.name}.", dir=args.out.parent) as beside:
        whole = Path(beside) / "whole"                            # takes its name only when it is that
        whole.mkdir()
        if args.adapter:
            embedder.save_adapter(whole, getattr(torch, args.dtype or "bfloat16"))
            save_pooling(whole, embedder)
        else:
            total = save_model(embedder, base, whole, dtype, prompts, args.shard_gb * 1e9, args.gguf)
            write_text(whole / "README.md",
                       card(args.out.name, args.model, base, embedder, dtype, prompts, args.gguf))
            if args.compare:
                again = Embedder.load(whole, device="cpu", dtype=dtype, max_length=embedder.max_length,
                                      pooling=embedder.pooling)
                worst = (again.encode(TEXTS) * embedder.encode(TEXTS)).sum(1).min()
                print(f"merged against unmerged in {dtype}: worst cosine of {len(TEXTS)} texts {worst:.5f}")
        os.rename(whole, args.out)
    if args.adapter:
        return print(f"{args.out}: the adapter in {args.dtype or 'bfloat16'}, for {embedder.base}")
    print(f"{args.out}: {total / 1e9:.2f} GB in {dtype}, texts of at most {embedder.max_length} tokens, "
          f"{embedder.pooling} pooling, prompts {', '.join(prompts)}")


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a run, or a Hugging Face folder without an adapter")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--adapter", action="store_true",
                        help="write PEFT's two files alone, in bfloat16 or --dtype")
    parser.add_argument("--gguf", action="store_true",
                        help="for llama.cpp's converter: the base's tokenizer as it is, EOS by a flag")
    parser.add_argument("--dtype", choices=sorted(DTYPES.values()), help="default: as the base is stored")
    parser.add_argument("--max-length", type=positive(int),
                        help="tokens a text, BOS and EOS included (default: as an export says, else 512)")
    parser.add_argument("--compare", action="store_true",
                        help="embed some texts with the adapter merged and not, and tell the worst cosine")
    parser.add_argument("--prompt", action="append", default=[], metavar="NAME=INSTRUCTION",
                        help=f"a named prompt for queries; repeatable (always there: {QUERY})")
    parser.add_argument("--shard-gb", type=positive(float), default=5, help="size of a weights file at most")
    export(parser.parse_args(argv))


if __name__ == "__main__":
    command(main)
