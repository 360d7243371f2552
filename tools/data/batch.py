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
import re
import time

import generate
from plumbing.batches import part_files, sent_bodies
from plumbing.client import Client, NotTaken, Retry
from plumbing.errors import Parser, UserError, check, command, positive
from plumbing.files import append, fits, read_json, read_lines, write_json, write_text
from plumbing.ledger import Ledger, Stopping, most_tokens, tokens_of
from plumbing.complaints import hint_of, is_success, may_pass
from plumbing.transport import Failed, exchange

MAX_REQUESTS, MAX_BYTES = 50_000, 190_000_000  # OpenAI's limits for one file are 50,000 and 200 MB
MAX_DOWNLOAD = 2**31
SLOWEST = 20  # times --timeout, of a file of 200 MB
OVER = ("completed", "expired", "cancelled", "failed")
QUEUE_FULL = re.compile("enqueued|token_limit_exceeded|queue", re.I)   # a limit on what waits at one time


def json_of(content: bytes):
    """A provider's JSON, or None where it is none: a gateway's page, half an answer."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def lines_of(path):
    """Yield the objects of a file that the provider has written; what is no object is left out."""
    for _, line in read_lines(path):
        row = json_of(line)
        if isinstance(row, dict):
            yield row


def is_object(content: bytes) -> bool:
    return isinstance(json_of(content), dict)


def is_jsonl(content: bytes) -> bool:
    """Whether a file from the provider is one at all: at least one of its lines is an object."""
    return any(is_object(line) for line in content.splitlines()) or not content.strip()


class BatchClient(Client):
    """A Client that also speaks the files and batches endpoints."""

    def call(self, method, path, query="", lookup=None, good=is_object, **kwargs) -> bytes:
        """One HTTP call, retried -> the content, once it is good.

        lookup: asked before a second POST whether the first worked.
        """
        def send(session, url, key, *_):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return session.request(method, url, headers=headers, timeout=self.args.timeout,  # of each byte
                                   stream=True, allow_redirects=False, **kwargs)

        url = self.endpoint(path, query)
        for failures in range(self.args.tries):
            if failures and lookup and (done := lookup()):
                return done
            status, headers = 0, {}
            try:
                with self.session() as session:
                    status, headers, content = exchange(send, session, url, self.key, {},
                                                        SLOWEST * self.args.timeout, MAX_DOWNLOAD)
            except Failed as failed:
                self.problem = self.one_line(failed.problem)
                check(not failed.hint, f"{self.address}{path}: {self.problem} ({failed.hint})")
            else:
                if is_success(status) and good(content):
                    return content
                self.problem = self.one_line(f"status {status}: {content.decode('utf-8', 'replace')}")
                check(is_success(status) or may_pass(status),
                      f"{self.address}{path} answered {self.problem} ({hint_of(status, self.problem)})")
            self.wait(failures, headers, limited=status == 429)
        raise Stopping(f"{path} failed {self.args.tries} times: {self.problem}")

    def ask_object(self, method, path, **kwargs) -> dict:
        return json_of(self.call(method, path, **kwargs))


def has_id(content: bytes) -> bool:
    """Whether what came back names what was made."""
    return is_object(content) and isinstance(json_of(content).get("id"), str)


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
        return [key for key, _ in sent_bodies(self.path)]

    def submit(self, client, poll):
        if "file" not in self.state:  # a second upload after a kill costs nothing
            files = {"file": (self.path.name, self.path.read_bytes())}  # bytes: a retry sends them again
            answer = client.ask_object("POST", "/files", data={"purpose": "batch"}, files=files, good=has_id)
            self.note(file=answer["id"], ready=answer.get("status") in (None, "processed"))
        if "batch" not in self.state:  # a second batch would be paid for
            self.await_file(client, poll)
            batch = {"input_file_id": self.state["file"], "endpoint": "/v1/chat/completions",
                     "completion_window": "24h"}
            content = self.find(client) or client.call("POST", "/batches", lookup=lambda: self.find(client),
                                                       good=has_id, json=batch)
            self.note(batch=json_of(content)["id"], status="submitted")

    def await_file(self, client, poll):
        """Some providers look through an uploaded file first, and take no batch of it before."""
        while not self.state.get("ready", True):
            file = client.ask_object("GET", f"/files/{self.state['file']}")
            check(file.get("status") not in ("error", "failed", "deleted"),
                  f"the provider refuses the file {self.path}: {client.one_line(str(file))}")
            if file.get("status") in ("pending", "uploaded", "running", "processing", "notRunning"):
                time.sleep(poll)
            else:
                self.note(ready=True)

    def find(self, client):
        """The provider's words on the batch of our uploaded file, if there is one."""
        after = ""
        while True:
            page = client.ask_object("GET", "/batches", query=f"limit=100{after}")
            rows = page.get("data")
            batches = [row for row in rows if fits(row, dict)] if fits(rows, list) else []
            for batch in batches:
                if batch.get("input_file_id") == self.state["file"] and fits(batch.get("id"), str):
                    return json.dumps(batch).encode()
            last = batches[-1].get("id") if batches else None
            if not page.get("has_more") or not last or after == f"&after={last}":
                return None
            after = f"&after={last}"

    def poll(self, client):
        """Ask how the batch stands; once it's over, fetch what came back. Returns whether it's over."""
        batch = client.ask_object("GET", f"/batches/{self.state['batch']}")
        if batch.get("status") not in OVER:
            return False
        if batch["status"] == "failed":
            words = client.one_line(failure_of(batch))
            if QUEUE_FULL.search(words):  # nothing was run; sent again, as a new file, once others are over
                state = {key: value for key, value in self.state.items() if key not in ("file", "batch")}
                self.state = state
                self.note(status="queue full", problem=words)
                return False
            self.note(refused=words)  # nothing was run
        for kind, key in (("output", "output_file_id"), ("errors", "error_file_id")):
            if batch.get(key):
                content = client.call("GET", f"/files/{batch[key]}/content", good=is_jsonl)
                text = client.redact(content.decode("utf-8", "replace"))
                write_text(self.path.with_suffix(f".{kind}.jsonl"), text)
        self.note(status="fetched")
        return True

    def join(self, client, prompts, request_of):
        """Take the answers into raw.jsonl, each once; what is no answer stays open for a further batch."""
        ledger, sent, problem = client.ledger, dict(sent_bodies(self.path)), ""
        for kind in ("output", "errors"):
            path = self.path.with_suffix(f".{kind}.jsonl")
            for row in lines_of(path) if path.exists() else ():
                key, response = own_id(row.get("custom_id")), row.get("response")
                if key not in sent or key in ledger.answered or not isinstance(response, dict):
                    continue
                request, body = request_of(key), sent[key]
                try:
                    answer = request | client.read_answer(
                        generate.render(prompts, **request), body, whole(response.get("status_code")),
                        json.dumps(response.get("body")).encode())
                except NotTaken as failure:
                    client.refused_fields[request["model"]] |= failure.args[0]
                except (Retry, UserError) as failure:  # this line's own; credit may be added, a key mended
                    problem = client.one_line(str(failure.args[0]))
                else:
                    append(ledger.raw, answer | {"batch": self.state.get("batch")})
                    ledger.count_answer(answer)
        self.note(status="joined", problem=problem)
        ledger.in_batches -= sent.keys()


def failure_of(batch: dict) -> str:
    """Why a batch failed as a whole, wherever a provider says so."""
    errors = batch.get("errors")
    rows = errors.get("data") if isinstance(errors, dict) else errors
    first = rows[0] if isinstance(rows, list) and rows else errors
    if not isinstance(first, dict):
        return str(first or batch.get("message"))
    return " ".join(str(first[key]) for key in ("code", "message") if first.get(key))


def own_id(text):
    """The request that a custom_id names, or None."""
    return int(text) if type(text) in (str, int) and re.fullmatch("[0-9]{1,18}", str(text)) else None


def whole(value) -> int:
    """A line's status, or 0 where a provider wrote none."""
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def write_parts(todo, folder, client, prompts, part_size):
    """Write requests into files of new batches, one model a file, as far as the budget goes -> [Part]."""
    ledger, parts, lines, sizes = client.ledger, [], {}, {}
    number = max((int(path.stem) for path in part_files(folder)), default=0)

    def close(model):
        nonlocal number
        number += 1
        part = Part(folder / f"{number:04}.jsonl")
        tokens_in, tokens_out = (sum(side) for side in zip(*(tokens for _, tokens in lines[model])))
        part.note(status="new", model=model, requests=len(lines[model]), tokens_in=tokens_in,
                  tokens_out=tokens_out)
        text = "".join(line for line, _ in lines.pop(model))
        write_text(part.path, text)  # with this file the part exists
        parts.append(part)

    for request in todo:
        message, model = generate.render(prompts, **request), request["model"]
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
    parts = [Part(path) for path in part_files(folder)]  # the ledger has reserved their tokens
    parts = [part for part in parts if part.state["status"] != "joined"]

    def request_of(i):
        return generate.request_at(i, args.seed, prompts, pools, args.models)

    while True:
        taken = {i for part in parts for i in part.ids()} | ledger.answered
        todo = (request_of(i) for i in range(args.n) if i not in taken)
        parts += write_parts(todo, folder, client, prompts, flags.part_size)
        if not parts:
            return
        before, refused, problem = progress(client), "", ""
        while parts:
            submit(parts, client, flags.poll)
            for part in [part for part in parts if part.state["status"] != "queue full"]:
                if part.state["status"] != "fetched" and not part.poll(client):
                    continue
                part.join(client, prompts, request_of)
                ledger.reserved.subtract(part.tokens)
                refused = refused or part.state.get("refused", "")
                problem = part.state["problem"] or problem
                parts.remove(part)
                done = len(ledger.answered - ledger.brainstorms.keys())
                print(f"{part.path.name}: joined; {done:,} of {args.n:,}, ${ledger.cost(ledger.spent):.2f}",
                      flush=True)
            if parts:
                time.sleep(flags.poll * random.uniform(0.9, 1.1))
        check(not refused, f"the provider refused a batch of {folder}: {refused}")
        if progress(client) == before:
            problem = problem or "see .errors.jsonl in batches/"
            raise Stopping(f"the last batches brought no new answer ({problem})")


def progress(client) -> tuple:
    """What a batch can bring: answers, or the knowledge of fields that have to be left out."""
    return len(client.ledger.answered), sum(map(len, client.refused_fields.values()))


def submit(parts, client, poll) -> None:
    """Submit all parts that can be. Those that a full queue has refused go one at a time, each once no other
    waits."""
    for part in parts:
        if part.state["status"] != "queue full":
            part.submit(client, poll)
    under_way = [part for part in parts if part.state["status"] in ("submitted", "fetched")]
    refused = [part for part in parts if part.state["status"] == "queue full"]
    if refused and not under_way:
        part = refused[0]
        alone = part.state.get("alone", 0) + 1
        check(alone <= client.args.tries,
              f"{part.path}: too large for the provider's queue, even alone: {part.state['problem']} "
              "(a smaller --part-size, for a new --out)")
        part.note(alone=alone)
        part.submit(client, poll)


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
