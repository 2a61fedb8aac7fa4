"""Stands for a process that `fork_server.py` forks: its streams, its signals and its end are those of that process.

`python -I -S fork_client.py SOCKET ARGUMENTS...`; imports nothing that takes time.
"""

import json
import os
import signal
import socket
import struct
import sys


def main() -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(sys.argv[1])
        wanted = {"arguments": sys.argv[2:], "environment": dict(os.environ), "folder": os.getcwd()}  # noqa: PTH109
        data = json.dumps(wanted).encode()
        socket.send_fds(server, [struct.pack("q", len(data))], [0, 1, 2])
        server.sendall(data)
        (pid,) = struct.unpack("i", server.recv(4))
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):  # only the forked process holds them now
            os.dup2(null, stream)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, _: os.kill(pid, received))
        ended = server.recv(4)
    (code,) = struct.unpack("i", ended) if ended else (1,)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
