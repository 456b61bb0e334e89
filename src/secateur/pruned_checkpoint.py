"""What a run writes of its model: the checkpoint, the resolved recipe, which units stayed; of every round if asked.

In: the pruned model, the recipe, the keeps, an existing directory. Out: files. Nothing is measured here.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.output import save_checkpoint
from secateur.recipe import Recipe, dump_recipe
from secateur.run import Keeps

ROUNDS = "rounds"


@dataclass(frozen=True, slots=True)
class PrunedCheckpoint:
    """`carry_from`: the dense checkpoint's directory, whose side files come along; None for a model in memory.

    `layers`: the dense model's layers that stayed. In keep.json, where any went, they are the first entry, group
    `layers`; the other entries number layers as the result does, so that number n there is the n-th of these.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    directory: Path
    carry_from: Path | None
    layers: tuple[int, ...]

    def save(self, keeps: Keeps) -> None:
        """Write the result into the directory itself."""
        self._write(keeps, self.directory)

    def save_round(self, number: int, keeps: Keeps) -> None:
        """Write what a round has left under `rounds/NUMBER`; the last round's place is the directory itself."""
        if number == self.recipe.rounds:
            return
        place = self.directory / ROUNDS / str(number)
        place.mkdir(parents=True)
        self._write(keeps, place)

    def _write(self, keeps: Keeps, place: Path) -> None:
        shard_size = self.recipe.max_shard_size
        save_checkpoint(self.model, self.tokenizer, place, max_shard_size=shard_size, carry_from=self.carry_from)
        (place / "recipe.yaml").write_text(dump_recipe(self.recipe), encoding="utf-8")
        layers = [{"group": "layers", "keep": self.layers}] if self.recipe.depth else []
        kept = [{"layer": layer, "group": group, "keep": keep.tolist()} for (layer, group), keep in keeps.items()]
        (place / "keep.json").write_text(json.dumps([*layers, *kept]) + "\n", encoding="utf-8")
