"""tools/study/table.py: scores of a study's runs -> means by category, spread over seeds, a Markdown table.

For tools/study/reproduce.py, which says what the average is.
"""
import statistics

from plumbing.tasks import CATEGORIES as NAMES

CATEGORIES = tuple(name for kind, name in NAMES.items() if kind != "bitext")       # those of the average
COUNTS = "examples", "other languages", "near-duplicates", "contaminated", "kept"   # as clean.py reports
SHORT = {"Classification": "Class", "Clustering": "Clust", "PairClassification": "Pair",
         "Reranking": "Rerank", "Retrieval": "Retr", "Summarization": "Summ", "BitextMining": "Bitext"}
OLD = " †"
EXAMPLES = "number of examples"                      # the group of rows that a picture draws as a curve


def summarize(scores: dict[str, float | None], kinds: dict[str, str]) -> dict[str, float | None]:
    """{"Average", category: mean of its tasks}; the average only where all seven categories have a score."""
    by_category = {}
    for category in NAMES.values():
        known = [score for name, score in scores.items()
                 if NAMES[kinds[name]] == category and score is not None]
        if known:
            by_category[category] = statistics.mean(known)
    means = [by_category[category] for category in CATEGORIES if category in by_category]
    average = statistics.mean(means) if len(means) == len(CATEGORIES) else None
    return {"Average": average, **by_category}


def collect(study: dict, order) -> None:
    """Put the mean and spread over its seeds into each row, its rows in this order."""
    study["rows"] = {name: study["rows"][name] for name in order if name in study["rows"]}
    for row in study["rows"].values():
        runs = [run["summary"] for run in row["runs"].values()]
        row["mean"], row["spread"] = {}, {}
        for key in runs[0]:
            values = [run[key] for run in runs if run.get(key) is not None]
            row["mean"][key] = statistics.mean(values) if values else None
            row["spread"][key] = statistics.stdev(values) if len(values) > 1 else None


def table(study: dict) -> str:
    """The rows, and what cleaning did to the data, in Markdown; scores times 100."""
    columns = ["Average", *CATEGORIES, "BitextMining"]
    common = study["common"]
    lines = [f"Scores times 100 on the subset `{common['subset']}`; ± is the standard deviation over seeds. "
             "Bitext is not in the average.", "",
             "| row | seeds | " + " | ".join(SHORT.get(name, name) for name in columns) + " | model |",
             "|---|--:|" + "--:|" * len(columns) + "---|"]
    for name, row in study["rows"].items():
        cells = []
        for key in columns:
            mean, spread = row["mean"].get(key), row["spread"].get(key)
            plus_minus = "" if spread is None else f" ±{100 * spread:.1f}"
            cells.append("-" if mean is None else f"{100 * mean:.1f}{plus_minus}")
        runs = list(row["runs"].values())
        stale = any(run["settings"]["common"].items() - common.items() for run in runs)
        models = "`" + "`, `".join(run["model"] for run in runs) + "`"
        cells = [f"{row['what']} (`{name}`){OLD * stale}", str(len(runs)), *cells, models]
        lines.append(f"| {' | '.join(cells)} |")
    if any(OLD in line for line in lines):
        lines += ["", f"{OLD} made with other settings than the last run's: run it again to compare."]
    language = f"; synthetic examples in {common['language']} alone" if common["language"] else ""
    lines += ["", f"Recipe: `{common['recipe']}`{language}", "",
              "| training data | read | in other languages | near-duplicates | in a test set | kept |",
              "|---|--:|--:|--:|--:|--:|"]
    lines += [f"| {name} | " + " | ".join(str(info.get(key, 0)) for key in COUNTS) + " |"
              for name, info in study["data"].items()]
    return "\n".join(lines) + "\n"
