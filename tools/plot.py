"""tools/plot.py: pictures of a training, of the data and of scores.

    python tools/plot.py train runs/demo            # -> runs/demo/log.png; several runs share the axes
    python tools/plot.py data data/synthetic/report.json   # -> report.png beside it
    python tools/plot.py scores results/*.json      # -> scores.png, categories of every model
    python tools/plot.py study results/study.json   # -> study.png beside it, the rows of the study

--out names another file; its ending (.png, .svg, .pdf) decides the format. No display is needed.
"""
import math
import sys
from pathlib import Path

try:
    import matplotlib
    matplotlib.use("Agg")                               # draw into files, also where there is no display
    import matplotlib.pyplot as plt
except ImportError:
    plt = None                                          # main says so

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run by path, it looks in tools/ alone

from plumbing.errors import Parser, blame, bounded, check, command
from plumbing.files import read_json, read_jsonl, replace_file
from tools.study.table import EXAMPLES

STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
         "axes.axisbelow": True, "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}
LANGUAGES = 15                                          # by name; the rest are summed up
FORMATS = (".png", ".svg", ".pdf")


def read_log(run: Path) -> dict[str, list]:
    """log.jsonl -> {"step": [...], "loss": [...], ...}; None where a step lacks a value (held out)."""
    path = run / "log.jsonl" if run.is_dir() else run
    check(path.is_file(), f"{path}: no such file (`make train` writes runs/NAME/log.jsonl)")
    lines = list(read_jsonl(path))
    check(lines, f"{path}: no step is done yet")
    for number, line in enumerate(lines, 1):
        check({"step", "loss"} <= line.keys(), f"{path}:{number}: not a line of train.py's log")
    keys = {key for line in lines for key in line}
    return {key: [line.get(key) for line in lines] for key in keys}


def smooth(values: list[float], window: int) -> list[float]:
    """Mean over the last `window` values, fewer at the start.

    >>> smooth([1, 3, 5, 7], 2)
    [1.0, 2.0, 4.0, 6.0]
    """
    return [sum(values[max(0, i + 1 - window):i + 1]) / min(i + 1, window) for i in range(len(values))]


def draw_train(args):
    """Loss with chance level, accuracy, spread, learning rate: one panel each, one colour a run."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.2), sharex=True, layout="constrained")
    panels = dict(zip(("loss", "accuracy", "spread", "lr"), axes.flat))
    titles = {"loss": "Loss", "accuracy": "In-batch accuracy: own positive above every other document",
              "spread": "Spread of the vectors: 1 - |mean|²; 0 is collapse", "lr": "Learning rate"}
    for number, run in enumerate(args.files):
        log, colour = read_log(run), f"C{number}"
        name = run.name if run.is_dir() else run.parent.name
        window = max(1, len(log["step"]) // 20)
        for key, axis in panels.items():
            values = log.get(key)
            if values is None:
                continue
            if key == "lr" or window == 1:
                axis.plot(log["step"], values, color=colour, label=name)
            else:
                axis.plot(log["step"], values, color=colour, alpha=0.25, linewidth=0.8)
                axis.plot(log["step"], smooth(values, window), color=colour,
                          label=f"{name}, mean of {window} steps")
            held = [(step, v) for step, v in zip(log["step"], log.get(f"eval_{key}", [])) if v is not None]
            if held:
                axis.plot(*zip(*held), "o--", color=colour, markersize=4, label=f"{name}, held out")
        if "chance_loss" in log:
            panels["loss"].plot(log["step"], log["chance_loss"], ":", color=colour, label=f"{name}, chance")
    for key, axis in panels.items():
        axis.set_title(titles[key])
        if key == "lr":
            axis.yaxis.set_major_formatter("{x:.1e}")
        axis.set_ylim(bottom=0, top=1.02 if key == "accuracy" else None)
        axis.margins(x=0.01)
    panels["loss"].legend(frameon=False, fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    return figure


def bars(axis, counts: dict[str, float], title: str, form="{:,.0f}", colour="C0") -> None:
    """Horizontal bars, the first on top, each with its value."""
    drawn = axis.barh(list(counts), list(counts.values()), color=colour)
    axis.bar_label(drawn, [form.format(value) for value in counts.values()], padding=3, fontsize=8)
    axis.set_ylim(max(len(counts), 6) - 0.4, -0.6)      # few bars stay as thin as many
    axis.margins(x=0.18)
    axis.grid(False)
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    axis.set_title(title)


def draw_data(args):
    """Types, languages, what was dropped and why, and lengths by type and field."""
    path = args.files[0]
    check(len(args.files) == 1, f"plot.py data: takes one report.json, not {len(args.files)}")
    report = read_json(path)
    check({"examples", "type", "language", "characters"} <= report.keys(),
          f"{path}: not a report of generate.py (--report writes it)")
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    figure.suptitle(f"{report['examples']:,} examples, {report['distinct prompts']:,} instructions, "
                    f"{len(report['language']):,} languages", x=0.01, ha="left")
    bars(axes[0, 0], report["type"], "Examples by task type")
    languages = dict(list(report["language"].items())[:LANGUAGES])
    others = list(report["language"].values())[LANGUAGES:]
    if others:
        languages[f"{len(others)} others"] = sum(others)
    bars(axes[0, 1], languages, "Examples by language")
    dropped = report.get("dropped") or {"nothing": 0}
    bars(axes[1, 0], dropped, "Dropped answers, by reason", colour="C3")
    axis, lengths = axes[1, 1], report["characters"]
    for row, quantiles in enumerate(lengths.values()):
        low, middle, high = (max(1, quantiles[q]) for q in ("p10", "p50", "p90"))
        axis.plot((low, high), (row, row), color="C0", linewidth=4, alpha=0.35, solid_capstyle="butt")
        axis.plot(middle, row, "o", color="C0", markersize=5)
    axis.set_yticks(range(len(lengths)), list(lengths))
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_title("Characters a text: 10 % to 90 %, and the median")
    return figure


def draw_scores(args):
    """Grouped bars: each category and the average, one colour a model."""
    models = {}
    for path in args.files:
        for name, result in read_json(path).items():
            check(isinstance(result, dict) and {"average", "categories"} <= result.keys(),
                  f"{path}: not a result of evaluate.py (--out writes it)")
            models[name if name not in models else f"{name} ({path.stem})"] = result
    check(models, f"{args.files[0]}: holds no model")
    categories = list(dict.fromkeys(name for result in models.values() for name in result["categories"]))
    groups = [*categories, "Average"]
    figure, axis = plt.subplots(figsize=(max(6, 1 + len(groups) * (0.4 + 0.35 * len(models))), 3.6),
                                layout="constrained")
    width = 0.85 / len(models)
    lowest = 0
    for number, (name, result) in enumerate(models.items()):
        scores = [result["categories"].get(category) for category in categories] + [result["average"]]
        places = [group + (number - (len(models) - 1) / 2) * width for group in range(len(groups))]
        drawn = axis.bar(places, [100 * (score or 0) for score in scores], 0.94 * width, label=name)
        labels = ["-" if score is None else f"{100 * score:.1f}" for score in scores]
        axis.bar_label(drawn, labels, fontsize=8, padding=2)               # of a negative bar, below it
        lowest = min(lowest, *(100 * (score or 0) for score in scores))
    axis.set_xticks(range(len(groups)), [group.replace(" ", "\n", 1) for group in groups])
    axis.axvline(len(categories) - 0.5, color="0.8", linewidth=1)
    axis.grid(axis="x", visible=False)
    axis.axhline(0, color="0.3", linewidth=0.8)
    axis.margins(x=0.02)
    axis.set_yticks(range(20 * math.floor(lowest / 20), 101, 20))
    axis.set_ylim(lowest - 10 if lowest < 0 else 0, 112)
    axis.set_title("Scores by category, times 100")
    axis.legend(frameon=False, ncols=4, loc="upper left", fontsize=8)
    return figure


def draw_study(args):
    """The rows' averages as bars, in groups, and below them the average by the number of examples."""
    path = args.files[0]
    check(len(args.files) == 1, f"plot.py study: takes one study.json, not {len(args.files)}")
    study = read_json(path)
    rows = study.get("rows")
    check(rows and all(isinstance(row, dict) and {"mean", "spread", "what"} <= row.keys()
                       for row in rows.values()),
          f"{path}: not a result of tools/study/reproduce.py")
    scored = {name: row for name, row in rows.items() if row["mean"].get("Average") is not None}
    check(scored, f"{path}: no row has a score in each of the seven categories, and so an average")
    by_number = {name: row for name, row in scored.items() if row.get("group") == EXAMPLES}
    barred = {name: row for name, row in scored.items() if name not in by_number and name != "minilm"}
    heights = [0.8 + 0.26 * len(barred), 2.6 if by_number else 0]
    panels = 2 if by_number else 1
    figure, axes = plt.subplots(panels, 1, figsize=(8.5, 0.7 + sum(heights)), squeeze=False,
                                height_ratios=heights[:panels], layout="constrained")
    axes = axes[:, 0]
    subset = (study.get("common") or {}).get("subset", "all")
    figure.suptitle(f"Average of MTEB's seven categories, times 100, on the study's subset: {subset}\n"
                    "Lines on bars: one standard deviation over seeds, either way. *: one run, so none",
                    x=0.01, ha="left", fontsize=9)
    draw_rows(axes[0], barred)
    if by_number:
        draw_by_number(axes[1], by_number, scored)
    for axis, line in zip(axes, ("axvline", "axhline")):
        if "minilm" in scored:
            value = 100 * scored["minilm"]["mean"]["Average"]
            getattr(axis, line)(value, color="C3", linestyle="--", linewidth=1)
            corner = {"axvline": (value, 1.01), "axhline": (0.005, value)}[line]
            where = axis.get_xaxis_transform() if line == "axvline" else axis.get_yaxis_transform()
            side = "right" if line == "axvline" else "left"
            axis.annotate(f"all-MiniLM-L6-v2 {value:.1f}", corner, (0, 3), xycoords=where, color="C3",
                          textcoords="offset points", fontsize=8, ha=side)
    return figure


def average(row: dict) -> tuple[float, float]:
    """(average, standard deviation over seeds) of a row of the study, times 100."""
    return 100 * row["mean"]["Average"], 100 * (row["spread"].get("Average") or 0)


def draw_rows(axis, rows: dict[str, dict]) -> None:
    """A bar a row, one colour and a gap for each group of rows that are compared."""
    groups = list(dict.fromkeys(row.get("group", "") for row in rows.values()))
    rows = sorted(rows.values(), key=lambda row: groups.index(row.get("group", "")))   # a group's together
    group_of = [groups.index(row.get("group", "")) for row in rows]
    places = [number + 0.5 * group for number, group in enumerate(group_of)]
    values = [average(row) for row in rows]
    colours = [f"C{group % 10}" for group in group_of]
    axis.barh(places, [mean for mean, _ in values], color=colours, alpha=0.75)
    for place, (mean, spread), row in zip(places, values, rows):
        if spread:
            axis.errorbar(mean, place, xerr=spread, color="0.2", linewidth=1, capsize=2)
        trained = len(row.get("runs", ())) == 1 and row.get("examples")
        axis.annotate(f"{mean:.1f}{' *' if trained else ''}", (max(mean, 0) + spread, place), (4, 0),
                      textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(places, [row["what"] for row in rows], fontsize=8)
    axis.invert_yaxis()                                 # the first row on top
    axis.set_xlim(min(0, *(mean for mean, _ in values)), 80)
    axis.grid(axis="y", visible=False)
    axis.tick_params(left=False)


def draw_by_number(axis, rows: dict[str, dict], scored: dict[str, dict]) -> None:
    """Two curves over the number of examples: at the same number of steps, and at two epochs."""
    everything = {"steps": scored.get("synthetic"), "epochs": None}
    for number, (kind, label) in enumerate((("steps", "as many steps"), ("epochs", "two epochs"))):
        chosen = [row for name, row in rows.items() if name.startswith(kind)]
        chosen += [row for row in [everything[kind]] if row]
        if chosen:
            counts = [row["examples"] for row in chosen]
            values = [average(row) for row in chosen]
            axis.errorbar(counts, [mean for mean, _ in values], [spread for _, spread in values],
                          marker="o", color=f"C{number}", capsize=2, label=label)
    counts = sorted({row["examples"] for row in [*rows.values(), scored.get("synthetic")] if row})
    axis.set_xscale("log")
    axis.set_xticks(counts, [f"{count:,}" for count in counts])
    axis.minorticks_off()
    axis.set_title("How many synthetic examples does it take?")
    axis.set_xlabel("synthetic examples")
    axis.legend(frameon=False, loc="lower right", fontsize=8)


DRAW = {"train": (draw_train, "runs, or their log.jsonl"), "data": (draw_data, "report.json of generate.py"),
        "scores": (draw_scores, "JSON files of evaluate.py"),
        "study": (draw_study, "study.json of tools.study.reproduce")}


def default_out(args) -> Path:
    first = args.files[0]
    if args.what == "scores":
        return Path("scores.png")
    return first / "log.png" if first.is_dir() else first.with_suffix(".png")


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="what", required=True)
    for what, (_, files) in DRAW.items():
        sub = verbs.add_parser(what, help=files)
        sub.add_argument("files", nargs="+", type=Path, help=files)
        sub.add_argument("--out", type=Path, help="the picture")
        sub.add_argument("--dpi", type=bounded(int, lambda dpi: 0 < dpi <= 1200, "1 to 1200"), default=120)
    args = parser.parse_args(argv)
    check(plt, "no matplotlib: `pip install -r requirements-dev.txt` brings it")
    out = args.out or default_out(args)
    check(out.suffix in FORMATS, f"--out {out}: a name that ends in {', '.join(FORMATS)}")
    try:
        with plt.rc_context(STYLE):
            draw, files = DRAW[args.what]
            with blame(", ".join(map(str, args.files)), f"plot.py {args.what} draws {files}"):
                figure = draw(args)
            replace_file(out, lambda path: figure.savefig(path, dpi=args.dpi, format=out.suffix[1:]))
        print(out)
    finally:
        plt.close("all")


if __name__ == "__main__":
    command(main)
