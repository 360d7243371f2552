"""Writes the training data: an LLM's answers to prompts drawn at random (section 3.1 of arXiv 2401.00368).

    python generate.py --replay data/recorded.jsonl.gz                # recorded answers -> data/synthetic.jsonl, no network
    export OPENAI_API_KEY=... OPENAI_BASE_URL=https://api.openai.com/v1        # or any server that speaks this API
    python generate.py --model gpt-4o-mini --n 1000 --dry-run         # sample prompts, tokens, money, time; no network
    python generate.py --model gpt-4o-mini --n 1000 --price gpt-4o-mini:0.15:0.60 --budget-usd 2
    python generate.py --model a:0.75 --model b:0.25 --n 500_000      # the paper's scale; the same line again resumes
    python generate.py --report                                       # what is there, beside the paper's figures

Six types of task. The four asymmetric ones (short-long, long-short, short-short, long-long) take two steps: the LLM
brainstorms a pool of tasks, then writes one example of one task in a fresh conversation. STS and bitext take one
step. Each answer is parsed, validated and deduplicated into one line of training data:
    {"prompt": instruction, "query": text, "pos": [text], "neg": [text] or [], "type", "language", "id"}

The answers themselves live in the folder named like --out without .jsonl, which makes every run resumable:
    header.json     what decides the requests: seed, models, sampling, and hashes of prompts/ and tasks.jsonl
    tasks.jsonl     the frozen pool of tasks: request i is a function of the header, this file and i alone
    started.jsonl   a line before each try, a line after each refusal: a try with neither answer nor refusal may
                    have been paid for and lost, and counts against the budget as if it had been
    raw.jsonl       every answer as it came, with finish_reason and usage, flushed before anything reads it
    report.json     the last report
An answer in raw.jsonl is never asked for again. A kill loses at most the --concurrency answers under way.
"""

import argparse
import array
import collections
import datetime
import email.utils
import fcntl
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import sys
import threading
import time
import unicodedata
import urllib.parse
import zlib
from pathlib import Path

import requests
import urllib3

PROMPTS = Path(__file__).parent / "prompts"
INSTRUCTIONS = {"sts": "Retrieve semantically similar text.", "bitext": "Retrieve parallel sentences."}  # Table 16
MAX_CHARS = 20_000  # of one text: longer ones are loops, and training cuts at 512 tokens anyway
ANSWER_TOKENS = {"short-long": 405, "long-short": 125, "sts": 108, "bitext": 112, "long-long": 512,
                 "short-short": 31, "brainstorm": 480}  # mean over data/recorded.jsonl.gz, for --dry-run
PAPER = {"examples": 500_000, "distinct prompts": 150_000, "tokens": 180_000_000,  # section 4.1
         "type": {"short-long": 167, "long-short": 122, "sts": 99, "bitext": 89, "long-long": 17, "short-short": 13},
         "language": {"English": 43.1, "Polish": 3.0, "Japanese": 2.9, "Italian": 2.9, "Russian": 2.9,
                      "Indonesian": 2.9, "German": 2.9, "Persian": 2.9, "Spanish": 2.8, "Chinese": 2.8,
                      "French": 2.8, "Portuguese": 2.8, "Dutch": 2.8, "Arabic": 2.7}}


class UserError(Exception):
    """A mistake that the user can mend: printed as one line, exit code 2."""


class Reject(Exception):
    """An answer that can't become an example; str(error) is the reason that the report counts."""


class Stopping(Exception):
    """The run ends before its end, in good order; str(error) says why."""


class BudgetReached(Stopping):
    """One more try could break a budget."""


def options(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("data/synthetic.jsonl"), help="training examples; the run's folder beside it")
    add("--replay", type=Path, metavar="FILE", help="read recorded answers (.jsonl, .jsonl.gz) instead of asking")
    add("--report", action="store_true", help="rebuild --out from the answers on disk and report; no network")
    add("--dry-run", action="store_true", help="sample prompts and an estimate of tokens, money and time; no network")
    add("--n", type=int, default=1000, help="example requests; raise it later to extend a run (paper: 500_000)")
    add("--tasks", type=int, help="distinct tasks over the four asymmetric types (default 0.3 n, the paper's ratio)")
    add("--patience", type=int, default=5, help="brainstorms in a row without a new task that end the brainstorming")
    add("--seed", type=int, default=0)
    add("--model", action="append", default=[], metavar="NAME[:SHARE]", help="several models share the requests")
    add("--temperature", type=float, default=1.0)
    add("--top-p", type=float, default=1.0)
    add("--json-mode", action=argparse.BooleanOptionalAction, default=True, help="ask for response_format json_object")
    add("--max-answer-tokens", type=int, default=4096)
    add("--concurrency", type=int, default=16, help="requests under way at once")
    add("--timeout", type=float, default=180, help="seconds for one answer, from first byte sent to last received")
    add("--tries", type=int, default=8, help="tries of one request before it is left for a later run")
    add("--backoff", type=float, default=1.0, help="seconds before the first retry, doubled for each further one")
    add("--price", action="append", default=[], metavar="MODEL:IN:OUT", help="USD per million tokens in and out")
    add("--budget-usd", type=float, help="stop before the run as a whole has cost more")
    add("--budget-tokens", type=int, help="stop before the run as a whole has used more tokens, in and out together")
    add("--allow-http", action="store_true", help="send the key unencrypted to a host that isn't this one")
    args = parser.parse_args(argv)
    for name in ("n", "concurrency", "timeout", "tries", "patience", "max_answer_tokens"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive")
    args.models, args.prices = parse_models(args.model), parse_prices(args.price)
    if not args.models and not (args.replay or args.report):
        raise UserError("--model NAME is missing (or --replay FILE, to read recorded answers)")
    args.folder = args.out.with_suffix("")
    if args.folder == args.out:
        raise UserError(f"--out {args.out}: give the file a suffix, as in {args.out}.jsonl")
    for name in args.models:
        if args.budget_usd is not None and (name, "in") not in args.prices:
            raise UserError(f"--budget-usd needs the price of {name}: add --price {name}:IN:OUT")
    return args


def parse_models(values):
    """["a:0.75", "b:0.25"] -> {"a": 0.75, "b": 0.25}; a tail that is no number belongs to the name (llama3:8b)."""
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
    """["a:0.15:0.60"], USD per million tokens -> {("a", "in"): 1.5e-07, ("a", "out"): 6e-07}, USD per token."""
    prices = {}
    for value in values:
        try:
            name, *sides = value.rsplit(":", 2)
            prices[name, "in"], prices[name, "out"] = (float(side) / 1e6 for side in sides)
        except ValueError:
            raise UserError(f"--price {value}: write MODEL:IN:OUT, USD per million tokens, as in a:0.15:0.60") from None
    return prices


# ---- Prompts: templates, placeholder values and languages are data in prompts/ ----


def load_prompts(folder=PROMPTS):
    """Reads prompts/ into {"task_types", "placeholders", "num_tasks", "languages", "scripts", "templates"}."""
    try:
        prompts = json.loads((folder / "values.json").read_text("utf-8"))
        languages = json.loads((folder / "languages.json").read_text("utf-8"))
        prompts["templates"] = {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("*.txt"))}
        tail = languages["others_share"] / len(languages["others"])
        prompts["languages"] = languages["weights"] | {name: tail for name in languages["others"]}
        prompts["scripts"] = languages["scripts"]
        for kind, settings in prompts["task_types"].items():  # a template that can't be filled fails here
            tasks = {kind: ["task"]}
            render(prompts, **request_at(0, 0, prompts | {"task_types": {kind: settings}}, tasks, {"": 1}))
            if settings["brainstorm"]:
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

    It uses rng.random() alone, whose sequence for a seed Python promises to keep over versions.
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


def request_at(i, seed, prompts, tasks, models):
    """Example request i, a pure function of its arguments: {"id", "step", "type", "params", "model"}."""
    rng = random.Random(f"{seed}:{i}")
    kind = draw(rng, {name: settings["weight"] for name, settings in prompts["task_types"].items()})
    params = {name: draw(rng, values) for name, values in prompts["placeholders"][kind].items()}
    language = draw(rng, prompts["languages"])
    if kind == "bitext":
        others = {name: weight for name, weight in prompts["languages"].items() if name != language}
        params |= {"source_language": language, "target_language": draw(rng, others)}
    else:
        params["language"] = language
    if prompts["task_types"][kind]["brainstorm"]:
        params["task"] = tasks[kind][int(rng.random() * len(tasks[kind]))]
    return {"id": i, "step": "generate", "type": kind, "params": params, "model": draw(rng, models)}


def brainstorm_at(kind, k, seed, prompts, models):
    """Brainstorming request k of a type, likewise."""
    rng = random.Random(f"{seed}:{kind}:{k}")
    return {"id": f"{kind}-b{k}", "step": "brainstorm", "type": kind,
            "params": {"num_tasks": draw(rng, prompts["num_tasks"])}, "model": draw(rng, models)}


# ---- Parsing: from an answer to a JSON object or a list of tasks ----

DECODER = json.JSONDecoder(strict=False)  # raw line breaks inside strings are the commonest slip of all
# A string ends at the first quote of its kind that JSON's grammar could follow, so inner quotes need no escape.
# The atomic group (?>...) keeps a failed match from stretching the string, and so keeps the search linear.
STRING = r"""(?>"((?:\\.|[^\\])%s?)"(?=\s*[:,}\]])|'((?:\\.|[^\\])%s?)'(?=\s*[:,}\]]))"""
PAIR = re.compile(rf"\s*{STRING}\s*:\s*{STRING}\s*(?:,|(?=\}}))" % (("*",) * 4), re.DOTALL)
ITEM = re.compile(STRING % (("{0,500}",) * 2), re.DOTALL)


def unescape(double_quoted, single_quoted):
    """The text of a string literal that may hold what JSON forbids: inner quotes, stray backslashes (as in LaTeX)."""
    body = double_quoted or single_quoted or ""
    body = re.sub(r'\\(.)|"', lambda m: m[0] if m[1] and m[1] in '"\\/bfnrtu' else
                  "'" if m[1] == "'" else '\\\\' + m[1] if m[1] else '\\"', body, flags=re.DOTALL)
    try:
        return json.loads(f'"{body}"', strict=False)
    except ValueError:
        return body


def repair_object(text, start):
    """Reads a flat object of strings at text[start] == "{" with trailing commas or wrong quotes; None if it can't."""
    result, position = {}, start + 1
    while match := PAIR.match(text, position):
        result[unescape(match[1], match[2])] = unescape(match[3], match[4])
        position = match.end()
    return result if result and text[position:].lstrip().startswith("}") else None


def find_objects(text):
    """Yields (object, whether it was repaired) for each readable JSON object in text, outer ones first."""
    for match in itertools.islice(re.finditer(r"\{", text), 100):  # keeps the time linear on a wall of braces
        try:
            yield DECODER.raw_decode(text, match.start())[0], False
        except (ValueError, RecursionError):
            if (value := repair_object(text, match.start())) is not None:
                yield value, True


def after_thinking(text):
    """Drops <think> blocks, also one that never ends or whose opening tag the server swallowed."""
    if text.lstrip().startswith(("{", "[")):
        return text
    return re.sub(r"<think>.*?(?:</think>|\Z)", "", text, flags=re.DOTALL).rpartition("</think>")[2]


def parse_object(text, keys, finish_reason=None):
    """The first object in an LLM's answer that has all of the keys, and how it was found ("clean", "in prose", ...).

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
            return value, "repaired" if repaired else "clean" if text[0] + text[-1] == "{}" else "in prose"
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
    tasks = [" ".join(item.split()) for item in items if isinstance(item, str)]
    return [task for task in tasks if 10 <= len(task) <= 500 and bad_characters(task) is None]


# ---- Cleaning: from an object to a training example ----


def normalize(text):
    """The form in which two texts count as the same: Unicode NFKC, no case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def bad_characters(text):
    """Finds control characters (such as the form feed that a bare \\frac becomes), lone surrogates, and U+FFFD."""
    return re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffd]", text)


class Scripts(dict):
    """Maps a character to its script, the first word of its Unicode name: "й" -> "CYRILLIC", "漢" -> "CJK"."""

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
    """Whether a label stands in the text: as whole words, or anywhere in scripts that put no spaces between words."""
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
    languages = [params["source_language"], params["target_language"]] if kind == "bitext" else [params["language"]]
    if not all(texts):
        raise Reject("empty text")
    if any(len(text) > MAX_CHARS for text in texts):
        raise Reject("too long")
    if any(map(bad_characters, texts)):
        raise Reject("bad characters")
    # Text that zlib shrinks to a tenth repeats itself over and over; prose shrinks to a half or a third.
    if any(len(text) > 300 and len(zlib.compress(text.encode())) * 10 < len(text.encode()) for text in texts):
        raise Reject("repetition")
    if len({normalize(text) for text in texts}) < len(texts):
        raise Reject("copy between fields")
    if kind == "long-short" and any(contains_label(query, label) for label in texts[1:]):
        raise Reject("label in input")
    message = normalize(render(prompts, "generate", kind, params))
    if any(len(text) > 20 and normalize(text) in message for text in (texts[:1] if kind == "long-short" else texts)):
        raise Reject("copy of the prompt")
    for position, text in enumerate(texts):
        language = languages[min(position, len(languages) - 1)]
        if wrong_script(text, prompts["scripts"].get(language, ["LATIN"])):
            raise Reject("wrong script")
    return {"prompt": INSTRUCTIONS.get(kind) or params["task"], "query": query, "pos": [positive], "neg": negatives,
            "type": kind, "language": "-".join(languages), "id": row["id"]}, found


# ---- The run on disk: what was asked, what was answered, what it cost ----


class Run:
    """A run's folder and its ledger: one process at a time holds it, many threads share it.

    spent, lost, reserved: Counters {(model, "in" or "out"): tokens} of the answers on disk, of tries that may have
    been paid for without an answer, and of the tries under way (the most they can use).
    """

    def __init__(self, folder, prices, budget_usd=None, budget_tokens=None, read_only=False):
        self.folder, self.prices = folder, prices
        self.budget_usd, self.budget_tokens = budget_usd, budget_tokens
        self.answered, self.brainstorms, self.pending = set(), {}, {}
        self.spent, self.lost, self.reserved = (collections.Counter() for _ in range(3))
        self.tries_lost = self.usage_estimated = 0
        self.changed, self.stop = threading.Condition(), threading.Event()
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(folder / "lock", "w")
            try:  # the kernel lets go of this lock with the process, even a killed one
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{folder}: another process works on this run; wait for it or stop it") from None
            self.raw, self.started = open_log(folder / "raw.jsonl"), open_log(folder / "started.jsonl")
        for row in read_jsonl(folder / "raw.jsonl"):
            self.count_answer(row)
        tries, most = collections.Counter(), {}
        for row in read_jsonl(folder / "started.jsonl"):
            tries[row["id"]] += -1 if "refused" in row else 1
            if "refused" not in row:
                most[row["id"]] = tokens_of(row["model"], row["tokens_in"], row["tokens_out"])
        for key, number in tries.items():
            for _ in range(number - (key in self.answered)):
                self.count_lost(most[key])

    def close(self):
        for file in (self.raw, self.started, self.lock):
            file.close()

    def ledger(self):
        """What the run has used and cost so far, for the report."""
        sides = {side: sum(n for key, n in self.spent.items() if key[1] == side) for side in ("in", "out")}
        models = {model: {side: self.spent[model, side] for side in sides} for model, _ in self.spent}
        return {"tokens": self.spent.total(), **{f"tokens {side}": n for side, n in sides.items()},
                "usd": round(self.cost(self.spent), 4), "answers with estimated usage": self.usage_estimated,
                "tries perhaps paid without an answer": self.tries_lost,
                "their tokens at most": self.lost.total(), "models": models}

    def count_answer(self, row):
        self.answered.add(row["id"])
        if row["step"] == "brainstorm":
            self.brainstorms[row["id"]] = row["response"]
        self.spent.update(tokens_of(row["model"], row["usage"]["prompt_tokens"], row["usage"]["completion_tokens"]))
        self.usage_estimated += "estimated" in row["usage"]

    def count_lost(self, tokens):
        self.lost.update(tokens)
        self.tries_lost += 1

    def cost(self, tokens):
        """USD of a Counter of tokens; a model without a price costs nothing."""
        return sum(number * self.prices.get(key, 0) for key, number in tokens.items())

    def fits(self, tokens):
        """Whether a try stays within the budgets even if all that is under way uses its most."""
        total = self.spent + self.lost + self.reserved + tokens
        return ((self.budget_usd is None or self.cost(total) <= self.budget_usd)
                and (self.budget_tokens is None or total.total() <= self.budget_tokens))

    def start(self, request, tokens_in, tokens_out):
        """Logs a try before it is sent. Where a budget could break it waits for other tries to end, or raises Stopping."""
        tokens = tokens_of(request["model"], tokens_in, tokens_out)
        with self.changed:
            while not self.fits(tokens):
                if not self.pending:
                    raise BudgetReached("the budget is used up")
                self.changed.wait()
            if self.stop.is_set():
                raise Stopping("interrupted")
            append(self.started, {"id": request["id"], "model": request["model"], "tokens_in": tokens_in,
                                  "tokens_out": tokens_out})
            self.pending[request["id"]] = tokens
            self.reserved.update(tokens)

    def end(self, request, row=None, refused=None):
        """Ends a try: with an answer, with a refusal (an HTTP status, unpaid), or with neither (perhaps paid)."""
        with self.changed:
            tokens = self.pending.pop(request["id"])
            self.reserved.subtract(tokens)
            self.changed.notify_all()
            if row is not None:
                append(self.raw, row)
                self.count_answer(row)
            elif refused is not None:
                append(self.started, {"id": request["id"], "refused": refused})
            else:
                self.count_lost(tokens)

    def check_header(self, header):
        """Compares the settings with those the run was begun with; writes header.json where it is new."""
        path = self.folder / "header.json"
        if not path.exists():
            write_json(path, header | {"tasks": None})
        known = json.loads(path.read_text("utf-8"))
        for key, value in header.items():
            if known.get(key) != value:
                raise UserError(f"{path}: the run was begun with {key} {known.get(key)}, not {value}: "
                                "go back to that, or choose another --out")
        return known


def tokens_of(model, tokens_in, tokens_out):
    return collections.Counter({(model, "in"): tokens_in, (model, "out"): tokens_out})


def open_log(path):
    """Opens an append-only JSON-lines file; a last line torn by a kill is cut, so that its request is made again."""
    file = open(path, "ab+", buffering=0)
    size = end = file.seek(0, os.SEEK_END)
    while end > 0:  # backwards in blocks to the last line feed
        begin = max(0, end - 65536)
        file.seek(begin)
        if (newline := file.read(end - begin).rfind(b"\n")) >= 0:
            end = begin + newline + 1
            break
        end = begin
    if end < size:
        file.truncate(end)
    return file


def append(file, row):
    """Appends a row in one unbuffered write: when this returns, a kill can't lose it any more."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    if (written := file.write(line)) != len(line):  # a full disk; half a line must not meet the next one
        file.truncate(file.seek(0, os.SEEK_END) - written)
        raise UserError(f"{file.name}: the disk is full; make room and run the same command again")


def read_jsonl(path, log=True):
    """Yields the rows of a JSON-lines file, gzipped or not; in a log, a last line still being written doesn't count."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.endswith("\n") or not log:
                    yield json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}:{number}: not JSON ({error}): mend or delete this line") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: can't be read: {error}") from None


def write_json(path, value):
    partial = path.with_name(path.name + ".tmp")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", "utf-8")
    os.replace(partial, path)


# ---- HTTP: one request to an OpenAI-compatible server, tried until it is answered ----

RETRY = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
HINTS = {401: "check OPENAI_API_KEY", 402: "the account needs credit", 403: "check what the key may do",
         404: "check OPENAI_BASE_URL, which mostly ends in /v1, and --model", 429: "the quota is used up"}
# What a 400 calls the fields that some servers don't take.
OPTIONAL = {"max_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p",
            "response_format": "response.format|json.object|json.mode|json.schema"}


class Retry(Exception):
    """A try that failed in a way that may pass: (how, what the ledger notes as a refusal or None if it may be paid)."""


def estimate_tokens(text):
    """A rough count, for servers that report no usage: four UTF-8 bytes a token."""
    return len(text.encode("utf-8", "replace")) // 4 + 1


class Client:
    """Asks for chat completions over HTTP, from many threads. The API key stays in here."""

    def __init__(self, args, run):
        self.args, self.run, self.local = args, run, threading.local()
        self.dropped = collections.defaultdict(set)  # model -> body fields that its server doesn't take
        self.retries, self.trouble, self.not_before = 0, "", 0.0
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        base = urllib.parse.urlsplit(os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1")
        if base.scheme not in ("http", "https") or not base.hostname or base.username or base.password:
            raise UserError("OPENAI_BASE_URL must look like https://host/v1; a key goes into OPENAI_API_KEY")
        self.url = base._replace(path=base.path.rstrip("/") + "/chat/completions").geturl()
        self.shown = f"{base.scheme}://{base.netloc}{base.path}"  # without the query, which may hold a secret
        if not self.key.isascii() or not self.key.isprintable():
            raise UserError("OPENAI_API_KEY holds a character that no key has: copy it again")
        if not self.key and base.hostname == "api.openai.com":
            raise UserError("set OPENAI_API_KEY, or OPENAI_BASE_URL to a server that needs no key")
        loopback = base.hostname in ("localhost", "::1") or base.hostname.startswith("127.")
        if self.key and base.scheme == "http" and not loopback and not args.allow_http:
            raise UserError(f"{self.shown}: the key would travel unencrypted; use https, or --allow-http")
        self.headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.key:
            self.headers["Authorization"] = f"Bearer {self.key}"
            if base.hostname.endswith(".azure.com"):
                self.headers["api-key"] = self.key
        # Resolved once: requests would look up proxies and .netrc in the environment again for each request.
        self.proxies = requests.utils.get_environ_proxies(self.url)
        self.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True

    def redact(self, text):
        """Takes the key out of a server's words. Shorter keys are placeholders like EMPTY, and words of their own."""
        return text.replace(self.key, "[key]") if len(self.key) >= 8 else text

    def body(self, request, message):
        """The JSON body of a request, without the fields that the model's server doesn't take."""
        body = {"model": request["model"], "messages": [{"role": "user", "content": message}],
                "temperature": self.args.temperature, "top_p": self.args.top_p,
                "max_tokens": self.args.max_answer_tokens}
        if self.args.json_mode and request["step"] == "generate":
            body["response_format"] = {"type": "json_object"}
        dropped = self.dropped[request["model"]]
        if "max_tokens" in dropped:  # the newer name
            body["max_completion_tokens"] = body["max_tokens"]
        return {field: value for field, value in body.items() if field not in dropped}

    def ask(self, request, message):
        """Tries a request up to --tries times; its answer goes to raw.jsonl. Returns whether there was one.

        Raises UserError where no retry can help (a wrong key, an unknown model, no quota), Stopping at the budget.
        """
        failures = 0
        while failures < self.args.tries:
            self.run.stop.wait(max(0.0, self.not_before - time.monotonic()))
            body = self.body(request, message)
            # A token of three bytes, and 50 for the server's chat template, is more than any prompt of ours needs.
            self.run.start(request, len(message.encode()) // 3 + 50, self.args.max_answer_tokens)
            row, refused, headers, begun = None, None, {}, time.monotonic()
            try:
                status, headers, content = self.post(body)
                refused = None if status == 200 else status
                row = self.read_answer(request, message, body, status, content)
                if row is not None:
                    row["seconds"] = round(time.monotonic() - begun, 3)
                    return True
                continue  # without the field that the server doesn't take
            except Retry as failure:
                trouble, refused = failure.args
                self.retries, self.trouble = self.retries + 1, self.tidy(trouble)
            finally:
                self.run.end(request, row, refused)
            self.wait(failures, headers, everyone=refused == 429)
            failures += 1
        return False

    def post(self, body):
        """One POST -> (status, headers, body bytes). Raises Retry if the wire fails."""
        deadline = time.monotonic() + self.args.timeout
        if not hasattr(self.local, "session"):  # a session isn't made for sharing between threads
            self.local.session = session = requests.Session()
            session.trust_env, session.proxies, session.verify = False, self.proxies, self.verify
            session.headers = self.headers
        try:
            with self.local.session.post(self.url, data=json.dumps(body), stream=True, allow_redirects=False,
                                         timeout=(min(10, self.args.timeout), self.args.timeout)) as response:
                chunks = []
                while chunk := response.raw.read1(65536, decode_content=True):
                    chunks.append(chunk)
                    if time.monotonic() > deadline:  # requests' own timeout begins anew with each byte of a drip
                        raise Retry(f"no whole answer within {self.args.timeout:g} s", None)
                return response.status_code, response.headers, b"".join(chunks)
        except (OSError, urllib3.exceptions.HTTPError) as error:  # requests' exceptions are OSErrors
            reason = getattr(error.args[0], "reason", None) if error.args else None
            unsent = isinstance(reason, (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError))
            raise Retry(f"{type(error).__name__}: {reason or error}", "no connection" if unsent else None) from None

    def read_answer(self, request, message, body, status, content):
        """A response -> the row for raw.jsonl, or None if a field was dropped. Raises Retry or UserError."""
        text = content.decode("utf-8", "replace")
        try:
            answer = json.loads(text)
            error = answer.get("error") or {}
            text, code = (str(error.get("message")), error.get("code") or error.get("type")) if error else (text, None)
        except (ValueError, AttributeError, RecursionError):
            answer = code = None
        if status == 200:
            try:
                choice, usage = answer["choices"][0], answer.get("usage") or {}
                text = choice["message"].get("content")
                text = self.redact(text) if isinstance(text, str) else ""  # a refusal or a tool call has none
                usage = {key: usage.get(key) for key in ("prompt_tokens", "completion_tokens")}
            except (LookupError, TypeError, AttributeError):
                raise Retry(f"status 200 without a chat completion: {text}", None) from None
            if not all(type(count) is int and count >= 0 for count in usage.values()):
                usage = {"prompt_tokens": estimate_tokens(message), "completion_tokens": estimate_tokens(text),
                         "estimated": True}
            finish_reason = self.redact(str(choice.get("finish_reason")))
            return request | {"response": text, "finish_reason": finish_reason, "usage": usage}
        if status == 400 and code in ("content_filter", "content_policy_violation", "invalid_prompt"):
            # The provider's verdict on this one prompt: an answer of a kind, which asking again won't change.
            usage = {"prompt_tokens": 0, "completion_tokens": 0}
            return request | {"response": "", "finish_reason": "content_filter", "usage": usage}
        if status == 400:
            named = {field for field, words in OPTIONAL.items() if field in body and re.search(words, text, re.I)}
            if named:
                self.dropped[request["model"]] |= named
                self.trouble = f"{request['model']} doesn't take {', '.join(sorted(named))}: going on without"
                return None
        if status in RETRY and code not in ("insufficient_quota", "billing_hard_limit_reached"):
            raise Retry(f"status {status}: {text}", status)
        hint = HINTS.get(status, "no retry would help")
        raise UserError(f"{self.shown} answered {status}: {self.tidy(text)} ({hint})")

    def tidy(self, text):
        return " ".join(self.redact(text).split())[:200]

    def wait(self, failures, headers, everyone):
        """Sleeps before a retry: as Retry-After says, or twice as long each time; wakes when the run stops."""
        seconds = min(60, self.args.backoff * 2**failures) * random.uniform(0.5, 1)  # jitter spreads the herd
        if (asked := retry_after(headers)) is not None:
            if asked > 600:
                raise UserError(f"{self.shown} asks to wait {asked:.0f} s: run the same command again after that")
            seconds = max(seconds, asked)
        if everyone:  # a rate limit is the whole client's, so the other threads' next tries wait as well
            self.not_before = max(self.not_before, time.monotonic() + seconds)
        self.run.stop.wait(seconds)


def retry_after(headers):
    """Seconds that a response asks to wait, by Retry-After as a number or as an HTTP date; None if it doesn't.

    >>> retry_after({"Retry-After": "7"})
    7.0
    """
    value = headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, TypeError):
            return None


# ---- The two steps of the paper ----


def ask_all(todo, total, client, prompts):
    """Asks each of the requests that has no answer yet, --concurrency at a time; returns how many were left without.

    Raises what stopped it early: UserError, Stopping or KeyboardInterrupt. Answers under way are still taken in.
    """
    run, args, guard = client.run, client.args, threading.Lock()
    todo = (request for request in todo if request["id"] not in run.answered)
    done, left, in_a_row, failure, begun = 0, 0, 0, None, time.monotonic()

    def work():
        nonlocal done, left, in_a_row, failure
        try:
            while not run.stop.is_set():
                with guard:
                    request = next(todo, None)
                if request is None:
                    return
                answered = client.ask(request, render(prompts, **request))
                with guard:
                    done, left, in_a_row = done + answered, left + (not answered), 0 if answered else in_a_row + 1
                    if in_a_row > args.concurrency:
                        raise Stopping(f"{in_a_row} requests in a row failed {args.tries} times each")
        except Exception as error:
            failure = failure or error
            run.stop.set()

    def show(end):
        with run.changed:
            spent = run.spent + run.lost
        rate = done / (time.monotonic() - begun)
        hours, rest = divmod(round((total - done - left) / rate) if rate else 0, 3600)
        line = (f"{done:,} of {total:,}, {rate:.1f}/s, {spent.total():,} tokens, ${run.cost(spent):.2f}, "
                f"{hours}:{rest // 60:02}:{rest % 60:02} left")
        line += f", {client.retries} retries ({client.trouble})" if client.trouble else ""
        print("\r" + line[:os.get_terminal_size().columns - 1].ljust(79) if live else line, end=end, flush=True)

    live, shown = sys.stdout.isatty(), begun
    threads = [threading.Thread(target=work, daemon=True) for _ in range(args.concurrency)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
                if time.monotonic() - shown > (0.2 if live else 10):
                    shown = time.monotonic()
                    show("" if live else "\n")
    except KeyboardInterrupt:
        run.stop.set()
        print("\nstopping: waiting for the answers under way; Ctrl-C again leaves at once", flush=True)
        for thread in threads:
            thread.join()
        raise
    show("\n")
    if failure:
        raise failure
    return left


def brainstorm(client, prompts, args):
    """Step 1: fills each asymmetric type's pool up to its share of --tasks and freezes them -> {type: [task, ...]}.

    The pool is what the brainstorms b0, b1, ... bring in this order, however they arrived.
    """
    run, path = client.run, client.run.folder / "tasks.jsonl"
    header = run.check_header(settings(prompts, args))
    if header["tasks"]:
        if header["tasks"] != hashlib.sha256(path.read_bytes()).hexdigest():
            raise UserError(f"{path} was changed since examples were made from it: restore it, or choose another --out")
        pools = collections.defaultdict(list)
        for row in read_jsonl(path):
            pools[row["type"]].append(row["task"])
        return pools
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
                first = brainstorm_at(kind, k, args.seed, prompts, args.models)
                calls = -(-(number - len(pool)) // first["params"]["num_tasks"])
                todo += [brainstorm_at(kind, j, args.seed, prompts, args.models) for j in range(k, k + calls)]
            elif not pool:
                raise UserError(f"{run.folder / 'raw.jsonl'}: no task could be read from {k} brainstorms for {kind}: "
                                "the model may be too small for it")
        if not todo:
            break
        print(f"brainstorming: {len(todo)} requests for tasks, {sum(map(len, pools.values()))} of {wanted} stand")
        if left := ask_all(todo, len(todo), client, prompts):
            raise Stopping(f"{left} brainstorms got no answer ({client.trouble})")
    lines = [json.dumps({"type": kind, "task": task}, ensure_ascii=False) for kind in pools for task in pools[kind]]
    partial = path.with_name("tasks.jsonl.tmp")
    partial.write_text("\n".join(lines) + "\n", "utf-8")
    os.replace(partial, path)
    write_json(run.folder / "header.json", header | {"tasks": hashlib.sha256(path.read_bytes()).hexdigest()})
    return pools


def settings(prompts, args):
    """What decides request i, together with tasks.jsonl: the run's fingerprint."""
    digest = hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()
    return {"seed": args.seed, "models": args.models, "temperature": args.temperature, "top_p": args.top_p,
            "prompts": digest}


def estimate(prompts, args):
    """--dry-run: one prompt of each kind, and the size of the whole job."""
    pools = collections.defaultdict(lambda: ["Given one thing, find another. (A brainstormed task stands here.)"])
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
            print(f"--- {request['type']}, {request['step']}, id {request['id']}, {request['model']} ---\n{message}")
        answer = ANSWER_TOKENS["brainstorm" if request["step"] == "brainstorm" else request["type"]]
        tokens.update(tokens_of(request["model"], estimate_tokens(message), answer))
    scale = (args.n + calls) / len(sample)
    used = {side: round(scale * sum(n for key, n in tokens.items() if key[1] == side)) for side in ("in", "out")}
    usd = scale * sum(number * args.prices.get(key, 0) for key, number in tokens.items())
    hours = (used["out"] / 50 + (args.n + calls)) / args.concurrency / 3600
    print(f"--- estimate for {args.n:,} examples and about {calls:,} brainstorms ---\n"
          f"tokens: {used['in']:,} in, {used['out']:,} out (answers as long as the recorded ones; at most "
          f"{(args.n + calls) * args.max_answer_tokens:,} out)\n"
          f"money: ${usd:,.2f}" + ("" if args.prices else " (no --price given)") +
          f"\ntime: {hours:.1f} h with --concurrency {args.concurrency}, if an answer takes 1 s and 1/50 s a token")


# ---- The end of every run: examples and report ----


def write_examples(rows, prompts, out):
    """Turns all answers into out (JSON lines, replaced at once); returns counters of what was kept and dropped.

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
    """Yields the rows of raw.jsonl or of a recorded file; one that isn't an answer is a UserError that names it."""
    for number, row in enumerate(read_jsonl(path, log), 1):
        try:
            render(prompts, **row)  # its type is known, and every placeholder is there
            if not isinstance(row["response"], str) or not isinstance(row["id"], (int, str)):
                raise ValueError("response or id")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: not an answer to a prompt of ours ({error!r}): delete the line") from None
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
            rows += [(f"{len(here.keys() - paper.keys())} others", sum(here.values()) - sum(row[1] for row in rows),
                      100 - sum(paper.values()))] * (name == "language")
            for key, number, share in rows:
                print(f"{key:24}{100 * number / max(1, sum(here.values())):>11.1f}%"
                      f"{100 * share / max(100, sum(paper.values())):>13.1f}%")
        else:
            print(f"{name:24}{report.get(name, ledger.get('tokens', 0)):>12,}{paper:>14,}")
    for title, name in [("distinct tasks", "tasks"), ("objects found", "found"), ("dropped", "dropped")]:
        print(f"{title}: " + (", ".join(f"{key} {number:,}" for key, number in report.get(name, {}).items()) or "none"))
    if ledger:
        print("ledger: " + ", ".join(f"{key} {value}" for key, value in ledger.items()))


def report(args, prompts):
    """Rebuilds --out from all answers and prints and writes the report; needs neither network nor lock."""
    source = args.replay or args.folder / "raw.jsonl"
    counts = write_examples(read_answers(source, prompts, log=not args.replay), prompts, args.out)
    counts["ledger"] = {} if args.replay else Run(args.folder, args.prices, read_only=True).ledger()
    write_json(args.folder / "report.json", counts)
    print_report(counts, args.out)


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
            todo = (request_at(i, args.seed, prompts, pools, args.models) for i in range(args.n))
            if left := ask_all(todo, args.n, client, prompts):
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
    try:
        sys.exit(main())
    except UserError as error:
        print(f"generate.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
