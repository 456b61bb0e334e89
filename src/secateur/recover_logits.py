"""The logit stage: the pruned model trained to predict what the dense model predicts.

In: the pruned model, the dense one (or what it said, on disk), blocks of text, a judge, a directory for checkpoints.
Out: the pruned model with the weights whose held-out KL was least. An interrupted stage goes on from the last
checkpoint in its directory and ends with the same weights.
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
from secateur.recover_recipe import LogitSettings
from secateur.recover_sharded import handed_over, let_cpu_shard, save_whole, shard, wants_shards, whole_parameters
from secateur.recover_teacher import TeacherCache
from secateur.recover_text import Block, blocks_per_step
from secateur.recover_trainer import BlockDataset, Distiller, Listener, collate, teach_by

STATE_FILE = "trainer_state.json"


@dataclass(frozen=True, slots=True)
class LogitJob:
    """Everything that the stage works on. `teacher` None: `cache` holds what it said, or the loss needs none."""

    model: PreTrainedModel
    teacher: PreTrainedModel | None
    cache: TeacherCache | None
    blocks: tuple[Block, ...]
    weights: dict[str, float]
    judge: Judge
    settings: LogitSettings
    directory: Path
    seed: int
    log: Callable[[dict[str, Any]], None] = lambda line: None
    progress: Progress = silent
    tell: Callable[[str], None] = lambda text: None


def recover_logits(job: LogitJob) -> int:
    """Train `job.model` in place and return the tokens it was trained on, which are fewer after an early stop.

    Weights are float32 while they are trained; a model in bfloat16 computes in bfloat16 (autocast) and ends in it.
    AdamW without decay, cosine schedule after a tenth of warming up, gradients clipped to norm 1.

    Raises RecipeError if a step cannot be shared out over processes and devices, peft is missing, or FSDP is too old.
    """
    dtypes = {name: parameter.dtype for name, parameter in job.model.named_parameters()}
    dtype, length = job.model.dtype, len(job.blocks[0][1])
    size = blocks_per_step(job.settings.batch_tokens, length)
    num_steps = len(job.blocks) // size
    for parameter in job.model.parameters():  # not .float(): buffers, such as rotary frequencies, stay as they are
        parameter.data = parameter.data.to(torch.float32, copy=True)  # whoever holds the old ones wants them unchanged
    job.model.requires_grad_(True)
    if job.settings.train == "layers":
        # Adam's steps do not shrink with the gradient: they would move words that the text hardly has as far as others.
        words: tuple[Any, ...] = (job.model.get_input_embeddings(), job.model.get_output_embeddings())
        for module in words:
            module.requires_grad_(False)
    torch.manual_seed(job.seed)
    trained = _to_train(job.settings, handed_over(job.model) if wants_shards() else job.model)
    with quiet_transformers():
        trainer = _trainer(job, trained, _arguments(job, dtype, size, num_steps), size * length)
        _run(trainer, _last_checkpoint(job.directory))
        _take_back(job, trained, trainer, dtypes)
    job.model.requires_grad_(False)
    for name, parameter in job.model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    job.model.eval()
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


def _trainer(job: LogitJob, trained: nn.Module, arguments: TrainingArguments, tokens_per_step: int) -> Distiller:
    listener = Listener(tokens_per_step, job.log, job.progress, job.tell)
    dataset = BlockDataset(job.blocks, job.weights, job.cache)
    trainer = Distiller(
        model=trained,
        args=arguments,
        data_collator=collate,
        train_dataset=dataset,
        eval_dataset=dataset,
        callbacks=[listener, EarlyStoppingCallback(job.settings.patience)],
    )
    trainer.remove_callback(PrinterCallback)
    # Blocks have equal length, so that a step's loss is the mean over its parts; the Trainer would sum them.
    trainer.model_accepts_loss_kwargs = False
    trainer.settings, trainer.judge = job.settings, job.judge
    teacher: Any = job.teacher
    if trainer.is_fsdp_enabled:
        save_whole(trainer.accelerator)
        text = f"recover, logits: weights were in shards over {arguments.world_size} processes (FSDP)."
        job.log({"event": "note", "text": text})
    if teacher is not None:
        if trainer.is_fsdp_enabled:
            job.judge.keep_head()
            teacher = shard(teacher, trainer.accelerator)
        else:
            teacher = teacher.to(arguments.device)
    trainer.teach = teach_by(teacher, job.settings)
    return trainer


def _arguments(job: LogitJob, dtype: torch.dtype, size: int, num_steps: int) -> TrainingArguments:
    settings = job.settings
    every = -(-num_steps // settings.evaluations)
    arguments = TrainingArguments(
        output_dir=str(job.directory),
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
        seed=job.seed,
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


def _take_back(job: LogitJob, trained: nn.Module, trainer: Distiller, dtypes: dict[str, torch.dtype]) -> None:
    """Give `job.model` the trained weights: unwrap it or put its shards together, merge low-rank additions."""
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    if trainer.is_fsdp_enabled:
        whole = _to_train(job.settings, job.model)
        places = dict(whole.named_parameters())
        for name, tensor in whole_parameters(trained):
            places[name].data = tensor.to(dtypes.get(name, tensor.dtype))  # additions are merged in float32
        trained = whole
    if trained is not job.model:
        merged: Any = trained
        merged.merge_and_unload()
    job.model.to("cpu")  # type: ignore[arg-type]  # transformers' wrapper hides its arguments


def _last_checkpoint(directory: Path) -> str | None:
    """Return the last complete checkpoint: the state file is what the Trainer writes last."""
    places = [path.parent for path in directory.glob(f"checkpoint-*/{STATE_FILE}")]
    return str(max(places, key=lambda path: int(path.name.rpartition("-")[2]))) if places else None
