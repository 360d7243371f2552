"""plumbing/client.py: many requests to an OpenAI-compatible server, each tried until it is answered.

The request itself stands in generate.py: its body, the POST, where the text is in what comes back. This file
exists because servers fail: it retries with growing waits and obeys Retry-After, goes on without a field
that a server does not take, never shows the API key, and asks from many threads. The books (what was asked,
answered, paid) are the ledger's.
"""
import email.utils
import json
import os
import random
import re
import sys
import threading
import time
import urllib.parse
from collections import defaultdict

import requests
import urllib3

from plumbing.errors import UserError, check
from plumbing.ledger import Stopping, estimate_tokens, most_tokens

RETRY = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
HINTS = {401: "check OPENAI_API_KEY", 402: "the account needs credit", 403: "check what the key may do",
         404: "check OPENAI_BASE_URL, which mostly ends in /v1, and --model", 429: "the quota is used up"}
# Fields of the body that some servers don't take, and the words by which a status 400 names them.
OPTIONAL_FIELDS = {"max_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p",
                   "response_format": "response.format|json.object|json.mode|json.schema"}


class Retry(Exception):
    """A try that failed in a way that may pass: (how, the refusal for the ledger; None if perhaps paid)."""


class Client:
    """Asks for chat completions over HTTP, from many threads. The API key stays in here.

    args: temperature, top_p, max_answer_tokens, json_mode, timeout, tries, backoff, concurrency, allow_http.
    request_body, post, read_completion: the request as it goes over the wire; see generate.py.
    """

    def __init__(self, args, ledger, request_body, post, read_completion):
        self.args, self.ledger = args, ledger
        self.request_body, self.post, self.read_completion = request_body, post, read_completion
        self.threads_own = threading.local()       # a session is not made for sharing between threads
        self.refused_fields = defaultdict(set)     # model -> fields that its server does not take
        self.retries = 0
        self.problem = ""                          # the last one, for the progress line
        self.not_before = 0.0                      # time.monotonic() before which no thread may ask
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        base = split_address(os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1")
        self.address = f"{base.scheme}://{base.netloc}{base.path}"     # no query: it may hold a secret
        self.check_settings(base)
        self.url = base._replace(path=base.path.rstrip("/") + "/chat/completions").geturl()
        self.headers = {"Accept-Encoding": "identity"}
        if self.key and base.hostname.endswith(".azure.com"):
            self.headers["api-key"] = self.key
        # Resolved once: requests would look up proxies and .netrc in the environment again for each request.
        self.proxies = requests.utils.get_environ_proxies(self.url)
        self.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True

    def check_settings(self, base):
        """Refuse an address or a key that cannot work, or that would give the key away."""
        check(self.key.isascii() and self.key.isprintable(),
              "OPENAI_API_KEY holds a character that no key has: copy it again")
        check(self.key or base.hostname != "api.openai.com",
              "set OPENAI_API_KEY, or OPENAI_BASE_URL to a server that needs no key")
        this_machine = base.hostname in ("localhost", "::1") or base.hostname.startswith("127.")
        check(not self.key or base.scheme == "https" or this_machine or self.args.allow_http,
              f"{self.address}: the key would travel unencrypted; use https, or --allow-http")

    def session(self) -> requests.Session:
        """A new session: a connection that stays open from request to request."""
        session = requests.Session()
        session.trust_env, session.proxies, session.verify = False, self.proxies, self.verify
        session.headers = self.headers
        return session

    def redact(self, text: str) -> str:
        """Take the key out of a server's words; shorter keys are placeholders, such as EMPTY."""
        return text.replace(self.key, "[key]") if len(self.key) >= 8 else text

    def one_line(self, text: str) -> str:
        return " ".join(self.redact(text).split())[:200]

    def body(self, request: dict, message: str) -> dict:
        """The JSON body of a request, without the fields that the model's server does not take."""
        body = self.request_body(request, message, self.args)
        refused = self.refused_fields[request["model"]]
        if "max_tokens" in refused:                # its newer name
            body["max_completion_tokens"] = body["max_tokens"]
        return {field: value for field, value in body.items() if field not in refused}

    # ------------------------------------------------------------------ one request, until it is answered

    def ask(self, request: dict, message: str) -> bool:
        """Try a request up to --tries times; its answer goes to raw.jsonl. Returns whether there was one.

        Raises UserError where no retry can help (a wrong key, an unknown model, no quota), and Stopping.
        """
        failures = 0
        while failures < self.args.tries:
            self.ledger.stop.wait(max(0.0, self.not_before - time.monotonic()))
            body = self.body(request, message)
            self.ledger.start(request, most_tokens(message), self.args.max_answer_tokens)
            row, refused, headers = None, None, {}
            begun = time.monotonic()
            try:
                status, headers, content = self.send(body)
                if status != 200:
                    refused = status
                row = self.read_answer(request, message, body, status, content)
                if row is not None:
                    row["seconds"] = round(time.monotonic() - begun, 3)
                    return True
                continue                           # at once, without the field that the server does not take
            except Retry as failure:
                problem, refused = failure.args
                self.problem = self.one_line(problem)
                self.retries += 1
            finally:
                self.ledger.end(request, row, refused)
            self.wait(failures, headers, everyone=refused == 429)
            failures += 1
        return False

    def send(self, body: dict) -> tuple:
        """One try over the wire -> (status, headers, content as bytes). Raises Retry if the wire fails."""
        if not hasattr(self.threads_own, "session"):
            self.threads_own.session = self.session()
        seconds = self.args.timeout
        deadline = time.monotonic() + seconds
        try:
            with self.post(self.threads_own.session, self.url, self.key, body, seconds) as response:
                chunks = []
                while chunk := response.raw.read1(65536, decode_content=True):
                    chunks.append(chunk)
                    if time.monotonic() > deadline:    # requests' own timeout begins anew with each byte
                        raise Retry(f"no whole answer within {seconds:g} s", None)
                return response.status_code, response.headers, b"".join(chunks)
        except (OSError, urllib3.exceptions.HTTPError) as error:       # requests' exceptions are OSErrors
            reason = getattr(error.args[0], "reason", None) if error.args else None
            no_connection = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError)
            refusal = "unsent" if isinstance(reason, no_connection) else None
            raise Retry(f"{type(error).__name__}: {reason or error}", refusal) from None

    def read_answer(self, request: dict, message: str, body: dict, status: int,
                    content: bytes) -> dict | None:
        """A response -> the row for raw.jsonl, or None: a field of the body was refused, and is now left
        out.

        Raises Retry for what may pass, UserError for what will not.
        """
        text = content.decode("utf-8", "replace")
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        if status == 200:
            return request | self.answered(answer, text, message)
        text, code = error_of(answer, text)
        if status == 400 and code in ("content_filter", "content_policy_violation", "invalid_prompt"):
            # What the provider thinks of this one prompt will stay the same: it counts as an answer.
            usage = {"prompt_tokens": 0, "completion_tokens": 0}
            return request | {"response": "", "finish_reason": "content_filter", "usage": usage}
        named = {field for field, words in OPTIONAL_FIELDS.items()
                 if field in body and re.search(words, text, re.I)}
        if status == 400 and named:
            self.refused_fields[request["model"]] |= named
            self.problem = f"{request['model']} doesn't take {', '.join(sorted(named))}: going on without"
            return None
        if status in RETRY and code not in ("insufficient_quota", "billing_hard_limit_reached"):
            raise Retry(f"status {status}: {text}", status)
        hint = HINTS.get(status, "no retry would help")
        raise UserError(f"{self.address} answered {status}: {self.one_line(text)} ({hint})")

    def answered(self, completion, content: str, message: str) -> dict:
        """What a server answered -> {"response", "finish_reason", "usage"}, whatever it left out."""
        try:
            text, finish_reason, usage = self.read_completion(completion)
            usage = {key: usage.get(key) for key in ("prompt_tokens", "completion_tokens")}
        except (LookupError, TypeError, AttributeError):
            words, _ = error_of(completion, content)
            raise Retry(f"status 200 without a chat completion: {words}", None) from None
        text = self.redact(text) if isinstance(text, str) else ""      # a refusal or a tool call has no text
        if not all(type(count) is int and count >= 0 for count in usage.values()):
            usage = {"prompt_tokens": estimate_tokens(message), "completion_tokens": estimate_tokens(text),
                     "estimated": True}
        return {"response": text, "finish_reason": self.redact(str(finish_reason)), "usage": usage}

    def wait(self, failures: int, headers, everyone: bool) -> None:
        """Sleep before a retry, or until the run stops.

        How long: what Retry-After asks, and a time that doubles with each failure and varies by chance, so
        that the threads do not all come back at the same moment.
        """
        seconds = min(60, self.args.backoff * 2**failures) * random.uniform(0.5, 1)
        asked = retry_after(headers)
        check(asked <= 600, f"{self.address} asks to wait {asked:.0f} s: run the same command again then")
        seconds += asked
        if everyone:                               # a rate limit is the whole client's, so all threads wait
            self.not_before = max(self.not_before, time.monotonic() + seconds)
        self.ledger.stop.wait(seconds)


def split_address(address: str):
    """OPENAI_BASE_URL in its parts. What is wrong with it is not told: it may hold a secret."""
    refusal = "OPENAI_BASE_URL must look like https://host/v1; a key goes into OPENAI_API_KEY"
    try:
        base = urllib.parse.urlsplit(address)
    except ValueError:
        raise UserError(refusal) from None
    check(base.scheme in ("http", "https") and base.hostname, refusal)
    check(not base.username and not base.password, refusal)
    return base


def error_of(answer, content: str) -> tuple[str, str | None]:
    """(message, code) of a server's error, {"error": {"message", "code" or "type"}}; else all it sent."""
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict) or not error:
        return content, None
    return str(error.get("message")), error.get("code") or error.get("type")


def retry_after(headers) -> float:
    """Seconds that a response asks to wait, by a Retry-After in seconds or as an HTTP date; 0 if it does
    not.

    >>> retry_after({"Retry-After": "7"}), retry_after({})
    (7.0, 0.0)
    """
    value = headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            seconds = 0.0
    return max(0.0, seconds)


# -------------------------------------------------------------------------------------------- many at once

def ask_all(todo, total: int, client: Client, what="requests") -> None:
    """Ask each (request, message) of an iterator, --concurrency at a time, and print how far it is.

    total: how many there are. what: their name in messages. Raises what ended it early (UserError, Stopping
    or KeyboardInterrupt; the answers under way are still taken in), and Stopping if some got no answer.
    """
    threads = Threads(todo, total, client)
    threads.start()
    try:
        # Not Thread.join: before Python 3.13, a Ctrl-C within it marks a thread that still works as ended.
        while not threads.all_ended.wait(0.2):
            threads.print_now_and_then()
    except KeyboardInterrupt:
        client.ledger.stop.set()
        print("\nstopping: waiting for the answers under way; Ctrl-C again leaves at once", flush=True)
        threads.all_ended.wait()
        raise
    threads.print_progress(end="\n")
    if threads.failure:
        raise threads.failure
    if threads.unanswered:
        raise Stopping(f"{threads.unanswered} {what} got no answer ({client.problem})")


class Threads:
    """The threads of one ask_all, and how far they have come.

    Daemons, not a ThreadPoolExecutor: Python would wait for an executor's threads even after a second
    Ctrl-C.
    """

    def __init__(self, todo, total: int, client: Client):
        self.todo, self.total, self.client, self.ledger = todo, total, client, client.ledger
        self.guard = threading.Lock()                          # of all that follows
        self.answered = self.unanswered = self.unanswered_in_a_row = 0
        self.failure = None                                    # the first exception
        self.working = client.args.concurrency
        self.all_ended = threading.Event()
        self.begun = self.printed = time.monotonic()
        self.in_terminal = sys.stdout.isatty()

    def start(self):
        for _ in range(self.working):
            threading.Thread(target=self.work, daemon=True).start()

    def work(self):
        """One thread: ask until there is nothing left to ask, or until somebody sets `stop`."""
        try:
            while not self.ledger.stop.is_set() and self.ask_next():
                pass
        except Exception as error:
            self.failure = self.failure or error
            self.ledger.stop.set()
        finally:
            with self.guard:
                self.working -= 1
                if self.working == 0:
                    self.all_ended.set()

    def ask_next(self) -> bool:
        """Ask one request. Returns whether there was one left."""
        with self.guard:
            request, message = next(self.todo, (None, None))
        if request is None:
            return False
        answered = self.client.ask(request, message)
        with self.guard:
            if answered:
                self.answered += 1
                self.unanswered_in_a_row = 0
                return True
            self.unanswered += 1
            self.unanswered_in_a_row += 1
            in_a_row = self.unanswered_in_a_row
            if in_a_row > self.client.args.concurrency:
                raise Stopping(f"{in_a_row} requests in a row got no answer ({self.client.problem})")
            return True

    def print_now_and_then(self):
        """A terminal's line is renewed all the time; a log gets a line every ten seconds."""
        if time.monotonic() - self.printed > (0.1 if self.in_terminal else 10):
            self.printed = time.monotonic()
            self.print_progress(end="" if self.in_terminal else "\n")

    def print_progress(self, end: str):
        with self.ledger.changed:
            spent = self.ledger.spent + self.ledger.lost
        rate = self.answered / (time.monotonic() - self.begun)
        left = self.total - self.answered - self.unanswered
        seconds = round(left / rate) if rate else 0
        hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
        line = (f"{self.answered:,} of {self.total:,}, {rate:.1f}/s, {spent.total():,} tokens, "
                f"${self.ledger.cost(spent):.2f}, {hours}:{minutes:02}:{seconds:02} left")
        if self.client.problem:
            line += f", {self.client.retries} retries ({self.client.problem})"
        if self.in_terminal:
            line = "\r" + line[:os.get_terminal_size().columns - 1].ljust(79)
        print(line, end=end, flush=True)
