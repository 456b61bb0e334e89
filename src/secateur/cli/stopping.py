"""Ctrl-C and SIGTERM: a command ends within seconds, even in the middle of one operation that takes minutes.

In: a block. Out: SystemExit inside it, so that half-written directories are removed on the way out. Python looks at
signals between operations only, and the inverse of a wide layer is one; so a thread looks too, and ends the process if
the block has not ended in time. What is then left behind, the next run for the same OUT removes, as after SIGKILL.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPPED_BY = {128 + number: number for number in (signal.SIGINT, signal.SIGTERM)}
PATIENCE_SECONDS = 5.0


@contextmanager
def stoppable(patience_seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Within the block both signals raise SystemExit with status 128 + signal, or end the process with it in time."""
    handlers = {number: signal.signal(number, _stop) for number in STOPPED_BY.values()}
    heard, told = socket.socketpair()
    told.setblocking(False)
    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(heard, patience_seconds), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        told.close()  # which ends the thread
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _stop(number: int, frame: object) -> None:
    # An exception and not the default action, so that half-written directories are removed on the way out; and not
    # KeyboardInterrupt, which typer turns into an exit of its own.
    raise SystemExit(128 + number)


def _watch(heard: socket.socket, patience_seconds: float) -> None:
    with heard:
        number = 0
        while 128 + number not in STOPPED_BY:
            data = heard.recv(1)
            if not data:
                return
            number = data[0]
        heard.settimeout(patience_seconds)
        try:
            while heard.recv(1):
                pass
        except TimeoutError:
            text = "interrupted in a long operation; prune with the same options and --resume goes on"
            print(f"secateur: {text}.", file=sys.stderr, flush=True)
            os._exit(128 + number)
