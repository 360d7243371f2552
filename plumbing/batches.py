"""plumbing/batches.py: what of a run waits at a provider's batch API, so that a live run leaves it alone.

tools/data/batch.py sends requests in parts. A part is a file of requests, RUN/batches/0001.jsonl, and its
state beside it, 0001.json. Until its answers have joined raw.jsonl, its requests are asked and will be paid.
"""
from collections import Counter
from pathlib import Path

from plumbing.files import read_json, read_located

STATE = {"status": str}
SIZE = {"model": str, "tokens_in": int, "tokens_out": int}     # of a part whose requests file is written


def part_files(folder: Path) -> list[Path]:
    """The requests files of a run's parts, in order; folder: RUN/batches."""
    return sorted(folder.glob("[0-9]*[0-9].jsonl"))


def read_state(path: Path) -> dict:
    """A part's state, given its requests file."""
    return read_json(path.with_suffix(".json"), STATE | SIZE)


def sent_bodies(path: Path):
    """Yield (id, body) of a part's requests, as they were sent."""
    for _, row in read_located(path, {"custom_id": str, "body": dict}, any_characters=True):
        yield int(row["custom_id"]), row["body"]


def waiting(folder: Path) -> tuple[set, Counter]:
    """The ids of all requests that wait in batches, and the most tokens that they can use."""
    ids, tokens = set(), Counter()
    for path in part_files(folder):
        state = read_state(path)
        if state["status"] != "joined":
            ids.update(key for key, _ in sent_bodies(path))
            tokens.update({(state["model"], "in"): state["tokens_in"],
                           (state["model"], "out"): state["tokens_out"]})
    return ids, tokens
