"""Allocates and frees a block in a function that others have called, as often as it can.

  depth.py FUNCTIONS      so many functions, this module included, are in the call stack

The protocol of all the benchmark's programs, see pairs.c; the nanoseconds are CPU time of its own. Objects of this size
come straight from the C library.
"""

import sys
import time


def work(end):
    done = 0
    while time.process_time_ns() < end:
        for _ in range(1000):
            bytes(1000)
        done += 1000
    return done


def dive(functions, end):
    return dive(functions - 1, end) if functions else work(end)


print("ready", flush=True)
for line in sys.stdin:
    start = time.process_time_ns()
    # The module, work() and the last dive() are there anyway.
    done = dive(int(sys.argv[1]) - 3, start + int(float(line) * 1e9))
    print("did", done, time.process_time_ns() - start, flush=True)
