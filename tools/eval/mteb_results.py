"""tools/eval/mteb_results.py: evaluate.py's JSON -> result files in MTEB's own format.

    python -m tools.eval.mteb_results results/demo.json --name me --revision 1 --out results/mteb
    python -m tools.eval.mteb_results results/demo.json --model trained --name me/my-model

The first makes me/base and me/trained of the two models that `make eval` scores. OUT/results/NAME/REVISION
has a file for each task, where mteb finds them:

    mteb.ResultCache("results/mteb").load_results(include_remote=False)

Scores are evaluate.py's; `mteb_version` says so.
"""
import argparse
from pathlib import Path

from plumbing.errors import Parser, check, command
from plumbing.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
COUNTS = ("seconds", "texts", "cut", "skipped", "unknown", "repeated")

# mteb reads no results of a model without these; None: not known
META = {
    "loader": None, "release_date": None, "languages": None, "n_parameters": None,
    "memory_usage_mb": None, "max_tokens": None, "embed_dim": None, "license": None,
    "open_weights": None, "public_training_code": None, "public_training_data": None,
    "framework": ["PyTorch"], "similarity_fn_name": "cosine", "use_instructions": True,
    "training_datasets": None, "modalities": ["text"],
}


def task_result(name: str, parts: dict[str, dict], table: dict) -> dict:
    """MTEB's TaskResult of one task: `parts` maps a subset ("default" if there are none) to its scores."""
    task = table.get(name, {})
    scores, seconds = [], sum(detail.get("seconds", 0) for detail in parts.values())
    for subset, detail in parts.items():
        values = {metric: value for metric, value in detail.items()
                  if isinstance(value, (int, float)) and metric not in COUNTS}
        part = task.get("parts", {}).get(subset, {})
        languages = part.get("languages", ["eng-Latn"] if task else ["und-Zyyy"])        # und: unknown
        scores.append({**values, "hf_subset": subset, "languages": languages})
    holder = next(iter(task["parts"].values())) if "parts" in task else task
    revision = holder.get("revision", "local")
    return {"dataset_revision": revision, "task_name": name, "mteb_version": "plain-e5",
            "scores": {task.get("split", "test"): scores}, "evaluation_time": seconds,
            "kg_co2_emissions": None}


def write(results: dict, names: dict[str, str], revision: str, out: Path) -> list[Path]:
    """Write every task of every model; names: model in the JSON -> "organisation/model"."""
    table = read_json(ROOT / "prompts" / "tasks.json")["tasks"]
    forums, files = table.pop("CQADupstackRetrieval"), []
    own = {}                                      # our name of a forum: MTEB's, to which it is a task
    for part, more in forums.pop("parts").items():
        own[f"CQADupstackRetrieval/{part}"] = name = f"CQADupstack{part.capitalize()}Retrieval"
        table[name] = {**forums, **more}
    for model, result in results.items():
        folder = out / "results" / names[model].replace("/", "__") / revision
        write_json(folder / "model_meta.json", {**META, "name": names[model], "revision": revision})
        tasks = {}
        for name, scores in result["details"].items():
            task, _, part = own.get(name, name).partition("/")
            subset = part or table.get(task, {}).get("subset", "default")
            if scores["main_score"] is not None:
                tasks.setdefault(task, {})[subset] = scores
        for name, parts in tasks.items():
            files.append(folder / f"{name}.json")
            write_json(files[-1], task_result(name, parts, table))
    return files


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw)
    parser.add_argument("results", type=Path, help="what evaluate.py wrote with --out")
    parser.add_argument("--name", default="plain-e5", help="an organisation, or organisation/model")
    parser.add_argument("--revision", default="no_revision")
    parser.add_argument("--out", type=Path, default=Path("results/mteb"))
    parser.add_argument("--model", help="one of the models in it (default: all)")
    args = parser.parse_args(argv)
    results = read_json(args.results)
    check(all(isinstance(result, dict) and "details" in result for result in results.values()),
          f"{args.results}: not what evaluate.py writes with --out")
    if args.model:
        check(args.model in results, f"--model {args.model}: {args.results} has {', '.join(results)}")
        results = {args.model: results[args.model]}
    whole = "/" in args.name
    check(not whole or len(results) < 2,
          f"--name {args.name}: {len(results)} models in {args.results}; choose one by --model, or name an "
          "organisation")
    names = {model: args.name if whole else f"{args.name}/{model}" for model in results}
    print(f"{len(write(results, names, args.revision, args.out))} result files in {args.out}")


if __name__ == "__main__":
    command(main)
