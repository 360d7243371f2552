"""plumbing/transport.py: one try over the wire, with one deadline, and with the knowledge of what has left.

What requests does not do by itself: its timeout begins anew with each byte, so a server that drips bytes
holds a thread for hours; and its errors do not tell whether the request was ever sent, which decides whether
it may have been billed.

Both are settled where the bytes pass. The body is handed over by a generator, which notes that it was asked
for: a refused connection, a failed handshake or a proxy that lets nobody through never asks. And the socket
is read through a small reader that knows the deadline.
"""
import io
import math
import os
import threading
import time

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection

from plumbing.errors import check

MAX_BYTES = 32 * 2**20          # of one answer
PIECE = 2**20                   # bytes that are sent at a time
TRY = threading.local()         # of the try under way in this thread: deadline, sent


class Failed(Exception):
    """A try that brought no response. sent: the request left this machine, at least in part, so it may be
    billed. hint: what mends it, where trying again would not."""

    def __init__(self, problem: str, sent: bool, hint: str | None = None):
        super().__init__(problem)
        self.problem, self.sent, self.hint = problem, sent, hint


def certificates():
    """What requests verifies servers by: a file or folder of the environment, or True for its own."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        if path := os.environ.get(name):
            check(os.path.exists(path), f"{name} names {path}, which does not exist")
            return path
    return True


def new_session(headers: dict, proxies: dict, verify) -> requests.Session:
    """A connection that stays open from request to request. For one thread alone."""
    session = requests.Session()
    session.trust_env, session.proxies, session.verify = False, proxies, verify
    session.headers = headers
    for scheme in ("http://", "https://"):
        session.mount(scheme, Adapter())
    return session


def exchange(post, session, url: str, key: str, body: dict, seconds: float, max_bytes=MAX_BYTES) -> tuple:
    """Send a request -> (status, headers, content as bytes), all within some seconds. Raises Failed."""
    TRY.deadline, TRY.sent = time.monotonic() + seconds, False
    try:
        with post(session, url, key, body, seconds) as response:
            chunks, size = [], 0
            while chunk := response.raw.read1(65536, decode_content=True):
                chunks.append(chunk)
                size += len(chunk)
                if size > max_bytes:
                    raise Failed(f"an answer of more than {max_bytes >> 20} MiB", sent=True)
            return response.status_code, response.headers, b"".join(chunks)
    # requests' exceptions are OSErrors; of a redirect to what is no address, urllib raises a ValueError.
    except (OSError, urllib3.exceptions.HTTPError, ValueError) as error:
        raise failure(error, seconds) from None
    finally:
        TRY.deadline = None


def failure(error: Exception, seconds: float) -> Failed:
    """What an exception of requests, urllib3 or the system means."""
    if TRY.sent and time.monotonic() >= TRY.deadline:
        return Failed(f"no whole answer within {seconds:g} s", TRY.sent)
    reason = getattr(error.args[0], "reason", None) if error.args else None
    problem = f"{type(error).__name__}: {reason or error}"
    return Failed(problem, TRY.sent, None if TRY.sent else hint_of(problem))


def hint_of(problem: str) -> str | None:
    """The way out of what no retry mends, by the words of the exception; None if it may pass."""
    if "CERTIFICATE_VERIFY_FAILED" in problem or "doesn't match" in problem:
        return "SSL_CERT_FILE may name a file with the certificate of its authority"
    if "CA certificate" in problem or "certificate verify locations" in problem:
        return "SSL_CERT_FILE or REQUESTS_CA_BUNDLE must name a file of certificates"
    if "WRONG_VERSION_NUMBER" in problem or "record layer failure" in problem:
        return "it does not speak TLS: OPENAI_BASE_URL, or the proxy's address, wants http:// there"
    if "SOCKS support" in problem:
        return "pip install 'requests[socks]'"
    if "Tunnel connection failed: 4" in problem:
        return "the proxy refuses: https_proxy may hold http://name:password@host:port"
    if problem.startswith(("Invalid", "ProxySchemeUnknown", "Missing")):
        return "check OPENAI_BASE_URL and the proxy in the environment"
    return None


# ----------------------------------------------------------------------------------- where the bytes pass

def outgoing(body):
    """A request's body in pieces, since each has the whole time-out. Notes that it is being sent."""
    TRY.sent = True
    content = body.encode() if isinstance(body, str) else body
    for begin in range(0, len(content), PIECE):
        yield content[begin:begin + PIECE]


class BeforeDeadline(io.RawIOBase):
    """A socket's bytes, as long as the try's deadline has not come."""

    def __init__(self, sock):
        self.sock, self.raw, self.deadline = sock, sock.makefile("rb", buffering=0), TRY.deadline
        self.patience = sock.gettimeout() or math.inf          # until the next byte

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer takes too long")
        self.sock.settimeout(min(left, self.patience))
        return self.raw.readinto(buffer)

    def close(self):
        self.raw.close()
        super().close()


class Reading:
    """A socket whose makefile, which http.client reads a response from, obeys the deadline."""

    def __init__(self, sock):
        self.sock = sock

    def makefile(self, *_, **__):
        return io.BufferedReader(BeforeDeadline(self.sock))

    def __getattr__(self, name):
        return getattr(self.sock, name)


class Deadline:
    """A connection whose responses obey the deadline, headers and all."""

    def getresponse(self):
        sock = self.sock
        if getattr(TRY, "deadline", None) is not None:
            self.sock = Reading(sock)
        try:
            return super().getresponse()
        finally:
            if self.sock is not None:              # None: closed, since the server ends the connection
                self.sock = sock


class HTTP(Deadline, HTTPConnection):
    pass


class HTTPS(Deadline, HTTPSConnection):
    pass


class HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = HTTP


class HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = HTTPS


POOLS = {"http": HTTPPool, "https": HTTPSPool}


class Adapter(HTTPAdapter):
    """requests' way to urllib3, with the pools and the body from above."""

    def init_poolmanager(self, *args, **kwargs):
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = POOLS

    def proxy_manager_for(self, *args, **kwargs):
        manager = super().proxy_manager_for(*args, **kwargs)
        if type(manager) is urllib3.ProxyManager:              # SOCKS has pools of its own
            manager.pool_classes_by_scheme = POOLS
        return manager

    def send(self, request, **kwargs):
        if request.body is not None:
            request.body = outgoing(request.body)              # its Content-Length is set already
        return super().send(request, **kwargs)
