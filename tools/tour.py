"""tools/tour.py: one example's life, from the prompt to a search, in real values.

    make tour                       # after `make base`; seconds
    make tour EXAMPLE=4             # another recorded answer, by its id
    python -m tools.tour --example 4 --model runs/demo --answers data/llm/raw.jsonl

Nothing is computed here that a lesson computes: messages and examples are generate.py's, batch, mask and
loss train.py's, tokens and vectors model.py's, and a search is ranked as evaluate.py ranks it. README shows
what this prints, and a test holds it to that.
"""
import json
import math
import tempfile
import textwrap
from pathlib import Path

import torch

import generate
import train
from model import Embedder
from plumbing import metrics
from plumbing.answers import Reject, parse_tasks
from plumbing.checkpoint import find_model
from plumbing.errors import Parser, check, command
from plumbing.examples import Examples
from plumbing.texts import normalize
from tools.workflow import DEMO

BATCH = 4                             # queries: a loss that can be checked by hand
SEARCHED = 50                         # examples whose documents the query is searched among
WIDTH = 115


# ---------------------------------------------------------------------------------------------- printing

def title(words: str) -> None:
    print()
    show(words, indent="")


def show(text: str, indent="    ", further=None) -> None:
    """Print a text, its long lines broken at spaces."""
    further = indent if further is None else further
    for line in text.splitlines():
        print(textwrap.fill(line, WIDTH, initial_indent=indent, subsequent_indent=further,
                            break_long_words=False, break_on_hyphens=False) if line else "")


def quoted(text: str, most=40) -> str:
    """A text in quotes, cut to `most` characters."""
    return json.dumps(text if len(text) <= most else text[:most - 3] + "...", ensure_ascii=False)


# ------------------------------------------------------------------------- from the prompt to the example

def answer_of(rows: list[dict], example: str, source) -> dict:
    """The answer to request `example` of step 2."""
    numbers = [row["id"] for row in rows if row["step"] == "generate"]
    check(numbers, f"--answers {source}: it has no answer of step 2, which is what an example is made of")
    chosen = [row for row in rows if row["step"] == "generate" and str(row["id"]) == example]
    check(chosen, f"--example {example}: {source} has no answer of that id; {numbers[0]} is one")
    return chosen[-1]


def show_data(row: dict, rows: list[dict], prompts: dict) -> None:
    """Task, message, answer, training line."""
    task = row["params"].get("task")
    if task:
        brainstorms = [other for other in rows if other["step"] == "brainstorm" and
                       normalize(task) in map(normalize, parse_tasks(other["response"]))]
        title("1. A task, brainstormed")
        show(task)
        for brainstorm in brainstorms[:1]:
            number = len(parse_tasks(brainstorm["response"]))
            show(f"(one of {number} in the answer to request {brainstorm['id']})")
    else:
        title("1. A task")
        show(generate.instruction_of(row, prompts))
        show("(all requests of this type have it)")

    title("2. The message, as sent")
    show(generate.message_of(row, prompts))

    title("3. The LLM's answer")
    show(row["response"])


def read_examples(rows: list[dict], row: dict, prompts: dict, file: Path) -> tuple[Examples, int]:
    """All examples, as train.py reads them from the file that generate.py writes, and which one is the
    row's."""
    generate.write_examples(rows, prompts, file)
    for number, line in enumerate(file.read_bytes().splitlines()):
        if json.loads(line)["id"] == row["id"]:
            title("4. The training line that is made of it")
            show(line.decode())
            return Examples([str(file)]), number
    reason = "duplicate"
    try:
        generate.make_example(row, prompts)
    except Reject as reject:
        reason = str(reject)
    check(False, f"--example {row['id']}: its answer became no example: {reason}")


# --------------------------------------------------------------------------------- from tokens to the loss

def companions(examples: Examples, first: int) -> list[int]:
    """The numbers of a batch: the example, then those after it that are the most like it."""
    lines = [json.loads(examples.line(number)) for number in range(len(examples))]
    own = lines[first]

    def unlike(number):
        differs = [lines[number][key] != own[key] for key in ("type", "prompt", "language")]
        return differs, (number - first) % len(lines)

    others = sorted((number for number in range(len(lines)) if number != first), key=unlike)
    return [first, *others[:BATCH - 1]]


def show_tokens(embedder: Embedder, ids: list[int], what: str) -> None:
    """Token ids with their texts; in the middle of a long one, ids alone."""
    config = embedder.decoder.config
    special = {config.bos_token_id: "BOS", config.eos_token_id: "EOS"}
    texts = [quoted(embedder.tokenizer.decode([i])).replace(" ", "·") for i in ids]
    words = [f"{i}={special.get(i, text)}" for i, text in zip(ids, texts)]
    if len(words) > 20:
        words = [*words[:10], *map(str, ids[10:-4]), *words[-4:]]
    show(f"{what}, {len(ids)}: {', '.join(words)}", further=" " * 8)


def vectors_of(embedder: Embedder, batch: train.Batch, args) -> torch.Tensor:
    """The vectors of a batch's texts [N, D], as the first pass of a step makes them, without dropout."""
    embedder.decoder.eval()
    vectors = torch.zeros(batch.text_count, embedder.decoder.config.hidden_size)
    with torch.no_grad():
        for chunk in train.make_chunks(batch, args.tokens_per_chunk, embedder.device):
            vectors[chunk.indices] = embedder.embed(chunk.token_ids)
    return vectors


def losses_of(vectors, batch: train.Batch, temperature: float) -> tuple[float, list[float]]:
    """(the batch's loss, that of each query)."""
    queries, documents = vectors.tensor_split([batch.query_count])
    targets = torch.arange(batch.query_count)
    each = [train.info_nce(queries[i:i + 1], documents, targets[i:i + 1], temperature, batch.valid[i:i + 1])
            for i in range(batch.query_count)]
    whole = train.info_nce(queries, documents, targets, temperature, batch.valid)
    return whole.item(), [loss.item() for loss in each]


def columns(values, form: str) -> str:
    return "".join(f"{format(value, form):>10}" for value in values)


def show_batch(trained: Embedder, untrained: Embedder, examples: Examples, chosen: list[int], args) -> None:
    """Tokens, scores, mask, loss and vector."""
    batch = train.prepare(examples, chosen, trained.tokenize, args, step=0)
    ids = dict(zip(batch.indices.tolist(), batch.token_ids))             # which of the N texts -> its tokens
    Q, M = batch.valid.shape

    title(f"5. Token ids, at most {args.max_length} a text")
    show_tokens(trained, ids[0], "query")
    show_tokens(trained, ids[Q], "positive")

    title(f"6. A batch of {Q}, this example and the next {Q - 1} like it: cosines of queries and documents")
    texts = [trained.tokenizer.decode(ids[text][1:-1]).rpartition("\nQuery: ")[2] for text in range(Q + M)]
    listed = [f"{number} {quoted(text)}" for number, text in enumerate(texts[:Q])]
    show("queries: " + ", ".join(listed), further=" " * 8)
    listed = [f"{number} {quoted(text)}" for number, text in enumerate(texts[Q:])]
    show("positives: " + ", ".join(listed[:Q]), further=" " * 8)
    if M > Q:
        show("hard negatives: " + ", ".join(listed[Q:]), further=" " * 8)
    vectors = vectors_of(trained, batch, args)
    queries, documents = vectors.tensor_split([Q])
    cosines = queries @ documents.T                                              # [Q, M]
    print(f"    {'document':9}" + columns(range(M), "d"))
    for query in range(Q):
        print(f"    query {query:<3}" + columns(cosines[query].tolist(), ".5f"))

    own = cosines[0, 0].item()
    counts = batch.valid[0].tolist()
    terms = [math.exp((cosine - own) / args.temperature) for cosine in cosines[0].tolist()]
    terms = [term * count for term, count in zip(terms, counts)]
    loss, losses = losses_of(vectors, batch, args.temperature)
    before, _ = losses_of(vectors_of(untrained, batch, args), batch, args.temperature)
    title("7. The loss of query 0. The mask is 0 where a document besides its own is known to answer it")
    print(f"    {'mask':9}" + columns(counts, "d"))
    print(f"    {'exp':9}" + columns(terms, ".4f"))
    print(f"    of (cosine - the positive's) / {args.temperature}; their sum is {sum(terms):.4f}, and the "
          f"loss log(sum) = {losses[0]:.4f}")
    added = " + ".join(f"{value:.4f}" for value in losses)
    print(f"    the batch's, a mean over queries: ({added}) / {Q} = {loss:.4f}")
    print(f"    the same batch before training: {before:.4f}")

    values = " ".join(f"{value:.4f}" for value in queries[0, :8].tolist())
    title(f"8. The query's vector: {queries.shape[1]} values, of length 1; pooling: {trained.pooling}")
    print(f"    {values} ...")


# ------------------------------------------------------------------------------------------------- a search

def show_search(trained: Embedder, untrained: Embedder, examples: Examples, first: int, args) -> None:
    """The rank of the example's positive among the documents of its type, before training and after."""
    own = examples[first]
    documents = {}                                           # (instruction, text), each once, in order
    alike = [examples[number] for number in range(len(examples))
             if examples.groups[number] == examples.groups[first]]
    for example in [own, *alike[:SEARCHED]]:
        for text in [*example["pos"], *example["neg"]]:
            documents[train.document_instruction(example, args), text] = None
    instructions, texts = zip(*documents)
    relevance = {str(list(documents).index((train.document_instruction(own, args), own["pos"][0]))): 1}

    title(f"9. A search in {len(texts)} {own['type']} documents; nDCG@10: 1 / log2(1 + rank), "
          "0 past rank 10")
    print(f"    {'cosines':12}{'lowest':>10}{'median':>10}{'highest':>10}"
          f"{'positive':>10}{'rank':>7}{'nDCG@10':>10}")
    for name, embedder in {"untrained": untrained, "trained": trained}.items():
        query = embedder.encode([own["query"]], train.with_instruction(own, args.instruction)[0])
        cosines = (query @ embedder.encode(list(texts), list(instructions)).T)[0]
        scores = {str(number): score for number, score in enumerate(cosines.tolist())}
        ranking = metrics.trec_ranking(scores)
        [positive] = relevance
        print(f"    {name:12}" + columns([cosines.min(), cosines.median(), cosines.max()], ".4f")
              + f"{scores[positive]:>10.4f}{ranking.index(positive) + 1:>7}"
              + f"{metrics.ndcg(relevance, ranking, 10):>10.4f}")


# ---------------------------------------------------------------------------------------------------- main

def main(argv=None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--example", default="2648", metavar="ID", help="of a request of step 2, answered")
    parser.add_argument("--answers", type=Path, default="data/recorded.jsonl.gz",
                        help="recorded answers, or a run's raw.jsonl")
    parser.add_argument("--model", type=Path, default="data/adapter", help="a run or an adapter")
    args = parser.parse_args(argv)
    base, adapter = find_model(args.model)
    check(adapter, f"--model {args.model}: a base without an adapter; a run or an adapter is wanted")
    prompts = generate.load_prompts()
    rows = list(generate.read_answers(args.answers, prompts, log=args.answers.suffix != ".gz"))
    row = answer_of(rows, args.example, args.answers)

    show_data(row, rows, prompts)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "examples.jsonl")
        examples, first = read_examples(rows, row, prompts, file)
        recipe = DEMO.format(steps=1, dtype="float32").split()
        settings = train.options(["--base", str(base), "--data", str(file), "--out", folder, *recipe])
        common = {"device": "cpu", "dtype": "float32", "max_length": settings.max_length}
        trained = Embedder.load(args.model, **common)
        untrained = Embedder.load(base, pooling=trained.pooling, **common)
        show_batch(trained, untrained, examples, companions(examples, first), settings)
        show_search(trained, untrained, examples, first, settings)


if __name__ == "__main__":
    command(main)
