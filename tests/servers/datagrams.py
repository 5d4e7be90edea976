"""A service over UDP and four clients with requests on their way; none may be lost, doubled or overtaken. DIR."""
import socket
import socketserver
import sys
import threading

from rounds import finished, forked, joined, progress, right


class Handler(socketserver.BaseRequestHandler):
    counts = {}

    def handle(self):
        data, answers = self.request
        if data == b"end":
            threading.Thread(target=self.server.shutdown).start()
            return
        name, number = map(int, data.split()[:2])
        assert self.counts.get(name, 0) == number, (name, number, self.counts)
        self.counts[name] = number + 1
        answers.sendto(b"%d %d %d" % (name, number, number * number) + b"." * (number % 500), self.client_address)


class Server(socketserver.UDPServer):
    def handle_error(self, request, address):
        raise


def client(name, address, dir):
    mine = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    # One of them without connect(2).
    if name:
        mine.connect(address)
    mine.settimeout(100)
    number = 0
    while not finished(dir):
        for ahead in range(10):
            request = b"%d %d" % (name, number + ahead) + b" " * 300
            mine.send(request) if name else mine.sendto(request, address)
        for _ in range(10):
            answer, sender = mine.recvfrom(65536)
            assert sender == address, sender
            wanted = b"%d %d %d" % (name, number, number * number) + b"." * (number % 500)
            assert answer == wanted, (answer, wanted)
            number += 1
        if name == 0:
            progress(dir, number // 200)


def main(dir):
    server = Server(("127.0.0.1", 0), Handler)
    address = server.server_address
    service = forked(lambda: server.serve_forever(0.05))
    server.server_close()
    clients = [forked(client, name, address, dir) for name in range(1, 4)]
    client(0, address, dir)
    for pid in clients:
        joined(pid)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
        last.sendto(b"end", address)
    joined(service)
    right(dir)


main(*sys.argv[1:])
