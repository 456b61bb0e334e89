"""Several sizes in one walk: each is what a run of its own would be, to the byte, whatever stops them on the way."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from models import saved, tiny_llama
from recipes import grouped
from stops import Stopped, lines_of, stopped_after, stopped_again_and_again, weights
from tiny_tokenizer import tiny_tokenizer

import secateur
from secateur.errors import CheckpointError, RecipeError
from secateur.pruning.group_step import prune_group
from secateur.pruning.sizes import NEAR, steps_between
from secateur.report.records import Summary, nats_at, read_summary

POLISH = {"num_tokens": 256, "batch_tokens": 64}
RECIPES: dict[str, dict[str, Any]] = {
    "a bare curve of heads": {"groups": ["ffn", "kv_heads"], "budget": "curve", "compensate": "none", "score": "flap"},
    "polish": {"polish": POLISH, "depth": 0},
    "a layer of the last one": {"depth": None},
}


pytestmark = pytest.mark.usefixtures("unproved")


@pytest.fixture(scope="module")
def alone(checkpoints, recipe, tmp_path_factory) -> Callable[[str, float], Path]:
    """Where a run to one size has written."""

    @cache
    def of(name: str, share: float) -> Path:
        out = tmp_path_factory.mktemp("alone") / "out"
        secateur.prune(checkpoints["llama"], grouped({**recipe, **RECIPES[name], "remove": share}), out=out)
        return out

    return of


def test_sizes_that_are_finished_serve_a_run_with_other_sizes(checkpoints, recipe, alone, tmp_path):
    asked, out = grouped({**recipe, **RECIPES["polish"]}), tmp_path / "out"
    with pytest.raises(Stopped), stopped_after(14):
        secateur.prune_sizes(checkpoints["llama"], asked, (0.1, 0.2), out=out)
    with patch("secateur.pruning.loop.prune_group", wraps=prune_group) as steps:
        secateur.prune_sizes(checkpoints["llama"], asked, (0.2, 0.35), out=out)
    assert sorted(path.name for path in out.iterdir()) == ["20", "35"]
    for share in (0.2, 0.35):
        assert weights(out / f"{100 * share:.0f}") == weights(alone("polish", share))
    assert steps.call_count == 3, "the groups of the size that was not there"


def test_every_size_needs_its_own_room_on_the_disk(checkpoints, recipe, tmp_path):
    with patch("secateur.store.check_free_space", side_effect=Stopped) as checked:
        with pytest.raises(Stopped):
            secateur.prune(checkpoints["llama"], grouped(recipe), out=tmp_path / "one")
        with pytest.raises(Stopped):
            secateur.prune_sizes(checkpoints["llama"], grouped(recipe), (0.1, 0.2), out=tmp_path / "two")
    one, two = (call.args[1] for call in checked.call_args_list)
    assert two == 2 * one


@pytest.mark.parametrize("name", RECIPES)
def test_each_size_has_the_bytes_of_a_run_of_its_own(name, checkpoints, recipe, alone, tmp_path):
    asked, out = grouped({**recipe, **RECIPES[name]}), tmp_path / "out"
    results = secateur.prune_sizes(checkpoints["llama"], asked, (0.2, 0.35), out=out)
    assert sorted(path.name for path in out.iterdir()) == ["20", "35"]
    for result, share in zip(results, (0.2, 0.35), strict=True):
        assert result.out is not None and weights(result.out) == weights(alone(name, share))
        assert result.summary.pruned_losses == read_summary(alone(name, share)).pruned_losses


def test_sizes_that_were_stopped_end_with_the_same_bytes(checkpoints, recipe, alone, tmp_path):
    asked, out = grouped({**recipe, **RECIPES["polish"]}), tmp_path / "out"
    run = partial(secateur.prune_sizes, checkpoints["llama"], asked, (0.2, 0.35), out=out)
    stopped_again_and_again(run, out, first=4, more=6)
    for name, share in (("20", 0.2), ("35", 0.35)):
        assert weights(out / name) == weights(alone("polish", share))
        assert lines_of(out / name)


def test_results_side_by_side_are_never_replaced(checkpoints, recipe, tmp_path):
    out, asked = tmp_path / "out", grouped({**recipe, "evaluate": False})
    secateur.prune_sizes(checkpoints["llama"], asked, (0.1, "80K"), out=out)
    assert sorted(path.name for path in out.iterdir()) == ["10", "80K"]
    assert sum(each.numel() for each in secateur.load(out / "80K").parameters()) <= 80_000
    with pytest.raises(CheckpointError, match="already exists"):
        secateur.prune_sizes(checkpoints["llama"], asked, (0.2,), out=out)
    # Whoever wrote them, one result in their place would delete them all.
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for prune in (secateur.prune, partial(secateur.prune_sizes, sizes=(0.2,))):
        with pytest.raises(CheckpointError, match=r"is no result of secateur .* would delete .*10/"):
            prune(checkpoints["llama"], recipe=asked, out=out, overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


OWN_RUN = r"^remove: several sizes, or a limit on the loss, go in one round each.*one size at a time\.$"


@pytest.mark.parametrize("asked", [{"rounds": 2}, {"memory_budget": "1GB"}, {"vocabulary": 640}])
def test_what_needs_a_run_of_its_own_is_refused(asked, checkpoints, recipe, tmp_path):
    with pytest.raises(RecipeError, match=OWN_RUN):
        secateur.prune_sizes(checkpoints["llama"], grouped({**recipe, **asked}), (0.1, 0.2), out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def taught(checkpoints, texts, tmp_path_factory) -> Path:
    """A model that knows its text, so that each step of the widths costs something."""
    place, tokenizer, model = tmp_path_factory.mktemp("taught"), tiny_tokenizer(), tiny_llama()
    ids = torch.tensor(tokenizer(texts["prose"].read_text(encoding="utf-8"))["input_ids"])
    ids_NT = ids[: len(ids) // 32 * 32].view(-1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(200):
        batch_BT = ids_NT[16 * step % (len(ids_NT) - 16) :][:16]
        model(input_ids=batch_BT, labels=batch_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return saved(place, model)


@pytest.fixture(scope="module")
def by_prose(recipe, texts) -> dict[str, Any]:
    domains = {"prose": {"files": [str(texts["prose"])]}}
    return grouped({**recipe, "calibration": {**recipe["calibration"], "domains": domains}})


@pytest.fixture(scope="module")
def prose(taught, by_prose, tmp_path_factory) -> Path:
    """What sizes of it cost."""
    out = tmp_path_factory.mktemp("measured") / "out"
    secateur.measure(taught, by_prose, out=out)
    return out


@pytest.fixture(scope="module")
def cut_to(taught, prose, tmp_path_factory) -> Callable[..., tuple[Path, float]]:
    """Where a run to one size has written, and what that loses; by what was measured, or a recipe of its own."""

    def of(share: float, recipe: Any = None) -> tuple[Path, float]:
        out = tmp_path_factory.mktemp("cut") / "out"
        by = {"from_": prose} if recipe is None else {}
        remove = {**(recipe or {}).get("remove", {}), "share": share, "depth": 0}
        asked = {**(recipe or {}), "remove": remove, "polish": False}
        made = secateur.prune(taught, asked, out=out, **by)
        dense, pruned = made.summary.dense_losses["prose"], made.summary.pruned_losses["prose"]
        return out, pruned.nats_per_token - dense.nats_per_token

    return of


def cuts(summary: Summary) -> list[str]:
    return [note for note in summary.warnings if note.startswith("max_loss: ")]


STEP = 8 * 3 * 48 * 3 / 100_176  # eight channels of each of three layers


@pytest.mark.parametrize(("limit", "foretold"), [(0.03, 1.0), (0.2, 0.3), (0.1, 3.0)])
def test_as_much_goes_as_loses_no_more_than_is_allowed(limit, foretold, taught, prose, cut_to, tmp_path):
    """Whether the curve is right or wrong by a factor: a step more would lose too much."""
    out = tmp_path / "out"
    with patch("secateur.pruning.sizes.nats_at", lambda *asked: foretold * nats_at(*asked)):
        made = secateur.prune(taught, {"polish": False}, from_=prose, out=out, max_loss=limit)
    alone, lost = cut_to(made.summary.remove_asked)
    assert weights(out) == weights(alone)
    # A cut that is near the limit ends the search.
    assert NEAR * limit <= lost <= limit or lost <= limit < cut_to(made.summary.remove_asked + STEP)[1]
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in alone.iterdir())
    told = "".join(cuts(made.summary))
    assert 1 <= len(cuts(made.summary)) <= 3
    assert f"loses {lost:.3f} nats per token of held-out text (prose), of {limit:g} that it may" in told


def test_a_limit_needs_no_measurement(taught, by_prose, cut_to, tmp_path):
    """The first size is a guess then, and the next ones are by what the one before has lost."""
    limit, out = 0.2, tmp_path / "out"
    made = secateur.prune(taught, by_prose, out=out, max_loss=limit)
    alone, lost = cut_to(made.summary.remove_asked, by_prose)
    assert weights(out) == weights(alone) and lost <= limit
    assert 1 <= len(cuts(made.summary)) <= 3 and f"loses {lost:.3f} nats" in "".join(cuts(made.summary))
    # Some cut was beyond the limit, or near it, and of those within the largest is written.
    tried = [float(note.split(" loses ")[1].split()[0]) for note in cuts(made.summary)]
    assert max(tried) > 0.9 * limit and f"{max(each for each in tried if each <= limit):.3f}" == f"{lost:.3f}"
    with pytest.raises(RecipeError, match=r"of 0\.0001 that it may; allow more, or polish with more tokens"):
        secateur.prune(taught, by_prose, out=tmp_path / "none", max_loss=1e-4)


def test_a_limit_is_on_what_a_polished_result_has_lost_however_often_it_was_stopped(taught, prose, tmp_path):
    asked, out = {"polish": {**POLISH, "learning_rate": 1e-3}}, tmp_path / "out"
    whole = secateur.prune(taught, asked, from_=prose, out=tmp_path / "whole", max_loss=0.2)
    run = partial(secateur.prune, taught, asked, from_=prose, out=out, max_loss=0.2)
    stopped_again_and_again(run, out, first=4, more=3)
    assert weights(out) == weights(tmp_path / "whole")
    assert cuts(read_summary(out)) == cuts(whole.summary)
    assert whole.summary.polish is not None
    dense, pruned = whole.summary.dense_losses["prose"], whole.summary.pruned_losses["prose"]
    lost = pruned.nats_per_token - dense.nats_per_token
    before = whole.summary.polish.before["prose"].nats_per_token - dense.nats_per_token
    assert f"{before:.3f}" != f"{lost:.3f}" and f"loses {lost:.3f} nats" in "".join(cuts(whole.summary))


@pytest.mark.parametrize(
    ("fits", "fails", "limit", "steps"),
    [
        ((2, 0.1), (8, 1.6), 0.4, 4),  # nats that grow with the square of the steps
        ((2, 0.1), (8, 1.6), 0.1, 2),
        ((2, 1e-9), (8, 1e-3), 5e-4, 5),  # neither loss is told from noise, and ln 1 = 0
        ((2, 1e-9), (8, 5e-4), 3e-4, 5),
    ],
)
def test_the_next_cut_is_where_a_power_law_reaches_the_limit(fits, fails, limit, steps):
    assert steps_between(fits, fails, limit) == steps


@pytest.mark.parametrize(
    ("changes", "asked", "said"),
    [
        ({"remove": 0.2}, {}, r"^max_loss: goes over all sizes .*; leave out remove.share, to, layers and depth.$"),
        ({"remove": {"to": "80K"}}, {}, "leave out remove.share, to, layers and depth.$"),
        ({"remove": {"depth": 1}}, {}, r"^from .*: remove depth was 0 and is 1; leave it out, or measure with it\.$"),
        ({}, {"max_loss": 0.0}, r"^max_loss: give a number of nats per token above 0, got 0\.0\.$"),
        ({}, {"max_loss": float("nan")}, r"^max_loss: give a number of nats per token above 0, got nan\.$"),
        ({}, {"like": "x"}, r"^max_loss: does not go with like, which says what goes; leave out one of them\.$"),
        ({}, {"like": "x", "max_loss": None}, r"^from: does not go with like, which says what goes"),
        ({"choose": {"rounds": 2}}, {"from_": None}, OWN_RUN),
    ],
)
def test_a_limit_that_cannot_be_kept_is_refused(changes, asked, said, taught, prose, tmp_path):
    options = {"from_": prose, "max_loss": 0.1, "out": tmp_path / "out", **asked}
    with pytest.raises(RecipeError, match=said):
        secateur.prune(taught, {"polish": False, **changes}, **options)
    assert not list(tmp_path.iterdir())
