"""The training: the pruned model learns to predict what the dense model predicts.

In: the pruned model, the dense one, blocks of text, a judge, a directory for checkpoints. Out: the pruned model with
the weights of the least held-out loss. An interrupted training goes on from the last checkpoint in its directory and
ends with the same weights.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel, PrinterCallback, TrainingArguments

from secateur.checkpoint_quiet import quiet_transformers
from secateur.errors import CheckpointError, RecipeError
from secateur.progress import Progress, silent
from secateur.recover_judge import Judge
from secateur.recover_pair import Candidates
from secateur.recover_recipe import LogitSettings, RecoverySettings
from secateur.recover_sharded import handed_over, let_cpu_shard, save_whole, shard, wants_shards, whole_parameters
from secateur.recover_text import RecoveryText, blocks_per_step
from secateur.recover_trainer import BlockDataset, Distiller, Listener, collate, teach_by

STATE_FILE, TRAINER_FOLDER = "trainer_state.json", "trainer"


@dataclass
class Work:
    """A recovery with everything at hand. `teacher` becomes None where nothing asks it."""

    candidates: Candidates
    pruned: PreTrainedModel
    teacher: PreTrainedModel | None
    text: RecoveryText
    judge: Judge
    settings: RecoverySettings
    seed: int
    directory: Path
    log: Callable[[dict[str, Any]], None] = lambda line: None
    progress: Progress = silent
    tell: Callable[[str], None] = lambda text: None


def recover_logits(work: Work, weights: dict[str, float]) -> int:
    """Train `work.pruned` in place and return the tokens it was trained on, which are fewer after an early stop.

    `weights`: what each domain's loss counts.

    Weights are float32 while they are trained; a model in bfloat16 computes in bfloat16 (autocast) and ends in it.
    AdamW without decay, cosine schedule after a tenth of warming up, gradients clipped to norm 1.

    Raises RecipeError if a step cannot be shared out over processes and devices, peft is missing, or FSDP is too old.
    """
    if work.settings.logits.kl_share == 0:
        work.teacher = None
    dtypes = {name: parameter.dtype for name, parameter in work.pruned.named_parameters()}
    settings, dtype, length = work.settings.logits, work.pruned.dtype, work.text.sequence_length
    size = blocks_per_step(settings.batch_tokens, length)
    num_steps = len(work.text.blocks) // size
    for parameter in work.pruned.parameters():  # not .float(): buffers, such as rotary frequencies, stay as they are
        parameter.data = parameter.data.to(torch.float32, copy=True)  # whoever holds the old ones wants them unchanged
    work.pruned.requires_grad_(True)
    if settings.train == "layers":
        # Adam's steps do not shrink with the gradient: they would move words that the text hardly has as far as others.
        words: tuple[Any, ...] = (work.pruned.get_input_embeddings(), work.pruned.get_output_embeddings())
        for module in words:
            module.requires_grad_(False)
    torch.manual_seed(work.seed)
    trained = _to_train(settings, handed_over(work.pruned) if wants_shards() else work.pruned)
    with quiet_transformers():
        trainer = _trainer(work, trained, weights, _arguments(work, dtype, size, num_steps), size * length)
        _run(trainer, _last_checkpoint(work.directory / TRAINER_FOLDER))
        _take_back(work, trained, trainer, dtypes)
    work.pruned.requires_grad_(False)
    for name, parameter in work.pruned.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    work.pruned.eval()
    return trainer.state.global_step * size * length


def _run(trainer: Distiller, checkpoint: str | None) -> None:
    """Train on from the checkpoint, if any. Raises CheckpointError if its pickles hold more than tensors."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)  # the Trainer opens pickles with weights_only
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{checkpoint}: is damaged or holds more than tensors, so it is not opened; delete the directory that it "
            "lies in and start again."
        ) from None


def with_lora(model: PreTrainedModel, rank: int) -> nn.Module:
    """Return the model with low-rank additions to every linear but the head, and only these to be trained.

    W + (2 rank / rank) B A, B zero at first: the model is what it was. Source: Hu et al., arXiv 2106.09685.
    Raises RecipeError without peft.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise RecipeError(
            "recover.logits.train: lora needs the package peft; run pip install 'secateur[recover]'."
        ) from None
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    with quiet_transformers():  # peft asks for what transformers deprecates
        return get_peft_model(model, config)


def _to_train(settings: LogitSettings, model: PreTrainedModel) -> nn.Module:
    return with_lora(model, settings.lora_rank) if settings.train == "lora" else model


def _trainer(
    work: Work, trained: nn.Module, weights: dict[str, float], arguments: TrainingArguments, tokens_per_step: int
) -> Distiller:
    listener = Listener(tokens_per_step, work.log, work.progress, work.tell)
    dataset = BlockDataset(work.text.blocks, weights)
    trainer = Distiller(
        model=trained,
        args=arguments,
        data_collator=collate,
        train_dataset=dataset,
        eval_dataset=dataset,
        callbacks=[listener, EarlyStoppingCallback(work.settings.logits.patience)],
    )
    trainer.remove_callback(PrinterCallback)
    # Blocks have equal length, so that a step's loss is the mean over its parts; the Trainer would sum them.
    trainer.model_accepts_loss_kwargs = False
    trainer.settings, trainer.judge = work.settings.logits, work.judge
    teacher: Any = work.teacher
    if trainer.is_fsdp_enabled:
        save_whole(trainer.accelerator)
        text = f"recover: weights were in shards over {arguments.world_size} processes (FSDP)."
        work.log({"event": "note", "text": text})
    if teacher is not None:
        if trainer.is_fsdp_enabled:
            work.judge.keep_head()
            teacher = shard(teacher, trainer.accelerator)
        else:
            teacher = teacher.to(arguments.device)
    trainer.teach = teach_by(teacher, work.settings.logits)
    return trainer


def _arguments(work: Work, dtype: torch.dtype, size: int, num_steps: int) -> TrainingArguments:
    settings = work.settings.logits
    every = -(-num_steps // settings.evaluations)
    arguments = TrainingArguments(
        output_dir=str(work.directory / TRAINER_FOLDER),
        per_device_train_batch_size=min(settings.blocks_per_device, size),
        max_steps=num_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, num_steps // 10),
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=dtype == torch.bfloat16,
        gradient_checkpointing=settings.gradient_checkpointing,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_objective",
        greater_is_better=False,
        report_to=list(settings.report_to) or "none",
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        restore_callback_states_from_checkpoint=True,  # or patience would begin anew
        seed=work.seed,
    )
    if wants_shards():
        let_cpu_shard(arguments)
    in_one_pass = arguments.per_device_train_batch_size * arguments.world_size
    if size % in_one_pass:
        raise RecipeError(
            f"recover.logits.batch_tokens: a step of {size} blocks cannot be shared out over {arguments.world_size} "
            f"processes with {arguments.per_device_train_batch_size} blocks each at a time; make it a multiple of "
            f"{in_one_pass} blocks, or lower blocks_per_device."
        )
    arguments.gradient_accumulation_steps = size // in_one_pass
    return arguments


def _take_back(work: Work, trained: nn.Module, trainer: Distiller, dtypes: dict[str, torch.dtype]) -> None:
    """Give `work.pruned` the trained weights: unwrap it or put its shards together, merge low-rank additions."""
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    if trainer.is_fsdp_enabled:
        whole = _to_train(work.settings.logits, work.pruned)
        places = dict(whole.named_parameters())
        for name, tensor in whole_parameters(trained):
            places[name].data = tensor.to(dtypes.get(name, tensor.dtype))  # additions are merged in float32
        trained = whole
    if trained is not work.pruned:
        merged: Any = trained
        merged.merge_and_unload()
    work.pruned.to("cpu")  # type: ignore[arg-type]  # transformers' wrapper hides its arguments


def _last_checkpoint(directory: Path) -> str | None:
    """Return the last complete checkpoint: the state file is what the Trainer writes last."""
    places = [path.parent for path in directory.glob(f"checkpoint-*/{STATE_FILE}")]
    return str(max(places, key=lambda path: int(path.name.rpartition("-")[2]))) if places else None
