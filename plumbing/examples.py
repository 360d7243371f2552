"""plumbing/examples.py: the one reader of training examples, for train.py and every tool. A line holds

    {"prompt": instruction, "query": text, "pos": [texts], "neg": [texts], "type": task type}

Only query and pos must be there; other keys are not read, and counted. Files may hold many gigabytes: one
pass notes where each line starts, and a line is read again when its batch comes. Memory holds 32 bytes an
example, and 16 for each of its positives.
"""
import hashlib
from array import array
from pathlib import Path

import numpy as np

from plumbing.errors import UserError, check
from plumbing.files import BOM, OPTIONAL, parse_line, text_hash

SCHEMA = {"query": str, "pos": [str], "neg": ([str], OPTIONAL), "prompt": (str, OPTIONAL),
          "type": (str, OPTIONAL)}
NOTES = ("language", "id")            # generate.py writes these too, for people to read


def read_example(line: bytes, default_prompt: str = "", where: str = "") -> dict:
    """A line -> {"prompt", "query", "pos", "neg", "type"}, without blank texts."""
    return example_of(read_row(line, where), default_prompt, where)


def read_row(line: bytes, where: str) -> dict:
    """A line as it stands, all keys included. Where files were joined, a BOM may be in their middle."""
    return parse_line(line.removeprefix(BOM), where, SCHEMA)


def example_of(row: dict, default_prompt: str, where: str) -> dict:
    example = {
        "prompt": default_prompt if row.get("prompt") is None else row["prompt"],
        "query": row["query"],
        "pos": [text for text in row["pos"] if text.strip()],
        "neg": [text for text in row.get("neg") or [] if text.strip()],
        "type": row.get("type"),
    }
    check(example["query"].strip() and example["pos"], f'{where}: "query" and "pos" must hold text')
    return example


def split_share(spec: str) -> tuple[Path, float]:
    """FILE or FILE:SHARE -> (path, share)."""
    name, _, share = spec.rpartition(":")
    if not name or Path(spec).exists():
        name, share = spec, "1"
    try:
        share = float(share)
    except ValueError:
        share = 0.0
    check(0 < share <= 1, f"--data {spec}: write FILE or FILE:SHARE, a share above 0 and up to 1")
    check(Path(name).is_file(), f"{name}: no such file (`make data` writes data/synthetic.jsonl)")
    return Path(name), share


class Examples:
    """Examples by number, out of files of any size.

    files, groups [n]: the file and the task type (or file) that each example is of. fingerprint: a hash of
    all lines. prompts: all instructions. unread: {a key that is none of a training line: in how many lines}.
    """

    def __init__(self, specs: list[str], default_prompt="", skip_bad_lines=False):
        self.default_prompt = default_prompt
        self.paths, self.shares = zip(*[split_share(spec) for spec in specs])
        self.group_names: dict[str, int] = {}
        self.prompts: set[str] = set()
        self.most_tokens = 0                             # a text has no more: its bytes, and a few of ours
        self.skipped = 0                                        # unusable lines
        self.with_negatives = 0
        self.unread: dict[str, int] = {}
        self.files, self.offsets, self.groups, self.keys = array("q"), array("q"), array("q"), array("q")
        self.owners, self.positives = array("q"), array("q")  # of each positive: its example's key, its hash
        digest = hashlib.blake2b(digest_size=16)
        for file, path in enumerate(self.paths):
            offset = 0
            with open(path, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    digest.update(line)
                    if line.strip():
                        self.add(line, file, offset, f"{path}:{number}", skip_bad_lines)
                    offset += len(line)
        check(len(self), f"{', '.join(map(str, self.paths))}: no examples")
        self.fingerprint = digest.hexdigest()

        self.files, self.offsets, self.groups, self.keys = map(
            np.array, (self.files, self.offsets, self.groups, self.keys))
        order = np.argsort(np.array(self.owners), kind="stable")               # sorted, for searchsorted
        self.owners = np.array(self.owners)[order]
        self.positives = np.array(self.positives)[order]
        self.handles = [open(path, "rb") for path in self.paths]

    def add(self, line: bytes, file: int, offset: int, where: str, skip_bad_lines: bool) -> None:
        """Note one line: where it stands, its group, and what is known of its positives."""
        try:
            row = read_row(line, where)
            example = example_of(row, self.default_prompt, where)
        except UserError as error:
            check(skip_bad_lines, f"{error} (or --skip-bad-lines)")
            self.skipped += 1
            return
        for key in row.keys() - SCHEMA.keys() - set(NOTES):
            self.unread[key] = self.unread.get(key, 0) + 1
        self.with_negatives += bool(example["neg"])
        self.prompts.add(example["prompt"])
        longest = max(len(text.encode()) for text in (example["query"], *example["pos"], *example["neg"]))
        self.most_tokens = max(self.most_tokens, longest + len(example["prompt"].encode()) + 20)
        group = example["type"] or str(self.paths[file])
        key = text_hash(example["prompt"] + "\0" + example["query"])
        self.files.append(file)
        self.offsets.append(offset)
        self.groups.append(self.group_names.setdefault(group, len(self.group_names)))
        self.keys.append(key)
        for text in example["pos"]:
            self.owners.append(key)
            self.positives.append(text_hash(text))

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, number: int) -> dict:
        return read_example(self.line(number), self.default_prompt, self.where(number))

    def line(self, number: int) -> bytes:
        handle = self.handles[self.files[number]]
        handle.seek(self.offsets[number])
        return handle.readline()

    def where(self, number: int) -> str:
        return f"{self.paths[self.files[number]]} byte {self.offsets[number]}"

    def known_positives(self, number: int) -> np.ndarray:
        """Hashes of all that any example calls a positive of this one's instruction and query."""
        first = np.searchsorted(self.owners, self.keys[number], "left")
        last = np.searchsorted(self.owners, self.keys[number], "right")
        return self.positives[first:last]
