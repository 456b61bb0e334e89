"""What a cell of a study is made from and judged on: the same blocks for all, unseen by every one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import saved, tiny_llama
from texts import documents_of

from secateur.data.blocks import Blocks
from secateur.evaluation import compare as module
from secateur.evaluation.study import Comparison, Study, StudyEvaluation
from secateur.pruning import cut as steps

NUM_BLOCKS = 2


@pytest.fixture(scope="module")
def seen(texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run two cells of one draw and the trained dense model: what they were made from, judged on, what came out."""
    place = saved(tmp_path_factory.mktemp("cells") / "model", tiny_llama()).parent
    found = dict[str, Any](texts=[], judged=[], lessons=[], depends=[], progress=[])
    domains = {name: {"files": [str(file)]} for name, file in texts.items()}
    calibration = {"num_tokens": 1280, "sequence_length": 32, "domains": domains}
    study = Study(
        question="Which?",
        model=str(place / "model"),
        ratios=(0.2,),
        seeds=(1,),
        recipe={"remove": {"align": 8}, "calibration": calibration},
        methods={"ours": {}, "prose alone": {"domains": ("prose",)}},  # type: ignore[dict-item]
        evaluation=StudyEvaluation(num_blocks=NUM_BLOCKS),
        train_dense=True,
    )
    prune, losses, depends = steps.prune_together, module.losses_of_dense_tokens, module._depends_on
    learn = steps.learn

    def spy_prune(runs: Any) -> Any:
        found["texts"] += [run.text for run in runs]
        return prune(runs)

    def spy_losses(model: Any, arch: Any, blocks: dict[str, Blocks], *more: Any) -> Any:
        if blocks:  # the other kinds of text, of which there are none
            ids = {name: part.ids_NT for name, part in blocks.items()}
            found["judged"].append((sum(p.numel() for p in model.parameters()), ids))
        return losses(model, arch, blocks, *more)

    def spy_learn(*arguments: Any, **more: Any) -> Any:
        found["lessons"].append(learn(*arguments, **more))
        return found["lessons"][-1]

    def spy_depends(*arguments: Any) -> Any:
        found["depends"].append((arguments, depends(*arguments)))
        return found["depends"][-1][1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(steps, "prune_together", spy_prune)
        patched.setattr(module, "losses_of_dense_tokens", spy_losses)
        patched.setattr(steps, "learn", spy_learn)
        patched.setattr(module, "_depends_on", spy_depends)
        progress = lambda *where: found["progress"].append(where) if where[0] == "cells" else None  # noqa: E731
        found["result"] = module.compare(study, place / "out", progress=progress)
    return found


def rows(blocks_NT: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(ids) for ids in blocks_NT.tolist()}


def test_all_cells_of_a_draw_are_judged_on_the_same_blocks(seen):
    (size, first), *others = seen["judged"]
    assert size == sum(parameter.numel() for parameter in tiny_llama().parameters())
    assert {name: tuple(blocks.shape) for name, blocks in first.items()} == {
        name: (NUM_BLOCKS, 32) for name in ("prose", "code")
    }
    assert [other < size for other, _ in others] == [True, True, False]
    for _, blocks in others:
        assert all(torch.equal(blocks[name], first[name]) for name in first)


def test_no_cell_saw_what_it_is_judged_on_not_even_its_guard(seen):
    _, judged = seen["judged"][0]
    assert [[domain.name for domain in text.domains] for text in seen["texts"]] == [["prose", "code"], ["prose"]]
    assert len(seen["lessons"]) == 3
    for lesson in seen["lessons"]:
        learnt = {tuple(block.ids_T.tolist()) for block in lesson.text.blocks}
        assert learnt
        for blocks_NT in judged.values():
            assert not learnt & rows(blocks_NT)
    for text in seen["texts"]:
        for domain in text.domains:
            unseen = rows(judged[domain.name])
            assert not unseen & rows(domain.held_out.ids_NT) and not unseen & rows(domain.calibration.ids_NT)
            # The guard has as much as in a run of its own: a block for every nine.
            assert len(domain.held_out.ids_NT) == -(-len(domain.calibration.ids_NT) // 9)


def test_the_record_says_what_was_done(seen):
    result: Comparison = seen["result"]
    dense, ours, alone, _ = result.cells
    assert (dense.method, dense.ratio, dense.seed, dense.remove_reached) == ("dense", 0.0, 1, 0.0)
    assert ours.num_tokens == {"prose": 640, "code": 640} and alone.num_tokens == {"prose": 1280}
    sizes = [size for size, _ in seen["judged"]]
    for cell, size in zip((ours, alone), sizes[1:3], strict=True):
        assert cell.remove_reached == pytest.approx(1 - size / sizes[0], rel=1e-12)
        assert cell.seconds > 0 and cell.seed == 1 and set(cell.losses) == {"prose", "code"}
    assert seen["progress"] == [("cells", done, 4) for done in range(5)]


def test_the_dense_model_learns_the_same_text_by_cross_entropy_alone(seen):
    dense, _, _, trained = seen["result"].cells
    assert (trained.method, trained.ratio, trained.remove_reached) == ("dense, trained", 0.0, 0.0)
    assert trained.perplexity < dense.perplexity and trained.seconds > 0
    ours, _, lesson = seen["lessons"]
    assert lesson.settings.kl_share == 0 and lesson.settings.num_tokens == ours.settings.num_tokens
    pairs = zip(lesson.text.blocks, ours.text.blocks, strict=True)
    assert all(torch.equal(mine.ids_T, other.ids_T) for mine, other in pairs)


def test_a_cell_is_its_own_and_depends_on_all_that_could_change_it(seen):
    dense, *cells, _ = seen["depends"]
    assert dense[1]["recipe"] is None
    assert all(found["recipe"]["remove"]["share"] == 0.2 for _, found in cells)
    (shared, cell, blocks), first = cells[0]
    assert first == module._depends_on(shared, cell, blocks)
    other_model = module.replace(shared, dense=module.replace(shared.dense, fingerprint="other"))
    more_blocks = shared.study.model_copy(update={"evaluation": StudyEvaluation(num_blocks=3)})
    changes = [
        (other_model, cell, blocks),
        (module.replace(shared, study=more_blocks), cell, blocks),
        (shared, module.replace(cell, seed=cell.seed + 1), blocks),
        (shared, module.replace(cell, recipe=cell.recipe.model_copy(update={"seed": 9})), blocks),
        (shared, cell, blocks._replace(content_hash="other")),
        (shared, cell, blocks._replace(others={"poems": documents_of(blocks.held_out["code"].ids_NT + 2)})),
    ]
    found = [module._depends_on(*arguments) for arguments in changes]
    assert all(each != first for each in found) and len({str(each) for each in found}) == len(changes)
    assert first["device"] == "cpu" and "torch" in first["versions"]
