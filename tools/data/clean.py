"""tools/data/clean.py: drops near-duplicates and texts of the evaluation sets from training examples.

    python -m tools.data.clean data/synthetic.jsonl --out data/clean.jsonl --eval data/mini --eval FOLDER
    python -m tools.data.clean data/synthetic.jsonl --out data/english.jsonl --language English

Examples are read as train.py reads them, and gzipped ones too; the lines that stay are written as they
stood, unpacked, for train.py reads no .gz.
--language drops all others, by the "language" of a line.

Near-duplicates: the query and first positive of each example become a MinHash signature of 64 values over
shingles of five characters (any script); examples that agree in one of 16 bands of four values are compared,
and of those that agree in --threshold of the 64 (an estimate of the Jaccard similarity of their shingles)
the first in the file stays.

Decontamination: letters and digits alone count, without case. An example goes if one of its texts is a text
of an evaluation set (of --min-chars or more), or shares a run of characters with one. Of all 50-character
windows one in eight is looked up, those whose hash says so on both sides: a shared run of 50 + n characters
escapes with a chance of (7/8)^(n+1), so 3 % at 75 and 0.1 % at 100. The paper matches whole strings,
ignoring case and space (section 4.1).

Memory: 260 bytes an example, and 12 for each eighth character of the evaluation sets; the examples are
streamed twice.
"""

import collections
import time
from pathlib import Path

import numpy as np

from plumbing.errors import Parser, at_least_0, bounded, check, command
from plumbing.examples import example_of, read_row
from plumbing.files import (OPTIONAL, check_lines_out, check_out, read_jsonl, read_lines, replace_file,
                            same_file, write_json)
from plumbing.tasks import task_files
from plumbing.texts import normalize

BINS, ROWS = 64, 4  # signature values; values a band
SHINGLE, WINDOW, SAMPLED = 5, 50, 8
HEAD = 2000  # characters of a text that its signature sees
BASE, SPREAD = 0x9E3779B97F4A7C15, np.uint64(0xBF58476D1CE4E5B9)  # odd: they have inverses modulo 2^64
TEXT_KEYS = ("text", "title", "sentence1", "sentence2", "query", "positive", "negative", "sentences",
             "human_summaries", "machine_summaries")
TEXTS = dict.fromkeys(TEXT_KEYS, (str, [str], OPTIONAL))  # the schema of all kinds of sets together
EMPTY = np.uint32(0xFFFFFFFF)


class Windows:
    """Hashes of all windows of a fixed width in many texts at once."""

    def __init__(self, width):
        self.width, self.powers, self.inverses = width, np.empty(0, np.uint64), np.empty(0, np.uint64)

    def __call__(self, texts):
        """-> (uint64 hashes, index of the text that each comes from); a text below the width has none."""
        sizes = np.array([len(text) for text in texts])
        codes = np.frombuffer("".join(texts).encode("utf-32-le", "replace"), np.uint32).astype(np.uint64)
        if len(self.powers) <= len(codes):
            self.powers = powers_of(BASE, 2 * len(codes) + 1)
            self.inverses = powers_of(pow(BASE, -1, 2**64), 2 * len(codes) + 1)
        # Prefix sums S[i] = sum of code[j] BASE^j for j < i; a window's value is (S[i + w] - S[i]) / BASE^i.
        sums = np.zeros(len(codes) + 1, np.uint64)
        np.cumsum((codes + 1) * SPREAD * self.powers[: len(codes)], out=sums[1:])
        starts = np.arange(max(0, len(codes) - self.width + 1))
        owner = np.repeat(np.arange(len(texts)), sizes)
        starts = starts[owner[starts] == owner[starts + self.width - 1]]
        hashes = (sums[starts + self.width] - sums[starts]) * self.inverses[starts]
        for shift in (31, 29):  # mix, since low bits of a product know nothing of the high ones
            hashes = (hashes ^ (hashes >> np.uint64(shift))) * SPREAD
        return hashes ^ (hashes >> np.uint64(32)), owner[starts]


def powers_of(base, number):
    powers = np.full(number, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


SHINGLES, RUNS = Windows(SHINGLE), Windows(WINDOW)


def signatures(texts):
    """One-permutation MinHash -> uint32 [texts, BINS]: the least shingle hash in each of BINS ranges.

    A bin that no shingle fell into takes its right neighbour's value, shifted, so that short texts compare
    as well.
    """
    hashes, owner = SHINGLES([text.ljust(SHINGLE) for text in texts])
    result = np.full((len(texts), BINS), EMPTY)
    bins = (hashes >> np.uint64(58)).astype(np.intp)
    low = (hashes & np.uint64(0x7FFFFFFF)).astype(np.uint32)
    np.minimum.at(result.reshape(-1), owner * BINS + bins, low)
    while (empty := result == EMPTY).any():
        neighbour = np.roll(result, -1, axis=1)
        shifted = (neighbour + np.uint32(0x3C6EF35F)) & np.uint32(0x7FFFFFFF)
        result[empty] = np.where(neighbour == EMPTY, EMPTY, shifted)[empty]
    return result


def near_duplicates(sketch, threshold):
    """Boolean [n]: rows of uint32 [n, BINS] that agree with an earlier row in at least threshold of the
    bins."""
    duplicate = np.zeros(len(sketch), bool)
    for band in range(0, BINS, ROWS):
        keys = np.zeros(len(sketch), np.uint64)
        for column in range(band, band + ROWS):
            keys = (keys ^ sketch[:, column]) * SPREAD
            keys ^= keys >> np.uint64(29)
        order = np.argsort(keys, kind="stable")
        new_group = np.append(True, keys[order][1:] != keys[order][:-1])
        first = order[np.maximum.accumulate(np.where(new_group, np.arange(len(order)), 0))]
        # In each group of equal bands, a row meets the group's first row and the row before it.
        for other in (first, np.append(order[:1], order[:-1])):
            pairs = ~new_group & ~duplicate[order]
            left, right = other[pairs], order[pairs]
            for part in range(0, len(left), 100_000):
                a, b = left[part:part + 100_000], right[part:part + 100_000]
                duplicate[b[(sketch[a] == sketch[b]).mean(axis=1) >= threshold]] = True
    return duplicate


def squeeze(text):
    """Letters and digits alone, without case: "Is it, then?" -> "isitthen"."""
    return "".join(filter(str.isalnum, normalize(text)))


def whole_hash(text):
    return hash(text) & 0x7FFFFFFFFFFFFFFF  # within one process, strings hash alike


def evaluation_texts(folder):
    """Yield (task name, text) of every text of the evaluation sets in or below a folder."""
    folder = Path(folder)
    for task in task_files(folder):
        name = task.parent.name if task.parent == folder else str(task.parent.relative_to(folder))
        for path in sorted(task.parent.glob("*.jsonl")):
            for row in read_jsonl(path, TEXTS):
                for value in (row[key] for key in TEXT_KEYS if row.get(key)):
                    for text in [value] if isinstance(value, str) else value:
                        yield name, text


class Contamination:
    """The evaluation sets' texts: hashes of the whole ones, and of one in eight of their windows."""

    def __init__(self, folders, min_chars):
        self.min_chars, self.names, self.whole = min_chars, [], {}
        runs, owners = [np.empty(0, np.uint64)], [np.empty(0, np.uint32)]
        for folder in folders:
            for name, texts in batches(evaluation_texts(folder), 2000):
                texts = [squeeze(text) for text in texts]
                if name not in self.names:
                    self.names.append(name)
                for text in texts:
                    if len(text) >= min_chars:
                        self.whole.setdefault(whole_hash(text), name)
                hashes = np.unique(sampled(RUNS(texts))[0])
                runs.append(hashes)
                owners.append(np.full(len(hashes), self.names.index(name), np.uint32))
        runs, owners = np.concatenate(runs), np.concatenate(owners)
        order = np.argsort(runs, kind="stable")
        self.runs, self.owners = runs[order], owners[order]

    def find(self, examples):
        """For each list of texts: (task name, "text" or "run") of an evaluation text that it holds, or
        None."""
        flat = [(i, squeeze(text)) for i, texts in enumerate(examples) for text in texts]
        reasons = [None] * len(examples)
        hashes, owner = sampled(RUNS([text for _, text in flat]))
        places = np.searchsorted(self.runs, hashes)
        for hit in np.flatnonzero(np.append(self.runs, np.uint64(1))[places] == hashes):  # 1: never sampled
            reasons[flat[owner[hit]][0]] = self.names[self.owners[places[hit]]], "run"
        for i, text in flat:
            if len(text) >= self.min_chars and (name := self.whole.get(whole_hash(text))):
                reasons[i] = name, "text"
        return reasons


def sampled(windows):
    hashes, owner = windows
    keep = hashes % np.uint64(SAMPLED) == 0
    return hashes[keep], owner[keep]


def batches(pairs, size):
    """Group consecutive (name, text) of one name -> (name, up to size texts)."""
    name, texts = None, []
    for next_name, text in pairs:
        if texts and (next_name != name or len(texts) == size):
            yield name, texts
            texts = []
        name = next_name
        texts.append(text)
    if texts:
        yield name, texts


def clean(path, out, folders=(), threshold=0.8, min_chars=20, batch=1000, language=None):
    """Write the examples that stay to out; returns counts, and the first contaminated queries a task."""
    contamination = Contamination(folders, min_chars)
    sketches, dirty, samples = [], [], collections.defaultdict(list)
    counts = collections.Counter()
    foreign = []  # of each line: is it in another language than the wanted one?

    def texts():
        for number, line in read_lines(path):
            row = read_row(line, f"{path}:{number}")
            foreign.append(language is not None and row.get("language") != language)
            example = example_of(row, "", f"{path}:{number}")
            yield None, [example["query"], *example["pos"], *example["neg"]]

    for _, examples in batches(texts(), batch):
        heads = [normalize(f"{texts[0][:HEAD]}\n{texts[1][:HEAD]}") for texts in examples]
        sketches.append(signatures(heads))
        for texts, reason in zip(examples, contamination.find(examples)):
            dirty.append(reason is not None)
            if reason:
                name, kind = reason
                counts[name, kind] += 1
                if len(samples[name]) < 3:
                    samples[name].append(texts[0][:100])
    dirty, foreign = np.array(dirty, bool), np.array(foreign, bool)
    check(not len(foreign) or not foreign.all(), f"--language {language}: no example of {path} is")
    duplicate = near_duplicates(np.concatenate(sketches), threshold) if sketches else dirty
    dropped = dirty | duplicate | foreign

    def write(beside):
        with open(beside, "wb") as file:
            for (_, line), drop in zip(read_lines(path), dropped):
                if not drop:
                    file.write(line.rstrip(b"\r\n") + b"\n")
    replace_file(out, write)
    return {"examples": len(dirty), "other languages": int(foreign.sum()),
            "near-duplicates": int(duplicate.sum()),
            "contaminated": int(dirty.sum()), "kept": int((~dropped).sum()), "samples": samples,
            "by task": {f"{name} ({kind})": number for (name, kind), number in counts.most_common()}}


def main(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("examples", type=Path, help="training examples, JSON lines")
    add("--out", type=Path, required=True)
    add("--eval", action="append", default=[], metavar="FOLDER", help="evaluation sets to stay clear of")
    add("--language", metavar="NAME", help="keep the examples in this language alone, such as English")
    add("--threshold", type=bounded(float, lambda value: 0 <= value <= 1, "0 to 1"), default=0.8,
        help="least similarity of near-duplicates, 0 to 1")
    add("--min-chars", type=at_least_0(int), default=20,
        help="letters and digits of an evaluation text that counts")
    add("--report", type=Path, help="also write the counts as JSON")
    args = parser.parse_args(argv)
    check_lines_out(args.out)
    if args.report:
        check_out(args.report)
        check(not same_file(args.report, args.out) and not same_file(args.report, args.examples),
              f"--report {args.report}: would replace the examples: another name")
    begun = time.monotonic()
    report = clean(args.examples, args.out, args.eval, args.threshold, args.min_chars,
                   language=args.language)
    for name in ("examples", "other languages", "near-duplicates", "contaminated", "kept"):
        print(f"{name}: {report[name]:,}")
    for name, number in report["by task"].items():
        print(f"  {name}: {number}")
    seconds = time.monotonic() - begun
    print(f"{seconds:.1f} s, {report['examples'] / seconds:,.0f} examples/s")
    if args.report:
        write_json(args.report, report)


if __name__ == "__main__":
    command(main)
