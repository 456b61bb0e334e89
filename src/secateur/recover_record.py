"""What a recovery did, as plain numbers: `recovery.json`, read back by the report and the command line's table.

In: figures of the training and its judge. Out: a frozen record that goes to JSON and back, and its cost beforehand.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from secateur.json_file import Record
from secateur.measured import Scores

RECOVERY_FILE = "recovery.json"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one domain: KL(dense || model) and its error over blocks, nats per token, agreement on the likeliest word."""

    kl: float
    standard_error: float
    nats_per_token: float
    top1_agreement: float
    num_tokens: int


Verdicts = dict[str, Verdict]


def mean_kl(verdicts: Verdicts) -> float:
    """Return the mean over domains of the KL, in nats per token: every domain counts the same."""
    return sum(verdict.kl for verdict in verdicts.values()) / len(verdicts)


def mean_nats(verdicts: Verdicts) -> float:
    """Return the mean over domains of nats per token: the logarithm of the geometric-mean perplexity."""
    return sum(verdict.nats_per_token for verdict in verdicts.values()) / len(verdicts)


def won_back(dense: Verdicts, before: Verdicts, after: Verdicts) -> float:
    """Return the share of the lost nats per token that was won back; NaN if nothing was lost."""
    lost = mean_nats(before) - mean_nats(dense)
    return (mean_nats(before) - mean_nats(after)) / lost if lost > 0 else math.nan


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """Trained tokens, seconds, operations, the held-out verdicts after the training, and whether it was kept."""

    num_tokens: int
    seconds: float
    flops: float
    after: Verdicts
    held: bool


@dataclass(frozen=True, slots=True)
class TaskScores:
    """By task and metric: each model's score, and recovered minus pruned over the same questions.

    `sources`: by task, where its rows came from if not from the hub; `limit`: questions per task, None for all.
    """

    dense: Scores
    pruned: Scores
    recovered: Scores
    gains: Scores
    sources: dict[str, str]
    limit: int | None
    lm_eval_version: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RecoveryRecord(Record):
    """Everything a recovery says of itself. `before`: of the pruned model as it came; KL is to the dense model.

    `calibration`, `settings`: the domains and the recipe's part on recovery that were used.

    `num_held_out_tokens` are judged on and never trained on. `seconds`: of everything, by this process. `tasks`: of the
    model that was written, None where none were asked.
    """

    pruned: str
    teacher: str
    command: str
    calibration: dict[str, Any]
    settings: dict[str, Any]
    seed: int
    content_hash: str
    sequence_length: int
    num_held_out_tokens: int
    dense: Verdicts
    before: Verdicts
    training: TrainingRecord
    seconds: dict[str, float]
    judge_flops: float
    peak_bytes: int
    reload_max_abs_difference: float
    notes: tuple[str, ...]
    versions: dict[str, str]
    tasks: TaskScores | None = None

    @property
    def after(self) -> Verdicts:
        """The verdicts of the model that was written."""
        return self.training.after if self.training.held else self.before

    def plain(self) -> dict[str, Any]:
        """Return the fields as a mapping, with the means over domains that people ask for."""
        named = {"dense": self.dense, "before": self.before, "after": self.after}
        means = {name: {"kl": mean_kl(each), "nats_per_token": mean_nats(each)} for name, each in named.items()}
        won = won_back(self.dense, self.before, self.after)
        derived = {
            "means": means,
            "share_won_back": won if won == won else None,
            "num_tokens": self.training.num_tokens,
        }
        return {**dataclasses.asdict(self), **derived}


@dataclass(frozen=True, slots=True)
class Cost(Record):
    """`num_tokens`: trained on. `flops`, `seconds`: of `training` and of `judge`, the held-out evaluations. Bytes."""

    num_tokens: int
    num_held_out_tokens: int
    flops: dict[str, float]
    peak_bytes: int
    scratch_bytes: int
    seconds: dict[str, float]
