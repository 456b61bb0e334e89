"""The part of a recipe that says how a pruned model is trained to win back what pruning took. Its defaults live here.

In: YAML below the key `recover`. Out: a frozen `RecoverySettings`. Tokens are trained tokens: one that is used twice
counts twice, held-out ones do not count.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

StageName = Literal["blocks", "logits"]
TrainName = Literal["layers", "full", "lora"]
RecoveryWeightingName = Literal["shares", "lost"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BlockSettings(_Strict):
    """Block-wise stage: every layer trained to give what the dense layers in its place give.

    dense_stream: how much of the target is the dense layers' output on the dense stream; the rest on the pruned one.
    batch_tokens: tokens of one step. epochs: how often the stage's text is used.
    """

    learning_rate: Positive = 5e-4
    batch_tokens: Count = 1024
    epochs: Count = 1
    dense_stream: Share = 0.5


class LogitSettings(_Strict):
    """Logit stage: the model trained to predict what the dense one predicts.

    kl_share, temperature: s and t of `recover_loss.distillation_loss`. The rest is cross-entropy, which wins back more
    perplexity, while KL keeps what the text does not show; s = 0 is plain fine-tuning, without a teacher.
    top_words: of the teacher only the likeliest words and one outcome for all others; None: all words.
    cache: write the teacher's `top_words` to disk first, so that it need not be in memory beside the pruned model.
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
    top_words: Count | None = None
    cache: bool = False
    train: TrainName = "layers"
    lora_rank: Count = 16
    gradient_checkpointing: bool = False
    evaluations: Count = 4
    patience: Count = 2
    report_to: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _cache_needs_top_words(self) -> "LogitSettings":
        if self.cache and self.top_words is None:
            raise ValueError("cache keeps only the teacher's likeliest words, so say how many with top_words: 64")
        return self


class TaskSettings(_Strict):
    """What is asked of the dense, the pruned and the recovered model at the end: tasks of lm-evaluation-harness.

    `limit`: questions per task; `batch_size`: of the harness's requests.
    """

    tasks: tuple[str, ...] = ()
    limit: Count | None = None
    batch_size: Count = 1


class RecoverySettings(_Strict):
    """Recovery: which stages, on how many tokens.

    num_tokens: of all stages and domains together. blocks_share: of them for the block-wise stage, if there are two; it
    is for models that cannot be trained whole, since tokens win more in the logit stage.
    held_out_blocks: per domain, to judge every stage. domain_weighting: `shares`, or `lost`: each domain's loss counts
    as its held-out KL before over the mean of all, so that the domains that lost most are made up for most.
    evaluation: tasks before and after; they change nothing of the training.
    """

    num_tokens: Count = 300_000
    stages: Annotated[tuple[StageName, ...], Field(min_length=1)] = ("logits",)
    blocks_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    held_out_blocks: Count = 4
    domain_weighting: RecoveryWeightingName = "shares"
    blocks: BlockSettings = BlockSettings()
    logits: LogitSettings = LogitSettings()
    evaluation: TaskSettings = TaskSettings()

    @model_validator(mode="after")
    def _stages_once_and_in_order(self) -> "RecoverySettings":
        if self.stages not in (("blocks",), ("logits",), ("blocks", "logits")):
            raise ValueError("stages must be [blocks], [logits] or [blocks, logits]")
        return self

    def tokens_of(self, stage: StageName) -> int:
        """Return the tokens that the stage may use; none if it does not run."""
        if stage not in self.stages:
            return 0
        if len(self.stages) == 1:
            return self.num_tokens
        blocks = round(self.blocks_share * self.num_tokens)
        return blocks if stage == "blocks" else self.num_tokens - blocks
