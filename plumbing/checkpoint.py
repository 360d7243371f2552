"""plumbing/checkpoint.py: model folders on disk.

Hugging Face's config.json, safetensors and tokenizer.json, PEFT's two adapter files, and which folder is
meant by a path.

Nothing here knows the decoder's code: `load_weights` fills any module whose parameters bear the file's
names. What this project does not compute is refused by name (plumbing/supported.py), never loaded wrongly.
"""
import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from plumbing.errors import UserError, check
from plumbing.files import BOM, OPTIONAL, fits, read_json, read_list, replace_file, write_text
from plumbing.supported import ADAPTER, POOLING, TRANSFORMER, check_config, check_known, check_modules

# The values of --pooling, and what sentence-transformers calls them.
POOLINGS = {"last": "lasttoken", "mean": "mean_tokens", "weighted-mean": "weightedmean_tokens"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

GIVE_POOLING = f"give pooling={' or '.join(POOLINGS)}"
# Values of a config, far above any model's: larger ones overflow torch's sizes, or take minutes to build.
LARGEST = {"num_hidden_layers": 10**4, int: 10**6, float: 1e30}


# ------------------------------------------------------------------------------------------------- config

def read_config(path: Path, kinds: dict, **overrides) -> dict:
    """The fields of a config.json that `kinds` {name: type} names; transformers' defaults for others.

    overrides: values in place of the file's. UserError names what is unsupported, missing or out of range.
    """
    raw = read_json(path)
    check_config(path, raw)
    for name in overrides:
        check(name in kinds, f"{name}: no setting of a model; there are {', '.join(kinds)}")

    mistral = raw["model_type"] == "mistral"
    defaults = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096,
                "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
    config = {name: raw.get(name, defaults.get(name)) for name in kinds}
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}            # in transformers' order
    config["rope_theta"] = rope.get("rope_theta", config["rope_theta"])
    if not mistral:
        config["sliding_window"] = None
    if not config["num_key_value_heads"]:
        config["num_key_value_heads"] = 8 if mistral else config["num_attention_heads"]
    if not config["head_dim"]:
        config["head_dim"] = default_head_dim(config)
    if isinstance(config["eos_token_id"], list) and config["eos_token_id"]:
        config["eos_token_id"] = config["eos_token_id"][0]

    config |= overrides
    check_ranges(path, config, kinds)
    return config


def default_head_dim(config: dict) -> int | None:
    size, heads = config["hidden_size"], config["num_attention_heads"]
    return size // heads if fits([size, heads], [int]) and heads > 0 else None


def check_ranges(path: Path, config: dict, kinds: dict) -> None:
    """Each value is of its type and in its range; whole numbers that are floats in `kinds` become floats."""
    for name, kind in kinds.items():
        value = config[name]
        options = getattr(kind, "__args__", (kind,))              # of int | None
        good = fits(value, options)
        if good and kind in (int, float) and not name.endswith("token_id"):
            good = 0 < value <= LARGEST.get(name, LARGEST[kind])
        check(good, f"{path}: {name} cannot be {value!r:.60}")
        if kind is float:
            config[name] = float(value)
    rules = {
        "head_dim": config["head_dim"] % 2 == 0,
        "num_key_value_heads": config["num_attention_heads"] % config["num_key_value_heads"] == 0,
        "sliding_window": config["sliding_window"] is None or config["sliding_window"] > 0,
        "bos_token_id": config["bos_token_id"] is None or 0 <= config["bos_token_id"] < config["vocab_size"],
        "eos_token_id": 0 <= config["eos_token_id"] < config["vocab_size"],
    }
    for name, good in rules.items():
        check(good, f"{path}: {name} cannot be {config[name]!r:.60}")


# ------------------------------------------------------------------------------------------------ weights

def open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        hint = "; pickled .bin weights are refused, convert them" if any(path.parent.glob("*.bin")) else ""
        raise UserError(f"{path}: not a readable safetensors file ({error}){hint}") from None


def weight_files(folder: Path) -> list[Path]:
    """The files of the weights: the single file first, as transformers does; an index may be old."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return [single]
    weight_map = read_json(index).get("weight_map")
    check(isinstance(weight_map, dict) and fits(list(weight_map.values()), [str]),
          f"{index}: its weight_map does not map tensors to the names of files")
    return [folder / name for name in sorted(set(weight_map.values()))]


def base_fingerprint(folder: Path) -> str:
    """A hash by which a resume knows its base again: of config and tokenizer, and of each file of weights
    its size and 64 pieces, since 14 GB would take a while. Training changes all of a matrix."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ("config.json", "tokenizer.json"):
        digest.update((folder / name).read_bytes())
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as weights:
            for number in range(64):
                weights.seek(size * number // 64)
                digest.update(weights.read(4096))
    return digest.hexdigest()


def load_weights(module, folder: Path, device, dtype) -> None:
    """Fill a module that stands on the meta device, tensor by tensor: there are never two copies in memory.

    The names are Hugging Face's, with or without `model.` in front. A tensor without a parameter, a
    parameter without a tensor and one with two are UserErrors.
    """
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    state, lm_head = {}, None
    try:
        for file in weight_files(folder):
            with open_safetensors(file) as tensors:
                keys = list(tensors.keys())
            for key in keys:
                name = key.removeprefix("model.")
                if name == "lm_head.weight":
                    lm_head = file                      # of use only as a tied embedding
                elif name in shapes:
                    check(name not in state, f"{file}: tensor {key}: a second {name}: keep one of them")
                    state[name] = read_tensor(file, key, shapes[name], device, dtype)
                else:                                   # old checkpoints store the constants of RoPE
                    check(name.endswith("rotary_emb.inv_freq"),
                          f"{file}: tensor {key} has no place in {module.config.num_hidden_layers} layers")
        embedding = "embed_tokens.weight"
        if embedding not in state and lm_head and module.config.tie_word_embeddings:
            state[embedding] = read_tensor(lm_head, "lm_head.weight", shapes[embedding], device, dtype)
    except torch.OutOfMemoryError:
        raise UserError(f"{folder}: the GPU's memory is too small for its weights alone (--dtype bfloat16 "
                        "halves what float32 takes)") from None
    missing = sorted(shapes.keys() - state.keys())
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    module.load_state_dict(state, assign=True)


def read_tensor(file: Path, key: str, shape, device, dtype) -> torch.Tensor:
    """One tensor, through a map of its own: after a cast, the file's pages leave memory with that map."""
    with open_safetensors(file) as tensors:
        stored = tensors.get_slice(key)
        check_stored(stored, key, file)
        check(tuple(stored.get_shape()) == tuple(shape),
              f"{file}: tensor {key} has shape {tuple(stored.get_shape())}, wanted {tuple(shape)}")
        return tensors.get_tensor(key).to(device=device, dtype=dtype)


def check_stored(stored, key: str, file: Path) -> None:
    """Refuse integers and 8-bit floats, which would need their scales."""
    check(stored.get_dtype() in ("F16", "BF16", "F32", "F64"),
          f"{file}: tensor {key} is {stored.get_dtype()}: quantised: not supported here")


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The folder's tokenizer.json; UserError where it gives ids that the embeddings lack."""
    file = folder / "tokenizer.json"
    tokenizer = read_tokenizer(file)
    # A special token, such as an added <pad>, may lie past the embeddings: no text ever gives its id.
    ids = list(tokenizer.get_vocab(with_added_tokens=False).values())
    ids += [number for number, token in tokenizer.get_added_tokens_decoder().items() if not token.special]
    largest = max(ids, default=0)
    check(largest < vocab_size,
          f"{file}: another model's: it has the id {largest}, the config's vocab_size is {vocab_size}")
    return tokenizer


def read_tokenizer(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(file.read_bytes().removeprefix(BOM).decode())
    except Exception as error:                          # what `tokenizers` raises has no class of its own
        raise UserError(f"{file}: not a readable tokenizer ({error})") from None


# ----------------------------------------------------------------------------------------------- adapters

def read_adapter(folder: Path, projections) -> tuple[dict, dict[str, torch.Tensor]]:
    """PEFT's two files -> (arguments of Decoder.add_lora, {"layers.0.self_attn.q_proj.lora_A": tensor})."""
    path = folder / "adapter_config.json"
    raw = read_json(path)
    check_known(path, {"peft_type": None} | raw, ADAPTER)
    rank, alpha, dropout = raw.get("r"), raw.get("lora_alpha"), raw.get("lora_dropout", 0.0)
    check(fits(rank, int) and rank > 0, f"{path}: r {rank!r:.60}: a whole number above 0 is wanted")
    check(fits(alpha, float) and 0 < alpha <= 1e30,
          f"{path}: lora_alpha {alpha!r:.60}: a number above 0 is wanted")
    check(fits(dropout, float) and 0 <= dropout < 1,
          f"{path}: lora_dropout {dropout!r}: at least 0 and below 1")

    target_modules = raw.get("target_modules")
    check_targets(path, target_modules)

    file = folder / "adapter_model.safetensors"
    pattern = re.compile(r"(?:base_model\.model\.)?(?:model\.)?(layers\.\d+\.\w+\.(\w+)\.lora_[AB])\.weight")
    tensors, targets = {}, set()
    with open_safetensors(file) as stored:
        for key in stored.keys():
            match = pattern.fullmatch(key)
            check(match and match[2] in projections,
                  f"{file}: tensor {key} is no LoRA weight of a projection: not supported")
            check(match[1] not in tensors, f"{file}: tensor {key}: a second {match[1]}: keep one of them")
            check_stored(stored.get_slice(key), key, file)
            shape = stored.get_slice(key).get_shape()   # lora_A [r, in], lora_B [out, r]
            check(len(shape) == 2 and shape[match[1].endswith("lora_B")] == rank,
                  f"{file}: tensor {key} has shape {tuple(shape)}, but r is {rank} in {path.name}")
            tensors[match[1]] = stored.get_tensor(key)
            targets.add(match[2])
    check(tensors, f"{file}: holds no tensor: save the adapter again (it would change no vector)")
    for name in projections:
        check(name in targets or not is_target(name, target_modules),
              f"{file}: no tensor of {name}, which target_modules in {path.name} names: save the adapter "
              "again")
    settings = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": tuple(targets),
                "rslora": bool(raw.get("use_rslora"))}
    return settings, tensors


def check_targets(path: Path, target_modules) -> None:
    """Refuse target_modules that are neither a regular expression nor a list of names."""
    way_out = "a list of names or a regular expression is wanted"
    check(fits(target_modules, (str, [str], OPTIONAL)),
          f"{path}: target_modules {target_modules!r:.60}: {way_out}")
    try:
        re.compile(target_modules if isinstance(target_modules, str) else "")
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: target_modules {target_modules!r:.60}: {way_out} ({error})") from None


def is_target(projection: str, target_modules) -> bool:
    """Whether PEFT's target_modules name a projection, in a list or by a regular expression."""
    if isinstance(target_modules, str):
        part = "self_attn" if projection in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        full_name = f"model.layers.0.{part}.{projection}"
        return target_modules == "all-linear" or bool(re.fullmatch(target_modules, full_name))
    return any(name.rsplit(".", 1)[-1] == projection for name in target_modules or ())


def fill_lora(parameters: dict, tensors: dict, file: Path) -> None:
    """Copy tensors into parameters of the same names; UserError where names or shapes differ."""
    one_sided = sorted(parameters.keys() ^ tensors.keys())
    if one_sided:
        raise UserError(f"{file}: made for another model: {one_sided[0]} is on one side only")
    for name, parameter in parameters.items():
        check(parameter.shape == tensors[name].shape,
              f"{file}: {name} has shape {tuple(tensors[name].shape)}, wanted {tuple(parameter.shape)}")
        with torch.no_grad():
            parameter.copy_(tensors[name])


def save_tensors(tensors: dict, path: Path, **metadata: str) -> None:
    """A safetensors file with the mode of any other new file. save_file alone would make it the owner's
    only, and a server that runs as another user could not read a model."""
    path.touch()
    mode = path.stat().st_mode                                                # what the umask leaves of 0666
    save_file(tensors, path, {"format": "pt", **metadata})
    path.chmod(mode)


def save_adapter(folder: Path, parameters: dict, described: dict, pooling: str, dtype=torch.float32) -> None:
    """Write PEFT's two files. described: the content of adapter_config.json.

    PEFT knows nothing of pooling, so it stands in the header of the tensors' file, where it stays with them.
    """
    tensors = {f"base_model.model.{name}.weight": parameter.detach().to("cpu", dtype).contiguous()
               for name, parameter in parameters.items()}
    replace_file(folder / "adapter_model.safetensors",
                 lambda path: save_tensors(tensors, path, pooling=pooling))
    write_text(folder / "adapter_config.json", json.dumps(described, indent=2))


# ---------------------------------------------------------------------------------------- finding a model

def vector_size(folder: Path) -> int | None:
    """Values of a vector of the model in a Hugging Face folder, before its weights are read; None: not
    said."""
    path = Path(folder) / "config.json"
    return read_json(path, {"hidden_size": (int, OPTIONAL)}).get("hidden_size") if path.exists() else None


def find_model(path, adapter=None) -> tuple[Path, Path | None]:
    """(base's folder, adapter's folder or None) of a run, an adapter, or a base model's own folder."""
    folder = Path(path)
    check(folder.is_dir(), f"{folder}: no such model folder (`make base` builds one, `make train` a run)")
    has_adapter = (folder / "adapter_config.json").exists()
    if has_adapter:
        check(adapter is None,
              f"{folder}: has an adapter of its own, so that a second one ({adapter}) cannot be added")
        return find_base(folder), folder
    check(not (folder / "log.jsonl").exists(),
          f"{folder}: a run without an adapter: it has not come to its first checkpoint")
    return folder, Path(adapter) if adapter else None


def find_base(adapter: Path) -> Path:
    """The folder of the base model that an adapter names: as written, or below any folder above the adapter.

    OWNER/NAME of the hub is looked for in models/OWNER/NAME, not in models/NAME: another owner's model of
    the same name is another model.
    """
    name = str(read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or "")
    if name:
        for start in (Path(), *adapter.resolve().parents):
            for folder in (start / name, start / "models" / name):
                if (folder / "config.json").exists():
                    return folder
    made_here = name.startswith("models/")              # by `make base`, from wherever
    way_out = "`make base` with its BASE and LAYERS" if made_here else f"`make base BASE={name}`"
    raise UserError(f"{adapter}: its base model {name!r} is not here: {way_out}, or Embedder.load(base, "
                    f"adapter={str(adapter)!r})")


def stored_pooling(folder: Path) -> str | None:
    """How a run, an adapter or an exported folder was pooled; None where it does not say."""
    exported, run = folder / "1_Pooling" / "config.json", folder / "config.json"
    modules = folder / "modules.json"
    if modules.exists():
        exported = pooling_module(modules) / "config.json"
        check(exported.exists(), f"{exported}: named by {modules}, but not there: {GIVE_POOLING}")
    if not exported.exists():
        pooling = read_json(run, {"pooling": (str, OPTIONAL)}).get("pooling") if run.exists() else None
        return pooling or adapter_pooling(folder / "adapter_model.safetensors")
    described = read_json(exported)
    check_known(exported, described, POOLING)
    mode = described.get("pooling_mode")         # newer files name one mode, older ones have a flag for each
    known = []
    for name, flag in POOLINGS.items():
        if mode == flag.removesuffix("_tokens") or described.get(f"pooling_mode_{flag}"):
            known.append(name)
    check(len(known) == 1, f"{exported}: names no pooling that is here: {GIVE_POOLING}")
    check(known == ["last"] or described.get("include_prompt") in (None, True),
          f"{exported}: include_prompt false: a mean without the instruction's tokens is not supported here")
    return known[0]


def pooling_module(modules: Path) -> Path:
    """The folder of the one Pooling that a modules.json names."""
    steps = read_list(modules)
    check_modules(modules, steps)
    paths = [step.get("path") for step in steps if step["type"].rsplit(".", 1)[-1] == "Pooling"]
    check(len(paths) == 1 and fits(paths, [str]),
          f"{modules}: names no pooling that is here, or several: {GIVE_POOLING}")
    return modules.parent / paths[0]


def adapter_pooling(file: Path) -> str | None:
    """What save_adapter noted in the file's header; None where there is no file, or PEFT wrote it."""
    if not file.exists():
        return None
    with open_safetensors(file) as stored:
        return (stored.metadata() or {}).get("pooling")


def stored_max_length(folder: Path) -> int | None:
    """The most tokens a text of an exported folder; None where it does not say. Newer sentence-transformers
    leave it to the tokenizer's settings."""
    path, tokenizer = folder / "sentence_bert_config.json", folder / "tokenizer_config.json"
    if not path.exists():
        return None
    described = read_json(path, {"max_seq_length": (int, OPTIONAL)})
    check_known(path, described, TRANSFORMER)
    length = described.get("max_seq_length")
    if length is None and tokenizer.exists():
        length = read_json(tokenizer).get("model_max_length")
    known = fits(length, int) and length < 10**6         # transformers writes 10^30 where there is none
    return length if known else None


def pick_device(name=None) -> torch.device:
    """The named device, or CUDA where there is one; UserError where it is not there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()            # a device that is not there fails here, not later
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"device {name}: {reason}") from None
    if device.type == "cuda":
        # From torch 2.11 on, attention prefers cuDNN on Hopper and newer, and cuDNN builds a plan for each
        # shape that it has not seen: half a second or more, for each of the hundreds of (texts, length) that
        # chunks bring.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def pick_dtype(name, device) -> torch.dtype:
    """The named dtype, or the best: float32 on a CPU; on a GPU bfloat16, or float16 if it lacks that."""
    if name is None:
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    dtype = getattr(torch, name, name) if isinstance(name, str) else name
    check(dtype in DTYPES, f"dtype {dtype}: choose float32, bfloat16, float16 or float64")
    return dtype
