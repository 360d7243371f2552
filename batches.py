"""batches.py: example files -> batches, the other half of train.py. Sections 3.2 and 4.2 of arXiv 2401.00368.

An example is a line of JSON: {"prompt": instruction, "query": text, "pos": [texts], "neg": [texts], "type"}, of
which only query and pos must be there. Files may hold several GB: they are read by byte offsets. Which batch
holds which examples, positives and negatives is a pure function of the flags, the seed and the step, so that a
run that was stopped goes on with the batches it would have seen, and every rank knows the others'.
"""
import hashlib
import json
import math
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from plumbing.errors import UserError
from plumbing.files import text_hash


def read_example(raw: bytes, default_prompt: str) -> dict:
    """A line of a data file -> {"prompt", "query", "pos", "neg", "type"}; ValueError says what is wrong."""
    record = json.loads(raw)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    example = {key: record.get(key) for key in ("prompt", "query", "pos", "neg", "type")}
    if example["prompt"] is None:
        example["prompt"] = default_prompt
    if example["neg"] is None:
        example["neg"] = []
    for key in ("prompt", "query", "type"):
        if not isinstance(example[key], str) and (key, example[key]) != ("type", None):
            raise ValueError(f'"{key}" must be a string')
    for key in ("pos", "neg"):
        if not isinstance(example[key], list) or not all(isinstance(text, str) for text in example[key]):
            raise ValueError(f'"{key}" must be a list of strings')
        example[key] = [text for text in example[key] if text.strip()]
    if not example["query"].strip() or not example["pos"]:
        raise ValueError('"query" and "pos" must hold text')
    for text in (example["prompt"], example["query"], *example["pos"], *example["neg"]):
        text.encode()                                     # JSON can hold half a surrogate pair: no text at all
    return example


def split_share(spec: str) -> tuple[Path, float]:
    """FILE or FILE:SHARE -> (path, share)."""
    name, _, share = spec.rpartition(":")
    if not name or Path(spec).exists():
        name, share = spec, "1"
    try:
        if not 0 < float(share) <= 1:
            raise ValueError
    except ValueError:
        raise UserError(f"--data {spec}: write FILE or FILE:SHARE, a share above 0 and up to 1") from None
    if not Path(name).is_file():
        raise UserError(f"{name}: no such file (`make data` writes data/synthetic.jsonl)")
    return Path(name), float(share)


class Examples:
    """Examples in JSON-lines files of any size: one pass notes where each line starts, a line is read when
    its turn comes. In memory stay its place, a hash of (instruction, query), and one of each positive."""

    def __init__(self, specs: list[str], default_prompt="", skip_bad_lines=False):
        self.default_prompt, self.skipped = default_prompt, 0
        self.paths, self.shares = zip(*map(split_share, specs))
        self.group_names: dict[str, int] = {}
        places, keys, owners, positives = (array("q") for _ in range(4))       # 8 bytes a number
        digest = hashlib.blake2b(digest_size=16)
        for file, path in enumerate(self.paths):
            offset = 0
            with open(path, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    digest.update(line)
                    try:
                        example = read_example(line, default_prompt) if line.strip() else None
                    except (ValueError, RecursionError) as error:          # nested too deep
                        if not skip_bad_lines:
                            raise UserError(f"{path}:{number}: {error} (or --skip-bad-lines)") from None
                        self.skipped, example = self.skipped + 1, None
                    if example:
                        name = example["type"] or str(path)
                        group = self.group_names.setdefault(name, len(self.group_names))
                        places.extend((file, offset, group))
                        keys.append(text_hash(example["prompt"] + "\0" + example["query"]))
                        owners.extend([keys[-1]] * len(example["pos"]))
                        positives.extend(text_hash(text) for text in example["pos"])
                    offset += len(line)
        if not places:
            raise UserError(f"{', '.join(map(str, self.paths))}: no examples")
        self.files, self.offsets, self.groups = np.array(places, np.int64).reshape(-1, 3).T
        self.keys = np.array(keys, np.int64)
        order = np.argsort(np.array(owners, np.int64), kind="stable")          # sorted, for searchsorted
        self.owners, self.positives = np.array(owners, np.int64)[order], np.array(positives, np.int64)[order]
        self.fingerprint = digest.hexdigest()
        self.handles = [open(path, "rb") for path in self.paths]

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i: int) -> dict:
        handle = self.handles[self.files[i]]
        handle.seek(self.offsets[i])
        return read_example(handle.readline(), self.default_prompt)

    def known_positives(self, i: int) -> np.ndarray:
        """Hashes of every text that some record calls a positive of example i's instruction and query."""
        first, last = (np.searchsorted(self.owners, self.keys[i], side) for side in ("left", "right"))
        return self.positives[first:last]


def plan_epoch(examples: Examples, batch_size: int, homogeneous: bool, seed: int, epoch: int) -> list:
    """The batches of one epoch, each an array of example numbers: a pure function of the arguments."""
    rng = np.random.default_rng((seed, epoch))
    chosen = []
    for file, share in enumerate(examples.shares):
        mine = rng.permutation(np.flatnonzero(examples.files == file))
        chosen.append(mine[: math.ceil(share * len(mine))])
    chosen = rng.permutation(np.concatenate(chosen))
    batches = []
    if homogeneous:
        left_over = []
        for group in range(len(examples.group_names)):
            mine = chosen[examples.groups[chosen] == group]
            whole = len(mine) // batch_size * batch_size
            batches += np.split(mine[:whole], whole // batch_size) if whole else []
            left_over.append(mine[whole:])
        chosen = rng.permutation(np.concatenate(left_over))
    batches += [chosen[i:i + batch_size] for i in range(0, len(chosen), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))] if homogeneous else batches


def plan_run(examples: Examples, args) -> list:
    """The batches of all epochs; `args` are train.py's flags."""
    return [numbers for epoch in range(args.epochs) for numbers in
            plan_epoch(examples, args.batch_size, args.batches == "homogeneous", args.seed, epoch)]


@dataclass
class Batch:
    """One step's texts: the queries [Q], then the documents [D], positives first, then negatives."""
    numbers: np.ndarray         # [Q] which examples
    rows: list[list[int]]       # token ids of the texts that this rank embeds
    place: torch.Tensor         # [n] where these stand among all Q + D
    queries: int                # Q
    texts: int                  # Q + D
    valid: torch.Tensor         # [Q, D] bool: which documents count in a query's denominator


def with_instruction(example: dict, style: str) -> tuple[str, str]:
    """(instruction, query) as section 3.2 has it, or as an ablation of Table 5 does."""
    if style == "task":
        return example["prompt"], example["query"]
    prefix = {"long-short": "classify: ", "sts": "", "bitext": ""}.get(example["type"], "query: ")
    return "", (prefix if style == "prefix" else "") + example["query"]


def document_instruction(example: dict, args) -> str:
    """None in the paper; with --both-sides that of the symmetric tasks, whose sides are alike."""
    wanted = args.both_sides and args.instruction == "task" and example["type"] in ("sts", "bitext")
    return example["prompt"] if wanted else ""


def prepare(examples: Examples, numbers: np.ndarray, tokenize, args, step: int, rank=0, world=1) -> Batch:
    """Read a batch, draw its positives and negatives, mask, tokenise this rank's part.

    Every rank reads the whole global batch, which is cheap, and so knows the mask without asking the others.
    """
    rng = np.random.default_rng((args.seed, step, 1))
    read = [examples[i] for i in numbers]
    texts = [with_instruction(example, args.instruction) for example in read]
    positives = [(e, rng.choice(e["pos"])) for e in read]
    negatives = [(e, text) for e in read for text in rng.permutation(e["neg"])[:args.negatives]]
    for e, text in positives + negatives:
        texts.append((document_instruction(e, args), str(text)))
    hashes = np.array([text_hash(text) for _, text in texts[len(read):]])
    valid = np.ones((len(read), len(hashes)), bool)
    if not args.no_mask:
        known = [examples.known_positives(i) for i in numbers]
        owner = np.repeat(np.arange(len(read)), [len(k) for k in known])
        match, column = np.nonzero(np.concatenate(known)[:, None] == hashes)
        valid[owner[match], column] = False
        np.fill_diagonal(valid, True)                     # the target itself always counts
    by_length = np.argsort([len(prompt) + len(text) for prompt, text in texts], kind="stable")
    place = by_length[rank::world]                        # every rank gets like lengths
    rows = tokenize([texts[i][1] for i in place], [texts[i][0] for i in place])
    return Batch(numbers, rows, torch.from_numpy(place), len(read), len(texts), torch.from_numpy(valid))
