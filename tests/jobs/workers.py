"""Processes of multiprocessing, started by fork or spawn: Pool, Queue, shared_memory, Lock, Value, Manager."""
import hashlib
import multiprocessing
import os
import sys
import time
from multiprocessing import shared_memory


def hashed(text):
    for _ in range(3000):
        text = hashlib.sha256(text.encode()).hexdigest()
    return text


def adder(name, lock, count, tasks, answers, board):
    memory = shared_memory.SharedMemory(name)
    while (number := tasks.get()) is not None:
        for step in range(200):
            with lock:
                value = int.from_bytes(memory.buf[:8], "little")
                memory.buf[:8] = (value + number * step).to_bytes(8, "little")
            with count.get_lock():
                count.value += 1
        board[number] = number * number
        answers.put((number, hashed(str(number))))
    memory.close()


def main(method, dir):
    context = multiprocessing.get_context(method)
    memory = shared_memory.SharedMemory(create=True, size=1 << 16)
    lock, count = context.Lock(), context.Value("q", 0)
    tasks, answers = context.Queue(), context.Queue()
    manager = context.Manager()
    board = manager.dict()
    adders = [
        context.Process(target=adder, args=(memory.name, lock, count, tasks, answers, board))
        for _ in range(3)
    ]
    for process in adders:
        process.start()
    line = ""
    with context.Pool(3) as pool:
        for number in range(30):
            while number == 24 and not os.path.exists(f"{dir}/finish"):
                time.sleep(0.002)
            pending = pool.map_async(hashed, [f"{number} {part} {line}" for part in range(6)])
            for part in range(6):
                tasks.put(number * 6 + part)
            found = sorted(answers.get() for _ in range(6))
            line = hashlib.sha256(repr((found, pending.get(), line)).encode()).hexdigest()
            with open(f"{dir}/progress", "w") as out:
                print(number + 1, file=out)
    for _ in adders:
        tasks.put(None)
    for process in adders:
        process.join()
    codes = [process.exitcode for process in adders]
    total = int.from_bytes(memory.buf[:8], "little")
    memory.close()
    memory.unlink()
    with open(f"{dir}/result", "w") as out:
        print(line, total, count.value, sum(board.values()), codes, file=out)
    manager.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
