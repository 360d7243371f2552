"""A local OpenAI-compatible server with faults on demand, for the tests of generate.py.

    python tests/support/fault_server.py [--fault NAME=SHARE ...] [--log FILE] [--delay SECONDS]    # prints its port

It answers with valid examples of the type asked for; --fault breaks a share of the answers. Each answer that
leaves whole, and would be billed, is one line in --log: the sha256 of its user message.
"""

import argparse
import contextlib
import hashlib
import json
import random
import re
import socket
import threading
import time

KEY = "sk-tests-0123456789"
WORDS = (
    "amber basin candle drift ember fable garnet harbor island jasmine kettle lantern meadow nectar orchard "
    "pebble quarry ripple saddle timber umbra valley willow yonder zephyr anchor breeze copper dagger eagle"
).split()


def prose(rng, number):
    return " ".join(rng.choice(WORDS) + str(rng.randrange(1000)) for _ in range(number))


def answer_text(message, rng):
    """A valid answer to one of our prompts: a list of tasks, or an object with the quoted keys."""
    if message.startswith("Suggest"):
        return json.dumps([f"Given {prose(rng, 3)}, find {prose(rng, 3)}." for _ in range(20)])
    return json.dumps({key: prose(rng, 8) for key in re.findall(r'^- "(\w+)":', message, re.MULTILINE)})


class FaultServer:
    """faults: {name: share of requests}; names: status-NUMBER, hang, cut, garbage, truncated, drip, no-usage,
    headless (closes without a byte), reset, half-headers, drip-headers. scripted: a function (number, body, headers) ->
    (status, object or bytes, headers) or None. delay, hang: seconds. tls: an SSLContext.
    """

    def __init__(self, faults=None, delay=0.0, log=None, seed=0, scripted=None, hang=30.0,
                 tls=None):
        self.faults, self.delay, self.hang = faults or {}, delay, hang
        self.scripted, self.tls = scripted, tls
        self.rng, self.guard = random.Random(seed), threading.Lock()
        self.log = open(log, "a", buffering=1) if log else None
        self.requests, self.answered, self.bodies, self.headers, self.times = 0, [], [], [], []
        self.connections = 0
        self.fault_counts = {}
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self.socket.getsockname()[1]
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.connections += 1
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def close(self):
        with contextlib.suppress(OSError):  # closed before
            self.socket.shutdown(socket.SHUT_RDWR)  # a close alone leaves a waiting accept() alive
        self.socket.close()

    def serve(self, connection):
        try:
            if self.tls:
                connection = self.tls.wrap_socket(connection, server_side=True)
            with connection, connection.makefile("rb") as stream:
                while self.one(connection, stream):
                    pass
        except OSError:
            pass

    def one(self, connection, stream):
        line = stream.readline()
        if not line:
            return False
        headers = {}
        while header := stream.readline().strip():
            name, _, value = header.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        body = json.loads(stream.read(int(headers.get("content-length", 0))))
        with self.guard:
            number, self.requests = self.requests, self.requests + 1
            self.bodies.append(body)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            point, fault = self.rng.random(), None
            for name, share in self.faults.items():
                point -= share
                if point < 0 and fault is None:
                    fault = name
            self.fault_counts[fault] = self.fault_counts.get(fault, 0) + 1
            rng = random.Random(self.rng.random())
        if self.delay:
            time.sleep(self.delay * rng.uniform(0.5, 1.5))
        if self.scripted and (scripted := self.scripted(number, body, headers)):
            status, value, extra = scripted
            self.send(connection, status, value, extra)
            return True
        message = body["messages"][0]["content"]
        text = answer_text(message, rng)
        value = {
            "object": "chat.completion",
            "model": body["model"],
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            ],
            "usage": {"prompt_tokens": len(message) // 4, "completion_tokens": len(text) // 4},
        }
        if fault == "no-usage":
            del value["usage"]
        if fault and fault.startswith("status-"):
            extra = {"Retry-After": "0.05"} if fault == "status-429" else {}
            self.send(connection, int(fault[7:]), {"error": {"message": fault, "code": None}}, extra)
            return True
        if fault == "hang":
            time.sleep(self.hang)
            return False
        if fault == "headless":
            return False
        if fault == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            return False
        payload = json.dumps(value).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(payload)}\r\n\r\n".encode()
        if fault == "half-headers":
            connection.sendall(head[:20])
            return False
        if fault == "drip-headers":
            for byte in head[:-2] + b"X: " + b"x" * 60_000:
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
            return False
        if fault == "cut":
            connection.sendall(head + payload[: len(payload) // 2])
            return False
        if fault == "garbage":
            payload = bytes(rng.randrange(256) for _ in range(100))
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + payload)
            return True
        if fault == "truncated":  # cut, but with an honest length
            payload = payload[: len(payload) // 2]
            connection.sendall(
                f"HTTP/1.1 200 OK\r\nContent-Length: {len(payload)}\r\n\r\n".encode() + payload
            )
            return True
        if fault == "drip":
            connection.sendall(head)
            for byte in payload:
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
            return True
        with self.guard:
            self.answered.append(message)
            if self.log:  # before the first byte leaves, so that a client killed in between leaves a trace
                self.log.write(hashlib.sha256(message.encode()).hexdigest() + "\n")
        connection.sendall(head + payload)
        return True

    def send(self, connection, status, value, extra=()):
        payload = value if isinstance(value, bytes) else json.dumps(value).encode()
        lines = [
            f"HTTP/1.1 {status} X",
            f"Content-Length: {len(payload)}",
            "Content-Type: application/json",
            *(f"{key}: {text}" for key, text in dict(extra).items()),
        ]
        connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + payload)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fault", action="append", default=[], help="NAME=SHARE")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--log")
    args = parser.parse_args()
    server = FaultServer(
        {name: float(share) for name, share in (f.split("=") for f in args.fault)}, args.delay, args.log
    )
    print(server.port, flush=True)
    threading.Event().wait()
