"""tools/bench/ratelimit.py: the bucket that a client is measured against is a bucket."""
import time

import pytest

from plumbing.limits import asked_wait
from tools.bench.ratelimit import HEADERS, Bucket, LimitedServer, wait_header


def test_a_bucket_gives_what_it_holds_and_refills():
    bucket = Bucket(rate=20, size=2)
    for _ in range(2):
        assert bucket.missing(1) == 0
        bucket.level -= 1
    assert 0.04 < bucket.missing(1) <= 0.05
    time.sleep(0.06)
    assert bucket.missing(1) == 0
    time.sleep(0.2)
    assert bucket.missing(3) > 0 and bucket.level == 2         # no more than its size


@pytest.mark.parametrize("tokens", [False, True])
def test_a_server_gives_the_rate_whichever_bucket_limits_it(tokens):
    server = LimitedServer(50, tokens=tokens, burst=0.1)
    begun, taken = time.monotonic(), 0
    while time.monotonic() < begun + 0.2:
        taken += server.take() == 0
    assert 5 + 50 * 0.1 < taken <= 5 + 50 * 0.25 and server.refused
    server.close()


@pytest.mark.parametrize("header", HEADERS)
def test_the_headers_say_what_the_client_reads(header):
    asked = asked_wait(wait_header(header, 0.25), limited=True)
    assert asked == {"none": 0, "Retry-After": 1}.get(header, pytest.approx(0.251))
