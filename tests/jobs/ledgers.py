"""Processes that write to one sqlite3 database, and wait for each other's locks."""
import os
import sqlite3
import sys
import time

DIR = sys.argv[1]
WRITERS = 4


def opened():
    base = sqlite3.connect(f"{DIR}/ledger.db", isolation_level=None, timeout=60)
    base.execute("PRAGMA cache_size = 10")
    return base


def write(writer, base, number):
    base.execute("BEGIN IMMEDIATE")
    for entry in range(300):
        base.execute("UPDATE account SET sum = sum + ? WHERE id = ?", (entry + writer, entry % 50))
        base.execute("INSERT INTO entry VALUES (?, ?, ?)", (writer, number, entry * number % 977))
    base.execute("COMMIT")


def work(writer):
    base = opened()
    for number in range(30):
        while number == 24 and not os.path.exists(f"{DIR}/finish"):
            time.sleep(0.002)
        write(writer, base, number)
        if writer == 0:
            with open(f"{DIR}/progress", "w") as out:
                print(number + 1, file=out)


base = opened()
base.execute("CREATE TABLE entry (writer INTEGER, number INTEGER, value INTEGER)")
base.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, sum INTEGER)")
base.executemany("INSERT INTO account VALUES (?, 0)", [(id,) for id in range(50)])
base.close()
writers = []
for writer in range(WRITERS):
    if not (pid := os.fork()):
        work(writer)
        os._exit(writer)
    writers.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in writers]
base = opened()
entries = base.execute("SELECT count(*), sum(writer), sum(number), sum(value) FROM entry").fetchone()
sums = base.execute("SELECT sum(sum), max(sum) FROM account").fetchone()
check = base.execute("PRAGMA integrity_check").fetchone()
with open(f"{DIR}/result", "w") as out:
    print(*entries, *sums, *check, *codes, file=out)
