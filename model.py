"""model.py: texts -> vectors. Mistral-7B as an embedder, written out by hand (arXiv 2401.00368, section 3.2).

    from model import Embedder
    e = Embedder.load("runs/demo")                   # a run, a Hugging Face folder, or an exported one
    queries = e.encode(["how to brew tea"], prompt="Given a question, retrieve passages that answer it")
    documents = e.encode(["Steep for three minutes.", "Tea came to Europe in 1610."])         # no prompt
    scores = queries @ documents.T

In: texts, and for queries an instruction. Out: one unit vector a text. The file goes from small to large: the whole
idea in five lines, the decoder from its norm to the stack of blocks (LoRA stands in `Linear`), and `Embedder`, which
makes token ids of texts and vectors of hidden states.

Left to plumbing/checkpoint.py: reading and writing folders, and refusing what this decoder does not compute. It is
long, and says nothing about the method.

Letters for shapes: B texts, T positions, D hidden size, H query heads, K key-value heads, d head size, r LoRA rank,
W window.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from plumbing import checkpoint as folders
from plumbing.errors import check, check_texts

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ------------------------------------------------------------------------------------------------ the idea

def instruct(prompt: str, text: str) -> str:
    """Eq. 1: a query carries its task in front. A document has no prompt and stays as it is."""
    return f"Instruct: {prompt}\nQuery: {text}" if prompt else text


def embed_one(decoder, tokenizer, text: str, prompt: str = "") -> torch.Tensor:
    """The whole idea, for one text -> [D]. `Embedder` does the same for many texts at once, and for long ones."""
    ids = tokenizer.encode(instruct(prompt, text), add_special_tokens=False).ids
    ids = [decoder.config.bos_token_id, *ids, decoder.config.eos_token_id]
    hidden = decoder(torch.tensor([ids]))            # [1, T, D]
    last = hidden[0, -1]                             # at EOS, which alone has seen the whole text
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
    tie_word_embeddings: bool       # False
    bos_token_id: int | None        # 1
    eos_token_id: int               # 2


def at_least_float32(x):
    """16 bits become float32, float64 stays: norms, rotary angles, normalisation and loss need the digits."""
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
        return self.weight * x32.to(x.dtype)


def rotary_tables(length: int, head_dim: int, theta: float, dtype, device):
    """RoPE's angles, position * theta^(-2i/d): their cos and sin, each [T, d], the d/2 frequencies standing twice."""
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

    q [B, H, T, d], k and v [B, K, T, d] -> [B, H, T, d]. There is no padding mask: padding stands on the right, and
    no real token ever looks there.
    """
    group = q.shape[1] // k.shape[1]                     # query heads that share one key-value head
    k = k.repeat_interleave(group, dim=1)                # [B, H, T, d]
    v = v.repeat_interleave(group, dim=1)
    length = q.shape[2]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    # A longer text: blocks of W queries, each against the previous block of keys and its own. All blocks share one
    # mask [W, 2W], so memory grows with T * W and not with T * T.
    query = torch.arange(window, 2 * window, device=q.device)[:, None]
    key = torch.arange(2 * window, device=q.device)
    mask = (key <= query) & (key > query - window)
    blocks = []
    for number in range((length + window - 1) // window):
        start = number * window
        stop = min(start + window, length)
        previous = min(start, window)                    # keys of the previous block: none for the first
        seen = mask[:stop - start, window - previous:window + stop - start]
        keys = slice(start - previous, stop)
        block = F.scaled_dot_product_attention(q[:, :, start:stop], k[:, :, keys], v[:, :, keys], attn_mask=seen)
        blocks.append(block)
    return torch.cat(blocks, 2)


class Linear(nn.Module):
    """y = W x, and with LoRA y = W x + scaling * B A z, where z is x after dropout (arXiv 2106.09685).

    W is frozen, in the base's dtype. A [r, in] and B [out, r] are float32 and cast for the product alone, so that
    gradients and the optimizer keep float32. B starts at zero: a fresh adapter changes nothing. The caller makes z,
    so that projections which read the same x share one dropout mask.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.lora_A = None
        self.lora_B = None

    def add_lora(self, rank: int, scaling: float, generator=None):
        out_features, in_features = self.weight.shape
        bound = 1 / math.sqrt(in_features)               # peft's start: Kaiming-uniform with a = sqrt(5)
        a = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        b = torch.zeros(out_features, rank, device=self.weight.device)
        self.lora_A = nn.Parameter(a.to(self.weight.device))
        self.lora_B = nn.Parameter(b)
        self.scaling = scaling

    def base(self, x):
        return F.linear(x, self.weight)

    def forward(self, x, z):
        y = self.base(x)                                                   # [B, T, out]
        if self.lora_A is None:
            return y
        low = self.scaling * F.linear(z, self.lora_A.to(x.dtype))          # [B, T, r]
        b = self.lora_B.to(x.dtype)
        return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), b.T).view_as(y)          # y + low B^T


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
        z = self.lora_dropout(x)
        q = self.split_heads(self.q_proj(x, z))          # [B, H, T, d]
        k = self.split_heads(self.k_proj(x, z))          # [B, K, T, d]
        v = self.split_heads(self.v_proj(x, z))
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
        z = self.lora_dropout(x)
        y = F.silu(self.gate_proj(x, z)) * self.up_proj(x, z)
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
    """Token ids [B, T] -> hidden states after the final norm [B, T, D]. The modules' names are Hugging Face's."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.requires_grad_(False)                       # the base is frozen: only LoRA's A and B are trained
        self.lora = None                                 # what adapter_config.json says, once there is an adapter
        self.activation_checkpointing = False

    def forward(self, ids):
        c = self.config
        x = self.embed_tokens(ids)                       # [B, T, D]
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = rotary_tables(ids.shape[1], c.head_dim, c.rope_theta, dtype, x.device)
        for block in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin)
        return self.norm(x)

    def add_lora(self, rank=16, alpha=32.0, dropout=0.1, targets=PROJECTIONS, rslora=False, seed=0):
        """Put a fresh adapter on the named projections of every layer (appendix A: rank 16 on all seven)."""
        generator = torch.Generator().manual_seed(seed)
        scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        for name, module in self.named_modules():
            if isinstance(module, Linear) and name.rsplit(".", 1)[1] in targets:
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
        settings, tensors = folders.read_adapter(folder, PROJECTIONS)
        self.add_lora(**settings)
        folders.fill_lora(self.lora_parameters(), tensors, folder / "adapter_model.safetensors")

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """{"layers.0.self_attn.q_proj.lora_A": [r, in], ...}, in the order of the layers."""
        return {name: p for name, p in self.named_parameters() if name.endswith(("lora_A", "lora_B"))}

    def projections(self) -> list[Linear]:
        """All that multiply by a matrix of the base: a token costs 2 FLOPs for each of their weights, forward."""
        return [module for module in self.modules() if isinstance(module, Linear)]


def load_decoder(folder: Path, device, dtype, **overrides) -> Decoder:
    """The decoder of a Hugging Face folder, frozen. overrides: fields of Config in place of the file's."""
    config = Config(**folders.read_config(folder / "config.json", Config.__annotations__, **overrides))
    with torch.device("meta"):                           # shapes without memory; the file's tensors fill them
        decoder = Decoder(config)
    folders.load_weights(decoder, folder, device, dtype)
    return decoder.requires_grad_(False).eval()


# ---------------------------------------------------------------------------------- from texts to vectors

def length_chunks(lengths: list[int], tokens_per_chunk: int) -> list[list[int]]:
    """Numbers of texts in chunks of similar length, longest first: texts * longest <= tokens_per_chunk.

    A text of less than half the longest's length starts a new chunk, since padding would cost more than a chunk.

    >>> length_chunks([3, 9, 4, 2], 10)
    [[1], [2, 0], [3]]
    """
    order = sorted(range(len(lengths)), key=lambda text: -lengths[text])
    chunks = []
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        most = max(1, tokens_per_chunk // longest)
        chunk = [text for text in order[start:start + most] if 2 * lengths[text] >= longest]
        chunks.append(chunk)
        start += len(chunk)
    return chunks


def pool(hidden, lengths, pooling: str):
    """Hidden states [B, T, D] and real lengths [B] -> [B, D]: the state at EOS, or a mean for the ablation."""
    if pooling == "last":
        rows = torch.arange(len(lengths), device=hidden.device)
        return hidden[rows, lengths - 1]
    hidden = at_least_float32(hidden)
    position = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)                # [T]
    weights = (position <= lengths[:, None]).to(hidden.dtype)                            # [B, T]: 1 where real
    if pooling == "weighted-mean":
        weights = weights * position                     # later positions have seen more (SGPT, arXiv 2202.08904)
    weights = weights / weights.sum(1, keepdim=True)
    return torch.einsum("btd,bt->bd", hidden, weights)


def to_device(tensor, device):
    """A CPU tensor on the device; from pinned memory, so that nobody waits for a GPU's earlier work."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Embedder:
    """A decoder and its tokenizer: one vector a text.

    The vector is the last layer's state, after the final norm, at an EOS that we append (section 3.2).
    """

    def __init__(self, decoder: Decoder, tokenizer, max_length=512, pooling="last", base=""):
        check(pooling in folders.POOLINGS, f"pooling {pooling!r}: choose one of {', '.join(folders.POOLINGS)}")
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
    def load(cls, path, adapter=None, device=None, dtype=None, max_length=512, pooling=None, **overrides):
        """Open a run (base + adapter), a Hugging Face folder (with `adapter` on top), or an exported folder.

        device: CUDA where there is one. dtype: float32 on a CPU; on a GPU bfloat16, or float16 where it lacks that.
        pooling: as the run or the export says, else "last". overrides: fields of Config in place of the file's, such
        as rope_theta=1e5 for longer texts (section 4.4). Raises UserError.
        """
        folder, adapter = folders.find_model(path, adapter)
        pooling = pooling or folders.stored_pooling(adapter or folder) or "last"
        device = folders.pick_device(device)
        dtype = folders.pick_dtype(dtype, device)
        decoder = load_decoder(folder, device, dtype, **overrides)
        if adapter is not None:
            decoder.load_lora(adapter)
        tokenizer = folders.load_tokenizer(folder, decoder.config.vocab_size)
        return cls(decoder, tokenizer, max_length, pooling, str(folder))

    def compile(self, wanted: bool | None = None):
        """torch.compile each block, for any length; by default where there is a GPU. The first texts take a minute."""
        if wanted is None:
            wanted = self.device.type == "cuda"
        if wanted:
            # One graph each for gradients or none, training or not, one text or more, each number of windows. Past
            # its default of 8, dynamo would run eagerly.
            torch._dynamo.config.recompile_limit = 64
            for block in self.decoder.layers:
                block.compile(dynamic=True)
        return self

    @property
    def device(self) -> torch.device:
        return self.decoder.norm.weight.device

    def tokenize(self, texts: list[str], prompt: str | list[str] = "") -> list[list[int]]:
        """BOS + text, cut to fit max_length, + EOS: at most max_length ids a text.

        prompt: the instruction, one for all texts or one a text; "" for documents. We append EOS ourselves, after
        the cut. Most tokenizer files add BOS at best, and a vector read at another token is silently bad.
        """
        texts = with_prompts(texts, prompt)
        bos, eos = self.decoder.config.bos_token_id, self.decoder.config.eos_token_id
        start = [] if bos is None else [bos]
        room = self.max_length - len(start) - 1
        rows = []
        for encoded in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids = encoded.ids
            if len(ids) > room:
                self.truncated += 1
            rows.append(start + ids[:room] + [eos])
        return rows

    def embed(self, rows: list[list[int]], normalize=True) -> torch.Tensor:
        """Token ids of one chunk -> [B, D] on the device, at least float32, with a graph where grad is on."""
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, :len(row)] = torch.tensor(row)        # padded on the right
        hidden = self.decoder(to_device(ids, self.device))                               # [B, T, D]
        vectors = pool(hidden, to_device(lengths, self.device), self.pooling)
        vectors = at_least_float32(vectors)
        return F.normalize(vectors, dim=-1) if normalize else vectors

    @torch.no_grad()
    def encode(self, texts: list[str], prompt: str | list[str] = "", normalize=True, dim: int | None = None,
               tokens_per_chunk: int | None = None) -> torch.Tensor:
        """Texts -> float32 [n, D] on the CPU, unit rows, in the texts' order. dim: keep the first dim values.

        tokens_per_chunk: of one forward pass, padding included; by default 4096 on a CPU, 16384 on a GPU.
        """
        size = self.decoder.config.hidden_size
        check(dim is None or 1 <= dim <= size, f"dim {dim}: a vector has {size} values")
        if tokens_per_chunk is None:
            tokens_per_chunk = 4096 if self.device.type == "cpu" else 16384
        self.decoder.eval()
        rows = self.tokenize(texts, prompt)
        vectors = torch.empty(len(rows), dim or size)
        for chunk in length_chunks([len(row) for row in rows], tokens_per_chunk):
            v = self.embed([rows[i] for i in chunk], normalize=False)
            v = v[:, :dim]                               # a Matryoshka cut comes before the norm
            if normalize:
                v = F.normalize(v, dim=-1)
            vectors[chunk] = v.float().cpu()
        return vectors

    def save_adapter(self, folder, dtype=torch.float32) -> None:
        """Write PEFT's adapter_config.json and adapter_model.safetensors."""
        described = {"base_model_name_or_path": self.base, **self.decoder.lora}
        folders.save_adapter(Path(folder), self.decoder.lora_parameters(), described, dtype)


def with_prompts(texts: list[str], prompt: str | list[str]) -> list[str]:
    """Each text with its instruction in front. prompt: one for all, or one a text."""
    prompts = [prompt] * len(texts) if isinstance(prompt, str) else prompt
    check_texts(texts, prompts)
    return [instruct(p, text) for p, text in zip(prompts, texts)]
