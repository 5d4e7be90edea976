"""Threads, a queue with a bound, sleeps and a lock: what a crawler or a worker pool is made of."""
import hashlib
import os
import queue
import sys
import threading
import time

DIR = sys.argv[1]
jobs, done = queue.Queue(maxsize=8), queue.Queue()
early = []


def work():
    while (job := jobs.get()) is not None:
        digest = hashlib.sha256(str(job).encode())
        for _ in range(9000):
            digest.update(digest.digest())
        done.put((job, digest.hexdigest()))


def sleep(seconds):
    """Sleeps are never shorter than asked for, whatever happens to the process meanwhile."""
    while not os.path.exists(f"{DIR}/result"):
        begun = time.monotonic()
        time.sleep(seconds)
        if time.monotonic() - begun < seconds:
            early.append(seconds)


workers = [threading.Thread(target=work) for _ in range(4)]
for worker in workers:
    worker.start()
for seconds in (0.001, 0.02, 0.5):
    threading.Thread(target=sleep, args=(seconds,), daemon=True).start()

total = hashlib.sha256()
for number in range(30):
    while number == 24 and not os.path.exists(f"{DIR}/finish"):
        time.sleep(0.002)
    for job in range(16):
        jobs.put((number, job))
    for _, digest in sorted(done.get() for _ in range(16)):
        total.update(digest.encode())
    with open(f"{DIR}/progress", "w") as out:
        print(number + 1, file=out)
for worker in workers:
    jobs.put(None)
for worker in workers:
    worker.join()
with open(f"{DIR}/result", "w") as out:
    print(total.hexdigest(), "early sleeps:", early, file=out)
