"""What every rank of test_ranks.py runs, and one process alone too: python ranks_child.py JOBS OUT.

JOBS maps names to a model and a recipe. Of each result the first rank writes weights and facts to OUT, last what the
ranks said of things that they must all say.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from little import leave_out
from recipes import grouped
from safetensors.torch import save_file

import secateur
from secateur import ranks
from secateur.errors import RankError, RecipeError
from secateur.ranks import joined


def facts_of(result: secateur.Result) -> dict[str, Any]:
    """Return what is to be the same in every rank, and how many ranks there are whose weights differ."""
    digest = hashlib.sha256()
    for parameter in result.model.parameters():
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "keeps": {f"{layer}.{group}": keep.tolist() for (layer, group), keep in result.keeps.items()},
        "layers": result.layers,
        "losses": {name: loss.nats_per_token for name, loss in result.summary.pruned_losses.items()},
        "different_models": len(set(ranks.gathered(digest.hexdigest()))),
    }


def refusals() -> dict[str, list[str]]:
    """Return what every rank raises where the first one finds a mistake, and where they do not run the same."""

    def mistaken() -> None:
        raise RecipeError("a mistake")

    said: dict[str, list[str]] = {}
    differ = {"colour": f"of {ranks.rank()}"}
    for name, call in (("first", lambda: ranks.from_first(mistaken)), ("same", lambda: ranks.check_same(differ))):
        try:
            call()
            text = "nothing"
        except (RecipeError, RankError) as error:
            text = str(error)
        said[name] = ranks.gathered(text)
    return said


def main(jobs_file: str, place: str) -> None:
    jobs, out = json.loads(Path(jobs_file).read_text(encoding="utf-8")), Path(place)
    out.mkdir(exist_ok=True)
    for name, job in jobs.items():
        written = out / name if job["write"] and ranks.size() > 1 else None
        recipe = grouped(job["recipe"]) if "recipe" in job else None
        by = {key: job[key] for key in ("like", "from_") if key in job}
        result = secateur.prune(job["model"], recipe, out=written, **by, force=True)
        facts = facts_of(result)
        if ranks.is_first():
            save_file(dict(result.model.state_dict()), out / f"{name}.safetensors")
            (out / f"{name}.json").write_text(json.dumps(facts), encoding="utf-8")
    said = refusals()
    turns = ranks.in_turns(lambda item: (item, ranks.size()), list("abcde"))
    if ranks.is_first():
        (out / "said.json").write_text(json.dumps({**said, "turns": turns}), encoding="utf-8")


if __name__ == "__main__":
    leave_out()
    with joined():
        main(*sys.argv[1:])
