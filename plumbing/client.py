"""plumbing/client.py: many requests to an OpenAI-compatible server, each tried until it is answered.

The request itself stands in generate.py: its body, the POST, where the text is in what comes back. This file
exists because servers fail: it tries again, goes on without a field that a server does not take, and never
shows the API key. Its helpers:

    transport.py     one try over the wire
    limits.py        how long to wait before the next one
    complaints.py    what a server means that answers with an error
    completion.py    what an answer holds

The books (what was asked, answered, paid) are the ledger's.
"""
import argparse
import json
import os
import threading
import time
import urllib.parse
from collections import Counter, defaultdict

import requests

from plumbing.completion import text_of, usage_of, whole_message
from plumbing.errors import UserError, bounded, check
from plumbing.ledger import MOST_LEVELS, levels, most_tokens
from plumbing.limits import Limits, asked_wait
from plumbing.complaints import (BAD_LUCK, NO_QUOTA, OF_ONE_PROMPT, PERHAPS_PAID, codes_of, complaint_of,
                                 error_of, fields_not_taken, hint_of, is_moderation, is_success, may_pass)
from plumbing.transport import Failed, certificates, exchange, new_session

SOON = 4                        # doublings of the back-off at most, while others are answered
DAY = 86400                     # seconds
LONGEST_ASKED = 600             # seconds; who is asked to wait longer may as well come back later
OWN_FIELDS = {"model": "--model", "messages": "prompts/", "temperature": "--temperature", "top_p": "--top-p",
              "max_tokens": "--max-answer-tokens", "max_completion_tokens": "--max-answer-tokens",
              "stream": "no flag: answers are read whole", "n": "no flag: each request has one answer"}


class Retry(Exception):
    """A try that failed in a way that may pass: (how, the refusal for the ledger; None if perhaps paid)."""


class Unsent(UserError):
    """A try that never left this machine, and never will before a user has mended something."""


class NotTaken(Exception):
    """A try that was refused for some fields of its body: (the fields,)."""


def body_fields(text: str) -> dict:
    """The flag --body JSON: an object whose fields join each request's body.

    >>> body_fields('{"chat_template_kwargs": {"enable_thinking": false}}')
    {'chat_template_kwargs': {'enable_thinking': False}}
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("write an object, such as {\"top_k\": 20}")
    for field in OWN_FIELDS.keys() & value.keys():
        raise argparse.ArgumentTypeError(f"{field} is set by {OWN_FIELDS[field]}")
    return value


# The types of --timeout and --backoff: what is longer than a day no system's clock need take.
timeout = bounded(float, lambda seconds: 0 < seconds <= DAY, f"above 0 and at most {DAY} seconds")
backoff = bounded(float, lambda seconds: 0 <= seconds <= DAY, f"from 0 to {DAY} seconds")


class Client:
    """Asks for chat completions over HTTP, from many threads. The API key stays in here.

    args: temperature, top_p, max_answer_tokens, json_mode, timeout, tries, backoff, concurrency, allow_http.
    request_body, post, read_completion: the request as it goes over the wire; see generate.py.
    """

    def __init__(self, args, ledger, request_body, post, read_completion):
        self.args, self.ledger = args, ledger
        self.request_body, self.post, self.read_completion = request_body, post, read_completion
        self.threads_own = threading.local()       # a session is not made for sharing between threads
        self.limits = Limits(args.backoff)
        self.refused_fields = defaultdict(set)     # model -> fields that its server does not take
        self.works = set()                         # (model, step) of requests that were answered
        self.answers = Counter()                   # model -> how many there were
        self.retries = 0
        self.problem = ""                          # the last one, for the progress line
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        self.base = split_address(os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1")
        self.address = without_secrets(self.base)
        self.check_settings()
        self.url = self.endpoint("/chat/completions")
        self.headers = {"Accept-Encoding": "identity"}
        if self.key and self.base.hostname.endswith(".azure.com"):
            self.headers["api-key"] = self.key
        # Resolved once: requests would look up proxies and .netrc in the environment again for each request.
        self.proxies = requests.utils.get_environ_proxies(self.url)
        self.verify = certificates()

    def check_settings(self):
        """Refuse an address or a key that cannot work, or that would give the key away."""
        base = self.base
        check(self.key.isascii() and self.key.isprintable(),
              "OPENAI_API_KEY holds a character that no key has: copy it again")
        check(self.key or base.hostname != "api.openai.com",
              "set OPENAI_API_KEY, or OPENAI_BASE_URL to a server that needs no key")
        this_machine = base.hostname in ("localhost", "::1") or base.hostname.startswith("127.")
        check(not self.key or base.scheme == "https" or this_machine or self.args.allow_http,
              f"{self.address}: the key would travel unencrypted; use https, or --allow-http")

    def endpoint(self, path: str, query="") -> str:
        """The whole address of a path below OPENAI_BASE_URL, whose own query (api-version) stays."""
        base = self.base
        queries = [part for part in (base.query, query) if part]
        return base._replace(path=base.path.rstrip("/") + path, query="&".join(queries)).geturl()

    def session(self) -> requests.Session:
        return new_session(self.headers, self.proxies, self.verify)

    def redact(self, value):
        """Take the key out of a server's words, or of a JSON value; shorter keys are placeholders, such as
        EMPTY."""
        if isinstance(value, dict):
            return {self.redact(key): self.redact(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.redact(item) for item in value]
        if isinstance(value, str) and len(self.key) >= 8:
            return value.replace(self.key, "[key]")
        return value

    def one_line(self, text: str) -> str:
        """A server's words for the screen: without the key, and without characters that steer a terminal."""
        printable = "".join(letter if letter.isprintable() else " " for letter in self.redact(text)[:2000])
        return " ".join(printable.split())[:200]

    def body(self, request: dict, message: str, left_out=frozenset()) -> dict:
        """The JSON body of a request, without the fields that the model's server does not take."""
        body = self.request_body(request, message, self.args)
        refused = self.refused_fields[request["model"]] | left_out
        if "max_tokens" in refused:                # its newer name
            body["max_completion_tokens"] = body["max_tokens"]
        return {field: value for field, value in body.items() if field not in refused}

    # ------------------------------------------------------------------ one request, until it is answered

    def ask(self, request: dict, message: str) -> bool:
        """Try a request up to --tries times; its answer goes to raw.jsonl. Returns whether there was one.

        Raises UserError where no retry can help (a wrong key, an unknown model, no quota), and Stopping.
        """
        kind = request["model"], request["step"]
        failures = counted = 0                     # tries that failed; those of them that count for --tries
        left_out = set()                           # fields that this request goes without
        answers = self.answers[request["model"]]
        while counted < self.args.tries:
            self.limits.wait_turn(self.ledger.stop)
            body = self.body(request, message, left_out)
            self.ledger.start(request, most_tokens(message), self.args.max_answer_tokens)
            row, refused, status, headers = None, None, None, {}
            begun = time.monotonic()
            try:
                status, headers, content = self.send(body)
                if not is_success(status) and status not in PERHAPS_PAID:
                    refused = status
                row = request | self.read_answer(message, body, status, content, headers)
                row["seconds"] = round(time.monotonic() - begun, 3)
                self.answers[request["model"]] += 1
                if is_success(status):             # so it does take the rest of the fields
                    self.works.add(kind)
                    self.refused_fields[request["model"]] |= left_out
                return True
            except NotTaken as failure:
                left_out |= failure.args[0]
                self.problem = (f"{request['model']} doesn't take {', '.join(sorted(left_out))}: "
                                "going on without")
                continue                           # at once
            except Retry as failure:
                problem, refused = failure.args
                self.problem = self.one_line(problem)
                self.retries += 1
            except Unsent:
                refused = "unsent"
                raise
            except UserError as error:
                if status not in OF_ONE_PROMPT or kind not in self.works:
                    raise
                self.problem = str(error)          # others are answered, so it is this prompt's own trouble
                return False
            finally:
                self.ledger.end(request, row, refused)
            limited = status == 429
            if limited and answers != self.answers[request["model"]]:
                counted = 0                        # others are answered: this request's turn will come
                failures = min(failures, SOON)
                answers = self.answers[request["model"]]
            self.wait(failures, headers, limited)
            failures += 1
            counted += 1
        return False

    def send(self, body: dict) -> tuple:
        """One try over the wire -> (status, headers, content as bytes). Raises Retry if the wire fails."""
        if not hasattr(self.threads_own, "session"):
            self.threads_own.session = self.session()
        try:
            return exchange(self.post, self.threads_own.session, self.url, self.key, body, self.args.timeout)
        except Failed as failed:
            if failed.hint:
                raise Unsent(f"{self.address}: {self.one_line(failed.problem)} ({failed.hint})") from None
            raise Retry(failed.problem, None if failed.sent else "unsent") from None

    def read_answer(self, message: str, body: dict, status: int, content: bytes, headers={}) -> dict:
        """A response -> the row for raw.jsonl, without the request's own keys.

        body: as it was sent. Raises Retry for what may pass, NotTaken for fields of the body, UserError for
        what stays.
        """
        text = content.decode("utf-8", "replace")
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        if levels(answer) > MOST_LEVELS:           # nobody could read it again from raw.jsonl
            answer = None
        if is_success(status):
            return self.answered(answer, text, message)
        codes = codes_of(answer)
        text, _ = error_of(answer, text)
        complaint = complaint_of(answer, text)
        if codes & BAD_LUCK:
            raise Retry(f"status {status}: {text}", None)              # something was written, maybe billed
        if is_moderation(status, codes, text):
            usage = {"prompt_tokens": 0, "completion_tokens": 0}
            return {"response": "", "finish_reason": "content_filter", "usage": usage}
        if not_taken := fields_not_taken(status, complaint, body):
            raise NotTaken(not_taken)
        if may_pass(status) and not codes & NO_QUOTA:
            raise Retry(f"status {status}: {text}", None if status in PERHAPS_PAID else status)
        words, hint = self.one_line(text), hint_of(status, complaint)
        if 300 <= status < 400 and headers.get("Location"):
            words = f"it sends us to {self.one_line(self.target_of(headers['Location']))}"
            hint = "set OPENAI_BASE_URL to that, without /chat/completions"
        raise UserError(f"{self.address} answered {status}: {words} ({hint})")

    def answered(self, completion, content: str, message: str) -> dict:
        """What a server answered -> {"response", "finish_reason", "usage"}, whatever it left out."""
        try:
            choice = completion["choices"][0]
            if str(choice.get("finish_reason")).startswith("content_filter"):
                choice = {"message": {"content": ""}} | choice | {"finish_reason": "content_filter"}
            text, finish_reason, usage = self.read_completion(completion | {"choices": [choice]})
        except (LookupError, TypeError, AttributeError):
            words, _ = error_of(completion, content)
            raise Retry(f"status 200 without a chat completion: {words}", None) from None
        if finish_reason == "error":
            words, _ = error_of(choice, content)
            raise Retry(f"status 200 with the finish_reason error: {words}", None)
        text = self.redact(text_of(text, choice["message"]))           # a refusal or a tool call has no text
        return {"response": text, "finish_reason": self.redact(str(finish_reason)),
                "usage": usage_of(usage, message, text)} | self.redact(whole_message(choice["message"]))

    def target_of(self, location: str) -> str:
        """Where a redirect leads, as a whole address."""
        try:
            return without_secrets(urllib.parse.urlsplit(urllib.parse.urljoin(self.url, location)))
        except ValueError:
            return location.partition("?")[0]

    def wait(self, failures: int, headers, limited: bool) -> None:
        """Sleep before a retry, or until the run stops."""
        asked = asked_wait(headers, limited)
        check(asked <= LONGEST_ASKED,
              f"{self.address} asks to wait {asked:.0f} s: run the same command again then")
        self.ledger.stop.wait(self.limits.after(failures, asked, limited))


def split_address(address: str):
    """OPENAI_BASE_URL in its parts. What is wrong with it is not told: it may hold a secret."""
    refusal = "OPENAI_BASE_URL must look like https://host/v1; a key goes into OPENAI_API_KEY"
    try:
        base = urllib.parse.urlsplit(address)
        base.port                                  # read late, and refused late, by urllib
    except ValueError:
        raise UserError(refusal) from None
    check(base.scheme in ("http", "https") and base.hostname, refusal)
    check(not base.username and not base.password, refusal)
    return base


def without_secrets(address) -> str:
    """An address for the screen: its query and its user may be secrets."""
    return f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}"
