"""plumbing/progress.py: how far a long loop has come, and how long the rest may take."""
import sys
import time

from plumbing.ranks import rank

EVERY = 5                             # seconds between two lines


def progress(items: list, label: str, unit: str, clock=time.time):
    """Yield the items; rank 0 says on stderr how many are done, and how long the rest takes at that rate."""
    start = shown = clock()
    for done, item in enumerate(items, 1):
        yield item
        now = clock()
        if rank() == 0 and now - shown > EVERY:
            shown = now
            seconds = now - start
            left = seconds / done * (len(items) - done)
            print(f"  {label}: {done} of {len(items)} {unit}, {seconds:.0f} s, at most {left:.0f} s left",
                  file=sys.stderr, flush=True)
