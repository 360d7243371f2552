"""generate.py: prompts -> training data, written by an LLM (arXiv 2401.00368, section 3.1).

    python generate.py --replay data/recorded.jsonl.gz     # recorded answers -> data/synthetic.jsonl
    export OPENAI_API_KEY=... OPENAI_BASE_URL=https://...  # any server with OpenAI's API; OpenAI if unset
    python generate.py --model gpt-4o-mini --dry-run       # messages, tokens, time; money with --price
    python generate.py --model gpt-4o-mini --n 1000 --price gpt-4o-mini:0.15:0.60 --budget-usd 2
    python generate.py --model a:0.75 --model b:0.25 --n 500_000   # the paper's scale; run again to resume
    python generate.py --report                            # what there is, beside the paper's figures

In goes the folder prompts/; out comes --out, one training example a line:

    {"prompt": instruction, "query": text, "pos": [text], "neg": [text] or [], "type", "language", "id"}

Read it in this order: the six types of task, the templates, how a request is drawn, step 1 (tasks), step 2
(examples), the request as it goes over the wire, how an answer becomes an example, the file of examples, the
whole run, the flags.

Three words: a template is a file of prompts/; filled, it is the message that the LLM gets. An instruction is
the sentence that says what a query wants; it stands under "prompt" in the file of examples.

A run can stop anywhere. Each answer is on disk before anything reads it, and the same command asks only for
those that are missing. Before a try is sent, the most that it can cost is reserved; where that would break
the budget, the run ends in good order.

What it leaves to plumbing/, because none of it is the method:

    client.py     asks again where a server fails; threads.py asks many at once
    ledger.py     keeps the answers and the budget, in a folder named like --out without .jsonl
    pools.py      keeps the tasks of step 1, and the settings with which the run was begun
    answers.py    finds the JSON in an answer and repairs it
    remembered.py spares a rerun what was done before
    texts.py      tells whether a text is fit to be trained on; refusals.py, whether it is an LLM's "no"
    report.py     counts, and estimates what a run will cost
"""
# ---------------------------------------------------------------------------------- the six types of task
#
# type         share  steps  query -> positive; hard negative
# short-long    33 %    2    a search query -> a document that answers it; one that only looks as if it did
# long-short    24 %    2    a text -> its label; a misleading label
# sts           20 %    1    a text S1 -> S2 of nearly the same meaning; S3 on the same topic
# bitext        17 %    1    a text S1 -> its translation S2; S3, a worse translation
# long-long      3 %    2    a text -> another long text that matches it (no hard negative)
# short-short    3 %    2    a short text -> another short text that matches it (no hard negative)
#
# In four types, the asymmetric ones, query and positive differ in meaning; an instruction says how:
# "given a tenant's question, find the law that answers it". To get many different instructions, the LLM
# first lists tasks (step 1, prompts/short-long.brainstorm.txt), then writes one example of one of them in a
# new conversation (step 2, prompts/short-long.txt). The other two, sts and bitext, are symmetric; they have
# one instruction each, and step 2 alone.
#
# The code says kind for a type of task: `type` is a word of Python's own. A further type is an entry in
# prompts/values.json and its templates; the code need not know it.

import argparse
import json
import math
import random
import re
from pathlib import Path

from plumbing.answers import parse_object, parse_tasks, reject_if
from plumbing.client import Client, backoff, body_fields, timeout
from plumbing.completion import joined
from plumbing.errors import Parser, at_least_0, blame, check, command, positive, seed, share
from plumbing.files import read_json, read_list, sha256, text_hash, write_json, write_jsonl
from plumbing.ledger import ANSWER, Ledger, check_prices, model_price, model_share, read_rows, run_folder
from plumbing.pools import (check_prompts, check_settings, freeze_generation, last_pools, read_generations,
                            requests_covered)
from plumbing.refusals import is_refusal
from plumbing.remembered import remembered
from plumbing.report import Counts, estimate, print_report
from plumbing.texts import (MAX_CHARS, bad_characters, check_texts, contains_label, is_code, normalize,
                            repetitive, wrong_script)
from plumbing.threads import ask_all, concurrency

PROMPTS = Path(__file__).parent / "prompts"
PLACEHOLDER = re.compile(r"\{(\w+)\}")
INSTRUCTIONS = {"sts": "Retrieve semantically similar text.",          # table 16
                "bitext": "Retrieve parallel sentences."}


# --------------------------------------------------------------------------------------------- the templates

def load_prompts(folder=PROMPTS) -> dict:
    """The folder prompts/, which is data: templates, the values of their placeholders, languages.

    task_types    {type: {"weight": its share of the requests,
                          "brainstorm": true for two steps,
                          "keys": the keys of an answer's object, for query, positive and hard negative,
                          "words": of each key, how many, or the placeholder that says so; for --dry-run,
                          "instruction": of a type without step 1}}
    num_tasks     how many tasks one brainstorm is asked for
    placeholders  {type: {placeholder: [value, ...] or the name of a file of prompts/ with such a list}}
    templates     {"short-long.brainstorm": the template of step 1, "short-long": of step 2, ...}
    languages     {language: weight}
    scripts       {language: [script, ...]}, where it is not written in Latin alone
    """
    with blame(folder, "mend its files"):
        values = read_json(folder / "values.json", {"task_types": dict, "placeholders": dict})
        languages = read_json(folder / "languages.json",
                              {"weights": dict, "others": [str], "others_share": float, "scripts": dict})
        for placeholders in values["placeholders"].values():
            for name, choices in placeholders.items():
                if str(choices).endswith(".json"):         # a long list has a file of its own
                    placeholders[name] = read_list(folder / choices)
        weight_of_others = languages["others_share"] / len(languages["others"])
        prompts = values | {
            "templates": {path.stem: path.read_text("utf-8") for path in folder.glob("*.txt")},
            "languages": languages["weights"] | dict.fromkeys(languages["others"], weight_of_others),
            "scripts": languages["scripts"]}
        check_prompts(prompts, folder)
        fill_each_template(prompts)                        # one that cannot be filled fails here, for free
    return prompts


def fill_each_template(prompts) -> None:
    """Draw and render one request of each type and step, with a stand-in for task and model."""
    for kind, task_type in prompts["task_types"].items():
        prompts_of_kind = prompts | {"task_types": {kind: task_type}}      # so that no other type is drawn
        generations, models = [(1, {kind: ["a task"]})], {"a model": 1}
        requests = [request_at(0, 0, prompts_of_kind, generations, models)]
        if task_type["brainstorm"]:
            requests.append(brainstorm_at(kind, 0, 0, prompts, models))
        for request in requests:
            unfilled = PLACEHOLDER.search(render(prompts, request))
            check(not unfilled, f"{kind}, {request['step']}: no values for {unfilled and unfilled[0]}")
        instruction_of(requests[0], prompts)


def render(prompts, request) -> str:
    """The message of a request: the template of its type and step, each {placeholder} filled from params.

    One that params lack stays as it stands: answers may be older than the template.
    """
    name, params = request["type"], request["params"]
    if request["step"] == "brainstorm":
        name += ".brainstorm"
    template = prompts["templates"][name]
    return PLACEHOLDER.sub(lambda match: str(params.get(match[1], match[0])), template)


def message_of(row, prompts) -> str:
    """The message that a row answers. Recorded rows carry it, since templates change; live ones do not."""
    if row.get("messages"):
        return joined(row["messages"][0]["content"])       # a text, or a list of its parts
    return render(prompts, row)


def instruction_of(row, prompts) -> str:
    """What an example's query wants: its type's one instruction, or the task that step 1 brought."""
    kind = row["type"]
    return prompts["task_types"][kind].get("instruction") or INSTRUCTIONS.get(kind) or row["params"]["task"]


# ------------------------------------------------------------------------------------ a request is drawn
#
# Request i is a function of i, the seed, the models, prompts/ and the tasks of step 1, and of nothing else.
# So a run can stop anywhere and go on, and --n 2000 after --n 1000 asks for the second thousand. With the
# requests the tasks should grow, but the first thousand must stay what they were. So there are generations
# of pools: requests 0 to 999 draw from the 300 tasks of the first, the others from the 600 of the second.

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
            return value
    return value                                           # rounding left nothing below 0: the last


def request_at(i, seed, prompts, generations, models) -> dict:
    """Request i of step 2; types and languages have the paper's shares (section 4.1). For example

    {"id": 7, "step": "generate", "type": "sts", "model": "gpt-4o-mini",
     "params": {"unit": "phrase", "high_score": 4.5, "low_score": 3, ..., "language": "Thai"}}

    generations: [(end, {type: [task, ...]}), ...]. The first whose end is above i serves request i.
    models: {name: share}.
    """
    rng = random.Random(f"{seed}:{i}")
    weights = {kind: task_type["weight"] for kind, task_type in prompts["task_types"].items()}
    kind = draw(rng, weights)
    params = {name: draw(rng, values) for name, values in prompts["placeholders"][kind].items()}
    language = draw(rng, prompts["languages"])
    if "{source_language}" in prompts["templates"][kind]:  # bitext
        others = {name: weight for name, weight in prompts["languages"].items() if name != language}
        params["source_language"] = language
        params["target_language"] = draw(rng, others)
    else:
        params["language"] = language
    if prompts["task_types"][kind]["brainstorm"]:
        pools = next(pools for end, pools in generations if i < end)
        pool = pools[kind]                                 # perhaps 100,000 tasks, which draw() would copy
        params["task"] = pool[int(rng.random() * len(pool))]
    return {"id": i, "step": "generate", "type": kind, "params": params, "model": draw(rng, models)}


def brainstorm_at(kind, k, seed, prompts, models) -> dict:
    """Request k of one type in step 1, drawn alike. Its id: "short-long-b" and k; in old answers "b", k."""
    rng = random.Random(f"{seed}:{kind}:{k}")
    params = {"num_tasks": draw(rng, prompts["num_tasks"])}
    return {"id": f"{kind}-b{k}", "step": "brainstorm", "type": kind, "params": params,
            "model": draw(rng, models)}


# ------------------------------------------------------------------------------ step 1: brainstorm the tasks
#
# One answer lists about 20 tasks, and later answers repeat earlier ones more and more. So step 1 goes in
# rounds: each reads all answers so far, and asks for as many as would bring the missing tasks if all were
# new. Answers arrive in any order, but are read in the order of their requests, 0, 1, 2, ...: what is in a
# type's pool does not depend on which came first.

def brainstorm(client, prompts, args) -> list:
    """Section 3.1, step 1: ask until each asymmetric type's pool is complete, then freeze the pools.

    Returns all generations. One of an earlier run is never touched: if it serves n requests, none is added.
    """
    ledger = client.ledger
    drawn_in_order = [prompts["task_types"], prompts["placeholders"], prompts["languages"]]
    settings = {"seed": args.seed, "models": args.models,
                "temperature": args.temperature, "top_p": args.top_p,
                "prompts": sha256(json.dumps(prompts, sort_keys=True).encode()),
                "order in prompts": sha256(json.dumps(drawn_in_order).encode())}
    check_settings(ledger.folder, settings)
    generations = read_generations(ledger.folder)
    frozen = last_pools(generations)
    if requests_covered(generations) >= args.n:
        tasks = sum(len(pool) for pool in frozen.values())
        if tasks < args.number_of_tasks:
            print(f"{tasks} tasks serve these requests, as the run has settled; not {args.number_of_tasks}")
        return generations
    pools, requests = plan(ledger, frozen, prompts, args)
    while requests:                                        # none are planned once all pools are complete
        # A round that was interrupted has some of its answers, behind a gap.
        open_requests = [request for request in requests if request["id"] not in ledger.answered]
        tasks = sum(len(pool) for pool in pools.values())
        print(f"{tasks} of {args.number_of_tasks} tasks so far: {len(open_requests)} brainstorms for more",
              flush=True)
        pairs = [(request, render(prompts, request)) for request in open_requests]
        ask_all(iter(pairs), len(pairs), client, "brainstorms")
        pools, requests = plan(ledger, frozen, prompts, args)
    return freeze_generation(ledger.folder, args.n, pools)


def plan(ledger, frozen, prompts, args) -> tuple[dict, list]:
    """The pools that the answers so far make, {type: [task, ...]}, and the requests of the next round.

    frozen: the last generation's pools, with which these begin.
    """
    pools, requests = {}, []
    for kind, size in pool_sizes(prompts, args.number_of_tasks).items():
        answers = answers_in_order(ledger.brainstorms, kind)
        pools[kind], complete = pool_of(answers, size, args.patience, frozen.get(kind, []))
        check(pools[kind] or not complete,
              f"{ledger.folder / 'raw.jsonl'}: no task could be read from {args.patience} brainstorms of "
              f"{kind}: the model may be too small")
        if not complete:
            missing = size - len(pools[kind])
            requests += next_brainstorms(kind, len(answers), missing, prompts, args)
    return pools, requests


def pool_of(answers, size, patience, frozen=()) -> tuple[list, bool]:
    """The answers to one type's brainstorms -> (its tasks, each once, the frozen ones first; whether the
    pool is complete).

    It is complete with `size` tasks, or once `patience` answers in a row have brought nothing new.
    """
    pool = {normalize(task): task for task in frozen}
    size = max(size, len(frozen))
    seen = set()                                           # normalized tasks in the answers
    without_new = 0                                        # answers in a row
    for answer in answers:
        before = len(seen)
        for task in parse_tasks(answer):
            seen.add(normalize(task))
            pool.setdefault(normalize(task), task)
        if len(seen) > before:
            without_new = 0
        else:
            without_new += 1
        if len(pool) >= size or without_new == patience:
            break
    complete = len(pool) >= size or without_new == patience
    return list(pool.values())[:size], complete


def pool_sizes(prompts, number_of_tasks) -> dict:
    """Each asymmetric type's share of the tasks, by its weight: {type: number}."""
    weights = {kind: prompts["task_types"][kind]["weight"] for kind in asymmetric_types(prompts)}
    total = sum(weights.values())
    return {kind: max(1, round(number_of_tasks * weight / total)) for kind, weight in weights.items()}


def asymmetric_types(prompts) -> list:
    return [kind for kind, task_type in prompts["task_types"].items() if task_type["brainstorm"]]


def answers_in_order(brainstorms, kind) -> list:
    """The answers to a type's brainstorms 0, 1, ... up to the first that is missing.

    brainstorms: {"short-long-b0": what the LLM answered, ...}, of all types.
    """
    answers = []
    while f"{kind}-b{len(answers)}" in brainstorms:
        answers.append(brainstorms[f"{kind}-b{len(answers)}"])
    return answers


def next_brainstorms(kind, first, missing, prompts, args) -> list:
    """The type's next requests from number `first`: as many as bring the missing tasks, if all are new."""
    request = brainstorm_at(kind, first, args.seed, prompts, args.models)
    tasks_per_answer = request["params"]["num_tasks"]
    number = math.ceil(missing / tasks_per_answer)
    return [brainstorm_at(kind, k, args.seed, prompts, args.models) for k in range(first, first + number)]


# ---------------------------------------------------------------------------- step 2: one example a request

def ask_for_examples(client, prompts, generations, args) -> None:
    """Ask those of requests 0 to n - 1 that have no answer yet."""
    missing = [i for i in range(args.n) if i not in client.ledger.answered]    # answered: a set of ids
    requests = (request_at(i, args.seed, prompts, generations, args.models) for i in missing)
    pairs = ((request, render(prompts, request)) for request in requests)      # drawn when their turn comes:
    ask_all(pairs, len(missing), client, "requests")                           # memory never has all 500,000


# ---------------------------------------------------------------- the request, as it goes over the wire
#
#     POST https://api.openai.com/v1/chat/completions
#     Authorization: Bearer sk-...
#
#     {"model": "gpt-4o-mini",
#      "messages": [{"role": "user", "content": "Write three phrases of ..."}],
#      "temperature": 1.0, "top_p": 1.0, "max_tokens": 4096,
#      "response_format": {"type": "json_object"}}
#
# and what comes back:
#
#     {"choices": [{"message": {"content": "{\"S1\": \"...\", ...}"}, "finish_reason": "stop"}],
#      "usage": {"prompt_tokens": 251, "completion_tokens": 108}}
#
# plumbing/client.py calls these three functions, from many threads, and again where a try fails.

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
    """Send a request -> the response, headers only; the client reads its content, within `seconds` in all.

    session: a requests.Session, whose connection stays open from one request to the next.
    """
    headers = {"Content-Type": "application/json"}
    if key:                                                # a server of your own may need none
        headers["Authorization"] = f"Bearer {key}"
    timeouts = min(10, seconds), seconds                   # until it connects; until the next byte comes
    return session.post(url, headers=headers, data=json.dumps(body), timeout=timeouts, stream=True,
                        allow_redirects=False)             # one could send the key to another host


def read_completion(completion) -> tuple:
    """What comes back -> (the LLM's text, why it ended there, the tokens it used)."""
    choice = completion["choices"][0]
    return choice["message"].get("content"), choice.get("finish_reason"), completion.get("usage") or {}


# ----------------------------------------------------------------------------- an answer becomes an example

def make_example(row, prompts) -> tuple[dict, str]:
    """One answer -> (training example, how clean the answer was: see plumbing.answers.parse_object).

    row: {"id", "type", "params", "response"} and, from live servers, "finish_reason".
    Raises plumbing.answers.Reject, whose text is the reason: one of those below, or parse_object's (no JSON,
    missing keys, truncated, ...). Section 3.1 has fewer of them.
    """
    kind = row["type"]
    keys = prompts["task_types"][kind]["keys"]             # of query, positive and, mostly, hard negative
    has_label = "label" in keys                            # long-short
    fields, how = parse_object(row["response"], keys, row.get("finish_reason"))
    texts = [fields[key].strip() for key in keys]
    query, *documents = texts                              # documents: the positive, the hard negative

    # what no text may be
    reject_if(not all(texts), "empty text")
    reject_if(any(len(text) > MAX_CHARS for text in texts), "too long")
    reject_if(any(bad_characters(text) for text in texts), "bad characters")
    reject_if(any(repetitive(text) for text in texts), "repetition")
    reject_if(any(is_refusal(text) for text in texts), "refusal")

    # what would teach to copy
    normalized = [normalize(text) for text in texts]
    reject_if(len(set(normalized)) < len(texts), "copy between fields")
    label_in_query = has_label and any(contains_label(query, label) for label in documents)
    reject_if(label_in_query, "label in input")
    message = normalize(message_of(row, prompts))
    own_words = normalized[:1] if has_label else normalized    # a label may stand in the message
    reject_if(any(len(text) > 20 and text in message for text in own_words), "copy of the prompt")

    # another language than was asked for, as far as its script shows
    reject_if(in_another_script(query, documents, row, prompts), "wrong script")

    query_language, document_language = languages_of(row)
    example = {"prompt": instruction_of(row, prompts),
               "query": query,
               "pos": documents[:1],
               "neg": documents[1:],
               "type": kind,
               "language": query_language,
               "id": row["id"]}
    if query_language != document_language:
        example["language"] = f"{query_language}-{document_language}"      # "Welsh-English"
    return example, how


def in_another_script(query, documents, row, prompts) -> bool:
    """Whether a text is not written in its language's letters. Code is Latin in any language."""
    query_language, document_language = languages_of(row)
    query_scripts = prompts["scripts"].get(query_language, ["LATIN"])
    document_scripts = prompts["scripts"].get(document_language, ["LATIN"])
    foreign = [text for text in documents if wrong_script(text, document_scripts)]
    if wrong_script(query, query_scripts):
        foreign.append(query)
    if not all(is_code(text) for text in foreign):
        return True
    if query_language != document_language:
        return False
    prose = [text for text in (query, *documents) if text not in foreign]
    return wrong_script("".join(prose), query_scripts)     # short texts tell more together than one by one


def languages_of(row) -> tuple[str, str]:
    """The language of the query and that of the documents: the same, except in bitext."""
    params = row["params"]
    if "source_language" in params:
        return params["source_language"], params["target_language"]
    return params["language"], params["language"]


# ---------------------------------------------------------------------------------- the file of examples

def write_examples(rows, prompts, out) -> dict:
    """All answers -> the file of examples, written anew as a whole. Returns the counts for the report."""
    counts = Counts()
    pairs = set()                                          # hashes of (query, positive)

    def examples():                                        # lazy: runs while write_jsonl takes its examples
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
    return counts.report()                                 # complete now, and not before


def read_answers(path, prompts, log=True):
    """Yield the answers of a run's raw.jsonl, or of a file of recorded ones.

    log: it is raw.jsonl, whose last line may have been torn by a kill.
    """
    for where, row in read_rows(path, ANSWER, log):
        with blame(f"{where}: no answer to our prompts", "delete it"):     # an error here, as one line
            prompts["task_types"][row["type"]]             # its type is known
            texts = {"message": message_of(row, prompts), "id": str(row["id"])}
            row["messages"] = [{"role": "user", "content": texts["message"]}]
            if row["step"] == "generate":                  # what an example needs is there
                texts["instruction"] = instruction_of(row, prompts)
                texts["language"], texts["documents' language"] = languages_of(row)
            check_texts(where, texts)
        yield row


def report(args, prompts) -> None:
    """Rebuild --out from all answers, print the report and write it. Needs neither network nor lock."""
    source = args.replay or args.folder / "raw.jsonl"

    def read_all():
        return write_examples(read_answers(source, prompts, log=not args.replay), prompts, args.out)

    # Half a million answers take a minute. If they, prompts/, the code and --out are as they were after the
    # last report, its counts hold.
    counts = remembered(args.folder / "remembered/examples.json", [source], [prompts, bool(args.replay)],
                        read_all, args.out)
    counts["ledger"] = {}
    if not args.replay:
        counts["ledger"] = Ledger(args.folder, args.prices, read_only=True).summary()
        pools = last_pools(read_generations(args.folder))
        counts["pool"] = {kind: len(tasks) for kind, tasks in pools.items()}
    write_json(args.folder / "report.json", counts)
    print_report(counts, args.out)


# ------------------------------------------------------------------------------------------- the whole run

def main(argv=None):
    args = options(argv)
    prompts = load_prompts()
    if args.dry_run:
        return dry_run(prompts, args)
    if args.replay or args.report:
        report(args, prompts)
        return 0

    # A budget that is used up, or Ctrl-C, ends this block early. The ledger keeps its counts after it.
    with Ledger(args.folder, args.prices, args.budget_usd, args.budget_tokens) as ledger:
        if args.again_truncated:
            ledger.set_aside_truncated(args.max_answer_tokens)
        client = Client(args, ledger, request_body, post, read_completion)
        generations = brainstorm(client, prompts, args)          # step 1
        ask_for_examples(client, prompts, generations, args)     # step 2
    only_brainstorms = len(ledger.answered) == len(ledger.brainstorms)
    if not only_brainstorms:
        report(args, prompts)
    return ledger.exit_code                                # 1 if requests are left without an answer


def dry_run(prompts, args) -> None:
    """Estimate the whole job from at most 5,000 of its requests, and one brainstorm of each type."""
    sizes = pool_sizes(prompts, args.number_of_tasks)
    pools = {kind: ["Given this, find that (stands for a brainstormed task)."] for kind in sizes}
    generations = [(args.n, pools)]
    drawn = range(min(args.n, 5000))
    requests = [request_at(i, args.seed, prompts, generations, args.models) for i in drawn]
    brainstorms = 0                                        # if all tasks were new
    for kind, size in sizes.items():
        of_kind = next_brainstorms(kind, 0, size, prompts, args)
        brainstorms += len(of_kind)
        requests.append(of_kind[0])
    pairs = [(request, render(prompts, request)) for request in requests]
    estimate(pairs, args.n, brainstorms, prompts["task_types"], args)


# ------------------------------------------------------------------------------------------------- the flags

def options(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    # what goes in, what comes out
    add("--out", type=Path, default=Path("data/synthetic.jsonl"),
        help="file of examples; the run's folder lies beside it")
    add("--replay", type=Path, metavar="FILE", help="read recorded answers instead of asking an LLM")
    add("--report", action="store_true", help="rebuild --out from the answers on disk, and report")
    add("--dry-run", action="store_true", help="show sample messages, estimate tokens, money and time")
    # how much to ask for
    add("--n", type=positive(int), default=1000,
        help="requests of step 2, at most one example each; a larger n extends a run (paper: 500_000)")
    add("--tasks", type=positive(int), help="tasks of asymmetric types (default 0.3 n, the paper's ratio)")
    add("--patience", type=positive(int), default=5, help="brainstorms in a row that may bring nothing new")
    add("--seed", type=seed, default=0)
    # the LLM
    add("--model", type=model_share, action="append", default=[], metavar="NAME[:SHARE]",
        help="may be given several times, with shares")
    add("--temperature", type=at_least_0(float), default=1.0)
    add("--top-p", type=share, default=1.0)
    add("--json-mode", action=argparse.BooleanOptionalAction, default=True,
        help="ask for JSON through response_format")
    add("--max-answer-tokens", type=positive(int), default=4096)
    add("--again-truncated", action="store_true", help="ask again what a lower --max-answer-tokens cut off")
    add("--body", type=body_fields, default={}, metavar="JSON", help="more fields of the request's body")
    # the server
    add("--concurrency", type=concurrency, default=16, help="requests under way at once, up to 1000")
    add("--timeout", type=timeout, default=180, help="seconds for one whole answer")
    add("--tries", type=positive(int), default=8, help="attempts at a request in one run")
    add("--backoff", type=backoff, default=1.0, help="seconds before a retry, doubled each time")
    add("--allow-http", action="store_true", help="send the key unencrypted to another host")
    # what it may cost
    add("--price", type=model_price, action="append", default=[], metavar="MODEL:IN:OUT",
        help="USD per million tokens")
    add("--budget-usd", type=at_least_0(float), help="stop so that the whole run never costs more")
    add("--budget-tokens", type=at_least_0(int), help="stop so that it never uses more, in and out")
    args = parser.parse_args(argv)

    args.models = dict(args.model)                         # {name: share of the requests}
    args.prices = {}                                       # {(name, "in" or "out"): USD a token}
    for prices in args.price:
        args.prices |= prices
    reads_answers = args.replay or args.report
    check(args.models or (reads_answers and not args.dry_run),
          "--model NAME is missing (or --replay FILE, to read recorded answers)")
    check(len(args.models) == len(args.model), "--model: give each model once")
    check_prices(args.prices, args.models, args.budget_usd)
    args.folder = run_folder(args.out, args.replay)
    args.number_of_tasks = args.tasks or round(0.3 * args.n)   # the paper: 150,000 for 500,000 examples
    return args


if __name__ == "__main__":
    command(main)
