"""plumbing/ledger.py: the folder of one run of generate.py, and its books: asked, answered, paid.

It exists so that no answer on disk is paid for twice and no budget is passed, whatever is killed:

    header.json, tasks.jsonl, tasks2.jsonl, ...    what decides the requests: see plumbing/pools.py
    started.jsonl   a line before each try, and a line after each refusal
    raw.jsonl       each answer as it came, with finish_reason and usage, flushed before anything reads it
    truncated.jsonl answers that were asked for again with more room (--again-truncated); paid all the same
    batches/        what waits at a provider's batch API: asked, and not asked again
    remembered/     what was made of these files, for the rerun: see plumbing/remembered.py
    lock            held by the one process that may write

An answer in raw.jsonl is never asked for again. A try with neither an answer nor a refusal may have been
paid for and lost; it counts against the budget as if it had used the most that it could. A kill leaves at
most --concurrency of them.

A request is {"id", "step", "type", "params", "model"}. Its row in raw.jsonl adds response, finish_reason,
usage {"prompt_tokens", "completion_tokens", and "estimated" where the server gave none} and seconds.
"""
import argparse
import fcntl
import json
import math
import re
import threading
from collections import Counter
from pathlib import Path

from plumbing import batches
from plumbing.errors import UserError, blame, check
from plumbing.files import (append, check_lines_out, fields, open_log, parse_line, read_jsonl, read_lines,
                            read_located, replace_file, same_file)
from plumbing.remembered import remembered

ANSWER = {"id": (int, str), "step": str, "type": str, "params": dict, "response": str}    # for a replay
PAID = {"model": str, "usage": dict}               # in raw.jsonl besides
STEPS = ("brainstorm", "generate")
USAGE = ("prompt_tokens", "completion_tokens")
TRY = {"id": (int, str), "model": str, "tokens_in": int, "tokens_out": int}     # a line of started.jsonl


class Stopping(Exception):
    """The run ends before its end, in good order; str(error) says why."""


class BudgetReached(Stopping):
    """One more try could break a budget."""


# --------------------------------------------------------------------------------------- tokens and money

def tokens_of(model: str, tokens_in: int, tokens_out: int) -> Counter:
    """The tokens of one request: {(model, "in"): tokens_in, (model, "out"): tokens_out}. These add up."""
    return Counter({(model, "in"): tokens_in, (model, "out"): tokens_out})


def estimate_tokens(text: str) -> int:
    """A rough count, for servers that report no usage: four UTF-8 bytes a token."""
    return len(text.encode("utf-8", "replace")) // 4 + 1


def most_tokens(message: str) -> int:
    """More than a prompt can cost: three UTF-8 bytes a token, and 50 for the server's chat template."""
    return len(message.encode("utf-8", "replace")) // 3 + 50


def model_share(text: str) -> tuple[str, float]:
    """The flag --model NAME[:SHARE]. A share has a decimal point; other tails belong to the name.

    >>> model_share("gpt-4o-mini:0.75"), model_share("llama3:8b"), model_share("qwen2:72")
    (('gpt-4o-mini', 0.75), ('llama3:8b', 1.0), ('qwen2:72', 1.0))
    """
    name, _, tail = text.rpartition(":")
    if not name or not re.fullmatch(r"-?\d*\.\d*", tail) or tail == ".":
        return text, 1.0
    if float(tail) <= 0:
        raise argparse.ArgumentTypeError(f"{text}: a model's share must be above 0")
    return name, float(tail)


def model_price(text: str) -> dict:
    """The flag --price MODEL:IN:OUT, USD per million tokens -> {(model, "in" or "out"): USD a token}.

    >>> model_price("a:1.5:6")
    {('a', 'in'): 1.5e-06, ('a', 'out'): 6e-06}
    """
    try:
        name, price_in, price_out = text.rsplit(":", 2)
        prices = {(name, "in"): float(price_in) / 1e6, (name, "out"): float(price_out) / 1e6}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: write MODEL:IN:OUT, USD per million tokens") from None
    if not all(0 <= price < math.inf for price in prices.values()):
        raise argparse.ArgumentTypeError(f"{text}: a price must be at least 0")
    return prices


def check_prices(prices: dict, models: dict, budget_usd: float | None) -> None:
    """Refuse the price of a model that is not asked, which is mostly a misspelt one, and a budget in money
    that lacks a price. models: none where answers are only read."""
    for name, _ in prices:
        check(name in models or not models,
              f"--price {name}: no --model is called so, only {', '.join(models)}")
    for name in models:
        check(budget_usd is None or (name, "in") in prices,
              f"--budget-usd needs the price of {name}: add --price {name}:IN:OUT")


# ----------------------------------------------------------------------------------------------- the folder

def run_folder(out: Path, recorded: Path | None = None) -> Path:
    """The folder of the run whose examples go to `out`: it is named like it, without the suffix.

    Refuses, before anything is read or asked, an `out` that cannot be written or would replace answers.
    recorded: the file of --replay.
    """
    check(out.suffix, f"--out {out}: the file needs a suffix, as in {out}.jsonl")
    check_lines_out(out)
    check(not recorded or not same_file(out, recorded),
          f"--out {out}: the answers of --replay are in it, and would be gone: name another file")
    parent = out.resolve().parent                      # a file is replaced where its links lead to
    check(not (parent / "started.jsonl").exists(),
          f"--out {out}: {parent} is a run's own folder, with its answers: name a file elsewhere")
    folder = out.with_suffix("")
    check(folder.is_dir() or not folder.exists(),
          f"{folder}: a file stands where a folder is wanted: choose another --out")
    return folder


# ------------------------------------------------------------------------------------------------ answers

MOST_LEVELS = 100      # of lists and objects inside one another; at some 300, Python's recursion gives up


def levels(value) -> int:
    """How deep lists and objects stand inside one another in a JSON value.

    >>> levels("a"), levels([]), levels({"a": [1, {}]})
    (0, 1, 3)
    """
    depth, layer = 0, [value]
    while layer := [one for one in layer if isinstance(one, (dict, list))]:
        depth += 1
        layer = [item for one in layer for item in (one.values() if isinstance(one, dict) else one)]
    return depth


def read_rows(path, schema: dict, log=True):
    """(where, row) of each answer in raw.jsonl or a recorded file; where is "path:line".

    log: it is raw.jsonl, in which a last line without its end does not count.
    """
    for where, row in read_located(path, schema, log, any_characters=True):
        check(row["step"] in STEPS,
              f"{where}: step {row['step']!r:.40} is neither of {STEPS}: delete this line")
        check(levels(row) <= MOST_LEVELS,
              f"{where}: more than {MOST_LEVELS} lists or objects inside one another: delete this line")
        yield where, row


def read_paid(path):
    """(where, row) of each answer in one of a run's own logs, where its usage stands beside it."""
    for where, row in read_rows(path, ANSWER | PAID):
        with blame(where, "mend or delete this line"):
            batches.check_counts([row["usage"][key] for key in USAGE], where)
        yield where, row


# ----------------------------------------------------------------------------------------------- the books

def answer_key(row: dict) -> str:
    """What tells an answer from another one to the same request."""
    return json.dumps([row["id"], row["response"], row["usage"], row.get("seconds")], sort_keys=True)


def write_rows(path, rows) -> None:
    """Answers into a whole file; they may hold any characters."""
    lines = [json.dumps(row) + "\n" for row in rows]
    replace_file(path, lambda beside: beside.write_text("".join(lines)))


class Ledger:
    """A run's folder and books. One process at a time has it open for writing; many threads share it.

        with Ledger(folder, prices, budget_usd, budget_tokens) as ledger: ...

    A Stopping ends that block, is printed, and leaves the script's exit_code here.

    prices: {(model, "in" or "out"): USD a token}. Three Counters have the same keys and hold tokens:
    spent: of the answers on disk. lost: of tries that may have been paid for without an answer.
    reserved: the most that the tries under way can use.
    """

    def __init__(self, folder, prices, budget_usd=None, budget_tokens=None, read_only=False):
        self.folder, self.prices = folder, prices
        self.budget_usd, self.budget_tokens = budget_usd, budget_tokens
        self.answered = set()                      # ids
        self.in_batches = set()                    # ids that wait at a batch API
        self.brainstorms = {}                      # id -> response
        self.pending = {}                          # id -> the most tokens that the try under way can use
        self.spent, self.lost, self.reserved = Counter(), Counter(), Counter()
        self.tries_lost = 0
        self.usage_estimated = 0                   # answers whose server reported no usage
        self.set_aside = 0                         # truncated answers that were asked for again
        self.exit_code = 0
        self.changed = threading.Condition()       # guards all of the above
        self.stop = threading.Event()              # set: no thread may begin another try
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(folder / "lock", "w")
            try:                                   # the kernel frees it with the process, even a killed one
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{folder}: another process works here; wait for it or stop it") from None
            self.raw = open_log(folder / "raw.jsonl")
            self.started = open_log(folder / "started.jsonl")
            self.in_batches, tokens = batches.waiting(folder / "batches")
            self.reserved.update(tokens)
        self.read_books()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.close()
        if not isinstance(error, Stopping):
            return False
        print(f"stopped: {error}; what was answered stays, and the same command goes on from there")
        self.exit_code = 0 if isinstance(error, BudgetReached) else 1
        return True

    def close(self):
        for file in (self.raw, self.started, self.lock):
            file.close()

    def read_books(self):
        """Take up the answers on disk, and find the tries that may have been paid for without one."""
        logs = [self.folder / name for name in ("raw.jsonl", "started.jsonl", "truncated.jsonl")]
        books = remembered(self.folder / "remembered/books.json", logs, None, self.read_logs)
        self.answered, self.brainstorms = set(books["answered"]), dict(books["brainstorms"])
        self.spent, self.lost = (Counter({(model, side): number for model, side, number in books[name]})
                                 for name in ("spent", "lost"))
        self.tries_lost, self.usage_estimated = books["tries_lost"], books["usage_estimated"]
        self.set_aside = books["set_aside"]

    def read_logs(self) -> dict:
        """The books from the logs, as JSON."""
        ended = Counter()                          # id -> tries that ended with an answer or a refusal
        aside = self.answers_set_aside()
        self.set_aside = len(aside)
        for row in aside.values():
            self.count_usage(row)
            ended[row["id"]] += "batch" not in row
        for _, row in read_paid(self.folder / "raw.jsonl"):
            self.note_answer(row)
            if not aside or answer_key(row) not in aside:      # else a kill came between the two files
                self.count_usage(row)
                ended[row["id"]] += "batch" not in row         # a batch's answer ends no try of ours
        most = {}                                  # id -> its tries, not yet ended, and the tokens of one
        started = self.folder / "started.jsonl"
        for where, row in read_located(started, {"id": (int, str)}, log=True, any_characters=True):
            if "refused" in row:
                ended[row["id"]] += 1
                continue
            fields(row, where, TRY)
            batches.check_counts([row["tokens_in"], row["tokens_out"]], where)
            tries, _ = most.get(row["id"], (0, None))
            most[row["id"]] = tries + 1, (row["model"], row["tokens_in"], row["tokens_out"])
        for key, (tries, tokens) in most.items():
            for _ in range(tries - ended[key]):
                self.count_lost(tokens_of(*tokens))
        return {"answered": list(self.answered),
                "brainstorms": list(self.brainstorms.items()),
                "spent": [[*key, number] for key, number in self.spent.items()],
                "lost": [[*key, number] for key, number in self.lost.items()],
                "tries_lost": self.tries_lost,
                "usage_estimated": self.usage_estimated,
                "set_aside": self.set_aside}

    # -------------------------------------------------------------------- truncated answers, asked again

    def answers_set_aside(self) -> dict:
        """The rows of truncated.jsonl, each once."""
        path = self.folder / "truncated.jsonl"
        rows = read_paid(path) if path.exists() else ()
        return {answer_key(row): row for _, row in rows}

    def set_aside_truncated(self, max_answer_tokens: int) -> None:
        """Move the answers that a lower limit has cut off from raw.jsonl to truncated.jsonl: they stay paid,
        and their requests are open again."""
        limits = {row["id"]: row["tokens_out"]
                  for row in read_jsonl(self.folder / "started.jsonl", log=True) if "refused" not in row}
        path = self.folder / "raw.jsonl"
        open_again, aside = set(), self.answers_set_aside()
        for _, row in read_paid(path):
            limit = limits.get(row["id"], row["usage"]["completion_tokens"])
            truncated = row.get("finish_reason") == "length" and row["step"] == "generate"
            if truncated and limit < max_answer_tokens:
                aside[answer_key(row)] = row
                open_again.add(row["id"])
        if not open_again:
            return

        def write_the_others(beside):
            with open(beside, "wb") as file:
                for number, line in read_lines(path):
                    if parse_line(line, f"{path}:{number}", any_characters=True)["id"] not in open_again:
                        file.write(line)

        write_rows(self.folder / "truncated.jsonl", aside.values())
        self.raw.close()
        replace_file(path, write_the_others)
        self.raw = open_log(path)
        self.answered -= open_again
        self.set_aside = len(aside)
        print(f"{len(open_again)} truncated answers are asked for again")

    # ------------------------------------------------------------------------------------------ one try

    def start(self, request: dict, tokens_in: int, tokens_out: int) -> None:
        """Log a try before it is sent. Where a budget could break, wait for others or raise
        BudgetReached."""
        tokens = tokens_of(request["model"], tokens_in, tokens_out)
        with self.changed:
            while not self.within_budget(tokens):
                if not self.pending:
                    raise BudgetReached(self.used_up(tokens))
                self.changed.wait()
            if self.stop.is_set():
                raise Stopping("interrupted")
            append(self.started, {"id": request["id"], "model": request["model"],
                                  "tokens_in": tokens_in, "tokens_out": tokens_out})
            self.pending[request["id"]] = tokens
            self.reserved.update(tokens)

    def end(self, request: dict, row: dict | None = None, refused=None) -> None:
        """End a try: with an answer, with a refusal (unpaid), or with neither (perhaps paid)."""
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

    def count_answer(self, row: dict) -> None:
        self.note_answer(row)
        self.count_usage(row)

    def note_answer(self, row: dict) -> None:
        self.answered.add(row["id"])
        if row["step"] == "brainstorm":
            self.brainstorms[row["id"]] = row["response"]

    def count_usage(self, row: dict) -> None:
        usage = row["usage"]
        self.spent[row["model"], "in"] += usage["prompt_tokens"]
        self.spent[row["model"], "out"] += usage["completion_tokens"]
        if "estimated" in usage:
            self.usage_estimated += 1

    def count_lost(self, tokens: Counter) -> None:
        self.lost.update(tokens)
        self.tries_lost += 1

    # ------------------------------------------------------------------------------------------- the bill

    def cost(self, tokens: Counter) -> float:
        """USD of a Counter of tokens; a model without a price costs nothing."""
        return sum(number * self.prices.get(key, 0) for key, number in tokens.items())

    def within_budget(self, tokens: Counter) -> bool:
        """Whether one more try stays within the budgets, even if all that is under way uses its most."""
        total = self.spent + self.lost + self.reserved + tokens
        if self.budget_usd is not None and self.cost(total) > self.budget_usd:
            return False
        return self.budget_tokens is None or total.total() <= self.budget_tokens

    def used_up(self, tokens: Counter) -> str:
        """Why there is no room for one more try, which can use these tokens."""
        uses = {"spent": self.spent, "perhaps paid without an answer": self.lost,
                "only reserved, for what waits in batches": self.reserved,
                "the next request at most": tokens}
        in_usd = self.budget_usd is not None
        amounts = [f"${self.cost(used):.4f} {name}" if in_usd else f"{used.total():,} tokens {name}"
                   for name, used in uses.items()]
        return "the budget is used up: " + ", ".join(amounts)

    def summary(self) -> dict:
        """What the run has used and cost so far, for the report."""
        models = {}
        for name, side in self.spent:
            models[name] = {"in": self.spent[name, "in"], "out": self.spent[name, "out"]}
        return {"tokens": self.spent.total(),
                "tokens in": sum(used["in"] for used in models.values()),
                "tokens out": sum(used["out"] for used in models.values()),
                "usd": round(self.cost(self.spent), 4),
                "answers with estimated usage": self.usage_estimated,
                "tries perhaps paid without an answer": self.tries_lost,
                "their tokens at most": self.lost.total(),
                "models": models}
