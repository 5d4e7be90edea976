# Two processes that have the same file open many times, of which one opens and closes it all the time.
import os
import time


def opened():
    return [os.open("/dev/null", os.O_RDONLY) for _ in range(40)]


if os.fork() == 0:
    held = opened()
    time.sleep(1000)
while True:
    for fd in opened():
        os.close(fd)
