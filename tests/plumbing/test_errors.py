"""plumbing/errors.py: each mistake of a user is one line and exit code 2; a fault of ours keeps its traceback."""
import re
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from plumbing import errors
from plumbing.errors import (Parser, UserError, at_least_0, command, explain, finite, lora_rank, positive, probability,
                             say, seed, share)

BAD_FLAGS = [
    (positive(int), "0", "must be above 0"), (positive(int), "x", "invalid int value"), (positive(int), "1.5", "invalid"),
    (positive(float), "nan", "must be above 0"), (positive(float), "inf", "must be above 0"),
    (at_least_0(int), "-1", "must be at least 0"), (at_least_0(float), "-0.1", "must be at least 0"),
    (finite, "inf", "must be a finite number"), (finite, "nan", "must be a finite number"),
    (share, "0", "must be above 0 and at most 1"), (share, "1.1", "must be above 0 and at most 1"),
    (probability, "1", "must be at least 0 and below 1"), (seed, str(2**63), "must be at least 0 and below 2^63"),
    (positive(int), "9" * 401, "must be below 2^63"), (at_least_0(int), str(2**63), "must be below 2^63"),
    (positive(int), "-" + "9" * 401, "must be above 0"), (positive(int), "9" * 5000, "invalid int value"),
    (lora_rank, "0", "must be from 1 to 100,000"), (lora_rank, "2000000000", "must be from 1 to 100,000"),
]


@pytest.mark.parametrize("kind, value, words", BAD_FLAGS)
def test_a_flag_outside_its_bounds_is_one_line(kind, value, words):
    parser = Parser()
    parser.add_argument("--flag", type=kind)
    with pytest.raises(UserError, match="argument --flag: .*" + re.escape(words)) as caught:
        parser.parse_args(["--flag", value])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [["--flag", "caf\udce9.jsonl"], ["--flag=f\udcfcr"], ["caf\udce9"]])
def test_a_flag_that_is_no_utf_8_is_one_line(words):
    """A shell in Latin-1 gives bytes, which Python keeps as halves of surrogate pairs."""
    parser = Parser()
    parser.add_argument("--flag")
    for argv in (words, ["known", *words]):
        with pytest.raises(UserError, match=r"\\udc\w\w.*: not in UTF-8") as caught:
            parser.parse_known_args(argv)
        str(caught.value).encode()


def test_flags_within_their_bounds():
    assert positive(int)("500_000") == 500_000 and at_least_0(float)("0") == 0 and share("1") == 1


@pytest.mark.parametrize("error, words", [
    (UserError("what: way out"), "what: way out"), (FileNotFoundError(2, "No such file", "x"), "x"),
    (FileExistsError(17, "File exists", "x"), "x: a file stands where a folder is wanted"),
    (SafetensorError("disk full"), "disk full"), (torch.OutOfMemoryError("CUDA"), "--tokens-per-chunk"),
    (RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
    (MemoryError(), "out of memory"),
    (RuntimeError("[../gloo/pair.cc:534] Connection closed by peer. Advice"), "lost another rank (Connection closed by peer)"),
    (torch.distributed.DistBackendError("[x] Timed out"), "lost another rank (Timed out)"),
])
def test_what_a_user_can_mend_is_one_line(error, words, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        command(main)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and said.count("\n") == 1


def test_a_fault_of_ours_keeps_its_traceback():
    assert explain(RuntimeError("shape mismatch")) is None

    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command(main)


@pytest.mark.parametrize("body, code", [("return 3", 3), ("return None", 0), ("raise KeyboardInterrupt", 130)])
def test_exit_codes(body, code):
    with pytest.raises(SystemExit) as ended:
        exec(f"def main():\n    {body}\ncommand(main)", {"command": command})
    assert (ended.value.code or 0) == code


def test_a_script_without_a_model_starts_without_torch():
    code = "import sys, plumbing.errors, plumbing.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_under_torchrun_rank_0_speaks_first(monkeypatch, capsys):
    """torchrun ends the others as soon as it has, so that a line that all would say stands there once."""
    waits = []
    monkeypatch.setattr(errors.time, "sleep", waits.append)
    for rank in "0", "1":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            errors.command(lambda: errors.check(False, "no such model"))
    assert waits == [2] and capsys.readouterr().err.count("no such model") == 2


@pytest.mark.parametrize("value", ["", "x"])
def test_an_environment_without_numbers_does_not_hide_the_error(value, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        command(lambda: errors.check(False, "no such model"))
    assert capsys.readouterr().err.endswith(": no such model\n")


def test_what_nobody_reads_is_said_to_nobody(monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    say("one")
    assert not isinstance(sys.stdout, Closed)
    say("two")
