"""plumbing/run.py: a run is never lost, never mixed up with another, and never goes on with numbers that are none."""
import argparse
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import plumbing.run
import train
from model import Embedder
from plumbing.checkpoint import base_fingerprint, stored_pooling
from plumbing.errors import UserError, explain
from runs import (FLAGS, ROOT, checkpoint_state, options, read_log, record, run_train, same_tensors, train_command,
                  two_ranks, write_lines)
from scripts import complaint

OLD = ROOT / "tests/data/run_of_2026_11"                # its README says how it was made


# ------------------------------------------------------------------------------------------------ resume

@pytest.fixture
def old(tmp_path, monkeypatch):
    """A run that was stopped after three of six steps, before the house had its plumbing; the working folder."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def test_an_old_run_loads(old):
    vectors = Embedder.load("stopped").encode(["a question", "an answer that is longer", "x"], ["task 1", "", ""])
    assert torch.allclose(vectors, load_file("stopped_vectors.safetensors")["vectors"], atol=1e-6)


def test_an_old_run_resumes(old):
    flags = ("--lr", "1e-3", "--epochs", "2", "--both-sides", "--batches", "homogeneous", "--resume")
    done = run_train("base", "data.jsonl", "stopped", *flags, cwd=old)
    assert done.returncode == 0 and "from 3;" in done.stdout, done.stderr
    for line, wanted in zip(read_log(old / "stopped"), map(json.loads, open("whole_log.jsonl")), strict=True):
        assert line["step"] == wanted["step"] and line["tokens"] == wanted["tokens"]
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
    adapter, wanted = load_file("stopped/adapter_model.safetensors"), load_file("whole_adapter.safetensors")
    assert all(torch.allclose(adapter[name], wanted[name], atol=1e-5) for name in wanted)


def test_resume_after_sigterm_is_bit_identical(base, data, tmp_path):
    flags = ("--epochs", 8, "--checkpoint-every", 5)                           # 24 steps
    whole = run_train(base, data, tmp_path / "whole", *flags)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(train_command(base, data, tmp_path / "stopped", *flags), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 7/"):
            for _ in range(3):                                                 # make and torchrun pass them on too
                process.send_signal(signal.SIGTERM)
                time.sleep(0.01)
    assert process.wait() == 128 + signal.SIGTERM
    done = run_train(base, data, tmp_path / "stopped", *flags, "--resume")
    assert done.returncode == 0, done.stderr
    assert same_tensors(tmp_path / "whole", tmp_path / "stopped")
    assert [line["step"] for line in read_log(tmp_path / "stopped")] == list(range(1, 25))


def test_a_run_is_not_overwritten_unasked(here, data, tmp_path):
    assert here("run")[0] == 0
    checkpoint = tmp_path / "run/checkpoint.safetensors"
    before = checkpoint.read_bytes()
    for more, words in [((), "a run is here already"), (("--resume", "--seed", 5), "made with another seed")]:
        with pytest.raises(UserError, match=words):
            here("run", *more)
        assert checkpoint.read_bytes() == before
    assert here("run", "--resume")[0] == 0 and checkpoint.read_bytes() == before         # nothing left to do
    write_lines(data, [record(i) for i in range(16)])
    with pytest.raises(UserError, match="data_fingerprint"):
        here("run", "--resume")
    (tmp_path / "run/log.jsonl").unlink()
    (tmp_path / "run/config.json.77.tmp").touch()                          # a kill came while it was written
    assert here("run", "--resume", "--overwrite")[0] == 0 and checkpoint.read_bytes() != before


def test_a_run_goes_on_with_the_same_inputs_in_another_spelling(here, base, data, tmp_path, monkeypatch):
    assert here("run", "--checkpoint-every", 1)[0] == 0
    monkeypatch.chdir(base.parent)
    data = data.rename(tmp_path / "moved.jsonl")
    flags = ["--out", str(tmp_path / "run"), *FLAGS, "--max-steps", "2", "--warmup-steps", "0", "--lr", "1e-3", "--resume",
             "--base", base.name]
    assert train.main([*flags, "--data", str(data)]) == 0
    with pytest.raises(UserError, match="another prompt"):                     # "." is no path here
        train.main([*flags, "--data", str(data), "--prompt", "."])
    with pytest.raises(UserError, match="another data_shares"):
        train.main([*flags, "--data", f"{data}:0.5"])


def test_a_run_goes_on_in_smaller_chunks(here):
    """What the message about a full GPU advises."""
    assert here("run", "--max-steps", 3, "--checkpoint-every", 1)[0] == 0
    code, log = here("run", "--max-steps", 3, "--resume", "--tokens-per-chunk", 40, "--keep-tokens", 0)
    assert code == 0 and len(log) == 3


def test_an_adapter_lost_by_a_kill_is_written_again(here, tmp_path):
    assert here("run")[0] == 0
    adapter = tmp_path / "run/adapter_model.safetensors"
    wanted = load_file(adapter)
    adapter.unlink()                                          # as if the end had come between the two files
    assert here("run", "--resume")[0] == 0
    assert all(torch.equal(wanted[name], tensor) for name, tensor in load_file(adapter).items())


@pytest.mark.parametrize("end", ["torn", "foreign"])
def test_the_log_is_dropped_past_the_checkpoint(here, tmp_path, end):
    assert here("run", "--checkpoint-every", 1)[0] == 0
    log = tmp_path / "run/log.jsonl"
    lines = log.read_text().splitlines(True)
    log.write_text(lines[0] + (lines[1][:30] if end == "torn" else "[1]") + "\n" + lines[1])
    code, left = here("run", "--resume")
    assert code == 0 and [line["step"] for line in left] == [1]


def test_a_kill_in_a_runs_first_moment_leaves_a_usable_folder(here, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json.77.tmp").touch()
    assert here("run", "--resume")[0] == 0
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.parametrize("changed, words", [("model.safetensors", "made with another base_fingerprint"), (None, None)])
def test_a_run_goes_on_with_the_base_that_it_began_with(base, here, tmp_path, changed, words):
    """Other weights at the same path are another base. A run from before that was noted goes on."""
    own = shutil.copytree(base, tmp_path / "own")
    assert here("run", "--base", own, "--checkpoint-every", 1)[0] == 0
    config = tmp_path / "run/config.json"
    noted = json.loads(config.read_text())
    if changed is None:
        config.write_text(json.dumps({name: value for name, value in noted.items() if name != "base_fingerprint"}))
        assert here("run", "--base", own, "--resume")[0] == 0
        assert json.loads(config.read_text())["base_fingerprint"] == noted["base_fingerprint"]
        return
    tensors = load_file(own / changed)
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, own / changed, {"format": "pt"})
    with pytest.raises(UserError, match=words):
        here("run", "--base", own, "--resume")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_bases_fingerprint_changes_with_each_of_its_files(base, tmp_path, name):
    own = shutil.copytree(base, tmp_path / "own")
    before = base_fingerprint(own)
    assert before == base_fingerprint(base)
    content = bytearray((own / name).read_bytes())
    content[-1] ^= 1
    (own / name).write_bytes(content + b" ")
    assert base_fingerprint(own) != before


def test_one_folder_has_one_training(here, tmp_path, monkeypatch):
    """Of two at once, the files of one would stand under the flags of the other."""
    step, refused = train.training_step, []

    def try_another(*args):
        with pytest.raises(UserError, match="run: another process trains here: wait for it, stop it, or choose") as caught:
            plumbing.run.lock(tmp_path / "run")
        refused.append(caught)
        return step(*args)

    monkeypatch.setattr(train, "training_step", try_another)
    assert here("run")[0] == 0 and len(refused) == 2
    with plumbing.run.lock(tmp_path / "run"):
        before = (tmp_path / "run/config.json").read_bytes()
        for flag in ("--overwrite", "--resume"):
            with pytest.raises(UserError, match="another process trains here"):
                here("run", flag, "--seed", 1)
        assert (tmp_path / "run/config.json").read_bytes() == before
    with pytest.raises(UserError, match="a run is here already"):              # and leaves it unlocked
        here("run")
    assert here("run", "--overwrite")[0] == 0


def test_a_folder_that_is_refused_gets_no_lock(base, here, tmp_path):
    """A lock alone, of a training that ended before its first file, is an empty folder."""
    shutil.copytree(base, tmp_path / "model")
    for name, file in (("model", None), ("notes", "mine.txt")):
        (tmp_path / name).mkdir(exist_ok=True)
        if file:
            (tmp_path / name / file).touch()
        with pytest.raises(UserError, match="not a run"):
            here(name)
        assert not (tmp_path / name / "lock").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lock").touch()
    assert here("run")[0] == 0


def test_a_run_that_holds_links_is_emptied_and_what_they_show_is_not(here, tmp_path):
    assert here("run")[0] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    (tmp_path / "run/a_link").symlink_to(tmp_path / "mine", target_is_directory=True)
    (tmp_path / "run/to_nothing").symlink_to(tmp_path / "nowhere")
    (tmp_path / "run/folder").mkdir()
    assert here("run", "--overwrite", "--seed", 1)[0] == 0
    assert (tmp_path / "mine/notes.txt").exists()
    assert not [name for name in ("a_link", "to_nothing", "folder") if os.path.lexists(tmp_path / "run" / name)]


def test_a_run_whose_lines_nobody_reads_goes_on(here, tmp_path, monkeypatch):
    """train.py ... | head, or a log on a full disk."""
    class Closed:
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    assert here("run")[0] == 0
    assert len(read_log(tmp_path / "run")) == 2 and (tmp_path / "run/adapter_model.safetensors").exists()


def test_a_models_folder_is_never_overwritten(base, here, tmp_path):
    shutil.copytree(base, tmp_path / "precious")
    with pytest.raises(UserError, match="a model's folder, not a run's"):
        here("precious", "--overwrite")
    assert (tmp_path / "precious/model.safetensors").exists()


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(here, tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(Path(b).name), replace(a, b)))
    assert here("run")[0] == 0
    assert calls[calls.index("checkpoint.safetensors") - 1] == "fsync"


# ------------------------------------------------------------------------------------- signals and ranks

def test_a_second_interrupt_leaves_at_once_but_not_its_echo(monkeypatch):
    now, run = [100.0], argparse.Namespace(signals=[])
    monkeypatch.setattr(plumbing.run.time, "monotonic", lambda: now[0])
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        plumbing.run.Run.note_signal(run, number)
    now[0] += 5
    plumbing.run.Run.note_signal(run, signal.SIGTERM)
    with pytest.raises(SystemExit, match="130"):
        plumbing.run.Run.note_signal(run, signal.SIGINT)
    assert [number for number, _ in run.signals] == [signal.SIGINT] * 2 + [signal.SIGTERM] * 2


def test_two_ranks_train_the_adapter_of_one(base, data, tmp_path):
    """train.py as it is: three steps, the last of them of one query."""
    flags = ("--lora-dropout", "0", "--epochs", "1", "--max-steps", "3", "--lr", "1e-3", "--warmup-steps", "0")
    lines = data.read_text().splitlines(True)
    data.write_text("".join(lines[:17]))
    with two_ranks(base, data, tmp_path / "two", *flags) as ranks:
        said = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert run_train(base, data, tmp_path / "one", *flags).returncode == 0
    one, two = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("one", "two"))
    fresh = Embedder.load(base, device="cpu")
    fresh.decoder.add_lora(16, 32, 0.0, seed=0)
    for name, start in fresh.decoder.lora_parameters().items():
        a, b = (run[f"base_model.model.{name}.weight"] for run in (one, two))
        assert (a - b).norm() < 1e-3 * (a - start.detach()).norm()
    logs = [[json.loads(line) for line in open(tmp_path / run / "log.jsonl")] for run in ("one", "two")]
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["tokens"] == b["tokens"]


# train.py, whose rank 1 gets SIGTERM in step 3, just after the ranks have told each other of signals
LATE_SIGNAL = """
import os, signal, sys, train
tell, told = train.sum_over_ranks, []
def tell_then_signal(*tensors):
    tell(*tensors)
    if len(tensors) > 1:                    # gradients and counts, once a step
        told.append(1)
    if os.environ["RANK"] == "1" and len(told) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
train.sum_over_ranks = tell_then_signal
from plumbing.errors import command
command(train.main)
"""


@pytest.mark.parametrize("steps, last, code", [
    ("10", 4, 128 + signal.SIGTERM), pytest.param("3", 3, 0, marks=pytest.mark.slow)])
def test_a_late_signal_stops_both_ranks_after_the_next_step(base, data, tmp_path, steps, last, code):
    """What comes after the sum counts in the next step; if there is none, the run is done."""
    flags = "--max-steps", steps, "--timeout", "0.5"
    with two_ranks(base, data, tmp_path / "run", *flags, code=("-c", LATE_SIGNAL)) as ranks:
        said = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [code, code], said
    assert checkpoint_state(tmp_path / "run")["step"] == last


@pytest.mark.parametrize("how, lost, reason", [(signal.SIGKILL, 0, "onnection"), (signal.SIGKILL, 1, "onnection"),
                                               (signal.SIGSTOP, 1, "Timed out")])
def test_a_lost_rank_ends_the_other_within_the_timeout(base, data, tmp_path, how, lost, reason):
    """One of two is killed in mid-run, or stopped so that it no longer answers."""
    with two_ranks(base, data, tmp_path / "run", "--timeout", "0.05") as ranks:            # 3 seconds
        assert any(line.startswith("step 3/") for line in ranks[0].stdout), ranks[0].stderr.read()
        ranks[lost].send_signal(how)
        sent = time.monotonic()
        _, said = ranks[1 - lost].communicate(timeout=60)
        assert time.monotonic() - sent < 3 + 10                            # the timeout, and leaving
        assert ranks[1 - lost].returncode == 2 and said.count("\n") == 1, said
        assert said.startswith(f"train.py: rank {1 - lost} lost another rank (") and reason in said
        assert "--resume goes on" in said


@pytest.mark.slow
def test_what_one_rank_refuses_all_say(base, data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").touch()
    with two_ranks(base, data, tmp_path / "run") as ranks:
        said = [process.communicate(timeout=60)[1] for process in ranks]
    assert all("not empty and not a run" in line and line.count("\n") == 1 for line in said), said
    assert [process.returncode for process in ranks] == [2, 2]


# ----------------------------------------------------------------------------------------------- numbers

def test_nan_stops_the_run_and_names_the_batch(here, tmp_path):
    assert here("first")[0] == 0
    adapter = tmp_path / "first/adapter_model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(adapter).items()}, adapter)
    with pytest.raises(UserError, match="step 1: loss nan.*data.jsonl") as stopped:
        here("second", "--init-adapter", tmp_path / "first")
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "second/checkpoint.safetensors").exists()
    with pytest.raises(UserError, match="first checkpoint"):
        Embedder.load(tmp_path / "second")
    assert len(json.loads((tmp_path / "second/bad_batch.json").read_text())["examples"]) == 8


def not_a_number(value, vectors):
    return value * torch.nan


def infinite(value, vectors):
    return value + torch.inf


def steep(value, vectors):
    return value + (vectors.sum() * 0).sqrt()                 # a loss like any other, its gradient is 0 / 0


@pytest.mark.parametrize("broken, said", [(not_a_number, "loss nan"), (infinite, "loss inf"),
                                          (steep, "gradient norm nan")])
def test_what_is_not_finite_leaves_the_last_good_checkpoint(here, tmp_path, monkeypatch, broken, said):
    steps, info_nce = [], train.info_nce

    def third_is_broken(q, d, *more):
        steps.append(len(steps) + 1)
        value = info_nce(q, d, *more)
        return broken(value, q) if len(steps) == 3 else value

    monkeypatch.setattr(train, "info_nce", third_is_broken)
    with pytest.raises(UserError, match=f"step 3: .*{said}"):
        here("run", "--max-steps", 3, "--checkpoint-every", 1)
    assert len(steps) == 3 and checkpoint_state(tmp_path / "run")["step"] == 2
    for name in ("checkpoint.safetensors", "adapter_model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "run" / name).values())


def test_float16_scales_its_loss(here, tmp_path):
    """A step whose scaled gradient overflows is left out and the scale halved; the others are unscaled."""
    code, log = here("half", "--dtype", "float16", "--max-steps", 12, "--epochs", 4)
    assert code == 0 and all(math.isfinite(line["loss"]) for line in log)
    norms = [line["grad_norm"] for line in log if line["grad_norm"] is not None]     # JSON has no infinity
    assert norms and 1 < min(norms) and max(norms) < 1e4          # the scale itself is 65,536 at the start
    with safe_open(tmp_path / "half/checkpoint.safetensors", "pt") as file:
        scaler = json.loads(file.metadata()["state"])["scaler"]
        moved = [file.get_tensor(name) for name in file.keys() if name.endswith("lora_B")]
    assert scaler["scale"] == 2.0 ** 16 / 2 ** (len(log) - len(norms))
    assert all(tensor.abs().max() > 0 for tensor in moved)


def test_mfu_counts_what_is_done(here):
    """Forward 2N a token and pass, backward 2N; a checkpointed block runs forward once more."""
    for name, flags, passes in (("once", ("--keep-tokens", 10 ** 6), 2), ("twice", ("--keep-tokens", 0), 3),
                                ("more", ("--keep-tokens", 0, "--activation-checkpointing"), 4)):
        code, (line, *_) = here(name, "--peak-tflops", 1e-3, *flags)
        weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
        per_second = 2 * weights * passes * line["tokens"] / (1 - line["padding"]) / line["seconds"]
        assert code == 0 and line["mfu"] == pytest.approx(per_second / 1e9, rel=1e-4)
        assert line["mfu_useful"] == pytest.approx(4 * weights * line["tokens_per_second"] / 1e9, rel=1e-4)


def test_the_line_of_a_step_tells_the_time_left(capsys):
    names = ("loss", "chance_loss", "accuracy", "spread", "lr", "grad_norm", "tokens_per_second", "padding")
    plumbing.run.print_line(dict.fromkeys(names, 0.5) | {"step": 3, "seconds": 20.5}, 10)
    said = capsys.readouterr().out
    assert "step 3/10" in said and said.endswith("left 2m23s\n")


# ---------------------------------------------------------------------------- flags reach what they name

@pytest.mark.parametrize("flags", [("--instruction", "none"), ("--pooling", "mean"), ("--negatives", 0)])
def test_options_of_the_vectors_reach_them(here, flags):
    assert here("plain")[1][0]["spread"] != here("changed", *flags)[1][0]["spread"]


@pytest.mark.parametrize("flags", [("--matryoshka", 8, 16), ("--mask-margin", 0.0), ("--temperature", 0.1)])
def test_options_of_the_loss_reach_it(here, flags):
    plain, changed = here("plain")[1], here("changed", *flags)[1]
    assert plain[0]["loss"] != changed[0]["loss"] and plain[0]["spread"] == changed[0]["spread"]


def test_dropout_reaches_the_loss(here):
    """From the second step on: at first lora_B is zero."""
    without, dropped = here("without", "--lora-dropout", 0)[1], here("dropped", "--lora-dropout", 0.5)[1]
    assert without[0]["loss"] == dropped[0]["loss"] and without[1]["loss"] != dropped[1]["loss"]


def test_each_step_and_chunk_draws_its_own_dropout_and_replays_it(here, monkeypatch):
    keys, seed_chunk = [], train.seed_chunk
    monkeypatch.setattr(train, "seed_chunk", lambda *key: (keys.append(key), seed_chunk(*key)))
    assert here("run", "--tokens-per-chunk", 64, "--keep-tokens", 0)[0] == 0
    first, second = ([key for key in keys if key[1] == step] for step in (0, 1))
    assert len(keys) == len(first) + len(second) and len(set(first)) > 2
    assert all(keys.count(key) == 2 for key in keys)


def test_the_next_batch_is_read_during_a_step(here, monkeypatch):
    """The reading of step 2 ends, in its own thread, before step 1 does."""
    read, prepare = threading.Event(), train.prepare

    def prepare_and_tell(examples, numbers, tokenize, args, step, *more):
        batch = prepare(examples, numbers, tokenize, args, step, *more)
        if step == 1:
            read.set()
        return batch

    def slow(*args):
        assert read.wait(20)
        return step(*args)
    step = train.training_step
    monkeypatch.setattr(train, "prepare", prepare_and_tell)
    monkeypatch.setattr(train, "training_step", slow)
    assert here("run")[0] == 0


@pytest.mark.parametrize("tokens, length, keep, shapes", [
    (100, 32, 300, [(3, 30)] * 3 + [(1, 30)]), (768, 512, None, [(2, 384)]), (100, 512, 700, [(1, 350)] * 2)])
def test_the_worst_step_holds_the_graphs_of_as_many_tokens_as_any(tokens, length, keep, shapes, base, data, tmp_path):
    flags = ["--tokens-per-chunk", tokens, "--max-length", length, *(("--keep-tokens", keep) if keep else ())]
    embedder = Embedder.load(base, device="cpu", max_length=length)
    embedder.decoder.add_lora(2)
    graphs, embed = [], embedder.embed

    def watched(rows):
        v = embed(rows)
        graphs.append((len(rows), len(rows[0]), v.requires_grad))
        return v

    embedder.embed = watched
    examples = argparse.Namespace(most_tokens=1000)
    train.worst_step(argparse.Namespace(args=options(base, data, tmp_path, *flags), embedder=embedder, examples=examples))
    assert graphs == [(*shape, True) for shape in shapes]                      # all at once, none embedded again
    assert embedder.decoder.layers[0].mlp.up_proj.lora_B.grad is not None


def test_training_goes_on_from_an_adapter(here, tmp_path):
    assert here("first")[0] == 0
    assert here("second", "--init-adapter", tmp_path / "first", "--lr", "1e-9")[0] == 0
    a, b = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("first", "second"))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def saved_pooling(run):
    """(what its config says, what its adapter says)."""
    return json.loads((run / "config.json").read_text())["pooling"], stored_pooling(run)


def test_an_adapter_is_trained_on_with_its_own_pooling(here, tmp_path, capsys):
    assert here("first", "--pooling", "mean")[0] == 0
    assert saved_pooling(tmp_path / "first") == ("mean", "mean")
    for flags, wanted in [((), "mean"), (("--pooling", "last"), "last")]:
        assert here("second", "--init-adapter", tmp_path / "first", "--overwrite", *flags)[0] == 0
        assert saved_pooling(tmp_path / "second") == (wanted, wanted)
        warned = f"warning  {tmp_path / 'first'} was trained with --pooling mean, this run has --pooling last"
        assert (warned in capsys.readouterr().out) is (wanted == "last")
    assert here("second", "--init-adapter", tmp_path / "first", "--pooling", "last", "--resume")[0] == 0
    with pytest.raises(UserError, match="made with another pooling"):
        here("second", "--init-adapter", tmp_path / "first", "--resume")
    assert here("plain")[0] == 0 and saved_pooling(tmp_path / "plain") == ("last", "last")


@pytest.mark.parametrize("mode, flags, wanted, warned", [
    ("mean", (), "mean", False), ("mean", ("--pooling", "last"), "last", True), ("cls", ("--pooling", "last"), "last", False)])
def test_an_exported_base_is_trained_with_its_own_pooling(base, here, tmp_path, capsys, mode, flags, wanted, warned):
    exported = shutil.copytree(base, tmp_path / "exported")
    (exported / "1_Pooling").mkdir()
    (exported / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": mode}))
    assert here("run", "--base", exported, *flags)[0] == 0
    assert saved_pooling(tmp_path / "run") == (wanted, wanted)
    assert ("was trained with --pooling mean" in capsys.readouterr().out) is warned


def test_held_out_examples_are_scored(here, data, tmp_path):
    log = here("run", "--eval-data", data, "--eval-every", 2, "--max-steps", 3)[1]
    assert ["eval_loss" in line for line in log] == [False, True, False]
    here("plain", "--max-steps", 3)                                        # scoring must not disturb training
    a, b = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("run", "plain"))
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------- refusals

def test_a_run_checks_what_it_trains_before_it_starts(base, data, tmp_path, monkeypatch):
    load = train.load_model

    def with_another_parameter(args):
        embedder = load(args)
        embedder.decoder.norm.weight.requires_grad_()
        return embedder
    monkeypatch.setattr(train, "load_model", with_another_parameter)
    with pytest.raises(UserError, match="does not fit this base"):
        train.train(options(base, data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_base_with_an_adapter_is_not_thrown_away(base, data, here, tmp_path):
    assert here("first")[0] == 0
    with pytest.raises(UserError, match=f"has an adapter.*--base {base} --init-adapter {tmp_path / 'first'}"):
        here("second", "--base", tmp_path / "first")


def test_float16_that_never_fits_ends_the_run(here, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: 0.5)
    with pytest.raises(UserError, match="whatever their scale.*--dtype bfloat16"):
        here("half", "--dtype", "float16")


def test_the_log_is_json_even_where_a_gradient_is_infinite(here, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.inf))
    assert here("half", "--dtype", "float16")[1][0]["grad_norm"] is None
    assert "Infinity" not in (tmp_path / "half/log.jsonl").read_text()


def test_texts_that_fill_the_length_are_counted(base, data, here):
    assert here("short", "--max-length", 16)[1][0]["full_texts"] > here("long", "--max-length", 64)[1][0]["full_texts"] == 0


@pytest.mark.parametrize("flags, records", [
    (("--batch-size", 1), [record(i, neg=[]) for i in range(4)]),
    (("--batch-size", 1, "--negatives", 0), [record(i) for i in range(4)]),
    ((), [record(0, neg=[])]),
    ((), [record(0, neg=[], pos=[f"answer {i}"]) for i in range(4)]),          # the mask takes all others
])
def test_a_run_that_could_learn_nothing_is_refused(here, data, tmp_path, flags, records):
    write_lines(data, records)
    with pytest.raises(UserError, match="no query of a batch has a negative, and so nothing is learnt: larger"):
        here("run", *flags)
    assert not (tmp_path / "run").exists()
    write_lines(data, [*records, record(9)])
    assert here("run", "--batch-size", 2)[0] == 0


def test_fewer_steps_than_warm_up_are_said(here, capsys):
    here("run", "--warmup-steps", 7)
    assert "2 steps are fewer than the 7 of --warmup-steps" in capsys.readouterr().out


def test_the_first_lines_count_negatives_and_name_keys_that_are_not_read(here, data, capsys):
    write_lines(data, [record(i, negs=["n"], neg=["n"] * (i % 2)) for i in range(24)])
    assert here("run")[0] == 0
    said = capsys.readouterr().out
    assert "24 examples of 2 groups, 12 with negatives, 0 lines skipped\n" in said
    assert "warning  'negs', in 24 lines, is no key of an example (query, pos, neg, prompt, type)" in said


@pytest.mark.parametrize("change, words", [
    ({"state": '{"step": 99, "scaler": {}}'}, "of step 99, but this run has 2"), ({"state": "{"}, "not JSON"),
    ({"state": '{"step": "1"}'}, "'step' is missing or not a whole number"), ({}, "'step' is missing"),
    ("moment", "is on one side only")])
def test_a_checkpoint_edited_by_hand_is_one_line(here, tmp_path, change, words):
    assert here("run", "--checkpoint-every", 1)[0] == 0
    path = tmp_path / "run/checkpoint.safetensors"
    tensors = load_file(path)
    if change == "moment":
        change = {"state": json.dumps(checkpoint_state(tmp_path / "run"))}
        del tensors[next(name for name in tensors if name.endswith("/exp_avg"))]
    save_file(tensors, path, change)
    with pytest.raises(UserError, match=words):
        here("run", "--resume")


def test_a_data_file_that_is_cut_in_mid_run_is_one_line(here, data, monkeypatch):
    step = train.training_step

    def cut_then_step(*args):
        data.write_text("")
        return step(*args)

    monkeypatch.setattr(train, "training_step", cut_then_step)
    with pytest.raises(UserError, match="data.jsonl byte .*not JSON"):
        here("run", "--max-steps", 3)


def test_many_positives_of_few_queries_mask_in_bounded_memory(tmp_path):
    """Class labels as queries: each example is known to be a positive of a quarter of the others' queries."""
    path = write_lines(tmp_path / "labels.jsonl", ({"query": f"label {i % 4}", "pos": [f"text {i}"]} for i in range(8000)))
    examples = train.Examples([str(path)])
    started = time.monotonic()
    valid = train.documents_that_count(examples, range(256), [f"text {i}" for i in range(256)])
    assert time.monotonic() - started < 5 and valid.sum() == 256 * 192 + 256


def test_one_long_text_among_many_negatives_is_drawn_as_a_number(base, tmp_path):
    """As an array of strings, each of 2,000 negatives would take the longest one's memory."""
    negatives = ["x" * 2_000_000] + [f"wrong {i}\0" for i in range(2000)]
    path = write_lines(tmp_path / "long.jsonl", [{"query": "q", "pos": ["p"], "neg": negatives}])
    args = options(base, path, tmp_path, "--negatives", 2001)
    started = time.monotonic()
    batch = train.prepare(train.Examples([str(path)]), [0], lambda texts, prompts: texts, args, 0)
    assert time.monotonic() - started < 5 and "wrong 7\0" in batch.token_ids


@pytest.mark.parametrize("more, words", [
    (("--batch-size", 0), "--batch-size: 0: must be above 0"),
    (("--negatives", -1), "--negatives: -1: must be at least 0"),
    (("--seed", -1), "--seed: -1: must be"),
    (("--seed", 2**64), "--seed: 18446744073709551616: must be"),
    (("--lora-dropout", 1.5), "--lora-dropout: 1.5: must be"),
    (("--lora-alpha", 0), "--lora-alpha: 0: must be above 0"),
    *[((flag, value), f"{flag}: {value}: must be") for flag in ("--lr", "--weight-decay", "--max-grad-norm", "--mask-margin")
      for value in ("nan", "inf")],
    (("--max-length", 2), "max_length 2"),
    (("--lora-rank", 2_000_000_000), "--lora-rank: 2000000000: must be from 1 to 100,000"),
    (("--batch-size", "9" * 401), "--batch-size: 999999999999999999999999999999: must be below 2^63"),
    (("--data", "caf\udce9.jsonl"), "'caf\\udce9.jsonl': not in UTF-8"),
    (("--prompt", "f\udcfcr"), "'f\\udcfcr': not in UTF-8"),
    (("--data", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
    (("--eval-data", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
    (("--init-adapter", "nowhere"), "nowhere/adapter_config.json: no such file"),
    (("--matryoshka", 9999), "--matryoshka 9999: a vector has 32 values"),
    (("--device", "cuda:9"), "device cuda:9: "),
    (("--device", "meta"), "device meta: "),
    (("--out", "/proc/nope"), "/proc/nope"),
    (("--tempreture", 1), "unrecognized arguments: --tempreture"),
])
def test_user_errors_are_one_line(base, data, tmp_path, capsys, more, words):
    paths = ["--base", base, "--data", data, "--out", tmp_path / "run"]
    assert words in complaint(capsys, train.main, *paths, *FLAGS, *more)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line(base, data, tmp_path):
    """Files of at most 40 kB: the first checkpoint does not fit."""
    done = run_train(base, data, tmp_path / "run",
                     preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"train.py: {tmp_path / 'run/checkpoint.safetensors'}: cannot be written" in done.stderr
    assert not (tmp_path / "run/checkpoint.safetensors").exists() and not list((tmp_path / "run").glob("*.tmp"))


def test_a_full_gpu_is_said_with_the_flags_to_lower(base, data, tmp_path, monkeypatch):
    assert "--tokens-per-chunk" in explain(torch.OutOfMemoryError("CUDA out of memory"))

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("plumbing.checkpoint.read_tensor", full)
    with pytest.raises(UserError, match="too small for its weights alone"):
        train.load_model(options(base, data, tmp_path))
