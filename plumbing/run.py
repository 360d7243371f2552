"""plumbing/run.py: what keeps a training run safe. Its folder, checkpoints, log, signals and figures.

    runs/NAME/config.json              every flag; a resume with others is refused
    runs/NAME/log.jsonl                a line a step; a resume drops the lines past its checkpoint
    runs/NAME/checkpoint.safetensors   adapter, moments, step and loss scale: all that a resume needs
    runs/NAME/adapter_config.json, adapter_model.safetensors   PEFT's two files, derived from the checkpoint
    runs/NAME/lock                     held while a process trains: a second one is refused

The method is train.py's: nothing here changes a gradient.
"""
import contextlib
import fcntl
import json
import math
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from plumbing.checkpoint import (base_fingerprint, fill_lora, open_safetensors, save_tensors,
                                 stored_pooling)
from plumbing.errors import UserError, check, say
from plumbing.examples import SCHEMA
from plumbing.files import parse_line, read_json, replace_file, write_json, write_text
from plumbing.ranks import agree, end_ranks, print0, rank, world_size

# TFLOP/s of a GPU, dense, 16 bits; the first name that stands in the GPU's own counts.
PEAK_TFLOPS = {"B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989,
               "A100": 312, "A10G": 70, "A10": 125, "L40S": 362, "L40": 181, "L4": 121, "4090": 165,
               "3090": 71, "V100": 112, "T4": 65}
# What a resume may change. Of the data, it is the content and the shares that must be the same.
FREE_FLAGS = ("out", "timeout", "resume", "overwrite", "checkpoint_every", "eval_every", "eval_data",
              "peak_tflops", "tokens_per_chunk", "keep_tokens", "activation_checkpointing", "data", "device")
COUNTS = ("tokens", "padded", "forward", "backward", "full", "signals")       # what `Run.counts` counts


class Run:
    """A training run at one of its steps.

    args: train.py's flags. step: steps done. steps: all that are planned. parameters: LoRA's, as the
    optimizer has them. scaler: of the loss in float16, else idle. weights: parameters in the base's matrix
    products. peak: FLOP/s of all GPUs together, 0 where unknown.
    """

    def __init__(self, args, embedder, optimizer, examples, steps: int):
        decoder = embedder.decoder
        self.args, self.embedder, self.optimizer, self.examples = args, embedder, optimizer, examples
        self.folder = args.out
        self.step, self.steps = 0, steps
        self.parameters = list(decoder.lora_parameters().values())
        self.dtype = decoder.norm.weight.dtype
        self.base_dtype = decoder.projections()[0].weight.dtype                # the dtype above, or fp8
        self.scaler = torch.amp.GradScaler(embedder.device.type, enabled=self.dtype == torch.float16)
        self.weights = sum(projection.weight.numel() for projection in decoder.projections())
        self.peak = self.peak_flops()
        self.signals: list[tuple[int, float]] = []                             # (number, time) of each
        self.stopping = False                                                  # whether any rank had one
        self.lock = None                                                       # rank 0's, once it is open
        check_trained(decoder)
        check_negatives(args, examples)

        # Gradients and moments exist from the start: a checkpoint fills them, memory counts them, and a rank
        # without texts still joins the sum.
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device),
                                          "exp_avg": torch.zeros_like(parameter),
                                          "exp_avg_sq": torch.zeros_like(parameter)}

    def peak_flops(self) -> float:
        device = self.embedder.device
        tflops = self.args.peak_tflops or 0
        if not tflops and device.type == "cuda":
            gpu = torch.cuda.get_device_name(device)
            known = [peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", gpu)]
            tflops = known[0] if known else 0
        if self.base_dtype.itemsize == 1:
            tflops *= 2                                                        # fp8 runs at twice the rate
        return tflops * 1e12 * world_size()

    # ------------------------------------------------------------------------------------ start and end

    def open(self) -> None:
        """Make the folder, or continue from its checkpoint; say what will happen; listen to signals."""
        refusal, resuming = None, False
        if rank() == 0:
            try:
                resuming = self.open_folder()
            except (UserError, OSError) as error:
                refusal = str(error)
                self.unlock()
        refusal, resuming = agree((refusal, resuming))
        check(refusal is None, refusal)                                      # every rank says it and leaves
        if resuming:
            self.load()
        if rank() == 0:
            drop_lines_past(self.folder / "log.jsonl", self.step)
            self.log_file = open(self.folder / "log.jsonl", "a", encoding="utf-8")
        self.describe()
        for number in (signal.SIGTERM, signal.SIGINT):                         # finish the step, save, leave
            signal.signal(number, lambda number, frame: self.note_signal(number))

    def config(self) -> dict:
        """What config.json says: the flags, and what else a resume must find unchanged."""
        flags = {name: str(value) if isinstance(value, Path) else value
                 for name, value in vars(self.args).items() if name != "device"}
        return flags | {"pooling": self.embedder.pooling,                      # where no flag named one, too
                        "base_fingerprint": base_fingerprint(Path(self.embedder.base)),
                        "base_dtype": str(self.base_dtype).removeprefix("torch."),
                        "world_size": world_size(),
                        "data_fingerprint": self.examples.fingerprint,
                        "data_shares": list(self.examples.shares)}

    def open_folder(self) -> bool:
        """Check, make or empty the folder -> whether there is a checkpoint to continue from."""
        folder, args, config = self.folder, self.args, self.config()
        check_ours(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock(folder)                                             # before anything there is read
        resuming = False
        if (folder / "config.json").exists():
            before = read_json(folder / "config.json")
            changed = [name for name, value in config.items()
                       if name not in FREE_FLAGS and not same(name, before.get(name), value)]
            resuming = args.resume and not changed
            if not resuming:
                check(args.overwrite, refusal_to_replace(folder, args.resume, changed))
                empty(folder)
        for torn in folder.glob("*.tmp"):                                      # of a kill in mid-write
            torn.unlink()
        write_json(folder / "config.json", config)
        return resuming and (folder / "checkpoint.safetensors").exists()

    def describe(self) -> None:
        args, examples, decoder = self.args, self.examples, self.embedder.decoder
        adapted = [projection for projection in decoder.projections() if projection.lora_A is not None]
        trained = sum(parameter.numel() for parameter in self.parameters)
        dtype = str(self.dtype).removeprefix("torch.")
        print0(f"base     {args.base}: {len(decoder.layers)} layers, {self.weights:,} weights in matrix "
               f"products, {dtype} on {world_size()} x {self.embedder.device.type}")
        print0(f"adapter  {trained:,} parameters on {len(adapted)} projections")
        print0(f"data     {len(examples):,} examples of {len(examples.group_names)} groups, "
               f"{examples.with_negatives:,} with negatives, {examples.skipped:,} lines skipped")
        for key, lines in sorted(examples.unread.items()):
            print0(f"warning  {key!r}, in {lines:,} lines, is no key of an example ({', '.join(SCHEMA)})")
        if self.steps < args.warmup_steps:
            print0(f"warning  {self.steps} steps are fewer than the {args.warmup_steps} of --warmup-steps: "
                   f"the rate never comes to --lr {args.lr:g}: more data or epochs, or a smaller "
                   "--batch-size or --warmup-steps")
        trained_for = None
        with contextlib.suppress(UserError):                                   # a pooling that is not here
            trained_for = stored_pooling(args.init_adapter or Path(args.base))
        if trained_for not in (None, self.embedder.pooling):
            print0(f"warning  {args.init_adapter or args.base} was trained with --pooling {trained_for}, "
                   f"this run has --pooling {self.embedder.pooling}")
        print0(f"steps    {self.steps:,} of {args.batch_size:,} queries, from {self.step:,}; "
               f"{args.tokens_per_chunk:,} tokens a chunk, at most {args.max_length} a text")

    def finish(self) -> int:
        """Say how the run ended -> its exit code: 0, or 128 + the signal that stopped it."""
        number = self.signals[0][0] if self.signals else signal.SIGTERM        # the latter: another rank's
        done = self.step == self.steps
        if done:
            print0(f"{self.folder}: {self.step:,} steps done, adapter saved")
        else:
            print0(f"stopped by {signal.Signals(number).name} after step {self.step}: --resume goes on "
                   "from there")
        self.unlock()
        end_ranks()
        return 0 if done else 128 + number

    def unlock(self) -> None:
        if self.lock:
            self.lock.close()

    # ------------------------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Everything in one file that is replaced whole; then the adapter, derived from it."""
        if rank() != 0:
            return
        tensors = {}
        for name, parameter in self.embedder.decoder.lora_parameters().items():
            tensors[name] = parameter.detach().cpu().contiguous()
            for key, value in self.optimizer.state[parameter].items():         # step, exp_avg, exp_avg_sq
                tensors[f"{name}/{key}"] = value.cpu().contiguous()
        state = json.dumps({"step": self.step, "scaler": self.scaler.state_dict()})
        replace_file(self.folder / "checkpoint.safetensors",
                     lambda path: save_tensors(tensors, path, state=state))
        self.embedder.save_adapter(self.folder)

    def load(self) -> None:
        """Put adapter, moments, loss scale and step back as the checkpoint has them."""
        path = self.folder / "checkpoint.safetensors"
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
            state = parse_line(metadata.get("state", "{}").encode(), path, {"step": int, "scaler": dict})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        check(0 <= state["step"] <= self.steps,
              f"{path}: of step {state['step']}, but this run has {self.steps}")
        lora = self.embedder.decoder.lora_parameters()
        adapter = {name: tensor for name, tensor in tensors.items() if "/" not in name}
        fill_lora(lora, adapter, path)
        moments = {f"{name}/{key}": value for name, parameter in lora.items()
                   for key, value in self.optimizer.state[parameter].items()}
        fill_lora(moments, {name: tensor for name, tensor in tensors.items() if "/" in name}, path)
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        if rank() == 0:
            self.embedder.save_adapter(self.folder)                          # a kill may have come before it

    # -------------------------------------------------------------------------------------- each step

    def note_signal(self, number: int) -> None:
        """Remember a signal, for the end of the step.

        make, torchrun and the terminal may each send the same one, so a second one at once means nothing; a
        second Ctrl-C after two seconds leaves without a checkpoint."""
        now = time.monotonic()
        if self.signals and number == signal.SIGINT and now - self.signals[0][1] > 2:
            sys.exit(128 + number)
        self.signals.append((number, now))

    def counts(self, batch, chunks: list, kept: int) -> torch.Tensor:
        """What this rank adds to the step's COUNTS, on the CPU.

        Real tokens, padded ones, those that went forward and backward, texts that fill --max-length, and
        signals to stop."""
        padded = sum(chunk.tokens for chunk in chunks)
        forward = padded + sum(chunk.tokens for chunk in chunks[kept:])        # pass two embeds these again
        if self.args.activation_checkpointing:
            forward += padded
        lengths = [len(ids) for ids in batch.token_ids]
        full = sum(length == self.args.max_length for length in lengths)
        return torch.tensor([sum(lengths), padded, forward, padded, full, len(self.signals)],
                            dtype=torch.float32)

    def line(self, figures: dict, counts: torch.Tensor, lr: float, started: float) -> dict:
        """A step's line of the log. figures: scalars on the device. counts: summed over the ranks. started:
        in the seconds of time.perf_counter.

        All numbers come from the device in one message, for which the host waits: the only time in a step.
        """
        numbers = torch.cat([torch.stack(list(figures.values())).float(), counts]).tolist()
        seconds = time.perf_counter() - started
        count = dict(zip(COUNTS, numbers[len(figures):]))
        line = {"step": self.step, **dict(zip(figures, numbers)), "lr": lr, "seconds": seconds,
                "tokens": int(count["tokens"]), "tokens_per_second": count["tokens"] / seconds,
                "padding": 1 - count["tokens"] / count["padded"], "full_texts": int(count["full"])}
        # a token costs 2 FLOPs a weight forward, and 2 backward: the base has no weight gradient
        if self.peak:
            line["mfu"] = 2 * self.weights * (count["forward"] + count["backward"]) / seconds / self.peak
            line["mfu_useful"] = 4 * self.weights * count["tokens"] / seconds / self.peak
        self.stopping = count["signals"] > 0                                   # the same on every rank
        if self.scaler.is_enabled():
            line["scale"] = self.scaler.get_scale()
        return line

    def check_finite(self, line: dict, batch) -> None:
        """End the run where loss or gradient is NaN or infinite, with a list of the batch's examples.

        In float16 a gradient may overflow: the scaler skips the step and halves its scale. Below 1 it helps
        no more.
        """
        scaled = self.scaler.is_enabled()
        check(not scaled or line["scale"] >= 1,
              f"step {self.step}: in float16 the gradients overflow whatever their scale: stopped; the last "
              "good checkpoint stands; --dtype bfloat16 or float32 has the range")
        names = ["loss"] if scaled else ["loss", "grad_norm"]
        if all(math.isfinite(line[name]) for name in names):
            return
        examples = [self.examples.where(number) for number in batch.numbers]
        file = self.folder / "bad_batch.json"
        if rank() == 0:
            write_json(file, {**valid_json(line), "examples": examples})
        raise UserError(f"step {self.step}: loss {line['loss']}, gradient norm {line['grad_norm']}: "
                        f"stopped; the last good checkpoint stands; the batch ({examples[0]}, ...) is "
                        f"listed in {file}")

    def log(self, line: dict) -> None:
        if rank() == 0:
            self.log_file.write(json.dumps(valid_json(line)) + "\n")
            self.log_file.flush()
            print_line(line, self.steps)


def valid_json(line: dict) -> dict:
    """The line with null for NaN and infinity, which JSON lacks."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in line.items()}


def print_line(line: dict, steps: int) -> None:
    """The step on the screen, as one line."""
    seconds_left = int((steps - line["step"]) * line["seconds"])
    words = [f"step {line['step']}/{steps}", f"loss {line['loss']:.4f} (chance {line['chance_loss']:.2f})",
             f"acc {line['accuracy']:.3f}", f"spread {line['spread']:.3f}", f"lr {line['lr']:.1e}",
             f"grad {line['grad_norm']:.2f}", f"{line['tokens_per_second']:,.0f} tok/s",
             f"pad {line['padding']:.1%}"]
    if "mfu" in line:
        words.append(f"mfu {line['mfu']:.0%}")
    if "eval_loss" in line:
        words.append(f"held-out {line['eval_loss']:.3f}/{line['eval_accuracy']:.2f}")
    words.append(f"left {seconds_left // 60}m{seconds_left % 60:02d}s")
    say("  ".join(words))


# ------------------------------------------------------------------------------------ the folder's parts

def same(flag: str, before, now) -> bool:
    """Whether two values of a flag mean the same: a folder has many spellings.

    Runs that were made before the base was fingerprinted go on."""
    if flag == "base_fingerprint" and before is None:
        return True
    if flag in ("base", "init_adapter") and before and now:
        return Path(before).resolve() == Path(now).resolve()
    return before == now


def refusal_to_replace(folder: Path, resume: bool, changed: list[str]) -> str:
    if resume:
        return (f"{folder}: made with another {', '.join(changed)}: --overwrite starts anew, or choose "
                "another --out")
    return (f"{folder}: a run is here already: --resume goes on with it, --overwrite starts anew, or choose "
            "another --out")


def check_ours(folder: Path) -> None:
    """Refuse a folder that is neither a run's nor empty, before a file is made in it."""
    if (folder / "config.json").exists():
        check("data_fingerprint" in read_json(folder / "config.json"),
              f"{folder}: a model's folder, not a run's: choose another --out")
        return
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    others = [name for name in names if name != "lock" and not name.endswith(".tmp")]
    check(not others and (folder.is_dir() or not folder.exists()),
          f"{folder}: not empty and not a run: choose another --out")


def lock(folder: Path):
    """Keep other trainings out of the folder -> a file to close; with a killed process, the kernel does."""
    file = open(folder / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder}: another process trains here: wait for it, stop it, or choose another "
                        "--out") from None
    except OSError:                                                            # a file system without locks
        pass
    return file


def empty(folder: Path) -> None:
    """Remove all that a run's folder holds, config.json last: until then the command can be repeated."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
        if path.name == "lock":
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def drop_lines_past(log: Path, step: int) -> None:
    """Drop the log's lines past the checkpoint: their steps will be done, and logged, again."""
    if not log.exists():
        return
    lines = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            past = not line.endswith("\n") or json.loads(line)["step"] > step
        except (ValueError, TypeError, KeyError):                            # torn by a full disk or a kill
            past = True
        if past:
            break
        lines.append(line)
    write_text(log, "".join(lines))


def check_negatives(args, examples) -> None:
    """Refuse a run in which no query ever has a negative: each one's loss is 0, and so is its gradient."""
    one_query = examples.keys.min() == examples.keys.max()           # the mask takes all other documents
    alone = args.batch_size == 1 or (one_query and not args.no_mask)
    check(not alone or (args.negatives and examples.with_negatives),
          f"--batch-size {args.batch_size}: no query of a batch has a negative, and so nothing is learnt: "
          'larger batches, other queries, or --negatives of examples with "neg"')


def check_trained(decoder) -> None:
    """Refuse a model that would train more or less than its adapter.

    That is rank * (in + out) for each projection that has one: 41,943,040 for Mistral-7B at rank 16."""
    names = decoder.lora["target_modules"]
    adapted = [module for name, module in decoder.named_modules() if name.rsplit(".", 1)[-1] in names]
    wanted = sum(decoder.lora["r"] * sum(projection.weight.shape) for projection in adapted)
    trained = sum(parameter.numel() for parameter in decoder.parameters() if parameter.requires_grad)
    check(trained == wanted,
          f"{trained:,} parameters would be trained; rank {decoder.lora['r']} on {len(adapted)} projections "
          f"makes {wanted:,}: the adapter does not fit this base")
