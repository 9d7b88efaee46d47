"""Keeps blocks in a method that Python calls through C: sorted() calls its key function."""
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


def step():
    sys.stdin.readline()


print("ready", flush=True)
step()
work()  # LINE module
print("done", flush=True)
step()
