"""A run: what the loop and the planning of its rounds work on, and the losses between its rounds."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.data.calibration import CalibrationSet, rotated
from secateur.data.retokenised import retokenised
from secateur.errors import RecipeError
from secateur.facts import Batch, Loss
from secateur.model.bind import Arch
from secateur.model.group import GroupKey
from secateur.model.kept_tokens import Trim, keep_tokens
from secateur.model.modules import CausalLM
from secateur.pruning.resolve import Resolved
from secateur.pruning.trimmed import sample_blocks
from secateur.ranks import own_part
from secateur.store import Services
from secateur.stream.losses import Blocks, domain_losses
from secateur.stream.walk import make_batches

Keeps = dict[GroupKey, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a prune works on, step by step. `text`: the calibration set.

    `weights_on_disk`: finished layers are mapped from files. `after_round`: called with the number
    and kept units of every round, with the model and its config as that round left them.
    `dense_losses`: held-out nats per token by domain before layers went, if something watches them.
    `dense`: the dense model's losses, if its vocabulary is trimmed and something asks for them.
    `dense_tokens`, `judged_tokens`: then the tokens of held-out and of judged blocks in the dense
    tokenizer, in nats per which all losses are. `sample_nats`: see `VocabularyFacts`.
    `kept`: the units that stay, if another result has chosen them.
    """

    model: CausalLM
    arch: Arch
    resolved: Resolved
    text: CalibrationSet
    services: Services = field(default_factory=Services)
    weights_on_disk: bool = False
    after_round: Callable[[int, Keeps], None] | None = None
    dense_losses: dict[str, float] = field(default_factory=dict[str, float])
    dense: dict[str, Loss] = field(default_factory=dict[str, Loss])
    dense_tokens: dict[str, list[int]] | None = None
    judged_tokens: dict[str, list[int]] | None = None
    sample_nats: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    kept: Keeps = field(default_factory=dict[GroupKey, Tensor])

    @property
    def shares(self) -> dict[str, float]:
        """Each domain's share of the calibration tokens."""
        return {domain.name: domain.share for domain in self.text.domains}

    @property
    def held_out(self) -> dict[str, Tensor]:
        """Each domain's held-out blocks, domains x blocks x tokens."""
        return {domain.name: domain.held_out_NT for domain in self.text.domains}

    @property
    def judged(self) -> dict[str, Tensor]:
        """Each domain's blocks that judge the run: those that nothing else looks at, else the held-out ones."""
        return self.text.judged

    def batches(self, number: int) -> list[Batch]:
        """Return this rank's part of the batches of round `number` (from 1), held-out text too."""
        device: torch.device = next(self.model.parameters()).device
        batches: list[Batch] = []
        for domain in rotated(self.text, number - 1).domains:
            batches += make_batches(domain.name, domain.calibration_NT.to(device), held_out=False)
            batches += make_batches(domain.name, domain.held_out_NT.to(device), held_out=True)
        # Whole batches, so that every hidden state equals that of one process bit for bit.
        return own_part(batches)

    def losses(self, which: str) -> dict[str, Loss]:
        """Return held-out losses by domain and log them; none if the recipe asks for none."""
        if not self.resolved.recipe.output.evaluate:
            return {}
        found = self._measured(which, self.judged) if which == "pruned" or not self.dense else self.dense
        for domain, loss in found.items():
            self.services.log.write({"event": "loss", "model": which, "domain": domain, **dataclasses.asdict(loss)})
        return found

    def _measured(self, which: str, blocks: Mapping[str, Blocks]) -> dict[str, Loss]:
        def measured() -> dict[str, Any]:
            facts = (self.model, self.arch, blocks, self.services.progress, f"evaluate {which}", self.judged_tokens)
            return {domain: dataclasses.asdict(loss) for domain, loss in domain_losses(*facts).items()}

        with self.services.log.time("evaluate"):
            found = self.services.store.value(f"evaluate {which}", measured)
        return {domain: Loss(**loss) for domain, loss in found.items()}


def without_tokens(run: Run, trim: Trim) -> Run:
    """Cut the tokens that go out of the model, in place; measure the dense one first if asked."""
    asked = run.resolved.recipe.output.evaluate
    held_out, judged = (retokenised(part, trim.tokenizer, trim.dense_tokenizer) for part in (run.held_out, run.judged))
    run = dataclasses.replace(run, dense_tokens=_predicted(held_out), judged_tokens=_predicted(judged))
    if asked:
        run = dataclasses.replace(run, dense=run._measured("dense", judged))
    dense_losses = watched_losses(run, "dense", held_out)
    # Samples of languages: now, and by the dense model that has the tokens that stay alone.
    before, after = sample_blocks(trim)
    samples = dataclasses.replace(run, judged_tokens=_predicted(before))
    dense = samples._measured("samples", before) if asked else {}
    keep_tokens(run.model, trim.kept)
    cut = samples._measured("samples without tokens", after) if asked else {}
    nats = {name: (dense[name].nats_per_token, cut[name].nats_per_token) for name in dense}
    return dataclasses.replace(run, dense_losses=dense_losses, sample_nats=nats)


def _predicted(blocks: Mapping[str, list[Tensor]]) -> dict[str, list[int]]:
    return {name: [len(ids_T) - 1 for ids_T in domain] for name, domain in blocks.items()}


class LossWatch:
    """`dense` and `now`: held-out nats per token by domain; empty if nothing asks for them.

    `now` starts with the model of the first round, so without the layers that `depth` took.
    """

    def __init__(self, run: Run) -> None:
        """Measure the model as it is."""
        self.run = run
        self.now = watched_losses(run, "without layers" if run.dense_losses else "dense")
        self.dense = run.dense_losses or self.now

    def allowed_rise(self) -> dict[str, float]:
        """Return how much each protected domain's loss may still rise, in nats per token of the model.

        allowed = dense (1 + protect) - now, and after a trim that times dense tokens over tokens.
        Raises RecipeError if a domain has nothing left.
        """
        allowed: dict[str, float] = {}
        for name, domain in self.run.resolved.recipe.calibration.domains.items():
            if domain.protect is None:
                continue
            allowed[name] = self.dense[name] * (1 + domain.protect) - self.now[name]
            if self.run.dense_tokens is not None:
                allowed[name] *= sum(self.run.dense_tokens[name]) / self.run.held_out[name][:, 1:].numel()
            if allowed[name] <= 0:
                raise RecipeError(
                    f"calibration.domains.{name}.protect: its held-out loss has risen from {self.dense[name]:.3f} to "
                    f"{self.now[name]:.3f} nats per token, beyond the {domain.protect:.1%} allowed, with rounds left; "
                    f"remove less or allow more."
                )
        return allowed

    def after_round(self, number: int) -> None:
        """Measure the round and log it, if anything asks for its losses."""
        if not self.now:
            return
        self.now = watched_losses(self.run, f"round {number}")
        num_params = sum(parameter.numel() for parameter in self.run.model.parameters())
        line = {"event": "round", "round": number, "num_params": num_params, "nats_per_token": self.now}
        self.run.services.log.write(line)


def watched_losses(run: Run, which: str, blocks: Mapping[str, Blocks] | None = None) -> dict[str, float]:
    """Return held-out nats per token by domain; none if nothing in the recipe asks for them.

    `blocks`: the held-out ones in other tokens.
    """
    if not _is_watched(run):
        return {}

    def measured() -> dict[str, float]:
        text, stage = run.held_out if blocks is None else blocks, f"held-out loss, {which}"
        found = domain_losses(run.model, run.arch, text, run.services.progress, stage, run.dense_tokens)
        return {name: loss.nats_per_token for name, loss in found.items()}

    return run.services.store.value(f"held-out {which}", measured)


def _is_watched(run: Run) -> bool:
    """Return whether the recipe asks for held-out losses between rounds."""
    recipe = run.resolved.recipe
    is_protected = any(domain.protect is not None for domain in recipe.calibration.domains.values())
    return is_protected or recipe.choose.rounds > 1
