"""A manager of multiprocessing that is reached over TCP, and three processes that use its objects. DIR."""
import multiprocessing
import sys
import threading
import time
from multiprocessing.managers import BaseManager

from rounds import finished, progress, right


class Counter:
    def __init__(self):
        self.lock, self.values = threading.Lock(), {}

    def add(self, name, number):
        with self.lock:
            value = self.values[name] = self.values.get(name, 0) + number
            return value

    def all(self):
        return dict(self.values)


class Manager(BaseManager):
    pass


Manager.register("Counter", Counter)


def worker(name, counter, dir, answers):
    number = total = 0
    while not finished(dir):
        number += 1
        total += number
        value = counter.add(name, number)
        assert value == total, (name, value, total)
        if name == 0 and number % 30 == 0:
            progress(dir, number // 30)
    answers.put((name, total))


def main(dir):
    context = multiprocessing.get_context("fork")
    manager = Manager(("127.0.0.1", 0), b"a key", ctx=context)
    manager.start()
    counter = manager.Counter()
    answers = context.Queue()
    workers = [context.Process(target=worker, args=(name, counter, dir, answers)) for name in range(3)]
    for process in workers:
        process.start()
    totals = dict(answers.get() for _ in workers)
    for process in workers:
        process.join()
        assert process.exitcode == 0
    assert counter.all() == totals, (counter.all(), totals)
    manager.shutdown()
    right(dir)


main(*sys.argv[1:])
