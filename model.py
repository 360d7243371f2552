"""model.py: texts -> vectors. A Mistral (or Llama) decoder that embeds, as in arXiv 2401.00368, section 3.2.

    from model import Embedder
    e = Embedder.load("runs/demo")                   # a run, a Hugging Face folder, or an exported one
    queries = e.encode(["how to brew tea"], prompt="Given a question, retrieve passages that answer it")
    scores = queries @ e.encode(["Steep for three minutes.", "Tea came to Europe in 1610."]).T

In the order in which a text meets it: `Config`, the decoder (`RMSNorm`, `rotate`, `Linear` with LoRA,
`Attention`, `MLP`, `Block`, `Decoder`), checkpoints and adapters on disk, and `Embedder`, which adds tokens
and pooling. Shapes: B rows, T positions, D hidden size, H heads, K key-value heads, d head size, r rank.
"""
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint

from plumbing.errors import UserError, command, leave  # noqa: F401
from plumbing.files import read_json, replace_file

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The values of --pooling, and what sentence-transformers calls them.
POOLINGS = {"last": "lasttoken", "mean": "mean_tokens", "weighted-mean": "weightedmean_tokens"}


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """16-bit values become float32, float64 stays: norms, rotary angles and losses need the digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------------- config

@dataclass(frozen=True)
class Config:
    """What a Hugging Face config.json says of the decoder's shape."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None      # a position sees itself and the window - 1 positions before it
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_id: int

    @classmethod
    def load(cls, path: Path, **overrides) -> "Config":
        """Read config.json. UserError names whatever this decoder does not implement.

        overrides: fields in place of the file's, such as rope_theta or sliding_window.
        """
        raw = read_json(path)
        family = raw.get("model_type")
        rope, scaling = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
        refused = {
            f"model_type {family!r} (only mistral and llama are)": family not in ("mistral", "llama"),
            "biases": raw.get("attention_bias") or raw.get("mlp_bias"),
            "scaled RoPE": any(not isinstance(said, dict) or said.get(key, "default") != "default"
                               for said in (rope, scaling) for key in ("rope_type", "type")),
            "quantised weights": raw.get("quantization_config"),
            f"activation {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
        }
        for what, found in refused.items():
            if found:
                raise UserError(f"{path}: {what}: not supported here")
        eos = raw.get("eos_token_id", 2)
        size, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
        whole = isinstance(size, int) and isinstance(heads, int) and heads      # if not, it is named below
        fields = dict(
            vocab_size=raw.get("vocab_size"),
            hidden_size=size,
            intermediate_size=raw.get("intermediate_size"),
            num_hidden_layers=raw.get("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or (8 if family == "mistral" else heads),
            head_dim=raw.get("head_dim") or (size // heads if whole else 0),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
            sliding_window=raw.get("sliding_window", 4096) if family == "mistral" else None,
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            bos_token_id=raw.get("bos_token_id", 1),
            eos_token_id=eos[0] if isinstance(eos, list) and eos else eos,
        )
        unknown = sorted(overrides.keys() - fields.keys())
        if unknown:
            raise UserError(f"{unknown[0]}: no setting of a model; there are {', '.join(fields)}")
        fields |= overrides
        kinds = cls.__annotations__
        fields = {name: float(value) if kinds[name] is float and isinstance(value, int) else value
                  for name, value in fields.items()}
        c = cls(**fields)
        fits = {name: isinstance(fields[name], kind) for name, kind in kinds.items()}
        if all(fits.values()):
            fits = {name: 0 < fields[name] < math.inf for name in kinds if kinds[name] in (int, float)}
            fits["head_dim"] &= c.head_dim % 2 == 0
            fits["num_key_value_heads"] &= c.num_attention_heads % (c.num_key_value_heads or 1) == 0
            fits["sliding_window"] = c.sliding_window is None or c.sliding_window > 0
            fits["bos_token_id"] = c.bos_token_id is None or 0 <= c.bos_token_id < c.vocab_size
            fits["eos_token_id"] = 0 <= c.eos_token_id < c.vocab_size
        for name in fits:
            if not fits[name]:
                raise UserError(f"{path}: {name} cannot be {getattr(c, name)!r}")
        return c


# --------------------------------------------------------------------------------------------- decoder

class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last axis."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)
        self.eps = eps

    def forward(self, x):
        wide = at_least_float32(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_tables(length: int, head_dim: int, theta: float, dtype: torch.dtype, device) -> tuple:
    """cos and sin of position * theta^(-2i/d): two [T, d], the d/2 frequencies standing twice."""
    exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim
    angles = torch.outer(torch.arange(length, dtype=dtype, device=device), theta ** -exponents)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each pair (i, i + d/2) of x [B, H, T, d] by its position's angle.

    Hugging Face checkpoints pair the two halves of a head; Mistral's own files pair neighbours.
    """
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, -1)
    return (wide * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


def causal_attention(q, k, v, window: int | None):
    """softmax(q k^T / sqrt(d)) v, each position over itself and the window - 1 before it: [B, H, T, d].

    There is no padding mask: padding stands on the right, where causal attention never looks. Texts
    longer than the window go in blocks of W queries against W + W keys under one fixed mask, so memory
    grows with T * W and not with T * T.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)     # [B, K, T, d] -> [B, H, T, d]
    length = q.shape[2]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    query = torch.arange(window, 2 * window, device=q.device)[:, None]        # its place among the 2W keys
    key = torch.arange(2 * window, device=q.device)
    mask = (key <= query) & (key > query - window)                               # [W, 2W]
    blocks = []
    for start in range(0, length, window):
        rows = slice(start, min(start + window, length))
        keys = slice(max(start - window, 0), rows.stop)
        seen = mask[: rows.stop - start, keys.start - start + window: keys.stop - start + window]
        blocks.append(F.scaled_dot_product_attention(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], attn_mask=seen))
    return torch.cat(blocks, 2)


class Linear(nn.Module):
    """y = W x, and with LoRA y = W x + scaling * B A z, where z is x after dropout (arXiv 2106.09685).

    W is frozen in the base's dtype. A [r, in] and B [out, r] are float32, cast for the product, so that
    gradients and the optimizer keep float32. z comes from the caller: projections that read the same x
    share one dropout mask. B starts at zero, so a fresh adapter changes nothing.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.lora_A = self.lora_B = None

    def add_lora(self, rank: int, scaling: float, generator: torch.Generator | None = None):
        out_features, in_features = self.weight.shape
        bound = 1 / math.sqrt(in_features)                # peft's Kaiming-uniform with a = sqrt(5)
        a = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a.to(self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=self.weight.device))
        self.scaling = scaling

    def base(self, x):
        return F.linear(x, self.weight)

    def forward(self, x, z):
        y = self.base(x)
        if self.lora_A is None:
            return y
        low = self.scaling * F.linear(z, self.lora_A.to(x.dtype))    # [B, T, r]: scaled where it is small
        return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), self.lora_B.to(x.dtype).T).view_as(y)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key-value heads."""

    def __init__(self, c: Config):
        super().__init__()
        self.head_dim, self.window = c.head_dim, c.sliding_window
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size)
        self.lora_dropout = nn.Dropout(0.0)

    def forward(self, x, cos, sin):
        B, T, _ = x.shape
        z = self.lora_dropout(x)
        q, k, v = (
            projection(x, z).view(B, T, -1, self.head_dim).transpose(1, 2)       # [B, heads, T, d]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = causal_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, self.window)
        y = y.transpose(1, 2).reshape(B, T, -1)
        return self.o_proj(y, self.lora_dropout(y))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)
        self.lora_dropout = nn.Dropout(0.0)

    def forward(self, x):
        z = self.lora_dropout(x)
        y = F.silu(self.gate_proj(x, z)) * self.up_proj(x, z)
        return self.down_proj(y, self.lora_dropout(y))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token ids [B, T] -> hidden states after the final norm [B, T, D]. Module names are Hugging Face's."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_tokens.weight.requires_grad_(False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lora = None                          # PEFT's description of the adapter, once there is one
        self.activation_checkpointing = False

    def forward(self, ids):
        x = self.embed_tokens(ids)
        wide = torch.promote_types(x.dtype, torch.float32)
        tables = rotary_tables(ids.shape[1], self.config.head_dim, self.config.rope_theta, wide, x.device)
        for block in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *tables, use_reentrant=False)
            else:
                x = block(x, *tables)
        return self.norm(x)

    def add_lora(self, rank=16, alpha=32.0, dropout=0.1, targets=PROJECTIONS, rslora=False, seed=0):
        """Put a fresh adapter on the named projections of every layer (appendix A: r = 16 on all)."""
        generator = torch.Generator().manual_seed(seed)
        for name, module in self.named_modules():
            if isinstance(module, Linear) and name.rsplit(".", 1)[1] in targets:
                module.add_lora(rank, alpha / (math.sqrt(rank) if rslora else rank), generator)
            elif isinstance(module, nn.Dropout):
                module.p = dropout
        self.lora = {
            "peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "r": rank, "lora_alpha": alpha,
            "lora_dropout": dropout, "target_modules": [p for p in PROJECTIONS if p in targets],
            "use_rslora": rslora, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        }

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """{"layers.0.self_attn.q_proj.lora_A": [r, in], ...}, in the order of the layers."""
        return {name: p for name, p in self.named_parameters() if name.endswith(("lora_A", "lora_B"))}


# ------------------------------------------------------------------------------- checkpoints, adapters

def open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        hint = "; pickled .bin weights are refused, convert them" if any(path.parent.glob("*.bin")) else ""
        raise UserError(f"{path}: not a readable safetensors file ({error}){hint}") from None


def load_decoder(folder: Path, device, dtype, **overrides) -> Decoder:
    """Build the decoder of a Hugging Face folder without ever holding a second copy of its weights.

    The module is made on the meta device, without memory; each tensor is read from the mapped file, cast
    and moved, and becomes the parameter itself.
    """
    config = Config.load(folder / "config.json", **overrides)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise UserError(f"{index}: its weight_map does not map tensors to the names of files")
        files = [folder / name for name in sorted(set(places.values()))]
    else:
        files = [folder / "model.safetensors"]
    with torch.device("meta"):
        decoder = Decoder(config)
    shapes = {name: p.shape for name, p in decoder.named_parameters()}
    state, head = {}, None
    for file in files:
        with open_safetensors(file) as tensors:
            keys = list(tensors.keys())
        for key in keys:
            name = key.removeprefix("model.")
            if name == "lm_head.weight":                  # no use for it, except as the tied embedding
                head = file
            elif name in shapes:
                state[name] = read_tensor(file, key, shapes[name], device, dtype)
            elif not name.endswith("rotary_emb.inv_freq"):        # a constant that old checkpoints store
                raise UserError(f"{file}: tensor {key} has no place in {config.num_hidden_layers} layers")
    name = "embed_tokens.weight"
    if config.tie_word_embeddings and head and name not in state:
        state[name] = read_tensor(head, "lm_head.weight", shapes[name], device, dtype)
    missing = sorted(shapes.keys() - state.keys())
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    decoder.load_state_dict(state, assign=True)
    return decoder.requires_grad_(False).eval()


def unquantised(tensors, key: str, file: Path):
    """A tensor of an open file, not read yet; integers and 8-bit floats would need their scales."""
    stored = tensors.get_slice(key)
    if stored.get_dtype() not in ("F16", "BF16", "F32", "F64"):
        raise UserError(f"{file}: tensor {key} is {stored.get_dtype()}: quantised: not supported here")
    return stored


def read_tensor(file: Path, key: str, shape, device, dtype) -> torch.Tensor:
    """One tensor of a mapped file. The map is its own: after a cast, its pages leave memory with it."""
    with open_safetensors(file) as tensors:
        found = tuple(unquantised(tensors, key, file).get_shape())
        if found != tuple(shape):
            raise UserError(f"{file}: tensor {key} has shape {found}, wanted {tuple(shape)}")
        return tensors.get_tensor(key).to(device=device, dtype=dtype)


def load_adapter(decoder: Decoder, folder: Path) -> None:
    """Put PEFT's adapter_config.json + adapter_model.safetensors on the decoder, float32 as trained."""
    path = folder / "adapter_config.json"
    raw = read_json(path)
    start = raw.get("init_lora_weights", True)
    rank, alpha, dropout = raw.get("r"), raw.get("lora_alpha"), raw.get("lora_dropout", 0.0)
    refused = {
        f"peft_type {raw.get('peft_type')!r}": raw.get("peft_type") != "LORA",
        "DoRA": raw.get("use_dora"),
        "bias": raw.get("bias", "none") != "none",
        # PiSSA and its like change the base's own weights at the start
        f"init_lora_weights {start!r}":
            isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"),
        f"r {rank!r}": type(rank) is not int or rank < 1,
        f"lora_alpha {alpha!r}": type(alpha) not in (int, float) or not 0 < alpha < math.inf,
        f"lora_dropout {dropout!r}": type(dropout) not in (int, float) or not 0 <= dropout < 1,
        **{key: raw.get(key) for key in ("lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern",
                                         "fan_in_fan_out", "layers_to_transform", "layer_replication",
                                         "trainable_token_indices", "target_parameters", "use_qalora",
                                         "alora_invocation_tokens", "use_bdlora", "velora_config",
                                         "kasa_config", "monteclora_config", "arrow_config")},
    }
    for what, found in refused.items():
        if found:
            raise UserError(f"{path}: {what}: not supported here")
    file = folder / "adapter_model.safetensors"
    pattern = re.compile(r"(?:base_model\.model\.)?(?:model\.)?(layers\.\d+\.\w+\.(\w+)\.lora_[AB])\.weight")
    loaded, targets = {}, set()
    with open_safetensors(file) as tensors:
        for key in tensors.keys():
            match = pattern.fullmatch(key)
            if not match or match[2] not in PROJECTIONS:
                raise UserError(f"{file}: tensor {key} is no LoRA weight of a projection: not supported")
            loaded[match[1]] = unquantised(tensors, key, file)[:]
            targets.add(match[2])
    decoder.add_lora(rank, alpha, dropout, tuple(targets), bool(raw.get("use_rslora")))
    copy_lora(decoder, loaded, file)


def copy_lora(decoder: Decoder, values: dict[str, torch.Tensor], file: Path) -> None:
    """Fill the adapter from tensors named as in `lora_parameters`; UserError where they do not fit."""
    parameters = decoder.lora_parameters()
    odd = sorted(parameters.keys() ^ values.keys())
    if odd:
        raise UserError(f"{file}: made for another model: {odd[0]} is on one side only")
    for name, parameter in parameters.items():
        if parameter.shape != values[name].shape:
            raise UserError(f"{file}: {name} has shape {tuple(values[name].shape)}, "
                            f"wanted {tuple(parameter.shape)}")
        with torch.no_grad():
            parameter.copy_(values[name])


# -------------------------------------------------------------------------------------------- embedder

def instruct(prompt: str, text: str) -> str:
    """Eq. 1: the query with its task in front. Documents have no prompt and stay as they are."""
    return f"Instruct: {prompt}\nQuery: {text}" if prompt else text


def upload(tensor, device):
    """A CPU tensor on the device; out of pinned memory, so that nobody waits for a GPU's earlier work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def length_chunks(lengths: list[int], tokens_per_chunk: int) -> list[list[int]]:
    """Row numbers in chunks of like length, longest first, rows * longest <= tokens_per_chunk.

    A row of less than half the longest's length starts a chunk of its own: padding costs more than a chunk.

    >>> length_chunks([3, 9, 4, 2], 10)
    [[1], [2, 0], [3]]
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    chunks, start = [], 0
    while start < len(order):
        longest = lengths[order[start]]
        rows = order[start:start + max(1, tokens_per_chunk // longest)]
        chunks.append([row for row in rows if 2 * lengths[row] >= longest])
        start += len(chunks[-1])
    return chunks


def pool(hidden, lengths, pooling: str):
    """Hidden states [B, T, D], real lengths [B] -> [B, D]: the EOS's state, or a mean for the ablation."""
    if pooling == "last":
        return hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]
    hidden = at_least_float32(hidden)
    position = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
    weights = (position <= lengths[:, None]).to(hidden.dtype)                    # [B, T]
    if pooling == "weighted-mean":                # later positions have seen more (SGPT, arXiv 2202.08904)
        weights = weights * position
    return torch.einsum("btd,bt->bd", hidden, weights / weights.sum(1, keepdim=True))


class Embedder:
    """A decoder with its tokenizer: token ids by our own rules, one vector a text.

    The vector is the last layer's state, after the final norm, at the EOS that we append (section 3.2).
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, max_length=512, pooling="last", base=""):
        if pooling not in POOLINGS:
            raise UserError(f"pooling {pooling!r}: choose one of {', '.join(POOLINGS)}")
        if max_length < 3:
            raise UserError(f"max_length {max_length}: BOS, EOS and a token between them need 3")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True    # "</s>" typed in a text is text, and never an EOS
        self.decoder, self.tokenizer, self.base = decoder, tokenizer, base
        self.max_length, self.pooling = max_length, pooling
        self.cut = 0                              # texts so far that were longer than max_length

    @classmethod
    def load(cls, path, adapter=None, device=None, dtype=None, max_length=512, pooling=None,
             **overrides) -> "Embedder":
        """Open a run (base + adapter), a Hugging Face folder (`adapter` on top, if given) or an exported one.

        device: CUDA where there is one. dtype: float32 on a CPU; on a GPU bfloat16, or float16 where it
        lacks that. pooling: as the run or the export says, else "last". overrides: rope_theta=1e5 or
        sliding_window=None, say, in place of the config's (longer texts, section 4.4). Raises UserError.
        """
        folder, adapter = find_model(path, adapter)
        pooling = pooling or stored_pooling(adapter or folder)
        try:
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            torch.empty(0, device=device)             # a device that is not there fails here, not later
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device}: {str(error).splitlines()[0]}") from None
        if dtype is None:
            dtype = torch.float32
            if device.type == "cuda":
                dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
        dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise UserError(f"dtype {dtype}: choose float32, bfloat16, float16 or float64")
        decoder = load_decoder(folder, device, dtype, **overrides)
        if adapter is not None:
            load_adapter(decoder, adapter)
        file = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:                    # what `tokenizers` raises has no class of its own
            raise UserError(f"{file}: not a readable tokenizer ({error})") from None
        # Fewer ids than embeddings are usual, rows being padded; an added <pad> past them comes out of no text.
        largest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
        if largest >= decoder.config.vocab_size:
            raise UserError(f"{file}: another model's: it has the id {largest}, the config's vocab_size is "
                            f"{decoder.config.vocab_size}")
        return cls(decoder, tokenizer, max_length, pooling or "last", str(folder))

    def compile(self, wanted: bool | None = None) -> "Embedder":
        """torch.compile each block, for any length: a minute at the first texts, for speed from then on.

        wanted: None for "where there is a GPU", the scripts' default.
        """
        if self.device.type == "cuda" if wanted is None else wanted:
            # A graph each for gradients or none, training or not, one row or more, every number of windows:
            # past its default of 8, dynamo runs eagerly with no more than a warning.
            torch._dynamo.config.recompile_limit = 64
            for block in self.decoder.layers:
                block.compile(dynamic=True)
        return self

    @property
    def device(self) -> torch.device:
        return self.decoder.norm.weight.device

    def tokenize(self, texts: list[str], prompt: str | list[str] = "") -> list[list[int]]:
        """BOS + text cut to fit max_length + EOS: ids of at most max_length tokens, one list a text.

        We append EOS ourselves, after the cut: most tokenizer files add BOS at best, and a vector read at
        another token is silently bad. `prompt`: the instruction, one for all or one a text, "" for documents.
        """
        if isinstance(texts, str):
            raise TypeError("texts: a list of texts; write [text] for one")      # not one vector a character
        prompts = [prompt] * len(texts) if isinstance(prompt, str) else prompt
        for i, (p, text) in enumerate(zip(prompts, texts, strict=True)):
            try:
                (p + text).encode()                   # fails on lone surrogates: bytes once taken for text
            except (TypeError, UnicodeEncodeError):
                raise UserError(f"text {i}: no UTF-8 text: {text!r:.50}, prompt {p!r:.50}") from None
        texts = [instruct(p, text) for p, text in zip(prompts, texts)]
        bos = [] if self.decoder.config.bos_token_id is None else [self.decoder.config.bos_token_id]
        room = self.max_length - len(bos) - 1
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        self.cut += sum(len(e.ids) > room for e in encoded)
        return [bos + e.ids[:room] + [self.decoder.config.eos_token_id] for e in encoded]

    def embed(self, rows: list[list[int]], normalize=True) -> torch.Tensor:
        """Token ids of one chunk -> [B, D] on the device, at least float32, with a graph where grad is on."""
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)       # padded on the right
        for i, row in enumerate(rows):
            ids[i, :len(row)] = torch.tensor(row)
        hidden = self.decoder(upload(ids, self.device))
        vectors = at_least_float32(pool(hidden, upload(lengths, self.device), self.pooling))
        return F.normalize(vectors, dim=-1) if normalize else vectors

    @torch.inference_mode()
    def encode(self, texts: list[str], prompt: str | list[str] = "", normalize=True, dim: int | None = None,
               tokens_per_chunk: int | None = None) -> torch.Tensor:
        """Texts -> float32 [n, D] on the CPU, unit rows, in input order. dim: keep the first so many values.

        tokens_per_chunk: of a forward pass, padding included; by default what is fast: 4096 on a CPU,
        16384 on a GPU.
        """
        size = self.decoder.config.hidden_size
        if dim is not None and not 1 <= dim <= size:
            raise UserError(f"dim {dim}: a vector has {size} values")
        self.decoder.eval()
        tokens_per_chunk = tokens_per_chunk or (4096 if self.device.type == "cpu" else 16384)
        rows = self.tokenize(texts, prompt)
        vectors = torch.empty(len(rows), dim or size)
        for chunk in length_chunks([len(row) for row in rows], tokens_per_chunk):
            v = self.embed([rows[i] for i in chunk], normalize=False)[:, :dim]
            vectors[chunk] = (F.normalize(v, dim=-1) if normalize else v).float().cpu()
        return vectors

    def save_adapter(self, folder, dtype=torch.float32) -> None:
        """Write PEFT's adapter_config.json and adapter_model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"base_model.model.{name}.weight": p.detach().to("cpu", dtype).contiguous()
                   for name, p in self.decoder.lora_parameters().items()}
        described = {"base_model_name_or_path": self.base, **self.decoder.lora}
        replace_file(folder / "adapter_model.safetensors",
                     lambda path: save_file(tensors, path, {"format": "pt"}))
        replace_file(folder / "adapter_config.json",
                     lambda path: path.write_text(json.dumps(described, indent=2)))


def find_model(path, adapter=None) -> tuple[Path, Path | None]:
    """(base model's folder, adapter's folder) of a run, an adapter, or a base model's own folder."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder (`make base` builds one, `make train` a run)")
    if (folder / "log.jsonl").exists() and not (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: a run without an adapter: it has not come to its first checkpoint")
    if not (folder / "adapter_config.json").exists():
        return folder, adapter and Path(adapter)
    if adapter is not None:
        raise UserError(f"{folder}: has an adapter of its own: a second one ({adapter}) has no place")
    return find_base(folder), folder


def stored_pooling(folder: Path) -> str | None:
    """How a run, an adapter or an export (sentence-transformers' layout) was pooled; None: it does not say."""
    exported, run = folder / "1_Pooling" / "config.json", folder / "config.json"
    if not exported.exists():
        return read_json(run).get("pooling") if run.exists() else None
    described = read_json(exported)
    mode = described.get("pooling_mode")                 # newer files: one name; older ones: a flag for each
    known = [name for name, old in POOLINGS.items()
             if mode == old.removesuffix("_tokens") or described.get(f"pooling_mode_{old}")]
    if len(known) != 1:
        raise UserError(f"{exported}: names no pooling that is here: give pooling={' or '.join(POOLINGS)}")
    return known[0]


def find_base(adapter: Path) -> Path:
    """The base model's folder that an adapter names: as written, or below any folder above the adapter."""
    name = str(read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or "")
    for start in (Path(), *adapter.resolve().parents):
        for folder in (start / name, start / "models" / name.rsplit("/", 1)[-1]):
            if name and (folder / "config.json").exists():
                return folder
    made_here = name.startswith("models/")                            # by `make base`, from wherever
    raise UserError(f"{adapter}: its base model {name!r} is not here: `make base"
                    + ("`, with the BASE or LAYERS of then" if made_here else f" BASE={name}`")
                    + f", or Embedder.load(base, adapter={str(adapter)!r})")
