"""plumbing/remembered.py: what was made of files of any size, kept beside them, for the rerun.

To read half a million answers takes a minute; to hash them, half a second. So whoever works something out
of files keeps it with a hash of all that may change it: what stands in the files, the settings, the code,
Python. The same hash means the same result; with any other one the work is done anew. Dates and sizes have
no say: a file that was put back from a copy is the file that it was.

Deleting what is kept costs time and nothing else.
"""
import json
import sys
import zlib
from contextlib import suppress
from pathlib import Path

from plumbing.errors import UserError
from plumbing.files import file_sha256, sha256, write_text

ROOT = Path(__file__).resolve().parents[1]


def hash_files(paths) -> str:
    """A hash of the files' names and contents; one that is not there counts as that."""
    described = [[path.name, file_sha256(path) if path.exists() else None] for path in sorted(paths)]
    return sha256(json.dumps(described).encode())


def hash_code(*lessons: str) -> str:
    """A hash of these lessons, of all plumbing, and of the Python that runs them."""
    files = hash_files([*(ROOT / lesson for lesson in lessons), *(ROOT / "plumbing").glob("*.py")])
    return sha256(json.dumps([files, sys.version, zlib.ZLIB_RUNTIME_VERSION]).encode())


CODE = hash_code("generate.py")         # as it is loaded: a run of days may outlive a change of these files


def remembered(path: Path, inputs: list[Path], settings, work, output: Path | None = None):
    """work(), or what it returned when it was called with the same inputs and settings. JSON.

    path: the file that keeps it. output: a file that `work` writes; it must be as it was left.
    """
    def key():
        return sha256(json.dumps([hash_files(inputs), settings, CODE]).encode())

    before = key()
    kept = read_kept(path)
    if kept.get("key") == before and kept.get("output") == hash_output(output):
        return kept["value"]
    value = work()
    if key() == before:                                    # else another process has gone on writing
        kept = {"key": before, "output": hash_output(output), "value": value}
        with suppress(UserError, OSError):                 # a full disk costs the next run its time
            write_text(path, json.dumps(kept) + "\n")
    return value


def read_kept(path: Path) -> dict:
    """What a file keeps; nothing if it is not there or not readable."""
    try:
        kept = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return kept if isinstance(kept, dict) else {}


def hash_output(path: Path | None) -> str | None:
    return file_sha256(path) if path and path.exists() else None
