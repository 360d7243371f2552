"""plumbing/limits.py: what a server asks for is everybody's wait, the doubling is one request's own."""
import email.utils
import threading
import time

import pytest

from plumbing.limits import Limits, asked_wait, duration, retry_after


@pytest.mark.parametrize("value, seconds", [("7", 7), ("-1", 0), ("soon", 0), ("", 0), ("nan", 0),
                                            ("Sun, 06 Nov 1994 08:49:37 GMT", 0)])
def test_retry_after_by_hand(value, seconds):
    assert retry_after({"Retry-After": value}) == seconds


@pytest.mark.parametrize("text, seconds", [
    ("20", 20), ("0.5", 0.5), ("7.66s", 7.66), ("120ms", 0.12), ("6m0s", 360),
    ("1h2m3s", 3723), ("1m0.5s", 60.5),
    ("", None), ("soon", None), ("5 apples", None), ("1.2.3s", None), ("m", None),
])
def test_durations_by_hand(text, seconds):
    assert duration(text) == (seconds if seconds is None else pytest.approx(seconds))


def test_dates_in_both_spellings():
    moment = time.time() + 30
    assert duration(email.utils.formatdate(moment, usegmt=True)) == pytest.approx(30, abs=1.5)
    assert duration(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))) == pytest.approx(30, abs=1.5)


REQUESTS, TOKENS = "x-ratelimit-reset-requests", "x-ratelimit-reset-tokens"
NO_REQUESTS, SOME_REQUESTS = {"x-ratelimit-remaining-requests": "0"}, {"x-ratelimit-remaining-requests": "9"}
NO_TOKENS = {"x-ratelimit-remaining-tokens": "0"}


@pytest.mark.parametrize("headers, seconds", [
    ({}, 0),
    ({"Retry-After": "2"}, 2),
    ({"retry-after-ms": "250"}, 0.25),
    ({"retry-after-ms": "250", "Retry-After": "1"}, 0.25),         # the same, less coarse
    ({"retry-after-ms": "?", "Retry-After": "1"}, 1),
    ({REQUESTS: "3s"}, 3),
    ({TOKENS: "400ms"}, 0.4),
    ({REQUESTS: "3h", TOKENS: "4s"}, 4),                           # one of them; the sooner is tried
    ({REQUESTS: "3h", TOKENS: "4s"} | SOME_REQUESTS | NO_TOKENS, 4),
    ({REQUESTS: "9s", TOKENS: "4s"} | NO_REQUESTS, 9),
    ({REQUESTS: "9s", TOKENS: "14s"} | NO_REQUESTS | NO_TOKENS, 14),
    ({"Retry-After": "1", REQUESTS: "9s"} | NO_REQUESTS, 1),
])
def test_what_a_rate_limit_asks_for(headers, seconds):
    assert asked_wait(headers, limited=True) == pytest.approx(seconds)


def test_resets_say_nothing_where_no_limit_was_reached():
    assert asked_wait({REQUESTS: "9s", **NO_REQUESTS}, limited=False) == 0
    assert asked_wait({"Retry-After": "2"}, limited=False) == 2


@pytest.mark.parametrize("failures, asked, limited, shared, own", [
    (0, 0, True, (0.25, 0.5), (0.5, 1)),
    (5, 0, True, (0.25, 0.5), (16, 32)),              # the doubling stays with the one that failed
    (5, 2, True, (2, 2), (18, 34)),
    (5, 2, False, (2, 2), (18, 34)),               # a 503 that asks for a pause
    (5, 0, False, None, (16, 32)),
    (500, 0, True, (0.25, 0.5), (30, 60)),
])
def test_the_doubling_is_private(failures, asked, limited, shared, own):
    limits, now = Limits(backoff=1.0), time.monotonic()
    seconds = limits.after(failures, asked, limited)
    assert own[0] <= seconds <= own[1]
    if shared is None:
        assert limits.not_before == 0
    else:
        assert shared[0] <= limits.not_before - now <= shared[1] + 0.1


def test_a_turn_that_is_put_off_meanwhile_is_waited_for():
    limits, stop = Limits(backoff=1.0), threading.Event()
    begun = time.monotonic()
    limits.not_before = begun + 0.05
    threading.Timer(0.02, setattr, (limits, "not_before", begun + 0.15)).start()
    limits.wait_turn(stop)
    assert 0.14 < time.monotonic() - begun < 1
    limits.not_before = time.monotonic() + 60
    stop.set()
    limits.wait_turn(stop)                         # at once
