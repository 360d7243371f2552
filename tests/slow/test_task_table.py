"""prompts/tasks.json beside mteb's own metadata."""
from plumbing.files import read_json
from plumbing.tasks import CATEGORIES
from scripts import ROOT

TABLE = read_json(ROOT / "prompts" / "tasks.json")
OWN_PROMPTS = {  # where the released model was scored with other words than mteb has
    "CQADupstackRetrieval": "Given a question, retrieve detailed question descriptions from Stackexchange "
                            "that are duplicates to the given question",
    "SummEval": "Given a news summary, retrieve other semantically similar summaries",
    # newer samples of a task keep its instruction
    **{name: TABLE["tasks"][older]["prompt"] for name, older in {
        "ArXivHierarchicalClusteringP2P": "ArxivClusteringP2P",
        "ArXivHierarchicalClusteringS2S": "ArxivClusteringS2S", "ClimateFEVERHardNegatives": "ClimateFEVER",
        "CQADupstackGamingRetrieval": "CQADupstackRetrieval", "CQADupstackUnixRetrieval": "CQADupstackRetrieval",
        "FEVERHardNegatives": "FEVER", "HotpotQAHardNegatives": "HotpotQA", "STS22.v2": "STS22",
        "SummEvalSummarization.v2": "SummEval", "Touche2020Retrieval.v3": "Touche2020"}.items()},
}
OWN_METRICS = {  # MTEB (eng, v1) has the plain mean average precision, and a SummEval that averages p-values
    "reranking": "map", "summarization": "cosine_spearman_with_p_values",
}


def test_the_table_says_what_mtebs_metadata_says(monkeypatch):
    """Each of the 201 tasks and parts; the package holds the metadata, so nothing is downloaded."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import mteb
    for name, task in TABLE["tasks"].items():
        for part, more in task.get("parts", {"": {}}).items():
            ours, forum = {**task, **more}, name == "CQADupstackRetrieval"
            theirs = mteb.get_task(f"CQADupstack{part.capitalize()}Retrieval" if forum else name)
            described, prompt = theirs.metadata, theirs.metadata.prompt or theirs.abstask_prompt
            prompt = prompt["query"] if isinstance(prompt, dict) else prompt
            wanted = {
                "hub": described.dataset["path"], "revision": described.dataset["revision"],
                "metric": OWN_METRICS.get(task["kind"], described.main_score) if name != "SummEvalSummarization.v2"
                else described.main_score,
                "prompt": OWN_PROMPTS.get(name, prompt),
                "samples_per_label": getattr(theirs, "samples_per_label", None),
                "ignore_identical_ids": getattr(theirs, "ignore_identical_ids", False),
                "bootstraps": getattr(theirs, "n_clusters", None),
            }
            found = {"samples_per_label": None, "ignore_identical_ids": False, "bootstraps": None, **ours}
            assert {key: found[key] for key in wanted} == wanted, (name, part)
            assert ours["split"] == described.eval_splits[-1], name              # some have validation before
            assert CATEGORIES[ours["kind"]] == described.type, name
            subset = ours.get("subset", "default")
            assert subset in described.hf_subsets, (name, part)
            languages = described.hf_subsets_to_langscripts[subset]
            assert ours.get("languages", ["eng-Latn"]) == languages, (name, part)
