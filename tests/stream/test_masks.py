"""A mask: what does not count changes nothing, and what counts is measured as if it were alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import tiny_family
from models import tiny_ids, tiny_llama
from torch import Tensor, nn

from secateur.data.blocks import Blocks
from secateur.methods.depth import fold_patch, layer_kl, narrow_kl, narrow_readers
from secateur.methods.experts import prune_expert_channels, prune_experts
from secateur.methods.profile import Probe
from secateur.methods.select import Task
from secateur.model.bind import bind
from secateur.model.group import linear
from secateur.pruning.group_step import method_of
from secateur.recipe import Recipe
from secateur.recovery.judge import Judge
from secateur.recovery.loss import masked_loss
from secateur.stream.losses import domain_losses
from secateur.stream.measure import measure
from secateur.stream.walk import Batch, Walk, make_batches

LENGTH, NUM_COUNTED = 16, 9
SHARES = {"a": 1.0}


def masks(*, ones: bool = False) -> Tensor:
    """Return a mask by block: some positions, none of which is behind `NUM_COUNTED`; or all."""
    mask_NT = torch.zeros(4, LENGTH, dtype=torch.bool)
    mask_NT[:, 3:NUM_COUNTED] = True
    mask_NT[1, 5] = False
    return torch.ones_like(mask_NT) if ones else mask_NT


def batches(mask_NT: Tensor | None, *, tail: int = 0) -> list[Batch]:
    """Return a domain's blocks; `tail` changes the ids behind all that counts."""
    made: list[Batch] = []
    for seed, held_out in ((0, False), (1, True)):
        ids_NT = tiny_ids(batch=4, length=LENGTH, seed=seed)
        ids_NT[:, NUM_COUNTED + 1 :] += tail
        made += make_batches("a", ids_NT, held_out=held_out, batch_tokens=2 * LENGTH, counted_NT=mask_NT)
    return made


def sums(model: Any, own: list[Batch]) -> list[Tensor]:
    arch = bind(model)
    group = arch.select(("ffn",))[1]
    walk = Walk(model, arch, own, dense=True)
    walk.advance(0)
    walk.advance_dense(0)
    walk.advance_dense(1)
    with torch.no_grad():
        linear(walk.layers[1], group.reader.module).weight[:, ::3] = 0
    found = measure(walk, group, "energy", SHARES, gram=True, drift=True)
    return [*found.pooled.sums, *found.held_out_TF.values(), *found.held_out_drift_TH.values()]


def held_out(own: list[Batch]) -> dict[str, Blocks]:
    held = [batch for batch in own if batch.held_out]
    counted = None if held[0].counted_BT is None else torch.cat([batch.counted_BT for batch in held])
    ids_NT = torch.cat([batch.ids_BT for batch in held])
    return {"a": Blocks(ids_NT, torch.zeros_like(ids_NT), counted)}


def losses(model: Any, own: list[Batch]) -> list[Tensor]:
    return [torch.tensor(domain_losses(model, bind(model), held_out(own))["a"].nats_per_token, dtype=torch.float64)]


def verdicts(model: Any, own: list[Batch]) -> list[Tensor]:
    judge = Judge(model, bind(model), held_out(own))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[:, ::3] = 0
    found = judge.verdicts(lambda ids_BT: other(ids_BT).logits)["a"]
    return [torch.tensor([found.kl, found.nats_per_token, found.top1_agreement], dtype=torch.float64)]


def layers(model: Any, own: list[Batch]) -> list[Tensor]:
    arch = bind(model)
    costs = layer_kl(model, arch, own, (), [*range(arch.num_layers)], {})
    return [torch.tensor([*costs.values()], dtype=torch.float64)]


def patch(model: Any, own: list[Batch]) -> list[Tensor]:
    errors = fold_patch(model, bind(model), 1, own, 0.01)
    return [model.model.layers[0].mlp.down_proj.weight, torch.tensor([errors.step, *errors.error_after.values()])]


def narrow(model: Any, own: list[Batch]) -> list[Tensor]:
    arch = bind(model)
    readers = narrow_readers(model, arch, own, [{0: 0.5, 2: 0.5}], 0.01)
    kl = narrow_kl(model, arch, [batch for batch in own if not batch.held_out], readers, SHARES)
    return [*readers[0].values(), torch.tensor(kl)]


def probe(model: Any, own: list[Batch]) -> list[Tensor]:
    found = Probe(model, bind(model), own)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, ::3] = 0
    return [torch.tensor(list(found.kl().values()))]


def experts(prune: Callable[[Task], Any], name: str, num_keep: int) -> Callable[[Any, list[Batch]], list[Tensor]]:
    def found(_: Any, own: list[Batch]) -> list[Tensor]:
        model = tiny_family("mixtral")
        arch = bind(model)
        task = Task(Walk(model, arch, own), arch.select((name,))[0], num_keep, method_of(Recipe()), SHARES, 0)
        keep, line = prune(task)
        return [keep, torch.tensor(list(line["error_after"].values())), *model.model.layers[0].parameters()]

    return found


MEASURES = {each.__name__: each for each in (sums, losses, verdicts, layers, patch, narrow, probe)}
MEASURES |= {"experts": experts(prune_experts, "experts", 2)}
MEASURES |= {"expert_channels": experts(prune_expert_channels, "expert_ffn", 64)}


@pytest.mark.parametrize("name", MEASURES)
def test_what_does_not_count_changes_nothing_and_a_mask_of_ones_neither(name: str) -> None:
    def found(mask_NT: Tensor | None, tail: int = 0) -> list[Tensor]:
        return MEASURES[name](tiny_llama(), batches(mask_NT, tail=tail))

    plain, ones, masked, other = found(None), found(masks(ones=True)), found(masks()), found(masks(), 7)
    for mine, theirs in zip(plain, ones, strict=True):
        assert torch.equal(mine, theirs)
    # An expert multiplies all its tokens at once, and rounds by how many there are.
    rtol = 1e-4 if "expert" in name else 0.0
    assert all(torch.allclose(mine, theirs, rtol, rtol / 100) for mine, theirs in zip(masked, other, strict=True))
    assert not all(
        mine.shape == theirs.shape and torch.equal(mine, theirs) for mine, theirs in zip(plain, masked, strict=True)
    )


def test_statistics_are_those_of_the_rows_that_count() -> None:
    model, own, rows = tiny_llama(), batches(masks()), list[Tensor]()
    # A position counts by the token that it predicts, and the last one by its own.
    predicts = torch.cat([masks()[:, 1:], masks()[:, -1:]], dim=1)
    group = bind(model).select(("ffn",))[0]
    found = measure(Walk(model, bind(model), own), group, "tokens", SHARES, gram=True)
    with model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, x, __: rows.append(x[0].double())):
        for batch in own:
            model(batch.ids_BT)
    calibration, held_out = (
        torch.cat([x[m] for x, m in zip(part, predicts.split(2), strict=True)]) for part in (rows[:2], rows[2:])
    )
    assert found.pooled.mass == len(calibration) == int(predicts.sum())
    gram = found.pooled.gram
    torch.testing.assert_close(gram.full(), calibration.T @ calibration, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.held_out_TF["a"].double(), held_out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kl_share", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("answers", [(True, False, False, True), (True,) * 4])
def test_training_minimises_the_mean_over_blocks_of_what_counts_in_each(
    answers: tuple[bool, ...], kl_share: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    states, dense = (torch.randn(4 * (LENGTH - 1), 12, generator=generator) for _ in range(2))
    head = nn.Linear(12, 30, bias=False)
    ids_NT, mask_NT = torch.randint(30, (4, LENGTH), generator=generator), masks()

    # By hand, in float64, with autograd.
    weight = head.weight.detach().double().requires_grad_()
    own = states.double().requires_grad_()
    log_q, log_p = (own @ weight.T).log_softmax(-1), (dense.double() @ head.weight.detach().double().T).log_softmax(-1)
    kl_NP = (log_p.exp() * (log_p - log_q)).sum(-1).view(4, -1)
    reverse_NP = (log_q.exp() * (log_q - log_p)).sum(-1).view(4, -1)
    nats_NP = -log_q.view(4, LENGTH - 1, 30).gather(2, ids_NT[:, 1:, None])[..., 0]
    of_text_NP = kl_share * kl_NP + (1 - kl_share) * nats_NP
    of_answers_NP = reverse_NP if kl_share > 0 else nats_NP
    blocks = [(of_answers_NP if is_answer else of_text_NP)[n] for n, is_answer in enumerate(answers)]
    expected = torch.stack([block[mask_NT[n, 1:]].mean() for n, block in enumerate(blocks)]).mean()
    expected.backward()

    ours = states.clone().requires_grad_()
    teacher = dense, copy.deepcopy(head).requires_grad_(False)
    loss = masked_loss(ours, head, ids_NT, teacher, mask_NT, torch.tensor(answers), kl_share=kl_share)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert ours.grad is not None and own.grad is not None and head.weight.grad is not None
    torch.testing.assert_close(ours.grad.double(), own.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(head.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-6)
    assert not ours.grad.view(4, LENGTH - 1, 12)[~mask_NT[:, 1:]].any()
