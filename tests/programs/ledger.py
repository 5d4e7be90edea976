"""sqlite3 in the middle of a transaction: what was committed stays, what was not is still to be decided."""
import os
import sqlite3
import sys
import time

DIR = sys.argv[1]
base = sqlite3.connect(f"{DIR}/ledger.db", isolation_level=None)
# So small that pages of the open transaction spill into the file, and a hot journal guards them.
base.execute("PRAGMA cache_size = 10")
base.execute("CREATE TABLE entry (round INTEGER, number INTEGER, text TEXT)")
base.execute("CREATE INDEX by_text ON entry (text)")
base.execute("BEGIN IMMEDIATE")
for number in range(30):
    while number == 24 and not os.path.exists(f"{DIR}/finish"):
        time.sleep(0.002)
    if number % 10 == 9:
        # The first and third ten rounds are kept, the second ten are not.
        base.execute("ROLLBACK" if number == 19 else "COMMIT")
        base.execute("BEGIN IMMEDIATE")
    for entry in range(4000):
        text = f"{(number * 7919 + entry * 104729) % 1000003:07}"
        base.execute("INSERT INTO entry VALUES (?, ?, ?)", (number, entry, text))
    with open(f"{DIR}/progress", "w") as out:
        print(number + 1, file=out)
base.execute("COMMIT")
rows = base.execute("SELECT count(*), sum(round), sum(number), max(text), total(text) FROM entry").fetchone()
check = base.execute("PRAGMA integrity_check").fetchone()
base.close()
with open(f"{DIR}/result", "w") as out:
    print(*rows, *check, file=out)
