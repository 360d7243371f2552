"""tools/data/batch.py: generate.py through a provider's batch API: half the price, answers within a day.

    python -m tools.data.batch --model gpt-4o-mini --n 500_000 --price gpt-4o-mini:0.075:0.30

It takes generate.py's flags, asks the same requests (by POST /files and /batches) and adds to the same
raw.jsonl, so live and batch runs can take turns. The brainstorms, 1.5 % of the requests, are asked live,
since one wave of them waits for the other. One command does everything and may be killed at any point; the
same command goes on from there:

    RUN/batches/0001.jsonl      the requests of one batch, in the provider's format
    RUN/batches/0001.json       how far it got: uploaded file, batch, status
    RUN/batches/0001.output.jsonl, 0001.errors.jsonl    what came back; its answers then join raw.jsonl

A kill between the provider's "batch created" and our note of it can't pay twice: the provider's list of
batches is searched for our uploaded file first. Requests that came back as errors, or not at all, go into a
further batch.
"""

import json
import random
import time

import requests

import generate
from plumbing.client import HINTS, RETRY, Client, Retry
from plumbing.errors import Parser, check, command, positive
from plumbing.files import append, parse_line, read_json, read_lines, write_json, write_text
from plumbing.ledger import Ledger, Stopping, most_tokens, tokens_of

MAX_REQUESTS, MAX_BYTES = 50_000, 190_000_000  # OpenAI's limits for one file are 50,000 and 200 MB
OVER = ("completed", "expired", "cancelled", "failed")


def rows_of(path, **schema):
    """Yield the rows of a file that the provider has written, or that we wrote for it. An answer may hold
    any characters, and the last line may lack its end."""
    for number, line in read_lines(path):
        yield parse_line(line, f"{path}:{number}", schema, any_characters=True)


class BatchClient(Client):
    """A Client that also speaks the files and batches endpoints."""

    def call(self, method, path, lookup=None, **kwargs):
        """One HTTP call, retried -> response. lookup: asked before a second POST whether the first
        worked."""
        url = self.url.replace("/chat/completions", path)
        key = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        for failures in range(self.args.tries):
            if failures and lookup and (done := lookup()):
                return done
            try:
                with self.session() as session:
                    response = session.request(method, url, headers=key, timeout=self.args.timeout,
                                               allow_redirects=False, **kwargs)
            except requests.RequestException as error:
                self.problem, waits = type(error).__name__, {}
            else:
                if response.status_code == 200:
                    return response
                self.problem, waits = f"status {response.status_code}: {response.text}", response.headers
                hint = HINTS.get(response.status_code, "no retry would help")
                check(response.status_code in RETRY,
                      f"{self.address}{path} answered {self.one_line(self.problem)} ({hint})")
            self.wait(failures, waits, everyone=False)
        raise Stopping(f"{path} failed {self.args.tries} times: {self.one_line(self.problem)}")


class Part:
    """One batch: its requests file and its state, both replaced at once, never half-written."""

    def __init__(self, path):
        self.path, self.state_path = path, path.with_suffix(".json")
        self.state = {"status": "new"}
        if self.state_path.exists():
            self.state = read_json(self.state_path, {"status": str})

    def note(self, **changes):
        self.state |= changes
        write_json(self.state_path, self.state)

    @property
    def tokens(self):
        """The most that the batch can use, a Counter like Ledger.reserved."""
        return tokens_of(self.state["model"], self.state["tokens_in"], self.state["tokens_out"])

    def ids(self):
        return [int(row["custom_id"]) for row in rows_of(self.path, custom_id=str)]

    def submit(self, client):
        if "file" not in self.state:  # a second upload after a kill costs nothing
            files = {"file": (self.path.name, self.path.read_bytes())}  # bytes: a retry sends them again
            answer = client.call("POST", "/files", data={"purpose": "batch"}, files=files)
            self.note(file=answer.json()["id"])
        if "batch" not in self.state:  # a second batch would be paid for
            batch = {"input_file_id": self.state["file"], "endpoint": "/v1/chat/completions",
                     "completion_window": "24h"}
            response = self.find(client) or client.call("POST", "/batches", lookup=lambda: self.find(client),
                                                        json=batch)
            self.note(batch=response.json()["id"], status="submitted")

    def find(self, client):
        """The provider's response for the batch of our uploaded file, if there is one."""
        after = ""
        while True:
            page = client.call("GET", f"/batches?limit=100{after}").json()
            for batch in page["data"]:
                if batch["input_file_id"] == self.state["file"]:
                    return client.call("GET", f"/batches/{batch['id']}")
            if not page.get("has_more"):
                return None
            after = f"&after={page['data'][-1]['id']}"

    def poll(self, client):
        """Ask how the batch stands; once it's over, fetch what came back. Returns whether it's over."""
        batch = client.call("GET", f"/batches/{self.state['batch']}").json()
        if batch["status"] not in OVER:
            return False
        if batch["status"] == "failed":
            errors = (batch.get("errors") or {}).get("data") or [{}]
            self.note(refused=client.one_line(str(errors[0].get("message"))))  # nothing was run
        for kind, key in (("output", "output_file_id"), ("errors", "error_file_id")):
            if batch.get(key):
                content = client.call("GET", f"/files/{batch[key]}/content").content.decode()
                write_text(self.path.with_suffix(f".{kind}.jsonl"), client.redact(content))
        self.note(status="fetched")
        return True

    def join(self, client, prompts, request_of):
        """Take the answers into raw.jsonl, each once; what is no answer stays open for a further batch."""
        ledger, sent = client.ledger, set(self.ids())
        for kind in ("output", "errors"):
            path = self.path.with_suffix(f".{kind}.jsonl")
            if not path.exists():
                continue
            for row in rows_of(path, custom_id=str):
                key, response = int(row["custom_id"]), row.get("response") or {}
                if key not in sent or key in ledger.answered or not response:
                    continue
                request = request_of(key)
                message = generate.render(prompts, request)
                try:
                    answer = client.read_answer(request, message, client.body(request, message),
                                                response.get("status_code"),
                                                json.dumps(response.get("body")).encode())
                except Retry:
                    continue
                if answer is not None:
                    append(ledger.raw, answer | {"batch": self.state["batch"]})
                    ledger.count_answer(answer)
        self.note(status="joined")


def write_parts(todo, folder, client, prompts, part_size):
    """Write requests into files of new batches, one model a file, as far as the budget goes -> [Part]."""
    ledger, parts, lines, sizes = client.ledger, [], {}, {}
    number = max((int(path.stem) for path in folder.glob("[0-9]*[0-9].jsonl")), default=0)

    def close(model):
        nonlocal number
        number += 1
        part = Part(folder / f"{number:04}.jsonl")
        tokens_in, tokens_out = (sum(side) for side in zip(*(tokens for _, tokens in lines[model])))
        part.note(status="new", model=model, requests=len(lines[model]), tokens_in=tokens_in,
                  tokens_out=tokens_out)
        # with this file the part exists
        write_text(part.path, "".join(line for line, _ in lines.pop(model)))
        parts.append(part)

    for request in todo:
        message, model = generate.render(prompts, request), request["model"]
        tokens = most_tokens(message), client.args.max_answer_tokens
        if not ledger.within_budget(tokens_of(model, *tokens)):
            print("the budget leaves no room for more requests")
            break
        ledger.reserved.update(tokens_of(model, *tokens))
        line = json.dumps({"custom_id": str(request["id"]), "method": "POST", "url": "/v1/chat/completions",
                           "body": client.body(request, message)}) + "\n"
        if model in lines and (len(lines[model]) == part_size or sizes[model] + len(line) > MAX_BYTES):
            close(model)
        lines.setdefault(model, []).append((line, tokens))
        sizes[model] = len(line) + (sizes[model] if len(lines[model]) > 1 else 0)
    for model in list(lines):
        close(model)
    return parts


def run_batches(args, flags, client, prompts, pools):
    """Submit, await and join batches until all requests are answered or no batch brings an answer."""
    ledger, folder = client.ledger, client.ledger.folder / "batches"
    folder.mkdir(exist_ok=True)
    parts = [Part(path) for path in sorted(folder.glob("[0-9]*[0-9].jsonl"))]
    parts = [part for part in parts if part.state["status"] != "joined"]
    for part in parts:
        ledger.reserved.update(part.tokens)

    def request_of(i):
        return generate.request_at(i, args.seed, prompts, pools, args.models)

    while True:
        taken = {i for part in parts for i in part.ids()} | ledger.answered
        todo = (request_of(i) for i in range(args.n) if i not in taken)
        parts += write_parts(todo, folder, client, prompts, flags.part_size)
        if not parts:
            return
        for part in parts:
            part.submit(client)
        before, refused = len(ledger.answered), ""
        while parts:
            for part in [part for part in parts if part.state["status"] == "fetched" or part.poll(client)]:
                part.join(client, prompts, request_of)
                ledger.reserved.subtract(part.tokens)
                refused = refused or part.state.get("refused", "")
                parts.remove(part)
                done = len(ledger.answered - ledger.brainstorms.keys())
                print(f"{part.path.name}: joined; {done:,} of {args.n:,}, ${ledger.cost(ledger.spent):.2f}",
                      flush=True)
            if parts:
                time.sleep(flags.poll * random.uniform(0.9, 1.1))
        check(not refused, f"the provider refused a batch of {folder}: {refused}")
        if len(ledger.answered) == before:
            raise Stopping("the last batches brought no new answer: see their .errors.jsonl in batches/")


def main(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0], epilog="and all flags of generate.py")
    parser.add_argument("--poll", type=positive(float), default=60, help="seconds between looks at a batch")
    parser.add_argument("--part-size", type=positive(int), default=MAX_REQUESTS,
                        help="most requests in one batch")
    flags, rest = parser.parse_known_args(argv)
    args = generate.options(rest)
    prompts = generate.load_prompts()
    with Ledger(args.folder, args.prices, args.budget_usd, args.budget_tokens) as ledger:
        client = BatchClient(args, ledger, generate.request_body, generate.post, generate.read_completion)
        run_batches(args, flags, client, prompts, generate.brainstorm(client, prompts, args))
    generate.report(args, prompts)
    return ledger.exit_code


if __name__ == "__main__":
    command(main)
