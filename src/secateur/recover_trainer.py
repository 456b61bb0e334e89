"""transformers' Trainer, told to distil: our loss, our held-out text, and a listener that writes the run log.

In: a model, blocks with weights, what the teacher says of them, a judge. Out: a Trainer. All else is the Trainer's own:
accumulation, clipping, schedule, mixed precision, devices and processes, checkpoints, `report_to`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.progress import Progress
from secateur.recover_judge import Judge, objective
from secateur.recover_loss import distillation_loss, teacher_log_p
from secateur.recover_recipe import LogitSettings
from secateur.recover_record import Verdicts, mean_kl
from secateur.recover_text import Block

STAGE = "recover"

# From the ids of a batch to the teacher's log probabilities.
Teach = Callable[[Tensor], Tensor]


class BlockDataset(Dataset[dict[str, Tensor]]):
    """Blocks in the order of use, each with its domain's weight."""

    def __init__(self, blocks: Sequence[Block], weights: dict[str, float]) -> None:
        self.blocks, self.weights = blocks, weights

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        domain, ids_T = self.blocks[number]
        return {"input_ids": ids_T, "weight": torch.tensor(self.weights[domain])}


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack the items of a batch."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


class Distiller(Trainer):
    """Trains on `distillation_loss` and evaluates by the judge. `teach` None: there is no teacher."""

    settings: LogitSettings
    judge: Judge
    teach: Teach | None
    last_verdicts: Verdicts

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        ids_BT = inputs["input_ids"]
        log_p_PV = None if self.teach is None else self.teach(ids_BT)
        logits_PV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
        weight_P = inputs["weight"].repeat_interleave(ids_BT.shape[1] - 1)
        return distillation_loss(
            logits_PV,
            ids_BT[:, 1:].flatten(),
            log_p_PV,
            weight_P,
            temperature=self.settings.temperature,
            kl_share=self.settings.kl_share,
        )

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        model: Any = self.model_wrapped
        model.eval()
        self.last_verdicts = self.judge.verdicts(
            lambda ids_BT: model(input_ids=ids_BT.to(self.args.device), use_cache=False).logits
        )
        metrics = {f"eval_kl_{domain}": verdict.kl for domain, verdict in self.last_verdicts.items()}
        metrics["eval_kl"] = mean_kl(self.last_verdicts)
        metrics["eval_objective"] = objective(self.last_verdicts, self.settings.kl_share)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@dataclass
class Listener(TrainerCallback):
    """Writes losses and held-out KL to the run log, moves the progress, and asks for a last evaluation at the end.

    `tell`: gets a line of text at every evaluation.
    """

    tokens_per_step: int
    log: Callable[[dict[str, Any]], None]
    progress: Progress
    tell: Callable[[str], None]
    started: float = 0.0
    first_step: int = 0
    loss: float = float("nan")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started, self.first_step = time.perf_counter(), state.global_step
        self.progress(STAGE, state.global_step * self.tokens_per_step, state.max_steps * self.tokens_per_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress(STAGE, state.global_step * self.tokens_per_step, state.max_steps * self.tokens_per_step)
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            self.loss = logs["loss"]
            line = {"loss": logs["loss"], "learning_rate": logs["learning_rate"]}
            self.log({"event": "recover_step", **self._place(state), **line})

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        metrics = kwargs["metrics"]
        by_domain = {name.removeprefix("eval_kl_"): kl for name, kl in metrics.items() if name.startswith("eval_kl_")}
        place = self._place(state)
        self.log({"event": "recover_kl", **place, "kl": by_domain})
        left = (state.max_steps - state.global_step) * self.tokens_per_step / max(place["tokens_per_second"], 1e-9)
        domains = ", ".join(f"{domain} {kl:.3f}" for domain, kl in by_domain.items())
        self.tell(
            f"step {state.global_step} of {state.max_steps}: loss {self.loss:.3f}, {place['tokens_per_second']:,.0f} "
            f"tokens/s, held-out KL {metrics['eval_kl']:.4f} ({domains}), {left / 60:,.1f} min left"
        )

    def _place(self, state: TrainerState) -> dict[str, Any]:
        num_steps = state.global_step - self.first_step
        rate = num_steps * self.tokens_per_step / (time.perf_counter() - self.started)
        num_tokens = state.global_step * self.tokens_per_step
        return {"step": state.global_step, "tokens": num_tokens, "tokens_per_second": round(rate, 1)}


def teach_by(teacher: nn.Module | None, settings: LogitSettings) -> Teach | None:
    """Return the teacher as a function of ids, None without one."""
    if teacher is None:
        return None
    return lambda ids_BT: teacher_log_p(teacher, ids_BT, settings.temperature)
