"""plumbing/report.py: what became of the answers, beside the paper's figures; and what a run will cost.

Nothing here decides what becomes an example: it counts, prints and estimates, so that the lesson need not.
"""
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
# Means over data/recorded.jsonl.gz, for the estimate.
ANSWER_TOKENS = {"short-long": 405, "long-short": 125, "sts": 108, "bitext": 112, "long-long": 512,
                 "short-short": 31, "brainstorm": 480}


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
    for name, paper in PAPER["type"].items():
        print_shares(name, types.get(name, 0), types.values(), paper, sum(PAPER["type"].values()))
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

def estimate(sample: list, examples: int, brainstorms: int, args) -> None:
    """Print one message of each kind, and what the whole job will take: tokens, money, time.

    sample: (request, message) pairs, some of the examples + brainstorms requests of the job.
    args: prices, max_answer_tokens, concurrency.
    """
    printed = set()
    tokens = Counter()                             # as in the ledger: {(model, "in" or "out"): tokens}
    for request, message in sample:
        step, kind = request["step"], request["type"]
        if (step, kind) not in printed:
            printed.add((step, kind))
            print(f"--- {kind}, {step}, id {request['id']} ---\n{message}")
        answer_tokens = ANSWER_TOKENS["brainstorm" if step == "brainstorm" else kind]
        tokens.update(tokens_of(request["model"], estimate_tokens(message), answer_tokens))
    requests = examples + brainstorms
    scale = requests / len(sample)
    used = Counter()
    usd = 0.0
    for (model, side), number in tokens.items():
        used[side] += round(scale * number)
        usd += scale * number * args.prices.get((model, side), 0)
    hours = (used["out"] / 50 + requests) / args.concurrency / 3600
    print(f"--- estimate for {examples:,} examples and about {brainstorms:,} brainstorms ---")
    print(f"tokens: {used['in']:,} in, {used['out']:,} out (answers as long as the recorded ones; at most "
          f"{requests * args.max_answer_tokens:,} out)")
    print(f"money: ${usd:,.2f}" + ("" if args.prices else " (no --price given)"))
    print(f"time: {hours:.1f} h with --concurrency {args.concurrency}, at 1 s an answer and 20 ms a token")
