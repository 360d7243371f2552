"""tools/eval/hub.py and prompts/tasks.json: every layout of the hub's test sets becomes a task folder."""

import csv
import doctest
import gzip
import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest

import evaluate
from hub_standin import Hub
from plumbing.errors import UserError
from plumbing.table import read_benchmark
from plumbing.tasks import CATEGORIES, find_tasks, read_qrels, read_rows
from scoring import EVALDATA, MINI, HashEmbedder
from scripts import ROOT, complaint, run_tool
from tools.eval import hub, mteb_results

TABLE = json.loads((ROOT / "prompts" / "tasks.json").read_text(encoding="utf-8"))


def test_docstring_examples():
    assert doctest.testmod(hub).failed == 0


def mini(kind: str, file="test") -> list[dict]:
    folder = next(task["folder"] for task in find_tasks([str(MINI)]) if task["kind"] == kind)
    return list(read_rows(folder / f"{file}.jsonl"))


def write(path: Path, rows: list[dict]) -> None:
    """Write rows in the format that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".tsv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        text = json.dumps(rows) if path.name.endswith("array.json") else text
        with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
            file.write(text)


def judged() -> list[dict]:
    qrels = read_qrels(MINI / "Retrieval" / "qrels" / "test.tsv")
    return [
        {"query-id": q, "corpus-id": d, "score": grade}
        for q, row in qrels.items()
        for d, grade in row.items()
    ]


def retrieval_files(pattern: dict[str, str]) -> dict[str, list[dict]]:
    rows = {
        "corpus": mini("retrieval", "corpus"),
        "queries": mini("retrieval", "queries"),
        "qrels": judged(),
    }
    return {path: rows[role] for role, path in pattern.items()}


def reranking_files(queries: list[str]) -> dict[str, list[dict]]:
    """A reranking task as mteb 2 uploads it: a small retrieval task with the candidates of each query."""
    rows = [row for row in mini("reranking") if row["positive"] and row["negative"]][:len(queries)]
    corpus, qrels, top = [], [], []
    for query, row in zip(queries, rows):
        ids = [f"{query}-{i}" for i in range(len(row["positive"] + row["negative"]))]
        corpus += [
            {"_id": i, "title": "", "text": text} for i, text in zip(ids, row["positive"] + row["negative"])
        ]
        qrels += [
            {"query-id": query, "corpus-id": i, "score": int(n < len(row["positive"]))}
            for n, i in enumerate(ids)
        ]
        top.append({"query-id": query, "corpus-ids": ids})
    asked = [{"_id": query, "text": row["query"]} for query, row in zip(queries, rows)]
    return {"corpus/test-00000-of-00001.parquet": corpus, "queries/test-00000-of-00001.parquet": asked,
            "default/test-00000-of-00001.parquet": qrels, "top_ranked/test-00000-of-00001.parquet": top}


PAIRS = mini("pair-classification")
LAYOUTS = {  # task -> the files of its repository
    "STSBenchmark": {"test.jsonl.gz": mini("sts"), "train.jsonl.gz": mini("sts")[:1]},
    "STS17": {"test/en-en.jsonl.gz": mini("sts"), "test/ko-ko.jsonl.gz": mini("sts")[:2]},
    "STS22": {
        "data/test.jsonl.gz": [{**row, "lang": "en"} for row in mini("sts")]
        + [{**mini("sts")[0], "lang": "de"}]
    },
    "Banking77Classification": {
        "train.jsonl": mini("classification", "train"),
        "test.jsonl": mini("classification"),
    },
    "MassiveIntentClassification": {
        "train/en.json.gz": mini("classification", "train"),
        "train/de.json.gz": [{"x": 1}],
        "test/en.json.gz": mini("classification"),
        "test/de.json.gz": [{"x": 1}],
    },
    "ImdbClassification": {
        "data/train-00000-of-00001.parquet": mini("classification", "train"),
        "data/test-00000-of-00001.parquet": mini("classification"),
    },
    "TwitterURLCorpus": {
        "test.jsonl.gz": [
            {
                "sent1": [p["sentence1"] for p in PAIRS],
                "sent2": [p["sentence2"] for p in PAIRS],
                "labels": [p["label"] for p in PAIRS],
            }
        ]
    },
    "TwentyNewsgroupsClustering": {"test.jsonl": mini("clustering")},
    "SummEval": {"data/test-00000-of-00001-35901af5f6649399.parquet": mini("summarization")},
    "AskUbuntuDupQuestions": {"test.jsonl.gz": mini("reranking")},
    "SciFact": retrieval_files(
        {"corpus": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "qrels/test.tsv"}
    ),
    "NFCorpus": retrieval_files(
        {"corpus": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "qrels/test.jsonl"}
    ),
    "ArguAna": retrieval_files(
        {
            "corpus": "corpus/corpus-00000-of-00001.parquet",
            "qrels": "default/test-00000-of-00001.parquet",
            "queries": "queries/queries-00000-of-00001.parquet",
        }
    ),
    "FiQA2018": retrieval_files(
        {"corpus": "corpus/array.json", "queries": "queries/array.json", "qrels": "qrels/test.tsv"}
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_gives_the_task_it_was_made_from(name, tmp_path):
    for path, rows in LAYOUTS[name].items():
        write(tmp_path / "repository" / path, rows)
    (tmp_path / "repository" / "README.md").write_text("no data")
    task = TABLE["tasks"][name]
    hub.convert(tmp_path / "repository", tmp_path / "out", name, task)
    made, = find_tasks([str(tmp_path / "out")])
    assert (
        made["prompt"] == task["prompt"]
        and made["split"] == task["split"]
        and not (tmp_path / "out.part").exists()
    )
    original = next(t for t in find_tasks([str(MINI)]) if t["kind"] == task["kind"])
    files = ["corpus", "queries"] if task["kind"] == "retrieval" else ["test"]
    files += ["train"] * (task["kind"] == "classification")
    for file in files:
        keep = hub.COLUMNS[file if task["kind"] == "retrieval" else task["kind"]]
        wanted = [
            {key: row.get(key, "") for key in keep}
            for row in read_rows(original["folder"] / f"{file}.jsonl")
        ]
        assert list(read_rows(tmp_path / "out" / f"{file}.jsonl")) == wanted
    if task["kind"] == "retrieval":
        judgements = [
            read_qrels(folder / "qrels" / "test.tsv")
            for folder in (tmp_path / "out", original["folder"])
        ]
        assert judgements[0] == judgements[1]


def test_reranking_uploads_become_rows_and_sub_queries_are_gathered(tmp_path):
    rows = [row for row in mini("reranking") if row["positive"] and row["negative"]]
    for name, queries in (("AskUbuntuDupQuestions", ["q1", "q2"]), ("MindSmallReranking", ["u_1", "u_2"])):
        for path, content in reranking_files(queries).items():
            write(tmp_path / name / path, content)
        hub.convert(tmp_path / name, tmp_path / f"{name}.out", name, TABLE["tasks"][name])
        found = list(read_rows(tmp_path / f"{name}.out" / "test.jsonl"))
        if name == "MindSmallReranking":
            assert [row["query"] for row in found] == [[rows[0]["query"], rows[1]["query"]]]
        else:
            assert found == [
                {key: row[key] for key in ("query", "positive", "negative")} for row in rows[:2]
            ]


def test_ids_that_end_in_numbers_are_no_sub_queries(tmp_path):
    for path, content in reranking_files(["query_0", "query_1"]).items():
        write(tmp_path / path, content)
    rows = list(hub.as_reranking(tmp_path, "test", None))
    assert [type(row["query"]) for row in rows] == [str, str]


def test_a_subset_without_a_file_of_its_own_is_refused(tmp_path):
    """kor-eng would hold Czech."""
    write(tmp_path / "test/ces-eng.jsonl", mini("bitext"))
    with pytest.raises(UserError, match="no file for bitext, kor-eng: neither a path nor a row of test/ces-eng"):
        list(hub.rows_of(tmp_path, "bitext", (), "test", "kor-eng"))
    write(tmp_path / "r/test.jsonl", [{**row, "lang": "de"} for row in mini("sts")])
    with pytest.raises(UserError, match="no row for sts, split test, en, in test.jsonl"):
        list(hub.rows_of(tmp_path / "r", "sts", (), "test", "en"))


def test_a_machine_without_hf_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "SciFact: `hf` is not installed: `pip install huggingface_hub`" in complaint(
        capsys, hub.main, "SciFact", "--out", tmp_path / "out")


def test_miracls_own_files_are_read(tmp_path):
    """Passages in numbered parts with docid, topics without a header, judgements as TREC writes them."""
    corpus = [
        {"docid": row["_id"], "title": row["title"], "text": row["text"]}
        for row in mini("retrieval", "corpus")
    ]
    write(tmp_path / "r/miracl-corpus-v1.0-sw/docs-0.jsonl.gz", corpus[:100])
    write(tmp_path / "r/miracl-corpus-v1.0-sw/docs-1.jsonl.gz", corpus[100:])
    folder = tmp_path / "r/miracl-v1.0-sw"
    (folder / "topics").mkdir(parents=True)
    (folder / "qrels").mkdir()
    (folder / "topics/topics.miracl-v1.0-sw-dev.tsv").write_text("1\twho?\n2\twhere?\n")
    (folder / "qrels/qrels.miracl-v1.0-sw-dev.tsv").write_text(
        f"1\tQ0\t{corpus[3]['docid']}\t1\n2\tQ0\tx\t0\n"
    )
    task = {**TABLE["tasks"]["MIRACLRetrieval"], **TABLE["tasks"]["MIRACLRetrieval"]["parts"]["sw"]}
    hub.convert(tmp_path / "r", tmp_path / "out", "MIRACLRetrieval/sw", task)
    assert len(list(read_rows(tmp_path / "out/corpus.jsonl"))) == len(corpus)
    assert [row["text"] for row in read_rows(tmp_path / "out/queries.jsonl")] == ["who?", "where?"]
    assert read_qrels(tmp_path / "out/qrels/dev.tsv") == {
        "1": {corpus[3]["docid"]: 1},
        "2": {"x": 0},
    }


@pytest.mark.parametrize("paths", [
    "test/{}.jsonl", "{}/test.jsonl", "{}/test-00000-of-00001.parquet", "{}_test.jsonl", "test-{}.jsonl.gz"])
def test_a_subset_is_not_one_that_holds_its_name(paths, tmp_path):
    for other in ("en", "en-ext", "de-en") if "-{}" not in paths else ("en", "de"):
        rows = [{**row, "sentence1": f"{other} {row['sentence1']}"} for row in mini("sts")]
        write(tmp_path / paths.format(other), rows)
    found = list(hub.rows_of(tmp_path, "sts", (), "test", "en"))
    assert len(found) == len(mini("sts")) and all(row["sentence1"].startswith("en ") for row in found)


def test_a_language_is_looked_up_in_the_rows_where_no_path_names_it(tmp_path):
    rows = [{**row, "lang": language} for language in ("en", "de-en") for row in mini("sts")[:3]]
    write(tmp_path / "data/test.jsonl.gz", rows)
    assert list(hub.rows_of(tmp_path, "sts", (), "test", "en")) == mini("sts")[:3]


@pytest.mark.parametrize("name, folder, wanted", [
    ("NFCorpus", "scifact", "holds no folder 'nfcorpus'"), ("STS12", "scifact", "BEIR has no archive of it"),
    ("NFCorpus", "", None)])
def test_an_archive_of_another_task_is_refused(name, folder, wanted, tmp_path, capsys):
    shutil.copytree(MINI / "Retrieval", tmp_path / "z" / folder, ignore=shutil.ignore_patterns("task.json"))
    archive = shutil.make_archive(str(tmp_path / "scifact"), "zip", tmp_path / "z")
    flags = [name, "--zip", archive, "--out", str(tmp_path / "out")]
    if wanted:
        said = complaint(capsys, hub.main, *flags)
        assert f": {name}: " in said and wanted in said
    else:                                          # files at the root: the user says what they are
        hub.main(flags)
    assert (tmp_path / "out" / name).exists() is (wanted is None)


def encrypted(content: bytes) -> bytes:
    """The bit that says so, in the local header and in the central directory."""
    central = content.index(b"PK\1\2")
    return content[:6] + b"\1" + content[7:central + 8] + b"\1" + content[central + 9:]


def damaged(content: bytes) -> bytes:
    middle = content.index(b"PK\1\2") // 2
    return content[:middle] + b"\xff" * 9 + content[middle + 9:]


@pytest.mark.parametrize("change, words", [(encrypted, "is encrypted, password required"),
                                           (damaged, "Bad CRC|rror -3")])         # by the zlib there is
def test_an_archive_that_cannot_be_unpacked_is_one_line(tmp_path, capsys, change, words):
    path = tmp_path / "scifact.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("scifact/corpus.jsonl", json.dumps({"_id": "1", "text": " ".join(map(str, range(999)))}))
    path.write_bytes(change(path.read_bytes()))
    said = complaint(capsys, hub.main, "SciFact", "--zip", path, "--out", tmp_path / "out")
    assert ": SciFact: cannot be converted" in said and re.search(words, said)
    assert not (tmp_path / "out").exists()


def test_other_json_is_no_result(tmp_path, capsys):
    (tmp_path / "train.json").write_text('{"lr": 1e-4}')
    assert "train.json: not what evaluate.py writes" in complaint(
        capsys, mteb_results.main, tmp_path / "train.json")


def cut_gzip(path):
    row = b'{"sentence1": "a", "sentence2": "b", "score": 1}\n'
    path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(row * 999)[:-20])


@pytest.mark.parametrize("fill, said", [
    (cut_gzip, "test.jsonl.gz: cannot be read (Compressed file ended"),
    (lambda p: p.write_text("[1]\n"), "test.jsonl:1: holds no JSON object: remove "),
    (lambda p: p.with_name("test.json").write_text("[1]"), "a sts row is no object, but 1"),
    (lambda p: p.write_text("{oops\n"), "test.jsonl:1: not JSON in UTF-8: Expecting"),
    (lambda p: p.write_bytes(b"\xff\n"), "test.jsonl:1: not JSON in UTF-8: 'utf-8'"),
    (lambda p: p.with_suffix(".jsonl.gz").write_bytes(b"no gzip"), "jsonl.gz: cannot be read (Not a gzipped"),
    (lambda p: p.with_suffix(".parquet").write_bytes(b"no parquet"), "test.parquet: broken (")])
def test_a_broken_file_is_named(fill, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "r").mkdir()
    fill(tmp_path / "r" / "test.jsonl")
    monkeypatch.setattr(hub, "download", lambda task: tmp_path / "r")
    assert said in complaint(capsys, hub.main, "STS12", "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "STS12").exists()


def test_a_tab_separated_field_may_be_long_and_a_grade_must_be_finite(tmp_path, monkeypatch, capsys):
    for path, text in (("corpus.tsv", f"_id\ttext\nd\t{'long ' * 40_000}\n"),
                       ("queries.tsv", "_id\ttext\nq\tx\n"),
                       ("qrels/test.tsv", "query-id\tcorpus-id\tscore\r\nq\td\t1\r\n")):
        (tmp_path / "r" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "r" / path).write_text(text, newline="")
    monkeypatch.setattr(hub, "download", lambda task: tmp_path / "r")
    hub.main(["SciFact", "--out", str(tmp_path / "out")])
    assert len(next(read_rows(tmp_path / "out/SciFact/corpus.jsonl"))["text"]) == 200_000
    for grade in "inf", "0.5":
        (tmp_path / "r/qrels/test.tsv").write_text(f"query-id\tcorpus-id\tscore\nq\td\t{grade}\n")
        capsys.readouterr()
        assert f"SciFact: qrels: a grade is a whole number, not {grade}" in complaint(
            capsys, hub.main, "SciFact", "--out", tmp_path / "other")


def test_a_beir_archive_is_unpacked(tmp_path, capsys):
    shutil.copytree(
        MINI / "Retrieval", tmp_path / "z" / "scifact", ignore=shutil.ignore_patterns("task.json")
    )
    shutil.make_archive(str(tmp_path / "scifact"), "zip", tmp_path / "z")
    hub.main(["SciFact", "--zip", str(tmp_path / "scifact.zip"), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/SciFact/corpus.jsonl").exists() and "SciFact" in capsys.readouterr().out


def judged_by_all_but_one(queries: list[dict]) -> dict[str, list[dict]]:
    """A part of a task: each query's document holds its words, but the last one's document is nowhere."""
    return {"corpus": [{"_id": f"{row['_id']}#1", "title": "", "text": row["text"]} for row in queries],
            "queries": queries,
            "qrels": [{"query-id": row["_id"], "corpus-id": f"{row['_id']}#{1 + (row is queries[-1])}",
                       "score": 1} for row in queries]}


def scores_of(folder: Path, benchmark: str) -> dict:
    encoder = evaluate.Encoder(HashEmbedder(), evaluate.options(["m"]))
    return evaluate.evaluate(encoder, find_tasks([str(folder)]), read_benchmark(benchmark))


def test_cqadupstacks_twelve_forums_are_one_task_with_their_plain_mean(tmp_path):
    """Forum n has n + 1 queries, of which all but one find their document: the mean is over forums."""
    forums = list(TABLE["tasks"]["CQADupstackRetrieval"]["parts"])
    for n, forum in enumerate(forums):
        queries = [{"_id": f"{i}", "text": f"{forum} {i}"} for i in range(n + 1)]
        for role, rows in judged_by_all_but_one(queries).items():
            file = "qrels/test.tsv" if role == "qrels" else f"{role}.jsonl"
            write(tmp_path / "z/cqadupstack" / forum / file, rows)
    archive = shutil.make_archive(str(tmp_path / "cqadupstack"), "zip", tmp_path / "z")
    hub.main(["CQADupstackRetrieval", "--zip", archive, "--out", str(tmp_path / "out")])
    found = scores_of(tmp_path / "out", "beir")
    assert list(found["tasks"]) == ["CQADupstackRetrieval"] and len(found["details"]) == 12
    assert found["average"] == pytest.approx(sum(round(n / (n + 1), 5) for n in range(12)) / 12)
    assert len(found["missing"]) == 14 and not any("CQADupstack" in name for name in found["missing"])
    files = mteb_results.write({"m": found}, {"m": "me/m"}, "1", tmp_path / "mteb")   # to MTEB, twelve tasks
    assert len(files) == 12 and "CQADupstackGisRetrieval.json" in {file.name for file in files}
    written = json.loads((tmp_path / "mteb/results/me__m/1/CQADupstackTexRetrieval.json").read_text())
    assert written["scores"]["test"][0]["hf_subset"] == "default"
    assert written["dataset_revision"] == TABLE["tasks"]["CQADupstackRetrieval"]["parts"]["tex"]["revision"]
    shutil.rmtree(tmp_path / "out" / "CQADupstackRetrieval" / "tex")         # eleven forums are no task
    found = scores_of(tmp_path / "out", "beir")
    assert found["tasks"] == {"CQADupstackRetrieval": None} and found["average"] is None
    assert "CQADupstackRetrieval/tex" in found["missing"]


def miracl_queries(language: str, n: int) -> list[dict]:
    """The first real questions of a language in EVALDATA, or written ones; each text once."""
    path = EVALDATA / "MIRACL-dev-queries-qrels" / language
    if not path.is_dir():
        return [{"_id": f"{i}#0", "text": f"{language}{i} question"} for i in range(n)]
    texts = {row["text"]: row for row in read_rows(path / "queries.jsonl")}
    return [{"_id": row["_id"], "text": row["text"]} for row in list(texts.values())[:n]]


def test_miracls_eighteen_languages_are_read_from_one_repository_and_averaged(tmp_path, monkeypatch):
    """Each language has folders of its own for corpus, queries and qrels; language n has n + 1 queries,
    of which all but one find their document, and all languages weigh the same."""
    languages, repository = list(TABLE["tasks"]["MIRACLRetrieval"]["parts"]), tmp_path / "repository"
    for n, language in enumerate(languages):
        for role, rows in judged_by_all_but_one(miracl_queries(language, n + 1)).items():
            write(repository / f"{language}-{role}" / "dev-00000-of-00001.parquet", rows)
    monkeypatch.setattr(hub, "download", lambda task: repository)
    hub.main(["miracl", "--out", str(tmp_path / "out")])
    found = scores_of(tmp_path / "out", "miracl")
    assert sorted(found["details"]) == sorted(f"MIRACLRetrieval/{language}" for language in languages)
    assert [found["details"][f"MIRACLRetrieval/{language}"]["texts"] for language in languages] == [
        2 * (n + 1) for n in range(18)]            # queries and corpus, and nothing of another language
    assert found["average"] == pytest.approx(sum(round(n / (n + 1), 5) for n in range(18)) / 18)
    for n, scores in enumerate(found["details"].values()):
        scores["seconds"] = n
    file, = mteb_results.write({"m": found}, {"m": "me/m"}, "1", tmp_path / "mteb")
    written = json.loads(file.read_text())
    assert len(written["scores"]["dev"]) == 18 and written["evaluation_time"] == sum(range(18))
    spoken = {scores["hf_subset"]: scores["languages"] for scores in written["scores"]["dev"]}
    assert spoken["en"] == ["eng-Latn"] and spoken["ar"] == ["ara-Arab"] and spoken["zh"] == ["zho-Hans"]


def test_wrong_names_and_files_get_one_line(tmp_path):
    with pytest.raises(UserError, match="Nonsense: neither a task nor a benchmark"):
        hub.main(["Nonsense"])
    with pytest.raises(UserError, match="--zip x.zip: holds one task, not 15"):
        hub.main(["beir", "--zip", "x.zip"])
    write(tmp_path / "r/test.jsonl", [{"a": 1}])
    with pytest.raises(UserError, match="a sts row has no 'sentence1', but a"):
        hub.convert(tmp_path / "r", tmp_path / "out", "STS12", TABLE["tasks"]["STS12"])
    with pytest.raises(UserError, match="no file for retrieval|no file for corpus"):
        hub.convert(tmp_path / "r", tmp_path / "out", "SciFact", TABLE["tasks"]["SciFact"])
    assert not (tmp_path / "out").exists()


def test_tasks_are_fetched_over_http_once(tmp_path):
    names = ["STSBenchmark", "SciFact"]
    for name in names:
        for path, rows in LAYOUTS[name].items():
            write(tmp_path / name / path, rows)
    repositories = {f"datasets/{TABLE['tasks'][name]['hub']}": tmp_path / name for name in names}
    with Hub(repositories, [TABLE["tasks"][name]["revision"] for name in names]) as standin:
        environment = {**standin.environment(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}

        def fetch(*tasks):
            return run_tool("eval.hub", *tasks, "--out", tmp_path / "out", env=environment)
        done = fetch(*names)
        assert done.returncode == 0, done.stderr
        assert len(find_tasks([str(tmp_path / "out")])) == 2
        asked = len(standin.requests)
        assert fetch(*names).returncode == 0
        assert len(standin.requests) == asked                        # what stands in OUT is left alone
        failed = fetch("STS12")
        assert failed.returncode == 2 and "hub.py: STS12: mteb/sts12-sts was not downloaded" in failed.stderr


# ------------------------------------------------------------------------------------- the table of tasks

def test_the_table_holds_mtebs_56_tasks_and_the_published_average():
    names = TABLE["benchmarks"]["eng-v1"]["tasks"]
    assert len(set(names)) == 56 and set(names) <= TABLE["tasks"].keys()
    counts = [
        sum(TABLE["tasks"][name]["kind"] == kind for name in names) for kind in list(CATEGORIES)[:7]
    ]
    assert counts == [12, 11, 3, 4, 15, 10, 1]
    assert (
        round(100 * sum(TABLE["tasks"][name]["released"] for name in names) / 56, 2) == 66.64
    )  # published: 66.63
    assert (
        len(TABLE["tasks"]["MIRACLRetrieval"]["parts"]) == 18
        and len(TABLE["tasks"]["Tatoeba"]["parts"]) == 112
    )
    for name, task in TABLE["tasks"].items():
        assert task["kind"] in CATEGORIES and task["prompt"] and task["split"], name
        for part in task.get("parts", {"": task}).values():
            assert "/" in part["hub"] and part["revision"], name
