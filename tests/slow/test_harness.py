"""Our scores beside the mteb package's own, on the same vectors: data/mini, EVALDATA, and edge cases."""
import json
import math
import shutil
from collections import Counter

import pytest

import evaluate
from model import Embedder, instruct
from plumbing.cache import PROBE
from plumbing.tasks import find_tasks, read_qrels, read_rows, read_test
from scoring import EVALDATA, MINI, ROOT, HashEmbedder, Recorder, encoder, mini_task, write_task

TABLE = json.loads((ROOT / "prompts" / "tasks.json").read_text(encoding="utf-8"))["tasks"]


def mteb_task(name: str, task: dict, rows):
    """mteb's own task object, holding our data as if it had been downloaded."""
    import mteb
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    harness = mteb.get_tasks(tasks=[name])[0]
    subset, kind = harness.hf_subsets[0], task["kind"]
    split = harness.metadata.eval_splits[0]
    harness.metadata.eval_splits, harness.data_loaded, harness.hf_subsets = [split], True, [subset]
    if kind == "classification":
        train = list(read_rows(task["folder"] / "train.jsonl"))
        harness.samples_per_label = task["samples_per_label"]
        data = DatasetDict({"train": Dataset.from_list(train), split: Dataset.from_list(rows)})
    elif kind == "pair-classification":
        columns = {new: [row[old] for row in rows] for new, old in
                   (("sentence1", "sentence1"), ("sentence2", "sentence2"), ("labels", "label"))}
        data = DatasetDict({split: Dataset.from_dict(columns)})
    elif kind == "retrieval":
        corpus = [{"id": row["_id"], "title": row["title"], "text": row["text"]}
                  for row in read_rows(task["folder"] / "corpus.jsonl")]
        qrels = read_qrels(task["folder"] / "qrels" / f"{task['split']}.tsv")
        queries = [{"id": row["_id"], "text": row["text"]}
                   for row in read_rows(task["folder"] / "queries.jsonl") if row["_id"] in qrels]
        data = {
            split: RetrievalSplitData(
                corpus=Dataset.from_list(corpus),
                queries=Dataset.from_list(queries),
                relevant_docs=qrels,
                top_ranked=None,
            )
        }
    elif name == "MindSmallReranking":            # each query is a list: mteb merges those that share a stem
        corpus, queries, qrels, top = [], [], {}, {}
        for q, row in enumerate(rows):
            sides = (("negative", row["negative"], 0), ("apositive", row["positive"], 1))
            texts = {f"{side}_{q}_{i:05}": (text, grade) for side, candidates, grade in sides
                     for i, text in enumerate(candidates)}
            corpus += [{"id": i, "title": "", "text": text} for i, (text, _) in texts.items()]
            for n, text in enumerate(row["query"]):
                queries.append({"id": f"q{q}_{n}", "text": text})
                top[f"q{q}_{n}"] = list(texts)
                qrels[f"q{q}_{n}"] = {i: grade for i, (_, grade) in texts.items()}
        data = {split: RetrievalSplitData(corpus=Dataset.from_list(corpus),
                                          queries=Dataset.from_list(queries),
                                          relevant_docs=qrels, top_ranked=top)}
    elif kind == "reranking":                     # mteb's own conversion, which drops one-sided rows
        from mteb.abstasks.text import reranking
        old = type(name, (reranking.AbsTaskReranking,), {"metadata": harness.metadata})()
        old.hf_subsets = [subset]
        reranking.OLD_FORMAT_RERANKING_TASKS.append(name)
        old.transform_old_dataset_format(DatasetDict({split: Dataset.from_list(rows)}))
        return old, subset
    else:
        data = DatasetDict({split: Dataset.from_list(rows)})
    harness.dataset = (
        data if subset == "default" and kind not in ("retrieval", "reranking") else {subset: data}
    )
    return harness, subset


HARNESS = {  # kind -> an mteb task that scores as MTEB (eng, v1) does; how far ours may lie off
    "sts": ("STSBenchmark", 1e-9), "pair-classification": ("TwitterURLCorpus", 1e-9),
    "reranking": ("AskUbuntuDupQuestions", 1e-9), "retrieval": ("SciFact", 1e-9),
    "summarization": ("SummEval", 1e-9), "bitext": ("Tatoeba", 1e-9),
    "classification": ("Banking77Classification", 2e-3), "clustering": ("TwentyNewsgroupsClustering", 1e-9),
}


def compare(task: dict, name: str, model, monkeypatch, other=None, tolerance=None) -> None:
    """Score a task with our code and, through the adapter, as mteb's task `name`: the same."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import mteb
    from tools.eval.mteb_adapter import MTEBModel
    kind = task["kind"]
    score_kind = evaluate.KINDS[kind]
    ours = score_kind(task, encoder(embedder=model))
    rows = [] if kind == "retrieval" else read_test(task)
    harness, _ = mteb_task(name, task, rows)

    result = mteb.evaluate(MTEBModel(other or model), [harness], cache=None, show_progress_bar=False)
    theirs = result.task_results[0].scores[harness.metadata.eval_splits[0]][0]
    tolerance = tolerance or HARNESS[kind][1]
    metrics_ = {"sts": ["cosine_spearman"], "retrieval": ["ndcg_at_10", "mrr_at_10", "recall_at_100", "map_at_1000"],
                "pair-classification": ["cosine_ap", "dot_ap", "euclidean_ap", "manhattan_ap", "max_ap"],
                "bitext": ["f1", "accuracy"]}.get(kind, [])
    main = "cosine_spearman_with_p_values" if name == "SummEval" else next(iter(ours))
    print(f"{task['name']}: ours {ours[main]:.9f}, mteb {theirs['main_score']:.9f}")
    for metric in metrics_:
        assert ours[metric] == pytest.approx(theirs[metric], abs=tolerance, nan_ok=True), metric
    assert ours[main] == pytest.approx(theirs["main_score"], abs=tolerance, nan_ok=True)


def harness_tasks():
    """data/mini, and what stands in EVALDATA: of a task with parts (languages) the first three."""
    tasks, parts = find_tasks([str(MINI)]), Counter()
    for task in find_tasks([str(EVALDATA)]) if EVALDATA.is_dir() else ():
        name = task["name"].split("/")[0]
        parts[name] += 1
        whole = task["kind"] != "retrieval" or (task["folder"] / "corpus.jsonl").exists()
        if whole and parts[name] <= 3:
            tasks.append(task)
    return tasks


@pytest.mark.parametrize("task", harness_tasks(), ids=lambda task: task["name"])
def test_scores_equal_mtebs_on_the_same_vectors(task, monkeypatch):
    compare(task, HARNESS[task["kind"]][0], HashEmbedder(), monkeypatch)
    if task["kind"] == "summarization":
        compare(task, "SummEvalSummarization.v2", HashEmbedder(), monkeypatch)


class Prompted(Recorder):
    """A text's vector depends on its instruction too."""

    def encode(self, texts, prompt="", **flags):
        super().encode(texts, prompt)
        prompts = [prompt] * len(texts) if isinstance(prompt, str) else prompt
        return HashEmbedder.encode(self, [f"{p} {text}" for p, text in zip(prompts, texts)], **flags)


@pytest.mark.parametrize("kind", HARNESS)
def test_the_same_texts_get_the_same_instructions_as_through_the_adapter(kind, tmp_path, monkeypatch):
    """prompts/tasks.json against mteb's metadata, and which sides get them."""
    name = HARNESS[kind][0]
    folder = tmp_path / "T"
    shutil.copytree(mini_task(kind)["folder"], folder)
    for path in folder.glob("*.jsonl"):              # no row has an instruction of its own
        rows = [{**row, "prompt": None} for row in read_rows(path)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [task] = find_tasks([str(folder)])
    ours, theirs = Prompted(), Prompted()
    # No regression on such vectors comes to its end in 100 steps; by then two machines' roundings lie apart.
    tolerance = 0.01 if kind == "classification" else None
    compare({**task, "prompt": TABLE[name]["prompt"]}, name, ours, monkeypatch, theirs, tolerance)
    assert {pair for pair in ours.seen if pair[1] not in PROBE} == set(theirs.seen)


PAIR = {"sentence1": "red apple", "sentence2": "red sea"}
EDGES = {  # what mteb does with ties, constants and gaps; the name of its task
    "constant-scores": ("STSBenchmark", {"kind": "sts"}, {"test": [{**PAIR, "score": 1}] * 3}),
    "empty-text": ("STSBenchmark", {"kind": "sts"}, {"test": [
        {**PAIR, "score": 1}, {"sentence1": "", "sentence2": "x", "score": 2}, {**PAIR, "score": 3},
        {"sentence1": "a b", "sentence2": "b a", "score": 4}]}),
    "all-pairs-alike": ("TwitterURLCorpus", {"kind": "pair-classification"}, {"test": [
        {**PAIR, "label": 1}, {**PAIR, "label": 0}, {"sentence1": "a", "sentence2": "a", "label": 1}]}),
    "no-pair-alike": ("TwitterURLCorpus", {"kind": "pair-classification"}, {"test": [
        {**PAIR, "label": 0}] * 2}),
    "zero-grades": ("SciFact", {"kind": "retrieval"}, {
        "corpus": [{"_id": "d", "title": "", "text": "red"}, {"_id": "e", "title": "Sea", "text": ""},
                   {"_id": "f", "title": "", "text": "red"}, {"_id": "g", "title": "", "text": ""}],
        "queries": [{"_id": "q", "text": "red"}, {"_id": "none", "text": "sea"},
                    {"_id": "gone", "text": "blue"}],
        "qrels": "q\td\t1\nq\tlost\t2\nnone\td\t0\nnone\te\t0\ngone\tlost\t1\n"}),
    "identical-ids": ("ArguAna", {"kind": "retrieval", "ignore_identical_ids": True}, {
        "corpus": [{"_id": "q", "title": "", "text": "red"}, {"_id": "d", "title": "", "text": "red sea"}],
        "queries": [{"_id": "q", "text": "red"}], "qrels": "q\td\t1\n"}),
    "one-sided-rows": ("AskUbuntuDupQuestions", {"kind": "reranking"}, {"test": [
        {"query": "red", "positive": ["red", "sea"], "negative": ["red", "blue"]},
        {"query": "red", "positive": ["red"], "negative": []},
        {"query": "x", "positive": [], "negative": ["x"]}]}),
    "sub-queries": ("MindSmallReranking", {"kind": "reranking"}, {"test": [
        {"query": ["night", "red apple"], "positive": ["red apple"], "negative": ["sea", "night sky"]},
        {"query": ["sea"], "positive": ["red", "sea"], "negative": ["sea", "blue sea"]}]}),
    "constant-ratings": ("SummEval", {"kind": "summarization"}, {"test": [
        {"text": "t", "human_summaries": ["red sea"], "machine_summaries": ["red", "sea", "red", "x y"],
         "relevance": ratings} for ratings in ([1, 2, 3, 4], [2, 2, 2, 2], [4, 1, 1, 3])]}),
    "equal-sides": ("Tatoeba", {"kind": "bitext"}, {"test": [
        {"sentence1": "a", "sentence2": "a"}, {"sentence1": "a", "sentence2": "a"},
        {"sentence1": "b", "sentence2": "c"}]}),
    "one-label": ("TwentyNewsgroupsClustering", {"kind": "clustering"}, {"test": [
        {"sentences": ["a", "b", "a"], "labels": ["x", "x", "x"]},
        {"sentences": ["a", "a", "b", "b"], "labels": ["x", "x", "y", "y"]}]}),
}


@pytest.mark.parametrize("case", EDGES)
def test_edge_cases_score_as_in_mteb(case, tmp_path, monkeypatch):
    name, task, files = EDGES[case]
    made, = find_tasks([str(write_task(tmp_path / case, task, **files))])
    compare(made, name, HashEmbedder(), monkeypatch)


def test_mtebs_mock_run_passes_on_a_real_model(smollm2, monkeypatch):
    """Each of mteb's mock tasks for texts, with real weights and tokenizer; a failed one is no TaskResult."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import mteb
    from mteb.mocks.mock_run import mock_run
    from tools.eval.mteb_adapter import MTEBModel
    results = mock_run(MTEBModel(Embedder.load(smollm2, device="cpu", max_length=64)))
    states = {name: state for name, state in results.task_results.items() if state is not None}
    failed = [name for name, state in states.items() if not isinstance(state, mteb.results.TaskResult)]
    assert len(states) >= 25 and failed == []
    assert all(math.isfinite(state.get_score()) for state in states.values())


def test_mteb_gives_an_exported_folder_its_prompts(smollm2, tmp_path, monkeypatch):
    """`query` to retrieval's queries; to STS the prompt of its type, which other kinds go without."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import mteb
    from mteb.mocks import ALL_MOCK_TASK_TEST_GRID
    from sentence_transformers import SentenceTransformer
    from tools.models import export
    export.main([str(smollm2), str(tmp_path / "out"), "--prompt", "STS=Retrieve semantically similar text."])
    prompts = set()
    encode = SentenceTransformer.encode

    def recorded(self, *texts, **settings):
        prompts.add(settings.get("prompt") or "")
        return encode(self, *texts, **settings)
    monkeypatch.setattr(SentenceTransformer, "encode", recorded)
    tasks = [task for task in ALL_MOCK_TASK_TEST_GRID if task.metadata.name in ("MockRetrievalTask", "MockSTSTask")]
    results = mteb.evaluate(SentenceTransformer(str(tmp_path / "out"), device="cpu"), tasks, cache=None)
    assert len(results.task_results) == 2 and not results.exceptions
    assert prompts == {"", instruct("Retrieve semantically similar text.", ""),
                       instruct(export.QUERY.partition("=")[2], "")}
