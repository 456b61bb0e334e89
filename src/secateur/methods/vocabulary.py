"""Which tokens go: what each one is worth, the order in which they go, and how many go.

In: `TokenCounts` by domain, a `Vocabulary`, prices. Out: ids in the order in which they go, and what
a text then costs. V: rows of the embedding, R: tokens that may go.

What a token costs is the nats of what replaces it. Further tokens are alike to that, wherever they
are tokens that the model has often read. The bytes of a character are not.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.data.blocks import Block, Text, TokenCounts, blocks_of
from secateur.data.retokenised import retokenised
from secateur.errors import RecipeError
from secateur.log import Progress, silent, steps
from secateur.methods.depth import narrow_kl, narrow_readers
from secateur.methods.profile import first_blocks
from secateur.model.bind import Arch, head_of
from secateur.model.kept import Trim
from secateur.model.vocabulary import Vocabulary, scripts_of, with_parts
from secateur.stream.losses import HEAD_POSITIONS, block_losses, final_states
from secateur.stream.walk import Batch

# Sizes that suit tensor cores.
ALIGN_TOKENS = 64
# The share of a token's use that is its neighbours': what the domains' text happens not to contain.
PRIOR_SHARE, NEIGHBOURS = 0.5, 1024
# Blocks per domain on which the nats of a trim, and those of narrow FFNs, are measured.
TOKEN_BLOCKS, NARROW_BLOCKS = 4, 1
# In the text on which the nats of pieces are measured every so many tokens are spelt in theirs, and
# every so many characters in bytes. Fewer characters than these tell nothing of their nats.
TOKENS_APART, CHARACTERS_APART, FEWEST_CHARACTERS = 16, 2, 8
# A script that makes up this share of some domain's letters is one that the model is to write.
WRITTEN_SHARE = 0.01
# Readers fitted to few tokens lose so much more than those of a run: 0.44, 0.86 and 1.33 nats where
# runs of SmolLM2-135M lost two thirds of it, at 10, 20 and 30% of all parameters.
NARROW_TOKENS_PER_INPUT, NARROW_OVERSTATES = 4, 1.5


def token_use(
    counts: Mapping[str, TokenCounts], shares: Mapping[str, float], *, minimax: bool = False, damped: bool = False
) -> Float[Tensor, " V"]:
    """Return how often a token is used, per token of text.

    use = sum_d share_d counts_d / total_d over the counted domains; with `minimax` the largest of
    counts_d / total_d. `damped`: documents count as the square root of their occurrences.
    """
    used = [(count.damped_V if damped else count.tokens_V.double()) / count.tokens_V.sum() for count in counts.values()]
    used_DV = torch.stack(used)
    shares_D = used_DV.new_tensor([shares[name] for name in counts])
    return used_DV.amax(0) if minimax else shares_D @ used_DV / shares_D.sum()


@torch.inference_mode()
def expected_counts(model: nn.Module, arch: Arch, text: Text, num_rows: int, progress: Progress) -> TokenCounts:
    """Return how often the model itself would say each token where the text's tokens count.

    counts_v = sum_t p(v | tokens before t). A draw names one token of those that are likely there, and few
    answers are drawn: so this foretells other answers better than their own counts do (LOG, 2026-11-30). What is
    likely in one answer is damped no further. V: `num_rows`, of the embedding.
    """
    head, expected_V = head_of(model, arch), torch.zeros(num_rows, dtype=torch.float64)
    for block in steps(progress, "count answers", blocks_of(text)):
        states_PD = block.counted(final_states(model, arch, block.ids_T[None]))
        for states_SD in states_PD.split(HEAD_POSITIONS):
            # Some devices have no float64.
            expected_V += head(states_SD).float().softmax(dim=-1).sum(dim=0).cpu().double()
    return TokenCounts(expected_V, expected_V)


def with_prior(use_V: Float[Tensor, " V"], ids: list[int], share: float = PRIOR_SHARE) -> Float[Tensor, " V"]:
    """Return the use with `share` of it taken from the mean of each token's neighbours among `ids`.

    Tokenizers number tokens in the order in which they were learnt, so neighbours are about as
    frequent in the text that the tokenizer was made for.
    """
    index = torch.tensor(sorted(ids), dtype=torch.long)
    sums = torch.cat([use_V.new_zeros(1), use_V[index].cumsum(0)])
    first = (torch.arange(len(index)) - NEIGHBOURS // 2).clamp(min=0)
    last = (first + NEIGHBOURS).clamp(max=len(index))
    mixed_V = use_V.clone()
    mixed_V[index] = (1 - share) * use_V[index] + share * (sums[last] - sums[first]) / (last - first)
    return mixed_V


def with_prior_by_script(
    use_V: Float[Tensor, " V"], scripts: Mapping[int, frozenset[str]], written: Set[str]
) -> Float[Tensor, " V"]:
    """Return `with_prior` among tokens with letters of other scripts than the `written` ones, and among the rest.

    Else words of the text's own scripts would have the use of neighbours that it cannot have.
    """
    others = [index for index, of_token in scripts.items() if of_token - written]
    rest = [index for index, of_token in scripts.items() if not of_token - written]
    return with_prior(with_prior(use_V, others), rest)


@dataclass(frozen=True, slots=True)
class PieceNats:
    """What it costs the dense model to read a token in pieces.

    `token`: nats of a further token. `character`: nats of a character in the tokens of its bytes.
    """

    token: float = 1.0
    character: float = 1.0

    def weights(self, vocabulary: Vocabulary) -> Float[Tensor, " V"]:
        """Return how many further tokens each token counts as where it is a piece of another.

        A spelling costs the sum of its weights less 1, the token that it replaces. An ordinary piece
        weighs 1. The first byte of a character carries the cost of all its bytes, and the others weigh
        nothing.
        """
        weights_V = torch.ones(vocabulary.num_rows, dtype=torch.float64)
        for index, byte in vocabulary.bytes.items():
            follows = 0x80 <= byte < 0xC0
            weights_V[index] = 0.0 if follows else 1 + self.character / self.token
        return weights_V


@torch.inference_mode()
def piece_nats(
    model: nn.Module, arch: Arch, vocabulary: Vocabulary, text: Sequence[Text], progress: Progress
) -> PieceNats:
    """Return what tokens cost in pieces, by a block of each domain in which some are spelt in theirs.

    nats = those of the pieces - those of the token, at the same place of the same text. A domain's
    block is the one with the most characters that would be spelt in bytes. Where there are too few
    of them, a character counts as a further token. `text`: by domain; tokens that do not count stay whole.
    """
    may_go = vocabulary.parts.keys() - vocabulary.fixed
    in_bytes = {index for index in may_go if vocabulary.bytes.keys() >= set(vocabulary.parts[index])}
    index_V = torch.zeros(vocabulary.num_rows, dtype=torch.bool)
    index_V[list(in_bytes)] = True
    token_nats, further, character_nats = 0.0, 0, list[float]()
    for domain in steps(progress, "nats of pieces", text):
        block = max(blocks_of(domain), key=lambda block: int((index_V[block.ids_T] & block.mask_T).sum()))
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


def _some_spelt(block: Block, vocabulary: Vocabulary, may_go: Set[int], in_bytes: Set[int]) -> list[tuple[int, ...]]:
    """Return the pieces of every token of a text: its parts for some that count, itself for the others."""
    pieces, tokens, characters = [], 0, 0
    for position, (index, counts) in enumerate(zip(block.ids_T.tolist(), block.mask_T.tolist(), strict=True)):
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


@dataclass(frozen=True, slots=True)
class Removal:
    """The order in which tokens go.

    `ids`: in that order. `cost_R`: as many further tokens per token of text cost the model what these do.
    """

    ids: list[int]
    cost_R: Float[Tensor, " R"]

    def growth(self, counts_N: Int64[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Return how much longer text is once so many tokens are gone, per token of it."""
        return torch.cat([self.cost_R.new_zeros(1), self.cost_R])[counts_N]


def removal_by_counts(
    vocabulary: Vocabulary,
    counts: Mapping[str, TokenCounts],
    shares: Mapping[str, float],
    stay: Iterable[int] = (),
    *,
    nats: PieceNats,
    minimax: bool = False,
) -> Removal:
    """Return the order in which tokens go by the counts of each domain's text, and what text then costs.

    A word that one document repeats is foreseen after its first use, and other text may never have
    it: so the order is that of damped counts. The growth of text is that of plain ones. Characters
    of the scripts that the text is written in stay.
    """
    scripts = {index: frozenset(scripts_of(text)) for index, text in vocabulary.texts.items()}
    written = written_scripts(scripts, counts)
    characters = {index for index, text in vocabulary.texts.items() if len(text) == 1 and scripts[index] & written}
    may_go = {index: scripts[index] for index in vocabulary.texts.keys() - vocabulary.fixed}
    plain, damped = (token_use(counts, shares, minimax=minimax, damped=is_damped) for is_damped in (False, True))
    return removal_order(
        vocabulary,
        with_prior_by_script(plain, may_go, written),
        {*stay, *characters},
        order_by_V=with_prior_by_script(damped, may_go, written),
        weights_V=nats.weights(vocabulary),
    )


def removal_order(
    vocabulary: Vocabulary,
    use_V: Float[Tensor, " V"],
    stay: Iterable[int] = (),
    *,
    order_by_V: Float[Tensor, " V"] | None = None,
    weights_V: Float[Tensor, " V"] | None = None,
) -> Removal:
    """Return all tokens that may go, each time the one that costs least.

    A token of use u that is spelt in pieces of the weights w costs u (sum w - 1), and its use becomes
    theirs. Rows without a token go first. `stay`: tokens that never go, beside the vocabulary's own;
    nor does what any of them is merged from. `order_by_V`: the use that decides which one is next,
    `use_V` without it. `weights_V`: see `PieceNats.weights`, 1 without them.
    """
    # Rows without a token go first; the others wait for those that are merged from them.
    fixed = with_parts(vocabulary, stay)
    padding = [index for index in range(vocabulary.num_rows) if index not in vocabulary.texts and index not in fixed]
    use, order_by, removed = use_V.tolist(), (use_V if order_by_V is None else order_by_V).tolist(), set(padding)
    weights = [1.0] * vocabulary.num_rows if weights_V is None else weights_V.tolist()
    needed_by = [0] * vocabulary.num_rows
    for parts in vocabulary.parts.values() if vocabulary.needs_parts else ():
        for part in set(parts):
            needed_by[part] += 1
    free = {index for index in vocabulary.texts if index not in fixed and vocabulary.parts.get(index)}

    def spelt(index: int) -> list[int]:
        parts = vocabulary.parts[index]
        return [end for part in parts for end in (spelt(part) if part in removed else [part])]

    def further(pieces: list[int]) -> float:
        return sum(weights[piece] for piece in pieces) - 1

    waiting = [(order_by[index] * further(spelt(index)), index) for index in free if not needed_by[index]]
    heapq.heapify(waiting)
    ids, costs, cost = list(padding), [0.0] * len(padding), 0.0

    # Take the cheapest token each time. Its use becomes that of its pieces.
    while waiting:
        known, index = heapq.heappop(waiting)
        parts = spelt(index)
        if (now := order_by[index] * further(parts)) > known:  # others passed their use on to it
            heapq.heappush(waiting, (now, index))
            continue
        cost += use[index] * further(parts)
        for part in parts:
            use[part] += use[index]
            order_by[part] += order_by[index]
        removed.add(index)
        ids.append(index)
        costs.append(cost)

        # A part that no token is merged from any more may go next.
        for part in set(vocabulary.parts[index]) if vocabulary.needs_parts else ():
            needed_by[part] -= 1
            if not needed_by[part] and part in free:
                heapq.heappush(waiting, (order_by[part] * further(spelt(part)), part))
    return Removal(ids, torch.tensor(costs, dtype=torch.float64))


def kept_after(removal: Removal, num_rows: int, num_gone: int) -> tuple[int, ...]:
    """Return the ids that stay once the first `num_gone` are gone."""
    removed = set(removal.ids[:num_gone])
    return tuple(index for index in range(num_rows) if index not in removed)


def count_for_size(removal: Removal, num_rows: int, size: int) -> int:
    """Return how many tokens go for `size` to stay: none for all of the model's rows.

    Raises RecipeError if so many cannot stay.
    """
    least = -(-(num_rows - len(removal.ids)) // ALIGN_TOKENS) * ALIGN_TOKENS
    if size < num_rows <= least:
        raise RecipeError(
            f"remove.vocabulary: none of the model's {num_rows:,} rows can go, in steps of {ALIGN_TOKENS}, without "
            "text that could not be read any more; leave it out."
        )
    if size != num_rows and (size % ALIGN_TOKENS or not least <= size <= num_rows):
        below = size // ALIGN_TOKENS * ALIGN_TOKENS
        near = [
            near_size
            for near_size in (below, below + ALIGN_TOKENS)
            if size % ALIGN_TOKENS and least <= near_size <= num_rows
        ]
        nearest = f" (such as {' or '.join(f'{size:,}' for size in near)})" if near else ""
        raise RecipeError(
            f"remove.vocabulary: {size:,} of the model's {num_rows:,} rows cannot stay; give a multiple of "
            f"{ALIGN_TOKENS}{nearest} from {least:,}, without which some text could not be read, to {num_rows:,}."
        )
    return num_rows - size


def sizes_within(removal: Removal, num_rows: int, most_gone: int) -> Int64[Tensor, " N"]:
    """Return all counts of tokens that may go, ascending, that leave a multiple of 64 rows."""
    first = num_rows % ALIGN_TOKENS
    end = max(first, min(len(removal.ids), most_gone) + 1)
    counts = torch.arange(first, end, ALIGN_TOKENS)
    return torch.cat([counts.new_zeros(1 if first else 0), counts])


def nats_with(
    model: nn.Module,
    arch: Arch,
    text: Mapping[str, Text],
    shares: Mapping[str, float],
    trim: Trim | None,
    progress: Progress = silent,
) -> float:
    """Return the nats per dense token of text that counts after a trim, or before any: the domains' mean by share.

    The first `TOKEN_BLOCKS` blocks of each domain are measured. `text`: in the dense tokenizer.
    """
    dense_text = {name: blocks_of(blocks)[:TOKEN_BLOCKS] for name, blocks in text.items()}
    kept_K, own_text = None, dense_text
    if trim is not None:
        kept_K, own_text = (
            torch.tensor(trim.kept.dense_ids),
            retokenised(dense_text, trim.dense_tokenizer, trim.tokenizer),
        )

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
    shares: Mapping[str, float],
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
    fitted, judged = first_blocks(batches, num_fit, after=NARROW_BLOCKS), first_blocks(batches, NARROW_BLOCKS)
    widths = [dict.fromkeys(layers, 1 - share) for share in (most, most / 2)]
    both = narrow_readers(model, arch, fitted, widths, damping, progress)
    divergences = narrow_kl(model, arch, judged, both, shares, progress)
    cost, of_half = (max(1e-9, kl / NARROW_OVERSTATES) for kl in divergences)
    exponent = math.log2(cost / of_half)
    return lambda share: cost * (share.clamp(min=0) / most) ** exponent


def nats_of_trims(
    removal: Removal, counts_N: Int64[Tensor, " N"], measured: Mapping[float, float]
) -> Float[Tensor, " N"]:
    """Return the nats per token that text costs more once so many tokens are gone.

    `measured`: what text costs that is so much longer by the counts, above 0. In between it is a
    straight line, and it never falls.
    """
    places = sorted(measured)
    more_P = removal.cost_R.new_tensor([0.0, *places])
    nats_P = removal.cost_R.new_tensor([0.0, *(measured[more] for more in places)]).cummax(0).values
    slopes = nats_P.diff() / more_P.diff()
    more_N = removal.growth(counts_N)
    line_N = torch.searchsorted(more_P[1:-1].contiguous(), more_N)
    return nats_P[line_N] + slopes[line_N] * (more_N - more_P[line_N])


def written_scripts(scripts: Mapping[int, frozenset[str]], counts: Mapping[str, TokenCounts]) -> set[str]:
    """Return the scripts in which at least `WRITTEN_SHARE` of the tokens with letters of some domain are."""
    written: set[str] = set()
    for domain in counts.values():
        tokens: Counter[str] = Counter()
        for index in domain.tokens_V.nonzero().flatten().tolist():
            for script in scripts.get(index, ()):
                tokens[script] += int(domain.tokens_V[index])
        written |= {script for script, count in tokens.items() if count >= WRITTEN_SHARE * tokens.total()}
    return written


def of_scripts(vocabulary: Vocabulary, scripts: Iterable[str]) -> set[int]:
    """Return the tokens with letters of these scripts. Raises RecipeError for one that no token has."""
    known = {index: scripts_of(text) for index, text in vocabulary.texts.items()}
    for script in (wanted := set(scripts)):
        if not any(script in of_token for of_token in known.values()):
            raise RecipeError(
                f"remove.keep_scripts: no token of the model has a letter of {script}; its scripts are "
                f"{', '.join(sorted(set().union(*known.values())))}."
            )
    return {index for index, of_token in known.items() if of_token & wanted}
