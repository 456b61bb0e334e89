"""Which tokens go: what each one is worth, the order in which they go, and how many go.

In: documents by domain, a `Vocabulary`, what the model was found to pay for pieces and for trims.
Out: ids in the order in which they go, and what a text then costs. V: rows of the embedding, R:
tokens that may go.

What a token costs is the nats of what replaces it. Further tokens are alike to that, wherever they
are tokens that the model has often read. The bytes of a character are not.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from secateur.errors import CalibrationError, RecipeError
from secateur.log import Progress, steps
from secateur.vocabulary.kept import KeptTokens
from secateur.vocabulary.tokenizer import Vocabulary, with_parts

# Sizes that suit tensor cores.
ALIGN_TOKENS = 64
# The share of a token's use that is its neighbours': what the domains' text happens not to contain.
PRIOR_SHARE, NEIGHBOURS = 0.5, 1024
# A script that makes up this share of some domain's letters is one that the model is to write.
WRITTEN_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """How often a text has each token.

    `damped_V`: each document counts as the square root of how often it has the token.
    """

    tokens_V: Int64[Tensor, " V"] | Float64[Tensor, " V"]
    damped_V: Float64[Tensor, " V"]


def count_tokens(documents: Iterable[Tensor], num_rows: int) -> TokenCounts:
    """Return the counts of the ids in the documents, a tensor each. V: `num_rows`, of the
    embedding.
    """
    tokens_V, damped_V = (
        torch.zeros(num_rows, dtype=torch.int64),
        torch.zeros(num_rows, dtype=torch.float64),
    )
    for ids_T in documents:
        ids_U, counts_U = ids_T.unique(return_counts=True)
        tokens_V[ids_U] += counts_U
        damped_V[ids_U] += counts_U.double().sqrt()
    return TokenCounts(tokens_V, damped_V)


def counts_of(
    documents: Mapping[str, Iterable[Tensor]],
    num_rows: int,
    progress: Progress,
    answers: Mapping[str, TokenCounts],
) -> dict[str, TokenCounts]:
    """Return each domain's counts: of `answers` what the model says, of the others the ids in their
    `documents`.

    Raises CalibrationError if there is no domain of either.
    """
    if not (documents or answers):
        raise CalibrationError(
            "remove.vocabulary: every domain is of the model's answers, so there is no text to "
            "count tokens of; add a domain of files or installed text."
        )
    of_text = steps(progress, "count tokens", documents.items())
    return {**answers, **{name: count_tokens(ids, num_rows) for name, ids in of_text}}


def token_use(
    counts: Mapping[str, TokenCounts],
    shares: Mapping[str, float],
    *,
    minimax: bool = False,
    damped: bool = False,
) -> Float[Tensor, " V"]:
    """Return how often a token is used, per token of text.

    use = sum_d share_d counts_d / total_d over the counted domains; with `minimax` the largest of
    counts_d / total_d. `damped`: documents count as the square root of their occurrences.
    """
    used = [
        (count.damped_V if damped else count.tokens_V.double()) / count.tokens_V.sum()
        for count in counts.values()
    ]
    used_DV = torch.stack(used)
    shares_D = used_DV.new_tensor([shares[name] for name in counts])
    return used_DV.amax(0) if minimax else shares_D @ used_DV / shares_D.sum()


def with_prior(use_V: Float[Tensor, " V"], ids: list[int]) -> Float[Tensor, " V"]:
    """Return the use with `PRIOR_SHARE` of it taken from the mean of each token's neighbours among
    `ids`.

    Tokenizers number tokens in the order in which they were learnt, so neighbours are about as
    frequent in the text that the tokenizer was made for.
    """
    index = torch.tensor(sorted(ids), dtype=torch.long)
    sums = torch.cat([use_V.new_zeros(1), use_V[index].cumsum(0)])
    first = (torch.arange(len(index)) - NEIGHBOURS // 2).clamp(min=0)
    last = (first + NEIGHBOURS).clamp(max=len(index))
    mixed_V = use_V.clone()
    mixed_V[index] = (1 - PRIOR_SHARE) * use_V[index] + PRIOR_SHARE * (sums[last] - sums[first]) / (
        last - first
    )
    return mixed_V


def with_prior_by_script(
    use_V: Float[Tensor, " V"], scripts: Mapping[int, frozenset[str]], written: Set[str]
) -> Float[Tensor, " V"]:
    """Return `with_prior` among tokens with letters of other scripts than the `written` ones, and
    among the rest.

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

        A spelling costs the sum of its weights less 1, the token that it replaces. An ordinary
        piece weighs 1. The first byte of a character carries the cost of all its bytes, and the
        others weigh nothing.
        """
        weights_V = torch.ones(vocabulary.num_rows, dtype=torch.float64)
        for index, byte in vocabulary.bytes.items():
            follows = 0x80 <= byte < 0xC0
            weights_V[index] = 0.0 if follows else 1 + self.character / self.token
        return weights_V


@dataclass(frozen=True, slots=True)
class Removal:
    """The order in which tokens go.

    `ids`: in that order. `cost_R`: as many further tokens per token of text cost the model what
    these do. `num_rows`: of the embedding, before any goes.
    """

    ids: list[int]
    cost_R: Float[Tensor, " R"]
    num_rows: int

    def growth(self, counts_N: Int64[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Return how much longer text is once so many tokens are gone, per token of it."""
        return torch.cat([self.cost_R.new_zeros(1), self.cost_R])[counts_N]

    def kept(self, num_gone: int) -> KeptTokens:
        """Return the tokens that stay once the first `num_gone` are gone."""
        removed = set(self.ids[:num_gone])
        return KeptTokens(
            tuple(index for index in range(self.num_rows) if index not in removed), self.num_rows
        )


def removal_by_counts(
    vocabulary: Vocabulary,
    counts: Mapping[str, TokenCounts],
    shares: Mapping[str, float],
    stay: Iterable[int] = (),
    *,
    nats: PieceNats,
    minimax: bool = False,
) -> Removal:
    """Return the order in which tokens go by the counts of each domain's text, and what text then
    costs.

    A word that one document repeats is foreseen after its first use, and other text may never have
    it: so the order is that of damped counts. The growth of text is that of plain ones. Characters
    of the scripts that the text is written in stay.
    """
    scripts = vocabulary.scripts()
    written = written_scripts(scripts, counts)
    characters = {
        index
        for index, text in vocabulary.texts.items()
        if len(text) == 1 and scripts[index] & written
    }
    may_go = {index: scripts[index] for index in vocabulary.texts.keys() - vocabulary.fixed}
    plain, damped = (
        token_use(counts, shares, minimax=minimax, damped=is_damped) for is_damped in (False, True)
    )
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

    A token of use u that is spelt in pieces of the weights w costs u (sum w - 1), and its use
    becomes theirs. Rows without a token go first. `stay`: tokens that never go, beside the
    vocabulary's own; nor does what any of them is merged from. `order_by_V`: the use that decides
    which one is next, `use_V` without it. `weights_V`: see `PieceNats.weights`, 1 without them.
    """
    # Rows without a token go first; the others wait for those that are merged from them.
    fixed = with_parts(vocabulary, stay)
    padding = [
        index
        for index in range(vocabulary.num_rows)
        if index not in vocabulary.texts and index not in fixed
    ]
    use, order_by, removed = (
        use_V.tolist(),
        (use_V if order_by_V is None else order_by_V).tolist(),
        set(padding),
    )
    weights = [1.0] * vocabulary.num_rows if weights_V is None else weights_V.tolist()
    needed_by = [0] * vocabulary.num_rows
    for parts in vocabulary.parts.values() if vocabulary.needs_parts else ():
        for part in set(parts):
            needed_by[part] += 1
    free = {
        index for index in vocabulary.texts if index not in fixed and vocabulary.parts.get(index)
    }

    def spelt(index: int) -> list[int]:
        parts = vocabulary.parts[index]
        return [end for part in parts for end in (spelt(part) if part in removed else [part])]

    def further(pieces: list[int]) -> float:
        return sum(weights[piece] for piece in pieces) - 1

    def wait(index: int) -> None:
        heapq.heappush(waiting, (order_by[index] * further(spelt(index)), index))

    waiting, ids, costs, cost = list[tuple[float, int]](), list(padding), [0.0] * len(padding), 0.0
    for index in free:
        if not needed_by[index]:
            wait(index)

    # Take the cheapest token each time. Its use becomes that of its pieces.
    while waiting:
        known, index = heapq.heappop(waiting)
        parts = spelt(index)
        if order_by[index] * further(parts) > known:  # others passed their use on to it
            wait(index)
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
                wait(part)
    return Removal(ids, torch.tensor(costs, dtype=torch.float64), vocabulary.num_rows)


def count_for_size(removal: Removal, size: int) -> int:
    """Return how many tokens go for `size` to stay: none for all of the model's rows.

    Raises RecipeError if so many cannot stay.
    """
    num_rows = removal.num_rows
    least = -(-(num_rows - len(removal.ids)) // ALIGN_TOKENS) * ALIGN_TOKENS
    if size < num_rows <= least:
        raise RecipeError(
            f"remove.vocabulary: none of the model's {num_rows:,} rows can go, in steps of "
            f"{ALIGN_TOKENS}, without text that could not be read any more; leave it out."
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
            f"remove.vocabulary: {size:,} of the model's {num_rows:,} rows cannot stay; give a "
            f"multiple of {ALIGN_TOKENS}{nearest} from {least:,}, without which some text could "
            f"not be read, to {num_rows:,}."
        )
    return num_rows - size


def sizes_within(removal: Removal, most_gone: int) -> Int64[Tensor, " N"]:
    """Return all counts of tokens that may go, ascending, that leave a multiple of 64 rows."""
    first = removal.num_rows % ALIGN_TOKENS
    end = max(first, min(len(removal.ids), most_gone) + 1)
    counts = torch.arange(first, end, ALIGN_TOKENS)
    return torch.cat([counts.new_zeros(1 if first else 0), counts])


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


def written_scripts(
    scripts: Mapping[int, frozenset[str]], counts: Mapping[str, TokenCounts]
) -> set[str]:
    """Return the scripts in which at least `WRITTEN_SHARE` of the tokens with letters of some
    domain are.
    """
    written: set[str] = set()
    for domain in counts.values():
        tokens: Counter[str] = Counter()
        for index in domain.tokens_V.nonzero().flatten().tolist():
            for script in scripts.get(index, ()):
                tokens[script] += int(domain.tokens_V[index])
        written |= {
            script for script, count in tokens.items() if count >= WRITTEN_SHARE * tokens.total()
        }
    return written


def of_scripts(vocabulary: Vocabulary, scripts: Iterable[str]) -> set[int]:
    """Return the tokens with letters of these scripts. Raises RecipeError for one that no token
    has.
    """
    known = vocabulary.scripts()
    for script in (wanted := set(scripts)):
        if not any(script in of_token for of_token in known.values()):
            raise RecipeError(
                f"remove.keep_scripts: no token of the model has a letter of {script}; its scripts "
                f"are {', '.join(sorted(set().union(*known.values())))}."
            )
    return {index for index, of_token in known.items() if of_token & wanted}
