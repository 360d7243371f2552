"""generate.py: prompts -> training data, written by an LLM (arXiv 2401.00368, section 3.1).

    python generate.py --replay data/recorded.jsonl.gz     # recorded answers -> data/synthetic.jsonl
    export OPENAI_API_KEY=... OPENAI_BASE_URL=https://...  # any server with OpenAI's API; OpenAI if unset
    python generate.py --model gpt-4o-mini --dry-run       # sample prompts, tokens, money, time; no network
    python generate.py --model gpt-4o-mini --n 1000 --price gpt-4o-mini:0.15:0.60 --budget-usd 2
    python generate.py --model a:0.75 --model b:0.25 --n 500_000   # the paper's scale; run again to resume
    python generate.py --report                            # what there is, beside the paper's figures

In goes the folder prompts/; out comes --out, one training example a line:

    {"prompt": instruction, "query": text, "pos": [text], "neg": [text] or [], "type", "language", "id"}

Read it in this order: the flags, the six types of task, how a request is drawn, step 1 (tasks), step 2
(examples), the request as it goes over the wire, how an answer becomes an example, the file of examples,
the whole run.

What it leaves to plumbing/, because none of it is the method:

    client.py     asks again where a server fails; threads.py asks many at once
    ledger.py     keeps the answers and the budget, in a folder named like --out without .jsonl
    answers.py    finds the JSON in an answer and repairs it
    report.py     counts, and estimates what a run will cost
"""
import argparse
import hashlib
import json
import math
import random
import re
from pathlib import Path

from plumbing.answers import (MAX_CHARS, bad_characters, contains_label, normalize, parse_object, parse_tasks,
                              reject_if, repetitive, wrong_script)
from plumbing.client import Client, body_fields
from plumbing.errors import Parser, at_least_0, blame, check, command, positive, seed, share
from plumbing.files import read_json, sha256, text_hash, write_json, write_jsonl
from plumbing.ledger import ANSWER, Ledger, model_price, model_share, read_rows
from plumbing.report import Counts, estimate, print_report
from plumbing.threads import ask_all, concurrency

PROMPTS = Path(__file__).parent / "prompts"


def options(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    # what goes in, what comes out
    add("--out", type=Path, default=Path("data/synthetic.jsonl"), help="the examples; run folder beside it")
    add("--replay", type=Path, metavar="FILE", help="read recorded answers instead of asking an LLM")
    add("--report", action="store_true", help="rebuild --out from the answers on disk, and report")
    add("--dry-run", action="store_true", help="show sample prompts, estimate tokens, money and time")
    # how much to ask for
    add("--n", type=positive(int), default=1000, help="examples; a larger n extends a run (paper: 500_000)")
    add("--tasks", type=positive(int), help="tasks of asymmetric types (default 0.3 n, the paper's ratio)")
    add("--patience", type=positive(int), default=5, help="brainstorms in a row that may bring nothing new")
    add("--seed", type=seed, default=0)
    # the LLM
    add("--model", type=model_share, action="append", default=[], metavar="NAME[:SHARE]",
        help="several may share")
    add("--temperature", type=at_least_0(float), default=1.0)
    add("--top-p", type=share, default=1.0)
    add("--json-mode", action=argparse.BooleanOptionalAction, default=True, help="by response_format")
    add("--max-answer-tokens", type=positive(int), default=4096)
    add("--again-truncated", action="store_true", help="ask again what a lower --max-answer-tokens cut off")
    add("--body", type=body_fields, default={}, metavar="JSON", help="more fields of the request's body")
    # the server
    add("--concurrency", type=concurrency, default=16, help="requests under way at once, up to 1000")
    add("--timeout", type=positive(float), default=180, help="seconds for one whole answer")
    add("--tries", type=positive(int), default=8, help="of one request before it is left for a later run")
    add("--backoff", type=at_least_0(float), default=1.0, help="seconds before a retry, doubled each time")
    add("--allow-http", action="store_true", help="send the key unencrypted to another host")
    # what it may cost
    add("--price", type=model_price, action="append", default=[], metavar="MODEL:IN:OUT",
        help="USD per million tokens")
    add("--budget-usd", type=at_least_0(float), help="stop before the whole run has cost more")
    add("--budget-tokens", type=at_least_0(int), help="stop before it has used more, in and out")
    args = parser.parse_args(argv)

    args.models = dict(args.model)                         # {name: share of the requests}
    args.prices = {}                                       # {(name, "in" or "out"): USD a token}
    for prices in args.price:
        args.prices |= prices
    check(args.models or args.replay or args.report,
          "--model NAME is missing (or --replay FILE, to read recorded answers)")
    check(len(args.models) == len(args.model), "--model: give each model once")
    for name in args.models:
        check(args.budget_usd is None or (name, "in") in args.prices,
              f"--budget-usd needs the price of {name}: add --price {name}:IN:OUT")
    check(args.out.suffix, f"--out {args.out}: the file needs a suffix, as in {args.out}.jsonl")
    args.folder = args.out.with_suffix("")                 # of the run
    args.number_of_tasks = args.tasks or round(0.3 * args.n)   # the paper: 150,000 for 500,000 examples
    return args


# ---------------------------------------------------------------------------------- the six types of task
#
# type         share  steps  query -> positive; hard negative
# short-long    33 %    2    a search query -> a document that answers it; one that only looks as if it did
# long-short    24 %    2    a text -> its label; a misleading label
# sts           20 %    1    a text S1 -> S2 of nearly the same meaning; S3 on the same topic
# bitext        17 %    1    a text S1 -> its translation S2; S3, a worse translation
# long-long      3 %    2    a text -> another long text that matches it
# short-short    3 %    2    a short text -> another short text that matches it
#
# Four are asymmetric: query and positive do not mean the same; a task links them, such as "given a tenant's
# question, find the law that answers it". These take two steps. First the LLM brainstorms many tasks
# (prompts/short-long.brainstorm.txt); then, in a new conversation, it writes one example of one of them
# (prompts/short-long.txt). The two symmetric types, sts and bitext, have one fixed instruction each, and one
# step (prompts/sts.txt).

INSTRUCTIONS = {"sts": "Retrieve semantically similar text.",          # table 16
                "bitext": "Retrieve parallel sentences."}


def load_prompts(folder=PROMPTS) -> dict:
    """The folder prompts/, which is data: templates, the values of their placeholders, languages.

    task_types    {type: {"weight", "brainstorm": true for two steps, "keys": of the object in the answer}}
    num_tasks     how many tasks one brainstorm is asked for
    placeholders  {type: {placeholder: [value, ...]}}
    templates     {"short-long.brainstorm": the message of step 1, "short-long": of step 2, ...}
    languages     {language: weight}
    scripts       {language: [script, ...]}, where it is not written in Latin alone
    """
    with blame(folder, "mend its files"):
        values = read_json(folder / "values.json", {"task_types": dict, "placeholders": dict})
        languages = read_json(folder / "languages.json",
                              {"weights": dict, "others": [str], "others_share": float, "scripts": dict})
        weight_of_others = languages["others_share"] / len(languages["others"])
        prompts = values | {
            "templates": {path.stem: path.read_text("utf-8") for path in folder.glob("*.txt")},
            "languages": languages["weights"] | dict.fromkeys(languages["others"], weight_of_others),
            "scripts": languages["scripts"]}
        fill_each_template(prompts)                        # one that cannot be filled fails here, for free
    return prompts


def fill_each_template(prompts) -> None:
    for kind, task_type in prompts["task_types"].items():
        only_this = prompts | {"task_types": {kind: task_type}}
        render(prompts, **request_at(0, 0, only_this, {kind: ["a task"]}, {"m": 1}))
        if task_type["brainstorm"]:
            render(prompts, **brainstorm_at(kind, 0, 0, prompts, {"m": 1}))


def render(prompts, step, type, params, **_) -> str:
    """A request's message: the template of its type and step, each {placeholder} filled from params."""
    name = type + ".brainstorm" if step == "brainstorm" else type
    return re.sub(r"\{(\w+)\}", lambda match: str(params[match[1]]), prompts["templates"][name])


# ------------------------------------------------------------------------------------ a request is drawn
#
# Request i is a function of i, the seed, the models, prompts/ and the tasks of step 1, and of nothing else.
# So a run can stop anywhere and go on, and --n 2000 after --n 1000 asks for the second thousand.

def draw(rng, choices):
    """One of the choices: a list (equal odds), a {value: weight} object, or a single value.

    Only rng.random() is used: Python promises that its sequence for a seed stays the same in later versions.
    """
    if isinstance(choices, list):
        choices = dict.fromkeys(choices, 1)
    if not isinstance(choices, dict):
        return choices
    point = rng.random() * sum(choices.values())           # somewhere on the weights laid end to end
    for value, weight in choices.items():
        point -= weight
        if point < 0:
            break
    return value


def request_at(i, seed, prompts, pools, models) -> dict:
    """Request i of step 2. pools: {type: [task, ...]}, models: {name: share}. For example

    {"id": 7, "step": "generate", "type": "sts", "model": "gpt-4o-mini",
     "params": {"unit": "phrase", "high_score": 4.5, "low_score": 3, ..., "language": "Thai"}}
    """
    rng = random.Random(f"{seed}:{i}")
    weights = {kind: task_type["weight"] for kind, task_type in prompts["task_types"].items()}
    kind = draw(rng, weights)
    params = {name: draw(rng, values) for name, values in prompts["placeholders"][kind].items()}
    language = draw(rng, prompts["languages"])
    if kind == "bitext":
        others = {name: weight for name, weight in prompts["languages"].items() if name != language}
        params["source_language"] = language
        params["target_language"] = draw(rng, others)
    else:
        params["language"] = language
    if prompts["task_types"][kind]["brainstorm"]:
        pool = pools[kind]
        params["task"] = pool[int(rng.random() * len(pool))]
    return {"id": i, "step": "generate", "type": kind, "params": params, "model": draw(rng, models)}


def brainstorm_at(kind, k, seed, prompts, models) -> dict:
    """Request k of one type in step 1, likewise. Its id is "short-long-b0", "short-long-b1", ..."""
    rng = random.Random(f"{seed}:{kind}:{k}")
    params = {"num_tasks": draw(rng, prompts["num_tasks"])}
    return {"id": f"{kind}-b{k}", "step": "brainstorm", "type": kind, "params": params,
            "model": draw(rng, models)}


# ------------------------------------------------------------------------------ step 1: brainstorm the tasks
#
# One answer lists about 20 tasks, and later answers repeat earlier ones more and more. A type's pool is what
# its brainstorms 0, 1, 2, ... bring.

def pool_of(answers, size, patience) -> tuple[list, bool]:
    """The answers to one type's brainstorms -> (the tasks in them, each once; whether the pool is complete).

    It is complete with `size` tasks, or once `patience` answers in a row have brought nothing new.
    """
    pool = {}                                              # normalized task -> task
    in_vain = 0                                            # answers in a row without a new task
    for answer in answers:
        before = len(pool)
        for task in parse_tasks(answer):
            pool.setdefault(normalize(task), task)
        if len(pool) > before:
            in_vain = 0
        else:
            in_vain += 1
        if len(pool) >= size or in_vain == patience:
            return list(pool.values())[:size], True
    return list(pool.values()), False


def brainstorm(client, prompts, args) -> dict:
    """Ask until each asymmetric type's pool is complete, then freeze the pools: {type: [task, ...]}.

    Answers arrive in any order, but are read in the order of their requests: the pools do not depend on it.
    """
    ledger = client.ledger
    settings = {"seed": args.seed, "models": args.models,
                "temperature": args.temperature, "top_p": args.top_p,
                "prompts": sha256(json.dumps(prompts, sort_keys=True).encode())}
    pools = ledger.frozen_tasks(settings)
    if pools:                                              # the same command, run earlier, has frozen them
        return pools
    while True:
        pools, requests = {}, []
        for kind, size in pool_sizes(prompts, args.number_of_tasks).items():
            answers = answers_in_order(ledger.brainstorms, kind)
            pools[kind], complete = pool_of(answers, size, args.patience)
            check(pools[kind] or not complete,
                  f"{ledger.folder / 'raw.jsonl'}: no task could be read from {args.patience} brainstorms of "
                  f"{kind}: the model may be too small")
            if not complete:
                missing = size - len(pools[kind])
                requests += next_brainstorms(kind, len(answers), missing, prompts, args)
        if not requests:
            return ledger.freeze_tasks(settings, pools)
        requests = [request for request in requests if request["id"] not in ledger.answered]
        tasks = sum(len(pool) for pool in pools.values())
        print(f"{tasks} of {args.number_of_tasks} tasks stand: {len(requests)} brainstorms for more",
              flush=True)
        messages = [(request, render(prompts, **request)) for request in requests]
        ask_all(iter(messages), len(messages), client, "brainstorms")


def pool_sizes(prompts, number_of_tasks) -> dict:
    """Each asymmetric type's share of the tasks, by its weight: {type: number}."""
    weights = {kind: prompts["task_types"][kind]["weight"] for kind in asymmetric_types(prompts)}
    total = sum(weights.values())
    return {kind: max(1, round(number_of_tasks * weight / total)) for kind, weight in weights.items()}


def asymmetric_types(prompts) -> list:
    return [kind for kind, task_type in prompts["task_types"].items() if task_type["brainstorm"]]


def answers_in_order(brainstorms, kind) -> list:
    """The answers to a type's brainstorms 0, 1, ... up to the first that is missing."""
    answers = []
    while f"{kind}-b{len(answers)}" in brainstorms:
        answers.append(brainstorms[f"{kind}-b{len(answers)}"])
    return answers


def next_brainstorms(kind, first, missing, prompts, args) -> list:
    """The type's next requests from number `first`: as many as bring the missing tasks, if all are new."""
    def at(k):
        return brainstorm_at(kind, k, args.seed, prompts, args.models)

    number = math.ceil(missing / at(first)["params"]["num_tasks"])
    return [at(k) for k in range(first, first + number)]


# ---------------------------------------------------------------------------- step 2: one example a request

def ask_for_examples(client, prompts, pools, args) -> None:
    """Ask those of requests 0 to n - 1 that have no answer yet."""
    missing = [i for i in range(args.n) if i not in client.ledger.answered]
    requests = (request_at(i, args.seed, prompts, pools, args.models) for i in missing)
    messages = ((request, render(prompts, **request)) for request in requests)
    ask_all(messages, len(missing), client, "requests")


# ---------------------------------------------------------------- the request, as it goes over the wire
#
#     POST https://api.openai.com/v1/chat/completions
#     Authorization: Bearer sk-...
#
#     {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Write three phrases of ..."}], ...}
#
# and what comes back:
#
#     {"choices": [{"message": {"content": "{\"S1\": \"...\", ...}"}, "finish_reason": "stop"}],
#      "usage": {"prompt_tokens": 251, "completion_tokens": 108}}
#
# That is all. plumbing/client.py calls these three functions, from many threads, and again where a try fails.

def request_body(request, message, args) -> dict:
    """The JSON that the server gets."""
    body = {"model": request["model"],
            "messages": [{"role": "user", "content": message}],    # a new conversation, no system prompt
            "temperature": args.temperature,
            "top_p": args.top_p,
            "max_tokens": args.max_answer_tokens}
    if args.json_mode and request["step"] == "generate":   # a brainstorm asks for a list
        body["response_format"] = {"type": "json_object"}
    return body | args.body                                # such as {"top_k": 20}


def post(session, url, key, body, seconds):
    """Send a request -> the response, whose content is still to be read: the client limits its whole time.

    session: a requests.Session, whose connection stays open from one request to the next.
    """
    headers = {"Content-Type": "application/json"}
    if key:                                                # a server of your own may need none
        headers["Authorization"] = f"Bearer {key}"
    timeouts = min(10, seconds), seconds                   # until it connects; until the next byte comes
    return session.post(url, headers=headers, data=json.dumps(body), timeout=timeouts, stream=True,
                        allow_redirects=False)             # which would take the key elsewhere


def read_completion(completion) -> tuple:
    """What comes back -> (the message's text, why it ended there, the tokens it used)."""
    choice = completion["choices"][0]
    return choice["message"].get("content"), choice.get("finish_reason"), completion.get("usage") or {}


# ----------------------------------------------------------------------------- an answer becomes an example

def make_example(row, prompts) -> tuple[dict, str]:
    """One answer -> (training example, how its object stood in it: clean, in prose, repaired or doubled).

    row: {"id", "type", "params", "response"} and, from live servers, "finish_reason". Raises Reject.
    """
    kind, params = row["type"], row["params"]
    keys = prompts["task_types"][kind]["keys"]             # of query, positive and, mostly, hard negative
    value, how = parse_object(row["response"], keys, row.get("finish_reason"))
    texts = [value[key].strip() for key in keys]
    query, *documents = texts                              # documents: the positive, the hard negative

    # what no text may be
    reject_if(not all(texts), "empty text")
    reject_if(any(len(text) > MAX_CHARS for text in texts), "too long")
    reject_if(any(bad_characters(text) for text in texts), "bad characters")
    reject_if(any(repetitive(text) for text in texts), "repetition")

    # what would teach to copy
    different = {normalize(text) for text in texts}
    reject_if(len(different) < len(texts), "copy between fields")
    label_in_query = kind == "long-short" and any(contains_label(query, label) for label in documents)
    reject_if(label_in_query, "label in input")
    message = normalize(render(prompts, "generate", kind, params))
    own_words = [query] if kind == "long-short" else texts     # a label may stand in the prompt
    copied = [text for text in own_words if len(text) > 20 and normalize(text) in message]
    reject_if(copied, "copy of the prompt")

    # another language than was asked for, as far as its script shows
    languages = languages_of(kind, params)
    query_scripts = prompts["scripts"].get(languages[0], ["LATIN"])
    document_scripts = prompts["scripts"].get(languages[-1], ["LATIN"])
    reject_if(wrong_script(query, query_scripts), "wrong script")
    reject_if(any(wrong_script(text, document_scripts) for text in documents), "wrong script")
    all_together = "".join(texts)                          # one by one, short texts are too short to tell
    reject_if(kind != "bitext" and wrong_script(all_together, query_scripts), "wrong script")

    example = {"prompt": INSTRUCTIONS.get(kind) or params["task"],
               "query": query,
               "pos": documents[:1],
               "neg": documents[1:],
               "type": kind,
               "language": "-".join(languages),            # bitext: "Welsh-English"
               "id": row["id"]}
    return example, how


def languages_of(kind, params) -> list:
    """The language of the query, and in bitext that of the documents too."""
    if kind == "bitext":
        return [params["source_language"], params["target_language"]]
    return [params["language"]]


# ---------------------------------------------------------------------------------- the file of examples

def write_examples(rows, prompts, out) -> dict:
    """All answers -> the file of examples, written anew as a whole. Returns the counts for the report."""
    counts = Counts()
    pairs = set()                                          # hashes of (query, positive)

    def examples():
        for row in rows:
            counts.answer(row["step"])
            if row["step"] == "brainstorm":
                counts.brainstorm(row["type"], parse_tasks(row["response"]))
                continue
            with counts.rejects():                         # a Reject ends this block, and is counted
                example, how = make_example(row, prompts)
                pair = text_hash(normalize(example["query"]) + "\0" + normalize(example["pos"][0]))
                reject_if(pair in pairs, "duplicate")
                pairs.add(pair)
                counts.keep(example, how)
                yield example

    write_jsonl(out, examples())
    return counts.report()


def read_answers(path, prompts, log=True):
    """Yield the rows of the run's raw.jsonl (log=True), or of a file of recorded answers."""
    for where, row in read_rows(path, ANSWER, log):
        with blame(f"{where}: no answer to our prompts", "delete it"):
            render(prompts, **row)                         # its type is known, and no value is missing
        yield row


def report(args, prompts) -> None:
    """Rebuild --out from all answers, print the report and write it. Needs neither network nor lock."""
    source = args.replay or args.folder / "raw.jsonl"
    counts = write_examples(read_answers(source, prompts, log=not args.replay), prompts, args.out)
    counts["ledger"] = {}
    if not args.replay:
        counts["ledger"] = Ledger(args.folder, args.prices, read_only=True).summary()
    write_json(args.folder / "report.json", counts)
    print_report(counts, args.out)


# ------------------------------------------------------------------------------------------- the whole run

def dry_run(prompts, args) -> None:
    """Estimate the whole job from at most 5,000 of its requests."""
    kinds = asymmetric_types(prompts)
    pools = {kind: ["Given this, find that (stands for a brainstormed task)."] for kind in kinds}
    brainstorms = args.number_of_tasks // 20 + 1
    drawn = min(args.n, 5000)
    sample = [request_at(i, args.seed, prompts, pools, args.models) for i in range(drawn)]
    for k in range(max(len(kinds), brainstorms * drawn // args.n)):
        sample.append(brainstorm_at(kinds[k % len(kinds)], k, args.seed, prompts, args.models))
    messages = [(request, render(prompts, **request)) for request in sample]
    estimate(messages, args.n, brainstorms, args)


def main(argv=None):
    args = options(argv)
    prompts = load_prompts()
    if args.dry_run:
        return dry_run(prompts, args)
    exit_code = 0
    if not args.replay and not args.report:
        with Ledger(args.folder, args.prices, args.budget_usd, args.budget_tokens) as ledger:
            if args.again_truncated:
                ledger.set_aside_truncated(args.max_answer_tokens)
            client = Client(args, ledger, request_body, post, read_completion)
            pools = brainstorm(client, prompts, args)          # step 1
            ask_for_examples(client, prompts, pools, args)     # step 2
        exit_code = ledger.exit_code                           # 1 if requests are left without an answer
        if ledger.answered == ledger.brainstorms.keys():       # it stopped before the first example
            return exit_code
    report(args, prompts)
    return exit_code


if __name__ == "__main__":
    command(main)
