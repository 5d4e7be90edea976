"""Reads a file from a web server again and again over four connections that must last: PORT DIR."""
import hashlib
import http.client
import sys
import threading

from rounds import finished


def client(port, dir, wanted, failed):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.connect()
    first = connection.sock
    while not finished(dir):
        connection.request("GET", "/page")
        if connection.sock is not first:
            failed.append("the connection was made anew")
            return
        if hashlib.sha1(connection.getresponse().read()).digest() != wanted:
            failed.append("another file")
            return


def guarded(port, dir, wanted, failed):
    try:
        client(port, dir, wanted, failed)
    except Exception as error:
        failed.append(error)


def main(port, dir):
    with open(f"{dir}/page", "rb") as page:
        wanted = hashlib.sha1(page.read()).digest()
    failed = []
    threads = [threading.Thread(target=guarded, args=(int(port), dir, wanted, failed)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.exit(repr(failed) if failed else 0)


main(*sys.argv[1:])
