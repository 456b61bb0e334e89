"""The part of a recipe that says how a pruned model is trained to win back what pruning took. Its defaults live here.

In: YAML below the key `recover`. Out: a frozen `RecoverySettings`. Tokens are trained tokens: one that is used twice
counts twice, held-out ones do not count.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

TrainName = Literal["layers", "full", "lora"]
RecoveryWeightingName = Literal["shares", "lost"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LogitSettings(_Strict):
    """The training: the model learns to predict what the dense one predicts.

    kl_share, temperature: s and t of `recover_loss.distillation_loss`. The rest is cross-entropy, which wins back more
    perplexity, while KL keeps what the text does not show; s = 0 is plain fine-tuning, without a teacher.
    train: all weights but embedding and head (`layers`), these too (`full`), or low-rank additions that are merged at
    the end (`lora`; needs secateur[recover]).
    batch_tokens: tokens of one optimizer step, over all processes. blocks_per_device: blocks of one forward pass.
    evaluations: how often the held-out text is asked on the way; the weights of the least held-out loss, of the same
    two parts, stay. patience: after so many without a fall it stops.
    report_to: as transformers' Trainer has it: tensorboard, trackio, wandb, ...
    """

    learning_rate: Positive = 1e-4
    batch_tokens: Count = 512
    blocks_per_device: Count = 2
    kl_share: Share = 0.5
    temperature: Positive = 1.0
    train: TrainName = "layers"
    lora_rank: Count = 16
    gradient_checkpointing: bool = False
    evaluations: Count = 4
    patience: Count = 2
    report_to: tuple[str, ...] = ()


class TaskSettings(_Strict):
    """What is asked of the dense, the pruned and the recovered model at the end: tasks of lm-evaluation-harness.

    `limit`: questions per task; `batch_size`: of the harness's requests.
    """

    tasks: tuple[str, ...] = ()
    limit: Count | None = None
    batch_size: Count = 1


class RecoverySettings(_Strict):
    """Recovery: on how many tokens, how it is judged.

    num_tokens: of all domains together. held_out_blocks: per domain, to judge by. domain_weighting: `shares`, or
    `lost`: each domain's loss counts as its held-out KL before over the mean of all, so that the domains that lost most
    are made up for most.
    evaluation: tasks before and after; they change nothing of the training.
    """

    num_tokens: Count = 300_000
    held_out_blocks: Count = 4
    domain_weighting: RecoveryWeightingName = "shares"
    logits: LogitSettings = LogitSettings()
    evaluation: TaskSettings = TaskSettings()


def recovery_keys(location: list[str]) -> list[str]:
    """Return the keys that may stand at a place below `recover`."""
    parts: dict[str, type[_Strict]] = {"logits": LogitSettings, "evaluation": TaskSettings}
    return list((parts[location[0]] if location else RecoverySettings).model_fields)
