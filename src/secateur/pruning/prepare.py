"""From an opened model to a run: prices, memory, text, weights on the device, equal ranks."""

from dataclasses import replace
from functools import partial

from secateur.data.calibration import CalibrationSet, build_calibration, with_sampled
from secateur.files import check_free_space
from secateur.log import Progress
from secateur.model.bind import decoder_layers
from secateur.model.checkpoint import CausalLM, eval_mode
from secateur.pruning.cost import MemoryPlan, disk_bytes, memory_for
from secateur.pruning.latency import with_prices
from secateur.pruning.open import Opened, check_same_run, loaded, tokenizer_of
from secateur.pruning.resolve import Resolved, resolve
from secateur.pruning.run import Run
from secateur.ranks import from_first
from secateur.store import Services
from secateur.stream.device import CPU
from secateur.stream.offload import Placement


def prepared(opened: Opened, services: Services) -> tuple[Opened, Run, Placement]:
    """Return what was opened with weights and tokenizer, the run, and its placement on the device.

    Raises a SecateurError for what the recipe, the memory or the text does not allow.
    """
    opened = with_prices(opened, services)
    resolved, log = resolve(opened), services.log
    plan = memory_for(opened, resolved)
    if services.scratch is not None:
        check_free_space(services.scratch, disk_bytes(opened, resolved, plan))
    opened = replace(opened, tokenizer=tokenizer_of(opened))
    source = (tokenizer_of(opened), resolved.recipe.seed, services.progress)
    with log.time("calibration"):
        text = from_first(partial(calibration_text, opened, resolved, services.progress))
    with log.time("load"):
        opened, resolved, placement = _on_device(opened, resolved, plan)
    model = opened.model
    with log.time("calibration"), eval_mode(model):
        text = from_first(partial(with_sampled, text, model, *source))
        services.store.check_input("calibration text", text.content_hash)
    facts = {"model": model, "arch": opened.arch, "resolved": resolved, "text": text, "services": services}
    return opened, Run(**facts, weights_on_disk=plan.weights_on_disk), placement


def calibration_text(
    opened: Opened,
    resolved: Resolved,
    progress: Progress,
    model: CausalLM | None = None,
    more_held_out: int = 0,
) -> CalibrationSet:
    """Return the recipe's calibration set. `model`: the dense one, for domains sampled from it."""
    recipe, tokenizer = resolved.recipe, tokenizer_of(opened)
    counts = {"more_held_out": more_held_out, "num_rounds": recipe.choose.rounds}
    text = build_calibration(recipe.calibration, resolved.num_tokens, tokenizer, recipe.seed, progress, **counts)
    return text if model is None else with_sampled(text, model, tokenizer, recipe.seed, progress)


def _on_device(opened: Opened, resolved: Resolved, plan: MemoryPlan) -> tuple[Opened, Resolved, Placement]:
    """Load the model and onload it; a model in memory stays where it is."""
    opened, notes = loaded(opened, on_disk=plan.weights_on_disk)
    resolved = replace(resolved, warnings=resolved.warnings + notes + _notes(opened, plan))
    check_same_run(opened.model, resolved.recipe)
    layers, device = decoder_layers(opened.model, opened.arch), CPU if opened.checkpoint is None else opened.device
    one_at_a_time, in_float32 = plan.one_layer_at_a_time, plan.in_float32
    placement = Placement(opened.model, layers, device, one_at_a_time=one_at_a_time, in_float32=in_float32)
    placement.onload()
    return opened, resolved, placement


def _notes(opened: Opened, plan: MemoryPlan) -> tuple[str, ...]:
    """Return notes for people on how the run keeps within memory."""
    notes: tuple[str, ...] = ()
    if plan.one_layer_at_a_time and plan.budget_bytes is not None:
        limit = f"{plan.budget_bytes / 1e9:.2f} GB"
        notes += (f"layers came to {opened.device} one at a time to keep within {limit}.",)
    if plan.in_float32:
        stored = str(opened.model.dtype).removeprefix("torch.")
        notes += (f"computed in float32 on {opened.device}; stored in {stored} as before.",)
    return notes
