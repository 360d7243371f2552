"""plumbing/threads.py: many requests at once, and how far they are.

One client is shared by --concurrency threads, each of which asks one request after another. What ends one of
them ends all, in good order: answers under way are paid for, and so they are taken in.
"""
import shutil
import sys
import threading
import time

from plumbing.errors import bounded, say
from plumbing.ledger import Stopping

concurrency = bounded(int, lambda value: 0 < value <= 1000, "from 1 to 1000")       # the flag's type


def ask_all(todo, total: int, client, what="requests") -> None:
    """Ask each (request, message) of an iterator, --concurrency at a time, and print how far it is.

    total: how many there are. what: their name in messages. Raises what ended it early (UserError, Stopping
    or KeyboardInterrupt; the answers under way are still taken in), and Stopping if some got no answer.
    """
    ledger = client.ledger
    waiting = ledger.in_batches - ledger.answered
    open_pairs = (pair for pair in todo if pair[0]["id"] not in waiting)
    threads = Threads(open_pairs, total, client)
    try:
        threads.start()                                        # the first request may be out before the last
        # Not Thread.join: before Python 3.13, a Ctrl-C within it marks a thread that still works as ended.
        while not threads.all_ended.wait(0.2):
            threads.print_now_and_then()
    except KeyboardInterrupt:
        ledger.stop.set()
        say("\nstopping: waiting for the answers under way; Ctrl-C again leaves at once")
        while threads.under_way:
            time.sleep(0.05)
        raise
    threads.print_progress(end="\n")
    if threads.failure:
        raise threads.failure
    if threads.unanswered:
        raise Stopping(f"{threads.unanswered} {what} got no answer ({client.problem})")
    if threads.answered < total:
        raise Stopping(f"{total - threads.answered} {what} wait in {ledger.folder}/batches, and "
                       "`python -m tools.data.batch` with the same flags fetches them")


class Threads:
    """The threads of one ask_all, and how far they have come.

    Daemons, not a ThreadPoolExecutor: Python would wait for an executor's threads even after a second
    Ctrl-C.
    """

    def __init__(self, todo, total: int, client):
        self.todo, self.total, self.client, self.ledger = todo, total, client, client.ledger
        self.guard = threading.Lock()                          # of all that follows
        self.answered = self.unanswered = self.unanswered_in_a_row = 0
        self.under_way = 0                                     # requests that were begun and have not ended
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
            self.under_way += 1
        try:
            answered = self.client.ask(request, message)       # sends nothing once `stop` is set
        finally:
            with self.guard:
                self.under_way -= 1
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
            line = "\r" + line[:shutil.get_terminal_size().columns - 1].ljust(79)
        say(line, end)
