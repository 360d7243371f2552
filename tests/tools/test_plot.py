"""tools/plot.py: the pictures show what the files say."""
import argparse
import json

import matplotlib.image
import pytest
from matplotlib.container import ErrorbarContainer

from scripts import complaint
from tools import plot

REPORT = {"examples": 30, "distinct prompts": 4, "type": {"sts": 20, "bitext": 10},
          "dropped": {"duplicate": 3}, "language": {f"language {i}": 30 - i for i in range(18)},
          "characters": {"sts query": {"p10": 5, "p50": 50, "p90": 500}}}


def result(average, **categories):
    return {"average": average, "categories": categories, "tasks": {}, "details": {}}


def study_row(what, average, spread=None, group="others", examples=0):
    runs = {"0": {}} if spread is None else {"0": {}, "1": {}}
    return {"what": what, "group": group, "examples": examples, "runs": runs,
            "mean": {"Average": average, "STS": 0.5}, "spread": {"Average": spread}}


@pytest.fixture
def files(tmp_path):
    """A run of 40 steps, a report, and two result files that share a model's name."""
    (tmp_path / "run").mkdir()
    lines = [{"step": i + 1, "loss": 4 - i / 20, "accuracy": i / 40, "spread": 0.5, "chance_loss": 4.2,
              "lr": 1e-3 * (1 - i / 40), **({"eval_loss": 3.5, "eval_accuracy": 0.3} if i == 19 else {})}
             for i in range(40)]
    (tmp_path / "run/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    (tmp_path / "a.json").write_text(json.dumps({"base": result(0.25, STS=0.5, Retrieval=None)}))
    (tmp_path / "b.json").write_text(json.dumps({"base": result(0.75, STS=0.8, Bitext=0.7)}))
    rows = {
        "base": study_row("untrained", -0.05, group="untrained"),
        "synthetic": study_row("synthetic", 0.6, 0.02, "data", 400),
        "public": study_row("public", 0.5, None, "data", 300),
        "bm25": study_row("BM25", None),
        "steps-100": study_row("100 examples", 0.4, None, "number of examples", 100),
        "epochs-100": study_row("100 examples", 0.3, None, "number of examples", 100),
        "minilm": study_row("MiniLM", 0.7)}
    (tmp_path / "study.json").write_text(json.dumps({"rows": rows}))
    return tmp_path


def draw(what, *paths):
    args = argparse.Namespace(what=what, files=list(paths))
    with plot.plt.rc_context(plot.STYLE):
        return plot.DRAW[what][0](args)


def bar_labels(axis):
    return [text.get_text() for text in axis.texts]


def test_a_run_is_drawn_with_chance_level_and_held_out_scores(files):
    figure = draw("train", files / "run")
    loss, accuracy, spread, rate = figure.axes
    by_label = {line.get_label(): line for line in loss.lines}
    assert set(by_label["run, chance"].get_ydata()) == {4.2}
    held = by_label["run, held out"]
    assert (list(held.get_xdata()), list(held.get_ydata())) == ([20], [3.5])
    raw, smooth = loss.lines[:2]
    assert list(raw.get_ydata()) == [4 - i / 20 for i in range(40)]
    assert smooth.get_ydata()[:3] == pytest.approx([4, 3.975, 3.925])          # windows of 40 / 20 = 2 steps
    assert len(spread.lines) == 2 and list(rate.lines[0].get_ydata())[0] == 1e-3 and len(accuracy.lines) == 3


def test_several_runs_share_the_axes(files):
    (files / "second").mkdir()
    (files / "second/log.jsonl").write_text('{"step": 1, "loss": 2}\n')         # a log may lack the rest
    figure = draw("train", files / "run", files / "second")
    assert {line.get_color() for line in figure.axes[0].lines} == {"C0", "C1"}
    assert {line.get_color() for line in figure.axes[2].lines} == {"C0"}


def test_data_counts_every_language_once(files):
    figure = draw("data", files / "report.json")
    types, languages, dropped, lengths = figure.axes
    assert bar_labels(types) == ["20", "10"] and bar_labels(dropped) == ["3"]
    assert len(bar_labels(languages)) == plot.LANGUAGES + 1
    assert sum(map(int, bar_labels(languages))) == sum(REPORT["language"].values())
    assert languages.get_yticklabels()[-1].get_text() == "3 others"
    assert list(lengths.lines[0].get_xdata()) == [5, 500] and lengths.lines[1].get_xdata() == [50]


def test_scores_of_all_files_stand_side_by_side(files):
    axis, = draw("scores", files / "a.json", files / "b.json").axes
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["base", "base (b)"]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["STS", "Retrieval", "Bitext", "Average"]
    assert bar_labels(axis) == ["50.0", "-", "-", "25.0", "80.0", "-", "70.0", "75.0"]


def test_a_negative_score_has_its_bar_and_its_label(files):
    (files / "low.json").write_text(json.dumps({"base": result(-0.45, STS=-0.45)}))
    axis, = draw("scores", files / "low.json").axes
    assert bar_labels(axis) == ["-45.0", "-45.0"] and axis.get_ylim()[0] < -45
    assert [bar.get_height() for bar in axis.patches] == [-45, -45]
    assert axis.get_yticks()[0] == -60


def test_a_study_has_a_bar_a_row_and_a_curve_by_the_number_of_examples(files):
    bars, curves = draw("study", files / "study.json").axes
    assert [label.get_text() for label in bars.get_yticklabels()] == ["untrained", "synthetic", "public"]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([-5, 60, 50])
    assert bars.get_xlim()[0] <= -5
    bottom, top = bars.get_ylim()
    assert bottom > top                                                         # the first row on top
    texts = {text.get_text() for text in [*bars.texts, *curves.texts]}
    assert {"-5.0", "60.0", "50.0 *", "all-MiniLM-L6-v2 70.0"} <= texts
    spread, = (container for container in bars.containers if isinstance(container, ErrorbarContainer))
    assert [x for x, _ in spread.lines[2][0].get_segments()[0]] == pytest.approx([58, 62])
    drawn = {container.get_label(): container.lines[0] for container in curves.containers}
    assert drawn["as many steps"].get_xydata().tolist() == [[100, 40], [400, 60]]
    assert drawn["two epochs"].get_xydata().tolist() == [[100, 30]]
    title = bars.figure.get_suptitle()
    assert "times 100" in title and "standard deviation" in title and "*: one run" in title


def test_bars_of_a_group_stand_together_and_none_on_another():
    rows = {name: {"what": name, "group": name[0], "mean": {"Average": 0.5}, "spread": {}}
            for name in ("a1", "b1", "a2")}
    _, axis = plot.plt.subplots()
    plot.draw_rows(axis, rows)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a1", "a2", "b1"]
    middles = [bar.get_y() + bar.get_height() / 2 for bar in axis.patches]
    assert middles == pytest.approx([0, 1, 2.5])


def test_pictures_are_written_where_they_belong(files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    for arguments, out in [(["train", "run"], "run/log.png"), (["data", "report.json"], "report.png"),
                           (["study", "study.json"], "study.png"),
                           (["scores", "a.json", "b.json"], "scores.png")]:
        plot.main(arguments)
        assert capsys.readouterr().out.strip() == out
        image = matplotlib.image.imread(files / out)
        assert image.shape[1] > 600 and image[..., :3].std() > 0.02             # not blank
    plot.main(["train", "run", "--out", "loss.svg"])
    assert "<svg" in (files / "loss.svg").read_text()


@pytest.mark.parametrize("arguments, words", [
    (["train", "nowhere"], "nowhere: no such file"), (["train", "run", "--out", "x.doc"], "--out x.doc"),
    (["data", "a.json"], "not a report"), (["data", "report.json", "a.json"], "one report.json"),
    (["scores", "report.json"], "report.json: not a result"), (["study", "a.json"], "not a result of tools"),
    (["study", "study.json", "a.json"], "one study.json"), (["train", "bad"], "log.jsonl:2"),
    (["train", "empty"], "no step"), (["train", "run", "--out", "empty/log.jsonl/x.png"], "log.jsonl"),
    (["train", "run", "--dpi", "0"], "--dpi: 0: must be 1 to 1200"),
    (["train", "run", "--dpi", "20000"], "--dpi: 20000: must be 1 to 1200"),
    (["train", "texts"], "texts (TypeError("), (["study", "study_of_texts.json"], "study_of_texts.json (TypeError("),
    (["data", "old.json"], "old.json (KeyError('distinct prompts')): plot.py data draws report.json"),
    (["data", "list.json"], "list.json (AttributeError("), (["scores", "text.json"], "text.json (TypeError("),
    (["train", "other"], "other/log.jsonl:1: not a line"),
])
def test_user_errors_are_one_line(files, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(files)
    for name, text in (("bad", '{"step": 1, "loss": 2}\n{"step"'), ("empty", ""), ("other", '{"step": 1}\n')):
        (files / name).mkdir()
        (files / name / "log.jsonl").write_text(text)
    (files / "texts").mkdir()
    lines = [{"step": step, "loss": "low"} for step in range(40)]
    (files / "texts/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = {"base": {**study_row("untrained", 0.5), "spread": {"Average": "wide"}}}
    for name, value in (("old", {key: value for key, value in REPORT.items() if key != "distinct prompts"}),
                        ("list", {**REPORT, "type": [1]}), ("text", {"base": result(0.5, STS="high")}),
                        ("study_of_texts", {"rows": rows})):
        (files / f"{name}.json").write_text(json.dumps(value))
    before = sorted(files.rglob("*"))
    assert words in complaint(capsys, plot.main, *arguments)
    assert sorted(files.rglob("*")) == before
