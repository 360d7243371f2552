"""tools/models/fp8.py: the frozen base's products in 8-bit floats (e4m3), forward and input gradient.

    python -m tools.models.fp8 measure BASE --data FILE                    # its effect, in numbers, on a GPU
    python -m tools.models.fp8 train --base ... --data ... --out runs/fp8  # train.py's flags, on a GPU
    python -m tools.models.fp8 measure BASE --data FILE --emulate          # the same, slowly, without one

Each row of x, and each row of W, is divided by its largest magnitude over 448 and rounded to e4m3 (3 bits of
mantissa: at most 1/16 off). `torch._scaled_mm` multiplies these at twice bf16's rate, where the chip has the
units (Ada, Hopper and later), and puts the scales back. The gradient dy W sums over W's other axis, whose
scales cannot leave that sum, so W is rounded a second time, by columns; both copies together take what one
took in 16 bits. W itself has no gradient: the base is frozen. LoRA, norms and attention stay as they are.
"""
import argparse
import contextlib
from pathlib import Path

import torch
from torch import nn

import model
import train
from model import Decoder, Linear
from plumbing.errors import Parser, UserError, check, command, positive
from plumbing.examples import Examples

E4M3_MAX = 448.0


def rowwise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, k] -> (e4m3 [n, k], float32 scale [n, 1]): their product is x, each value rounded to 3 bits.

    Off by at most 1/16 of a value, and for the smallest, below 2^-6 of its scale, by 2^-10 of that.
    """
    x = x.float()
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
    return (x / scale).to(torch.float8_e4m3fn), scale


def product(a, a_scale, b, b_scale, dtype: torch.dtype) -> torch.Tensor:
    """(a_scale a) (b_scale b)^T: [n, k] and [m, k], a scale a row -> [n, m]. On a CPU in float32."""
    if not a.is_cuda:
        return ((a.float() * a_scale) @ (b.float() * b_scale).T).to(dtype)
    # rowwise scales come with bfloat16 results only; the second factor must lie column after column
    y = torch._scaled_mm(a, b.T, scale_a=a_scale, scale_b=b_scale.T, out_dtype=torch.bfloat16,
                         use_fast_accum=True)
    return y.to(dtype)


class Product(torch.autograd.Function):
    """x [n, in] -> x W^T [n, out], and dy -> dy W, each factor rounded by the rows of its own sum."""

    @staticmethod
    def forward(ctx, x, by_row, row_scale, by_column, column_scale):
        ctx.save_for_backward(by_column, column_scale)           # W^T [in, out]; x is not needed again
        return product(*rowwise(x), by_row, row_scale, x.dtype)

    @staticmethod
    def backward(ctx, dy):
        by_column, column_scale = ctx.saved_tensors
        return product(*rowwise(dy), by_column, column_scale, dy.dtype), None, None, None, None


# dynamo takes it as one operation, and does not trace what is inside
@torch.compiler.allow_in_graph
def fp8_linear(x, by_row, row_scale, by_column, column_scale):
    """x [..., in] -> x W^T [..., out]."""
    y = Product.apply(x.flatten(0, -2), by_row, row_scale, by_column, column_scale)
    return y.view(*x.shape[:-1], y.shape[-1])


class Fp8Linear(Linear):
    """model.Linear with the base's product in fp8. Made by `quantise` out of a Linear, in place."""

    def base(self, x):
        return fp8_linear(x, self.weight, self.row_scale, self.by_column, self.column_scale)


def quantise(decoder: Decoder) -> Decoder:
    """Round the weights of every projection, once, in both layouts; their 16-bit copies go."""
    for linear in decoder.projections():
        check(not any(size % 16 for size in linear.weight.shape),
              f"fp8 needs widths in sixteens, and a projection is {tuple(linear.weight.shape)}")
        by_row, row_scale = rowwise(linear.weight)
        by_column, column_scale = rowwise(linear.weight.T)
        linear.weight = nn.Parameter(by_row, requires_grad=False)        # its shape and device are asked for
        linear.register_buffer("row_scale", row_scale, persistent=False)
        linear.register_buffer("by_column", by_column.contiguous(), persistent=False)
        linear.register_buffer("column_scale", column_scale, persistent=False)
        linear.__class__ = Fp8Linear
    return decoder


def require_gpu() -> None:
    """UserError where no GPU with fp8 units is at hand."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        here = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        raise UserError(f"fp8 needs an Ada, Hopper or later GPU, here is {here}: train without it, or see "
                        "the rounding's effect with `python -m tools.models.fp8 measure --emulate`")


@contextlib.contextmanager
def loading():
    """Whatever loads a model in this context gets its base in fp8."""
    load = model.load_decoder
    model.load_decoder = lambda *args, **more: quantise(load(*args, **more))
    try:
        yield
    finally:
        model.load_decoder = load


def gradients(embedder, batch, args) -> tuple[torch.Tensor, torch.Tensor]:
    """(vectors, LoRA gradients) of one batch, without dropout."""
    parameters = list(embedder.decoder.lora_parameters().values())
    for parameter in parameters:
        parameter.grad = None
    chunks = train.make_chunks(batch, args.tokens_per_chunk, embedder.device)
    vectors = torch.zeros(batch.text_count, embedder.decoder.config.hidden_size, device=embedder.device)
    valid = batch.valid.to(embedder.device)
    train.cached_gradients(embedder.embed, chunks, vectors,
                           lambda v: train.batch_loss(v, batch.query_count, valid, args))
    return vectors, torch.cat([parameter.grad.flatten() for parameter in parameters])


def measure(base, data, queries=64, max_length=512, dtype=None, device=None, tokens_per_chunk=8192) -> dict:
    """Relative norms of the differences that fp8 makes, in vectors and in LoRA gradients, on one batch.

    The reference is the same model in its own dtype; B is random, so that A has a gradient too.
    """
    args = train.options(["--base", str(base), "--data", str(data), "--out", "unused", "--lora-dropout", "0",
                          "--max-length", str(max_length), "--tokens-per-chunk", str(tokens_per_chunk),
                          "--no-compile", *(("--dtype", dtype) if dtype else ()),
                          *(("--device", device) if device else ())])
    embedder = train.load_model(args)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in embedder.decoder.lora_parameters().items():
        if name.endswith("lora_B"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    examples = Examples([str(data)])
    numbers = train.plan_epoch(examples, queries, homogeneous=False, seed=0, epoch=0)[0]
    batch = train.prepare(examples, numbers, embedder.tokenize, args, step=0)
    exact_vectors, exact_lora = gradients(embedder, batch, args)
    quantise(embedder.decoder)
    fp8_vectors, fp8_lora = gradients(embedder, batch, args)

    def relative(found, exact):
        return float((found - exact).norm() / exact.norm())
    return {"queries": batch.query_count, "texts": batch.text_count,
            "vectors": relative(fp8_vectors, exact_vectors),
            "lora_gradients": relative(fp8_lora, exact_lora),
            "gradient_cosine": float(torch.cosine_similarity(fp8_lora, exact_lora, dim=0))}


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("measure", help="relative differences that fp8 makes").add_argument
    add("base", type=Path)
    add("--data", required=True)
    add("--queries", type=positive(int), default=64)
    add("--max-length", type=positive(int), default=512)
    add("--dtype", choices=("float32", "bfloat16", "float16"))
    add("--emulate", action="store_true", help="on the CPU, by rounding and float32 products")
    commands.add_parser("train", help="train.py, its base in fp8; takes train.py's flags", add_help=False)
    args, rest = parser.parse_known_args(argv)
    if not getattr(args, "emulate", False):
        require_gpu()
    if args.command == "train":
        with loading():
            return train.main(rest)
    check(not rest, f"unknown: {' '.join(rest)}")
    m = measure(args.base, args.data, args.queries, args.max_length, args.dtype,
                "cpu" if args.emulate else "cuda")
    print(f"{m['queries']} queries, {m['texts']} texts: fp8 moves vectors by {m['vectors']:.1e} and LoRA "
          f"gradients by {m['lora_gradients']:.1e} of their norm (cosine {m['gradient_cosine']:.4f})")


if __name__ == "__main__":
    command(main)
