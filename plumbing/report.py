"""plumbing/report.py: what became of the answers, beside the paper's figures; and what a run will cost.

Nothing here decides what becomes an example: it counts, prints and estimates, so that the lesson need not.
"""
import math
import re
from array import array
from collections import Counter, defaultdict
from contextlib import contextmanager

from plumbing.answers import Reject
from plumbing.files import text_hash
from plumbing.ledger import estimate_tokens, tokens_of
from plumbing.texts import normalize

# Section 4.1 and figure 2. Types in thousands of examples, languages in per cent.
PAPER = {"examples": 500_000, "distinct prompts": 150_000, "tokens": 180_000_000,
         "type": {"short-long": 167, "long-short": 122, "sts": 99, "bitext": 89, "long-long": 17,
                  "short-short": 13},
         "language": {"English": 43.1, "Polish": 3.0, "Japanese": 2.9, "Italian": 2.9, "Russian": 2.9,
                      "Indonesian": 2.9, "German": 2.9, "Persian": 2.9, "Spanish": 2.8, "Chinese": 2.8,
                      "French": 2.8, "Portuguese": 2.8, "Dutch": 2.8, "Arabic": 2.7}}
# For the estimate, lower and upper ends. LLMs write less or more than they are asked to. A word of English
# is 1.3 tokens; in other languages it depends on the tokenizer. A pool of 1,500 tasks took so many times as
# many brainstorms as would do if no task came twice.
TOKENS_A_WORD = {"English": (0.7 * 1.3, 1.5 * 1.3), "other": (0.7 * 1.6, 1.5 * 3.0)}
TOKENS_OF_JSON = 20
TOKENS_A_TASK = (20, 40)
BRAINSTORMS = (1.4, 7.5)
WORDS_OF_UNIT = {"phrase": 6, "sentence": 18, "passage": 80}


# ------------------------------------------------------------------------------------------ after every run

class Counts:
    """Counts what becomes of the answers, one by one; `report` sums up."""

    def __init__(self):
        self.examples = 0
        self.prompts = set()                       # hashes of the examples' instructions
        self.tasks = defaultdict(set)              # type -> its brainstormed tasks, normalized
        self.lengths = defaultdict(lambda: array("I"))         # "type field" -> characters of each text
        self.counters = defaultdict(Counter)       # the counts of report.json, by its names: "answers", ...

    def answer(self, step: str) -> None:
        self.counters["answers"][step] += 1

    def brainstorm(self, kind: str, tasks: list[str]) -> None:
        self.tasks[kind].update(map(normalize, tasks))

    @contextmanager
    def rejects(self):
        """with counts.rejects(): a Reject ends the block, and is counted by its reason."""
        try:
            yield
        except Reject as reason:
            self.counters["dropped"][str(reason)] += 1

    def keep(self, example: dict, how: str) -> None:
        """how: as its object stood in the answer, which parse_object tells."""
        kind, language = example["type"], example["language"]
        self.examples += 1
        self.prompts.add(text_hash(normalize(example["prompt"])))
        self.counters["type"][kind] += 1
        self.counters["pair" if kind == "bitext" else "language"][language] += 1
        self.counters["found"][how] += 1
        self.lengths[f"{kind} query"].append(len(example["query"]))
        for field in ("pos", "neg"):
            for text in example[field]:
                self.lengths[f"{kind} {field}"].append(len(text))

    def report(self) -> dict:
        """The object of report.json, but for the ledger."""
        report = {"examples": self.examples, "distinct prompts": len(self.prompts)}
        self.counters["tasks"] = Counter({kind: len(tasks) for kind, tasks in self.tasks.items()})
        for name, counter in self.counters.items():
            report[name] = dict(counter.most_common())
        report["characters"] = {}
        for name in sorted(self.lengths):
            lengths = sorted(self.lengths[name])
            report["characters"][name] = {f"p{q}": lengths[len(lengths) * q // 100] for q in (10, 50, 90)}
        return report


def print_report(report: dict, out) -> None:
    """The counts beside the paper's figures (section 4.1 and figure 2)."""
    answers, ledger = report.get("answers", {}), report["ledger"]
    print(f"{out}: {report['examples']:,} examples from {answers.get('generate', 0):,} answers and "
          f"{answers.get('brainstorm', 0):,} brainstorms")
    print(f"{'':24}{'here':>12}{'paper':>14}")
    for name in ("examples", "distinct prompts"):
        print(f"{name:24}{report[name]:>12,}{PAPER[name]:>14,}")
    if ledger:                                     # recorded answers have used none here
        print(f"{'tokens':24}{ledger['tokens']:>12,}{PAPER['tokens']:>14,}")
    types = report.get("type", {})
    for name in [*PAPER["type"], *(name for name in types if name not in PAPER["type"])]:
        print_shares(name, types.get(name, 0), types.values(), PAPER["type"].get(name, 0),
                     sum(PAPER["type"].values()))
    languages = report.get("language", {})
    others = {name: number for name, number in languages.items() if name not in PAPER["language"]}
    for name, paper in PAPER["language"].items():
        print_shares(name, languages.get(name, 0), languages.values(), paper, 100)
    paper_others = 100 - sum(PAPER["language"].values())
    print_shares(f"{len(others)} others", sum(others.values()), languages.values(), paper_others, 100)
    print("distinct tasks: " + listed(report.get("tasks", {})))
    if "pool" in report:
        print("tasks in the pool: " + listed(report["pool"]))
    print("objects found: " + listed(report.get("found", {})))
    print("dropped: " + listed(report.get("dropped", {})))
    if ledger:
        print("ledger: " + listed({name: value for name, value in ledger.items() if name != "models"}))


def print_shares(name: str, here: float, all_here, paper: float, all_paper: float) -> None:
    print(f"{name:24}{100 * here / max(1, sum(all_here)):>11.1f}%{100 * paper / all_paper:>13.1f}%")


def listed(counts: dict) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items()) or "none"


# ----------------------------------------------------------------------------------------- before any run

def estimate(sample: list, examples: int, brainstorms: int, task_types: dict, args) -> None:
    """Print one message of each kind, and what the whole job will take: tokens, money, time, from LOW to
    HIGH.

    sample: (request, message) pairs: some of the `examples` requests of step 2, and some brainstorms.
    brainstorms: how many would do if each task were new. args: prices, max_answer_tokens, concurrency.
    """
    printed = set()
    drawn = Counter(request["step"] for request, _ in sample)
    ends = []                                      # LOW and HIGH: (tokens, requests, brainstorms)
    for end in (0, 1):
        number = {"generate": examples, "brainstorm": math.ceil(brainstorms * BRAINSTORMS[end])}
        tokens = Counter()                         # as in the ledger: {(model, "in" or "out"): tokens}
        for request, message in sample:
            scale = number[request["step"]] / drawn[request["step"]]
            answer = min(answer_tokens(request, task_types)[end], args.max_answer_tokens)
            tokens.update(tokens_of(request["model"], scale * estimate_tokens(message), scale * answer))
        ends.append((tokens, sum(number.values()), number["brainstorm"]))
    for request, message in sample:
        if (request["step"], request["type"]) not in printed:
            printed.add((request["step"], request["type"]))
            print(f"--- {request['type']}, {request['step']}, id {request['id']} ---\n{message}")

    used_in, used_out, usd, hours = [], [], [], []
    for tokens, requests, _ in ends:
        used_in.append(sum(number for (_, side), number in tokens.items() if side == "in"))
        used_out.append(sum(number for (_, side), number in tokens.items() if side == "out"))
        usd.append(sum(number * args.prices.get(key, 0) for key, number in tokens.items()))
        hours.append((used_out[-1] / 50 + requests) / args.concurrency / 3600)
    print(f"--- estimate for {examples:,} examples and {ends[0][2]:,} to {ends[1][2]:,} brainstorms ---")
    most = ends[1][1] * args.max_answer_tokens
    print(f"tokens: {used_in[0]:,.0f} to {used_in[1]:,.0f} in, "
          f"{used_out[0]:,.0f} to {used_out[1]:,.0f} out, "
          f"by the lengths that the messages ask for (at most {most:,} out)")
    print(f"money: ${usd[0]:,.2f} to ${usd[1]:,.2f}" + ("" if args.prices else " (no --price given)"))
    print(f"time: {hours[0]:.1f} to {hours[1]:.1f} h with --concurrency {args.concurrency}, "
          "at 1 s an answer and 20 ms a token")


def answer_tokens(request: dict, task_types: dict) -> tuple[float, float]:
    """How long the answer to a request may be, at least and at most."""
    params = request["params"]
    if request["step"] == "brainstorm":
        return tuple(params["num_tasks"] * tokens for tokens in TOKENS_A_TASK)
    low, high = TOKENS_A_WORD["English" if params.get("language") == "English" else "other"]
    words = words_asked(task_types[request["type"]], params)
    return TOKENS_OF_JSON + words * low, TOKENS_OF_JSON + words * high


def words_asked(task_type: dict, params: dict) -> int:
    """The words that all texts of an answer should have together.

    >>> words_asked({"keys": ["q", "d"], "words": ["size", 30]}, {"size": "5 to 15 words"})
    45
    """
    total = 0
    for asked in task_type.get("words", [40] * len(task_type["keys"])):
        value = params.get(asked, asked)           # a placeholder's, or the number itself
        numbers = [int(number) for number in re.findall(r"\d+", str(value))]
        total += WORDS_OF_UNIT.get(value) or max(numbers, default=40)
    return total
