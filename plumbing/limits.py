"""plumbing/limits.py: how long to wait before a request is tried again, and who waits.

A server that says "too many requests" speaks to all threads at once, so what it asks for is shared: no
thread begins a try before then. The time that doubles with each failure belongs to the one request that
failed. If it were shared as well, one unlucky request would stop all others for a minute, and a run under a
rate limit would stand still most of the time.
"""
import datetime
import email.utils
import random
import re
import threading
import time

LONGEST = 60                    # seconds of the doubled wait
UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
DURATION = re.compile(r"([\d.]+)(ms|s|m|h|d)")


class Limits:
    """The moment before which no thread may ask, and the waits of single requests. backoff: seconds."""

    def __init__(self, backoff: float):
        self.backoff = backoff
        self.not_before = 0.0                      # time.monotonic()
        self.guard = threading.Lock()

    def wait_turn(self, stop: threading.Event) -> None:
        """Sleep until all threads may ask, or until `stop` is set."""
        while (seconds := self.not_before - time.monotonic()) > 0 and not stop.is_set():
            stop.wait(seconds)

    def after(self, failures: int, asked: float, limited: bool) -> float:
        """Note a failed try -> seconds that its own request waits: what was asked, and a doubling part.

        failures: tries of this request that failed before. asked: seconds that the server asks for, 0 if it
        does not say. limited: it was a rate limit, which holds for everyone. Chance takes up to a half of
        the rest, so that not all threads come back at the same moment.
        """
        plain = self.backoff * random.uniform(0.25, 0.5)       # short, so that no allowance runs over unused
        if asked or limited:
            with self.guard:
                self.not_before = max(self.not_before, time.monotonic() + (asked or plain))
        doubled = min(LONGEST, self.backoff * 2 ** min(failures, 30))
        return asked + doubled * random.uniform(0.5, 1)


# ------------------------------------------------------------------------------------ what a server asks for

def asked_wait(headers, limited: bool) -> float:
    """Seconds that a response asks to wait; 0 if it does not.

    limited: it was a rate limit. Only then do x-ratelimit-reset-* say anything: servers send them always.
    """
    asked = milliseconds(headers.get("retry-after-ms"))
    if asked is None and headers.get("Retry-After"):
        asked = retry_after(headers)
    if asked is None and limited:
        asked = reset_of(headers)
    return asked or 0.0


def milliseconds(value) -> float | None:
    try:
        return max(0.0, float(value) / 1000)
    except (TypeError, ValueError):
        return None


def retry_after(headers) -> float:
    """Seconds by a Retry-After in seconds or as an HTTP date; 0 if there is none.

    >>> retry_after({"Retry-After": "7"}), retry_after({})
    (7.0, 0.0)
    """
    return duration(headers.get("Retry-After", "")) or 0.0


def reset_of(headers) -> float | None:
    """Seconds until a limit on requests or on tokens is free again, by the x-ratelimit-* headers.

    Both have a reset, but only one of the two was reached: the one of which nothing remains. Where a server
    does not say what remains, the sooner reset is taken; if that was too soon, it will say so again.
    """
    resets, exhausted = [], []
    for kind in ("requests", "tokens"):
        seconds = duration(headers.get(f"x-ratelimit-reset-{kind}", ""))
        if seconds is None:
            continue
        resets.append(seconds)
        if headers.get(f"x-ratelimit-remaining-{kind}", "").strip() in ("0", "-1"):
            exhausted.append(seconds)
    if exhausted:
        return max(exhausted)
    return min(resets, default=None)


def duration(text: str) -> float | None:
    """Seconds in "7", "7.5s", "120ms", "1m2.5s", an HTTP date or an ISO date; None for anything else.

    >>> duration("1m2.5s"), duration("120ms"), duration("soon")
    (62.5, 0.12, None)
    """
    text = text.strip()
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    if text and not DURATION.sub("", text):
        try:
            return sum(float(number) * UNITS[unit] for number, unit in DURATION.findall(text))
        except ValueError:                         # two points in one number
            return None
    for parse in (email.utils.parsedate_to_datetime, datetime.datetime.fromisoformat):
        try:
            return max(0.0, parse(text).timestamp() - time.time())
        except (ValueError, TypeError, OverflowError):
            continue
    return None
