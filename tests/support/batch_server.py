"""A batch API of ours, for the tests of tools/data/batch.py, that keeps count of what it would bill."""
import collections
import http.server
import json
import random
import re
import threading
import time

from fault_server import KEY, answer_text
from plumbing.files import read_jsonl


class BatchServer(http.server.ThreadingHTTPServer):
    """POST /files, POST /batches, GET /batches, /batches/ID, /files/ID/content, and live chat completions.

    slow: seconds between doing a thing and saying so. errors: share of requests that end in the error file.
    flaky: share of calls that are done and then answered with a 500. expire: batches that expire half done.
    """

    daemon_threads = True

    def __init__(self, slow=0.0, errors=0.0, flaky=0.0, expire=0, ready_after=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.slow, self.errors, self.flaky, self.expire = slow, errors, flaky, expire
        self.ready_after = ready_after
        self.files, self.batches, self.billed, self.live = {}, {}, collections.Counter(), 0
        self.rng, self.guard, self.fail_validation = random.Random(0), threading.Lock(), None
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def close(self):
        self.shutdown()
        self.server_close()

    def run_batch(self, identifier, file):
        """Answers all requests of a file: one output file, one error file."""
        output, errors, rows = [], [], [json.loads(line) for line in self.files[file].splitlines()]
        if self.fail_validation:
            return {"status": "failed", "errors": {"data": [{"message": self.fail_validation}]}}
        status = "completed"
        if self.expire > 0:
            self.expire, status, rows = self.expire - 1, "expired", rows[: len(rows) // 2]
        for row in rows:
            assert (row["method"], row["url"]) == ("POST", "/v1/chat/completions")
            if self.rng.random() < self.errors:
                body = {"error": {"message": "try later", "code": None}}
                errors.append({"custom_id": row["custom_id"], "response": {"status_code": 500, "body": body}})
                continue
            self.billed[row["custom_id"]] += 1
            message = row["body"]["messages"][0]["content"]
            choice = {"message": {"content": answer_text(message, self.rng)}, "finish_reason": "stop"}
            body = {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 50}}
            output.append({"custom_id": row["custom_id"], "response": {"status_code": 200, "body": body},
                           "error": None})
        self.rng.shuffle(output)
        result = {"status": status, "output_file_id": None, "error_file_id": None}
        for key, lines in (("output_file_id", output), ("error_file_id", errors)):
            if lines:
                result[key] = f"file-{identifier}-{key}"
                self.files[result[key]] = "".join(json.dumps(line) + "\n" for line in lines)
        return result


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Authorization"] == f"Bearer {KEY}"
        with server.guard:
            if self.path == "/v1/files":
                assert b'name="purpose"\r\n\r\nbatch' in body
                identifier = f"file-{len(server.files)}"
                server.files[identifier] = re.search(rb"\r\n\r\n(\{.*\n)\r\n--", body, re.DOTALL)[1].decode()
                value = {"id": identifier}
            elif self.path == "/v1/batches":
                file, identifier = json.loads(body)["input_file_id"], f"batch-{len(server.batches)}"
                value = {"id": identifier, "input_file_id": file, "status": "in_progress",
                         "at": time.monotonic(), "end": server.run_batch(identifier, file)}
                server.batches[identifier] = value
            else:
                server.live += 1
                text = answer_text(json.loads(body)["messages"][0]["content"], server.rng)
                value = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
        time.sleep(server.slow)
        self.reply(value)

    def do_GET(self):
        server = self.server
        path, _, query = self.path.removeprefix("/v1/").partition("?")
        if path.endswith("/content"):
            return self.reply(server.files[path.split("/")[1]].encode())
        if path == "batches":  # newest first, two a page
            ids = list(server.batches)[::-1]
            after = re.search(r"after=([\w-]+)", query)
            ids = ids[ids.index(after[1]) + 1 :] if after else ids
            return self.reply({"data": [server.batches[i] for i in ids[:2]], "has_more": len(ids) > 2})
        found = server.batches[path.split("/")[1]]
        if time.monotonic() - found["at"] >= server.ready_after:
            found = found | found["end"]
        self.reply(found)

    def reply(self, value):
        flaky = self.server.rng.random() < self.server.flaky
        payload = b"{}" if flaky else value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(500 if flaky else 200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


def answers(folder):
    """How often each request was answered: {id: times}."""
    rows = read_jsonl(folder / "raw.jsonl", log=True)
    return collections.Counter(row["id"] for row in rows if row["step"] == "generate")
