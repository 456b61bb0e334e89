"""Runs one program from its standard input, as a script of its own: see `evaluation.tasks`.

No network: by a name space of the kernel where it gives one, and by refusal in any case, as for
processes and for files that are written. The number that is its argument is printed at the end.
"""

import ctypes
import os
import resource
import sys

NUM_BYTES, NUM_SECONDS, NUM_OUTPUT_BYTES = 1 << 30, 10, 1 << 20
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REFUSED = (
    "socket.",
    "subprocess.",
    "ctypes.",
    "shutil.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.fork",
    "os.kill",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "signal.pthread_kill",
    "webbrowser.",
    "urllib.",
    "ftplib.",
    "http.",
    "smtplib.",
)


def limit_resources() -> None:
    """Bound memory, processor time and output."""
    resource.setrlimit(resource.RLIMIT_AS, (NUM_BYTES, NUM_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (NUM_SECONDS, NUM_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (NUM_OUTPUT_BYTES, NUM_OUTPUT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def leave_network() -> None:
    """Move into a name space without a network, if the kernel lets this user."""
    unshare = getattr(ctypes.CDLL(None), "unshare", None) if sys.platform == "linux" else None
    if unshare is not None and unshare(CLONE_NEWNET) != 0:
        unshare(CLONE_NEWUSER | CLONE_NEWNET)


def refuse(event: str, arguments: tuple[object, ...]) -> None:
    """Refuse what a program that is asked for an answer has no use for."""
    if event.startswith(REFUSED):
        raise PermissionError(f"{event} is refused")
    if event == "open":
        flags = arguments[2]
        if isinstance(flags, int) and flags & WRITES:
            raise PermissionError("writing files is refused")


def main() -> None:
    """Run the program, then print the number."""
    drawn = sys.argv.pop()
    program = sys.stdin.read()
    limit_resources()
    leave_network()
    sys.addaudithook(refuse)
    exec(compile(program, "answer", "exec"), {"__name__": "__main__"})
    sys.stdout.write(drawn)


if __name__ == "__main__":
    main()
