"""train.py: examples -> adapter. Contrastive fine-tuning of arXiv 2401.00368 (sections 3.2, 4.2, appendix A).

    python train.py --base models/smollm2-135m-l20 --data data/synthetic.jsonl --out runs/demo \\
        --batch-size 32 --max-length 64 --lr 1e-3 --warmup-steps 10                   # a CPU, minutes
    python train.py --base models/Mistral-7B-v0.1 --data data/synthetic.jsonl --out runs/paper    # one GPU
    torchrun --nproc-per-node 8 train.py --base ... --data a.jsonl:0.5 --data b.jsonl --out ...   # eight

The defaults are the paper's. A batch of 2,048 queries, each with one positive and one hard negative, does not
fit any GPU with its graph, and gradient accumulation would take the in-batch negatives away. So a step embeds
the batch in chunks without a graph, takes the loss's gradient with respect to the vectors, and embeds each
chunk again to push its share through (gradient caching, arXiv 2101.06983). A run lies in --out: config.json
(every flag), log.jsonl (a line a step), checkpoint.safetensors (all that --resume needs), and PEFT's
adapter_config.json + adapter_model.safetensors.
"""
import argparse
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file

from batches import Batch, Examples, plan_epoch, plan_run, prepare
from model import (POOLINGS, Decoder, Embedder, Linear, UserError, at_least_float32, copy_lora, leave,
                   length_chunks, load_adapter, open_safetensors, read_json, replace_file, upload)

PEAK_TFLOPS = {"B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989,
               "A100": 312, "A10G": 70, "A10": 125, "L40S": 362, "L40": 181, "L4": 121, "4090": 165, "3090": 71,
               "V100": 112, "T4": 65}                     # dense, 16 bits; the first name that fits
# what a resume may change; of the data it is the content and the shares that must be the same
FREE_FLAGS = ("out", "timeout", "resume", "overwrite", "checkpoint_every", "eval_every", "eval_data", "peak_tflops",
              "tokens_per_chunk", "keep_tokens", "activation_checkpointing", "data")


def options(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    # what goes in, what comes out
    add("--base", required=True, help="folder of the base model (Hugging Face layout)")
    add("--data", required=True, action="append", metavar="FILE[:SHARE]",
        help="examples as JSON lines; of a file with a share, that part, drawn anew each epoch; repeatable")
    add("--out", required=True, type=Path, help="folder of the run")
    add("--resume", action="store_true",
        help="go on from the checkpoint in --out, if there is one (other chunks: other dropout masks)")
    add("--overwrite", action="store_true",
        help="start anew where --out holds a run; with --resume, only if other flags or data made that run")
    add("--skip-bad-lines", action="store_true", help="count unusable lines, do not stop at the first")
    # the recipe: section 4.2 and appendix A
    add("--batch-size", type=int, default=2048, help="queries a step, over all GPUs")
    add("--negatives", type=int, default=1, help="hard negatives a query (at most; drawn anew each visit)")
    add("--max-length", type=int, default=512, help="tokens a text, BOS and EOS included")
    add("--temperature", type=float, default=0.02)
    add("--lr", type=float, default=1e-4)
    add("--warmup-steps", type=int, default=100, help="linear warm-up, then linear decay to zero")
    add("--weight-decay", type=float, default=0.1)
    add("--max-grad-norm", type=float, default=1.0, help="0: no clipping (the paper does not say)")
    add("--epochs", type=int, default=1)
    add("--max-steps", type=int, help="stop earlier; the decay ends there")
    add("--lora-rank", type=int, default=16)
    add("--lora-alpha", type=float, default=32)
    add("--lora-dropout", type=float, default=0.1)
    add("--init-adapter", type=Path, help="start from this adapter, with its rank, alpha and dropout")
    add("--seed", type=int, default=0)
    # what the paper ablates or leaves open
    add("--pooling", choices=POOLINGS, default="last")
    add("--instruction", choices=("task", "none", "prefix"), default="task", help="before a query: Table 5")
    add("--both-sides", action="store_true",
        help="documents of sts and bitext get the instruction too, as in MTEB; the paper leaves them bare")
    add("--prompt", default="", help="instruction of examples that bring none")
    add("--batches", choices=("mixed", "homogeneous"), default="mixed",
        help="homogeneous: one task type (or file) a batch, left-overs mixed")
    add("--no-mask", action="store_true", help="count known positives of the same query as negatives too")
    add("--mask-margin", type=float, help="drop negatives that score above the positive's cosine + margin")
    add("--matryoshka", type=int, nargs="*", default=[], metavar="DIM", help="train these cuts too")
    # the machine
    add("--tokens-per-chunk", type=int, default=8192,
        help="padded tokens with a graph in memory: lower it if memory runs out; it changes no negatives")
    add("--keep-tokens", type=int,
        help="padded tokens whose graph pass one keeps, to embed them once (default: one chunk's)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the device's best")
    add("--device", help="cuda, cpu, cuda:1 (default: CUDA where there is one)")
    add("--compile", action=argparse.BooleanOptionalAction, help="each block (default: on CUDA)")
    add("--activation-checkpointing", action="store_true",
        help="less memory for a forward more: lower --tokens-per-chunk first")
    add("--timeout", type=float, default=30, metavar="MINUTES", help="for a rank that no longer answers")
    add("--checkpoint-every", type=int, default=50, metavar="STEPS")
    add("--eval-data", type=Path, help="held-out examples, scored every --eval-every steps")
    add("--eval-every", type=int, default=50, metavar="STEPS")
    add("--peak-tflops", type=float, help="the GPU's dense peak in 16 bits, for MFU (default: by its name)")
    args = parser.parse_args(argv)
    for name in ("batch_size", "temperature", "epochs", "max_steps", "lr", "lora_rank", "tokens_per_chunk",
                 "checkpoint_every", "eval_every"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be above 0")
    for name in ("negatives", "warmup_steps", "max_grad_norm", "weight_decay", "seed"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 0")
    if not 0 <= args.lora_dropout < 1:
        raise UserError(f"--lora-dropout {args.lora_dropout}: must be at least 0 and below 1")
    return args


# ------------------------------------------------------------------------------------------------ loss

def info_nce(queries, documents, targets, temperature: float, valid=None, margin=None):
    """Eq. 2 and 3: mean over queries of -log softmax(cosine / temperature) at the query's own positive.

    queries [Q, d] and documents [D, d]: unit rows; targets [Q]: each query's column; valid [Q, D] bool: the
    documents that count; margin: negatives whose cosine is above the positive's + margin don't count.

    >>> e = torch.eye(2)
    >>> info_nce(e, e, torch.tensor([0, 1]), 1.0)        # log(1 + exp(0 - 1))
    tensor(0.3133)
    """
    scores = at_least_float32(queries) @ at_least_float32(documents).T         # [Q, D]
    if margin is not None:
        close = scores.detach() > scores.detach().gather(1, targets[:, None]) + margin
        close.scatter_(1, targets[:, None], False)                             # nor with a margin below 0
        valid = ~close if valid is None else valid & ~close
    logits = scores / temperature
    if valid is not None:
        logits = logits.masked_fill(~valid, -torch.inf)
    return F.cross_entropy(logits, targets)


def matryoshka(loss, queries, documents, dims: list[int]):
    """The mean of loss(queries, documents) over the full vectors and their first d values, d in dims."""
    cuts = [loss(queries, documents)]
    cuts += [loss(F.normalize(queries[:, :d], dim=-1), F.normalize(documents[:, :d], dim=-1)) for d in dims]
    return torch.stack(cuts).mean()


def in_batch_accuracy(queries, documents, targets, valid):
    """Share of queries whose positive scores above every other valid document; a tie or NaN is a miss."""
    scores = (queries @ documents.T).masked_fill(~valid, -torch.inf)
    own = scores.gather(1, targets[:, None])
    others = scores.scatter(1, targets[:, None], -torch.inf)
    return (own > others).all(1).float().mean()


def spread(vectors):
    """1 - |mean|^2 of unit rows: the mean cosine distance over all pairs. 0 is collapse, 1 evenly spread."""
    return 1 - vectors.mean(0).square().sum()


# -------------------------------------------------------------------------------- one step of training

def seed_chunk(*key: int) -> None:
    """Make LoRA's dropout a function of (seed, step, rank, chunk): pass two draws the masks of pass one."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def cached_gradients(embed, batch: Batch, loss, tokens_per_chunk: int, keep_tokens=0, key=(0,), scale=1.0):
    """Add to .grad the gradient of loss(vectors [Q + D, d]), with one chunk's graph in memory at a time.

    embed: token ids of a chunk -> vectors [n, d]; called in train mode, its dropout seeded by (*key, chunk).
    Chunks within keep_tokens keep the graph of the first pass and are not embedded again. With several ranks
    the vectors are gathered, every rank computes the whole loss, and `.grad` holds this rank's share.
    Returns the loss, all vectors, the padded tokens of pass one and of pass two, and
    max |pass one - pass two|, which is 0 when dropout replays as it should.
    """
    lengths = [len(row) for row in batch.rows]
    chunks = length_chunks(lengths, tokens_per_chunk)
    sizes = [lengths[chunk[0]] * len(chunk) for chunk in chunks]
    vectors, kept, room = None, {}, keep_tokens
    for number, chunk in enumerate(chunks):
        seed_chunk(*key, number)
        with torch.set_grad_enabled(sizes[number] <= room):
            v = embed([batch.rows[i] for i in chunk])
        if v.requires_grad:
            kept[number] = v
            room -= sizes[number]
        if vectors is None:
            vectors = torch.zeros(batch.texts, v.shape[1], dtype=v.dtype, device=v.device)
            places = upload(torch.cat([batch.place[rows] for rows in chunks]), v.device)
            places = places.split([len(rows) for rows in chunks])
        vectors[places[number]] = v.detach()
    if not chunks:                                        # more ranks than texts: nothing to add to the sums
        with torch.no_grad():
            v = embed([[0]])
        vectors = torch.zeros(batch.texts, v.shape[1], dtype=v.dtype, device=v.device)
    if dist.is_initialized():
        dist.all_reduce(vectors)                          # each row is one rank's: a sum gathers them all
    vectors.requires_grad_()
    value = loss(vectors)
    gradient, = torch.autograd.grad(value, vectors)
    drift = vectors.new_zeros(())
    for number in [*kept, *(n for n in range(len(chunks)) if n not in kept)]:
        rows = places[number]
        v = kept.pop(number, None)
        if v is None:
            seed_chunk(*key, number)
            v = embed([batch.rows[i] for i in chunks[number]])
            drift = torch.maximum(drift, (v.detach() - vectors[rows]).abs().max())
        v.backward(gradient[rows] * scale)
    if dist.is_initialized():
        dist.all_reduce(drift, dist.ReduceOp.MAX)
    again = sum(sizes) - (keep_tokens - room)
    return value.detach(), vectors.detach(), (sum(sizes), again), drift


def sum_over_ranks(tensors: list[torch.Tensor]) -> None:
    """Add up each tensor over the ranks, in one message."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(part.view_as(tensor))


def learning_rate(step: int, steps: int, args) -> float:
    """Linear from 0 over the warm-up, then linear to 0 at the last step. step counts from 0."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    return args.lr * (steps - step) / max(1, steps - args.warmup_steps)


@torch.no_grad()
def held_out(embedder: Embedder, examples: Examples, args) -> tuple[float, float]:
    """Mean loss and in-batch accuracy over the held-out batches, without dropout."""
    embedder.decoder.eval()
    totals, visited = np.zeros(2), 0
    for numbers in plan_epoch(examples, args.batch_size, False, 0, 0):
        batch = prepare(examples, numbers, embedder.tokenize, args, 0)
        vectors = torch.empty(batch.texts, embedder.decoder.config.hidden_size, device=embedder.device)
        for chunk in length_chunks([len(row) for row in batch.rows], args.tokens_per_chunk):
            vectors[batch.place[chunk]] = embedder.embed([batch.rows[i] for i in chunk]).float()
        q, d = vectors[:batch.queries], vectors[batch.queries:]
        targets, valid = torch.arange(batch.queries, device=q.device), batch.valid.to(q.device)
        scores = info_nce(q, d, targets, args.temperature, valid), in_batch_accuracy(q, d, targets, valid)
        totals += np.array([float(score) for score in scores]) * batch.queries
        visited += batch.queries                          # of a file with a share, a part of its examples
    embedder.decoder.train()
    return tuple(totals / visited)


# ------------------------------------------------------------------------------------- the run's folder

@dataclass
class Run:
    """What stays the same over a run's steps."""
    args: argparse.Namespace
    embedder: Embedder
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler    # of the loss, in float16; idle otherwise
    rank: int
    world: int
    steps: int                      # the last step's number
    weights: int                    # parameters in the base's matrix products
    peak: float                     # FLOP/s of all GPUs together, 0 where unknown


def save_checkpoint(run: Run, step: int) -> None:
    """All that a resume needs in one file that is replaced whole; then the adapter, derived from it."""
    tensors = {}
    for name, parameter in run.embedder.decoder.lora_parameters().items():
        tensors[name] = parameter.detach().cpu().contiguous()
        for key, value in run.optimizer.state[parameter].items():              # step, exp_avg, exp_avg_sq
            tensors[f"{name}/{key}"] = value.cpu().contiguous()
    state = {"state": json.dumps({"step": step, "scaler": run.scaler.state_dict()})}
    replace_file(run.args.out / "checkpoint.safetensors", lambda path: save_file(tensors, path, state))
    run.embedder.save_adapter(run.args.out)


def load_checkpoint(run: Run) -> int:
    """Put adapter, optimizer and loss scale back as they were; returns the number of steps done."""
    path = run.args.out / "checkpoint.safetensors"
    with open_safetensors(path) as file:
        state = json.loads((file.metadata() or {}).get("state", "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if "step" not in state:
        raise UserError(f"{path}: not a checkpoint of train.py")
    copy_lora(run.embedder.decoder, {n: t for n, t in tensors.items() if "/" not in n}, path)
    for name, parameter in run.embedder.decoder.lora_parameters().items():
        for key, value in run.optimizer.state[parameter].items():
            value.copy_(tensors[f"{name}/{key}"])
    run.scaler.load_state_dict(state["scaler"])
    return state["step"]


def open_run(args, config: dict) -> bool:
    """Check or make the run's folder; True where a checkpoint is to be gone on from."""
    out, going_on = args.out, False
    if (out / "config.json").exists():
        before = read_json(out / "config.json")
        if "data_fingerprint" not in before:
            raise UserError(f"{out}: a model's folder, not a run's: choose another --out")
        changed = [key for key, value in config.items()
                   if key not in FREE_FLAGS and spelled_out(key, before.get(key)) != spelled_out(key, value)]
        going_on = args.resume and not changed
        if not going_on and not args.overwrite:
            why = f"made with another {', '.join(changed)}" if args.resume else "a run is here already"
            raise UserError(f"{out}: {why}: " + ("" if args.resume else "--resume goes on with it, ")
                            + "--overwrite starts anew, or choose another --out")
        if not going_on:                                  # config.json last: until then it can be asked again
            for path in sorted(out.iterdir(), key=lambda path: path.name == "config.json"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif out.exists() and (not out.is_dir() or any(path.suffix != ".tmp" for path in out.iterdir())):
        raise UserError(f"{out}: not empty and not a run: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "config.json", lambda path: path.write_text(json.dumps(config, indent=2)))
    return going_on and (out / "checkpoint.safetensors").exists()


def spelled_out(key: str, value):
    """A flag's value; of a folder the one spelling that all others mean."""
    return Path(value).resolve() if value and key in ("base", "init_adapter") else value


def cut_log(path: Path, step: int) -> None:
    """Drop the log lines past the checkpoint: their steps will be done, and logged, again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines(True):
        try:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, TypeError, KeyError):         # torn by a full disk or a kill
            break
        kept.append(line)
    replace_file(path, lambda beside: beside.write_text("".join(kept)))


# ---------------------------------------------------------------------------------------------- the run

def start_ranks(args) -> tuple[int, int]:
    """(rank, number of ranks); with torchrun, one GPU a rank, or gloo on CPUs."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        on_gpu = torch.cuda.is_available() and args.device != "cpu"
        if on_gpu:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
            # A lost rank raises where it is waited for; NCCL's own watchdog would abort the process. The price
            # is that the host waits for each of a step's three sums.
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=args.timeout))
    return rank, world


def load_model(args) -> Embedder:
    """The frozen base with an adapter to train: a fresh one, or --init-adapter's."""
    embedder = Embedder.load(args.base, device=args.device, dtype=args.dtype, max_length=args.max_length,
                             pooling=args.pooling)
    decoder = embedder.decoder
    for dim in args.matryoshka:
        if not 1 <= dim <= decoder.config.hidden_size:
            raise UserError(f"--matryoshka {dim}: a vector has {decoder.config.hidden_size} values")
    if args.init_adapter:
        load_adapter(decoder, args.init_adapter)
    else:
        decoder.add_lora(args.lora_rank, args.lora_alpha, args.lora_dropout, seed=args.seed)
    decoder.activation_checkpointing = args.activation_checkpointing
    embedder.compile(args.compile)
    decoder.train()
    return embedder


def lora_size(decoder: Decoder) -> tuple[int, int]:
    """(adapted projections, trainable parameters): rank * (in + out) each, 41,943,040 for the paper."""
    adapted = [module for name, module in decoder.named_modules()
               if isinstance(module, Linear) and name.rsplit(".", 1)[1] in decoder.lora["target_modules"]]
    wanted = sum(decoder.lora["r"] * sum(module.weight.shape) for module in adapted)
    found = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    if found != wanted:
        raise UserError(f"{found:,} parameters would be trained; rank {decoder.lora['r']} on {len(adapted)} "
                        f"projections makes {wanted:,}: the adapter does not fit this base")
    return len(adapted), found


def start_run(args, examples: Examples, steps: int, rank: int, world: int) -> tuple[Run, int]:
    """The run, ready for its next step, and the number of steps done."""
    try:
        embedder = load_model(args)
    except torch.OutOfMemoryError:
        raise UserError(f"{args.base}: the GPU's memory is too small for its weights alone (--dtype bfloat16 "
                        "halves what float32 takes)") from None
    decoder, device, dtype = embedder.decoder, embedder.device, embedder.decoder.norm.weight.dtype
    base_dtype = decoder.layers[0].self_attn.q_proj.weight.dtype               # dtype, or fp8
    projections, trainable = lora_size(decoder)
    parameters = list(decoder.lora_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    for parameter in parameters:                          # now and not after step 1, so that memory counts it
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device),
                                      "exp_avg": torch.zeros_like(parameter),
                                      "exp_avg_sq": torch.zeros_like(parameter)}
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    tflops = args.peak_tflops or next(
        (peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", gpu)), 0)
    tflops *= 2 if base_dtype.itemsize == 1 else 1        # fp8's rate
    weights = sum(module.weight.numel() for module in decoder.modules() if isinstance(module, Linear))
    run = Run(args, embedder, parameters, optimizer, scaler, rank, world, steps, weights,
              tflops * 1e12 * world)
    resuming = [False]
    if rank == 0:
        config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "device"}
        config |= {"base_dtype": str(base_dtype)[6:], "data_fingerprint": examples.fingerprint,
                   "data_shares": list(examples.shares), "world_size": world}
        try:
            resuming = [open_run(args, config)]
        except (UserError, OSError) as error:             # every rank says it and leaves
            resuming = [str(error)]
    if world > 1:
        dist.broadcast_object_list(resuming)
    if isinstance(resuming[0], str):
        raise UserError(resuming[0])
    step = load_checkpoint(run) if resuming[0] else 0
    if rank == 0:
        if step:                                          # a kill may have come between the two files
            embedder.save_adapter(args.out)
        cut_log(args.out / "log.jsonl", step)
        print(f"base     {args.base}: {len(decoder.layers)} layers, {weights:,} weights in matrix products, "
              f"{str(dtype)[6:]} on {world} x {device.type}\n"
              f"adapter  {trainable:,} parameters on {projections} projections\n"
              f"data     {len(examples):,} examples of {len(examples.group_names)} groups, "
              f"{examples.skipped:,} lines skipped\n"
              f"steps    {steps:,} of {args.batch_size:,} queries, from {step:,}; "
              f"{args.tokens_per_chunk:,} tokens a chunk, at most {args.max_length} a text", flush=True)
    if device.type == "cuda":
        dry_step(embedder, args)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)      # a rank without rows still joins the sum
    return run, step


def dry_step(embedder: Embedder, args) -> None:
    """The graph of as many tokens as may keep theirs, under a whole batch's loss: what a step holds at most
    beside the adapter and its moments, so that memory runs out now or never."""
    chunk = max(args.tokens_per_chunk, args.max_length)   # one long text may be more than --tokens-per-chunk
    total, left = 0, max(chunk, args.keep_tokens or 0)
    while left > 0:
        tokens = min(chunk, left)
        rows = math.ceil(tokens / args.max_length)
        total, left = total + embedder.embed([[0] * (tokens // rows)] * rows).sum(), left - tokens
    Q, texts = args.batch_size, args.batch_size * (2 + args.negatives)
    vectors = torch.zeros(texts, embedder.decoder.config.hidden_size, device=embedder.device, requires_grad=True)
    valid = torch.ones(Q, texts - Q, dtype=torch.bool, device=embedder.device)
    targets = torch.arange(Q, device=embedder.device)
    info_nce(vectors[:Q], vectors[Q:], targets, args.temperature, valid).backward()
    total.backward()


def bad_batch(out: Path, line: dict, batch: Batch, examples: Examples) -> UserError:
    """List the batch of a step whose loss or gradient is not finite."""
    places = [f"{examples.paths[examples.files[i]]} byte {examples.offsets[i]}" for i in batch.numbers]
    file = out / "bad_batch.json"
    file.write_text(json.dumps({**line, "examples": places}, indent=1))
    return UserError(f"step {line['step']}: loss {line['loss']}, gradient norm {line['grad_norm']}: stopped; "
                     f"the last good checkpoint stands; the batch ({places[0]}, ...) is listed in {file}")


def show(line: dict, steps: int) -> None:
    left = (steps - line["step"]) * line["seconds"]
    mfu = f"  mfu {line['mfu']:.0%}" if "mfu" in line else ""
    held = f"  held-out {line['eval_loss']:.3f}/{line['eval_accuracy']:.2f}" if "eval_loss" in line else ""
    print(f"step {line['step']}/{steps}  loss {line['loss']:.4f} (chance {line['chance_loss']:.2f})  "
          f"acc {line['accuracy']:.3f}  spread {line['spread']:.3f}  lr {line['lr']:.1e}  "
          f"grad {line['grad_norm']:.2f}  {line['tokens_per_second']:,.0f} tok/s  pad {line['padding']:.1%}"
          f"{mfu}{held}  left {int(left) // 60}m{int(left) % 60:02d}s", flush=True)


def batches_ahead(examples: Examples, plan: list, first: int, run: Run):
    """Yield the batches of plan[first:]. While one is trained on, the next is read and tokenised."""
    with ThreadPoolExecutor(1) as reader:
        futures = (reader.submit(prepare, examples, plan[step], run.embedder.tokenize, run.args, step,
                                 run.rank, run.world) for step in range(first, len(plan)))
        coming = next(futures, None)
        while coming:
            batch, coming = coming.result(), next(futures, None)
            yield batch


def training_step(run: Run, batch: Batch, step: int, signals: list, started: float) -> tuple[dict, bool]:
    """Gradients, their sum over the ranks, one update; step counts from 1. Returns what is logged, and
    whether any rank had a signal: all see the same, so that none leaves the others waiting."""
    args, device, scaler, optimizer = run.args, run.embedder.device, run.scaler, run.optimizer
    targets, valid = torch.arange(batch.queries, device=device), upload(batch.valid, device)

    def loss(vectors):
        return matryoshka(lambda q, d: info_nce(q, d, targets, args.temperature, valid, args.mask_margin),
                          vectors[:batch.queries], vectors[batch.queries:], args.matryoshka)

    optimizer.zero_grad(set_to_none=False)
    optimizer.param_groups[0]["lr"] = lr = learning_rate(step - 1, run.steps, args)
    keep_tokens = args.tokens_per_chunk if args.keep_tokens is None else args.keep_tokens
    scale = scaler.scale(torch.ones((), device=device)) if scaler.is_enabled() else 1.0
    key = args.seed, step - 1, run.rank
    value, vectors, padded, drift = cached_gradients(
        run.embedder.embed, batch, loss, args.tokens_per_chunk, keep_tokens, key, scale)
    counts = [sum(map(len, batch.rows)), *padded, len(signals)]
    counts = upload(torch.tensor(counts, dtype=torch.float32), device)
    if run.world > 1:
        sum_over_ranks([*(p.grad for p in run.parameters), counts])
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, args.max_grad_norm or torch.inf)
    scaler.step(optimizer)
    scaler.update()

    q, d = vectors[:batch.queries], vectors[batch.queries:]
    figures = {"loss": value, "accuracy": in_batch_accuracy(q, d, targets, valid), "spread": spread(vectors),
               "chance_loss": valid.sum(1).log().mean(), "grad_norm": norm, "replay_difference": drift}
    found = torch.cat([torch.stack(list(figures.values())).float(), counts]).tolist()  # the step's only wait
    real, once, twice, stopping = found[len(figures):]
    seconds = time.perf_counter() - started
    line = {"step": step, **dict(zip(figures, found)), "lr": lr, "seconds": seconds, "tokens": int(real),
            "tokens_per_second": real / seconds, "padding": 1 - real / once}
    if run.peak:                # a forward is 2N a token, a backward 2N: the base has no weight gradient
        forwards = once + twice + (once if args.activation_checkpointing else 0)
        line["mfu"] = 2 * run.weights * (forwards + once) / seconds / run.peak
        line["mfu_useful"] = 4 * run.weights * real / seconds / run.peak
    return line, stopping > 0


def heed(number: int, signals: list) -> None:
    """Note a signal. make, torchrun and the terminal may each send it, so a second one at once means nothing;
    a second Ctrl-C later leaves without a checkpoint."""
    if signals and number == signal.SIGINT and time.monotonic() - signals[0][1] > 2:
        sys.exit(128 + number)
    signals.append((number, time.monotonic()))


def train(args) -> int:
    """The whole run; returns the exit code: 0, or 128 + the signal that stopped it after a checkpoint."""
    rank, world = start_ranks(args)
    examples = Examples(args.data, args.prompt, args.skip_bad_lines)
    held = Examples([str(args.eval_data)], args.prompt, args.skip_bad_lines) if args.eval_data else None
    plan = plan_run(examples, args)
    run, step = start_run(args, examples, min(len(plan), args.max_steps or len(plan)), rank, world)
    log = open(args.out / "log.jsonl", "a") if rank == 0 else None
    signals, stopping = [], False                         # SIGTERM, SIGINT: finish the step, save, leave
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: heed(number, signals))
    batches = batches_ahead(examples, plan[:run.steps], step, run)
    while step < run.steps and not stopping:
        started, step = time.perf_counter(), step + 1
        batch = next(batches)
        line, stopping = training_step(run, batch, step, signals, started)
        watched = ["loss"] if run.scaler.is_enabled() else ["loss", "grad_norm"]
        if not all(math.isfinite(line[name]) for name in watched):     # float16 overflows; its scaler copes
            raise bad_batch(args.out, line, batch, examples)
        if held and step % args.eval_every == 0:
            line["eval_loss"], line["eval_accuracy"] = held_out(run.embedder, held, args)
        if rank == 0:
            log.write(json.dumps(line) + "\n")
            log.flush()
            show(line, run.steps)
            if step % args.checkpoint_every == 0 or step == run.steps or stopping:
                save_checkpoint(run, step)
    done, number = step == run.steps, signals[0][0] if signals else signal.SIGTERM         # another rank's
    if rank == 0:
        print(f"{args.out}: {step:,} steps done, adapter saved" if done else
              f"stopped by {signal.Signals(number).name} after step {step}: --resume goes on from there")
    return 0 if done else 128 + number


def main(argv=None) -> int:
    try:
        args = options(argv)
        code = train(args)
        if dist.is_initialized():
            dist.barrier()                                # leave together, or a late rank sees a lost one
            dist.destroy_process_group()
        return code
    except (UserError, OSError, SafetensorError) as error:
        message = str(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except torch.OutOfMemoryError:
        message = (f"out of GPU memory: lower --tokens-per-chunk (now {args.tokens_per_chunk}) or "
                   f"--keep-tokens; the batch and its negatives stay the same")
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]   # "[file:line] reason. Advice"
        message = (f"rank {os.environ['RANK']} lost another rank ({reason}): the last checkpoint, if there "
                   "is one, stands, and --resume goes on from it")
    print(f"train.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    leave(main())
