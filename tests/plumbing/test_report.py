"""plumbing/report.py: the counts, the figures beside the paper's, the estimate."""
import json
import re
from types import SimpleNamespace

import pytest

import generate
from answers import PROMPTS, RECORDED
from fault_server import FaultServer
from plumbing.answers import reject_if
from plumbing.report import PAPER, Counts, estimate, print_report, words_asked


def example_of(kind="sts", query="four", language="English"):
    return {"prompt": "Do it.", "query": query, "pos": ["three"], "neg": ["x", "yy"], "type": kind,
            "language": language}


def test_counts_by_hand():
    counts = Counts()
    counts.answer("brainstorm")
    counts.brainstorm("long-long", ["Find a.", "find  A.", "Find b."])
    for example, how in [(example_of(), "clean"), (example_of(query="fo"), "repaired"),
                         (example_of("bitext", language="Welsh-English"), "clean")]:
        counts.answer("generate")
        with counts.rejects():
            counts.keep(example, how)
    with counts.rejects():
        reject_if(True, "no good")
    report = counts.report()
    lengths = report.pop("characters")
    assert report == {
        "examples": 3, "distinct prompts": 1, "answers": {"generate": 3, "brainstorm": 1},
        "type": {"sts": 2, "bitext": 1}, "language": {"English": 2}, "pair": {"Welsh-English": 1},
        "found": {"clean": 2, "repaired": 1}, "dropped": {"no good": 1}, "tasks": {"long-long": 2}}
    assert list(lengths) == ["bitext neg", "bitext pos", "bitext query", "sts neg", "sts pos", "sts query"]
    assert lengths["sts neg"] == {"p10": 1, "p50": 2, "p90": 2}
    assert lengths["sts query"] == {"p10": 2, "p50": 4, "p90": 4}


def test_the_printed_report_by_hand(capsys):
    report = {"examples": 4, "distinct prompts": 3, "answers": {"generate": 5, "brainstorm": 1},
              "type": {"sts": 3, "bitext": 1}, "language": {"English": 1, "Welsh": 2}, "found": {"clean": 4},
              "tasks": {}, "ledger": {"tokens": 1234, "usd": 0.5, "models": {"m": {}}}}
    print_report(report, "x.jsonl")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "x.jsonl: 4 examples from 5 answers and 1 brainstorms"
    rows = {line[:24].strip(): line[24:].split() for line in lines if line.endswith(("%", "000"))}
    assert rows["examples"] == ["4", "500,000"] and rows["tokens"] == ["1,234", "180,000,000"]
    assert rows["sts"] == ["75.0%", "19.5%"] and rows["English"] == ["33.3%", "43.1%"]
    assert rows["1 others"] == ["66.7%", f"{100 - sum(PAPER['language'].values()):.1f}%"]
    assert lines[-4:] == ["distinct tasks: none", "objects found: clean 4", "dropped: none",
                          "ledger: tokens 1,234, usd 0.5"]


def test_the_report_of_the_recorded_answers(tmp_path):
    assert generate.main(["--replay", str(RECORDED), "--out", str(tmp_path / "s.jsonl")]) == 0
    examples = [json.loads(line) for line in (tmp_path / "s.jsonl").open(encoding="utf-8")]
    report = json.loads((tmp_path / "s/report.json").read_text())
    assert report["type"]["bitext"] == 533 and sum(report["type"].values()) == report["examples"] == 4735
    assert report["distinct prompts"] == len({example["prompt"].casefold() for example in examples})
    lengths = sorted(len(example["query"]) for example in examples if example["type"] == "sts")
    assert report["characters"]["sts query"]["p50"] == lengths[len(lengths) // 2]
    assert report["ledger"] == {}


def test_a_replay_has_used_no_tokens(capsys):
    print_report({"examples": 4, "distinct prompts": 3, "ledger": {}}, "x.jsonl")
    assert "tokens" not in capsys.readouterr().out


@pytest.mark.parametrize("params, words", [
    ({"query_length": "fewer than 5 words", "num_words": 300}, 5 + 2 * 300),
    ({"query_length": "5 to 15 words", "num_words": 50}, 15 + 2 * 50),
])
def test_words_asked_for(params, words):
    assert words_asked(PROMPTS["task_types"]["short-long"], params) == words
    assert words_asked(PROMPTS["task_types"]["sts"], {"unit": "passage"}) == 3 * 80
    assert words_asked(PROMPTS["task_types"]["long-short"], {"num_words": "at least 200"}) == 206
    assert words_asked({"keys": ["a", "b"]}, {}) == 80     # a type that does not say


def test_an_estimate_by_hand(capsys):
    """Ten requests of 3 * 18 words, 1.3 tokens each; two brainstorms if all were new, so 3 to 15 of them."""
    sts = {"id": 0, "step": "generate", "type": "sts", "model": "m",
           "params": {"unit": "sentence", "language": "English"}}
    brainstorm = {"id": "x-b0", "step": "brainstorm", "type": "x", "model": "m", "params": {"num_tasks": 20}}
    prices = {("m", "in"): 0.5, ("m", "out"): 0.25}
    args = SimpleNamespace(prices=prices, max_answer_tokens=1000, concurrency=2)
    sample = [(sts, "x" * 39)] * 2 + [(brainstorm, "y" * 7)]
    estimate(sample, examples=10, brainstorms=2, task_types=PROMPTS["task_types"], args=args)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["--- sts, generate, id 0 ---", "x" * 39, "--- x, brainstorm, id x-b0 ---", "y" * 7]
    assert lines[4] == "--- estimate for 10 examples and 3 to 15 brainstorms ---"
    low = 10 * (20 + 54 * 0.7 * 1.3) + 3 * 20 * 20
    high = 10 * (20 + 54 * 1.5 * 1.3) + 15 * 20 * 40
    assert lines[5].startswith(f"tokens: {10 * 10 + 3 * 2} to {10 * 10 + 15 * 2} in, "
                               f"{low:,.0f} to {high:,.0f} out, ")
    assert lines[5].endswith("(at most 25,000 out)")
    assert lines[6] == f"money: ${106 * 0.5 + low * 0.25:,.2f} to ${130 * 0.5 + high * 0.25:,.2f}"


def test_report_and_dry_run_use_no_network(live, monkeypatch, capsys):
    live(FaultServer(), n=20)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    capsys.readouterr()
    lines = live.out.read_text()
    live.out.unlink()
    assert generate.main(["--report", "--out", str(live.out)]) == 0
    assert live.out.read_text() == lines and "short-long" in capsys.readouterr().out
    before = sorted(live.folder.parent.rglob("*"))
    assert not generate.main(["--dry-run", "--model", "m", "--n", "500_000", "--price", "m:1:2",
                              "--out", str(live.out)])
    text = capsys.readouterr().out
    assert sorted(live.folder.parent.rglob("*")) == before
    for template in PROMPTS["templates"].values():
        assert template.splitlines()[-1] in text
    figures = re.findall(r"[\d,]{2,}", text.split("estimate")[1])
    numbers = [int(figure.replace(",", "")) for figure in figures]
    _, brainstorms_low, brainstorms_high, in_low, in_high, out_low, out_high = numbers[:7]
    naive = 150_000 / PROMPTS["num_tasks"]
    assert brainstorms_low >= 1.4 * naive and brainstorms_high >= 7.5 * naive
    assert 60e6 < in_low < in_high < 140e6
    # By the mean lengths in values.json, 390 words an answer, two fifths of them English.
    assert 500_000 * 390 * 0.6 < out_low < 500_000 * 390 * 1.3 < out_high < 500_000 * 390 * 4.5
    money = re.search(r"money: \$([\d,.]+) to \$([\d,.]+)", text).groups()
    low, high = (float(figure.replace(",", "")) for figure in money)
    assert abs(low - (in_low + 2 * out_low) / 1e6) < 1 and abs(high - (in_high + 2 * out_high) / 1e6) < 1
