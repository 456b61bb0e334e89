"""`secateur.bench`: time a model, or time a pruned and its dense model in turns.

In: model references and a workload. Out: a `BenchResult`, saved as `bench.json`. Everything that
the configs can tell is checked before any weights are read.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from secateur.errors import RecipeError, nearest
from secateur.evaluation import timing
from secateur.facts import Size, Workload
from secateur.files import staged_file
from secateur.formats.gguf import check_exportable, export_gguf
from secateur.formats.save import require_llama_cpp
from secateur.log import Progress, silent, versions
from secateur.methods.prices import least_costs
from secateur.model.checkpoint import Checkpoint, check_weights, load_model, meta_model, open_checkpoint
from secateur.report.measured import BENCH_FILE, BenchResult, BenchSettings, ModelFigures, SpeedUp

ENGINES = ("transformers", "llama.cpp")
GGUF_TYPE, GGUF_DTYPE = "f16", torch.float16  # what llama.cpp runs, its cache too


@dataclass(frozen=True, slots=True)
class _Contender:
    """A model ready to run. `shape`: the model, or one on the meta device, for its sizes."""

    name: str
    shape: PreTrainedModel
    runner: timing.Runner
    peak_bytes: int | None


def bench(
    model: str | Path,
    against: str | Path | None = None,
    *,
    batch: int = 1,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    repeats: int = 5,
    device: str = "cpu",
    compiled: bool = False,
    engine: str = "transformers",
    progress: Progress = silent,
) -> BenchResult:
    """Time a model, in turns with the dense one, and compare the speed-up with the ideal.

    `model`: a result of `prune`, or any other model; bench.json is written into it if it is a
    directory. `against`: the dense model. `batch`: prompts at a time, of `prompt_tokens` each,
    followed by `new_tokens` each. `repeats`: runs of each model. `device`: cpu, cuda or cuda:0.
    `compiled`: use torch.compile. `engine`: transformers, or llama.cpp, which gets both models as
    GGUF. `progress`: called with (stage, done, total).

    Returns the figures of each model, and the speed-up beside the ideal.

    Raises a SecateurError for what a user can correct: RecipeError for options, CheckpointError for
    models and for a missing llama.cpp.
    """
    workload, settings = Workload(batch, prompt_tokens, new_tokens, repeats), BenchSettings(engine, device, compiled)
    _check_settings(settings, workload)
    checkpoints = [open_checkpoint(reference) for reference in (model, against) if reference is not None]
    for checkpoint in checkpoints:
        _check_model(checkpoint, workload, settings)
    result = _bench(checkpoints, workload, settings, progress)
    if Path(model).is_dir():  # never into the hub's cache
        with staged_file(Path(model, BENCH_FILE), overwrite=True) as staged:
            staged.write_text(result.to_json(), encoding="utf-8")
    return result


def _bench(
    checkpoints: list[Checkpoint], workload: Workload, settings: BenchSettings, progress: Progress
) -> BenchResult:
    with tempfile.TemporaryDirectory(prefix="secateur-bench-") as scratch:
        prepare = _prepare_gguf if settings.engine == "llama.cpp" else _prepare_transformers
        contenders = []
        for done, checkpoint in enumerate(checkpoints):
            progress("load", done, len(checkpoints))
            contenders.append(prepare(checkpoint, workload, settings, Path(scratch, f"{done}.gguf")))
        progress("load", len(checkpoints), len(checkpoints))
        runs = timing.take_turns([contender.runner for contender in contenders], workload.repeats, progress, "bench")
    figures = [_figures(contender, run, workload) for contender, run in zip(contenders, runs, strict=True)]
    pruned, dense = figures[0], figures[1] if len(figures) == 2 else None
    prefill = decode = None
    if dense is not None:
        flops = dense.costs.prefill_flops_per_token / pruned.costs.prefill_flops_per_token
        num_bytes = dense.costs.decode_bytes_per_token / pruned.costs.decode_bytes_per_token
        prefill = _speed_up(*(timing.prefill_rates(run, workload) for run in runs), ideal=flops)
        decode = _speed_up(*(timing.decode_rates(run, workload) for run in runs), ideal=num_bytes)
    return BenchResult(settings, torch.get_num_threads(), workload, pruned, dense, prefill, decode, versions())


def _prepare_transformers(checkpoint: Checkpoint, workload: Workload, settings: BenchSettings, _: Path) -> _Contender:
    model = load_model(checkpoint)
    torch.nn.Module.to(model, torch.device(settings.device))
    if settings.compiled:
        model.compile()
        timing.transformers_runner(model, workload, compiled=True)()  # or the compiler's memory counts
    peak = timing.peak_model_bytes(model, workload, compiled=settings.compiled)
    runner = timing.transformers_runner(model, workload, compiled=settings.compiled)
    return _Contender(checkpoint.reference, model, runner, peak)


def _prepare_gguf(checkpoint: Checkpoint, workload: Workload, _: BenchSettings, file: Path) -> _Contender:
    export_gguf(checkpoint, file, GGUF_TYPE)
    shape = meta_model(checkpoint.config)
    torch.nn.Module.to(shape, GGUF_DTYPE)
    return _Contender(checkpoint.reference, shape, timing.llama_cpp_runner(file, workload), None)


def _figures(contender: _Contender, runs: list[list[float]], workload: Workload) -> ModelFigures:
    shape, dtype = contender.shape, str(contender.shape.dtype).removeprefix("torch.")
    costs, measured = least_costs(shape, workload), timing.speed(runs, workload)
    return ModelFigures(contender.name, dtype, Size.of(shape), costs, measured, contender.peak_bytes)


def _speed_up(pruned: list[float], dense: list[float], *, ideal: float) -> SpeedUp:
    measured = timing.paired_ratio(pruned, dense)
    return SpeedUp(measured, ideal, measured.median / ideal)


def _check_settings(settings: BenchSettings, workload: Workload) -> None:
    for field, least in (("batch", 1), ("prompt_tokens", 1), ("new_tokens", 2), ("repeats", 1)):
        value = getattr(workload, field)
        if value < least:
            raise RecipeError(f"bench {field}: must be at least {least}, got {value}.")
    if settings.engine not in ENGINES:
        raise RecipeError(
            f"bench engine: unknown engine '{settings.engine}'; allowed: {', '.join(ENGINES)}; "
            f"did you mean '{nearest(settings.engine, ENGINES)}'?"
        )
    try:
        device = torch.device(settings.device)
    except RuntimeError:
        raise RecipeError(f"bench device: '{settings.device}' is no device; give cpu, cuda or cuda:0.") from None
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"bench device: must be cpu or cuda, got '{settings.device}'.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(
            f"bench device: '{settings.device}' asks for a GPU, and torch finds {torch.cuda.device_count()}; use cpu."
        )
    if settings.engine == "llama.cpp":
        require_llama_cpp("bench --engine llama.cpp")
        if (workload.batch, device.type, settings.compiled) != (1, "cpu", False):
            raise RecipeError("bench engine: llama.cpp runs here with batch 1, on the cpu, and not compiled by torch.")


def _check_model(checkpoint: Checkpoint, workload: Workload, settings: BenchSettings) -> None:
    shape = meta_model(checkpoint.config)
    check_weights(checkpoint, shape)
    longest = checkpoint.config.get_text_config().max_position_embeddings
    asked = workload.prompt_tokens + workload.new_tokens
    if asked > longest:
        raise RecipeError(
            f"bench: {workload.prompt_tokens} prompt and {workload.new_tokens} new tokens make {asked}, more than the "
            f"{longest} that {checkpoint.reference} can attend to; ask for fewer."
        )
    if settings.engine == "llama.cpp":
        check_exportable(checkpoint, GGUF_TYPE)
