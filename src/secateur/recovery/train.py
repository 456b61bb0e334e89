"""Training: the pruned model learns to predict what the dense model predicts; never for the worse.

In: both models, the text, the settings. Out: the trained model, in place. transformers' Trainer
runs it, with our loss; FSDP shards both models.
"""

import hashlib
import pickle
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from accelerate.utils import fsdp2_prepare_model, wait_for_everyone
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from secateur.errors import CheckpointError, NumericsError
from secateur.facts import TrainingRecord, Verdicts
from secateur.files import disk_errors
from secateur.log import Progress, Tell
from secateur.model.bind import bind
from secateur.model.stock import quiet_transformers
from secateur.ranks import alone, from_first
from secateur.recipe import RecoverySettings
from secateur.recovery.judge import Judge, moved_away, objective
from secateur.recovery.loss import loss_in_forward, teacher_in_forward
from secateur.recovery.text import RecoveryText
from secateur.recovery.weights import (
    autocasts,
    handed_over,
    let_cpu_shard,
    merge,
    prepare_weights,
    wants_shards,
    weight_size,
    whole_parameters,
    with_lora,
)
from secateur.store import Services, Store
from secateur.stream.device import release_freed

TRAINER_FOLDER, TRAINED_FOLDER = "trainer", "trained"
# Adam moves a weight by about the rate, whatever its gradient: what a model bears follows its
# weights' size.
RELATIVE_RATE = 0.0005
# A training is saved halfway, a longer one every so many steps.
SAVED_STEPS = 150
FASTER_IN_LORA = (
    10  # low-rank additions are products of two small factors: LOG, 2026-11-29, morning
)


class Checkpoints:
    """The directories that the Trainer saves, by step. Each is a step of a store, with its digests.

    `label`: the training's name in sentences. `tell`: gets a line about what is damaged.
    """

    def __init__(self, folder: Path, label: str, tell: Tell) -> None:
        self.folder, self.store = folder, Store(folder, label=label, tell=tell)

    def finish(self, step: int) -> None:
        """Save the digests of a checkpoint that is written; then remove all others."""
        self.store.save_files(self.path(step))
        for other in set(self._steps()) - {step}:
            self._remove(other)

    def last(self) -> Path | None:
        """Return the last checkpoint that is undamaged; None: begin anew.

        All others are removed, so that the Trainer does not meet them.
        """
        last: int | None = None
        for step in sorted(self._steps(), reverse=True):
            if last is None and self.store.has_files(self.path(step)):
                last = step
            else:
                self._remove(step)
        return None if last is None else self.path(last)

    def path(self, step: int) -> Path:
        """Return the directory of the checkpoint of this step, as the Trainer names it."""
        return self.folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    @contextmanager
    def errors_told(self) -> Iterator[None]:
        """Turn a full disk, and a checkpoint that holds code, into a CheckpointError."""
        with disk_errors(self.folder):
            try:
                yield
            except pickle.UnpicklingError:  # the Trainer opens pickles with weights_only
                raise CheckpointError(
                    f"{self.folder}: a checkpoint holds more than tensors, so it is not opened; "
                    "delete the directory and start again."
                ) from None
            except RuntimeError as error:
                # torch writes through a stream that knows no error numbers and has many words for
                # one failure.
                if all(
                    frame.f_code is not torch.save.__code__
                    for frame, _ in walk_tb(error.__traceback__)
                ):
                    raise
                raise CheckpointError(
                    f"{self.folder}: a checkpoint could not be written whole; free some space or "
                    "choose another place."
                ) from None

    def _steps(self) -> list[int]:
        return [
            int(path.name.rpartition("-")[2])
            for path in self.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/")
        ]

    def _remove(self, step: int) -> None:
        self.path(step).with_suffix(".json").unlink(missing_ok=True)
        shutil.rmtree(self.path(step))


class Distiller(Trainer):
    """Trains a model that is in `loss_in_forward`, by the judge's head or the teacher."""

    judge: Judge
    teacher: nn.Module | None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """Return the loss of one batch."""
        ids_BT, teacher = inputs["input_ids"], None
        if "states" in inputs:
            teacher = inputs["states"].flatten(0, 1), self.judge.head
        elif self.teacher is not None:
            with torch.no_grad():
                teacher = self.teacher(ids_BT)
        masks = {name: inputs[name] for name in ("counted", "answers") if name in inputs}
        return model(input_ids=ids_BT, learns=True, teacher=teacher, **masks)


@dataclass
class Listener(TrainerCallback):
    """Moves the progress. `name`: of the training. `checkpoints`: gets the digests of what the
    Trainer saves.
    """

    name: str
    checkpoints: Checkpoints
    tokens_per_step: int
    progress: Progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Begin where an interrupted training ended."""
        self._move(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move the progress; what the last step leaves is kept by `_train`."""
        self._move(state)
        control.should_save &= state.global_step < state.max_steps

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save the digests of a checkpoint that every process has written its part of."""
        wait_for_everyone()
        if state.is_world_process_zero:
            self.checkpoints.finish(state.global_step)

    def _move(self, state: TrainerState) -> None:
        self.progress(
            self.name,
            state.global_step * self.tokens_per_step,
            state.max_steps * self.tokens_per_step,
        )


@dataclass
class Work:
    """A pruned model that is ready to train. `directory`: for what an interrupted run leaves.

    `teacher`: the dense model. `states`: in its place, what its head reads for each block of text.
    With `kl_share: 0` neither is used. `name`: recover or polish.
    """

    pruned: PreTrainedModel
    teacher: PreTrainedModel | None
    text: RecoveryText
    judge: Judge
    settings: RecoverySettings
    seed: int
    directory: Path
    services: Services
    states: Sequence[Tensor] | None = None
    name: str = "recover"
    on_cpu: bool = field(default_factory=lambda: not torch.cuda.is_available())


@contextmanager
def training_folder(services: Services, settings: RecoverySettings, name: str) -> Iterator[Path]:
    """Yield the directory of the training, the same for all ranks: in the store if there is one.

    Each has its settings in its name: what memory allows may have changed when a run goes on.
    """
    name = f"{name}-{hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:8]}"
    with tempfile.TemporaryDirectory(prefix="training-", dir=services.scratch) as own:
        store = services.store.directory
        yield from_first(lambda: Path(own) if store is None else store / name)


def train_guarded(work: Work) -> tuple[Verdicts, TrainingRecord]:
    """Train the pruned model; return the verdicts before the training and the record of it.

    The weights are put back if what the training minimises did not fall on held-out text. KL alone
    would undo trainings that win on text of every kind: LOG, 2026-11-27, evening.
    """
    before = judged(work)
    # Replaced, never changed.
    old = {name: parameter.data for name, parameter in work.pruned.named_parameters()}
    cost = _train(work)
    try:
        after = judged(work)
    except NumericsError:  # the logits are not finite: the training has diverged
        after = None
    was, now = (
        objective(verdicts, work.settings.kl_share, work.judge.answers, before)
        for verdicts in (before, after)
    )
    held = now < was
    if not held:
        for key, parameter in work.pruned.named_parameters():
            parameter.data = old[key]
        name = "KL" if work.settings.kl_share == 1 else "loss"
        what = f"{work.name}: held-out {name} did not fall ({was:.4f} -> {now:.4f} nats per token)"
        if after is not None and (moved := moved_away(before, after, work.judge.answers)):
            kl = ", ".join(
                f"{name} {before[name].both_ways:.4f} -> {after[name].both_ways:.4f}"
                for name in moved
            )
            what = (
                f"{work.name}: the model moved away from the dense one on its answers (KL of {kl} "
                "nats per token)"
            )
        work.services.log.note(f"{what}, so the weights are those from before the training.")
    after = after or before
    kl = {domain: verdict.kl for domain, verdict in after.items()}
    work.services.log.write({"event": f"{work.name}_judged", "held": held, "kl": kl})
    return before, TrainingRecord(**cost, after=after, held=held)


def judged(work: Work) -> Verdicts:
    """Return the pruned model's verdicts as its weights are now."""
    device = next(work.pruned.parameters()).device
    return work.judge.verdicts(
        lambda ids_BT: work.pruned(input_ids=ids_BT.to(device), use_cache=False).logits
    )


def _train(work: Work) -> dict[str, Any]:
    """Train, or load what an interrupted run had trained; return tokens and seconds."""
    store = Store.lasting(work.directory / TRAINED_FOLDER, work.services.tell, label=work.name)
    with alone():  # every process has the whole model, and reads and writes it by itself
        finished = store.find("trained")
    if finished is not None:
        weights, record = finished
        for name, parameter in work.pruned.named_parameters():
            parameter.data = weights[name].to(parameter.device)
        for line in record["lines"]:
            work.services.log.write(line)
        return record["cost"]
    start = time.perf_counter()
    num_tokens = recover_logits(work)
    release_freed()  # the optimizer's states
    seconds = round(time.perf_counter() - start, 2)
    cost = {"num_tokens": num_tokens, "seconds": seconds}
    lines = [line for line in work.services.log.lines if line["event"] == f"{work.name}_step"]
    with alone():
        store.save("trained", dict(work.pruned.named_parameters()), {"cost": cost, "lines": lines})
    return cost


def recover_logits(work: Work) -> int:
    """Train `work.pruned` in place and return the tokens trained on.

    What is trained is float32; a bfloat16 model computes and ends in bfloat16 (autocast).
    AdamW without decay, a tenth of warm-up, then a cosine schedule, gradients clipped to norm 1.

    Raises RecipeError if FSDP is too old.
    """
    if work.settings.kl_share == 0:
        work.teacher = work.states = None
    pruned = work.pruned
    dtypes = {name: parameter.dtype for name, parameter in pruned.named_parameters()}
    settings, dtype, length = work.settings, pruned.dtype, work.text.sequence_length
    use_cache = getattr(pruned.config, "use_cache", None)
    size = settings.blocks_per_step(length)
    num_steps = len(work.text.blocks) // size
    faster = FASTER_IN_LORA if settings.train == "lora" else 1
    rate = settings.learning_rate or faster * RELATIVE_RATE * weight_size(pruned)
    in_shards = wants_shards()
    prepare_weights(
        pruned, settings.train, float_all=in_shards or not autocasts(dtype, on_cpu=work.on_cpu)
    )
    torch.manual_seed(work.seed)
    model = handed_over(pruned) if in_shards else pruned
    with ExitStack() as inside:
        inside.enter_context(quiet_transformers())
        inside.enter_context(
            loss_in_forward(model, bind(model), settings.kl_share, in_shards=in_shards)
        )
        if work.teacher is not None:
            inside.enter_context(
                teacher_in_forward(work.teacher, bind(work.teacher), in_shards=in_shards)
            )
        # After binding, which knows no wrapped linears.
        trained = with_lora(model) if settings.train == "lora" else model
        checkpoints = Checkpoints(work.directory / TRAINER_FOLDER, work.name, work.services.tell)
        arguments = _arguments(work, dtype, size, num_steps, rate)
        trainer = _trainer(work, trained, arguments, checkpoints, tokens_per_step=size * length)
        last = from_first(checkpoints.last)
        with checkpoints.errors_told():
            trainer.train(resume_from_checkpoint=last and str(last))
        _take_back(work, trained, trainer, dtypes)
    _log_steps(work, trainer.state.log_history, size * length)
    if use_cache is not None:
        pruned.config.use_cache = use_cache  # the Trainer turned it off
    pruned.requires_grad_(False)
    for name, parameter in pruned.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    pruned.eval()
    return trainer.state.global_step * size * length


def _trainer(
    work: Work,
    trained: nn.Module,
    arguments: TrainingArguments,
    checkpoints: Checkpoints,
    *,
    tokens_per_step: int,
) -> Distiller:
    listener = Listener(work.name, checkpoints, tokens_per_step, work.services.progress)
    items, blocks = list[dict[str, Any]](), work.text.blocks
    are_masked = any(block.counted_T is not None for block in blocks)
    for place, block in enumerate(blocks):
        items.append({"input_ids": block.ids_T})
        if are_masked:
            items[-1] |= {"counted": block.mask_T, "answers": block.counted_T is not None}
        if work.states is not None:
            items[-1]["states"] = work.states[place]
    data: dict[str, Any] = {"data_collator": default_collate, "train_dataset": items}
    trainer = Distiller(model=trained, args=arguments, callbacks=[listener], **data)
    trainer.remove_callback(PrinterCallback)
    # Else the Trainer sums the losses of a step's parts; ours, of equal length, are averaged.
    trainer.model_accepts_loss_kwargs = False
    trainer.judge = work.judge
    teacher: Any = work.teacher
    if work.states is not None:
        work.judge.head.to(arguments.device)  # a copy: see `polish.learn`
    elif teacher is not None and not trainer.is_fsdp_enabled:
        teacher = teacher.to(arguments.device)
    if trainer.is_fsdp_enabled:
        # Checkpoints are written whole: torch reads those as tensors alone, but unpickles shards.
        plugin: Any = trainer.accelerator.state.fsdp_plugin
        plugin.state_dict_config = plugin.optim_state_dict_config = None  # else the launcher's stay
        plugin.set_state_dict_type("FULL_STATE_DICT")
        work.services.log.note(
            f"{work.name}: weights were in shards over {arguments.world_size} processes (FSDP)."
        )
        if teacher is not None:
            work.judge.own_head()
            work.judge.head.to(arguments.device)
            teacher = fsdp2_prepare_model(trainer.accelerator, teacher)
    trainer.teacher = teacher
    return trainer


def _arguments(
    work: Work, dtype: torch.dtype, size: int, num_steps: int, rate: float
) -> TrainingArguments:
    settings, on_cpu = work.settings, work.on_cpu
    arguments = TrainingArguments(
        output_dir=str(work.directory / TRAINER_FOLDER),
        per_device_train_batch_size=settings.blocks_per_device,
        max_steps=num_steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(
            num_steps - 1, max(1, num_steps // 10)
        ),  # the first step of a warm-up has no rate
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=autocasts(dtype, on_cpu=on_cpu),
        gradient_checkpointing=settings.gradient_checkpointing,
        logging_steps=1,
        save_strategy="steps",
        save_steps=min(-(-num_steps // 2), SAVED_STEPS),
        report_to="none",
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        use_cpu=on_cpu,
        disable_tqdm=True,
        seed=work.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else DataParallel multiplies the batch
    if wants_shards():
        let_cpu_shard(arguments)
    arguments.gradient_accumulation_steps = size // (
        arguments.per_device_train_batch_size * arguments.world_size
    )
    return arguments


def _log_steps(work: Work, history: list[dict[str, float]], tokens_per_step: int) -> None:
    """Write the run log's line of every step. `history`: of the Trainer, an interrupted run's
    first.
    """
    for logs in history:
        if "loss" in logs:
            step = int(logs["step"])
            line = {"event": f"{work.name}_step", "step": step, "tokens": step * tokens_per_step}
            line |= {"loss": logs["loss"], "learning_rate": logs["learning_rate"]}
            work.services.log.write(line)


def _take_back(
    work: Work, trained: nn.Module, trainer: Distiller, dtypes: dict[str, torch.dtype]
) -> None:
    """Give `work.pruned` the trained weights: unwrapped, gathered, with additions merged."""
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    if trainer.is_fsdp_enabled:
        whole = with_lora(work.pruned) if work.settings.train == "lora" else work.pruned
        places = dict(whole.named_parameters())
        for name, tensor in whole_parameters(trained):
            # Additions are merged in float32.
            places[name].data = tensor.to(dtypes.get(name, tensor.dtype))
        trained = whole
    if trained is not work.pruned:
        merge(trained)
    work.pruned.to("cpu")  # type: ignore[arg-type]  # transformers' wrapper hides its arguments
