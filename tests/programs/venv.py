"""In a virtual environment: uses a module of it and a file that it reads, until there is a file `go` in the directory that is given."""

import os
import sys
import time

import venv_module

place, data = sys.argv[1], os.open(sys.argv[2], os.O_RDONLY)
begin = os.read(data, 5)
with open(place + "/.pid", "w") as ready:
    print(os.getpid(), file=ready)
os.rename(place + "/.pid", place + "/ready")
while not os.path.exists(place + "/go"):
    time.sleep(0.002)
with open(place + "/.result", "w") as result:
    print(venv_module.joined(begin, os.read(data, 100)), file=result)
os.rename(place + "/.result", place + "/result")
