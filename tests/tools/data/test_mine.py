"""tools/data/mine.py: window, margin and exclusion, against a ranking made by hand."""
import functools
import json

import pytest
import torch

from model import Decoder, Embedder
from scripts import complaint as refusal, run_tool
from tiny import random_model, save, tiny_config
from tools.data import mine

WORDS = ("tea", "river", "stone", "¿qué?", "лиса", "看书", "quickly", "bridge", "42", "né", "sun", "map")


@pytest.fixture(scope="module")
def base(tmp_path_factory, mistral_files):
    config = tiny_config(vocab_size=32000, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    return save(random_model(config), tmp_path_factory.mktemp("base") / "tiny", mistral_files)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


ROWS = [{"prompt": ("", "Find it")[i % 2], "query": f"{WORDS[i % 12]} {i}",
         "pos": [f"{WORDS[i * 5 % 12]} yes {i}"], "neg": [f"no {WORDS[i * 7 % 12]} {i}"] * (i % 3), "id": i}
        for i in range(24)]


@pytest.fixture
def data(tmp_path):
    return write_lines(tmp_path / "data.jsonl", ROWS)


def flags(base, data, out, *more) -> list[str]:
    return [str(flag) for flag in (base, data, "--out", out, "--device", "cpu", "--max-length", 32, *more)]


def run(base, data, out, *more):
    mine.main(flags(base, data, out, *more))
    return read_lines(out)


@functools.cache
def embedder_of(base) -> Embedder:
    return Embedder.load(base, device="cpu", max_length=32)


def ranking(base, rows, row, barred):
    """[(cosine, text)], best first, of all distinct documents of `rows` that are not barred."""
    embedder = embedder_of(base)
    texts = list(dict.fromkeys(text for r in rows for text in r["pos"] + r["neg"]))
    query = embedder.encode([row["query"]], row["prompt"])
    scores = (query @ embedder.encode(texts).T)[0].tolist()
    return sorted(((s, t) for s, t in zip(scores, texts) if t not in barred), reverse=True)


@pytest.mark.parametrize("first, last, wanted", [(1, 3, 3), (4, 9, 2), (30, 1000, 5), (1, 1, 1)])
@pytest.mark.parametrize("chunk", [3, 4096])
def test_the_window_holds_exactly_these_ranks(base, data, tmp_path, first, last, wanted, chunk):
    mined = run(base, data, tmp_path / "out.jsonl", "--ranks", first, last, "--negatives", wanted,
                "--chunk", chunk)
    for row, found in zip(ROWS, mined, strict=True):
        texts = [text for _, text in ranking(base, ROWS, row, row["pos"])]
        assert found == {**row, "neg": texts[first - 1:last][:wanted]} and found["neg"]


def test_the_margin_is_kept_to_the_lowest_positive(base, tmp_path):
    rows = [{**row, "pos": row["pos"] + [f"also {row['query']}"]} for row in ROWS]
    mined = run(base, write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out.jsonl", "--ranks", 1, 20,
                "--negatives", 20, "--margin", 0.1)
    cut = 0
    for row, found in zip(rows, mined, strict=True):
        lowest = min(score for score, text in ranking(base, rows, row, []) if text in row["pos"])
        window = ranking(base, rows, row, row["pos"])[:20]
        wanted = [text for score, text in window if score <= lowest - 0.1]
        assert found["neg"] == (wanted or row["neg"])
        cut += len(window) - len(wanted)
    assert 0 < cut < 20 * len(rows)                   # the margin took some away, and left some


def test_known_positives_and_the_query_itself_are_never_mined(base, tmp_path):
    rows = [{"prompt": "t", "query": "q", "pos": ["A"], "neg": ["B", "q"]},   # B: a positive below
            {"prompt": "t", "query": "q", "pos": ["B"], "neg": ["A", "C"]},
            {"prompt": "u", "query": "q", "pos": ["D"], "neg": ["  "]}]       # another task: A, B are free
    mined = run(base, write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out.jsonl", "--ranks", 1, 9,
                "--negatives", 9)
    assert [set(row["neg"]) for row in mined] == [{"C", "D"}, {"C", "D"}, {"A", "B", "C"}]


def test_a_sample_comes_from_the_window_and_from_the_seed(base, data, tmp_path):
    flags = ("--ranks", 3, 12, "--negatives", 4, "--sample")
    first, again, other = (run(base, data, tmp_path / name, *flags, "--seed", seed)
                           for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first == again != other
    for row, found in zip(ROWS, first):
        window = [text for _, text in ranking(base, ROWS, row, row["pos"])[2:12]]
        assert len(set(found["neg"])) == 4 and set(found["neg"]) <= set(window)
    assert first != run(base, data, tmp_path / "d", *flags[:-1])


def test_keep_appends_without_doubling(base, data, tmp_path):
    mined = run(base, data, tmp_path / "out.jsonl", "--ranks", 1, 50, "--negatives", 50, "--keep")
    for row, found in zip(ROWS, mined):
        assert found["neg"][:len(row["neg"])] == row["neg"]
        assert set(found["neg"]) == {t for _, t in ranking(base, ROWS, row, row["pos"])}


def test_what_was_noted_of_old_negatives_goes_with_them(base, tmp_path, capsys):
    noted = {"neg_scores": [0.5], "neg_ids": ["n1"], "pos_scores": [1.0]}
    rows = [{**row, "neg": ["old"], **noted} for row in ROWS]
    path = write_lines(tmp_path / "a.jsonl", rows)
    mined = run(base, path, tmp_path / "out.jsonl", "--ranks", 1, 9, "--margin", 0.1)
    changed = [row for row, found in zip(rows, mined) if found != row]
    for row, found in zip(rows, mined, strict=True):
        if found == row:                                            # none below the margin: as it was
            continue
        assert len(found["neg"]) == 1 and found.keys() == row.keys() - {"neg_scores", "neg_ids"}
    assert 0 < len(changed) < len(rows)
    assert f"{len(rows) - len(changed)} rows as they were" in capsys.readouterr().out


def test_more_texts_come_from_a_file(base, data, tmp_path):
    (tmp_path / "docs.txt").write_bytes("a tea\r\n\nné map 3\n看书\na tea".encode())
    flags = ("--ranks", 1, 99, "--negatives", 99, "--corpus", tmp_path / "docs.txt")
    known = {text for row in ROWS for text in row["pos"] + row["neg"]}
    for row, found in zip(ROWS, run(base, data, tmp_path / "out.jsonl", *flags), strict=True):
        assert len(found["neg"]) == len(set(found["neg"]))
        assert set(found["neg"]) == (known | {"a tea", "né map 3", "看书"}) - set(row["pos"])


def test_a_corpus_too_small_for_the_window_is_refused(base, tmp_path, capsys):
    few = write_lines(tmp_path / "few.jsonl", ROWS[:4])
    said = refusal(capsys, mine.main, *flags(base, few, tmp_path / "out.jsonl"))
    assert "the corpus has 6 texts, so that none stands at --ranks 11 to 100" in said
    assert not (tmp_path / "out.jsonl").exists()


def test_vectors_that_are_no_numbers_are_one_line(base, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Decoder, "forward", lambda self, ids: torch.full((*ids.shape, 32), torch.nan))
    assert "NaN or infinity" in refusal(capsys, mine.main, *flags(base, data, tmp_path / "out.jsonl"))
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_memory_is_a_chunk_not_the_corpus(base, data, tmp_path, monkeypatch):
    """No more than a chunk of texts is ever embedded, or compared, at once; no temporary file stays."""
    sizes, encode, search = [], Embedder.encode, mine.search
    monkeypatch.setattr(Embedder, "encode", lambda self, texts, *a, **k: sizes.append(len(texts)) or encode(
        self, texts, *a, **k))
    monkeypatch.setattr(mine, "search", lambda queries, chunks, k: search(queries, (
        sizes.append(len(v)) or (n, v) for n, v in chunks), k))
    run(base, data, tmp_path / "out.jsonl", "--chunk", 5)
    assert max(sizes) == 5 and sum(sizes) > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "out.jsonl"]


def test_the_training_reads_what_was_mined(base, data, tmp_path):
    run(base, data, tmp_path / "out.jsonl", "--ranks", 2, 9, "--negatives", 2)
    examples = mine.Examples([str(tmp_path / "out.jsonl")])
    assert len(examples) == 24 and all(len(examples[i]["neg"]) == 2 for i in range(24))


@pytest.mark.parametrize("more, complaint", [
    (("--ranks", 5, 4), "--ranks 5 4"), (("--ranks", 0, 4), "--ranks: 0: must be above 0"),
    (("--negatives", 0), "--negatives: 0: must be above 0"), (("--chunk", 0), "--chunk: 0: must be above 0"),
    (("--margin", "nan"), "--margin: nan: must be a finite number"),
    (("--corpus", "none.txt"), "--corpus none.txt: no such file"),
    (("--out", "no/where.jsonl"), "no/where.jsonl"),
    (("--out", "."), ".: a folder: name a file in it"), (("--out", "x.jsonl.gz"), "a name without .gz"),
    (("--dtype", "int8"), "int8"),
])
def test_user_errors_are_one_line(base, data, tmp_path, capsys, more, complaint):
    assert complaint in refusal(capsys, mine.main, *flags(base, data, tmp_path / "out.jsonl", *more))
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("out", ["docs.txt", "link.txt", "second.jsonl"])
def test_what_is_read_is_not_replaced(base, data, tmp_path, capsys, out):
    (tmp_path / "docs.txt").write_text("tea\n")
    (tmp_path / "link.txt").symlink_to("docs.txt")
    write_lines(tmp_path / "second.jsonl", ROWS)
    more = (tmp_path / "second.jsonl", "--corpus", tmp_path / "docs.txt")
    said = refusal(capsys, mine.main, base, data, *more, "--out", tmp_path / out)
    assert f"--out {tmp_path / out}: would replace what is read" in said
    assert (tmp_path / "docs.txt").read_text() == "tea\n" and read_lines(tmp_path / "second.jsonl") == ROWS


def test_the_only_training_file_may_be_replaced_by_its_own_rows(base, data):
    mined = run(base, data, data, "--ranks", 1, 9)
    assert [row["query"] for row in mined] == [row["query"] for row in ROWS] and mined != ROWS


def test_a_bom_is_part_of_no_text(base, data, tmp_path):
    """In front of the file, and where files were joined: as the texts are numbered, so they are read again."""
    (tmp_path / "docs.txt").write_bytes("\ufefftea one\n\ufefftea two\ntea one\n".encode())
    corpus = mine.Corpus(mine.Examples([str(data)]), tmp_path / "docs.txt")
    assert [corpus[number] for number in range(len(corpus))][-2:] == ["tea one", "tea two"]


def test_a_bad_line_ends_the_tool_as_a_user_sees_it(base, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [ROWS[0], {"query": "q"}])
    done = run_tool("data.mine", base, path, "--out", tmp_path / "out.jsonl")
    assert done.returncode == 2 and "a.jsonl:2" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()
