"""A checkpoint written, and proof that the files are the model.

The proof runs transformers in a fresh process; llama.cpp for GGUF files, if it is installed.

Tensors that transformers leaves aside on load, such as heads that predict several tokens, are
carried over if all that they read kept its shape; a sentence says if they were left out. Not
handled: quantised sources, and layers that were removed.
"""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from secateur.errors import CheckpointError, SecateurError
from secateur.facts import Record
from secateur.files import disk_errors, lies_in
from secateur.log import Progress, silent
from secateur.model import modeling_per_layer
from secateur.model.checkpoint import (
    Checkpoint,
    left_aside,
    load_model,
    load_tokenizer,
    open_checkpoint,
)
from secateur.model.modules import text_model
from secateur.model.stock import quiet_transformers, replaced
from secateur.model.tensors import StoredTensor, read_tensor, stored_tensors, tensors_in
from secateur.result_directory import RESULT_FILE, Mismatch, mismatches, read_digests
from secateur.vocabulary.kept import KeptTokens

# The weights of a larger model are several files.
MAX_SHARD_BYTES = 5 * 10**9
# Files of a model directory that saving does not write anew.
_SIDE_FILES = """
chat_template*.jinja chat_template.json processor_config.json
preprocessor_config.json video_preprocessor_config.json additional_chat_templates/*.jinja
LICENSE* NOTICE* USE_POLICY*
""".split()
# Those of them that name tokens by the source's ids.
_FILES_BY_TOKEN = """
generation_config.json tokenizer.model spiece.model tekken.json tiktoken.model *.tiktoken
vocab.json vocab.txt merges.txt added_tokens.json special_tokens_map.json
""".split()
# By the first two keys transformers finds code, at any depth of a config; by the others it says
# where it was read.
_NAMES = (
    "auto_map",
    "custom_pipelines",
    "_name_or_path",
    "name_or_path",
    "is_local",
    "local_files_only",
)


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    carry_from: Path | None,
    kept: KeptTokens | None = None,
) -> tuple[str, ...]:
    """Write model, configs and tokenizer into `directory`; the same model gives the same bytes.

    Tied weights are written once. `carry_from`: the source directory, whose generation config,
    tokenizer and licence files are copied if it has a config.json. `kept`: the source's tokens that
    the model still has; then `tokens.json` is written, and nothing copied that has the old ids.
    Returns a sentence about every file that was not copied, because it is a link to somewhere else.
    The files name no code but ours.

    Raises CheckpointError for disk errors.
    """
    with disk_errors(directory), quiet_transformers():
        tokenizer.save_pretrained(directory)
        _save_model(model, directory)
        left = ()
        if carry_from is not None and (carry_from / "config.json").is_file():
            patterns = [*([] if kept else _FILES_BY_TOKEN), *_SIDE_FILES]
            left = (
                *_carry(carry_from, directory, patterns),
                *_carry_aside(model, carry_from, directory, kept),
            )
        readable = (directory / "config.json").stat().st_mode & 0o777
        for file in directory.glob("*.safetensors"):
            file.chmod(readable)  # safetensors lets only the owner read
        if kept:
            kept.write(directory)
        _clean_configs(model, directory)
    return left


def _save_model(model: PreTrainedModel, directory: Path) -> None:
    # save_pretrained refuses some settings that loading accepts; to_json_file writes them.
    with replaced(vars(model), "generation_config", GenerationConfig()):
        model.save_pretrained(directory, max_shard_size=MAX_SHARD_BYTES)
    if (generation := model.generation_config) is not None:
        generation.to_json_file(directory / "generation_config.json")


def _carry(source: Path, directory: Path, patterns: list[str]) -> Iterator[str]:
    """Copy what saving does not write anew; yield a sentence about every file left behind."""
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            target = directory / file.relative_to(source)
            if not file.is_file() or (target.exists() and pattern != "generation_config.json"):
                continue
            if not lies_in(source, file):
                yield (
                    f"{target.name}: is a link to a file outside the model's directory, so it was "
                    "not carried over."
                )
                continue
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def has_own(directory: Path, name: str) -> bool:
    """Whether the directory has the file, and not as a link to somewhere else."""
    return (directory / name).is_file() and lies_in(directory, directory / name)


def _clean_configs(model: PreTrainedModel, directory: Path) -> None:
    """Remove code from `directory`, and names of code and of places from its configs, except our
    own code.

    transformers 4 can read them, too. A config that is not JSON, which transformers cannot read
    either, is removed.
    """
    own: dict[str, Any] = {}
    if modeling_per_layer.is_per_layer(model.config):
        # vLLM's Transformers backend builds the decoder alone, by AutoModel.
        decoder = modeling_per_layer.PREFIX + type(model.base_model).__name__
        names = {"AutoConfig": type(model.config).__name__, "AutoModel": decoder}
        names["AutoModelForCausalLM"] = type(model).__name__
        own = {"auto_map": {auto: f"{OWN_CODE.stem}.{name}" for auto, name in names.items()}}
    for file in directory.glob("*.py"):
        if not own or file.name != OWN_CODE.name:
            file.unlink()
    for file in directory.glob("*config.json"):
        try:
            text = file.read_text(encoding="utf-8")
            is_models = file.name == "config.json"
            clean = json.loads(
                text, object_hook=_with_old_rope_keys if is_models else _without_names
            )
            if is_models:
                clean = dict(sorted({**clean, **own}.items()))  # the order that transformers writes
            elif (
                clean.get("tokenizer_class") == "TokenizersBackend"
            ):  # what transformers 5 calls it
                clean["tokenizer_class"] = "PreTrainedTokenizerFast"  # both know this name
            if clean != json.loads(text):
                file.write_text(json.dumps(clean, indent=2) + "\n", encoding="utf-8")
        except (ValueError, RecursionError):
            file.unlink()


def _without_names(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _NAMES}


def _with_old_rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return it without names, and with the keys of programs without `rope_parameters`, as
    transformers before 5.

    Without the keys these take a base of 10,000 and say nothing.
    """
    config = _without_names(config)
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return config
    old: dict[str, Any] = {
        key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope
    }
    if rope.get("rope_type", "default") != "default":
        old["rope_scaling"] = {key: value for key, value in rope.items() if key not in old}
    return dict(sorted({**old, **config}.items()))


# Few, so that a CPU does not wait for them.
VERIFY_TOKENS = 64
TOLERANCE = 1e-6
_CHILD = Path(__file__).with_name("reload_child.py")
OWN_CODE = Path(modeling_per_layer.__file__)


@dataclass(frozen=True, slots=True)
class Verification:
    """The reload's figures. `loaded_by`: the class of transformers whose `from_pretrained` made the
    model.
    """

    max_abs_difference: float
    loaded_by: str = "AutoModelForCausalLM"


def verify_reload(
    directory: Path,
    input_ids_BT: Int64[Tensor, "B T"],
    logits_BTV: Float[Tensor, "B T V"],
) -> Verification:
    """Load `directory` in a fresh process and compare its logits with those of the model in memory.

    On the same machine, device and number of threads they are equal, or differ by `TOLERANCE`.
    `input_ids_BT` must leave some positions free for the sample text.

    Raises CheckpointError if the process fails, the loader reports missing, unexpected or
    mismatched tensors, or the logits differ by more.
    """
    with tempfile.TemporaryDirectory(prefix="secateur-verify-") as scratch:
        reloaded_BTV, metadata = _run_child(directory, input_ids_BT, Path(scratch))
    if metadata["problem"]:
        raise CheckpointError(
            f"{directory}: stock transformers reloads it with problems ({metadata['problem']})."
        )
    if reloaded_BTV.shape != logits_BTV.shape:
        raise CheckpointError(
            f"{directory}: reloaded logits have shape {list(reloaded_BTV.shape)}, not "
            f"{list(logits_BTV.shape)}."
        )
    # Row by row: no second copy of all logits in float32.
    rows = zip(reloaded_BTV.flatten(0, -2), logits_BTV.detach().cpu().flatten(0, -2), strict=True)
    difference = (
        torch.stack([(a_V.float() - b_V.float()).abs().max() for a_V, b_V in rows]).max().item()
    )
    if not difference <= TOLERANCE:  # so that NaN is refused too
        raise CheckpointError(
            f"{directory}: the reloaded model's logits differ from those in memory by "
            f"{difference:.3g}, allowed is {TOLERANCE:.3g}; the directory does not hold this model."
        )
    return Verification(difference, metadata["class"])


def prove_reload(
    model: PreTrainedModel, directory: Path, ids_NT: Int64[Tensor, "N T"], progress: Progress
) -> Verification:
    """Prove on the first tokens of a text that `directory` holds this model. Raises as
    `verify_reload`.
    """
    progress("verify", 0, 1)
    ids_1T = ids_NT[:1, :VERIFY_TOKENS].to(model.device)
    with torch.inference_mode():
        logits_1TV = text_model(model)(input_ids=ids_1T, use_cache=False).logits
    if not logits_1TV.isfinite().all():
        raise CheckpointError(f"{directory}: its logits hold NaN or infinity.")
    proof = verify_reload(directory, ids_1T, logits_1TV)
    progress("verify", 1, 1)
    return proof


def _run_child(
    directory: Path, input_ids_BT: Tensor, scratch: Path
) -> tuple[Tensor, dict[str, str]]:
    ids_file, out_file = scratch / "ids.safetensors", scratch / "logits.safetensors"
    save_file({"input_ids": input_ids_BT.contiguous().cpu()}, ids_file)
    # -P: else the script's folder, which has a gguf.py, would be on sys.path.
    command = [sys.executable, "-P", _CHILD, directory.absolute(), ids_file, out_file]
    command += [input_ids_BT.device, torch.get_num_threads()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    environment["HF_MODULES_CACHE"] = str(scratch)  # not the user's cache
    child = subprocess.run(
        [str(part) for part in command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        raise CheckpointError(
            f"{directory}: stock transformers cannot reload it in a fresh process ({last})."
        )
    with safe_open(out_file, framework="pt") as opened:
        # A copy: the tensor is a view of the file, which is deleted.
        return opened.get_tensor("logits").clone(), opened.metadata()


def have_llama_cpp() -> bool:
    """Say whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def require_llama_cpp(what: str) -> None:
    """Raise CheckpointError, saying that `what` needs it, if llama-cpp-python is not installed."""
    if not have_llama_cpp():
        raise CheckpointError(
            f'{what} needs llama-cpp-python; run: pip install "secateur[llama-cpp]"'
        )


def open_llama_cpp(file: Path, num_context: int) -> Any:
    """Load a GGUF file on as many threads as torch uses; it is to tell the logits of every
    position.

    Raises CheckpointError if llama.cpp refuses the file.
    """
    import llama_cpp  # pyright: ignore[reportMissingImports]  # a package that few have

    threads = torch.get_num_threads()
    options = {"n_threads": threads, "n_threads_batch": threads, "logits_all": True}
    try:
        return llama_cpp.Llama(
            str(file), n_ctx=num_context, n_gpu_layers=0, verbose=False, **options
        )
    except ValueError as error:
        raise CheckpointError(f"{file}: llama.cpp cannot load it ({error}).") from None


# The largest relative change of perplexity. q8_0 has 8-bit weights and activations, which move that
# of so short a text by up to 2%. Fewer bits cost more, and what they cost is told; a file that is
# not the model is far off.
EXACT = 0.01
LIMITS = {"q8": 0.05, "q6": 0.1, "q5": 0.5, "q4": 1.0, "q3": 3.0, "q2": 9.0}

# Written for this check: prose, code, numbers, other scripts, odd spacing.
TEXT = """The ferry leaves Kirkwall at 06:15, an hour before the bakery on the corner opens its shutters, and whoever
wants bread on board has to buy it the evening before. Marit had forgotten again. She counted what was left in the
tin -- seven oatcakes, half a jar of rhubarb jam -- and decided that 3.5 hours without breakfast wouldn't kill anyone.

    def fare(distance_km: float, passengers: int = 1) -> float:
        \"\"\"Return the price in pounds; children under 5 travel free.\"\"\"
        return round(4.80 + 0.37 * distance_km, 2) * max(passengers, 1)

"Isn't it odd," said the purser, "that we've carried 12,408 people this year and not one of them asked what the
engine's called?" It was called Åsa, after the builder's daughter; the brass plate (1987) said so in letters nobody
read.  Паром шёл медленно. 海面很平静。 By ten the fog had gone, and the islands lay in the sun
like loaves on a board.
"""  # noqa: E501


@dataclass(frozen=True, slots=True)
class GgufCheck:
    """Perplexities of the check's text."""

    perplexity_transformers: float
    perplexity_llama_cpp: float
    num_tokens: int


@torch.inference_mode()
def check_gguf(file: Path, checkpoint: Checkpoint, type_name: str) -> GgufCheck:
    """Compare `file`, of weights in `type_name`, in llama.cpp with `checkpoint` in transformers.

    Raises CheckpointError if token ids differ, or perplexity differs by more than 1% (or what
    `LIMITS` has for types of fewer bits).
    """
    # With the model's token that starts a text: without it some models write nonsense.
    ids = list(load_tokenizer(checkpoint).encode(TEXT))
    with closing(open_llama_cpp(file, len(ids))) as model:
        if (theirs := model.tokenize(TEXT.encode(), add_bos=True, special=False)) != ids:
            pairs = enumerate(zip(ids, theirs, strict=False))
            position = next((number for number, (own, other) in pairs if own != other), len(ids))
            raise CheckpointError(
                f"{checkpoint.reference}: llama.cpp splits text into other tokens than "
                f"transformers, first at token {position} of the check's text; the tokenizer "
                "cannot be exported."
            )
        model.eval(ids)
        found = _perplexity(torch.from_numpy(np.array(model.scores[: len(ids)])), ids)
    reference = load_model(checkpoint).float()
    expected = _perplexity(reference(torch.tensor([ids]), use_cache=False).logits[0], ids)
    change, most = abs(found / expected - 1), LIMITS.get(type_name[:2], EXACT)
    if not change <= most:  # so that NaN is refused too
        raise CheckpointError(
            f"{checkpoint.reference}: llama.cpp's perplexity {found:.3f} is {change:.1%} from "
            f"transformers' {expected:.3f}, allowed is {most:.0%}; export with a more exact --type."
        )
    return GgufCheck(expected, found, len(ids))


def _perplexity(logits_TV: torch.Tensor, ids: list[int]) -> float:
    return math.exp(cross_entropy(logits_TV[:-1].float(), torch.tensor(ids[1:])).item())


ASIDE_FILE, INDEX_FILE = "model-aside.safetensors", "model.safetensors.index.json"
WHOLE_FILE, FIRST_FILE = "model.safetensors", "model-00001-of-00001.safetensors"

Shapes = dict[str, set[tuple[int, ...]]]
_IN_LAYER = re.compile(r"(?:.*\.)?layers?\.\d+\.(.+)")


def _carry_aside(
    model: Any, source: Path, directory: Path, kept: KeptTokens | None
) -> Iterator[str]:
    """Add the tensors to the result in `directory`, rows of tokens as in its embedding.

    Yields a sentence if they do not fit: a part of a layer that they have too, or a size that the
    config says, is another one than in the source.
    """
    if not model._keys_to_ignore_on_load_unexpected:
        return
    checkpoint = open_checkpoint(source, weights=False)
    if not (aside := left_aside(checkpoint, model)):
        return
    first = next(iter(aside))
    before = {name: tensor for name, tensor in stored_tensors(source).items() if name not in aside}
    dense: Any = checkpoint.config.get_text_config()
    sizes, num_layers = (
        {dense.vocab_size, dense.hidden_size, 2 * dense.hidden_size},
        dense.num_hidden_layers,
    )
    changed = next(_changed(aside, _parts(before), _parts(stored_tensors(directory)), sizes), "")
    if (
        model.config.get_text_config().num_hidden_layers != num_layers
        and f".{num_layers}." in first
    ):
        changed = "they are numbered behind the layers, of which some are gone"
    if changed := "they are quantised" if checkpoint.quantised else changed:
        yield (
            f"{len(aside)} tensors that transformers leaves aside ({first}, ...) were left out: "
            f"{changed}."
        )
        return

    # One file more, which the index names; a loader that finds a whole one reads no index.
    tensors = {name: _rows(read_tensor(tensor), kept) for name, tensor in aside.items()}
    save_file(tensors, directory / ASIDE_FILE, {"format": "pt"})
    if (directory / WHOLE_FILE).is_file():
        (directory / WHOLE_FILE).rename(directory / FIRST_FILE)
    written = tensors_in(directory.glob("*.safetensors"))
    size = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in written.values())
    files = {name: written[name].file.name for name in sorted(written)}
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _rows(values: Tensor, kept: KeptTokens | None) -> Tensor:
    if kept and values.ndim == 2 and len(values) == kept.num_dense:
        return values.index_select(0, torch.tensor(kept.dense_ids))
    return values


def _changed(
    aside: dict[str, StoredTensor], before: Shapes, after: Shapes, hidden: set[int]
) -> Iterator[str]:
    """Yield parts of layers left aside that are of another shape in the result's layers, or that
    these lack.
    """
    for name, carried in aside.items():
        part = match[1] if (match := _IN_LAYER.fullmatch(name)) else ""
        if before.get(part) != after.get(part) or (
            part and part not in before and not hidden.issuperset(carried.shape)
        ):
            yield f"{part} of the layers changed"


def _parts(stored: dict[str, StoredTensor]) -> Shapes:
    shapes: Shapes = {}
    for name, carried in stored.items():
        if match := _IN_LAYER.fullmatch(name):
            shapes.setdefault(match[1], set()).add(carried.shape)
    return shapes


RELOAD_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Verified(Record):
    """What was checked. `mismatches`: empty if all is as it was written.

    `num_bytes`: of the files that match. `max_abs_difference`: of logits, stock transformers
    against `secateur.load`; None if files do not match, or hold no model, so that nothing is
    loaded.
    """

    directory: str
    num_files: int
    num_bytes: int
    mismatches: tuple[Mismatch, ...]
    max_abs_difference: float | None


def verify(result: str | Path, *, progress: Progress = silent) -> Verified:
    """Check a result against the sha256 of its files, and that stock transformers reloads it.

    `result`: a directory that `prune` or `recover` wrote. `progress`: called with (stage, done,
    total). Nothing is loaded unless all files match; code in the directory runs only if it is the
    package's own modelling file.

    Returns a `Verified`; its `mismatches` say what is not as it was written: changed, missing or
    added files, tensors that are missing, untied or not finite, other logits than `secateur.load`.

    Raises CheckpointError if `result` is no result, or one without digests.
    """
    directory = Path(result)
    digests = read_digests(directory)
    if digests is None:
        damaged = Mismatch(
            RESULT_FILE, "the bytes that were written", "others, so no digest can be trusted"
        )
        return Verified(str(result), 0, 0, (damaged,), None)
    wrong = tuple(mismatches(directory, digests, progress))
    whole = [directory / name for name in digests.keys() - {mismatch.what for mismatch in wrong}]
    proof = None
    if not wrong and CONFIG_NAME in digests:  # a measurement has no model
        try:
            model = load_model(open_checkpoint(directory), mapped=True)
            ids_1T = (
                torch.arange(1, RELOAD_TOKENS + 1)[None] % model.config.get_text_config().vocab_size
            )
            proof = prove_reload(model, directory, ids_1T, progress)
        except SecateurError as error:
            wrong = (Mismatch("reload", "the model that secateur.load gives", str(error)),)
    num_bytes, difference = (
        sum(file.stat().st_size for file in whole),
        proof and proof.max_abs_difference,
    )
    return Verified(str(result), len(whole), num_bytes, wrong, difference)
