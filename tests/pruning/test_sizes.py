"""Several sizes in one walk: each is what a run of its own would be, to the byte, whatever stops them on the way."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from recipes import grouped

import secateur
from secateur.errors import CheckpointError, RecipeError
from secateur.formats.save import Verification
from tests.pruning.test_resume import Stopped, stopped_after

FILES = ("model.safetensors", "config.json", "keep.json", "recipe.yaml")
POLISH = {"num_tokens": 256, "batch_tokens": 64, "evaluations": 1}
RECIPES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "heads": {"groups": ["ffn", "kv_heads"]},
    "no drift": {"target_mix": 0.0},
    "bias": {"compensate": "bias", "score": "flap"},
    "curve": {"budget": "curve"},
    "polish": {"polish": POLISH, "depth": 0},
    "a layer of the last one": {"depth": None},
}


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """No reload, which other tests are about."""
    with patch("secateur.formats.save.verify_reload", lambda *_: Verification(0.0, "")):
        yield


def weights(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def alone(checkpoints, recipe, tmp_path_factory) -> Callable[[str, float], Path]:
    """Where a run to one size has written."""
    made: dict[tuple[str, float], Path] = {}

    def of(name: str, share: float) -> Path:
        if (name, share) not in made:
            made[name, share] = out = tmp_path_factory.mktemp("alone") / "out"
            secateur.prune(checkpoints["llama"], grouped({**recipe, **RECIPES[name], "remove": share}), out=out)
        return made[name, share]

    return of


@pytest.mark.parametrize("name", RECIPES)
def test_each_size_has_the_bytes_of_a_run_of_its_own(name, checkpoints, recipe, alone, tmp_path):
    asked, out = grouped({**recipe, **RECIPES[name]}), tmp_path / "out"
    results = secateur.prune_sizes(checkpoints["llama"], asked, (0.1, 0.2, 0.35), out=out)
    assert sorted(path.name for path in out.iterdir()) == ["10", "20", "35"]
    for result, share in zip(results, (0.1, 0.2, 0.35), strict=True):
        assert result.out is not None and weights(result.out) == weights(alone(name, share))
        assert (
            result.summary.pruned_losses
            == secateur.prune(
                checkpoints["llama"], grouped({**recipe, **RECIPES[name], "remove": share})
            ).summary.pruned_losses
        )


def test_sizes_that_were_stopped_end_with_the_same_bytes(checkpoints, recipe, alone, tmp_path):
    asked, out, num_stops = grouped({**recipe, **RECIPES["polish"]}), tmp_path / "out", 0
    while not out.exists():
        try:
            with stopped_after(3 + 3 * num_stops):
                secateur.prune_sizes(checkpoints["llama"], asked, (0.1, 0.2), out=out, resume=True)
        except Stopped as stop:
            num_stops += 1
            assert stop.__notes__ and sorted(path.name for path in tmp_path.iterdir()) == [".out.resume"]
    assert num_stops >= 2
    for name, share in (("10", 0.1), ("20", 0.2)):
        assert weights(out / name) == weights(alone("polish", share))
        assert [json.loads(line)["event"] for line in (out / name / "run.jsonl").read_text().splitlines()]


def test_results_side_by_side_are_never_replaced(checkpoints, recipe, tmp_path):
    out, asked = tmp_path / "out", grouped({**recipe, "evaluate": False})
    secateur.prune_sizes(checkpoints["llama"], asked, (0.1, "80K"), out=out)
    assert sorted(path.name for path in out.iterdir()) == ["10", "80K"]
    assert sum(each.numel() for each in secateur.load(out / "80K").parameters()) <= 80_000
    with pytest.raises(CheckpointError, match="already exists"):
        secateur.prune_sizes(checkpoints["llama"], asked, (0.2,), out=out)
    # Whoever wrote them, one result in their place would delete them all.
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"is no result of secateur .* would delete .*10/"):
        secateur.prune_sizes(checkpoints["llama"], asked, (0.2,), out=out, overwrite=True)
    with pytest.raises(CheckpointError, match=r"is no result of secateur .* would delete .*10/"):
        secateur.prune(checkpoints["llama"], asked, out=out, overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("asked", [{"rounds": 2}, {"memory_budget": "1GB"}, {"vocabulary": 640}])
def test_what_needs_a_run_of_its_own_is_refused(asked, checkpoints, recipe, tmp_path):
    with pytest.raises(
        RecipeError, match=r"^remove: several sizes at once go in one round each.*one size at a time\.$"
    ):
        secateur.prune_sizes(checkpoints["llama"], grouped({**recipe, **asked}), (0.1, 0.2), out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
