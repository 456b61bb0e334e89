"""Losses on token blocks, domain by domain: nats per token, and KL to the dense model."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.data.blocks import Block, Text
from secateur.errors import NumericsError
from secateur.facts import Loss
from secateur.log import Progress, silent
from secateur.model.bind import Arch, decoder_layers, head_of
from secateur.model.modules import forwards_replaced
from secateur.ranks import size, spread
from secateur.stream.device import release_freed
from secateur.stream.walk import Batch, Walk

T = TypeVar("T")

# What documents add up to, by their numbers: a sum over tokens, and the tokens.
Sums = dict[int, tuple[float, int]]

# Positions per slice of logits: 64 x 150k words x float32 is 38 MB.
HEAD_POSITIONS = 64
# Tokens that pass the layers together, so that each layer is onloaded once for all of them.
TOKENS_AT_ONCE = 1 << 15


def domain_losses(
    model: nn.Module,
    arch: Arch,
    text: Mapping[str, Text],
    progress: Progress = silent,
    stage: str = "evaluate",
    num_tokens: Mapping[str, Mapping[int, int]] | None = None,
) -> dict[str, Loss]:
    """Return each domain's loss; ranks share the blocks, and all get the numbers of one process.

    `num_tokens`: by domain and document, in nats per which the losses are, if not the text's own,
    such as those of the dense tokenizer. Raises NumericsError naming the domain if a loss is not
    finite.
    """
    losses: dict[str, Loss] = {}
    by_domain = {domain: list(blocks) for domain, blocks in text.items()}
    blocks = [block for domain_blocks in by_domain.values() for block in domain_blocks]

    def sums(piece: list[Block], states: Iterator[Tensor]) -> list[Sums]:
        return [
            sums_of(_position_losses(model, arch, states_PD, block.ids_T), block)
            for states_PD, block in zip(states, piece, strict=True)
        ]

    in_head = sum(weight.numel() for weight in head_of(model, arch).parameters())
    as_layers = max(1, round(in_head * arch.num_layers / max(1, sum(arch.params_per_layer))))
    all_sums = _by_layers(model, arch, blocks, sums, progress, stage, as_layers)
    for domain, domain_blocks in by_domain.items():
        counts = None if num_tokens is None else num_tokens[domain]
        losses[domain] = loss_of(
            islice(all_sums, len(domain_blocks)), f"{stage}, domain {domain}", counts
        )
    release_freed()
    return losses


def sums_of(values_P: Float[Tensor, " P"], block: Block) -> Sums:
    """Return what the counted tokens of each document add up to; P = T - 1 predicted tokens of a
    block.
    """
    values_K = block.counted(values_P).cpu().double()
    document_K = block.counted(block.document_T[1:]).cpu()
    documents_D, index_K, counts_D = document_K.unique(return_inverse=True, return_counts=True)
    sums_D = torch.zeros(len(documents_D), dtype=values_K.dtype).index_add(0, index_K, values_K)
    return dict(
        zip(documents_D.tolist(), zip(sums_D.tolist(), counts_D.tolist(), strict=True), strict=True)
    )


def merged(sums: Iterable[Sums]) -> Sums:
    """Return the sums of all blocks, in the order of documents."""
    all_sums: Sums = {}
    for of_block in sums:
        for document, (total, count) in of_block.items():
            before, num_before = all_sums.get(document, (0.0, 0))
            all_sums[document] = (before + total, num_before + count)
    return dict(sorted(all_sums.items()))


def loss_of(sums: Iterable[Sums], where: str, num_tokens: Mapping[int, int] | None = None) -> Loss:
    """Return the loss of blocks, whose `sums` are nats. Raises NumericsError, naming `where`, if it
    is not finite.

    `num_tokens`: of each document, if they are to be other ones than those predicted.
    """
    by_document = merged(sums)
    nats_D = [nats for nats, _ in by_document.values()]
    if not math.isfinite(math.fsum(nats_D)):
        raise NumericsError(
            f"{where}: the loss is {sum(nats_D)}; the model gives no finite logits."
        )
    counts = [count for _, count in by_document.values()]
    if num_tokens is not None:
        counts = [num_tokens.get(document, 0) for document in by_document]
    return Loss.of(nats_D, counts)


def predicted_tokens(text: Mapping[str, Text]) -> dict[str, dict[int, int]]:
    """Return, by domain, how many tokens of each document are predicted, and count."""
    counts = dict[str, dict[int, int]]()
    for name, blocks in text.items():
        sums = merged(sums_of(torch.zeros(len(block.ids_T) - 1), block) for block in blocks)
        counts[name] = {document: count for document, (_, count) in sums.items()}
    return counts


def head_inputs(
    model: nn.Module, arch: Arch, text: Text, progress: Progress, stage: str
) -> Iterator[Float[Tensor, "P D"]]:
    """Yield `final_states` of each block, on the CPU; ranks share the blocks, and all get all."""

    def on_cpu(_: list[Block], states: Iterator[Tensor]) -> list[Tensor]:
        return [states_PD.cpu() for states_PD in states]

    return _by_layers(model, arch, list(text), on_cpu, progress, stage)


def _by_layers(
    model: nn.Module,
    arch: Arch,
    blocks: list[Block],
    finish: Callable[[list[Block], Iterator[Tensor]], list[T]],
    progress: Progress,
    stage: str,
    head_steps: int = 0,
) -> Iterator[T]:
    """Yield what `finish` makes of each block and what the head reads of it, for pieces of the
    text.

    The blocks of a piece all pass one layer before the next, each block separately. `head_steps`:
    of the progress in `finish`, where a layer is one.
    """
    if not blocks:
        return iter(())
    # Every rank should get some.
    at_once = min(
        max(1, TOKENS_AT_ONCE // max(len(block.ids_T) for block in blocks)),
        -(-len(blocks) // size()),
    )
    pieces = [blocks[start : start + at_once] for start in range(0, len(blocks), at_once)]
    done, steps = 0, len(pieces) * (arch.num_layers + head_steps)
    progress(stage, 0, steps)

    def moved(by: int) -> None:
        nonlocal done
        done = min(done + by * size(), steps)
        progress(stage, done, steps)

    def head_read(walk: Walk) -> Iterator[Tensor]:
        for number, pair in enumerate(zip(walk.batches, walk.hidden_BTD, strict=True)):
            yield states_for_head(model, arch, *pair)
            before, after = (
                head_steps * step // len(walk.batches) for step in (number, number + 1)
            )
            if after > before:
                moved(after - before)

    def passed(piece: list[Block]) -> list[T]:
        device = next(model.parameters()).device
        batches = [Batch("", True, block.ids_T[None].to(device)) for block in piece]
        walk = Walk(model, arch, batches)
        for index in range(arch.num_layers):
            walk.advance(index)
            moved(1)
        return finish(piece, head_read(walk))

    return chain.from_iterable(spread(passed, pieces))


@torch.inference_mode()
def block_losses(
    model: nn.Module,
    arch: Arch,
    ids_1T: Int64[Tensor, "1 T"],
    among_K: Int64[Tensor, " K"] | None = None,
) -> Float[Tensor, " P"]:
    """Return -log p(token t+1 | tokens 0..t) in nats for every position of a block; P = T - 1.

    `among_K`: ascending ids, if the model had these tokens alone: the softmax is over them.
    """
    return _position_losses(model, arch, final_states(model, arch, ids_1T), ids_1T[0], among_K)


@torch.inference_mode()
def _position_losses(
    model: nn.Module, arch: Arch, states_PD: Tensor, ids_T: Tensor, among_K: Tensor | None = None
) -> Float[Tensor, " P"]:
    head, targets_P, among = head_of(model, arch), ids_T[1:].to(states_PD.device), slice(None)
    if among_K is not None:
        among = among_K.to(states_PD.device)
        targets_P = torch.searchsorted(among, targets_P)
    pieces = zip(states_PD.split(HEAD_POSITIONS), targets_P.split(HEAD_POSITIONS), strict=True)
    logits = ((head(x_SD)[:, among].float(), y_S) for x_SD, y_S in pieces)
    return torch.cat(
        [nn.functional.cross_entropy(x_SV, y_S, reduction="none") for x_SV, y_S in logits]
    )


@torch.inference_mode()
def states_for_head(
    model: nn.Module, arch: Arch, batch: Batch, hidden_BTD: Tensor
) -> Float[Tensor, "P D"]:
    """Return the head's input where a token is predicted that counts, from a stream that has left
    the layers.

    The layers are bypassed.
    """
    with forwards_replaced(
        decoder_layers(model, arch), lambda *_, **__: arch.layer_output(hidden_BTD)
    ):
        states_PD = states_of(model, arch, batch.ids_BT)
    if batch.counted_BT is None:
        return states_PD
    return states_PD[batch.counted_BT[:, 1:].flatten().to(states_PD.device)]


def states_of(model: nn.Module, arch: Arch, ids_BT: Int64[Tensor, "B T"]) -> Float[Tensor, "P D"]:
    """Return what the head reads at the P = B * (T - 1) positions that predict a token."""
    backbone = model.get_submodule(arch.backbone)
    return backbone(ids_BT, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)


# Positions per slice of logits: 2 models x 64 x 150k words x float32 is 77 MB.
KL_POSITIONS = 64
# Rows of logits at a time in float32: four times as fast on a CPU as 64 (12 MB each).
CACHED_ROWS = 8


@torch.inference_mode()
def final_states(
    model: nn.Module, arch: Arch, ids_1T: Int64[Tensor, "1 T"]
) -> Float[Tensor, "P D"]:
    """Return the head's input at every position that predicts a token of the block; P = T - 1."""
    return states_of(model, arch, ids_1T.to(next(model.parameters()).device))


@torch.inference_mode()
def token_divergences(
    dense_PD: Float[Tensor, "P D"],
    dense_head: nn.Module,
    pruned_PD: Float[Tensor, "P E"],
    pruned_head: nn.Module,
) -> Float[Tensor, " P"]:
    """Return sum_v p(v) (log p(v) - log q(v)) per position, p: the dense model, q: the pruned one.

    The softmax runs in float32 on the models' logits. A model against itself gives 0 everywhere.
    """
    rows = _rows((dense_PD, dense_head), (pruned_PD, pruned_head))
    return torch.cat(
        [_kl(*(logits_RV.float().log_softmax(-1) for logits_RV in pair)) for pair in rows]
    )


@torch.inference_mode()
def compare_tokens(
    dense_PD: Float[Tensor, "P D"],
    dense_head: nn.Module,
    logits_PV: Float[Tensor, "P V"],
    next_P: Int64[Tensor, " P"],
) -> tuple[Tensor, ...]:
    """Return, by position, KL(p || q), KL(q || p), whether both models rank the same token first,
    and -log q(next).

    p: the dense model, of which `dense_PD` is what its head reads; q: the model that gives the
    logits.
    """
    figures, as_it_is = list[tuple[Tensor, ...]](), nn.Identity()
    rows = _rows((dense_PD, dense_head), (logits_PV, as_it_is), (next_P, as_it_is))
    for dense_RV, logits_RV, next_R in rows:
        log_p, log_q = dense_RV.float().log_softmax(-1), logits_RV.float().log_softmax(-1)
        same_R = dense_RV.argmax(-1) == logits_RV.argmax(-1)
        nats_R = -log_q.gather(1, next_R[:, None])[:, 0]
        figures.append((_kl(log_p, log_q), _kl(log_q, log_p), same_R, nats_R))
    return tuple(map(torch.cat, zip(*figures, strict=True)))


def _rows(*columns: tuple[Tensor, nn.Module]) -> Iterator[tuple[Tensor, ...]]:
    """Yield what each head makes of its values, `CACHED_ROWS` of `KL_POSITIONS` at a time."""
    for pieces in zip(*(values.split(KL_POSITIONS) for values, _ in columns), strict=True):
        made = (head(piece) for (_, head), piece in zip(columns, pieces, strict=True))
        yield from zip(*(piece.split(CACHED_ROWS) for piece in made), strict=True)


def _kl(log_p_RV: Tensor, log_q_RV: Tensor) -> Tensor:
    return torch.linalg.vecdot(log_p_RV.exp(), log_p_RV - log_q_RV)
