"""plumbing/files.py: JSON in, whole files out, and logs that survive a kill.

Every JSON file and every JSON line passes `fields`, which takes a schema and names what does not fit it. A
schema is {key: kind}; a kind is a type, [type] for a list, or a tuple of kinds of which one must do.
OPTIONAL in a tuple lets the key be missing or null.

    for row in read_jsonl(path, {"query": str, "pos": [str], "prompt": (str, OPTIONAL)}): ...
"""
import gzip
import hashlib
import json
import math
import os
import sys
import zlib
from pathlib import Path

from plumbing.errors import UserError, check

OPTIONAL = type(None)
BOM = b"\xef\xbb\xbf"               # some editors put it in front of a UTF-8 file


# ---------------------------------------------------------------------------------------------- schemas

def fits(value, kind) -> bool:
    """Whether a JSON value is of a kind. NaN and infinity are of none; True is no number; 1 is a float.

    >>> fits(["a", "b"], [str]), fits(1, (str, [str])), fits(None, (str, OPTIONAL))
    (True, False, True)
    >>> fits(True, int), fits(1, float)
    (False, True)
    """
    if isinstance(kind, tuple):
        return any(fits(value, one) for one in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(item, kind[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if isinstance(value, int) and kind is float:           # JSON's whole numbers have no end, floats have
        return abs(value) <= sys.float_info.max
    return isinstance(value, (int, float) if kind is float else kind)


def fields(value, where, schema: dict) -> dict:
    """The value, if it is an object whose keys fit the schema; UserError names the first that does not."""
    check(isinstance(value, dict), f"{where}: holds no JSON object")
    for key, kind in schema.items():
        one = value.get(key)
        if type(one) is kind and kind is not float:        # most values; NaN is a float, too
            continue
        if not fits(one, kind):             # no `check`: it would spell the kind of every value of every row
            raise UserError(f"{where}: {key!r} is missing or not {spelled(kind)}")
    return value


def spelled(kind) -> str:
    """A kind in words.

    >>> spelled((str, [str], OPTIONAL))
    'a string or a list of strings'
    """
    words = {str: "a string", int: "a whole number", float: "a number", bool: "true or false",
             dict: "an object"}
    if isinstance(kind, tuple):
        return " or ".join(dict.fromkeys(spelled(one) for one in kind if one is not OPTIONAL))
    if isinstance(kind, list):
        return "a list of " + words[kind[0]].removeprefix("a ").removeprefix("an ") + "s"
    return words[kind]


# ---------------------------------------------------------------------------------------------- reading

def read_json(path: Path, schema: dict = {}) -> dict:
    """The object of a JSON file."""
    return fields(load_json(path), path, schema)


def read_list(path: Path) -> list:
    """The list of a JSON file."""
    value = load_json(path)
    check(isinstance(value, list), f"{path}: holds no JSON list")
    return value


def load_json(path: Path):
    path = Path(path)
    try:
        return parse(path.read_bytes().removeprefix(BOM).decode())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None


def parse(text: str):
    """The value that JSON text spells.

    ValueError: it is none, or holds half a surrogate pair, which JSON can spell and UTF-8 cannot.
    """
    value = json.loads(text)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_lines(path: Path):
    """Yield (number from 1, bytes) of each line that is not blank, without a BOM; .gz is unpacked."""
    path = Path(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(BOM)
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def parse_line(line: bytes, where: str, schema: dict = {}, any_characters=False) -> dict:
    """One line of JSON -> its object. UserError: not UTF-8, no JSON object, or not of the schema.

    any_characters: half a surrogate pair may pass; see parse.
    """
    try:
        value = (json.loads if any_characters else parse)(line.decode())
    except (ValueError, RecursionError) as error:
        hint = " (one JSON object a line is wanted)" if line[:1] != b"{" else ""
        raise UserError(f"{where}: not JSON in UTF-8: {error}{hint}") from None
    return fields(value, where, schema)


def read_jsonl(path: Path, schema: dict = {}, log=False):
    """Yield the objects of a JSON-lines file, gzipped or not.

    log: the file is one that `append` writes. A last line without its end was torn by a kill and does not
    count, and a server's words may hold any characters.
    """
    for _, row in read_located(path, schema, log, any_characters=log):
        yield row


def read_located(path: Path, schema: dict = {}, log=False, any_characters=False):
    """Yield (where, object) likewise; where is "path:line". any_characters: see parse_line."""
    for number, line in read_lines(path):
        if line.endswith(b"\n") or not log:
            where = f"{path}:{number}"
            yield where, parse_line(line, where, schema, any_characters)


# ---------------------------------------------------------------------------------------------- writing

def check_out(path: Path) -> None:
    """Refuse what no file can be written over. Who works long before it writes asks at once."""
    path = Path(path)
    check(not path.is_dir(), f"{path}: a folder: name a file in it")
    check(path.is_file() or not path.exists(), f"{path}: a device or a pipe: name a file")


def check_lines_out(out: Path) -> None:
    """Refuse what no file of lines can be written to: those that read_lines unpacks are not packed again."""
    check(out.suffix != ".gz", f"--out {out}: lines are written unpacked: a name without .gz")
    check_out(out)


def same_file(one: Path, other: Path) -> bool:
    """Whether to write one is to replace the other, by whatever links."""
    return os.path.realpath(one) == os.path.realpath(other)


def replace_file(path: Path, write) -> None:
    """Write a file whole or not at all: `write` makes it beside `path`, it is flushed and renamed.

    Of a link, the file that it points to is replaced.
    """
    check_out(path)
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        write(beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, target)
    except Exception as error:
        faults = (OSError, UnicodeEncodeError)             # a full disk, mostly; half a surrogate pair
        if isinstance(error, faults) or type(error).__name__ == "SafetensorError":
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path}: cannot be written ({reason})") from None
        raise
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows) -> None:
    """Write an iterable of objects, one a line."""
    def write(beside):
        with open(beside, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    replace_file(path, write)


# ---------------------------------------------------------------------------------------- append-only logs

def open_log(path: Path):
    """Open a log for `append`. A last line that a kill has torn is cut off."""
    file = open(path, "ab+", buffering=0)
    size = end = file.seek(0, os.SEEK_END)
    while end > 0:                             # backwards in blocks, to the last line feed
        begin = max(0, end - 65536)
        file.seek(begin)
        newline = file.read(end - begin).rfind(b"\n")
        if newline >= 0:
            end = begin + newline + 1
            break
        end = begin
    if end < size:
        file.truncate(end)
    return file


def append(file, row: dict) -> None:
    """Append an object in one unbuffered write: then a kill cannot lose it (a power cut may)."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    try:
        written = file.write(line)
    except OSError as error:                   # a disk that is full to the last block takes no byte
        raise UserError(f"{file.name}: cannot be written ({error.strerror}); make room and run the same "
                        "command again") from None
    if written != len(line):                   # a full disk; half a line must not meet the next one
        file.truncate(file.seek(0, os.SEEK_END) - written)
        raise UserError(f"{file.name}: the disk is full; make room and run the same command again")


# ----------------------------------------------------------------------------------------------- hashes

def text_hash(text: str) -> int:
    """A text as 64 bits, signed: the key by which equal texts are known without keeping them."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
