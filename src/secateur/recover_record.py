"""What a recovery did, as plain numbers: `recovery.json`, read back by the report and the command line's table.

In: figures of the training and its judge. Out: a frozen record that goes to JSON and back.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from secateur.json_file import parse_json
from secateur.recover_judge import Verdicts, mean_kl, mean_nats, won_back

FILE_NAME = "recovery.json"


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """Trained tokens, seconds, operations, the held-out verdicts after the training, and whether it was kept."""

    num_tokens: int
    seconds: float
    flops: float
    after: Verdicts
    held: bool


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task, or a difference of two. `error`: its standard error, None where there is none."""

    value: float
    error: float | None


@dataclass(frozen=True, slots=True)
class TaskScores:
    """By task and metric: each model's score, and recovered minus pruned over the same questions.

    `sources`: by task, where its rows came from if not from the hub; `limit`: questions per task, None for all.
    """

    dense: dict[str, dict[str, Score]]
    pruned: dict[str, dict[str, Score]]
    recovered: dict[str, dict[str, Score]]
    gains: dict[str, dict[str, Score]]
    sources: dict[str, str]
    limit: int | None
    lm_eval_version: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RecoveryRecord:
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

    def to_json(self) -> str:
        """Return the record as indented JSON, with the means over domains that people ask for."""
        named = {"dense": self.dense, "before": self.before, "after": self.after}
        means = {name: {"kl": mean_kl(each), "nats_per_token": mean_nats(each)} for name, each in named.items()}
        won = won_back(self.dense, self.before, self.after)
        derived = {
            "means": means,
            "share_won_back": won if won == won else None,
            "num_tokens": self.training.num_tokens,
        }
        return json.dumps({**dataclasses.asdict(self), **derived}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = FILE_NAME) -> "RecoveryRecord":
        """Return the record that `to_json` wrote. Raises CheckpointError, naming `where`, if it did not."""
        return parse_json(cls, text, where)
