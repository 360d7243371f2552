"""evaluate.py's proof: the eight kinds by hand, who gets the instruction, what is normalised and stored."""
import doctest
import json
import math
import os
import subprocess
import sys

import pytest

import evaluate
from model import Embedder
from plumbing import metrics
from plumbing.errors import UserError
from plumbing.tasks import CATEGORIES, read_rows
from scripts import complaint
from scoring import MINI, ROOT, Drawn, HashEmbedder, Recorder, encoder, mini_task, run, write_task

# Texts whose cosines are known by heart: what a test's model makes of them.
COMPASS = {"east": [1, 0], "as east": [1, 0], "north-east": [1, 1],
           "north": [0, 1], "west": [-1, 0], "south": [0, -1], "south-east": [1, -1]}


def test_docstring_examples():
    assert doctest.testmod(evaluate).failed == 0


# ------------------------------------------------------------------------------------- eight kinds by hand

def details(folder, task, embedder=None, **files) -> dict:
    return run(write_task(folder / "T", task, **files), embedder=embedder)["details"]["T"]


def pairs(key, values) -> list[dict]:
    """Three pairs, whose cosines are 1, 0.707 and 0, with a value each."""
    return [{"sentence1": "east", "sentence2": other, key: value}
            for other, value in zip(("as east", "north-east", "north"), values)]



def test_sts(tmp_path):
    """Ranks of the cosines 3, 2, 1; of the gold scores 3, 1, 2: Spearman is 1 - 6 * (0 + 1 + 1) / (3 * 8)."""
    scores = details(tmp_path, {"kind": "sts"}, Drawn(COMPASS), test=pairs("score", [5, 1, 2]))
    assert scores["cosine_spearman"] == scores["main_score"] == pytest.approx(0.5)


def test_pair_classification(tmp_path):
    """The pairs that mean the same stand first and third: (1/1 + 2/3) / 2."""
    rows = pairs("label", [1, 0, 1])
    scores = details(tmp_path, {"kind": "pair-classification"}, Drawn(COMPASS), test=rows)
    assert scores["cosine_ap"] == scores["max_ap"] == scores["main_score"] == pytest.approx(5 / 6)


def test_bitext(tmp_path):
    """Rows 0 and 2 find their translation, row 1 finds that of row 2. F1 by row: 1, 0, 2/3."""
    other = {"x": [1, 0.1], "y": [0, -1], "z": [-1, 1]}
    rows = [{"sentence1": a, "sentence2": b} for a, b in zip(("east", "north", "west"), other)]
    scores = details(tmp_path, {"kind": "bitext"}, Drawn({**COMPASS, **other}), test=rows)
    assert scores["f1"] == scores["main_score"] == pytest.approx(5 / 9)
    assert scores["accuracy"] == pytest.approx(2 / 3)


def test_classification(tmp_path):
    """Trained on a row of each label, all ten experiments tell north from south, as do 3 of 4 labels."""
    train = [{"text": "north", "label": "up"}, {"text": "south", "label": "down"}]
    test = [{"text": text, "label": label} for text, label in
            (("far north", "up"), ("far south", "down"), ("north", "up"), ("south", "up"))]
    embedder = Drawn({**COMPASS, "far north": [3, 9], "far south": [3, -9]})
    scores = details(tmp_path, {"kind": "classification"}, embedder, train=train, test=test)
    assert scores["accuracy"] == scores["main_score"] == 0.75 and scores["accuracies"] == [0.75] * 10


def test_classification_embeds_only_the_training_rows_that_are_drawn(tmp_path):
    """At most ten times 1 row of each of 2 labels, of 500."""
    rows = [{"text": f"row {i}", "label": i % 2} for i in range(500)]
    scores = details(tmp_path, {"kind": "classification", "samples_per_label": 1}, train=rows, test=rows[:2])
    assert 4 <= scores["texts"] <= 22


def test_clustering(tmp_path):
    """A set that k-means parts as labelled, one with a single label, and one that it parts x, y | y: there
    the mutual information is 0.174 and both entropies are 0.637."""
    sets = [{"sentences": ["east", "as east", "north"], "labels": labels}
            for labels in (["x", "x", "y"], ["x", "x", "x"], ["x", "y", "y"])]
    scores = details(tmp_path, {"kind": "clustering"}, Drawn(COMPASS), test=sets)
    mutual = (2 * math.log(3 / 2) + math.log(3 / 4)) / 3
    entropy = math.log(3) - 2 / 3 * math.log(2)
    assert scores["v_measures"] == pytest.approx([1, 1, mutual / entropy])
    assert scores["v_measure"] == scores["main_score"] == pytest.approx((2 + mutual / entropy) / 3)


def test_bootstrapped_clustering_takes_a_share_of_all_sets_and_each_level_of_labels(tmp_path, monkeypatch):
    """Half of 40 documents, 2 levels, 3 draws each. k-means finds the first level whole and the second half: its
    labels say nothing of the vectors."""
    monkeypatch.setattr(evaluate, "BOOTSTRAP", 200)
    sets = [{"sentences": [f"{i}"] * 10, "labels": [f"{i}.x", f"{i}.y"] * 5} for i in range(4)]
    embedder = Drawn({f"{i}": [math.cos(i), math.sin(i)] for i in range(4)})
    task = {"kind": "clustering", "bootstraps": 3, "sampled_share": 0.5, "levels": True}
    scores = details(tmp_path, task, embedder, test=sets)
    assert scores["v_measures"][:3] == pytest.approx([1, 1, 1]) and len(scores["v_measures"]) == 6
    assert max(scores["v_measures"][3:]) < 0.3 and scores["main_score"] == pytest.approx(
        sum(scores["v_measures"]) / 6)


def test_summarization(tmp_path):
    """Best cosines 1, 0.707, 0 and ratings as for STS: rho is 0.5, and its p-value, of three, 2/3."""
    row = {"human_summaries": ["south", "east"], "machine_summaries": ["as east", "north-east", "north"]}
    rows = [{**row, "relevance": [5, 1, 2]}, {**row, "relevance": [3, 3, 3]}]      # nothing to rank: skipped
    scores = details(tmp_path, {"kind": "summarization"}, Drawn(COMPASS), test=rows)
    assert scores["cosine_spearman"] == scores["main_score"] == pytest.approx(0.5)
    assert scores["cosine_spearman_with_p_values"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scores["skipped"] == 1


def test_reranking(tmp_path):
    """Of several queries the best counts, a row with one side is skipped, negatives win ties: (1 + 1/2) / 2."""
    rows = [{"query": ["south", "east"], "positive": ["as east"], "negative": ["south-east", "west"]},
            {"query": "east", "positive": [], "negative": ["north"]},
            {"query": "east", "positive": ["as east"], "negative": ["east"]}]
    scores = details(tmp_path, {"kind": "reranking"}, Drawn(COMPASS), test=rows)
    assert scores["map"] == scores["main_score"] == 0.75 and scores["skipped"] == 1


def test_retrieval(tmp_path, capsys):
    """d1 (the query's words) comes first, then d2 (one of them), whose grade is 2. Of the two judged queries
    one is missing; a judged document that is missing stays in the ideal ranking."""
    files = {"corpus": [{"_id": "d1", "title": "red", "text": "apple"},
                        {"_id": "d2", "title": "", "text": "apple pie"},
                        {"_id": "d3", "text": "the sea at night"}],
             "queries": [{"_id": "q", "text": "red apple"}, {"_id": "unjudged", "text": "x"}],
             "qrels": "query-id\tcorpus-id\tscore\nq\td2\t2\nq\td1\t1\nlost\td1\t1\n"}
    scores = details(tmp_path, {"kind": "retrieval", "prompt": "p"}, **files)
    ndcg = (1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3))
    assert scores["ndcg_at_10"] == scores["main_score"] == round(ndcg, 5)
    assert scores["recall_at_100"] == scores["map_at_1000"] == 1 and scores["skipped"] == 1
    files["qrels"] = "q\td1\t1\nq\tgone\t1\n"
    scores = details(tmp_path, {"kind": "retrieval"}, **files)
    assert scores["ndcg_at_10"] == round(1 / (1 + 1 / math.log2(3)), 5) and scores["unknown"] == 1
    assert "1 judged documents are not in the corpus" in capsys.readouterr().out


def test_documents_that_a_query_excludes_and_those_that_stand_twice(tmp_path):
    """d2 answers. d1 has the query's words: it comes first, unless the query says that it was made from it."""
    files = dict(corpus=[{"_id": "d1", "text": "red apple"}, {"_id": "d2", "text": "red sea"}] * 2,
                 queries=[{"_id": "q", "text": "red apple"}], qrels="q\td2\t1\n")
    scores = details(tmp_path, {"kind": "retrieval"}, **files)
    assert scores["mrr_at_10"] == scores["map_at_1000"] == 0.5 and scores["repeated"] == 2
    files["queries"][0]["excluded_ids"] = ["d1", "N/A"]
    assert details(tmp_path, {"kind": "retrieval"}, **files)["main_score"] == 1


def test_identical_ids_are_dropped_where_the_task_says_so(tmp_path):
    files = dict(corpus=[{"_id": "q", "text": "red apple"}, {"_id": "d", "text": "red sea"}],
                 queries=[{"_id": "q", "text": "red apple"}], qrels="q\td\t1\n")
    assert details(tmp_path, {"kind": "retrieval"}, **files)["main_score"] == round(1 / math.log2(3), 5)
    assert details(tmp_path, {"kind": "retrieval", "ignore_identical_ids": True}, **files)["main_score"] == 1


def test_chunks_of_the_corpus_do_not_change_the_scores():
    whole, *parts = (run(MINI / "Retrieval", "--corpus-chunk", size)["details"]["Retrieval"]
                     for size in (8192, 7, 100))
    for part in parts:
        assert part["ndcg_at_10"] == whole["ndcg_at_10"] and part["map_at_1000"] == whole["map_at_1000"]


def test_the_mini_benchmark_gives_a_score_for_each_of_the_eight_kinds():
    result = run(MINI)
    assert list(result["categories"]) == list(CATEGORIES.values())
    assert result["average"] == pytest.approx(sum(result["tasks"].values()) / 8)
    assert all(-1 <= score <= 1 for score in result["tasks"].values())
    json.dumps(result, allow_nan=False)


# ---------------------------------------------------------------------- instruction, norm, what is stored

@pytest.mark.parametrize("flag, query, document, candidate", [
    ("released", "p", "", "p"), ("queries", "p", "", ""), ("both", "p", "p", "p"), ("none", "", "", "")])
def test_which_texts_get_the_instruction(tmp_path, flag, query, document, candidate):
    write_task(tmp_path / "R", {"kind": "retrieval", "prompt": "p"}, qrels="q\td\t1\nown\td\t1\n",
               corpus=[{"_id": "d", "text": "doc", "prompt": "no document has its own"}],
               queries=[{"_id": "q", "text": "query", "prompt": None},
                        {"_id": "own", "text": "own", "prompt": "mine"}])
    write_task(tmp_path / "K", {"kind": "reranking", "prompt": "p"},
               test=[{"query": "asked", "positive": ["good"], "negative": ["bad", "bad"]}])
    write_task(tmp_path / "S", {"kind": "sts", "prompt": "p"},
               test=[{"sentence1": "left", "sentence2": "right", "score": 1}] * 2)
    embedder = Recorder()
    run(tmp_path, "--instruct", flag, embedder=embedder)
    words = {"doc", "query", "own", "asked", "good", "bad", "left", "right"}
    assert sorted(pair for pair in embedder.seen if pair[1] in words) == sorted([
        (query, "query"), (query and "mine", "own"), (document, "doc"), (query, "asked"), (candidate, "good"),
        (candidate, "bad"), (query, "left"), (query, "right")])          # each once: distinct texts only


def test_normalisation_follows_the_released_models_scoring():
    for kind, flag, unit in (("sts", "released", True), ("classification", "released", False),
                             ("classification", "always", True), ("sts", "never", False)):
        task = {"name": "", "kind": kind, "prompt": ""}
        [vectors] = encoder("--normalize", flag).embed(task, [{"text": "a b"}], "text")
        assert vectors.norm().item() == pytest.approx(1) if unit else vectors.norm() > 2


def test_documents_are_stored_and_queries_stay_whole():
    """All sides are stored where no side searches the other."""
    row = {"text": "a b", "document": "c d", "query": "e f", "candidates": ["g h"], "sentence1": "i j"}
    scorer = encoder("--quantize", "binary")
    for kind, key, stored in (
            ("retrieval", "text", False), ("retrieval", "document", True), ("reranking", "query", False),
            ("reranking", "candidates", True), ("sts", "sentence1", True)):
        [vectors] = scorer.embed({"name": "", "kind": kind, "prompt": ""}, [row], key)
        assert bool((vectors.abs() == 1).all()) is stored


def test_truncated_and_quantised_vectors_cost_little_quality_on_the_mini_benchmark():
    def scores(*flags):
        return run(MINI / "Retrieval", *flags)["average"], run(MINI / "STS", *flags)["average"]

    full = scores()
    for *flags, most in ("--quantize", "int8", 0.01), ("--quantize", "binary", 0.15), ("--dim", 32, 0.15):
        retrieval, sts = scores(*flags)
        assert abs(retrieval - full[0]) < most and sts != full[1], flags


# ----------------------------------------------------------------------------------------------- the edges

def test_undefined_scores_are_null_and_stay_out_of_the_mean(tmp_path):
    row = {"sentence1": "a", "sentence2": "b", "score": 1}
    write_task(tmp_path / "Constant", {"kind": "sts"}, test=[row, row, row])
    write_task(tmp_path / "Bitext", {"kind": "bitext"}, test=[{"sentence1": "a", "sentence2": "a"}])
    result = run(tmp_path)
    assert result["tasks"] == {"Constant": None, "Bitext": 1.0} and result["average"] == 1.0


def test_parts_of_a_task_count_once(tmp_path):
    for name, other in (("T/de", "a"), ("T/fr", "b"), ("U", "a")):
        rows = [{"sentence1": "a", "sentence2": other}, {"sentence1": "a", "sentence2": "a"}]
        write_task(tmp_path / name, {"name": name, "kind": "bitext"}, test=rows)
    result = run(tmp_path)
    assert list(result["tasks"]) == ["T", "U"]
    assert result["average"] == pytest.approx((result["tasks"]["T"] + result["tasks"]["U"]) / 2)


@pytest.mark.parametrize("kind, metric, known, rows", [
    ("sts", "f1", "sts has cosine_spearman", [{"sentence1": "a", "sentence2": "b", "score": 1}] * 3),
    ("summarization", "skipped", "summarization has cosine_spearman, cosine_spearman_with_p_values",
     [{"human_summaries": ["a"], "machine_summaries": ["b", "c"], "relevance": [1, 2]}] * 2),
    ("clustering", "v_measures", "clustering has v_measure", [{"sentences": ["a"], "labels": [1]}])])
def test_a_metric_that_the_kind_does_not_have_is_refused(kind, metric, known, rows, tmp_path):
    embedder = HashEmbedder()
    with pytest.raises(UserError, match=f"T/task.json: metric '{metric}'; {known}$"):
        details(tmp_path, {"kind": kind, "metric": metric}, embedder, test=rows)
    assert embedder.calls == 0                                            # it shows before anything is embedded


def test_a_metric_of_the_tasks_own_choice_is_the_main_score(tmp_path):
    rows = [{"sentence1": a, "sentence2": b} for a, b in ("aa", "bc", "cb")]
    scores = details(tmp_path, {"kind": "bitext", "metric": "accuracy"}, test=rows)
    assert scores["main_score"] == scores["accuracy"] == pytest.approx(1 / 3)


def test_empty_and_endless_texts_are_scored(tmp_path):
    rows = [{"sentence1": "", "sentence2": "word " * 50_000, "score": i} for i in range(3)]
    rows += [{"sentence1": "a", "sentence2": "a", "score": 9}]
    assert details(tmp_path, {"kind": "sts"}, test=rows)["main_score"] > 0


# --------------------------------------------------------------------------------------------- the command

def test_flags_reach_the_model_and_the_search(tmp_path, monkeypatch):
    loaded, chunks, binaries = [], set(), []

    class Spy(HashEmbedder):
        def encode(self, texts, prompt="", tokens_per_chunk=None, **flags):
            chunks.add(tokens_per_chunk)
            return super().encode(texts, prompt, **flags)

    def search(queries, documents, k, binary, search=metrics.search):
        binaries.append(binary)
        return search(queries, documents, k, binary)

    monkeypatch.setattr(Embedder, "load", lambda path, **flags: loaded.append(flags) or Spy())
    monkeypatch.setattr(metrics, "search", search)
    write_task(tmp_path / "R", {"kind": "retrieval"}, qrels="q\td1\t1\n",
               corpus=[{"_id": f"d{i}", "text": f"{i}"} for i in range(9)],
               queries=[{"_id": "q", "text": "one"}])
    evaluate.main([str(tmp_path), "--tasks", str(tmp_path), "--device", "cpu", "--dtype", "float16",
                   "--pooling", "mean", "--max-length", "33", "--batch-tokens", "77",
                   "--quantize", "none", "binary"])
    assert loaded == [{"device": "cpu", "dtype": "float16", "max_length": 33, "pooling": "mean"}]
    assert chunks == {None, 77} and binaries == [False, True]             # None: the probe


def test_the_second_rank_embeds_its_half_of_a_corpus_that_is_smaller_than_a_chunk():
    task, scorer = mini_task("retrieval"), encoder()
    scorer.rank, scorer.world = 1, 2
    corpus = list(read_rows(task["folder"] / "corpus.jsonl"))
    size = len(corpus)
    [(first, vectors)] = evaluate.embed_corpus(task, scorer, corpus, size)
    assert first == len(vectors) == size // 2


def test_the_estimate_is_the_size_of_the_files(tmp_path, capsys):
    write_task(tmp_path / "S", {"kind": "sts"},
               test=[{"sentence1": "a" * 999, "sentence2": f"b{i}", "score": i} for i in range(1000)])
    run(tmp_path)
    assert "  1 tasks, 1.1 MB, about 0." in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["--dim", -2], "--dim: -2: must be at least 0"),
    (["--corpus-chunk", 0], "--corpus-chunk: 0: must be above 0"),
    (["--names", "a", "b"], "--names: 1 models"),
    (["--instruct", "all"], "--instruct: invalid choice: 'all'"),
    (["--benchmark", "eng-v1"], "--tasks: none of the 8 tasks found is one of eng-v1's")])
def test_flags_that_cannot_be_followed_get_one_line(flags, message, capsys):
    assert message in complaint(capsys, evaluate.main, "no/such/model", "--tasks", MINI, *flags)


def two_tasks(folder) -> None:
    write_task(folder / "A", {"kind": "sts"}, test=pairs("score", [5, 1, 2]))
    write_task(folder / "B", {"kind": "bitext"}, test=[{"sentence1": "a", "sentence2": "b"}])


def test_a_bad_row_of_the_last_task_shows_before_anything_is_embedded(tmp_path, capsys):
    two_tasks(tmp_path)
    with open(tmp_path / "B" / "test.jsonl", "a") as file:
        file.write('{"sentence1": "a"}\n')
    assert "B/test.jsonl:2: 'sentence2' is missing" in complaint(
        capsys, evaluate.main, tmp_path, "--tasks", tmp_path)


def test_a_run_that_was_killed_goes_on_after_the_last_task_that_was_done(tmp_path, monkeypatch, capsys):
    class Killed(Exception):
        pass

    def killed(task, encoder):
        raise Killed

    def scored(*flags):
        """The names of the tasks that a run scores anew."""
        evaluate.main([str(tmp_path), "--tasks", str(tmp_path), "--out", str(out), *flags])
        lines = capsys.readouterr().out.splitlines()
        return [line.split(":")[0].strip() for line in lines if line.startswith("  ") and " s" in line
                and "before" not in line and "tasks," not in line]

    two_tasks(tmp_path)
    out = tmp_path / "out" / "scores.json"
    monkeypatch.setattr(Embedder, "load", lambda path, **flags: HashEmbedder())
    with monkeypatch.context() as patch:
        patch.setitem(evaluate.KINDS, "bitext", killed)
        with pytest.raises(Killed):
            scored()
    capsys.readouterr()
    assert not out.exists() and scored() == ["B"]
    whole = json.loads(out.read_text())
    assert scored() == [] and json.loads(out.read_text()) == whole
    # never a stale score: other settings, another task, another row
    assert scored("--normalize", "never") == scored("--dim", "8") == scored("--instruct", "none") == ["A", "B"]
    monkeypatch.setattr(Embedder, "load", lambda path, **flags: HashEmbedder(48))
    assert scored() == ["A", "B"] and scored() == []
    write_task(tmp_path / "A", {"kind": "sts"}, test=pairs("score", [5, 1, 3]))
    assert scored() == ["A"]
    write_task(tmp_path / "B", {"kind": "bitext", "metric": "accuracy"})
    assert scored() == ["B"]


def test_a_model_that_is_not_there_is_missed_before_any_is_scored(tmp_path, capsys):
    assert "no/such/model: no such model folder" in complaint(
        capsys, evaluate.main, tmp_path, "no/such/model", "--tasks", MINI)


def test_more_values_than_a_vector_has_are_refused_before_the_model_is_loaded(base, capsys):
    assert f"--dim 33: {base}'s vectors hold 32 values" in complaint(
        capsys, evaluate.main, base, "--tasks", MINI, "--dim", 0, 33)


def test_results_that_cannot_be_written_are_refused_before_anything_is_scored(tmp_path, capsys):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for out, message in ((tmp_path, f"{tmp_path}: a folder: name a file in it"),
                         (tmp_path / "file" / "x.json", "file"),
                         (tmp_path / "pipe", "pipe: a device or a pipe: name a file")):
        assert message in complaint(capsys, evaluate.main, tmp_path, "--tasks", MINI, "--out", out)


def test_the_command_prints_one_line_and_exits_with_2():
    command = [sys.executable, "evaluate.py", "no/such/model"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("evaluate.py: no/such/model: ")
