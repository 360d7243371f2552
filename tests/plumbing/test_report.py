"""plumbing/report.py: the counts, the figures beside the paper's, the estimate."""
import json
import re
from types import SimpleNamespace

import generate
from answers import PROMPTS, RECORDED
from fault_server import FaultServer
from plumbing.answers import reject_if
from plumbing.report import PAPER, Counts, estimate, print_report


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
    assert report["type"]["bitext"] == 360 and sum(report["type"].values()) == report["examples"] == 2030
    assert report["distinct prompts"] == len({example["prompt"].casefold() for example in examples})
    lengths = sorted(len(example["query"]) for example in examples if example["type"] == "sts")
    assert report["characters"]["sts query"]["p50"] == lengths[len(lengths) // 2]
    assert report["ledger"] == {}


def test_an_estimate_by_hand(capsys):
    request = {"id": 0, "step": "generate", "type": "sts", "model": "m"}
    prices = {("m", "in"): 0.5, ("m", "out"): 0.25}
    args = SimpleNamespace(prices=prices, max_answer_tokens=1000, concurrency=2)
    estimate([(request, "x" * 39)] * 2, examples=10, brainstorms=2, args=args)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["--- sts, generate, id 0 ---", "x" * 39]
    assert "tokens: 120 in, 1,296 out" in lines[3] and "at most 12,000 out" in lines[3]
    assert lines[4] == f"money: ${120 * 0.5 + 1296 * 0.25:.2f}"


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
    figures = re.search(r"([\d,]+) in, ([\d,]+) out", text).groups()
    tokens_in, tokens_out = (int(figure.replace(",", "")) for figure in figures)
    assert 60e6 < tokens_in < 140e6 and 90e6 < tokens_out < 200e6      # the paper: about 180 million in all
    assert f"${tokens_in / 1e6 + 2 * tokens_out / 1e6:,.2f}"[:-3] in text
