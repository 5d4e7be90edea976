"""memcached and 20 lasting connections, each with counters and values of its own: PORT DIR."""
import socket
import subprocess
import sys
import threading
import time

from rounds import finished, progress, right



class Connection:
    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.file = self.socket.makefile("rb")

    def ask(self, text):
        self.socket.sendall(text)
        return self.file.readline()


def client(name, port, dir, failed):
    try:
        c = Connection(port)
        assert c.ask(b"set n%d 0 0 1\r\n0\r\n" % name) == b"STORED\r\n"
        number = 0
        while not finished(dir):
            number += 1
            assert c.ask(b"incr n%d 1\r\n" % name) == b"%d\r\n" % number
            value = b"%d " % number * (name * 300)
            assert c.ask(b"set v%d 0 0 %d\r\n%s\r\n" % (name, len(value), value)) == b"STORED\r\n"
            assert c.ask(b"get v%d\r\n" % name) == b"VALUE v%d 0 %d\r\n" % (name, len(value))
            assert c.file.read(len(value) + 7) == value + b"\r\nEND\r\n"
            if name == 0 and number % 20 == 0:
                progress(dir, number // 20)
    except BaseException as error:
        failed.append(error)
        raise


def main(port, dir):
    server = subprocess.Popen(["memcached", "-l", "127.0.0.1", "-p", port, "-U", "0", "-u", "root"])
    while True:
        try:
            first = Connection(int(port))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    failed = []
    threads = [threading.Thread(target=client, args=(name, int(port), dir, failed)) for name in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    first.socket.sendall(b"stats\r\n")
    stats = dict(iter(lambda: first.file.readline().split()[1:], []))
    # One for each client, and the first one; memcached counts its listening socket.
    assert stats[b"total_connections"] == b"22", stats[b"total_connections"]
    server.terminate()
    assert server.wait() == 0
    right(dir)


main(*sys.argv[1:])
