"""A run: what the loop and the planning of its rounds work on, and the losses between its
rounds.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from secateur.data.blocks import Blocks, LearningText, Text
from secateur.errors import CheckpointError, RecipeError
from secateur.facts import Loss, PerDomain
from secateur.methods.budget import Profiles
from secateur.model.bind import Arch
from secateur.model.group import OF_EXPERTS
from secateur.model.stock import CausalLM
from secateur.pruning.resolve import Resolved
from secateur.ranks import own_part
from secateur.store import Services, Store
from secateur.stream.losses import domain_losses, predicted_tokens
from secateur.stream.statistics import BY_DOMAIN, Statistics
from secateur.stream.walk import Batch, Walk, make_batches
from secateur.vocabulary.kept import Trim

# By domain, the losses before and behind a trim.
LossPairs = dict[str, tuple[Loss, Loss]]


def keep_statistics(into: dict[str, Tensor], pooled: Statistics, energies: PerDomain) -> PerDomain:
    """Put statistics into a step's tensors, for `Supports`; return the energies."""
    into |= {f"sums-{place}": part for place, part in enumerate(pooled.sums)}
    into["mass"] = torch.tensor(pooled.mass, dtype=torch.float64)
    return energies


@dataclass(frozen=True, slots=True)
class Supports:
    """A few cuts of a model with their statistics; those of a cut between two are a mixture of
    both.

    `stores`: of their steps, by the share of all parameters that each takes, ascending. `units`:
    the share that all units are.
    """

    stores: dict[float, Store]
    units: float

    def mix(self, step: str, removed: float, pooled: Statistics, energies: PerDomain) -> PerDomain:
        """Make the empty `pooled` and energies those of a cut that takes the share `removed`;
        return the energies.

        S = (1 - a^2) S_k + a^2 S_k+1, with a = (x - x_k) / (x_k+1 - x_k) and x = -ln(1 - removed /
        units), and those of the nearest outside of all: what less was cut away from says more.
        `step`: the group's. Raises CheckpointError if a store lacks it.
        """
        *measured, now = -np.log1p(-np.array([*self.stores, removed]) / self.units)
        nearest = float(np.interp(now, measured, range(len(measured))))
        part = (nearest % 1) ** 2
        for store, weight in zip(
            [*self.stores.values()][int(nearest) :], (1 - part, part), strict=False
        ):
            kept = store.find(step)
            if kept is None:
                raise CheckpointError(f"{store.label}: lacks {step}; measure again.")
            tensors, line = kept
            for number, mine in enumerate(pooled.sums):
                mine.add_(tensors[f"sums-{number}"].to(mine.device), alpha=weight)
            pooled.mass += weight * float(tensors["mass"])
            for name, energy in line["output_energy"].items():
                energies[name] = energies.get(name, 0.0) + weight * energy
        return energies


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a prune works on, step by step. `text`: what it may learn by; what judges it is
    elsewhere.

    `trim`: what goes of the vocabulary. `on_host`: has the model in host memory inside the context.
    `weights_on_disk`: finished layers are mapped from files. `dense_losses`: held-out nats per
    token by domain before layers went, if they are known. `dense_tokens`: those predicted
    of each held-out document in the dense tokenizer, in nats per which losses are, if the
    vocabulary is trimmed. `trimmed`: losses before and behind the trim alone. `after_dense`: called
    with the first round's walk when its dense stream has left the last layer. `profiles`: of the
    groups, if known. `measured`: the name of the measurement that says what it needs. `supports`:
    whose statistics stand for its own, so that it needs no calibration text. `keeps_statistics`:
    beside each finished step, to be mixed.
    """

    model: CausalLM
    arch: Arch
    resolved: Resolved
    text: LearningText
    services: Services
    trim: Trim | None = None
    on_host: Callable[[], AbstractContextManager[None]] = nullcontext
    weights_on_disk: bool = False
    dense_losses: PerDomain = field(default_factory=PerDomain)
    dense_tokens: dict[str, dict[int, int]] | None = None
    trimmed: LossPairs = field(default_factory=LossPairs)
    after_dense: Callable[[Walk], None] | None = None
    profiles: Profiles | None = None
    measured: str | None = None
    supports: Supports | None = None
    keeps_statistics: bool = False

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    @property
    def shares(self) -> PerDomain:
        """Each domain's share of the calibration tokens."""
        return {domain.name: domain.share for domain in self.text.domains}

    @property
    def held_out(self) -> dict[str, Blocks]:
        """Each domain's held-out blocks, domains x blocks x tokens."""
        return self.text.held_out

    @property
    def num_predicted(self) -> dict[str, tuple[int, int]]:
        """The predicted tokens of each domain's held-out text, in the dense tokenizer and, if it
        was trimmed, now.
        """
        now = predicted_tokens(self.held_out)
        dense = self.dense_tokens or now
        return {
            name: (sum(dense[name].values()), sum(counts.values())) for name, counts in now.items()
        }

    def batches(self) -> list[Batch]:
        """Return this rank's part of the batches of a round, held-out text too; that alone if it
        has supports.
        """
        batches: list[Batch] = []
        for domain in self.text.domains:
            for blocks, held_out in ((domain.calibration, False), (domain.held_out, True)):
                if held_out or self.supports is None:
                    ids_NT = blocks.ids_NT.to(self.device)
                    batches += make_batches(
                        domain.name, ids_NT, held_out=held_out, counted_NT=blocks.counted_NT
                    )
        # Whole batches, so that every hidden state equals that of one process bit for bit.
        return own_part(batches)

    @property
    def can_mix(self) -> bool:
        """Whether other cuts' statistics can stand for its own: no experts go, and no cut decides
        how domains count.
        """
        kinds = {group.kind for group in self.resolved.groups}
        return not (kinds & OF_EXPERTS or self.resolved.recipe.choose.domain_weighting in BY_DOMAIN)


def text_losses(run: Run, which: str, text: Mapping[str, Text]) -> dict[str, Loss]:
    """Return the losses of the run's model on held-out text by domain, kept in the run's store."""
    stage = f"evaluate {which}"
    losses = partial(
        domain_losses, run.model, run.arch, text, run.services.progress, stage, run.dense_tokens
    )
    with run.services.log.time("evaluate"):
        return run.services.store.value(stage, losses, kind=dict[str, Loss])


class LossWatch:
    """`dense` and `now`: held-out nats per token by domain; empty if nothing asks for them.

    `now` starts with the model of the first round, so without the layers that `depth` took.
    """

    def __init__(self, run: Run) -> None:
        """Measure the model as it is."""
        self.run = run
        self.now = watched_losses(run, "without layers" if run.dense_losses else "dense")
        self.dense = run.dense_losses or self.now

    def allowed_rise(self) -> PerDomain:
        """Return how much each protected domain's loss may still rise, in nats per token of the
        model.

        allowed = dense (1 + protect) - now, and after a trim that times dense tokens over tokens.
        Raises RecipeError if a domain has nothing left.
        """
        allowed = PerDomain()
        for name, domain in self.run.resolved.recipe.calibration.domains.items():
            if domain.protect is None:
                continue
            allowed[name] = self.dense[name] * (1 + domain.protect) - self.now[name]
            dense, own = self.run.num_predicted[name]
            allowed[name] *= dense / own
            if allowed[name] <= 0:
                raise RecipeError(
                    f"calibration.domains.{name}.protect: its held-out loss has risen from "
                    f"{self.dense[name]:.3f} to {self.now[name]:.3f} nats per token, beyond the "
                    f"{domain.protect:.1%} allowed, with rounds left; remove less or allow more."
                )
        return allowed

    def after_round(self, number: int) -> None:
        """Measure the round and log it, if anything asks for its losses."""
        if not self.now:
            return
        self.now = watched_losses(self.run, f"round {number}")
        self.run.services.log.write(
            {
                "event": "round",
                "round": number,
                "num_params": self.run.model.num_parameters(),
                "nats_per_token": self.now,
            }
        )


def watched_losses(run: Run, which: str) -> PerDomain:
    """Return held-out nats per token by domain; none if nothing in the recipe asks for them."""
    recipe = run.resolved.recipe
    is_protected = any(domain.protect is not None for domain in recipe.calibration.domains.values())
    if not is_protected and recipe.choose.rounds == 1:
        return {}
    losses = text_losses(run, f"held-out text, {which}", run.held_out)
    return {name: loss.nats_per_token for name, loss in losses.items()}
