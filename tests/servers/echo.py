"""An asyncio server in one process and 40 connections in another; each message has a number and is answered with
the number of the connection's next one. DIR."""
import asyncio
import os
import socket
import sys

from rounds import finished, forked, joined, progress, right


async def serve(listener):
    done = asyncio.get_running_loop().create_future()
    open_ones = 0

    async def client(reader, writer):
        nonlocal open_ones
        open_ones += 1
        expected = 0
        while line := await reader.readline():
            name, number, payload = line.split()
            assert int(number) == expected, (line, expected)
            expected += 1
            writer.write(b"%s %d %s\n" % (name, expected, payload))
            await writer.drain()
        writer.close()
        open_ones -= 1
        if open_ones == 0:
            done.set_result(None)

    async with await asyncio.start_server(client, sock=listener, limit=1 << 20):
        await done


async def talk(dir, address):
    counts = [0] * 40

    async def client(name):
        reader, writer = await asyncio.open_connection(*address, limit=1 << 20)
        payload = b"%d" % name * (1 + name * 200)
        while not finished(dir):
            # Three at a time, so that several are on their way.
            for ahead in range(3):
                writer.write(b"%d %d %s\n" % (name, counts[name] + ahead, payload))
            await writer.drain()
            for _ in range(3):
                counts[name] += 1
                line = await reader.readline()
                assert line == b"%d %d %s\n" % (name, counts[name], payload), line
            if name == 0:
                progress(dir, counts[0] // 30)
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*[client(name) for name in range(40)])


def main(dir):
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    server = forked(lambda: asyncio.run(serve(listener)))
    address = listener.getsockname()
    listener.close()
    asyncio.run(talk(dir, address))
    joined(server)
    right(dir)


main(*sys.argv[1:])
