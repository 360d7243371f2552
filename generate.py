"""Writes the training data: an LLM's answers to prompts drawn at random (section 3.1 of arXiv 2401.00368).

    python generate.py --replay data/recorded.jsonl.gz       # recorded answers -> data/synthetic.jsonl, no network

Six types of task. The four asymmetric ones (short-long, long-short, short-short, long-long) take two steps: the LLM
brainstorms a pool of tasks, then writes one example of one task in a fresh conversation. STS and bitext take one step.
Each answer is parsed, validated and deduplicated into one line of training data:
    {"prompt": instruction, "query": text, "pos": [text], "neg": [text] or [], "type": ..., "language": ..., "id": ...}
"""

import argparse
import collections
import gzip
import hashlib
import json
import os
import re
import sys
import unicodedata
import zlib
from pathlib import Path

PROMPTS = Path(__file__).parent / "prompts"
INSTRUCTIONS = {"sts": "Retrieve semantically similar text.", "bitext": "Retrieve parallel sentences."}  # Table 16
MAX_CHARS = 20_000  # of one text; longer ones are loops, and training cuts at 512 tokens anyway


class UserError(Exception):
    """A mistake that the user can mend: printed as one line, exit code 2."""


class Reject(Exception):
    """An answer that can't become an example; str(error) is the reason that the report counts."""


# ---- Prompts: templates, placeholder values and languages are data in prompts/ ----


def load_prompts(folder=PROMPTS):
    """Reads prompts/ into {"task_types", "placeholders", "num_tasks", "languages", "scripts", "templates"}."""
    try:
        prompts = json.loads((folder / "values.json").read_text("utf-8"))
        languages = json.loads((folder / "languages.json").read_text("utf-8"))
        prompts["templates"] = {path.stem: path.read_text("utf-8") for path in folder.glob("*.txt")}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {error}") from None
    tail = languages["others_share"] / len(languages["others"])
    prompts["languages"] = languages["weights"] | {name: tail for name in languages["others"]}
    prompts["scripts"] = languages["scripts"]
    return prompts


def render(prompts, step, task_type, params):
    """The user message of a request: the template of its type and step with each {placeholder} filled."""
    template = prompts["templates"][task_type + (".brainstorm" if step == "brainstorm" else "")]
    return re.sub(r"\{(\w+)\}", lambda match: str(params[match[1]]), template)


# ---- Parsing: from an answer to a JSON object or a list of tasks ----

DECODER = json.JSONDecoder(strict=False)  # raw line breaks inside strings are the commonest slip of all
# A string ends at the first quote of its kind that JSON's grammar could follow, so inner quotes need no escape.
# The atomic group (?>...) keeps a failed match from stretching the string, and so keeps the search linear.
STRING = r"""(?>"((?:\\.|[^\\])*?)"(?=\s*[:,}\]])|'((?:\\.|[^\\])*?)'(?=\s*[:,}\]]))"""
PAIR = re.compile(rf"\s*{STRING}\s*:\s*{STRING}\s*(?:,|(?=\}}))", re.DOTALL)


def unescape(double_quoted, single_quoted):
    """The text of a string literal that may hold what JSON forbids: inner quotes, stray backslashes (as in LaTeX)."""
    body = double_quoted if double_quoted is not None else single_quoted
    body = re.sub(r'\\(.)|"', lambda m: m[0] if m[1] and m[1] in '"\\/bfnrtu' else
                  "'" if m[1] == "'" else '\\\\' + m[1] if m[1] else '\\"', body, flags=re.DOTALL)
    try:
        return json.loads(f'"{body}"', strict=False)
    except ValueError:
        return body


def repair_object(text, start):
    """Reads a flat object of strings at text[start] == "{" with trailing commas or wrong quotes; None if it can't."""
    result, position = {}, start + 1
    while match := PAIR.match(text, position):
        result[unescape(match[1], match[2])] = unescape(match[3], match[4])
        position = match.end()
    return result if result and text[position:].lstrip().startswith("}") else None


def find_objects(text):
    """Yields (object, whether it was repaired) for each readable JSON object in text, outer ones first."""
    for match in re.finditer(r"\{", text):
        try:
            yield DECODER.raw_decode(text, match.start())[0], False
        except (ValueError, RecursionError):
            if (value := repair_object(text, match.start())) is not None:
                yield value, True


def after_thinking(text):
    """Drops <think> blocks, also one that never ends or whose opening tag the server swallowed."""
    if text.lstrip().startswith(("{", "[")):
        return text
    return re.sub(r"<think>.*?(?:</think>|\Z)", "", text, flags=re.DOTALL).rpartition("</think>")[2]


def parse_object(text, keys, finish_reason=None):
    """The first object in an LLM's answer that has all of the keys, and how it was found ("clean", "in prose", ...).

    >>> parse_object('Sure! {"S1": "a", "S2": "b",}', ["S1", "S2"])
    ({'S1': 'a', 'S2': 'b'}, 'repaired')
    """
    if finish_reason == "content_filter":
        raise Reject("content filter")
    if len(text) > 10 * MAX_CHARS:
        raise Reject("too long")
    text, seen = after_thinking(text).strip(), False
    for value, repaired in find_objects(text):
        seen = True
        if all(key in value for key in keys):
            if len(value) > len(keys):
                raise Reject("extra keys")
            if not all(isinstance(value[key], str) for key in keys):
                raise Reject("not a string")
            return value, "repaired" if repaired else "clean" if text[0] + text[-1] == "{}" else "in prose"
    if not text:
        raise Reject("truncated" if finish_reason == "length" else "empty answer")
    if finish_reason == "length" or text.count("{") > text.count("}"):
        raise Reject("truncated")
    raise Reject("missing keys" if seen else "broken JSON" if "{" in text else "no JSON object")


def parse_tasks(text):
    """The tasks in a brainstorming answer: a JSON list, or what can be saved of one, or a bulleted list."""
    text = after_thinking(text)
    start = max(text.find("["), 0)
    try:
        items = DECODER.raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        items = [unescape(*pair) for pair in re.findall(STRING, text[start:], re.DOTALL)] \
            or re.findall(r"^\s*(?:[-*•]|\d+[.)])\s+(.+)$", text, re.MULTILINE)
    tasks = [" ".join(item.split()) for item in items if isinstance(item, str)] if isinstance(items, list) else []
    return [task for task in tasks if 10 <= len(task) <= 500 and bad_characters(task) is None]


# ---- Cleaning: from an object to a training example ----


def normalize(text):
    """The form in which two texts count as the same: Unicode NFKC, no case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def bad_characters(text):
    """Finds control characters (such as the form feed that a bare \\frac becomes), lone surrogates, and U+FFFD."""
    return re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffd]", text)


class Scripts(dict):
    """Maps a character to its script, the first word of its Unicode name: "й" -> "CYRILLIC", "漢" -> "CJK"."""

    def __missing__(self, char):
        self[char] = unicodedata.name(char, "?").split()[0].split("-")[0] if char.isalpha() else None
        return self[char]


SCRIPTS = Scripts()


def wrong_script(text, scripts, enough=20):
    """Whether a text of at least `enough` letters holds next to none of the language's letters.

    One letter in twenty suffices, since code, formulas and quotations are Latin in any language.
    """
    letters = [script for char in text[:2000] if (script := SCRIPTS[char])]
    return len(letters) >= enough and 20 * sum(script in scripts for script in letters) < len(letters)


def contains_label(text, label):
    """Whether a label stands in the text: as whole words, or anywhere in scripts that put no spaces between words."""
    text, label = normalize(text), normalize(label)
    spaced = SCRIPTS[label[-1]] not in ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
    return bool(re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text)) if spaced else label in text


def make_example(row, prompts):
    """One answer -> (training example, how its object was found). Raises Reject.

    row: {"id", "type", "params", "response"} and, from live servers, "finish_reason".
    """
    kind, params = row["type"], row["params"]
    keys = prompts["task_types"][kind]["keys"]
    value, found = parse_object(row["response"], keys, row.get("finish_reason"))
    texts = [value[key].strip() for key in keys]
    query, positive, *negatives = texts
    languages = [params["source_language"], params["target_language"]] if kind == "bitext" else [params["language"]]
    if not all(texts):
        raise Reject("empty text")
    if any(len(text) > MAX_CHARS for text in texts):
        raise Reject("too long")
    if any(map(bad_characters, texts)):
        raise Reject("bad characters")
    # Text that zlib shrinks to a tenth repeats itself over and over; prose shrinks to a half or a third.
    if any(len(text) > 300 and len(zlib.compress(text.encode())) * 10 < len(text.encode()) for text in texts):
        raise Reject("repetition")
    if len({normalize(text) for text in texts}) < len(texts):
        raise Reject("copy between fields")
    if kind == "long-short" and any(contains_label(query, label) for label in texts[1:]):
        raise Reject("label in input")
    message = normalize(render(prompts, "generate", kind, params))
    if any(len(text) > 20 and normalize(text) in message for text in (texts[:1] if kind == "long-short" else texts)):
        raise Reject("copy of the prompt")
    for position, text in enumerate(texts):
        language = languages[min(position, len(languages) - 1)]
        if wrong_script(text, prompts["scripts"].get(language, ["LATIN"])):
            raise Reject("wrong script")
    return {"prompt": INSTRUCTIONS.get(kind) or params["task"], "query": query, "pos": [positive], "neg": negatives,
            "type": kind, "language": "-".join(languages), "id": row["id"]}, found


def write_examples(rows, prompts, out):
    """Turns all answers into out (JSON lines, replaced at once); returns counters of what was kept and dropped.

    A function of the whole list of answers, so that a rerun also finds duplicates of earlier runs.
    """
    count = collections.defaultdict(collections.Counter)
    tasks, seen = collections.defaultdict(set), set()
    partial = out.with_name(out.name + ".tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            count["answers"][row["step"]] += 1
            if row["step"] == "brainstorm":
                tasks[row["type"]] |= {normalize(task) for task in parse_tasks(row["response"])}
                continue
            try:
                example, found = make_example(row, prompts)
                text = normalize(example["query"]) + "\0" + normalize(example["pos"][0])
                digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
                if digest in seen:
                    raise Reject("duplicate")
            except Reject as reason:
                count["dropped"][str(reason)] += 1
                continue
            seen.add(digest)
            for name, key in [("type", example["type"]), ("language", example["language"]), ("found", found)]:
                count[name][key] += 1
            file.write(json.dumps(example, ensure_ascii=False) + "\n")
    os.replace(partial, out)
    count["tasks"].update({kind: len(pool) for kind, pool in tasks.items()})
    return count


def read_answers(path, prompts):
    """Yields the rows of a file of answers (.jsonl or .jsonl.gz); a broken line is a UserError that names it."""
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                kind, step, params = row["type"], row["step"], row["params"]
                render(prompts, step, kind, params)  # every placeholder is there
                if not isinstance(row["response"], str) or step not in ("brainstorm", "generate"):
                    raise ValueError("response or step")
                yield row
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path}: can't read it: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}:{number}: not a recorded answer ({error!r}); delete the line or the file") from None


def print_counts(count, out):
    total = sum(count["type"].values())
    print(f"{out}: {total} examples from {count['answers']['generate']} answers"
          f" and {count['answers']['brainstorm']} brainstorms")
    for title, name in [("types", "type"), ("languages", "language"), ("distinct tasks", "tasks"),
                        ("objects found", "found"), ("dropped", "dropped")]:
        items = count[name].most_common()
        if name == "language":  # language pairs of bitext are one entry here
            pairs = sum(n for key, n in items if "-" in key)
            items = [item for item in items if "-" not in item[0]]
            items = items[:14] + [(f"{len(items) - 14} others", sum(n for _, n in items[14:]))] * (len(items) > 14)
            items += [("pairs (bitext)", pairs)]
        print(f"{title}: " + (", ".join(f"{key} {n}" for key, n in items) or "none"))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--replay", type=Path, help="build the examples from recorded answers instead of asking an LLM")
    parser.add_argument("--out", type=Path, default=Path("data/synthetic.jsonl"), help="training examples")
    args = parser.parse_args(argv)
    prompts = load_prompts()
    print_counts(write_examples(read_answers(args.replay, prompts), prompts, args.out), args.out)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"generate.py: {error}", file=sys.stderr)
        sys.exit(2)
