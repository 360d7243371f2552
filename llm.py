"""llm.py: prompts -> answers. Asks an OpenAI-compatible server for chat completions, and keeps the books.

generate.py writes the prompts and reads the answers; nothing here knows what they say. A run is a folder:
    header.json     the settings that decide its requests; a rerun with others is refused
    started.jsonl   a line before each try, and one after each refusal; a try with neither answer nor refusal
                    may have been paid for and lost, and counts against the budget as if it had used its most
    raw.jsonl       each answer as it came, with finish_reason and usage, flushed before anything reads it
    lock            held by the one process that may write
An answer in raw.jsonl is never asked for again; a kill loses at most the --concurrency answers under way,
and started.jsonl shows them.

A request is {"id", "step", "type", "params", "model"}; its row in raw.jsonl adds response, finish_reason,
usage {"prompt_tokens", "completion_tokens", and "estimated" where the server gave none} and seconds.
"""

import collections
import email.utils
import fcntl
import gzip
import json
import os
import random
import re
import sys
import threading
import time
import urllib.parse
import zlib

import requests
import urllib3

from plumbing.errors import UserError, command  # noqa: F401


class Stopping(Exception):
    """The run ends before its end, in good order; str(error) says why."""


class BudgetReached(Stopping):
    """One more try could break a budget."""


class Retry(Exception):
    """A try that failed in a way that may pass: (how, the refusal for the ledger, None if perhaps paid)."""


# ---- Files: append-only logs that survive a kill ----


def open_log(path):
    """Opens a log for appending; a last line torn by a kill is cut, and its request is made again."""
    file = open(path, "ab+", buffering=0)
    size = end = file.seek(0, os.SEEK_END)
    while end > 0:  # backwards in blocks, to the last line feed
        begin = max(0, end - 65536)
        file.seek(begin)
        if (newline := file.read(end - begin).rfind(b"\n")) >= 0:
            end = begin + newline + 1
            break
        end = begin
    if end < size:
        file.truncate(end)
    return file


def append(file, row):
    """Appends a row in one unbuffered write: once this returns, a kill can't lose it (a power cut might)."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    if (written := file.write(line)) != len(line):  # a full disk; half a line must not meet the next one
        file.truncate(file.seek(0, os.SEEK_END) - written)
        raise UserError(f"{file.name}: the disk is full; make room and run the same command again")


def read_jsonl(path, log=True):
    """Yields the rows of a JSON-lines file, gzipped or not; in a log, a line not yet ended doesn't count."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.endswith("\n") or not log:
                    yield json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}:{number}: not JSON ({error}): mend or delete this line") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: can't be read: {error}") from None


def write_json(path, value):
    """Replaces a JSON file at once."""
    partial = path.with_name(path.name + ".tmp")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", "utf-8")
    os.replace(partial, path)


# ---- The ledger: what was asked, what was answered, what it cost ----


def tokens_of(model, tokens_in, tokens_out):
    return collections.Counter({(model, "in"): tokens_in, (model, "out"): tokens_out})


def estimate_tokens(text):
    """A rough count, for servers that report no usage: four UTF-8 bytes a token."""
    return len(text.encode("utf-8", "replace")) // 4 + 1


def most_tokens(message):
    """More than a prompt can cost: three UTF-8 bytes a token, and 50 for the server's chat template."""
    return len(message.encode()) // 3 + 50


class Run:
    """A run's folder and ledger: one process at a time holds it, many threads share it.

    prices: {(model, "in" or "out"): USD a token}. spent, lost and reserved are Counters with the same keys:
    tokens of the answers on disk, of tries that may have been paid for without an answer, and the most that
    the tries under way can use.
    """

    def __init__(self, folder, prices, budget_usd=None, budget_tokens=None, read_only=False):
        self.folder, self.prices = folder, prices
        self.budget_usd, self.budget_tokens = budget_usd, budget_tokens
        self.answered, self.brainstorms, self.pending = set(), {}, {}
        self.spent, self.lost, self.reserved = (collections.Counter() for _ in range(3))
        self.tries_lost = self.usage_estimated = 0
        self.changed, self.stop = threading.Condition(), threading.Event()
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(folder / "lock", "w")
            try:  # the kernel lets go of this lock with the process, even a killed one
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{folder}: another process works here; wait for it or stop it") from None
            self.raw, self.started = open_log(folder / "raw.jsonl"), open_log(folder / "started.jsonl")
        for row in read_jsonl(folder / "raw.jsonl"):
            self.count_answer(row)
        tries, most = collections.Counter(), {}
        for row in read_jsonl(folder / "started.jsonl"):
            tries[row["id"]] += -1 if "refused" in row else 1
            if "refused" not in row:
                most[row["id"]] = tokens_of(row["model"], row["tokens_in"], row["tokens_out"])
        for key, number in tries.items():
            for _ in range(number - (key in self.answered)):
                self.count_lost(most[key])

    def close(self):
        for file in (self.raw, self.started, self.lock):
            file.close()

    def check_header(self, settings):
        """Refuses settings other than the run's own, and notes those of a new run; returns the header."""
        path = self.folder / "header.json"
        if not path.exists():
            write_json(path, settings | {"tasks": None})
        header = json.loads(path.read_text("utf-8"))
        for key, value in settings.items():
            if header.get(key) != value:
                raise UserError(f"{path}: the run was begun with {key} {header.get(key)}, not {value}: "
                                "go back to that, or choose another --out")
        return header

    def count_answer(self, row):
        self.answered.add(row["id"])
        if row["step"] == "brainstorm":
            self.brainstorms[row["id"]] = row["response"]
        usage = row["usage"]
        self.spent.update(tokens_of(row["model"], usage["prompt_tokens"], usage["completion_tokens"]))
        self.usage_estimated += "estimated" in usage

    def count_lost(self, tokens):
        self.lost.update(tokens)
        self.tries_lost += 1

    def cost(self, tokens):
        """USD of a Counter of tokens; a model without a price costs nothing."""
        return sum(number * self.prices.get(key, 0) for key, number in tokens.items())

    def fits(self, tokens):
        """Whether a try stays within the budgets even if all that is under way uses its most."""
        total = self.spent + self.lost + self.reserved + tokens
        return ((self.budget_usd is None or self.cost(total) <= self.budget_usd)
                and (self.budget_tokens is None or total.total() <= self.budget_tokens))

    def start(self, request, tokens_in, tokens_out):
        """Logs a try before it's sent. If a budget could break: waits for others or raises BudgetReached."""
        tokens = tokens_of(request["model"], tokens_in, tokens_out)
        with self.changed:
            while not self.fits(tokens):
                if not self.pending:
                    raise BudgetReached("the budget is used up")
                self.changed.wait()
            if self.stop.is_set():
                raise Stopping("interrupted")
            append(self.started, {"id": request["id"], "model": request["model"],
                                  "tokens_in": tokens_in, "tokens_out": tokens_out})
            self.pending[request["id"]] = tokens
            self.reserved.update(tokens)

    def end(self, request, row=None, refused=None):
        """Ends a try: with an answer, with a refusal (unpaid), or with neither (perhaps paid)."""
        with self.changed:
            tokens = self.pending.pop(request["id"])
            self.reserved.subtract(tokens)
            self.changed.notify_all()
            if row is not None:
                append(self.raw, row)
                self.count_answer(row)
            elif refused is not None:
                append(self.started, {"id": request["id"], "refused": refused})
            else:
                self.count_lost(tokens)

    def ledger(self):
        """What the run has used and cost so far, for the report."""
        models = {name: {side: self.spent[name, side] for side in ("in", "out")} for name, _ in self.spent}
        return {"tokens": self.spent.total(), "tokens in": sum(use["in"] for use in models.values()),
                "tokens out": sum(use["out"] for use in models.values()),
                "usd": round(self.cost(self.spent), 4),
                "answers with estimated usage": self.usage_estimated,
                "tries perhaps paid without an answer": self.tries_lost,
                "their tokens at most": self.lost.total(), "models": models}


# ---- HTTP: one request, tried until it is answered ----

RETRY = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
HINTS = {401: "check OPENAI_API_KEY", 402: "the account needs credit", 403: "check what the key may do",
         404: "check OPENAI_BASE_URL, which mostly ends in /v1, and --model", 429: "the quota is used up"}
# Body fields that some servers don't take, and the words by which a status 400 names them.
OPTIONAL = {"max_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p",
            "response_format": "response.format|json.object|json.mode|json.schema"}


class Client:
    """Asks for chat completions over HTTP, from many threads. The API key stays in here.

    args: temperature, top_p, max_answer_tokens, json_mode, timeout, tries, backoff, concurrency, allow_http.
    """

    def __init__(self, args, run):
        self.args, self.run, self.local = args, run, threading.local()
        self.dropped = collections.defaultdict(set)  # model -> body fields that its server doesn't take
        self.retries, self.trouble, self.not_before = 0, "", 0.0
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        base = urllib.parse.urlsplit(os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1")
        if base.scheme not in ("http", "https") or not base.hostname or base.username or base.password:
            raise UserError("OPENAI_BASE_URL must look like https://host/v1; a key goes into OPENAI_API_KEY")
        self.url = base._replace(path=base.path.rstrip("/") + "/chat/completions").geturl()
        self.shown = f"{base.scheme}://{base.netloc}{base.path}"  # no query: it may hold a secret
        if not self.key.isascii() or not self.key.isprintable():
            raise UserError("OPENAI_API_KEY holds a character that no key has: copy it again")
        if not self.key and base.hostname == "api.openai.com":
            raise UserError("set OPENAI_API_KEY, or OPENAI_BASE_URL to a server that needs no key")
        loopback = base.hostname in ("localhost", "::1") or base.hostname.startswith("127.")
        if self.key and base.scheme == "http" and not loopback and not args.allow_http:
            raise UserError(f"{self.shown}: the key would travel unencrypted; use https, or --allow-http")
        self.headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.key:
            self.headers["Authorization"] = f"Bearer {self.key}"
            if base.hostname.endswith(".azure.com"):
                self.headers["api-key"] = self.key
        # Resolved once: requests would look up proxies and .netrc in the environment again for each request.
        self.proxies = requests.utils.get_environ_proxies(self.url)
        self.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True

    def redact(self, text):
        """Takes the key out of a server's words; shorter keys are placeholders, such as EMPTY."""
        return text.replace(self.key, "[key]") if len(self.key) >= 8 else text

    def tidy(self, text):
        return " ".join(self.redact(text).split())[:200]

    def body(self, request, message):
        """The JSON body of a request, without the fields that the model's server doesn't take."""
        body = {"model": request["model"], "messages": [{"role": "user", "content": message}],
                "temperature": self.args.temperature, "top_p": self.args.top_p,
                "max_tokens": self.args.max_answer_tokens}
        if self.args.json_mode and request["step"] == "generate":  # brainstorms ask for a list
            body["response_format"] = {"type": "json_object"}
        dropped = self.dropped[request["model"]]
        if "max_tokens" in dropped:  # its newer name
            body["max_completion_tokens"] = body["max_tokens"]
        return {field: value for field, value in body.items() if field not in dropped}

    def ask(self, request, message):
        """Tries a request up to --tries times; its answer goes to raw.jsonl. Returns whether there was one.

        Raises UserError where no retry can help (a wrong key, an unknown model, no quota), and Stopping.
        """
        failures = 0
        while failures < self.args.tries:
            self.run.stop.wait(max(0.0, self.not_before - time.monotonic()))
            body = self.body(request, message)
            self.run.start(request, most_tokens(message), self.args.max_answer_tokens)
            row, refused, headers, begun = None, None, {}, time.monotonic()
            try:
                status, headers, content = self.post(body)
                refused = None if status == 200 else status
                row = self.read_answer(request, message, body, status, content)
                if row is not None:
                    row["seconds"] = round(time.monotonic() - begun, 3)
                    return True
                continue  # without the field that the server doesn't take
            except Retry as failure:
                trouble, refused = failure.args
                self.retries, self.trouble = self.retries + 1, self.tidy(trouble)
            finally:
                self.run.end(request, row, refused)
            self.wait(failures, headers, everyone=refused == 429)
            failures += 1
        return False

    def post(self, body):
        """One POST -> (status, headers, body bytes). Raises Retry if the wire fails."""
        deadline, seconds = time.monotonic() + self.args.timeout, self.args.timeout
        if not hasattr(self.local, "session"):  # a session isn't made for sharing between threads
            self.local.session = session = requests.Session()
            session.trust_env, session.proxies, session.verify = False, self.proxies, self.verify
            session.headers = self.headers
        try:
            with self.local.session.post(self.url, data=json.dumps(body), stream=True, allow_redirects=False,
                                         timeout=(min(10, seconds), seconds)) as response:
                chunks = []
                while chunk := response.raw.read1(65536, decode_content=True):
                    chunks.append(chunk)
                    if time.monotonic() > deadline:  # requests' own timeout begins anew with each byte
                        raise Retry(f"no whole answer within {seconds:g} s", None)
                return response.status_code, response.headers, b"".join(chunks)
        except (OSError, urllib3.exceptions.HTTPError) as error:  # requests' exceptions are OSErrors
            reason = getattr(error.args[0], "reason", None) if error.args else None
            unsent = isinstance(reason, (urllib3.exceptions.NewConnectionError,
                                         urllib3.exceptions.ConnectTimeoutError))
            raise Retry(f"{type(error).__name__}: {reason or error}", "unsent" if unsent else None) from None

    def read_answer(self, request, message, body, status, content):
        """A response -> the row for raw.jsonl, or None if a field was dropped. Raises Retry or UserError."""
        answer, text, code = None, content.decode("utf-8", "replace"), None
        try:
            answer = json.loads(text)
            if error := answer.get("error"):
                text, code = str(error.get("message")), error.get("code") or error.get("type")
        except (ValueError, AttributeError, RecursionError):
            pass
        if status == 200:
            try:
                choice, usage = answer["choices"][0], answer.get("usage") or {}
                text = choice["message"].get("content")
                usage = {key: usage.get(key) for key in ("prompt_tokens", "completion_tokens")}
            except (LookupError, TypeError, AttributeError):
                raise Retry(f"status 200 without a chat completion: {text}", None) from None
            text = self.redact(text) if isinstance(text, str) else ""  # a refusal or a tool call has no text
            if not all(type(count) is int and count >= 0 for count in usage.values()):
                usage = {"prompt_tokens": estimate_tokens(message),
                         "completion_tokens": estimate_tokens(text), "estimated": True}
            finish_reason = self.redact(str(choice.get("finish_reason")))
            return request | {"response": text, "finish_reason": finish_reason, "usage": usage}
        if status == 400 and code in ("content_filter", "content_policy_violation", "invalid_prompt"):
            # The provider's verdict on this one prompt: an answer of a kind, which stays the same.
            usage = {"prompt_tokens": 0, "completion_tokens": 0}
            return request | {"response": "", "finish_reason": "content_filter", "usage": usage}
        named = {field for field, word in OPTIONAL.items() if field in body and re.search(word, text, re.I)}
        if status == 400 and named:
            self.dropped[request["model"]] |= named
            self.trouble = f"{request['model']} doesn't take {', '.join(sorted(named))}: going on without"
            return None
        if status in RETRY and code not in ("insufficient_quota", "billing_hard_limit_reached"):
            raise Retry(f"status {status}: {text}", status)
        hint = HINTS.get(status, "no retry would help")
        raise UserError(f"{self.shown} answered {status}: {self.tidy(text)} ({hint})")

    def wait(self, failures, headers, everyone):
        """Sleeps before a retry: twice as long each time, after what Retry-After asks; ends when the run
        stops."""
        seconds = min(60, self.args.backoff * 2**failures) * random.uniform(0.5, 1)  # jitter parts the herd
        if (asked := retry_after(headers)) is not None:
            if asked > 600:
                raise UserError(f"{self.shown} asks to wait {asked:.0f} s: run the same command again then")
            seconds += asked
        if everyone:  # a rate limit is the whole client's, so the other threads' next tries wait as well
            self.not_before = max(self.not_before, time.monotonic() + seconds)
        self.run.stop.wait(seconds)


def retry_after(headers):
    """Seconds that a response asks to wait, by a Retry-After in seconds or as an HTTP date, or None.

    >>> retry_after({"Retry-After": "7"})
    7.0
    """
    value = headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, TypeError):
            return None


def ask_all(todo, total, client):
    """Asks each (request, message) of an iterator, --concurrency at a time -> how many were left unanswered.

    total: how many there are, for the progress line. Raises what ended it early: UserError, Stopping or
    KeyboardInterrupt; the answers under way are still taken in.
    """
    run, args, guard = client.run, client.args, threading.Lock()
    done, left, in_a_row, failure, begun = 0, 0, 0, None, time.monotonic()
    working, finished = args.concurrency, threading.Event()

    def work():
        nonlocal done, left, in_a_row, failure, working
        try:
            while not run.stop.is_set():
                with guard:
                    request, message = next(todo, (None, None))
                if request is None:
                    return
                answered = client.ask(request, message)
                with guard:
                    done, left = done + answered, left + (not answered)
                    in_a_row = 0 if answered else in_a_row + 1
                    if in_a_row > args.concurrency:
                        raise Stopping(f"{in_a_row} requests in a row got no answer ({client.trouble})")
        except Exception as error:
            failure = failure or error
            run.stop.set()
        finally:
            with guard:
                working -= 1
                if not working:
                    finished.set()

    def show(end):
        with run.changed:
            spent = run.spent + run.lost
        rate = done / (time.monotonic() - begun)
        hours, rest = divmod(round((total - done - left) / rate) if rate else 0, 3600)
        line = (f"{done:,} of {total:,}, {rate:.1f}/s, {spent.total():,} tokens, ${run.cost(spent):.2f}, "
                f"{hours}:{rest // 60:02}:{rest % 60:02} left")
        line += f", {client.retries} retries ({client.trouble})" if client.trouble else ""
        if live:
            line = "\r" + line[:os.get_terminal_size().columns - 1].ljust(79)
        print(line, end=end, flush=True)

    live, shown = sys.stdout.isatty(), begun
    for _ in range(args.concurrency):
        threading.Thread(target=work, daemon=True).start()
    try:
        # Not Thread.join: before Python 3.13, a Ctrl-C within it marks a thread that still works as ended.
        while not finished.wait(0.2):
            if time.monotonic() - shown > (0.1 if live else 10):
                shown = time.monotonic()
                show("" if live else "\n")
    except KeyboardInterrupt:
        run.stop.set()
        print("\nstopping: waiting for the answers under way; Ctrl-C again leaves at once", flush=True)
        finished.wait()
        raise
    show("\n")
    if failure:
        raise failure
    return left
