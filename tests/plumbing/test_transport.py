"""plumbing/transport.py: what never left this machine, and the deadline, on real sockets of 127.0.0.1."""
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest

import generate
from answers import ledger_of, rows_of
from fault_server import KEY, FaultServer
from plumbing.errors import UserError
from plumbing.ledger import Ledger
from plumbing.transport import Failed, exchange, hint_of, new_session

BUNDLES = ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"]
BODY = {"model": "m", "messages": [{"role": "user", "content": "Suggest some"}]}


def try_once(url, seconds, **more):
    session = new_session({}, {}, True)
    return exchange(generate.post, session, f"{url}/chat/completions", "", BODY, seconds, **more)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


class Proxy:
    """Or a server of anything else: answers each connection with the same bytes."""

    def __init__(self, answer):
        self.socket, self.answer, self.connections = socket.create_server(("127.0.0.1", 0)), answer, 0
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            connection, _ = self.socket.accept()
            self.connections += 1
            with connection:
                connection.recv(65536)
                connection.sendall(self.answer)

    def close(self):
        pass


# ---------------------------------------------------------------------------------------- what never left

def nothing_is_lost(folder):
    rows = rows_of(folder, "started")
    assert 0 < sum("tokens_in" in row for row in rows) == sum(row.get("refused") == "unsent" for row in rows)
    assert Ledger(folder, {}, read_only=True).summary()["tries perhaps paid without an answer"] == 0


def test_what_a_dead_proxy_stops_has_never_left_and_is_tried_again(live, monkeypatch):
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{free_port()}")
    server = FaultServer()
    server.url = "https://llm.invalid/v1"
    assert live(server, "--tries", "2") == 1
    nothing_is_lost(live.folder)


@pytest.mark.parametrize("proxy, words", [
    ("http://127.0.0.1:{port}", "the proxy refuses"),
    ("socks5://127.0.0.1:{port}", "requests"),
])
def test_what_no_retry_mends_stops_at_once_and_costs_nothing(live, monkeypatch, proxy, words):
    refusing = Proxy(b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\n\r\n")
    monkeypatch.setenv("https_proxy", proxy.format(port=refusing.port))
    server = FaultServer()
    server.url = "https://llm.invalid/v1"
    with pytest.raises(UserError, match=words):
        live(server, "--concurrency", "1")
    assert refusing.connections <= 1
    nothing_is_lost(live.folder)


def test_tls_to_a_server_that_speaks_none_costs_nothing(live):
    server = Proxy(b"HTTP/1.1 400 What\r\nContent-Length: 0\r\n\r\n")
    server.url = f"https://127.0.0.1:{server.port}/v1"
    with pytest.raises(UserError, match="http://"):
        live(server, "--concurrency", "1")
    nothing_is_lost(live.folder)


@pytest.mark.parametrize("name", BUNDLES)
def test_a_missing_file_of_certificates_is_named_before_anything_is_sent(live, monkeypatch, name):
    for other in BUNDLES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "/nowhere/ca.pem")
    server = FaultServer()
    with pytest.raises(UserError, match=f"{name} names /nowhere/ca.pem"):
        live(server)
    assert server.requests == 0


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate with openssl")
def test_certificates_are_checked_once_and_ssl_cert_file_is_used(live, monkeypatch, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt",
                    "ec_paramgen_curve:prime256v1", "-keyout", key, "-out", certificate, "-days", "2",
                    "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
                   check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = FaultServer(tls=context)
    for name in BUNDLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="CERTIFICATE_VERIFY_FAILED.*SSL_CERT_FILE"):
        live(server, "--concurrency", "1", n=5)
    assert server.connections == 1                 # no second try
    nothing_is_lost(live.folder)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert live(server, n=5) == 0
    assert ledger_of(live.folder)["tries perhaps paid without an answer"] == 0
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("fault", ["headless", "reset", "cut"])
def test_what_has_left_may_be_paid(fault):
    server = FaultServer({fault: 1.0})
    with pytest.raises(Failed) as caught:
        try_once(server.url, 5)
    assert caught.value.sent and caught.value.hint is None
    server.close()


def test_words_that_no_retry_mends():
    assert "certificate" in hint_of("SSLError: CERTIFICATE_VERIFY_FAILED: self-signed")
    assert hint_of("ConnectionError: connection refused") is None
    assert hint_of("ProxyError: Tunnel connection failed: 502 Bad Gateway") is None


# ------------------------------------------------------------------------------------------- the deadline

@pytest.mark.parametrize("fault", ["drip", "drip-headers", "hang"])
def test_one_deadline_for_the_whole_answer(fault):
    server = FaultServer({fault: 1.0}, hang=5)
    begun = time.monotonic()
    with pytest.raises(Failed, match="no whole answer within 0.4 s") as caught:
        try_once(server.url, 0.4)
    assert 0.3 < time.monotonic() - begun < 1.5 and caught.value.sent
    server.close()


def test_a_large_body_is_sent_whole():
    server = FaultServer()
    body = BODY | {"large": "é" * 3_000_000}
    session = new_session({}, {}, True)
    assert exchange(generate.post, session, f"{server.url}/chat/completions", "", body, 20)[0] == 200
    assert server.bodies == [body]
    server.close()


def test_an_answer_has_a_largest_size():
    server = FaultServer(scripted=lambda *_: (200, b"x" * 300_000, {}))
    assert len(try_once(server.url, 5, max_bytes=300_000)[2]) == 300_000
    with pytest.raises(Failed, match="more than"):
        try_once(server.url, 5, max_bytes=200_000)
    server.close()


def test_a_connection_that_the_server_closes_is_read_to_its_end():
    server = FaultServer(scripted=lambda *_: (200, b"y" * 100_000, {"Connection": "close"}))
    assert try_once(server.url, 5)[2] == b"y" * 100_000
    server.close()
