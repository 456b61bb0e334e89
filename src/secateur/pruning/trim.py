"""Tokens go first: which ones, how many, and the tokenizer of those that stay.

In: an opened dense model whose recipe has `vocabulary`. Out: the model with its weights and a
`Trim`, by which the run cuts it.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

import secateur.methods.tokens as methods
from secateur.data.blocks import Blocks
from secateur.methods.budget import least_step, params_of, prices_of, token_prices
from secateur.model.bind import Arch
from secateur.model.stock import CausalLM, Tokenizer
from secateur.pruning.cost import memory_for
from secateur.pruning.open import Opened, loaded, onload, tokenizer_of
from secateur.pruning.resolve import align_for, groups_of, layers_to_expect, resolve
from secateur.pruning.text import RunText
from secateur.ranks import from_first, own_part
from secateur.store import Services
from secateur.stream.walk import Batch, make_batches
from secateur.vocabulary.kept import KeptTokens, Trim
from secateur.vocabulary.order import (
    ALIGN_TOKENS,
    PieceNats,
    Removal,
    TokenCounts,
    count_for_size,
    counts_of,
    nats_of_trims,
    of_scripts,
    removal_by_counts,
    removal_order,
    sizes_within,
)
from secateur.vocabulary.tokenizer import Vocabulary, read_vocabulary, trim_like, trimmed_tokenizer

# FFNs that lose more of their channels than this are extrapolated, not measured.
MOST_CHANNELS = 0.85
# Trims that `auto` measures at most.
NUM_TRIMS = 4


@dataclass(frozen=True, slots=True)
class _Dense:
    """The dense model before any token goes.

    `stay`: ids that `keep_scripts` names.
    """

    opened: Opened
    services: Services
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    stay: set[int]

    def trim(self, removal: Removal, num_gone: int) -> Trim:
        """Return the trim after which so many tokens are gone."""
        kept = removal.kept(num_gone)
        new = trimmed_tokenizer(self.tokenizer, kept, self.opened.model.config)
        return Trim(kept, self.tokenizer, new)


def plan_trim(opened: Opened, services: Services, text: RunText) -> Opened:
    """Return the model with the trim that the recipe's `vocabulary` asks for, and what it is to
    cost.

    `text`: to count and measure on. The model is loaded, to answer where the text has answers, and
    to measure what tokens cost in pieces. `auto` measures more, see `_count`; with `groups: []` as
    many go as the share holds. Raises RecipeError for a size that cannot be, before any text is
    read unless the text says what must stay, and what `read_vocabulary` raises.
    """
    size, log, store = opened.recipe.remove.vocabulary, services.log, services.store
    if opened.like is not None and opened.like.tokens is not None:
        there, kept = opened.like.checkpoint, opened.like.tokens
        return replace(
            opened, trim=trim_like(there, kept, tokenizer_of(opened), opened.model, opened.name)
        )
    with log.time("vocabulary"):
        dense = _read(text.opened, services)
        num_rows = dense.vocabulary.num_rows
        if isinstance(size, int):
            resolve(replace(opened, trim=_trim_to(dense, size)))  # so that it fails now, if it does
        with _at_hand(dense, text) as hand:
            counts = from_first(partial(_counts, dense, text, hand))
            written = list(hand.written.values())
            pieces = partial(
                methods.piece_nats, *hand.bound, dense.vocabulary, written, services.progress
            )
            nats = store.value("nats of pieces", partial(from_first, pieces), kind=PieceNats)
            removal = from_first(partial(_removal, dense, counts, nats))
            if isinstance(size, int):
                num_gone = count_for_size(removal, size)
                foretold = nats.token * float(removal.growth(torch.tensor([num_gone])))
            else:
                num_gone, foretold = store.value(
                    "vocabulary", partial(_count, dense, hand, removal, nats)
                )
        trim = replace(dense.trim(removal, num_gone), foretold=foretold)
        line = {"event": "vocabulary", "kept": trim.kept.num_kept, "dense": num_rows}
        log.write({**line, "nats_of_pieces": dataclasses.asdict(nats), "foretold": foretold})
    return replace(hand.opened, recipe=opened.recipe, trim=trim)


def trim_to(opened: Opened, size: int) -> Trim:
    """Return a trim to `size` tokens for planning. Which ones stay is not looked at, nor is any
    text.

    Raises what `plan_trim` raises for a size that cannot be.
    """
    return _trim_to(_read(opened, Services()), size)


def _trim_to(dense: _Dense, size: int) -> Trim:
    num_rows = dense.vocabulary.num_rows
    removal = removal_order(dense.vocabulary, torch.zeros(num_rows), dense.stay)
    kept = num_rows - count_for_size(removal, size)
    return Trim(KeptTokens(tuple(range(kept)), num_rows), dense.tokenizer, dense.tokenizer)


def _read(opened: Opened, services: Services) -> _Dense:
    """Read the vocabulary and what is to stay of it."""
    tokenizer = tokenizer_of(opened)
    vocabulary = read_vocabulary(tokenizer, opened.model)
    stay = of_scripts(vocabulary, opened.recipe.remove.keep_scripts)
    return _Dense(opened, services, tokenizer, vocabulary, stay)


def _counts(dense: _Dense, text: RunText, hand: "_Hand") -> dict[str, TokenCounts]:
    """Count what text has, and of answers what the model is likely to say."""
    num_rows, progress = dense.vocabulary.num_rows, dense.services.progress
    expected = {
        name: methods.expected_counts(*hand.bound, blocks, num_rows, progress)
        for name, blocks in hand.answers.items()
    }
    return counts_of(text.learning().documents(), num_rows, progress, expected)


def _removal(dense: _Dense, counts: Mapping[str, TokenCounts], nats: PieceNats) -> Removal:
    """Put the tokens in the order in which they go."""
    recipe = dense.opened.recipe
    shares = {name: domain.share for name, domain in recipe.calibration.domains.items()}
    minimax = recipe.choose.domain_weighting == "minimax"
    return removal_by_counts(
        dense.vocabulary, counts, shares, dense.stay, nats=nats, minimax=minimax
    )


def _count(dense: _Dense, hand: "_Hand", removal: Removal, pieces: PieceNats) -> tuple[int, float]:
    """Return how many tokens go with `auto`, and the nats per token of text that this is to
    cost.
    """
    opened, num_rows = dense.opened, dense.vocabulary.num_rows
    recipe, remove, arch = opened.recipe, opened.recipe.remove, opened.arch
    prices = prices_of(arch, opened.model)
    layers = layers_to_expect(recipe, arch, opened.model.config)
    to_remove = max(0.0, remove.share * prices.total - prices.taken(layers))
    per_token = token_prices(opened.model, 1)
    if not remove.group_names or not to_remove:
        most_1 = sizes_within(removal, int(to_remove // per_token))[-1:]
        return int(most_1), pieces.token * float(removal.growth(most_1))
    # One count more than the share holds, if `resolve` takes it: the least with which no channel
    # need go.
    counts_N = sizes_within(removal, int(to_remove // per_token) + ALIGN_TOKENS)
    groups, uniform = groups_of(recipe, arch, layers), recipe.choose.budget == "uniform"
    least = least_step(groups, align_for(recipe, groups, prices, int(to_remove)), alike=uniform)
    if per_token * int(counts_N[-1]) - to_remove > least / 2:
        counts_N = counts_N[:-1]
    ffns = tuple(group for group in groups if group.name == "ffn")
    channels = params_of(ffns)
    dense.services.tell(
        f"{opened.name}: first measures how many of its {num_rows:,} tokens go; what goes is said "
        "after that."
    )
    shares = {name: recipe.calibration.domains[name].share for name in hand.written}
    law = _channel_law(dense, hand, shares, min(MOST_CHANNELS, to_remove / channels))
    # Whole steps of the widths, at least what is asked: so tokens make up for the widths' rounding.
    aligns = [
        align_for(recipe, ffns, prices, int(per_token * num_gone)) for num_gone in counts_N.tolist()
    ]
    steps = {align: least_step(ffns, align, alike=True) for align in set(aligns)}
    step_N = torch.tensor([steps[align] for align in aligns], dtype=torch.float64)
    rest_N = ((to_remove - per_token * counts_N) / step_N).ceil() * step_N / channels
    cost_N = torch.where(rest_N > 1, torch.inf, law(rest_N))
    if (
        cost_N.isinf().all()
    ):  # whole layers may give the rest; if not, `resolve` says what is out of reach
        cost_N[-1] = 0

    # The nats of trims: of a quarter and a half of what may go, then of what seems best by those.
    # Text that gets longer than any measured is not taken.
    def nats_with(trim: Trim | None) -> float:
        progress = dense.services.progress
        return from_first(
            lambda: methods.nats_with(*hand.bound, hand.held_out, shares, trim, progress)
        )

    before, growth_N = nats_with(None), removal.growth(counts_N)
    measured, num_gone = dict[float, float](), 0
    for number in range(NUM_TRIMS):
        sum_N = cost_N + nats_of_trims(removal, counts_N, measured or {1.0: pieces.token})
        place = len(counts_N) * (number + 1) // 4 if number < 2 else int(sum_N.argmin())
        num_gone, more = int(counts_N[place]), float(growth_N[place])
        if more and more not in measured:
            measured[more] = nats_with(dense.trim(removal, num_gone)) - before
            dense.services.log.write(
                {"event": "trim", "gone": num_gone, "further": more, "nats": measured[more]}
            )
    if not measured:
        return num_gone, 0.0
    nats_N = nats_of_trims(removal, counts_N, measured)
    within_N = growth_N <= max(measured)
    best = int(torch.where(within_N, cost_N + nats_N, torch.inf).argmin())
    num_gone, nats = int(counts_N[best]), float(nats_N[best])
    dense.services.log.note(
        f"vocabulary: {num_gone:,} tokens go, which costs {nats:.3f} nats per token of held-out "
        "text."
    )
    return num_gone, nats


@dataclass(frozen=True, slots=True)
class _Hand:
    """The dense model with weights, on its device, and text to measure it on.

    `written`: each domain's calibration blocks; `answers`: those of the dense model's answers, of
    which the answers alone count; `held_out`: what guards the run, in all domains. `damping`: of
    fits.
    """

    opened: Opened
    written: dict[str, Blocks]
    answers: dict[str, Blocks]
    held_out: dict[str, Blocks]
    damping: float

    @property
    def bound(self) -> tuple[CausalLM, Arch]:
        """The model and its architecture."""
        return self.opened.model, self.opened.arch


@contextmanager
def _at_hand(dense: _Dense, text: RunText) -> Iterator[_Hand]:
    """Load the model and its calibration text; behind it the model is in host memory.

    If not all weights are in memory the model answers nothing, here as in the run.
    """
    opened = dense.opened
    # A recipe that every model can meet: memory depends on its text.
    layers = {"depth": 0, "layers": (), "groups": ("ffn",) if opened.arch.ffns else ()}
    remove = {"vocabulary": None, "share": 0.05, "align": 1, **layers}
    plain = opened.filled(remove=remove, choose={"rounds": 1})
    resolved = resolve(plain)
    plan = memory_for(plain, resolved)
    domains = from_first(lambda: text.learning().text).domains
    opened = loaded(opened, on_disk=plan.weights_on_disk)
    placement = onload(
        opened,
        one_at_a_time=plan.one_layer_at_a_time,
        in_float32=plan.in_float32,
        keeps=plan.keeps_layers,
    )
    read = [domain for domain in domains if not domain.blocks.is_meta]
    written = {domain.name: domain.calibration for domain in read}
    held_out = {domain.name: domain.held_out for domain in read}
    answers: dict[str, Blocks] = {}
    if len(written) < len(domains) and not (plan.weights_on_disk or plan.one_layer_at_a_time):
        speaker = text.answers(opened, dense.services)
        for domain in domains:
            if domain.blocks.is_meta:
                blocks = speaker.blocks(
                    domain.name,
                    {"held-out": len(domain.held_out), "learning": domain.num_calibration},
                )
                held_out[domain.name] = blocks["held-out"]
                answers[domain.name] = blocks["learning"]
    yield _Hand(opened, written | answers, answers, held_out, resolved.damping)
    placement.offload()


def _channel_law(dense: _Dense, hand: _Hand, shares: dict[str, float], most: float) -> methods.Law:
    """Return the nats of a share of FFN channels less, measured up to `most` of them."""
    batches: list[Batch] = []
    for name, blocks in hand.written.items():
        ids_NT = blocks.ids_NT.to(hand.opened.model.device)
        batches += own_part(
            make_batches(name, ids_NT, held_out=False, counted_NT=blocks.counted_NT)
        )
    return methods.channel_law(
        *hand.bound, batches, shares, most, hand.damping, dense.services.progress
    )
