"""Proof that a saved directory is an ordinary checkpoint: transformers loads it in a fresh process.

In: the directory, token ids, and the logits that the model in memory gave for them. Out: how far the reloaded model's
logits are from those, and a sample of its text. The child process imports nothing of secateur and has no network. It
runs the modelling file that a model of per-layer widths carries, as its user will, and of no other model.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.errors import CheckpointError

_CHILD = Path(__file__).with_name("reload_child.py")


@dataclass(frozen=True, slots=True)
class Verification:
    """What the reload showed. `generated_text`: a greedy continuation of the first row (ids if no tokenizer)."""

    max_abs_difference: float
    seconds: float
    generated_text: str


def verify_reload(
    directory: Path,
    input_ids_BT: Int64[Tensor, "B T"],
    logits_BTV: Float[Tensor, "B T V"],
    tolerance: float = 1e-6,
) -> Verification:
    """Load `directory` in a fresh process and compare its logits with `logits_BTV` of the model in memory.

    On the same machine, device and number of threads the difference is exactly zero; `tolerance` bounds its largest
    absolute value, in logits. `input_ids_BT` must leave some positions free for the sample text.

    Raises CheckpointError if the process fails, the loader reports missing, unexpected or mismatched tensors, or the
    logits differ by more than `tolerance`.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="secateur-verify-") as scratch:
        reloaded_BTV, metadata = _run_child(directory, input_ids_BT, Path(scratch))
    if metadata["problem"]:
        raise CheckpointError(f"{directory}: stock transformers reloads it with problems ({metadata['problem']}).")
    if reloaded_BTV.shape != logits_BTV.shape:
        raise CheckpointError(
            f"{directory}: reloaded logits have shape {list(reloaded_BTV.shape)}, not {list(logits_BTV.shape)}."
        )
    # Row by row: the logits of a large vocabulary need no second copy in float32.
    rows = zip(reloaded_BTV.flatten(0, -2), logits_BTV.detach().cpu().flatten(0, -2), strict=True)
    difference = torch.stack([(a_V.float() - b_V.float()).abs().max() for a_V, b_V in rows]).max().item()
    if not difference <= tolerance:  # so that NaN is refused too
        raise CheckpointError(
            f"{directory}: the reloaded model's logits differ from those in memory by {difference:.3g}, allowed is "
            f"{tolerance:.3g}; the directory does not hold this model."
        )
    return Verification(difference, time.perf_counter() - started, metadata["text"])


def _run_child(directory: Path, input_ids_BT: Tensor, scratch: Path) -> tuple[Tensor, dict[str, str]]:
    ids_file, out_file = scratch / "ids.safetensors", scratch / "logits.safetensors"
    save_file({"input_ids": input_ids_BT.contiguous().cpu()}, ids_file)
    # -P: or the child would import secateur's modules (recipe, stats, ...) where a library means others.
    command = [sys.executable, "-P", _CHILD, directory.absolute(), ids_file, out_file]
    command += [input_ids_BT.device, torch.get_num_threads()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    environment["HF_MODULES_CACHE"] = str(scratch)  # or the carried modelling file would be copied to the user's cache
    child = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, check=False
    )
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        raise CheckpointError(f"{directory}: stock transformers cannot reload it in a fresh process ({last}).")
    with safe_open(out_file, framework="pt") as opened:
        # A copy: the file, which the tensor would be a view of, goes away with the scratch directory.
        return opened.get_tensor("logits").clone(), opened.metadata()
