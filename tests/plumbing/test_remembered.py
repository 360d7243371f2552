"""plumbing/remembered.py: a rerun does nothing twice, and whatever may change a result has the work done anew."""
import json
import os

import pytest

import generate
from answers import rows_of
from fault_server import FaultServer
from plumbing import remembered
from plumbing.errors import UserError
from plumbing.files import append, open_log
from plumbing.ledger import Ledger


class Work:
    """Copies a file, and counts how often it had to."""

    def __init__(self, folder):
        self.kept, self.file, self.output = folder / "remembered/x.json", folder / "in", folder / "out"
        self.file.write_text("one")
        self.settings = {"a": 1}
        self.done = 0

    def __call__(self):
        self.done += 1
        self.output.write_text(self.file.read_text())
        return {"text": self.file.read_text(), "a": self.settings["a"]}

    def ask(self):
        value = remembered.remembered(self.kept, [self.file], self.settings, self, self.output)
        assert value == {"text": self.file.read_text(), "a": self.settings["a"]}
        assert self.output.read_text() == self.file.read_text()
        return self.done


def test_the_same_work_is_done_once(tmp_path):
    work = Work(tmp_path)
    assert [work.ask(), work.ask()] == [1, 1]
    os.utime(work.file, (1, 1))
    assert work.ask() == 1                                 # another date, the same words


def change_input(work, monkeypatch):
    """As sly as it gets: the size and the date stay."""
    before = work.file.stat()
    work.file.write_text("two")
    os.utime(work.file, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "an input": change_input,
    "a setting": lambda work, monkeypatch: work.settings.update(a=2),
    "the output": lambda work, monkeypatch: work.output.write_text("eno"),
    "no output": lambda work, monkeypatch: work.output.unlink(),
    "the code": lambda work, monkeypatch: monkeypatch.setattr(remembered, "CODE", "another"),
    "nothing kept": lambda work, monkeypatch: work.kept.unlink(),
    "half of it kept": lambda work, monkeypatch: work.kept.write_bytes(work.kept.read_bytes()[:50]),
    "something else kept": lambda work, monkeypatch: work.kept.write_text("[1]"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_has_it_done_anew(tmp_path, monkeypatch, change):
    work = Work(tmp_path)
    work.ask()
    CHANGES[change](work, monkeypatch)
    assert [work.ask(), work.ask()] == [2, 2]


def test_an_input_that_grows_meanwhile_is_not_kept_as_it_was(tmp_path):
    """--report beside a run that goes on, and then the older answers come back from a copy."""
    file = tmp_path / "in"
    file.write_text("older")

    def work():
        file.write_text("newer")
        return file.read_text()

    assert remembered.remembered(tmp_path / "x.json", [file], None, work) == "newer"
    file.write_text("older")
    assert remembered.remembered(tmp_path / "x.json", [file], None, file.read_text) == "older"


def test_where_nothing_can_be_kept_the_work_is_done_all_the_same(tmp_path):
    work = Work(tmp_path)
    work.kept.parent.write_text("a file where the folder should be")
    assert [work.ask(), work.ask()] == [1, 2]


def test_code_is_each_file_that_may_change_a_result(tmp_path, monkeypatch):
    (tmp_path / "plumbing").mkdir()
    monkeypatch.setattr(remembered, "ROOT", tmp_path)
    hashes = set()
    for name, content in [("generate.py", "a"), ("generate.py", "b"), ("plumbing/texts.py", "c"),
                          ("plumbing/texts.py", "d"), ("train.py", "e")]:
        (tmp_path / name).write_text(content)
        hashes.add(remembered.hash_code("generate.py"))
    assert len(hashes) == 4                                # train.py has no say in it
    assert remembered.CODE not in hashes


# ----------------------------------------------------------------------------------------- runs of generate.py

@pytest.fixture
def finished(live, monkeypatch, capsys):
    """A finished run. finished() runs it again -> (files read whole, what it printed, examples, report)."""
    read = []
    read_answers, read_logs = generate.read_answers, Ledger.read_logs
    monkeypatch.setattr(generate, "read_answers",
                        lambda *args, **more: read.append("answers") or read_answers(*args, **more))
    monkeypatch.setattr(Ledger, "read_logs", lambda ledger: read.append("logs") or read_logs(ledger))
    server = FaultServer({"status-500": 0.2, "truncated": 0.1})

    def again(*flags):
        read.clear()
        capsys.readouterr()
        assert live(server, *flags) == 0
        return (sorted(read), capsys.readouterr().out, live.out.read_bytes(),
                (live.folder / "report.json").read_bytes())

    again()
    again.live, again.folder, again.server = live, live.folder, server
    return again


@pytest.mark.parametrize("flags", [(), ("--report",)])
def test_a_rerun_reads_nothing_twice_and_says_the_same(finished, flags):
    first = finished(*flags)
    second = finished(*flags)
    assert first[0] == second[0] == []                     # the run itself has left all that is needed
    for path in (finished.folder / "remembered").iterdir():
        path.unlink()
    anew = finished(*flags)
    assert anew[0] == ["answers", "logs"] and first[1:] == second[1:] == anew[1:]
    assert b"examples" in anew[3] and anew[2].count(b"\n") > 20


def test_what_is_changed_in_a_run_is_read_anew(finished):
    finished()
    assert finished("--max-answer-tokens", "50", "--price", "m:1:2")[0] == []       # decide no old answer
    raw, out = finished.folder / "raw.jsonl", finished.live.out
    with open_log(raw) as file:
        row = rows_of(finished.folder)[-1]
        append(file, row | {"id": 10_000, "response": "No."})
    examples = out.read_bytes()
    read, printed, *_ = finished("--report")
    assert read == ["answers", "logs"] and "no JSON object 1" in printed
    out.write_bytes(examples[:100])
    assert finished("--report")[::2] == (["answers"], examples)
    out.unlink()
    assert finished("--report")[::2] == (["answers"], examples)
    with open_log(finished.folder / "started.jsonl") as file:
        append(file, {"id": 20_000, "model": "m", "tokens_in": 5, "tokens_out": 6})
    read, printed, *_ = finished("--report")
    assert read == ["logs"] and tries_lost(printed) == tries_lost(finished("--report")[1])


def tries_lost(printed: str) -> str:
    return printed.split("tries perhaps paid without an answer ")[1].split(",")[0]


def test_other_prompts_make_other_examples(finished, monkeypatch):
    before = finished("--report")
    prompts = generate.load_prompts()
    prompts["task_types"]["sts"]["instruction"] = "Find its twin."
    monkeypatch.setattr(generate, "load_prompts", lambda: prompts)
    after = finished("--report")
    assert after[0] == ["answers"] and b"Find its twin." in after[2] and b"Find its twin." not in before[2]


def test_an_answer_that_cannot_be_read_is_an_error_each_time(finished):
    with open(finished.folder / "raw.jsonl", "ab") as file:
        file.write(b"{}\n")
    for _ in range(2):
        with pytest.raises(UserError, match="raw.jsonl:"):
            finished("--report")


def test_remembered_books_are_the_books(tmp_path):
    """Brainstorms with half a surrogate pair, ids of both kinds, two models, lost tries, one without usage."""
    with open_log(tmp_path / "raw.jsonl") as raw, open_log(tmp_path / "started.jsonl") as started:
        for number in range(20):
            row = {"id": number if number % 3 else f"sts-b{number}", "step": "generate" if number % 3 else "brainstorm",
                   "type": "sts", "params": {}, "model": "ab"[number % 2], "response": "é \ud83d",
                   "usage": {"prompt_tokens": number, "completion_tokens": 2}}
            append(started, {"id": row["id"], "model": row["model"], "tokens_in": 30, "tokens_out": 40 + number})
            if number % 5:
                row["usage"] |= {"estimated": True} if number == 7 else {}
                append(raw, row)
    books = [vars(Ledger(tmp_path, {}, read_only=True)) for _ in range(2)]
    names = ("answered", "brainstorms", "spent", "lost", "tries_lost", "usage_estimated", "set_aside")
    for name in names:
        assert books[0][name] == books[1][name] and type(books[0][name]) is type(books[1][name])
    assert list(books[0]["spent"]) == list(books[1]["spent"]) and books[1]["tries_lost"] == 4
    assert json.loads((tmp_path / "remembered/books.json").read_text())["value"]["tries_lost"] == 4
