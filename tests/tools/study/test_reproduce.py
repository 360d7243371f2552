"""tools/reproduce.py and its parts: fixed subsets, peers, table. data/mini stands for the full sets."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import reproduce
import study_data
import study_peers
import study_table
import subsets
from scripts import run_tool
from model import Embedder, UserError
from tiny import random_model, save, tiny_config

MINI = Path(__file__).resolve().parents[1] / "data" / "mini"
SIZES = {
    "test": {"Classification": {"labels": 3, "train": 9, "test": 4}, "Clustering": {"labels": 3, "each": 4},
             "PairClassification": {"rows": 12}, "Reranking": {"rows": 3, "positive": 1, "negative": 2},
             "Retrieval": {"queries": 5, "documents": 20}, "STS": {"rows": 12},
             "Summarization": {"rows": 3, "human": 1}, "Bitext": {"rows": 6}},
    "dev": {"Classification": {"labels": 3, "train": 3, "test": 4}, "Clustering": {"labels": 3, "each": 4},
            "PairClassification": {"rows": 9}, "Retrieval": {"queries": 5, "documents": 20},
            "STS": {"rows": 12}, "Summarization": {"rows": 3, "human": 1}, "Bitext": {"rows": 6}},
}
SEVEN = set(study_table.CATEGORIES)


def texts_of(folder: Path) -> set[str]:
    rows = [row for path in folder.rglob("*.jsonl") for row in evaluate.read_rows(path)]
    return {subsets.squeeze(text) for row in rows for text in subsets.row_texts(row)}


@pytest.fixture(scope="module")
def drawn():
    return {**subsets.draw(MINI, SIZES), "max_length": 40}


@pytest.fixture(scope="module")
def base(tmp_path_factory, mistral_files):
    model = random_model(tiny_config(vocab_size=32000, hidden_size=32, num_hidden_layers=2))
    return save(model, tmp_path_factory.mktemp("base") / "tiny", mistral_files)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Rows of two task types with a negative each, one of them a text of the test sets."""
    path = tmp_path_factory.mktemp("data") / "synthetic.jsonl"
    rows = [{"prompt": "Find the reply", "query": f"question {i * i} about {chr(97 + i) * 5}",
             "pos": [f"the answer {chr(98 + i) * 7} to {i}"], "neg": [f"no reply {i} {chr(99 + i) * 3}"],
             "type": ("sts", "long-short")[i % 2]} for i in range(13)]
    rows[5]["query"] = next(evaluate.read_rows(MINI / "STS" / "test.jsonl"))["sentence1"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -------------------------------------------------------------------------------------------- subsets

def test_the_committed_subsets_are_small_and_disjoint():
    study = evaluate.read_json(subsets.STUDY)
    test, dev = (study["subsets"][name] for name in ("test", "dev"))
    for name, subset in (("test", test), ("dev", dev)):
        assert subset["tokens"] == sum(subset["tokens by task"].values()) <= subsets.BUDGET[name] <= 250_000
        assert subset["tokens by task"].keys() == subset["tasks"].keys() == subsets.SIZES[name].keys()
    for task, files in dev["tasks"].items():
        for file, entries in files.items():
            both = [{entry if isinstance(entry, int) else (entry[0], item) for entry in found
                     for item in (entry[1].get("sentences labels", [0]) if isinstance(entry, list) else [0])}
                    for found in (entries, test["tasks"][task][file])]
            assert both[0] and not both[0] & both[1], (task, file)


def test_drawn_subsets_share_no_text_and_can_be_evaluated(drawn, tmp_path):
    assert subsets.draw(MINI, SIZES)["subsets"] == drawn["subsets"]
    folders = subsets.make(drawn, MINI, tmp_path)
    assert [folder.name for folder in folders] == ["test", "dev"]
    texts = [texts_of(folder) for folder in folders]
    assert min(map(len, texts)) > 50 and not texts[0] & texts[1]
    tasks = {task["name"]: task for task in evaluate.find_tasks([str(folders[0])])}
    assert tasks.keys() == SIZES["test"].keys()

    def rows(name, file="test.jsonl"):
        return list(evaluate.read_rows(tasks[name]["folder"] / file))
    assert sum(row["label"] for row in rows("PairClassification")) == 4              # a third of twelve
    counts = [[row["label"] for row in rows("Classification", f"{part}.jsonl")] for part in ("train", "test")]
    assert [len(c) for c in counts] == [27, 12] and set(counts[0]) == set(counts[1])
    cluster, = rows("Clustering")
    assert len(cluster["sentences"]) == len(cluster["labels"]) == 12 and len(set(cluster["labels"])) == 3
    source, = evaluate.read_rows(MINI / "Clustering" / "test.jsonl")
    assert dict(zip(source["sentences"], source["labels"])).items() >= dict(
        zip(cluster["sentences"], cluster["labels"])).items()
    qrels = evaluate.read_qrels(tasks["Retrieval"]["folder"] / "qrels" / "test.tsv")
    full = evaluate.read_qrels(MINI / "Retrieval" / "qrels" / "test.tsv")
    kept = {row["_id"] for row in rows("Retrieval", "corpus.jsonl")}
    assert len(qrels) == 5 and len(kept) == 20
    for query, judged in qrels.items():
        assert {d for d, grade in full[query].items() if grade > 0} <= judged.keys() <= kept


def test_subsets_refuse_another_version_of_a_file_and_a_foreign_folder(drawn, tmp_path):
    changed = {**drawn, "sources": drawn["sources"] | {"STS/test.jsonl": "0" * 16}}
    with pytest.raises(UserError, match="STS/test.jsonl: not the file"):
        subsets.make(changed, MINI, tmp_path)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "mine.txt").touch()
    with pytest.raises(UserError, match="not written by subsets.py"):
        subsets.make(drawn, MINI, tmp_path)
    assert (tmp_path / "test" / "mine.txt").exists()


def test_counted_tokens_are_those_that_evaluation_embeds(drawn, base, tmp_path):
    folder = subsets.make(drawn, MINI, tmp_path)[0]
    embedder = Embedder.load(base, max_length=40)
    rows = list(evaluate.read_rows(folder / "STS" / "test.jsonl"))
    prompt = evaluate.read_json(MINI / "STS" / "task.json")["prompt"]
    pairs = {(row.get("prompt", prompt), row[side]) for row in rows for side in ("sentence1", "sentence2")}
    wanted = sum(len(embedder.tokenize([text], prompt)[0]) for prompt, text in pairs)
    assert subsets.count(folder, embedder)["STS"] == wanted > 0


# ---------------------------------------------------------------------------------------------- peers

def test_bm25_ranks_shared_words_first(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\na\t2\t1\nb\t1\t1\n")
    documents = ["the kettle boils", "a heron fishes", "rain on slate roofs", "slate is a stone"]
    for name, rows in (("corpus", documents), ("queries", ["slate roof, rain?", "unknown"])):
        ids = "ab" if name == "queries" else "0123"
        lines = [json.dumps({"_id": i, "text": text}) + "\n" for i, text in zip(ids, rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    task = {"name": "T", "kind": "retrieval", "split": "test", "folder": tmp_path}
    found = study_peers.bm25([task, {"name": "S", "kind": "sts"}])
    # the first query finds its document at rank 1; all documents tie for the second, whose own is not last
    assert found.keys() == {"T"} and 0.5 + 0.5 * 0.43 <= found["T"] < 1


def test_minilm_is_a_real_embedder():
    model = study_peers.MiniLM("cpu", 128)
    v = model.encode(["A man plays a guitar.", "Someone is playing an instrument.", "Taxes rose in May."],
                     ["", "", ""], normalize=False)
    assert v.shape == (3, 384) and torch.allclose(v.norm(dim=1), torch.ones(3), atol=1e-5)
    assert v[0] @ v[1] > 0.4 > 0.2 > v[0] @ v[2]


def test_a_prefix_stands_straight_before_the_text(drawn, tmp_path):
    tasks = evaluate.find_tasks([str(subsets.make(drawn, MINI, tmp_path)[0])])
    seen = {}

    class Recorder:
        device, cut = torch.device("cpu"), 0

        def encode(self, texts, **settings):
            seen.update(dict.fromkeys(texts))
            return torch.randn(len(texts), 4)
    tasks = [task for task in tasks if task["name"] in ("Clustering", "Retrieval", "STS")]
    reproduce.score(Recorder(), tasks, reproduce.ROWS["task-type-prefix"], 128)
    rows = {task["name"]: task["folder"] for task in tasks}

    def first(name, file):
        return next(evaluate.read_rows(rows[name] / file))
    assert f"classify: {first('Clustering', 'test.jsonl')['sentences'][0]}" in seen
    assert f"query: {first('Retrieval', 'queries.jsonl')['text']}" in seen
    assert evaluate.document_text(first("Retrieval", "corpus.jsonl")) in seen
    assert first("STS", "test.jsonl")["sentence1"] in seen
    assert not any("Instruct" in text for text in seen)


@pytest.mark.slow
def test_the_packages_take_the_steps_of_train_py_and_their_adapter_loads(base, examples, tmp_path):
    """Without dropout and known positives the losses agree, documents with instructions included."""
    flags = ["--base", str(base), "--data", str(examples), "--out", str(tmp_path / "peer"), "--epochs", "2",
             "--batch-size", "13", "--max-length", "40", "--lr", "1e-3", "--warmup-steps", "1",
             "--both-sides", "--lora-dropout", "0", "--no-mask", "--dtype", "float32",
             "--tokens-per-chunk", "200"]
    study_peers.train_with_packages(flags, base, tmp_path / "peer")
    losses = json.loads((tmp_path / "peer" / "losses.json").read_text())
    ours = [*flags, "--out", str(tmp_path / "ours")]
    assert reproduce.subprocess.run([sys.executable, reproduce.ROOT / "train.py", *ours]).returncode == 0
    log = [json.loads(line)["loss"] for line in open(tmp_path / "ours" / "log.jsonl")]
    assert len(losses) == len(log) == 2 and losses == pytest.approx(log, abs=1e-4) and log[0] - log[1] > 1e-3
    folders = tmp_path / "peer", tmp_path / "ours", base
    vectors = [Embedder.load(folder).encode(["a reply"]) for folder in folders]
    assert torch.allclose(vectors[0], vectors[1], atol=1e-4) and (vectors[0] - vectors[2]).norm() > 1e-3


# ------------------------------------------------------------------------------------------- the study

def test_public_files_count_alike_and_balance_the_synthetic_set():
    files = {"synthetic": {"kept": 100}, "a": {"kept": 1000}, "b": {"kept": 20}, "none": {"kept": 0}}
    assert study_data.mixture("synthetic", files) == {"synthetic": 1.0}
    assert study_data.mixture("public", files) == {"a": 0.05, "b": 1}
    assert study_data.mixture("both", files) == {"synthetic": 1.0, "a": 0.05, "b": 1}


def test_the_average_is_over_categories_and_wants_all_seven():
    kinds = {f"{kind}{i}": kind for kind in evaluate.CATEGORIES for i in range(2)}
    scores = {name: 0.5 for name in kinds} | {"sts0": 0.1, "sts1": 0.2, "bitext0": 0.0}
    found = study_table.summarize(scores, kinds)
    assert found["STS"] == pytest.approx(0.15) and found["Average"] == pytest.approx((6 * 0.5 + 0.15) / 7)
    del scores["sts0"], scores["sts1"]
    assert study_table.summarize(scores, kinds)["Average"] is None


def test_the_table_shows_spread_and_marks_what_is_older():
    def run(average, recipe):
        return {"summary": {"Average": average, "STS": average}, "model": "m", "settings": {
            "common": {"subset": "dev", "recipe": recipe}}}
    study = {"common": {"subset": "dev", "recipe": "new", "language": "Dutch"}, "data": {}, "rows": {
        "b": {"what": "B", "examples": 5, "runs": {"0": run(0.5, "new"), "1": run(0.7, "new")}},
        "a": {"what": "A", "examples": 0, "runs": {"0": run(0.25, "old")}}}}
    study_table.collect(study, ["a", "b"])
    text = study_table.table(study)
    assert "in Dutch alone" in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    rows = {line[0]: line for line in lines if len(line) > 10}
    assert list(rows)[2:] == ["A (`a`) †", "B (`b`)"]
    assert rows["B (`b`)"][1:3] == ["2", "60.0 ±14.1"] and rows["A (`a`) †"][1:3] == ["1", "25.0"]


@pytest.fixture
def study(drawn, base, examples, tmp_path, monkeypatch):
    """Run the study as a user would, in this process, on tiny models: study("--rows", ...) -> its JSON."""
    (tmp_path / "lists.json").write_text(json.dumps(drawn))
    (tmp_path / "pairs").mkdir()
    row = json.loads(examples.read_text().splitlines()[0])
    for name in ("snli_triplets", "other"):
        rows = [{**row, "query": f"{name} {i}{'xyz'[i] * 9}", "type": None} for i in range(3)]
        (tmp_path / "pairs" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def run(*flags, recipe="--batch-size 6 --max-length 24 --lr 1e-2 --both-sides --max-steps 2"):
        monkeypatch.setattr(sys, "argv", [
            "reproduce.py", "--evaldata", str(MINI), "--synthetic", str(examples), "--base", str(base),
            "--study", str(tmp_path / "lists.json"), "--work", str(tmp_path / "runs"),
            "--out", str(tmp_path / "study.json"), "--recipe", recipe, "--language", "all", *flags])
        reproduce.main()
        return json.loads((tmp_path / "study.json").read_text())
    return run


@pytest.mark.parametrize("number, to_all", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_lets_training_end_first(number, to_all):
    """Ctrl-C goes to the whole group; a supervisor's SIGTERM to this process alone."""
    child = ("import signal, sys, time\n"
             f"signal.signal({int(number)}, lambda *_: (time.sleep(1), sys.exit(7)))\n"
             "print('ready', flush=True)\ntime.sleep(60)")
    parent = f"import sys, reproduce; sys.exit(reproduce.wait_for([sys.executable, '-c', {child!r}]))"
    run = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, start_new_session=True,
                           cwd=Path(reproduce.__file__).parent)
    assert run.stdout.readline() == b"ready\n"
    (os.killpg if to_all else os.kill)(run.pid, number)
    assert run.wait(timeout=30) == 7


def test_one_language_can_be_chosen(tmp_path):
    rows = [{"query": q, "language": language} for q, language in (("a", "English"), ("b", "Dutch"))]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = study_data.in_language(tmp_path / "all.jsonl", "Dutch", tmp_path / "dutch.jsonl")
    assert [json.loads(line)["query"] for line in open(out)] == ["b"]
    with pytest.raises(UserError, match="--language Latin: no example"):
        study_data.in_language(tmp_path / "all.jsonl", "Latin", out)
    (tmp_path / "broken.jsonl").write_text("{}\n{broken\n")
    with pytest.raises(UserError, match="broken.jsonl:2: not a JSON object"):
        study_data.in_language(tmp_path / "broken.jsonl", "Dutch", out)


def test_a_study_resumes_and_runs_again_what_changed(study, tmp_path, capfd):
    found = study("--rows", "base-cut,synthetic,bm25", "--seeds", "2")
    rows = found["rows"]
    assert list(rows) == ["base-cut", "synthetic", "bm25"] and list(rows["synthetic"]["runs"]) == ["0", "1"]
    assert found["data"]["synthetic"]["contaminated"] == 1 and rows["synthetic"]["examples"] == 12
    assert rows["synthetic"]["mean"].keys() == {"Average", *SEVEN, "BitextMining"}
    assert rows["bm25"]["mean"]["Average"] is None and rows["bm25"]["mean"]["Retrieval"] > 0.1
    runs = rows["synthetic"]["runs"]
    assert runs["0"]["scores"] != rows["base-cut"]["runs"]["0"]["scores"]
    config = evaluate.read_json(Path(runs["1"]["model"]) / "config.json")
    assert config["seed"] == 1 and config["both_sides"] and config["max_steps"] == 2
    text = (tmp_path / "study.md").read_text()
    assert (tmp_path / "study.png").stat().st_size > 10_000
    for shown in ("untrained, the first layers", runs["1"]["model"], "| synthetic | 13 |"):
        assert shown in text

    capfd.readouterr()
    again = study("--rows", "base-cut,synthetic,bm25", "--seeds", "2")
    assert again == found and capfd.readouterr().out.count("done before") == 4
    changed = study("--rows", "base-cut,synthetic", recipe="--batch-size 4 --max-length 24 --max-steps 1")
    out = capfd.readouterr().out
    assert "base-cut, seed 0: done before" in out and "synthetic, seed 0: done before" not in out
    new = changed["rows"]["synthetic"]["runs"]
    config = evaluate.read_json(Path(new["0"]["model"]) / "config.json")
    assert list(new) == ["0"] and config["batch_size"] == 4 and not config["both_sides"]
    assert "†" not in (tmp_path / "study.md").read_text()


@pytest.mark.slow
def test_ablations_and_public_data_reach_training(study, tmp_path):
    found = study("--rows", "both,mean-pooling,task-type-prefix", "--subset", "test",
                  "--traindata", str(tmp_path / "pairs"))
    configs = {name: evaluate.read_json(Path(row["runs"]["0"]["model"]) / "config.json")
               for name, row in found["rows"].items()}
    assert [Path(spec.rpartition(":")[0]).stem for spec in configs["both"]["data"]] == [
        "synthetic", "other", "snli_triplets"]
    types = [json.loads(line)["type"] for line in open(found["data"]["snli_triplets"]["file"])]
    assert types and set(types) == {"sts"}
    assert configs["mean-pooling"]["pooling"] == "mean" and configs["mean-pooling"]["both_sides"]
    prefix = configs["task-type-prefix"]
    assert prefix["instruction"] == "prefix" and not prefix["both_sides"]
    assert all(row["mean"]["Average"] is not None for row in found["rows"].values())


@pytest.mark.parametrize("flags, complaint", [
    (["--rows", "nonsense"], "--rows nonsense: there are base-30"), (["--rows", "both"], "needs --traindata"),
    (["--rows", "base-cut", "--seeds", "0"], "--seeds 0"),
    (["--rows", "synthetic", "--synthetic", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
])
def test_what_a_user_can_mistake_is_said(flags, complaint, study, tmp_path):
    with pytest.raises(UserError, match=complaint):
        study(*flags)
    assert not (tmp_path / "study.json").exists()


def test_user_errors_are_one_line(drawn, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"query": 1}\n')
    done = run_tool("reproduce.py", "--evaldata", MINI, "--synthetic", tmp_path / "bad.jsonl",
                    "--work", tmp_path / "runs", "--out", tmp_path / "study.json")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--traindata" in done.stderr
    done = run_tool("reproduce.py", "--evaldata", MINI, "--synthetic", tmp_path / "bad.jsonl",
                    "--work", tmp_path / "runs", "--out", tmp_path / "study.json", "--rows", "synthetic",
                    "--base", tmp_path, "--language", "all")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "bad.jsonl:1: not a" in done.stderr
    assert not (tmp_path / "study.json").exists()
