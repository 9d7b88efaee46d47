"""Builds and drops small objects, as many as it can; with PYTHONMALLOC=malloc each one is a malloc and a free.

The protocol of all the benchmark's programs: prints "ready"; for every line "SECONDS" works that long and prints
"did UNITS NANOSECONDS"; ends when its input does.
"""

import json
import sys
import time


def orders(count):
    """Text of `count` orders: dictionaries, lists, strings and floats, made and forgotten."""
    made = [{"id": n, "items": [f"item {n + i}" for i in range(5)], "price": n * 1.1} for n in range(count)]
    made.sort(key=lambda order: order["price"], reverse=True)
    return json.dumps(made)


def main():
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.monotonic_ns()
        end = start + int(line) * 1_000_000_000
        done = 0
        while time.monotonic_ns() < end:
            orders(20)
            done += 1
        print(f"did {done} {time.monotonic_ns() - start}", flush=True)


main()
