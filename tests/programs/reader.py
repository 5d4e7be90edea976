"""Reads a file beside itself, through a descriptor, a mapping and a directory that stay open; what it is on may be read-only."""
import hashlib
import mmap
import os
import sys
import time

directory = sys.argv[1]
here = os.path.dirname(os.path.abspath(__file__))
data = open(os.path.join(here, "data"), "rb", buffering=0)
view = mmap.mmap(data.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
os.chdir(here)
entries = os.scandir(here)
first = next(entries).name
size = len(view) // 30
digest = hashlib.sha256()
for number in range(1, 31):
    while number == 25 and not os.path.exists(os.path.join(directory, "finish")):
        time.sleep(0.002)
    piece = data.read(size)
    view[number] = number  # a page of its own from here on
    digest.update(piece + view[-size:] + view[:64])
    time.sleep(0.02)
    progress = os.path.join(directory, "progress")
    with open(progress + ".new", "w") as file:
        file.write(str(number))
    os.rename(progress + ".new", progress)
names = sorted([first] + [entry.name for entry in entries])
with open(os.path.join(directory, "result"), "w") as file:
    file.write(f"{digest.hexdigest()} {names} {os.getcwd() == here}\n")
