"""tools/exercise.py: is an exercise of exercises.md solved, in the files as they are now?

    python -m tools.exercise 3                          # checks your answer to exercise 3
    git apply exercises/03-mrr.patch                    # or a solution; git apply -R takes it back
    python -m tools.exercise 8 --base models/smollm2-135m-l6       # with a real model, not a tiny random one

Each check runs the lesson on a small input and compares with what follows from the definition. "Not yet"
comes with the first thing that differs, and exit code 2.
"""
import contextlib
import io
import json
import math
import signal
import tempfile
import weakref
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import evaluate
import generate
import model
import train
from plumbing.checkpoint import POOLINGS, find_model
from plumbing.errors import Parser, UserError, check, command
from plumbing.examples import Examples
from plumbing.files import write_json, write_jsonl
from plumbing.tasks import find_tasks

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests/data/run_of_2026_11/base"           # a random Mistral of two layers, a letter a token
TEXTS = ["a green tea", "rain falls on the roof", "a short one", "how to brew tea for two", "x"]


def close(found: float, wanted: float, tolerance=1e-4) -> bool:
    return abs(found - wanted) <= tolerance * max(1, abs(wanted))


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((found - wanted).norm() / wanted.norm())


def flags_of(base, folder: Path) -> list[str]:
    """train.py's flags that must be there."""
    return ["--base", str(base), "--data", str(folder / "examples.jsonl"), "--out", str(folder / "run")]


def one_step(base, folder: Path, examples: list[dict], *flags) -> dict:
    """One step of train.py on so many examples -> its line of the log."""
    write_jsonl(folder / "examples.jsonl", examples)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([*flags_of(base, folder), "--batch-size", str(len(examples)), "--max-steps", "1",
                    "--max-length", "32", "--device", "cpu", "--overwrite", *flags])
    for number, handler in before.items():               # train.py listens to them
        signal.signal(number, handler)
    return json.loads((folder / "run/log.jsonl").read_text())


def eight_examples() -> list[dict]:
    return [{"prompt": "find it", "query": f"query {i}", "pos": [f"answer {i}"], "neg": [f"wrong {i}"],
             "type": "short-long"} for i in range(8)]


# ------------------------------------------------------------------------------------------- the ten checks

def first_token(base, folder):
    check("first" in POOLINGS, 'there is no pooling "first" yet: POOLINGS, in plumbing/checkpoint.py')
    embedder = model.Embedder.load(base, device="cpu", pooling="first")
    vectors = embedder.encode(TEXTS, normalize=False)
    bos = embedder.decoder.config.bos_token_id
    with torch.no_grad():
        wanted = embedder.decoder(torch.tensor([[bos]]))[0, 0]
    for text, vector in zip(TEXTS, vectors):
        check(far(vector, wanted) < 1e-4, f"{text!r}: its vector is not the state at the first token")
    line = one_step(base, folder, eight_examples(), "--pooling", "first")
    check(close(line["loss"], line["chance_loss"]),
          f"the loss {line['loss']:.4f} is not that of equal vectors")
    return f"all vectors are equal: loss {line['loss']:.4f}, which is log 16; accuracy {line['accuracy']}"


def no_eos(base, folder):
    embedder = model.Embedder.load(base, device="cpu")
    eos = embedder.decoder.config.eos_token_id
    ids = embedder.tokenize(TEXTS, "find it")
    check(not any(row[-1] == eos for row in ids), "the last id is still EOS")
    bos = embedder.decoder.config.bos_token_id
    whole = [embedder.tokenizer.encode(model.instruct("find it", text), add_special_tokens=False).ids
             for text in TEXTS]
    check(ids == [[bos, *text_ids] for text_ids in whole], "more than EOS is gone: BOS and text should stay")
    return f"{TEXTS[0]!r} is {len(ids[0])} ids, the last of them the text's"


def mrr(base, folder):
    rows = []
    for i, text in enumerate(TEXTS[:4]):
        others = TEXTS[:i] + TEXTS[i + 2:]
        rows.append({"query": text, "positive": [TEXTS[i + 1]], "negative": [*others, "a", "b c"]})
    rows[0]["negative"].append(TEXTS[1])                 # a tie with the positive
    rows.append({"query": "tea", "positive": ["z"], "negative": ["tea", *(f"tea {i}" for i in range(12))]})
    write_json(folder / "task.json", {"name": "Small", "kind": "reranking"})
    write_jsonl(folder / "test.jsonl", rows)
    args = evaluate.options([str(base), "--tasks", str(folder)])
    embedder = model.Embedder.load(base, device="cpu")
    [task] = find_tasks([str(folder)])
    with contextlib.redirect_stdout(io.StringIO()):
        scores = evaluate.score_reranking(task, evaluate.Encoder(embedder, args))
    check("mrr_at_10" in scores, f"score_reranking gives {', '.join(scores)}, and no mrr_at_10 yet")
    ranks = []
    for row in rows:
        cosines = embedder.encode(row["positive"] + row["negative"]) @ embedder.encode([row["query"]])[0]
        ranks.append(1 + int((cosines[1:] > cosines[0] - 1e-6).sum()))
    wanted = float(np.mean([1 / rank if rank <= 10 else 0.0 for rank in ranks]))
    check(close(scores["mrr_at_10"], wanted),
          f"mrr_at_10 {scores['mrr_at_10']:.4f}, but positives at ranks {ranks} make {wanted:.4f}")
    return f"positives at ranks {ranks}: MRR@10 {wanted:.4f}"


def seventh_type(base, folder):
    prompts = generate.load_prompts()
    types = prompts["task_types"]
    check(len(types) == 7, f"prompts/values.json has {len(types)} types of task, and no seventh yet")
    total = sum(task_type["weight"] for task_type in types.values())
    check(close(total, 1), f"the seven weights sum to {total:g}, not to 1: make room for the new one")
    kind = list(types)[-1]
    keys = types[kind]["keys"]
    pools = {name: ["Given a question, find it."] for name in types}
    requests = [generate.request_at(i, 0, prompts, [(500, pools)], {"m": 1}) for i in range(500)]
    drawn = [request for request in requests if request["type"] == kind]
    check(drawn, f"{kind}: not drawn in 500 requests")
    message = generate.render(prompts, drawn[0])
    for key in keys:
        check(f'"{key}"' in message, f'prompts/{kind}.txt does not ask for "{key}"')
    texts = ["Как прочитать файл построчно?",            # code may stand under a question in any language
             "for (;;) { if (!read(f)) break; n += 1; }",
             "for (;;) { if (!seek(f)) break; m -= 2; }"][:len(keys)]
    row = {**drawn[0], "response": json.dumps(dict(zip(keys, texts)))}
    row["params"]["language"] = "Russian"
    example, _ = generate.make_example(row, prompts)
    found = [example["query"], *example["pos"], *example["neg"]]
    check(example["type"] == kind and found == texts, f"an answer became {example}")
    with contextlib.redirect_stdout(io.StringIO()):
        generate.main(["--model", "m", "--n", "100", "--dry-run", "--out", str(folder / "new.jsonl")])
    return f"{kind}: {len(drawn)} of 500 requests, and an answer becomes an example"


def instruction_on_both_sides(base, folder):
    flags = flags_of(base, folder)
    both, one = train.options([*flags, "--both-sides"]), train.options(flags)
    none = train.options([*flags, "--both-sides", "--instruction", "none"])
    for kind in ("sts", "short-long", "long-short", None):
        example = {"prompt": "find it", "type": kind}
        check(train.document_instruction(example, one) == "", "without --both-sides a document stays bare")
        check(train.document_instruction(example, none) == "", "--instruction none leaves all texts bare")
        check(train.document_instruction(example, both) == "find it",
              f"with --both-sides a document of type {kind} is still bare")
    return "with --both-sides documents of every type carry the instruction"


def in_play(base, folder):
    hot, cold = (one_step(base, folder, eight_examples(), "--temperature", t) for t in ("1000", "0.0001"))
    check("negatives_in_play" in hot, "a step's line of the log has no negatives_in_play yet")
    check(close(hot["negatives_in_play"], 15, 1e-3),
          f"at temperature 1000 all 15 negatives push alike; it is {hot['negatives_in_play']:.3f}")
    check(cold["negatives_in_play"] < 2,
          f"at temperature 0.0001 one does all the pushing; it is {cold['negatives_in_play']:.3f}")
    usual = one_step(base, folder, eight_examples())["negatives_in_play"]
    return f"of 15 negatives, {usual:.1f} are in play at temperature 0.02"


def floor(base, folder):
    examples = []
    for i in range(8):
        label, other = ("yes", "no") if i % 2 else ("no", "yes")
        examples.append({"prompt": "yes or no", "query": f"text {i}", "pos": [label], "neg": [other]})
    masked = one_step(base, folder, examples)
    check("floor" in masked, "a step's line of the log has no floor yet")
    check(masked["floor"] == 0, f"with the mask a perfect model has loss 0, not {masked['floor']}")
    bare = one_step(base, folder, examples, "--no-mask")
    check(close(bare["floor"], math.log(8)),          # a label stands under 4 queries' pos and 4 others' neg
          f"without it, 8 of 16 documents equal the positive: log 8 = 2.0794, not {bare['floor']:.4f}")
    return "0 with the mask; without it log 8 = 2.0794, beside log 16 = 2.7726 by chance"


def one_graph(base, folder):
    embedder = model.Embedder.load(base, device="cpu")
    embedder.decoder.add_lora(rank=4, dropout=0.0)
    embedder.decoder.train()
    for module in embedder.decoder.modules():            # B starts at zero, and so A's gradient would be
        if getattr(module, "lora_B", None) is not None:
            torch.nn.init.normal_(module.lora_B, std=0.1, generator=torch.Generator().manual_seed(0))
    ids = embedder.tokenize([letter * 12 for letter in "abcdefghijklmnop"])
    chunks = [train.Chunk(ids[i:i + 2], torch.arange(i, i + 2), 0) for i in range(0, 16, 2)]

    def loss(vectors):
        return train.info_nce(vectors[:8], vectors[8:], torch.arange(8), 0.02)

    parameters = list(embedder.decoder.lora_parameters().values())

    def gradient(run):
        for parameter in parameters:
            parameter.grad = None
        run()
        return torch.cat([parameter.grad.flatten() for parameter in parameters])

    def idea():
        train.cached_gradient_idea(embedder.embed, [chunk.token_ids for chunk in chunks], loss)

    def step():
        train.cached_gradients(embedder.embed, chunks, torch.zeros(16, size), loss)

    size = embedder.decoder.config.hidden_size
    wanted, found = gradient(idea), gradient(step)
    check(far(found, wanted) < 1e-3, f"the gradient is off by {far(found, wanted):.2g} of its size")
    one = graph_bytes(embedder.decoder, lambda: embedder.embed(chunks[0].token_ids).sum().backward())
    all_of_them = graph_bytes(embedder.decoder, step)
    words = f"8 chunks, and {all_of_them / one:.1f} times the {one:,} bytes of one's graph at a time"
    check(all_of_them > 6 * one, f"the cache is still there: {words}")
    return words


def graph_bytes(decoder, run) -> int:
    """The most bytes, weights apart, that autograd kept for backward at a time while `run` ran."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    kept = {}                                       # a storage's address -> [bytes, how often it is kept]
    most = 0

    class Handle:
        """Stands for a tensor in the graph, and goes with it."""
        def __init__(self, tensor):
            self.tensor = tensor

    def drop(address):
        kept[address][1] -= 1
        if kept[address][1] == 0:
            del kept[address]

    def pack(tensor):
        nonlocal most
        handle, storage = Handle(tensor), tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in weights:
            kept.setdefault(address, [storage.nbytes(), 0])[1] += 1
            weakref.finalize(handle, drop, address)
            most = max(most, sum(size for size, _ in kept.values()))
        return handle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda handle: handle.tensor):
        run()
    return most


def accumulation(base, folder):
    flags = [*flags_of(base, folder), "--max-length", "32", "--temperature", "1"]
    whole = train.options(flags)
    check("accumulate" in whole, "train.py has no flag --accumulate yet")
    small = train.options([*flags, "--accumulate", "4"])
    examples = eight_examples()
    del examples[1]["neg"]                               # so query 2's hard negative is document 8 + 1
    line = one_step(base, folder, examples, "--accumulate", "4")
    chance = np.log([3, 3, 4, 4, 4, 4, 4, 4]).mean()     # a query's documents: 2 positives, 2 or 1 negatives
    check(close(line["chance_loss"], chance),
          f"of 4 small batches, 3 have 4 documents, 1 has 3: chance_loss {chance:.4f}, not "
          f"{line['chance_loss']:.4f}")
    embedder = model.Embedder.load(base, device="cpu", max_length=32)
    data = Examples([str(folder / "examples.jsonl")])

    def loss(numbers, args):
        return loss_of(embedder, train.prepare(data, numbers, embedder.tokenize, args, step=0), args)

    accumulated = loss(range(8), small)
    mean = sum(loss(range(first, first + 2), whole) for first in (0, 2, 4, 6)) / 4
    check(close(accumulated, mean), f"the loss {accumulated:.4f}; the mean of 4 small batches: {mean:.4f}")
    return (f"the loss is the mean of 4 small batches', {mean:.4f}; the whole batch's is "
            f"{loss(range(8), whole):.4f}")


def loss_of(embedder, batch, args) -> float:
    vectors = torch.zeros(batch.text_count, embedder.decoder.config.hidden_size)
    with torch.no_grad():
        vectors[batch.indices] = embedder.embed(batch.token_ids)
    return float(train.batch_loss(vectors, batch.query_count, batch.valid, args))


def attention_sink(base, folder):
    generator = torch.Generator().manual_seed(0)
    for length, window in ((7, 8), (9, 8), (16, 8), (17, 8), (40, 8), (5, 1)):
        q, k, v = torch.randn(3, 2, 2, length, 4, generator=generator, dtype=torch.float64)
        query, key = torch.arange(length)[:, None], torch.arange(length)
        in_window = (key <= query) & (key > query - window)
        found = model.causal_attention(q, k, v, window)
        plain = F.scaled_dot_product_attention(q, k, v, in_window)
        check(length <= window or far(found, plain) > 1e-6,
              "a position past the window does not see the first one yet")
        wanted = F.scaled_dot_product_attention(q, k, v, in_window | (key == 0))
        check(far(found, wanted) < 1e-9,
              f"{length} positions, window {window}: off by {far(found, wanted):.2g} from a whole mask's")
    return "each position sees its window and the first position: equal to attention with a whole mask"


CHECKS = [first_token, no_eos, mrr, seventh_type, instruction_on_both_sides, in_play, floor, one_graph,
          accumulation, attention_sink]


def main(argv=None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("number", type=int, choices=range(1, len(CHECKS) + 1), help="of the exercise")
    parser.add_argument("--base", default=TINY, type=Path, help="a model (default: a tiny random one)")
    args = parser.parse_args(argv)
    find_model(args.base)                                # a wrong path is no wrong answer
    with tempfile.TemporaryDirectory() as folder:
        try:
            words = CHECKS[args.number - 1](args.base, Path(folder))
        except UserError as error:
            raise UserError(f"exercise {args.number}, not yet: {error}") from None
    print(f"exercise {args.number}, solved: {words}")


if __name__ == "__main__":
    command(main)
