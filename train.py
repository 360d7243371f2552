"""train.py: examples -> adapter. Contrastive fine-tuning (arXiv 2401.00368, sections 3.2, 4.2, appendix A).

    python train.py --base models/smollm2-135m-l6 --data data/english.jsonl --out runs/mine \\
        --batch-size 32 --max-length 64 --lr 1e-3 --warmup-steps 10                   # a CPU, minutes
    python train.py --base models/mistralai/Mistral-7B-v0.1 --data data/synthetic.jsonl \\
        --out runs/paper                                                              # one GPU
    torchrun --nproc-per-node 8 train.py --base ... --data a.jsonl:0.5 --data b.jsonl --out ...   # eight

In: a base model, and examples as JSON lines, {"prompt", "query", "pos": [..], "neg": [..], "type"}; the type
is that of generate.py's task, such as "sts". Out: a run's folder with a LoRA adapter.

Read it in this order: the loss; the cached gradient, by which a batch of 2,048 queries fits; which examples
make a batch; one step; the loop. The flags come last; their defaults are the paper's recipe. The mask is on
by default, too, though the paper does not speak of one.

Left to plumbing/: examples.py reads examples from files of any size, run.py keeps a run safe (folder,
checkpoints, log, signals), ranks.py sums over the processes of torchrun. No formula of the method is there.

Letters for shapes: Q queries and M documents of a batch, N = Q + M texts, D the size of a vector.
"""
import math
import time
from argparse import BooleanOptionalAction
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import Embedder, at_least_float32, length_chunks, to_device
from plumbing.checkpoint import POOLINGS, stored_pooling
from plumbing.errors import (Parser, at_least_0, check, command, finite, lora_rank, positive, probability,
                             seed)
from plumbing.examples import Examples
from plumbing.files import text_hash
from plumbing.ranks import rank, start_ranks, sum_over_ranks, world_size
from plumbing.run import Run


# ------------------------------------------------------------------------------------------------ the loss

def info_nce(queries, documents, targets, temperature: float, valid=None, margin=None):
    """The loss of section 3.2, Eq. 2 and 3.

    It is the mean over queries of -log softmax(cosine / temperature) at the query's own positive.

    queries [Q, D] and documents [M, D]: unit rows. targets [Q]: the column of each query's positive. valid
    [Q, M] bool: the documents that count for a query. margin: leave out negatives whose cosine is above the
    positive's + margin.

    >>> e = torch.eye(2)
    >>> info_nce(e, e, torch.tensor([0, 1]), 1.0)        # log(1 + exp(0 - 1))
    tensor(0.3133)
    """
    cosine = at_least_float32(queries) @ at_least_float32(documents).T                   # [Q, M]
    if margin is not None:
        valid = without_close_negatives(cosine, targets, valid, margin)
    logits = cosine / temperature
    if valid is not None:
        logits = logits.masked_fill(~valid, -torch.inf)
    return F.cross_entropy(logits, targets)


def without_close_negatives(cosine, targets, valid, margin: float):
    """valid [Q, M] without negatives that score above a query's positive by more than the margin."""
    own = cosine.gather(1, targets[:, None])                                             # [Q, 1]
    close = cosine > own + margin
    close.scatter_(1, targets[:, None], False)                                   # the target always counts
    return ~close if valid is None else valid & ~close


def matryoshka(loss, queries, documents, dims: list[int]):
    """The mean of loss(queries, documents) over the full vectors and their first n values, n in dims."""
    losses = [loss(queries, documents)]
    for n in dims:
        short_queries = F.normalize(queries[:, :n], dim=-1)
        short_documents = F.normalize(documents[:, :n], dim=-1)
        losses.append(loss(short_queries, short_documents))
    return torch.stack(losses).mean()


def in_batch_accuracy(queries, documents, targets, valid):
    """Share of queries whose positive scores above every other valid document; a tie or NaN is a miss."""
    cosine = (queries @ documents.T).masked_fill(~valid, -torch.inf)                     # [Q, M]
    own = cosine.gather(1, targets[:, None])
    others = cosine.scatter(1, targets[:, None], -torch.inf)
    return (own > others).all(1).float().mean()


def spread(vectors):
    """1 - |mean|^2 of unit rows [N, D]: their mean cosine distance. 0: collapse, 1: evenly spread."""
    return 1 - vectors.mean(0).square().sum()


# ------------------------------------------------------------------------------------ the cached gradient

def cached_gradient_idea(embed, chunks: list, loss) -> None:
    """The idea in three steps (arXiv 2101.06983); `cached_gradients` adds what a real run needs.

    The loss needs all vectors at once, but not all graphs. By the chain rule, dL/dweights is the sum over
    chunks of dL/dvectors times dvectors/dweights, so one chunk's graph in memory is enough.

    embed: a chunk of texts -> vectors [n, D]. loss: all vectors [N, D] -> scalar. Adds to the weights'
    .grad.
    """
    # 1. Embed all texts, without a graph.
    with torch.no_grad():
        vectors = torch.cat([embed(chunk) for chunk in chunks])                          # [N, D]
    # 2. The gradient of the loss with respect to each vector.
    vectors.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(vectors), vectors)                            # [N, D]
    # 3. Embed each chunk again, with its graph, and push its part of the gradient through.
    for chunk, its_gradient in zip(chunks, gradient.split([len(chunk) for chunk in chunks])):
        embed(chunk).backward(its_gradient)


# Why not accumulate gradients? In 64 batches of 32, a query would have the negatives of 32 queries, and not
# of 2,048.
#
# What does caching cost? One more forward. With LoRA a token costs 4 FLOPs for each of the base's P weights:
# 2P forward and 2P backward, since frozen weights need no gradient of their own. The second forward makes
# it 6P.
#
# What a real run adds:
# - Chunks hold texts of similar length, so the order changes: each chunk knows which of the N it holds.
# - Dropout must draw the same masks in both passes: `seed_chunk`.
# - Where memory allows, the first chunks keep the graph of the first pass and need no second.
# - Several GPUs. Each embeds its share of the texts and leaves zeros for the others', so that a sum over the
#   ranks gives every rank all N vectors. Each computes the same loss and pushes its own texts' gradients
#   through; then the weights' gradients are summed, once a step. DDP would sum them at every chunk's
#   backward.
# - float16: the gradients are multiplied by a scale, or small ones would be zero.

@dataclass
class Chunk:
    """Texts that are embedded together."""
    token_ids: list[list[int]]      # of n texts
    indices: torch.Tensor           # [n] on the device: which of the batch's N texts they are
    tokens: int                     # padding included


def seed_chunk(*key: int) -> None:
    """Make LoRA's dropout a function of (seed, step, rank, chunk): pass two draws the masks of pass one."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)           # the key, mixed into 64 bits
    torch.manual_seed(int(state[0]))


def cached_gradients(embed, chunks: list[Chunk], vectors, loss, kept=0, key=(0,), scale=1.0):
    """Add to .grad the gradient of loss(vectors [N, D]), with one chunk's graph in memory at a time.

    So section 4.2's batch of 2,048 queries needs the graph of one chunk.

    embed: token ids of n texts -> [n, D], in train mode. vectors: zeros [N, D]; they are filled here.
    kept: so many of the first chunks keep their graph. key: (seed, step, rank), from which dropout is
    seeded. Of several ranks, each adds what its own texts contribute. Returns the loss.
    """
    def embed_chunk(number):
        seed_chunk(*key, number)
        return embed(chunks[number].token_ids)

    # 1. Embed all texts. Only the first chunks keep their graph.
    graphs = {}
    for number, chunk in enumerate(chunks):
        with torch.set_grad_enabled(number < kept):
            v = embed_chunk(number)
        vectors[chunk.indices] = v.detach()
        if number < kept:
            graphs[number] = v
    sum_over_ranks(vectors)

    # 2. The gradient of the loss with respect to each vector.
    leaf = vectors.detach().requires_grad_()                                             # the same memory
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)                                       # [N, D]

    # 3. Push each chunk's part of it through its graph, kept or made again.
    for number, chunk in enumerate(chunks):
        v = graphs.pop(number) if number in graphs else embed_chunk(number)
        v.backward(gradient[chunk.indices] * scale)
    return value.detach()


def make_chunks(batch, tokens_per_chunk: int, device) -> list[Chunk]:
    """This rank's texts of a batch in chunks of similar length, the longest first."""
    lengths = [len(ids) for ids in batch.token_ids]
    groups = length_chunks(lengths, tokens_per_chunk)
    order = [i for group in groups for i in group]
    indices = to_device(batch.indices[order], device)                            # one copy for all chunks
    chunks = []
    for group, its_indices in zip(groups, indices.split([len(group) for group in groups])):
        token_ids = [batch.token_ids[i] for i in group]
        longest = len(token_ids[0])
        chunks.append(Chunk(token_ids, its_indices, longest * len(group)))
    return chunks


def chunks_to_keep(chunks: list[Chunk], keep_tokens: int) -> int:
    """How many of the first chunks may keep their graph: together at most keep_tokens tokens."""
    tokens = np.cumsum([chunk.tokens for chunk in chunks])
    return int(np.sum(tokens <= keep_tokens))


# ---------------------------------------------------------------------------- which examples make a batch

def plan_epoch(examples, batch_size: int, homogeneous: bool, seed: int, epoch: int) -> list:
    """The batches of one epoch as arrays of example numbers: a pure function of the arguments.

    So a run that was stopped continues with the batches that it would have seen, and every rank knows the
    others'. homogeneous: a batch holds one task type, and so harder negatives; what is left over is mixed.
    """
    rng = np.random.default_rng((seed, epoch))
    chosen = []
    for file, share in enumerate(examples.shares):       # of each file its share (Table 14), drawn anew
        numbers = rng.permutation(np.flatnonzero(examples.files == file))
        chosen.append(numbers[:math.ceil(share * len(numbers))])
    chosen = rng.permutation(np.concatenate(chosen))
    if not homogeneous:
        return in_batches(chosen, batch_size)

    batches, left_over = [], []
    for group in range(len(examples.group_names)):                   # full batches of one task type
        numbers = chosen[examples.groups[chosen] == group]
        full = len(numbers) // batch_size * batch_size
        batches += in_batches(numbers[:full], batch_size)
        left_over.append(numbers[full:])
    batches += in_batches(rng.permutation(np.concatenate(left_over)), batch_size)
    return [batches[i] for i in rng.permutation(len(batches))]


def in_batches(numbers, size: int) -> list:
    return [numbers[i:i + size] for i in range(0, len(numbers), size)]


def plan_run(examples, args) -> list:
    """The batches of all epochs, up to --max-steps."""
    batches = []
    for epoch in range(args.epochs):
        if args.max_steps and len(batches) >= args.max_steps:
            break
        batches += plan_epoch(examples, args.batch_size, args.batches == "homogeneous", args.seed, epoch)
    return batches[:args.max_steps]


def with_instruction(example: dict, style: str) -> tuple[str, str]:
    """(instruction, query) as section 3.2 has it, or as an ablation of Table 5 does."""
    if style == "task":
        return example["prompt"], example["query"]
    if style == "none" or example["type"] in ("sts", "bitext"):
        return "", example["query"]
    prefix = "classify: " if example["type"] == "long-short" else "query: "
    return "", prefix + example["query"]


def document_instruction(example: dict, args) -> str:
    """Empty, as in the paper; with --both-sides, the query's in the symmetric tasks, sts and bitext."""
    symmetric = example["type"] in ("sts", "bitext")
    if symmetric and args.both_sides and args.instruction == "task":
        return example["prompt"]
    return ""


@dataclass
class Batch:
    """The N texts of one step: Q queries, then M documents, the positives first, in the queries' order."""
    numbers: np.ndarray             # [Q] which examples
    token_ids: list[list[int]]      # of the n texts that this rank embeds
    indices: torch.Tensor           # [n] which of the N texts they are
    query_count: int                # Q
    text_count: int                 # N
    valid: torch.Tensor             # [Q, M] bool: which documents count for a query


def prepare(examples, numbers, tokenize, args, step: int, part=0, parts=1) -> Batch:
    """Read a batch, draw a positive and negatives for each query, mask, and tokenise one of `parts` parts.

    Every rank reads the whole batch, which is cheap, and so knows the mask without asking the others.
    """
    rng = np.random.default_rng((args.seed, step, 1))                # 1: another stream than plan_epoch's
    chosen_examples = [examples[number] for number in numbers]
    positives, negatives = [], []                                    # (instruction, text)
    for example in chosen_examples:
        drawn = rng.integers(len(example["pos"]))
        positives.append((document_instruction(example, args), example["pos"][drawn]))
    for example in chosen_examples:
        for drawn in rng.permutation(len(example["neg"]))[:args.negatives]:
            negatives.append((document_instruction(example, args), example["neg"][drawn]))
    queries = [with_instruction(example, args.instruction) for example in chosen_examples]
    documents = positives + negatives                                # so query i's own is document i

    if args.no_mask:
        valid = np.ones((len(queries), len(documents)), bool)
    else:
        valid = documents_that_count(examples, numbers, [text for _, text in documents])
    texts = queries + documents
    by_length = np.argsort([len(prompt) + len(text) for prompt, text in texts], kind="stable")
    indices = by_length[part::parts]                                 # each rank gets similar lengths
    token_ids = tokenize([texts[i][1] for i in indices], [texts[i][0] for i in indices])
    return Batch(numbers, token_ids, torch.from_numpy(indices), len(queries), len(texts),
                 torch.from_numpy(valid))


def documents_that_count(examples, numbers, documents: list[str]) -> np.ndarray:
    """The mask [Q, M]: False where a document is known as a positive of the query.

    Known means that any example calls it a positive of the same instruction and query. Such a document is
    no negative. The query's own positive stays True.
    """
    hashes = np.array([text_hash(text) for text in documents])
    valid = np.empty((len(numbers), len(hashes)), bool)
    for query, number in enumerate(numbers):
        known = examples.known_positives(number)                     # hashes
        valid[query] = ~np.isin(hashes, known)
        valid[query, query] = True
    return valid


def batches_ahead(examples, plan: list, first: int, tokenize, args):
    """Yield the batches of plan[first:]. While one is trained on, a thread reads and tokenises the next."""
    def prepare_step(step):
        return prepare(examples, plan[step], tokenize, args, step, rank(), world_size())

    with ThreadPoolExecutor(1) as thread:
        next_batch = thread.submit(prepare_step, first) if first < len(plan) else None
        for step in range(first, len(plan)):
            batch = next_batch.result()
            if step + 1 < len(plan):
                next_batch = thread.submit(prepare_step, step + 1)
            yield batch


# ------------------------------------------------------------------------------------------------ one step

def learning_rate(step: int, steps: int, args) -> float:
    """Linear up to --lr over the warm-up, then down, to 0 after the last (appendix A). step counts from 0.

    >>> from types import SimpleNamespace
    >>> [learning_rate(step, 6, SimpleNamespace(lr=1.0, warmup_steps=2)) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    return args.lr * (steps - step) / max(1, steps - args.warmup_steps)


def batch_loss(vectors, query_count: int, valid, args):
    """The loss of a whole batch: vectors [N, D], of which the first Q = query_count are the queries'."""
    targets = torch.arange(query_count, device=vectors.device)       # query i's positive is document i

    def loss(q, d):
        return info_nce(q, d, targets, args.temperature, valid, args.mask_margin)

    return matryoshka(loss, vectors[:query_count], vectors[query_count:], args.matryoshka)


def training_step(run: Run, batch: Batch, started: float) -> dict:
    """Gradients, their sum over the ranks, one update -> the step's line of the log."""
    args, device = run.args, run.embedder.device
    step = run.step - 1                                              # from 0, as the plan counts
    valid = to_device(batch.valid, device)

    def loss(vectors):
        return batch_loss(vectors, batch.query_count, valid, args)

    chunks = make_chunks(batch, args.tokens_per_chunk, device)
    kept = chunks_to_keep(chunks, args.tokens_per_chunk if args.keep_tokens is None else args.keep_tokens)
    vectors = torch.zeros(batch.text_count, run.embedder.decoder.config.hidden_size, device=device)
    scale = run.scaler.scale(torch.ones((), device=device))          # 1, except in float16
    run.optimizer.zero_grad(set_to_none=False)                   # a rank without texts joins the sum, too
    value = cached_gradients(run.embedder.embed, chunks, vectors, loss, kept, (args.seed, step, rank()),
                             scale)
    counts = to_device(run.counts(batch, chunks, kept), device)  # for the log: tokens, and signals to stop
    sum_over_ranks(*[parameter.grad for parameter in run.parameters], counts)

    lr = learning_rate(step, run.steps, args)
    run.optimizer.param_groups[0]["lr"] = lr
    run.scaler.unscale_(run.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(run.parameters, args.max_grad_norm or torch.inf)
    run.scaler.step(run.optimizer)                               # skips a step whose gradients overflowed
    run.scaler.update()

    queries, documents = vectors.tensor_split([batch.query_count])
    targets = torch.arange(batch.query_count, device=device)
    figures = {
        "loss": value,
        "accuracy": in_batch_accuracy(queries, documents, targets, valid),
        "spread": spread(vectors),
        "chance_loss": valid.sum(1).log().mean(),                    # the loss if all cosines were equal
        "grad_norm": grad_norm,
    }
    return run.line(figures, counts, lr, started)


def worst_step(run: Run) -> None:
    """The gradients of the largest step, before the first: a GPU that is too small fails now.

    That is: graphs of as many tokens as may keep theirs, and the vectors and scores of a whole batch.
    """
    args, device = run.args, run.embedder.device
    longest = min(args.max_length, run.examples.most_tokens)         # tokens of a text
    tokens = max(args.tokens_per_chunk, args.keep_tokens or 0, longest)
    texts = math.ceil(tokens / longest)
    token_ids = [[0] * (tokens // texts)] * texts                    # so long texts, so many tokens in all
    Q, M = args.batch_size, args.batch_size * (1 + args.negatives)
    indices = torch.arange(texts) % (Q + M)
    batch = Batch(np.arange(Q), token_ids, indices, Q, Q + M, torch.ones(Q, M, dtype=torch.bool))
    valid = to_device(batch.valid, device)
    chunks = make_chunks(batch, args.tokens_per_chunk, device)
    vectors = torch.zeros(Q + M, run.embedder.decoder.config.hidden_size, device=device)
    cached_gradients(run.embedder.embed, chunks, vectors, lambda v: batch_loss(v, Q, valid, args),
                     len(chunks))


def held_out_batches(examples: Examples | None, embedder: Embedder, args) -> list[Batch]:
    """The examples of --eval-data, if there are any, ready to be embedded at each --eval-every."""
    if not examples:
        return []
    plan = plan_epoch(examples, args.batch_size, homogeneous=False, seed=0, epoch=0)
    return [prepare(examples, numbers, embedder.tokenize, args, 0, rank(), world_size()) for numbers in plan]


@torch.no_grad()
def held_out(embedder: Embedder, batches: list[Batch], args) -> dict:
    """Mean loss and in-batch accuracy over held-out batches, without dropout, margin and cuts."""
    embedder.decoder.eval()
    total_loss = total_accuracy = visited = 0
    for batch in batches:
        vectors = torch.zeros(batch.text_count, embedder.decoder.config.hidden_size, device=embedder.device)
        for chunk in make_chunks(batch, args.tokens_per_chunk, embedder.device):
            vectors[chunk.indices] = embedder.embed(chunk.token_ids)
        sum_over_ranks(vectors)                                      # the ranks share the texts
        queries, documents = vectors.tensor_split([batch.query_count])
        targets = torch.arange(batch.query_count, device=embedder.device)
        valid = to_device(batch.valid, embedder.device)
        loss = info_nce(queries, documents, targets, args.temperature, valid)
        accuracy = in_batch_accuracy(queries, documents, targets, valid)
        total_loss += batch.query_count * loss.item()
        total_accuracy += batch.query_count * accuracy.item()
        visited += batch.query_count
    embedder.decoder.train()
    return {"eval_loss": total_loss / visited, "eval_accuracy": total_accuracy / visited}


# ------------------------------------------------------------------------------------------------ the loop

def load_model(args) -> Embedder:
    """The frozen base with an adapter to train: a fresh one, or --init-adapter's."""
    pooling = args.pooling
    if args.init_adapter and pooling is None:
        pooling = stored_pooling(args.init_adapter)                  # an adapter is trained for one
    embedder = Embedder.load(args.base, device=args.device, dtype=args.dtype, max_length=args.max_length,
                             pooling=pooling)
    decoder = embedder.decoder
    check(decoder.lora is None,
          f"--base {args.base}: has an adapter, which a fresh one would replace: to train on from it, "
          f"--base {embedder.base} --init-adapter {args.base}")
    for n in args.matryoshka:
        check(n <= decoder.config.hidden_size,
              f"--matryoshka {n}: a vector has {decoder.config.hidden_size} values")
    if args.init_adapter:
        decoder.load_lora(args.init_adapter)
    else:
        decoder.add_lora(args.lora_rank, args.lora_alpha, args.lora_dropout, seed=args.seed)
    decoder.activation_checkpointing = args.activation_checkpointing
    decoder.train()
    return embedder.compile(args.compile)


def start(args, embedder: Embedder, examples: Examples, steps: int) -> Run:
    """The run, ready for its next step: step 1, or the one after its checkpoint."""
    if args.instruction == "task":
        embedder.check_prompts(examples.prompts)
    parameters = embedder.decoder.lora_parameters().values()         # float32, and so are AdamW's moments
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    run = Run(args, embedder, optimizer, examples, steps)
    run.open()
    if embedder.device.type == "cuda":
        worst_step(run)
    return run


def train(args) -> int:
    """The whole run. Returns the exit code: 0, or 128 + the signal that stopped it after a checkpoint."""
    args.device = start_ranks(args.device, args.timeout)
    examples = Examples(args.data, args.prompt, args.skip_bad_lines)
    held_out_examples = None
    if args.eval_data:
        held_out_examples = Examples([str(args.eval_data)], args.prompt, args.skip_bad_lines)
    plan = plan_run(examples, args)
    embedder = load_model(args)
    held_out_set = held_out_batches(held_out_examples, embedder, args)
    run = start(args, embedder, examples, len(plan))                 # makes the folder: all else is checked

    started = time.perf_counter()
    for batch in batches_ahead(examples, plan, run.step, embedder.tokenize, args):
        run.step += 1
        line = training_step(run, batch, started)
        run.check_finite(line, batch)
        if held_out_set and run.step % args.eval_every == 0:
            line |= held_out(embedder, held_out_set, args)
        run.log(line)
        if run.step % args.checkpoint_every == 0 or run.step == run.steps or run.stopping:
            run.save()
        if run.stopping:
            break
        started = time.perf_counter()                    # a step's time: waiting for its batch, not saving
    return run.finish()


# ----------------------------------------------------------------------------------------------- the flags

def options(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    # what goes in, what comes out
    add("--base", required=True, help="folder of the base model (Hugging Face layout)")
    add("--data", required=True, action="append", metavar="FILE[:SHARE]",
        help="examples as JSON lines; FILE:0.5 uses half of the file, another half each epoch; repeatable")
    add("--out", required=True, type=Path, help="folder of the run")
    add("--resume", action="store_true",
        help="go on from the checkpoint in --out, if there is one (another --tokens-per-chunk draws other "
             "dropout)")
    add("--overwrite", action="store_true",
        help="replace a run in --out; with --resume: continue it, but replace it if other flags or data "
             "made it")
    add("--skip-bad-lines", action="store_true", help="count unusable lines, do not stop at the first")
    # the recipe: section 4.2 and appendix A
    add("--batch-size", type=positive(int), default=2048, help="queries a step, over all GPUs")
    add("--negatives", type=at_least_0(int), default=1,
        help="hard negatives a query, at most; drawn at each visit")
    add("--max-length", type=positive(int), default=512, help="tokens a text, BOS and EOS included")
    add("--temperature", type=positive(float), default=0.02)
    add("--lr", type=positive(float), default=1e-4)
    add("--warmup-steps", type=at_least_0(int), default=100,
        help="linear warm-up, then linear decay to zero")
    add("--weight-decay", type=at_least_0(float), default=0.1)
    add("--max-grad-norm", type=at_least_0(float), default=1.0,
        help="0: no clipping (the paper does not say)")
    add("--epochs", type=positive(int), default=1)
    add("--max-steps", type=positive(int), help="stop earlier; the decay ends there")
    add("--lora-rank", type=lora_rank, default=16)
    add("--lora-alpha", type=positive(float), default=32)
    add("--lora-dropout", type=probability, default=0.1)
    add("--init-adapter", type=Path, help="start from this adapter, with its rank, alpha and dropout")
    add("--seed", type=seed, default=0)
    # what the paper ablates or leaves open
    add("--pooling", choices=POOLINGS, help="default: --init-adapter's or --base's own, else last")
    add("--instruction", choices=("task", "none", "prefix"), default="task", help="before a query: Table 5")
    add("--both-sides", action="store_true",
        help="documents of sts and bitext get the instruction too, as in MTEB; the paper leaves them bare")
    add("--prompt", default="", help="instruction of examples that bring none")
    add("--batches", choices=("mixed", "homogeneous"), default="mixed",
        help="homogeneous: one task type (or file) a batch; the paper does not say")
    add("--no-mask", action="store_true",
        help="count known positives of the same query as negatives too; the paper does not say")
    add("--mask-margin", type=finite, help="drop negatives that score above the positive's cosine + margin")
    add("--matryoshka", type=positive(int), nargs="*", default=[], metavar="DIM",
        help="train these cuts too")
    # the machine
    add("--tokens-per-chunk", type=positive(int), default=8192,
        help="tokens with a graph in memory: lower it if memory runs out; the loss stays the same")
    add("--keep-tokens", type=at_least_0(int),
        help="tokens whose graph is kept, so that they are embedded once (default: one chunk's)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the device's best")
    add("--device", help="cuda, cpu, cuda:1 (default: CUDA where there is one)")
    add("--compile", action=BooleanOptionalAction, help="each block (default: on CUDA)")
    add("--activation-checkpointing", action="store_true",
        help="less memory, one more forward pass: lower --tokens-per-chunk first")
    add("--timeout", type=positive(float), default=30, metavar="MINUTES",
        help="for a rank that no longer answers")
    add("--checkpoint-every", type=positive(int), default=50, metavar="STEPS")
    add("--eval-data", type=Path, help="held-out examples, scored every --eval-every steps")
    add("--eval-every", type=positive(int), default=50, metavar="STEPS")
    add("--peak-tflops", type=positive(float),
        help="the GPU's dense peak in 16 bits, for MFU (default: by its name)")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    return train(options(argv))


if __name__ == "__main__":
    command(main)
