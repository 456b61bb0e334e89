"""The safety net: held-out loss per domain after every round, and the way back to the last round that held.

In: a run. Out: what a round did to each domain, in the run log; the model as it was before the round, if the recipe's
`max_loss_rise` says that it went too far. A single round without limits costs nothing here.
"""

from pathlib import Path

from secateur.arch import decoder_layers
from secateur.errors import RecipeError
from secateur.loss import domain_losses
from secateur.on_disk import LayersOnDisk
from secateur.run import Keeps, Run


class SafetyNet:
    """`dense` and `now`: held-out nats per token by domain; empty where nothing asks for them.

    `now` is of the model as the first round finds it, so without the layers that the recipe's `depth` took.
    """

    def __init__(self, run: Run, directory: Path) -> None:
        self.run = run
        self.limit = run.resolved.recipe.max_loss_rise
        self.now = watched_losses(run, "without layers" if run.dense_losses else "dense")
        self.dense = run.dense_losses or self.now
        self._snapshot = LayersOnDisk(directory, "held")
        self._keeps: Keeps = {}

    def allowed_rise(self) -> dict[str, float]:
        """Return how much each protected domain's loss may still rise, in nats per token.

        allowed = dense (1 + protect) - now. Raises RecipeError if a domain has nothing left.
        """
        allowed: dict[str, float] = {}
        for name, domain in self.run.resolved.recipe.calibration.domains.items():
            if domain.protect is None:
                continue
            allowed[name] = self.dense[name] * (1 + domain.protect) - self.now[name]
            if allowed[name] <= 0:
                raise RecipeError(
                    f"calibration.domains.{name}.protect: its held-out loss has risen from {self.dense[name]:.3f} to "
                    f"{self.now[name]:.3f} nats per token, beyond the {domain.protect:.1%} allowed, with rounds left; "
                    f"remove less or allow more."
                )
        return allowed

    def before_round(self, keeps: Keeps) -> None:
        """Keep the layers and what is left of them, where a way back may be needed."""
        if self.limit is None:
            return
        groups = self.run.resolved.groups
        for index, layer in enumerate(decoder_layers(self.run.model, self.run.arch)):
            self._snapshot.keep(index, layer, [group for group in groups if group.layer == index])
        self._keeps = dict(keeps)

    def holds(self, number: int, keeps: Keeps) -> bool:
        """Measure the round; if the mean loss rose too far, put model and `keeps` back and return False.

        Raises RecipeError if there is no round to go back to.
        """
        if not self.now:
            return True
        self.now = watched_losses(self.run, f"round {number}")
        num_params = sum(parameter.numel() for parameter in self.run.model.parameters())
        rise = _mean(self.now) / _mean(self.dense) - 1
        held = self.limit is None or rise <= self.limit
        line = {"event": "round", "round": number, "num_params": num_params, "nats_per_token": self.now, "held": held}
        self.run.services.log.write(line)
        if held:
            return True
        said = f"max_loss_rise: round {number} raised the mean held-out loss by {rise:.1%} (allowed {self.limit:.1%})"
        if number == 1:
            raise RecipeError(f"{said}, and there is no round before it to go back to; remove less or use more rounds.")
        for index, layer in enumerate(decoder_layers(self.run.model, self.run.arch)):
            self._snapshot.put_back(index, layer)
        keeps.update(self._keeps)
        self.run.services.log.write({"event": "note", "text": f"{said}, so the result is that of round {number - 1}."})
        return False


def watched_losses(run: Run, which: str) -> dict[str, float]:
    """Return held-out nats per token by domain, or nothing if nothing in the recipe asks for them."""
    recipe = run.resolved.recipe
    is_protected = any(domain.protect is not None for domain in recipe.calibration.domains.values())
    if recipe.max_loss_rise is None and not is_protected and recipe.rounds == 1:
        return {}

    def measured() -> dict[str, float]:
        losses = domain_losses(run.model, run.arch, run.held_out, run.services.progress, f"held-out loss, {which}")
        return {name: loss.nats_per_token for name, loss in losses.items()}

    return run.services.store.value(f"held-out {which}", measured)


def _mean(losses: dict[str, float]) -> float:
    return sum(losses.values()) / len(losses)
