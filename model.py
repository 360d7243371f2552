"""model.py: texts -> vectors. Mistral-7B as an embedder, by hand (arXiv 2401.00368, section 3.2).

    from model import Embedder
    e = Embedder.load("runs/demo")                   # a run, a Hugging Face folder, or an exported one
    queries = e.encode(["how to brew tea"], prompt="Given a question, retrieve passages that answer it")
    documents = e.encode(["Steep for three minutes.", "Tea came to Europe in 1610."])         # no prompt
    scores = queries @ documents.T

In: texts, and for queries an instruction. Out: one unit vector a text. First comes the whole idea in five
lines. Then the decoder, from its norm to the stack of blocks; LoRA is in `Linear`. Last `Embedder`: it turns
texts into token ids, and hidden states into vectors.

Left to plumbing/: checkpoint.py reads and writes model folders, supported.py refuses models that this
decoder would compute wrongly. They are long, and say nothing about the method.

Letters for shapes: B texts, T positions, D hidden size, H query heads, K key-value heads, d head size, r
LoRA rank, W window.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from plumbing.checkpoint import (POOLINGS, fill_lora, find_model, load_tokenizer, load_weights, pick_device,
                                 pick_dtype, read_adapter, read_config, save_adapter, stored_max_length,
                                 stored_pooling)
from plumbing.errors import check, check_finite, check_room, texts_and_prompts
from plumbing.progress import progress as show_progress

SLICE = 16384                         # texts that `encode` tokenises at a time
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ------------------------------------------------------------------------------------------------ the idea

def instruct(prompt: str, text: str) -> str:
    """Eq. 1: a query carries its task in front. A document has no prompt and stays as it is."""
    return f"Instruct: {prompt}\nQuery: {text}" if prompt else text


def embed_one(decoder, tokenizer, text: str, prompt: str = "") -> torch.Tensor:
    """The whole idea (section 3.2), for one text -> [D].

    `Embedder` adds batches, a limit to the length, GPUs.
    """
    ids = tokenizer.encode(instruct(prompt, text), add_special_tokens=False).ids
    ids = [decoder.config.bos_token_id, *ids, decoder.config.eos_token_id]
    hidden = decoder(torch.tensor([ids]))            # [1, T, D]
    last = hidden[0, -1]                             # at EOS: a causal decoder has read the whole text there
    return F.normalize(last, dim=-1)


# ------------------------------------------------------------------------------------------------- decoder

@dataclass(frozen=True)
class Config:
    """The decoder's shape, under the names of Hugging Face's config.json. In comments: Mistral-7B."""
    vocab_size: int                 # 32000
    hidden_size: int                # 4096, D
    intermediate_size: int          # 14336
    num_hidden_layers: int          # 32
    num_attention_heads: int        # 32, H
    num_key_value_heads: int        # 8, K
    head_dim: int                   # 128, d
    rms_norm_eps: float             # 1e-5
    rope_theta: float               # 10000
    sliding_window: int | None      # 4096, W: a position sees itself and the 4095 before it
    tie_word_embeddings: bool       # False; true: a file may hold the embedding under the output head's name
    bos_token_id: int | None        # 1
    eos_token_id: int               # 2


def at_least_float32(x):
    """16 bits become float32, float64 stays: norms, rotary angles and the loss need the digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last axis."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        x32 = at_least_float32(x)
        mean_square = x32.square().mean(-1, keepdim=True)
        x32 = x32 * torch.rsqrt(mean_square + self.eps)
        return self.weight * x32.to(x.dtype)             # rounded before the weight, as transformers does


def rotary_tables(length: int, head_dim: int, theta: float, dtype, device):
    """cos and sin of RoPE's angles, position * theta^(-2i/d), each [T, d]: the d/2 angles twice."""
    exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim      # [d/2]
    frequencies = theta ** -exponents
    positions = torch.arange(length, dtype=dtype, device=device)                         # [T]
    angles = torch.outer(positions, frequencies)                                         # [T, d/2]
    angles = torch.cat((angles, angles), -1)                                             # [T, d]
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each pair (i, i + d/2) of x [B, H, T, d] by the angle of its position.

    Hugging Face's checkpoints pair the two halves of a head. Mistral's own files pair neighbours.
    """
    x32 = x.to(cos.dtype)
    first, second = x32.chunk(2, -1)
    turned = x32 * cos + torch.cat((-second, first), -1) * sin
    return turned.to(x.dtype)


def causal_attention(q, k, v, window: int | None):
    """softmax(q k^T / sqrt(d)) v, each position over itself and the window - 1 before it.

    q [B, H, T, d], k and v [B, K, T, d] -> [B, H, T, d]. There is no padding mask: padding stands on the
    right, and no real token ever looks there.
    """
    group = q.shape[1] // k.shape[1]                     # query heads that share one key-value head
    k = k.repeat_interleave(group, dim=1)                # [B, H, T, d]
    v = v.repeat_interleave(group, dim=1)
    if window is None or q.shape[2] <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return windowed_attention(q, k, v, window)


def windowed_attention(q, k, v, window: int):
    """The same for a text longer than the window, in memory T * W and not T * T. All [B, H, T, d].

    Blocks of W queries see the block of keys before theirs and their own, under one mask [W, 2W] for all
    blocks. Its column j is the key at (the block's start) - W + j.
    """
    length = q.shape[2]
    query_position = torch.arange(window, 2 * window, device=q.device)[:, None]
    key_position = torch.arange(2 * window, device=q.device)
    mask = (key_position <= query_position) & (key_position > query_position - window)
    blocks = []
    # torch.compile: one graph for each number of blocks
    for number in range((length + window - 1) // window):
        start = number * window
        queries = min(window, length - start)            # the last block may be short
        previous = min(window, start)                    # the first block has no keys before it
        keys = slice(start - previous, start + queries)
        seen = mask[:queries, window - previous:window + queries]
        block = F.scaled_dot_product_attention(q[:, :, start:start + queries], k[:, :, keys], v[:, :, keys],
                                               seen)
        blocks.append(block)
    return torch.cat(blocks, 2)


class Linear(nn.Module):
    """y = weight x, and with LoRA y = weight x + scaling * lora_B lora_A dropped (arXiv 2106.09685).

    `dropped` is x after dropout. The caller makes it, so that projections which read the same x share one
    mask. The weight is frozen, in the base's dtype. lora_A [r, in] and lora_B [out, r] are float32 and cast
    for the product alone, so that gradients and optimizer keep float32. lora_B starts at zero: a fresh
    adapter changes nothing.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.lora_A = None
        self.lora_B = None
        self.scaling = None

    def add_lora(self, rank: int, scaling: float, generator=None):
        out_features, in_features = self.weight.shape
        bound = 1 / math.sqrt(in_features)               # peft's start: Kaiming-uniform with a = sqrt(5)
        a = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        b = torch.zeros(out_features, rank, device=self.weight.device)
        self.lora_A = nn.Parameter(a.to(self.weight.device))
        self.lora_B = nn.Parameter(b)
        self.scaling = scaling

    def base(self, x):
        return F.linear(x, self.weight)              # of its own, so that tools/models/fp8.py can replace it

    def forward(self, x, dropped):
        y = self.base(x)                                                   # [B, T, out]
        if self.lora_A is None:
            return y
        low = self.scaling * F.linear(dropped, self.lora_A.to(x.dtype))    # [B, T, r]
        lora_B = self.lora_B.to(x.dtype)
        y = torch.addmm(y.flatten(0, -2), low.flatten(0, -2), lora_B.T)    # y + low lora_B^T, in one kernel
        return y.view(*x.shape[:-1], -1)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key-value heads."""

    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        self.window = c.sliding_window
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size)
        self.lora_dropout = nn.Dropout(0.0)

    def forward(self, x, cos, sin):
        dropped = self.lora_dropout(x)                   # one mask for q, k and v; peft draws three
        q = self.split_heads(self.q_proj(x, dropped))    # [B, H, T, d]
        k = self.split_heads(self.k_proj(x, dropped))    # [B, K, T, d]
        v = self.split_heads(self.v_proj(x, dropped))
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        y = causal_attention(q, k, v, self.window)       # [B, H, T, d]
        y = y.transpose(1, 2).flatten(2)                 # [B, T, H * d]
        return self.o_proj(y, self.lora_dropout(y))

    def split_heads(self, x):
        B, T, _ = x.shape
        return x.view(B, T, -1, self.head_dim).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)
        self.lora_dropout = nn.Dropout(0.0)

    def forward(self, x):
        dropped = self.lora_dropout(x)
        y = F.silu(self.gate_proj(x, dropped)) * self.up_proj(x, dropped)
        return self.down_proj(y, self.lora_dropout(y))


class Block(nn.Module):
    """Attention, then the MLP; each reads a normalised x and adds to it."""

    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Decoder(nn.Module):
    """Token ids [B, T] -> hidden states after the final norm [B, T, D]. Names are Hugging Face's."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.requires_grad_(False)                   # the base is frozen: only LoRA's A and B are trained
        self.lora = None                         # what adapter_config.json says, once there is an adapter
        self.activation_checkpointing = False

    def forward(self, ids):
        c = self.config
        x = self.embed_tokens(ids)                       # [B, T, D]
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = rotary_tables(ids.shape[1], c.head_dim, c.rope_theta, dtype, x.device)
        for block in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = recompute(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin)
        return self.norm(x)

    def add_lora(self, rank=16, alpha=32.0, dropout=0.1, targets=PROJECTIONS, rslora=False, seed=0):
        """Put a fresh adapter on the named projections of every layer.

        The paper's: rank 16 on all seven (appendix A). For Mistral-7B that trains 16 * (in + out) weights of
        each of its 224 projections, 41,943,040 in all.
        """
        generator = torch.Generator().manual_seed(seed)
        scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        for name, module in self.named_modules():
            if isinstance(module, Linear) and name.split(".")[-1] in targets:
                module.add_lora(rank, scaling, generator)
            if isinstance(module, nn.Dropout):
                module.p = dropout
        self.lora = {
            "peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "r": rank, "lora_alpha": alpha,
            "lora_dropout": dropout, "target_modules": [p for p in PROJECTIONS if p in targets],
            "use_rslora": rslora, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        }

    def load_lora(self, folder: Path) -> None:
        """Put the adapter of PEFT's two files on this decoder, float32 as it was trained."""
        settings, tensors = read_adapter(folder, PROJECTIONS)
        self.add_lora(**settings)
        fill_lora(self.lora_parameters(), tensors, folder / "adapter_model.safetensors")

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """{"layers.0.self_attn.q_proj.lora_A": [r, in], ...}, in the order of the layers."""
        return {name: p for name, p in self.named_parameters() if name.endswith(("lora_A", "lora_B"))}

    def projections(self) -> list[Linear]:
        """All matrix products with the base. Of each of their weights, a token's forward costs 2 FLOPs."""
        return [module for module in self.modules() if isinstance(module, Linear)]


def load_decoder(folder: Path, device, dtype, **overrides) -> Decoder:
    """The decoder of a Hugging Face folder, frozen. overrides: fields of Config in place of the file's."""
    config = Config(**read_config(folder / "config.json", Config.__annotations__, **overrides))
    with torch.device("meta"):                           # shapes without memory
        decoder = Decoder(config)
    load_weights(decoder, folder, device, dtype)         # the file's tensors become the parameters
    return decoder.requires_grad_(False).eval()


# ---------------------------------------------------------------------------------- from texts to vectors

def length_chunks(lengths: list[int], tokens_per_chunk: int) -> list[list[int]]:
    """Indices of texts, in chunks of similar length, the longest first.

    A chunk has at most tokens_per_chunk tokens, padding included, or one longer text. No text in it is
    shorter than half its longest one: another forward pass costs less than so much padding.

    >>> length_chunks([3, 9, 4, 2], 10)              # 9 alone; 4 and 3, padded to 8 tokens; 2 does not fit
    [[1], [2, 0], [3]]
    >>> length_chunks([9, 4], 100)
    [[0], [1]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    chunks = []
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        most = max(1, tokens_per_chunk // longest)
        chunk = [i for i in order[start:start + most] if 2 * lengths[i] >= longest]
        chunks.append(chunk)
        start += len(chunk)
    return chunks


def pool(hidden, lengths, pooling: str):
    """Hidden states [B, T, D], real lengths [B] -> [B, D]: the state at EOS, or a mean (Table 5)."""
    if pooling == "last":
        texts = torch.arange(len(lengths), device=hidden.device)
        return hidden[texts, lengths - 1]
    hidden = at_least_float32(hidden)
    positions = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)               # [T]: 1 to T
    weights = (positions <= lengths[:, None]).to(hidden.dtype)                       # [B, T]: 1 where real
    if pooling == "weighted-mean":
        weights = weights * positions            # later positions have seen more (SGPT, arXiv 2202.08904)
    weights = weights / weights.sum(1, keepdim=True)
    return torch.einsum("btd,bt->bd", hidden, weights)


def to_device(tensor, device):
    """A CPU tensor on the device. From pinned memory, the copy does not make the CPU wait for the GPU."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Embedder:
    """A decoder and its tokenizer: one vector a text.

    The vector is the last layer's state, after the final norm, at an EOS that we append (section 3.2); or,
    with another `pooling`, a mean of all its states.
    """

    def __init__(self, decoder: Decoder, tokenizer, max_length=512, pooling="last", base=""):
        check(pooling in POOLINGS, f"pooling {pooling!r}: choose one of {', '.join(POOLINGS)}")
        check(max_length >= 3, f"max_length {max_length}: BOS, EOS and a token between them need 3")
        tokenizer.no_truncation()                        # we cut and pad ourselves
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True           # "</s>" typed in a text is text, and never an EOS
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pooling = pooling
        self.base = base                                 # the folder of the base, for adapter_config.json
        self.truncated = 0                               # texts so far that were longer than max_length

    @classmethod
    def load(cls, path, adapter=None, device=None, dtype=None, max_length=None, pooling=None, **overrides):
        """Open a run (base + adapter), a Hugging Face folder (with `adapter` on top), or an exported folder.

        device: CUDA where there is one. dtype: float32 on a CPU; on a GPU bfloat16, or float16 where it
        lacks that. max_length: as an exported folder says, else 512. pooling: as the run or the export says,
        else "last". overrides: fields of Config in place of the file's, such as rope_theta=1e5 for longer
        texts (section 5.2). Raises UserError.
        """
        folder, adapter = find_model(path, adapter)
        pooling = pooling or stored_pooling(adapter or folder) or "last"
        max_length = max_length or stored_max_length(folder) or 512
        device = pick_device(device)
        dtype = pick_dtype(dtype, device)
        decoder = load_decoder(folder, device, dtype, **overrides)
        if adapter is not None:
            decoder.load_lora(adapter)
        tokenizer = load_tokenizer(folder, decoder.config.vocab_size)
        return cls(decoder, tokenizer, max_length, pooling, str(folder))

    def compile(self, wanted: bool | None = None):
        """torch.compile each block, for any length; by default on a GPU. It takes a minute at first."""
        if wanted is None:
            wanted = self.device.type == "cuda"
        if wanted:
            # A new graph is made for each combination of: grad on or off, training or not, one text or
            # several, and the number of windows. dynamo's limit is 8 graphs; beyond it, blocks would
            # silently run uncompiled.
            torch._dynamo.config.recompile_limit = 64
            for block in self.decoder.layers:
                block.compile(dynamic=True)
        return self

    @property
    def device(self) -> torch.device:
        return self.decoder.norm.weight.device

    def tokenize(self, texts: list[str], prompt: str | list[str] = "") -> list[list[int]]:
        """[BOS] + text[:room] + [EOS], at most max_length ids a text (section 3.2).

        prompt: the instruction, one for all texts or one a text; "" for documents. We append EOS ourselves,
        after the cut. Most tokenizer files add BOS at best, and a vector read at another token is silently
        bad.
        """
        return self.token_ids(*texts_and_prompts(texts, prompt))

    def token_ids(self, texts: list[str], prompts: list[str]) -> list[list[int]]:
        """`tokenize`, for texts that are known to be texts, each with its prompt."""
        bos, eos = self.decoder.config.bos_token_id, self.decoder.config.eos_token_id
        start = [] if bos is None else [bos]
        room = self.max_length - len(start) - 1
        with_prompts = [instruct(p, text) for p, text in zip(prompts, texts)]
        token_ids, long = [], set()
        encodings = self.tokenizer.encode_batch_fast(with_prompts, add_special_tokens=False)
        for i, encoded in enumerate(encodings):
            ids = encoded.ids
            if len(ids) > room:
                self.truncated += 1
                long.add(prompts[i])
            token_ids.append(start + ids[:room] + [eos])
        self.check_prompts(long)
        return token_ids

    def check_prompts(self, prompts) -> None:
        """Refuse an instruction that leaves no room for a text: all its queries would be equal."""
        prompts = sorted(set(prompts) - {""})
        empty_queries = [instruct(prompt, "") for prompt in prompts]
        encoded = self.tokenizer.encode_batch_fast(empty_queries, add_special_tokens=False)
        check_room(prompts, [len(e.ids) for e in encoded], self.max_length)

    def embed(self, token_ids: list[list[int]], normalize=True) -> torch.Tensor:
        """Token ids of one chunk -> [B, D] on the device, at least float32."""
        lengths = torch.tensor([len(ids) for ids in token_ids])
        padded = torch.zeros(len(token_ids), int(lengths.max()), dtype=torch.long)
        for i, ids in enumerate(token_ids):
            padded[i, :len(ids)] = torch.tensor(ids)  # behind them any id will do: no real token looks there
        hidden = self.decoder(to_device(padded, self.device))                            # [B, T, D]
        vectors = pool(hidden, to_device(lengths, self.device), self.pooling)
        vectors = at_least_float32(vectors)
        return F.normalize(vectors, dim=-1) if normalize else vectors

    @torch.no_grad()
    def encode(self, texts: list[str], prompt: str | list[str] = "", normalize=True, dim: int | None = None,
               tokens_per_chunk: int | None = None, progress=False) -> torch.Tensor:
        """Texts -> float32 [n, D] on the CPU, unit rows, in the texts' order.

        texts: a list, or anything that yields texts. prompt: the instruction, one for all texts or one a
        text; None or "" for documents. dim: keep the first dim values. tokens_per_chunk: the most tokens of
        one forward pass, padding included; by default 4096 on a CPU, 16384 on a GPU. progress: lines on
        stderr. Leaves the decoder in eval mode.
        """
        size = self.decoder.config.hidden_size
        check(dim is None or 1 <= dim <= size, f"dim {dim}: a vector has {size} values")
        texts, prompts = texts_and_prompts(texts, prompt)
        if tokens_per_chunk is None:
            tokens_per_chunk = 4096 if self.device.type == "cpu" else 16384
        self.decoder.eval()
        vectors = torch.empty(len(texts), dim or size)
        starts = range(0, len(texts), SLICE)         # the token ids of a million texts would fill the memory
        for start in show_progress(starts, "encode", f"slices of {SLICE:,} texts") if progress else starts:
            rows = slice(start, start + SLICE)
            vectors[rows] = self.encode_slice(texts[rows], prompts[rows], normalize, dim, tokens_per_chunk)
        return vectors

    def encode_slice(self, texts, prompts, normalize, dim, tokens_per_chunk) -> torch.Tensor:
        token_ids = self.token_ids(texts, prompts)
        vectors = torch.empty(len(texts), dim or self.decoder.config.hidden_size)
        for chunk in length_chunks([len(ids) for ids in token_ids], tokens_per_chunk):
            v = self.embed([token_ids[i] for i in chunk], normalize=False)
            v = v[:, :dim]                               # cut first, then normalise (Matryoshka)
            if normalize:
                v = F.normalize(v, dim=-1)
            vectors[chunk] = v.float().cpu()
        check_finite(vectors, texts)                     # float16 overflows
        return vectors

    def save_adapter(self, folder, dtype=torch.float32) -> None:
        """Write PEFT's adapter_config.json and adapter_model.safetensors."""
        described = {"base_model_name_or_path": self.base, **self.decoder.lora}
        save_adapter(Path(folder), self.decoder.lora_parameters(), described, self.pooling, dtype)
