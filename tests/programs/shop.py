"""Keeps blocks in a method that Python calls through C: sorted() calls its key function. With an argument it is quiet."""
import os
import sys

kept = []


class Shop:
    def order(self, size):
        kept.append(bytes(size))  # LINE order
        return size


def key(size):
    return Shop().order(size)  # LINE key


def work():
    return sorted([10_001] * 7, key=key)  # LINE work


def say(word):
    if len(sys.argv) == 1:
        print(word, flush=True)
        sys.stdin.readline()


say("ready")
work()  # LINE module
say("done")
# The usual way out would give everything back.
os._exit(0)
