"""plumbing/batches.py: what of a run waits at a provider's batch API, so that a live run leaves it alone.

tools/data/batch.py sends requests in parts. A part is a file of requests, RUN/batches/0001.jsonl, and its
state beside it, 0001.json. Until its answers have joined raw.jsonl, its requests are asked and will be paid.
"""
from collections import Counter
from pathlib import Path

from plumbing.errors import check
from plumbing.files import read_json, read_located

STATE = {"status": str}
SIZE = {"model": str, "tokens_in": int, "tokens_out": int}     # of a part whose requests file is written


def check_counts(counts, where) -> None:
    """Refuse numbers of tokens that none can be: from 2^53 on, a price times them need not be a number."""
    check(all(type(count) is int and 0 <= count < 2**53 for count in counts),
          f"{where}: {counts!r:.80} are no counts of tokens: mend or delete this line")


def part_files(folder: Path) -> list[Path]:
    """The requests files of a run's parts, in order; folder: RUN/batches."""
    return sorted(folder.glob("[0-9]*[0-9].jsonl"))


def read_state(path: Path) -> dict:
    """A part's state, given its requests file."""
    path = path.with_suffix(".json")
    state = read_json(path, STATE | SIZE)
    check_counts([state["tokens_in"], state["tokens_out"]], path)
    return state


def sent_bodies(path: Path):
    """Yield (id, body) of a part's requests, as they were sent."""
    for where, row in read_located(path, {"custom_id": str, "body": dict}, any_characters=True):
        key = row["custom_id"]
        check(key.isdecimal() and len(key) < 19,
              f"{where}: custom_id {key!r:.40} is no request's number: mend or delete this line")
        yield int(key), row["body"]


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
