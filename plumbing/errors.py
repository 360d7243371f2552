"""plumbing/errors.py: how a script refuses: one line that says what, where and the way out; exit code 2.

A lesson guards itself with `check` alone, and `Parser` makes the same one line of every bad flag. `command`
is the one place that prints an error and ends the process. The bounds of a flag are its type:

    add("--lr", type=positive(float))    add("--seed", type=at_least_0(int))    add("--share", type=share)

Nothing here imports torch, so that a script without a model starts at once.
"""
import argparse
import math
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A user's mistake, as one line that says how to mend it."""


def check(condition, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def texts_and_prompts(texts, prompt) -> tuple[list[str], list[str]]:
    """Texts to embed, out of any iterable, and a prompt for each; prompt: one for all, one a text, or none.

    TypeError for one string in place of texts, which would be embedded letter by letter; UserError for what
    is no text: half a surrogate pair is a str in Python, but not UTF-8.
    """
    if isinstance(texts, str) or not hasattr(texts, "__iter__"):
        raise TypeError("texts: a list of texts; write [text] for one")
    if prompt is not None and not hasattr(prompt, "__iter__"):
        raise TypeError('prompt: one string, or a list of one a text; "" for none')
    texts = list(texts)
    if prompt is None or isinstance(prompt, str):
        prompt = [prompt] * len(texts)
    prompts = [one or "" for one in prompt]
    check(len(prompts) == len(texts), f"prompt: {len(prompts)} instructions for {len(texts)} texts")
    for number, (prompt, text) in enumerate(zip(prompts, texts)):
        try:
            (prompt + text).encode()
        except (TypeError, UnicodeEncodeError):
            raise UserError(f"text {number}: no UTF-8 text: {text!r:.50}, prompt {prompt!r:.50}") from None
    return texts, prompts


def check_room(prompts: list[str], lengths: list[int], max_length: int) -> None:
    """Refuse an instruction of so many tokens that a text of max_length has none of its own."""
    for prompt, length in zip(prompts, lengths):
        check(length + 3 <= max_length,
              f"the instruction alone has {length} tokens and fills --max-length {max_length}, so that all "
              f"its queries would be equal: raise --max-length, or shorten {prompt!r:.60}")


def check_finite(vectors, texts: list[str]) -> None:
    """Refuse NaN and infinity among vectors [n, D], naming the first text."""
    finite = vectors.isfinite().all(1)
    if not finite.all():
        number = int((~finite).nonzero()[0, 0])
        raise UserError(f"the model gives NaN or infinity for {int((~finite).sum())} of {len(texts)} texts, "
                        f"the first is {texts[number]!r:.60}: --dtype bfloat16 or float32 has the range "
                        "that float16 lacks")


@contextmanager
def blame(where: str, way_out: str):
    """with blame("prompts", "mend it"): a missing key or a wrong value in this block is the user's."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{where} ({error!r}): {way_out}") from None


# ------------------------------------------------------------------------------------------------- flags

class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are UserErrors and so one line like all others."""

    def parse_known_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            try:
                word.encode()
            except UnicodeEncodeError:         # bytes of a shell in Latin-1: no JSON file could hold them
                raise UserError(f"{word!r:.60}: not in UTF-8: type or rename it in UTF-8") from None
        return super().parse_known_args(args, namespace)

    def error(self, message):
        raise UserError(f"{message} (--help lists all flags)")


def bounded(kind, allowed, rule: str):
    """A flag's type: kind(text), where `allowed` says so. NaN, infinity and 2^63 never are.

    >>> bounded(int, lambda value: value > 0, "above 0")("3")
    3
    """
    def parse(text):
        value = kind(text)                     # argparse makes its own line of a ValueError
        if kind is int and allowed(value) and abs(value) >= 2**63:       # no array or counter takes it
            raise argparse.ArgumentTypeError(f"{text:.30}: must be below 2^63")
        if not allowed(value) or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text:.60}: must be {rule}")
        return value

    parse.__name__ = kind.__name__             # argparse says "invalid int value"
    return parse


def positive(kind):
    return bounded(kind, lambda value: value > 0, "above 0")


def at_least_0(kind):
    return bounded(kind, lambda value: value >= 0, "at least 0")


finite = bounded(float, lambda value: True, "a finite number")
share = bounded(float, lambda value: 0 < value <= 1, "above 0 and at most 1")
probability = bounded(float, lambda value: 0 <= value < 1, "at least 0 and below 1")
seed = bounded(int, lambda value: 0 <= value < 2**63, "at least 0 and below 2^63")
lora_rank = bounded(int, lambda value: 0 < value <= 10**5, "from 1 to 100,000")


# ------------------------------------------------------------------- what a script says, and how it ends

def say(text: str, end="\n") -> None:
    """Print at once. Where nobody reads any more (`| head`), the run goes on in silence: it is paid for."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def torchrun_number(name: str, default: int) -> int:
    """A number by which torchrun tells a process its place; the default where the environment has none.

    It may be empty there. start_ranks refuses what is no number; on the way out, nothing may raise.
    """
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def command(main) -> None:
    """Run a script's `main` and end the process.

    The exit code is what main returns, 2 for a user's mistake, a file that cannot be read or written, a full
    GPU or a lost rank, and 130 for Ctrl-C. A fault of our own keeps its traceback.
    """
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        if torchrun_number("RANK", 0) > 0:
            time.sleep(2)                      # what rank 0 says too, torchrun lets nobody say again
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        code = 2
    leave(code)


def explain(error: Exception) -> str | None:
    """The line that tells a user of an error, or None for a fault of our own.

    Errors of torch and safetensors are known by their class's name: neither needs to be loaded here.
    """
    kind, text = type(error).__name__, str(error)
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return f"{error.filename}: a file stands where a folder is wanted: choose another path"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (UserError, OSError)) or kind == "SafetensorError":       # the last: a full disk
        return text
    if isinstance(error, MemoryError) or "can't allocate memory" in text:         # the latter is torch's
        return ("out of memory: a smaller --lora-rank, --max-length, --batch-size or chunk (train.py: "
                "--tokens-per-chunk) takes less")
    if kind == "OutOfMemoryError":
        return ("out of GPU memory: fewer tokens a chunk (train.py: --tokens-per-chunk, --keep-tokens; the "
                "batch and its negatives stay the same), a shorter --max-length or a 16-bit --dtype take "
                "less")
    if isinstance(error, RuntimeError) and (kind.startswith("Dist") or "gloo" in text):
        reason = text.splitlines()[0].split("] ", 1)[-1].split(". ")[0]      # "[file:line] reason. Advice"
        return (f"rank {torchrun_number('RANK', 0)} lost another rank ({reason}): the last checkpoint, if "
                "there is one, stands, and --resume goes on from it")
    return None


def leave(code: int | None) -> None:
    """End the process.

    One of several ranks leaves without Python's teardown: gloo's threads may hold tensors a moment longer,
    and to free one they need the interpreter; where that is gone, the process would abort."""
    if torchrun_number("WORLD_SIZE", 1) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)
