"""What tokens are worth to the dense model: how often it would say each, and what it costs it to
lack some.

In: the model and text by domain. Out: counts by token; nats of tokens in pieces, of a trim, and of
the FFN channels that would go instead. V: rows of the embedding.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set

import torch
from torch import Tensor, nn

from secateur.data.blocks import Block, Text
from secateur.facts import PerDomain
from secateur.log import Progress, silent, steps
from secateur.methods.depth import narrow_kl, narrow_readers
from secateur.methods.profile import first_blocks
from secateur.model.bind import Arch, head_of
from secateur.stream.losses import HEAD_POSITIONS, block_losses, final_states
from secateur.stream.walk import Batch
from secateur.vocabulary.kept import Trim
from secateur.vocabulary.order import PieceNats, TokenCounts
from secateur.vocabulary.retokenised import retokenised
from secateur.vocabulary.tokenizer import Vocabulary

# Blocks per domain on which the nats of a trim, and those of narrow FFNs, are measured.
TOKEN_BLOCKS, NARROW_BLOCKS = 4, 1
# In the text on which the nats of pieces are measured every so many tokens are spelt in theirs, and
# every so many characters in bytes. Fewer characters than these tell nothing of their nats.
TOKENS_APART, CHARACTERS_APART, FEWEST_CHARACTERS = 16, 2, 8
# Readers fitted to few tokens lose so much more than those of a run: 0.44, 0.86 and 1.33 nats where
# runs of SmolLM2-135M lost two thirds of it, at 10, 20 and 30% of all parameters.
NARROW_TOKENS_PER_INPUT, NARROW_OVERSTATES = 4, 1.5


@torch.inference_mode()
def expected_counts(
    model: nn.Module, arch: Arch, text: Text, num_rows: int, progress: Progress
) -> TokenCounts:
    """Return how often the model itself would say each token where the text's tokens count.

    counts_v = sum_t p(v | tokens before t). A draw names one token of those that are likely there,
    and few answers are drawn: so this foretells other answers better than their own counts do (LOG,
    2026-11-30). What is likely in one answer is damped no further. V: `num_rows`, of the embedding.
    """
    head, expected_V = head_of(model, arch), torch.zeros(num_rows, dtype=torch.float64)
    for block in steps(progress, "count answers", list(text)):
        states_PD = block.counted(final_states(model, arch, block.ids_T[None]))
        for states_SD in states_PD.split(HEAD_POSITIONS):
            # Some devices have no float64.
            expected_V += head(states_SD).float().softmax(dim=-1).sum(dim=0).cpu().double()
    return TokenCounts(expected_V, expected_V)


@torch.inference_mode()
def piece_nats(
    model: nn.Module, arch: Arch, vocabulary: Vocabulary, text: Sequence[Text], progress: Progress
) -> PieceNats:
    """Return what tokens cost in pieces, by a block of each domain in which some are spelt in
    theirs.

    nats = those of the pieces - those of the token, at the same place of the same text. A domain's
    block is the one with the most characters that would be spelt in bytes. Where there are too few
    of them, a character counts as a further token. `text`: by domain; tokens that do not count stay
    whole.
    """
    may_go = vocabulary.parts.keys() - vocabulary.fixed
    in_bytes = {
        index for index in may_go if vocabulary.bytes.keys() >= set(vocabulary.parts[index])
    }
    index_V = torch.zeros(vocabulary.num_rows, dtype=torch.bool)
    index_V[list(in_bytes)] = True
    token_nats, further, character_nats = 0.0, 0, list[float]()
    for domain in steps(progress, "nats of pieces", text):
        block = max(domain, key=lambda block: int((index_V[block.ids_T] & block.mask_T).sum()))
        ids_T = block.ids_T
        spelt = _some_spelt(block, vocabulary, may_go, in_bytes)
        new_T = torch.tensor([piece for pieces in spelt for piece in pieces])
        # Nats of the tokens after the first, the only ones that are predicted.
        before = [0.0, *block_losses(model, arch, ids_T[None]).tolist()]
        after = iter([0.0, *block_losses(model, arch, new_T[None]).tolist()])
        for index, nats, pieces in zip(ids_T.tolist(), before, spelt, strict=True):
            more = sum(next(after) for _ in pieces) - nats
            if pieces == (index,):
                continue
            if index in in_bytes:
                character_nats.append(more)
            else:
                token_nats, further = token_nats + more, further + len(pieces) - 1
    token = max(1e-3, token_nats / max(1, further))
    if len(character_nats) < FEWEST_CHARACTERS:
        return PieceNats(token, token)
    return PieceNats(token, max(1e-3, sum(character_nats) / len(character_nats)))


def _some_spelt(
    block: Block, vocabulary: Vocabulary, may_go: Set[int], in_bytes: Set[int]
) -> list[tuple[int, ...]]:
    """Return the pieces of every token of a text: its parts for some that count, itself for the
    others.
    """
    pieces, tokens, characters = [], 0, 0
    for position, (index, counts) in enumerate(
        zip(block.ids_T.tolist(), block.mask_T.tolist(), strict=True)
    ):
        if not position or not counts or index not in may_go:
            is_spelt = False
        elif index in in_bytes:
            characters += 1
            is_spelt = characters % CHARACTERS_APART == 0
        else:
            tokens += 1
            is_spelt = tokens % TOKENS_APART == 0
        pieces.append(vocabulary.parts[index] if is_spelt else (index,))
    return pieces


def nats_with(
    model: nn.Module,
    arch: Arch,
    text: Mapping[str, Text],
    shares: PerDomain,
    trim: Trim | None,
    progress: Progress = silent,
) -> float:
    """Return the nats per dense token of text that counts after a trim, or before any: the domains'
    mean by share.

    The first `TOKEN_BLOCKS` blocks of each domain are measured. `text`: in the dense tokenizer.
    """
    dense_text = {name: list(blocks)[:TOKEN_BLOCKS] for name, blocks in text.items()}
    kept_K, own_text = None, dense_text
    if trim is not None:
        kept_K = torch.tensor(trim.kept.dense_ids)
        own_text = retokenised(dense_text, trim.dense_tokenizer, trim.tokenizer)

    def nats_of(block: Block) -> float:
        ids_T = block.ids_T if kept_K is None else kept_K[block.ids_T]
        return float(block.counted(block_losses(model, arch, ids_T[None], kept_K)).sum())

    total, of_shares = 0.0, 0.0
    for name, blocks in steps(progress, "nats of trims", own_text.items()):
        num_tokens = sum(int(block.mask_T[1:].sum()) for block in dense_text[name])
        if num_tokens:
            nats = sum(map(nats_of, blocks))
            total, of_shares = total + shares[name] * nats / num_tokens, of_shares + shares[name]
    return total / of_shares


# From a share of the FFN channels to nats per token.
Law = Callable[[Tensor], Tensor]


def channel_law(
    model: nn.Module,
    arch: Arch,
    batches: list[Batch],
    shares: PerDomain,
    most: float,
    damping: float,
    progress: Progress,
) -> Law:
    """Return what a share of the FFN channels costs: a share^b through `most` and half of it.

    Both are KL(dense || narrow), see `narrow_kl`, over `NARROW_OVERSTATES`, with readers fitted to
    `NARROW_TOKENS_PER_INPUT` tokens an input, on other blocks than the `NARROW_BLOCKS` judged. One
    walk fits both, on the stream with `most` gone: the other's own stream changes 0.05% of its KL.
    `shares`: of the domains of the batches.
    """
    ffns, length = arch.select(("ffn",)), batches[0].ids_BT.shape[1]
    widest, layers = max(group.num_inputs for group in ffns), [group.layer for group in ffns]
    num_fit = -(-NARROW_TOKENS_PER_INPUT * widest // (len(shares) * length))
    fitted = first_blocks(batches, num_fit, after=NARROW_BLOCKS)
    judged = first_blocks(batches, NARROW_BLOCKS)
    widths = [dict.fromkeys(layers, 1 - share) for share in (most, most / 2)]
    both = narrow_readers(model, arch, fitted, widths, damping, progress)
    divergences = narrow_kl(model, arch, judged, both, shares, progress)
    cost, of_half = (max(1e-9, kl / NARROW_OVERSTATES) for kl in divergences)
    exponent = math.log2(cost / of_half)
    return lambda share: cost * (share.clamp(min=0) / most) ** exponent
