"""Writes numbered lines into out.log, and their number into a mapped file, until there is a file `finish`. All paths are relative."""

import mmap
import os
import sys
import time

log = open("out.log", sys.argv[1])
table = open("table", "r+b")
view = mmap.mmap(table.fileno(), 4096)
source = open("input", "rb")
saved = open("state.bin", "r+b")
here = os.open(".", os.O_RDONLY)
number = 0
while not os.path.exists("finish"):
    number += 1
    print("line", number, file=log, flush=True)
    view[:8] = number.to_bytes(8, "little")
    time.sleep(0.002)
assert os.path.samestat(os.fstat(here), os.stat(".")), "the directory is another"
assert os.path.samestat(os.fstat(log.fileno()), os.stat("out.log")), "the log is another"
with open("table", "rb") as other:
    assert int.from_bytes(other.read(8), "little") == number, "the mapped file is another"
with open("result", "w") as result:
    print(number, source.read().decode(), saved.read(5).decode(), file=result)
