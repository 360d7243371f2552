"""generate.py: prompts -> training data, written by an LLM (arXiv 2401.00368, section 3.1).

    python generate.py --replay data/recorded.jsonl.gz   # recorded answers -> data/synthetic.jsonl
    export OPENAI_API_KEY=... OPENAI_BASE_URL=https://...  # any server with OpenAI's API; OpenAI if unset
    python generate.py --model gpt-4o-mini --dry-run       # sample prompts, tokens, money, time; no network
    python generate.py --model gpt-4o-mini --n 1000 --price gpt-4o-mini:0.15:0.60 --budget-usd 2
    python generate.py --model a:0.75 --model b:0.25 --n 500_000      # the paper's scale; run it again to resume
    python generate.py --report                            # what there is, beside the paper's figures

Six types of task. The four asymmetric ones (short-long, long-short, short-short, long-long) take two steps:
the LLM brainstorms a pool of tasks, then writes one example of one task in a fresh conversation. STS and
bitext take one step. Each answer is parsed, validated and deduplicated into one line of training data:
    {"prompt": instruction, "query": text, "pos": [text], "neg": [text] or [], "type", "language", "id"}

The run lives in the folder named like --out without .jsonl (llm.py describes its files): every answer as it
came in raw.jsonl, the frozen pool in tasks.jsonl, the last report in report.json. Request i is a function of
the seed, the models, prompts/, tasks.jsonl and i alone: a run can be repeated, and extended by a larger --n.
"""

import argparse
import array
import collections
import hashlib
import itertools
import json
import os
import random
import re
import unicodedata
import zlib
from pathlib import Path

from llm import (BudgetReached, Client, Run, Stopping, UserError, ask_all, command, estimate_tokens,
                 read_jsonl, tokens_of, write_json)

PROMPTS = Path(__file__).parent / "prompts"
INSTRUCTIONS = {"sts": "Retrieve semantically similar text.",  # table 16
                "bitext": "Retrieve parallel sentences."}
MAX_CHARS = 20_000  # of one text: longer ones are loops, and training cuts at 512 tokens anyway
ANSWER_TOKENS = {"short-long": 405, "long-short": 125, "sts": 108, "bitext": 112, "long-long": 512,
                 "short-short": 31, "brainstorm": 480}  # means over data/recorded.jsonl.gz, for --dry-run
PAPER = {"examples": 500_000, "distinct prompts": 150_000, "tokens": 180_000_000,  # section 4.1 and figure 2
         "type": {"short-long": 167, "long-short": 122, "sts": 99, "bitext": 89, "long-long": 17,
                  "short-short": 13},
         "language": {"English": 43.1, "Polish": 3.0, "Japanese": 2.9, "Italian": 2.9, "Russian": 2.9,
                      "Indonesian": 2.9, "German": 2.9, "Persian": 2.9, "Spanish": 2.8, "Chinese": 2.8,
                      "French": 2.8, "Portuguese": 2.8, "Dutch": 2.8, "Arabic": 2.7}}


class Reject(Exception):
    """An answer that can't become an example; str(error) is the reason that the report counts."""


def options(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("data/synthetic.jsonl"), help="the examples; run folder beside it")
    add("--replay", type=Path, metavar="FILE", help="read recorded answers instead of asking an LLM")
    add("--report", action="store_true", help="rebuild --out from the answers on disk, and report")
    add("--dry-run", action="store_true", help="show sample prompts, estimate tokens, money and time")
    add("--n", type=int, default=1000, help="examples to ask for; a larger n extends a run (paper: 500_000)")
    add("--tasks", type=int, help="distinct tasks of asymmetric types (default 0.3 n, the paper's ratio)")
    add("--patience", type=int, default=5, help="barren brainstorms in a row that end step 1")
    add("--seed", type=int, default=0)
    add("--model", action="append", default=[], metavar="NAME[:SHARE]", help="several may share")
    add("--temperature", type=float, default=1.0)
    add("--top-p", type=float, default=1.0)
    add("--json-mode", action=argparse.BooleanOptionalAction, default=True, help="by response_format")
    add("--max-answer-tokens", type=int, default=4096)
    add("--concurrency", type=int, default=16, help="requests under way at once")
    add("--timeout", type=float, default=180, help="seconds for one whole answer")
    add("--tries", type=int, default=8, help="tries of one request before it is left for a later run")
    add("--backoff", type=float, default=1.0, help="seconds before the first retry, then doubled")
    add("--price", action="append", default=[], metavar="MODEL:IN:OUT", help="USD per million tokens")
    add("--budget-usd", type=float, help="stop before the whole run has cost more")
    add("--budget-tokens", type=int, help="stop before the whole run has used more, in and out")
    add("--allow-http", action="store_true", help="send the key unencrypted to another host")
    args = parser.parse_args(argv)
    for name in ("n", "concurrency", "timeout", "tries", "patience", "max_answer_tokens"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive")
    args.models, args.prices = parse_models(args.model), parse_prices(args.price)
    if not args.models and not (args.replay or args.report):
        raise UserError("--model NAME is missing (or --replay FILE, to read recorded answers)")
    args.folder = args.out.with_suffix("")
    if args.folder == args.out:
        raise UserError(f"--out {args.out}: the file needs a suffix, as in {args.out}.jsonl")
    for name in args.models:
        if args.budget_usd is not None and (name, "in") not in args.prices:
            raise UserError(f"--budget-usd needs the price of {name}: add --price {name}:IN:OUT")
    return args


def parse_models(values):
    """["a:0.75", "b:0.25"] -> {"a": 0.75, "b": 0.25}; a tail that is no number belongs to the name."""
    models = {}
    for value in values:
        name, _, share = value.rpartition(":")
        try:
            models[name or share] = float(share) if name else 1.0
        except ValueError:
            models[value] = 1.0
    if not all(0 < share < float("inf") for share in models.values()) or len(models) < len(values):
        raise UserError(f"--model {' '.join(values)}: each model once, with a share above 0")
    return models


def parse_prices(values):
    """["a:1.5:6"], USD per million tokens -> {("a", "in"): 1.5e-06, ("a", "out"): 6e-06}, USD per token."""
    prices = {}
    for value in values:
        try:
            name, *sides = value.rsplit(":", 2)
            prices[name, "in"], prices[name, "out"] = (float(side) / 1e6 for side in sides)
        except ValueError:
            raise UserError(f"--price {value}: write MODEL:IN:OUT, USD per million tokens") from None
    return prices


# ---- Prompts: templates, placeholder values and languages are data in prompts/ ----


def load_prompts(folder=PROMPTS):
    """prompts/ -> {"task_types", "placeholders", "num_tasks", "languages", "scripts", "templates"}."""
    try:
        prompts = json.loads((folder / "values.json").read_text("utf-8"))
        languages = json.loads((folder / "languages.json").read_text("utf-8"))
        prompts["templates"] = {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("*.txt"))}
        tail = languages["others_share"] / len(languages["others"])
        prompts["languages"] = languages["weights"] | {name: tail for name in languages["others"]}
        prompts["scripts"] = languages["scripts"]
        for kind, task_type in prompts["task_types"].items():  # a template that can't be filled fails here
            one_type = prompts | {"task_types": {kind: task_type}}
            render(prompts, **request_at(0, 0, one_type, {kind: ["a task"]}, {"": 1}))
            if task_type["brainstorm"]:
                render(prompts, **brainstorm_at(kind, 0, 0, prompts, {"": 1}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: {error!r}") from None
    return prompts


def render(prompts, step, type, params, **_):
    """The user message of a request: the template of its type and step with each {placeholder} filled."""
    template = prompts["templates"][type + (".brainstorm" if step == "brainstorm" else "")]
    return re.sub(r"\{(\w+)\}", lambda match: str(params[match[1]]), template)


def draw(rng, choices):
    """One of the choices: a list (equal odds), a {value: weight} object, or a single value.

    Only rng.random() is used: Python promises that its sequence for a seed stays the same in later versions.
    """
    if not isinstance(choices, (list, dict)):
        return choices
    weights = choices if isinstance(choices, dict) else dict.fromkeys(choices, 1)
    point = rng.random() * sum(weights.values())
    for value, weight in weights.items():
        point -= weight
        if point < 0:
            break
    return value


def request_at(i, seed, prompts, pools, models):
    """Example request i, a pure function of its arguments: {"id", "step", "type", "params", "model"}."""
    rng = random.Random(f"{seed}:{i}")
    kind = draw(rng, {name: task_type["weight"] for name, task_type in prompts["task_types"].items()})
    params = {name: draw(rng, values) for name, values in prompts["placeholders"][kind].items()}
    language = draw(rng, prompts["languages"])
    if kind == "bitext":
        others = {name: weight for name, weight in prompts["languages"].items() if name != language}
        params |= {"source_language": language, "target_language": draw(rng, others)}
    else:
        params["language"] = language
    if prompts["task_types"][kind]["brainstorm"]:
        params["task"] = pools[kind][int(rng.random() * len(pools[kind]))]
    return {"id": i, "step": "generate", "type": kind, "params": params, "model": draw(rng, models)}


def brainstorm_at(kind, k, seed, prompts, models):
    """Brainstorming request k of a type, likewise."""
    rng = random.Random(f"{seed}:{kind}:{k}")
    return {"id": f"{kind}-b{k}", "step": "brainstorm", "type": kind,
            "params": {"num_tasks": draw(rng, prompts["num_tasks"])}, "model": draw(rng, models)}


# ---- Step 1: the pool of tasks ----


def brainstorm(client, prompts, args):
    """Fills each asymmetric type's pool up to its share of --tasks and freezes them -> {type: [task, ...]}.

    A pool is what the brainstorms b0, b1, ... bring in this order, in whatever order they arrived.
    """
    run, path = client.run, client.run.folder / "tasks.jsonl"
    # The run's fingerprint: with the hash of tasks.jsonl, all that decides request i.
    settings = {"seed": args.seed, "models": args.models, "temperature": args.temperature,
                "top_p": args.top_p, "prompts": sha256(json.dumps(prompts, sort_keys=True).encode())}
    header = run.check_header(settings)
    if header["tasks"]:
        if header["tasks"] != sha256(path.read_bytes()):
            raise UserError(f"{path} has changed since the run began: restore it, or choose another --out")
        pools = collections.defaultdict(list)
        for row in read_jsonl(path):
            pools[row["type"]].append(row["task"])
        return pools
    request_k = lambda kind, k: brainstorm_at(kind, k, args.seed, prompts, args.models)  # noqa: E731
    weights = {kind: task["weight"] for kind, task in prompts["task_types"].items() if task["brainstorm"]}
    wanted = args.tasks or round(0.3 * args.n)
    while True:
        pools, todo = {}, []
        for kind, weight in weights.items():
            number = max(1, round(wanted * weight / sum(weights.values())))
            pool, k, barren = {}, 0, 0
            while len(pool) < number and barren < args.patience and f"{kind}-b{k}" in run.brainstorms:
                before = len(pool)
                for task in parse_tasks(run.brainstorms[f"{kind}-b{k}"]):
                    pool.setdefault(normalize(task), task)
                barren, k = 0 if len(pool) > before else barren + 1, k + 1
            pools[kind] = list(pool.values())[:number]
            if len(pool) < number and barren < args.patience:
                calls = -(-(number - len(pool)) // request_k(kind, k)["params"]["num_tasks"])
                todo += [request_k(kind, j) for j in range(k, k + calls)]
            elif not pool:
                raise UserError(f"{run.folder / 'raw.jsonl'}: no task could be read from {k} brainstorms of "
                                f"{kind}: the model may be too small")
        if not todo:
            break
        todo = [(row, render(prompts, **row)) for row in todo if row["id"] not in run.answered]
        standing = sum(map(len, pools.values()))
        print(f"{standing} of {wanted} tasks stand: {len(todo)} brainstorms for more", flush=True)
        if left := ask_all(iter(todo), len(todo), client):
            raise Stopping(f"{left} brainstorms got no answer ({client.trouble})")
    partial = path.with_name("tasks.jsonl.tmp")
    partial.write_text("".join(json.dumps({"type": kind, "task": task}, ensure_ascii=False) + "\n"
                               for kind in pools for task in pools[kind]), "utf-8")
    os.replace(partial, path)
    write_json(run.folder / "header.json", header | {"tasks": sha256(path.read_bytes())})
    return pools


def sha256(content):
    return hashlib.sha256(content).hexdigest()


# ---- Parsing: from an answer to a JSON object or a list of tasks ----

DECODER = json.JSONDecoder(strict=False)  # raw line breaks inside strings are the commonest slip of all
# A string ends at the first quote of its kind that JSON's grammar could follow: inner quotes need no escape.
# The atomic group (?>...) keeps a failed match from stretching the string, and so keeps the search linear.
STRING = r"""(?>"((?:\\.|[^\\])%s?)"(?=\s*[:,}\]])|'((?:\\.|[^\\])%s?)'(?=\s*[:,}\]]))"""
PAIR = re.compile(rf"\s*{STRING}\s*:\s*{STRING}\s*(?:,|(?=\}}))" % (("*",) * 4), re.DOTALL)
ITEM = re.compile(STRING % (("{0,500}",) * 2), re.DOTALL)


def unescape(double_quoted, single_quoted):
    """The text of a string literal, also with what JSON forbids: inner quotes, LaTeX's backslashes."""
    body = double_quoted or single_quoted or ""
    body = re.sub(r'\\(.)|"', lambda m: m[0] if m[1] and m[1] in '"\\/bfnrtu' else
                  "'" if m[1] == "'" else '\\\\' + m[1] if m[1] else '\\"', body, flags=re.DOTALL)
    try:
        return json.loads(f'"{body}"', strict=False)
    except ValueError:
        return body


def repair_object(text, start):
    """The flat object of strings that begins at text[start], despite wrong quotes and commas; or None."""
    result, position = {}, start + 1
    while match := PAIR.match(text, position):
        result[unescape(match[1], match[2])] = unescape(match[3], match[4])
        position = match.end()
    return result if result and text[position:].lstrip().startswith("}") else None


def find_objects(text):
    """Yields (object, whether it was repaired) for each readable JSON object in text, outer ones first."""
    for match in itertools.islice(re.finditer(r"\{", text), 100):  # keeps a wall of braces linear
        try:
            yield DECODER.raw_decode(text, match.start())[0], False
        except (ValueError, RecursionError):
            if (value := repair_object(text, match.start())) is not None:
                yield value, True


def after_thinking(text):
    """Drops leading <think> blocks, also one that never ends or whose opening tag the server swallowed."""
    while text.lstrip().startswith("<think>"):
        text = text.partition("</think>")[2]
    if text.lstrip().startswith(("{", "[")):
        return text
    _, closing, tail = text.rpartition("</think>")
    return tail if closing and re.search(r"[{[]", tail) else text  # else the tag stands inside the answer


def parse_object(text, keys, finish_reason=None):
    """The first object in an answer with all the keys -> (object, clean | in prose | repaired | doubled).

    >>> parse_object('Sure! {"S1": "a", "S2": "b",}', ["S1", "S2"])
    ({'S1': 'a', 'S2': 'b'}, 'repaired')
    """
    if finish_reason == "content_filter":
        raise Reject("content filter")
    if len(text) > 10 * MAX_CHARS:
        raise Reject("too long")
    text, seen = after_thinking(text).strip(), False
    for value, repaired in find_objects(text):
        seen = True
        if all(key in value for key in keys):
            if len(value) > len(keys):
                raise Reject("extra keys")
            if not all(isinstance(value[key], str) for key in keys):
                raise Reject("not a string")
            doubled = text.count(f'"{keys[0]}"') > 1  # a second object, or a loop
            alone = "clean" if text[0] + text[-1] == "{}" else "in prose"
            return value, "repaired" if repaired else "doubled" if doubled else alone
    if not text:
        raise Reject("truncated" if finish_reason == "length" else "empty answer")
    if finish_reason == "length" or text.count("{") > text.count("}"):
        raise Reject("truncated")
    raise Reject("missing keys" if seen else "broken JSON" if "{" in text else "no JSON object")


def parse_tasks(text):
    """The tasks in a brainstorming answer: a JSON list, or what can be saved of one, or a bulleted list."""
    text = after_thinking(text)[:MAX_CHARS]
    try:
        items = DECODER.raw_decode(text, text.index("["))[0]
    except (ValueError, RecursionError):
        items = [unescape(*pair) for pair in ITEM.findall(text)]
        items = items or re.findall(r"^\s*(?:[-*•]|\d+[.)])\s+(.+)$", text, re.MULTILINE)
    tasks = [" ".join(item.split()).strip('"“”') for item in items if isinstance(item, str)]
    return [task for task in tasks if 10 <= len(task) <= 500 and bad_characters(task) is None]


# ---- Cleaning: from an object to a training example ----


def normalize(text):
    """The form in which two texts count as the same: Unicode NFKC, no case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def bad_characters(text):
    """Finds control characters (the form feed that a bare \\frac becomes), lone surrogates, and U+FFFD."""
    return re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffd]", text)


class Scripts(dict):
    """A character's script, the first word of its Unicode name: "й" -> "CYRILLIC", "漢" -> "CJK"."""

    def __missing__(self, char):
        self[char] = unicodedata.name(char, "?").split()[0].split("-")[0] if char.isalpha() else None
        return self[char]


SCRIPTS = Scripts()


def wrong_script(text, scripts, enough=20):
    """Whether a text of at least `enough` letters holds next to none of the language's letters.

    One letter in twenty suffices, since code, formulas and quotations are Latin in any language.
    """
    letters = [script for char in text[:2000] if (script := SCRIPTS[char])]
    return len(letters) >= enough and 20 * sum(script in scripts for script in letters) < len(letters)


def contains_label(text, label):
    """Whether a label stands in the text: as whole words, or anywhere in scripts without spaces."""
    text, label = normalize(text), normalize(label)
    spaced = SCRIPTS[label[-1]] not in ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
    return bool(re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text)) if spaced else label in text


def make_example(row, prompts):
    """One answer -> (training example, how its object was found). Raises Reject.

    row: {"id", "type", "params", "response"} and, from live servers, "finish_reason".
    """
    kind, params = row["type"], row["params"]
    keys = prompts["task_types"][kind]["keys"]
    value, found = parse_object(row["response"], keys, row.get("finish_reason"))
    texts = [value[key].strip() for key in keys]
    query, positive, *negatives = texts
    sides = ("source_language", "target_language") if kind == "bitext" else ("language",)
    languages = [params[side] for side in sides]
    if not all(texts):
        raise Reject("empty text")
    if any(len(text) > MAX_CHARS for text in texts):
        raise Reject("too long")
    if any(map(bad_characters, texts)):
        raise Reject("bad characters")
    # Text that zlib shrinks to a tenth repeats itself over and over; prose shrinks to a half or a third.
    if any(len(text) > 300 and 10 * len(zlib.compress(raw := text.encode())) < len(raw) for text in texts):
        raise Reject("repetition")
    if len({normalize(text) for text in texts}) < len(texts):
        raise Reject("copy between fields")
    if kind == "long-short" and any(contains_label(query, label) for label in texts[1:]):
        raise Reject("label in input")
    message = normalize(render(prompts, "generate", kind, params))
    own = texts[:1] if kind == "long-short" else texts  # a label may stand in the prompt
    if any(len(text) > 20 and normalize(text) in message for text in own):
        raise Reject("copy of the prompt")
    scripts = [prompts["scripts"].get(language, ["LATIN"]) for language in languages]
    written = [(query, scripts[0])] + [(text, scripts[-1]) for text in texts[1:]]
    if kind != "bitext":
        written.append(("".join(texts), scripts[0]))  # together, short texts too are long enough to tell
    if any(wrong_script(*pair) for pair in written):
        raise Reject("wrong script")
    prompt = INSTRUCTIONS.get(kind) or params["task"]
    return {"prompt": prompt, "query": query, "pos": [positive], "neg": negatives, "type": kind,
            "language": "-".join(languages), "id": row["id"]}, found


# ---- The end of every run: examples and report; and, before any run, an estimate ----


def write_examples(rows, prompts, out):
    """Turns all answers into out (JSON lines, replaced at once) -> counts of what was kept and dropped.

    A function of the whole list of answers, so that a rerun also finds duplicates of earlier answers.
    """
    count = collections.defaultdict(collections.Counter)
    lengths = collections.defaultdict(lambda: array.array("I"))  # (type, field) -> characters
    tasks, seen, distinct = collections.defaultdict(set), set(), set()
    partial = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                count["answers"][row["step"]] += 1
                if row["step"] == "brainstorm":
                    tasks[row["type"]].update(map(normalize, parse_tasks(row["response"])))
                    continue
                try:
                    example, found = make_example(row, prompts)
                    pair = hash_text(normalize(example["query"]) + "\0" + normalize(example["pos"][0]))
                    if pair in seen:
                        raise Reject("duplicate")
                except Reject as reason:
                    count["dropped"][str(reason)] += 1
                    continue
                seen.add(pair)
                distinct.add(hash_text(normalize(example["prompt"])))
                kind, language = example["type"], example["language"]
                for name, key in [("type", kind), ("pair" if kind == "bitext" else "language", language),
                                  ("found", found)]:
                    count[name][key] += 1
                for name, text in [("query", example["query"]), *(("pos", t) for t in example["pos"]),
                                   *(("neg", t) for t in example["neg"])]:
                    lengths[f"{kind} {name}"].append(len(text))
                file.write(json.dumps(example, ensure_ascii=False) + "\n")
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    count["tasks"].update({kind: len(pool) for kind, pool in tasks.items()})
    report = {"examples": len(seen), "distinct prompts": len(distinct)}
    report |= {name: dict(counter.most_common()) for name, counter in count.items()}
    quantiles = {name: sorted(values) for name, values in sorted(lengths.items())}
    report["characters"] = {name: {f"p{q}": values[len(values) * q // 100] for q in (10, 50, 90)}
                            for name, values in quantiles.items()}
    return report


def hash_text(text):
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def read_answers(path, prompts, log=True):
    """Yields the rows of raw.jsonl or of a recorded file; a row that is no answer is a UserError."""
    for number, row in enumerate(read_jsonl(path, log), 1):
        try:
            render(prompts, **row)  # its type is known, and every placeholder is there
            if not isinstance(row["response"], str) or not isinstance(row["id"], (int, str)):
                raise ValueError("response or id")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: no answer to our prompts ({error!r}): delete it") from None
        yield row


def print_report(report, out):
    """The counts beside the paper's figures (section 4.1 and figure 2)."""
    answers, ledger = report.get("answers", {}), report["ledger"]
    print(f"{out}: {report['examples']:,} examples from {answers.get('generate', 0):,} answers and "
          f"{answers.get('brainstorm', 0):,} brainstorms\n{'':24}{'here':>12}{'paper':>14}")
    for name, paper in PAPER.items():
        if name in ("type", "language"):
            here = report.get(name, {})
            rows = [(key, here.get(key, 0), share) for key, share in paper.items()]
            if name == "language":
                others = sum(here.values()) - sum(number for _, number, _ in rows)
                rows.append((f"{len(here.keys() - paper.keys())} others", others, 100 - sum(paper.values())))
            for key, number, share in rows:
                print(f"{key:24}{100 * number / max(1, sum(here.values())):>11.1f}%"
                      f"{100 * share / max(100, sum(paper.values())):>13.1f}%")
        else:
            print(f"{name:24}{report.get(name, ledger.get('tokens', 0)):>12,}{paper:>14,}")
    for title, name in [("distinct tasks", "tasks"), ("objects found", "found"), ("dropped", "dropped")]:
        items = [f"{key} {number:,}" for key, number in report.get(name, {}).items()]
        print(f"{title}: {', '.join(items) or 'none'}")
    if ledger:
        print("ledger: " + ", ".join(f"{key} {value:,}" for key, value in ledger.items() if key != "models"))


def report(args, prompts):
    """Rebuilds --out from all answers and prints and writes the report; needs neither network nor lock."""
    source = args.replay or args.folder / "raw.jsonl"
    counts = write_examples(read_answers(source, prompts, log=not args.replay), prompts, args.out)
    counts["ledger"] = {} if args.replay else Run(args.folder, args.prices, read_only=True).ledger()
    write_json(args.folder / "report.json", counts)
    print_report(counts, args.out)


def estimate(prompts, args):
    """--dry-run: one prompt of each kind, and the size of the whole job."""
    pools = collections.defaultdict(lambda: ["Given this, find that (stands for a brainstormed task)."])
    calls = (args.tasks or round(0.3 * args.n)) // 20 + 1
    kinds = [kind for kind, task in prompts["task_types"].items() if task["brainstorm"]]
    sample = [request_at(i, args.seed, prompts, pools, args.models) for i in range(min(args.n, 5000))]
    sample += [brainstorm_at(kinds[k % len(kinds)], k, args.seed, prompts, args.models)
               for k in range(max(len(kinds), calls * len(sample) // args.n))]
    seen, tokens = set(), collections.Counter()
    for request in sample:
        message = render(prompts, **request)
        if (request["step"], request["type"]) not in seen:
            seen.add((request["step"], request["type"]))
            print(f"--- {request['type']}, {request['step']}, id {request['id']} ---\n{message}")
        answer = ANSWER_TOKENS["brainstorm" if request["step"] == "brainstorm" else request["type"]]
        tokens.update(tokens_of(request["model"], estimate_tokens(message), answer))
    scale = (args.n + calls) / len(sample)
    used = {"in": 0, "out": 0}
    for (_, side), number in tokens.items():
        used[side] += round(scale * number)
    usd = scale * sum(number * args.prices.get(key, 0) for key, number in tokens.items())
    hours = (used["out"] / 50 + (args.n + calls)) / args.concurrency / 3600
    print(f"--- estimate for {args.n:,} examples and about {calls:,} brainstorms ---\n"
          f"tokens: {used['in']:,} in, {used['out']:,} out (answers as long as the recorded ones; at most "
          f"{(args.n + calls) * args.max_answer_tokens:,} out)\n"
          f"money: ${usd:,.2f}" + ("" if args.prices else " (no --price given)") +
          f"\ntime: {hours:.1f} h with --concurrency {args.concurrency}, at 1 s an answer and 20 ms a token")


def main(argv=None):
    args, code = options(argv), 0
    prompts = load_prompts()
    if args.dry_run:
        return estimate(prompts, args)
    if not args.replay and not args.report:
        run = Run(args.folder, args.prices, args.budget_usd, args.budget_tokens)
        try:
            client = Client(args, run)
            pools = brainstorm(client, prompts, args)
            missing = [i for i in range(args.n) if i not in run.answered]
            todo = (request_at(i, args.seed, prompts, pools, args.models) for i in missing)
            if left := ask_all(((row, render(prompts, **row)) for row in todo), len(missing), client):
                raise Stopping(f"{left} requests got no answer ({client.trouble})")
        except Stopping as reason:
            print(f"stopped: {reason}; what was answered stays, and the same command goes on from there")
            code = 0 if isinstance(reason, BudgetReached) else 1
            if run.answered == run.brainstorms.keys():
                return code
        finally:
            run.close()
    report(args, prompts)
    return code


if __name__ == "__main__":
    command(main)
