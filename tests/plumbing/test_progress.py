"""plumbing/progress.py: a line every few seconds, and the items as they are."""
import itertools

from plumbing.progress import progress


def test_progress_is_shown_with_the_time_left(capsys):
    clock = itertools.count(0, 3)                                            # 3 seconds from look to look
    assert list(progress(["a", "b", "c", "d"], "Task", "blocks", lambda: next(clock))) == ["a", "b", "c", "d"]
    assert capsys.readouterr().err.splitlines() == ["  Task: 2 of 4 blocks, 6 s, at most 6 s left",
                                                    "  Task: 4 of 4 blocks, 12 s, at most 0 s left"]
    assert list(progress([], "Task", "blocks")) == [] and not capsys.readouterr().err
