"""256 MiB at a time over one TCP connection, whose digests the two ends compare. DIR."""
import hashlib
import random
import socket
import sys

from rounds import finished, forked, joined, progress, right

SIZE = 256 << 20


def send(listener):
    connection = listener.accept()[0]
    listener.close()
    block = random.Random(1).randbytes(1 << 20)
    turn = 0
    while connection.recv(1) == b"!":
        digest = hashlib.sha1()
        for _ in range(SIZE >> 20):
            turn += 7919
            cut = turn % len(block)
            piece = block[cut:] + block[:cut]
            digest.update(piece)
            connection.sendall(piece)
        connection.sendall(digest.digest())


def receive(dir, address):
    connection = socket.create_connection(address)
    rounds = 0
    while not finished(dir):
        connection.sendall(b"!")
        digest, left, told = hashlib.sha1(), SIZE, 0
        while left:
            data = connection.recv(min(left, 1 << 18))
            assert data, "the other end closed it"
            digest.update(data)
            left -= len(data)
            if left >> 24 != (left + len(data)) >> 24:
                rounds += 1
                progress(dir, rounds)
        theirs = connection.recv(20, socket.MSG_WAITALL)
        assert theirs == digest.digest(), "the digests differ"
    connection.close()


def main(dir):
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    server = forked(send, listener)
    listener.close()
    receive(dir, address)
    joined(server)
    right(dir)


main(*sys.argv[1:])
