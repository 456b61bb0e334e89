"""The process that proves a result, forked from one that has torch and transformers imported already.

A run ends with `reload_child.py` in a process that knows nothing of secateur. Its imports take ten times as long as its
work on a tiny model. So one process per run of pytest imports them, and each proof is a fork of it. What such a process
does by itself, from its start to its errors, is tested with the fixture `fresh_processes`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SERVER = """
import json, os, runpy, sys, traceback
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, PreTrainedTokenizerFast
for line in sys.stdin:
    request, status = json.loads(line), 1
    child = os.fork()
    if child == 0:
        try:
            os.environ.clear()
            os.environ.update(request["environment"])
            os.dup2(os.open(request["errors"], os.O_WRONLY | os.O_CREAT), 2)
            sys.argv = request["arguments"]
            runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class WarmProcesses:
    """Stands for the module `subprocess` where a result is proved."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.server = directory, None

    def run(self, command: list[str], *, env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `python -P SCRIPT ARGUMENTS` as `subprocess.run` does, in a fork."""
        assert command[:2] == [sys.executable, "-P"]
        assert options == {"capture_output": True, "text": True, "check": False}
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, "-P", "-c", SERVER],
                env=env | {"HF_MODULES_CACHE": str(self.directory)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self.server.stdin is not None and self.server.stdout is not None
        with tempfile.NamedTemporaryFile("r", encoding="utf-8", dir=self.directory) as errors:
            request = {"arguments": command[2:], "environment": env, "errors": errors.name}
            self.server.stdin.write(json.dumps(request) + "\n")
            self.server.stdin.flush()
            answer = self.server.stdout.readline()
            assert answer, "the process that is forked has ended"
            return subprocess.CompletedProcess(command, int(answer), "", errors.read())

    def close(self) -> None:
        """End the process."""
        if self.server is not None:
            assert self.server.stdin is not None and self.server.stdout is not None
            self.server.kill()
            self.server.wait()
            self.server.stdin.close()
            self.server.stdout.close()
