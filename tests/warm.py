"""Processes with torch and transformers imported already: forks of one that is started once per run of pytest.

A tiny model is pruned in a second, while the imports of a new process take five. What runs in a fork knows nothing of
the tests' own process. In such forks results are proved, but within `fresh`.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SERVER = """
import gc, json, os, runpy, signal, sys, traceback
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, PreTrainedTokenizerFast

def run(option, *arguments):
    if option == "-P":
        run(*arguments)
    elif option == "-c":
        sys.argv = ["-c", *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    elif option == "-m":
        sys.argv = list(arguments)
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [option, *arguments]
        runpy.run_path(option, run_name="__main__")

gc.collect()
gc.freeze()  # in the forks too, which leaves their memory shared
for line in sys.stdin:
    request, status = json.loads(line), 1
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(request["environment"])
            for number, file in ((1, request["output"]), (2, request["errors"])):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            run(*request["arguments"])
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class WarmProcesses:
    """Stands for the module `subprocess`: one process at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.server = directory, None
        self.output, self.errors = directory / "output", directory / "errors"

    def start(self, command: list[object], environment: dict[str, str]) -> int:
        """Begin `python ...` and return its process id."""
        assert command[0] == sys.executable
        if self.server is None:
            own, pipe = environment | {"HF_MODULES_CACHE": str(self.directory)}, subprocess.PIPE
            server = [sys.executable, "-P", "-c", SERVER]
            self.server = subprocess.Popen(server, env=own, stdin=pipe, stdout=pipe, text=True)
        assert self.server.stdin is not None
        request = {"arguments": [str(part) for part in command[1:]], "environment": environment}
        request |= {"output": str(self.output), "errors": str(self.errors)}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return self._answer()

    def wait(self, command: list[object]) -> subprocess.CompletedProcess[str]:
        """Return how the process ended, with what it printed."""
        status = self._answer()
        output, errors = (file.read_text(encoding="utf-8") for file in (self.output, self.errors))
        return subprocess.CompletedProcess(command, status, output, errors)

    def run(self, command: list[object], *, env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `python ...` as `subprocess.run` does."""
        assert options in ({}, {"capture_output": True, "text": True, "check": False})
        self.start(command, env)
        return self.wait(command)

    def close(self) -> None:
        """End the process that is forked."""
        if self.server is not None:
            assert self.server.stdin is not None and self.server.stdout is not None
            self.server.kill()
            self.server.wait()
            self.server.stdin.close()
            self.server.stdout.close()

    def _answer(self) -> int:
        assert self.server is not None and self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, "the process that is forked has ended"
        return int(line)


@contextmanager
def fresh() -> Iterator[None]:
    """Within the context each proof has a process of its own."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("secateur.formats.save.subprocess", subprocess)
        yield
