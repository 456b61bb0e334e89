"""Sums, Gram matrices, domain weights and pooling against float64 formulae, on degenerate inputs too."""

from unittest import mock

import pytest
import torch
from degenerate import Drawn, drawn
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import FLOAT32_STEP, Sums, cut_damage, domain_factor, domain_sums, removal_scores, scaled_into, weighted

from secateur.stream import statistics as product
from secateur.stream.measure import _at_least, minimax_weights, removal_damage
from secateur.stream.statistics import Gram, Statistics, damped_gram, inverse_of, keep_highest, pool

HALF_STEP = FLOAT32_STEP / 2  # the relative error of one rounded operation
CPU = torch.device("cpu")
NUM_OUTPUTS = 5
BOTH = (torch.float32, torch.bfloat16)
FEW = settings(max_examples=30)  # each with several channels and tokens, so that a test takes about a second


def sums_of(x_TF: torch.Tensor, y_TH: torch.Tensor, drift_TH: torch.Tensor, sizes: int = 16, *, gram: bool = True):
    found = Statistics.empty(x_TF.shape[1], CPU, gram=gram, drift_size=drift_TH.shape[1])
    for x, y, drift in zip(x_TF.split(sizes), y_TH.split(sizes), drift_TH.split(sizes), strict=True):
        found.update(x, y, drift)
    return found


def drawn_sums(example: Drawn) -> tuple[Statistics, Sums]:
    parts = example.x_TF, example.other(NUM_OUTPUTS), example.other(NUM_OUTPUTS, 2)
    return sums_of(*parts), domain_sums(*parts)


def assert_near(found: torch.Tensor | float, expected: torch.Tensor | float, size: torch.Tensor | float, count: int):
    """Each sum of `count` terms errs by at most `count` roundings of its terms' absolute sum."""
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    bound = (count + 4) * HALF_STEP * torch.as_tensor(size).double()
    assert bool(((found - expected).abs() <= bound).all()), float((found - expected).abs().max())


def assert_sums(found: Statistics, expected: Sums, sizes: Sums, count: int) -> None:
    """`sizes`: the same sums over absolute values."""
    assert found.mass == pytest.approx(expected.mass, rel=1e-12)
    assert_near(found.sum_F, expected.inputs_F, sizes.inputs_F, count)
    assert_near(found.sum_squares_F, expected.squares_F, sizes.squares_F, count)
    assert_near(float(found.energy), expected.energy, sizes.energy, count * NUM_OUTPUTS)
    if found.any_gram is not None:
        assert_near(found.gram.full(), expected.gram_FF, sizes.gram_FF, count)
    assert found.cross_FH is not None and sizes.cross_FH is not None
    assert_near(found.cross_FH, expected.cross_FH, sizes.cross_FH, count)


@FEW
@given(example=drawn(dtypes=BOTH), sizes=st.sampled_from([1, 7, 40]), gram=st.booleans())
def test_sums_are_those_of_the_formulae(example: Drawn, sizes: int, gram: bool) -> None:
    x_TF, y_TH, drift_TH = example.x_TF, example.other(NUM_OUTPUTS), example.other(NUM_OUTPUTS, 2)
    found = sums_of(x_TF, y_TH, drift_TH, sizes, gram=gram)
    assert (found.any_gram is not None) == gram
    sums, sizes_of_terms = domain_sums(x_TF, y_TH, drift_TH), domain_sums(x_TF.abs(), y_TH.abs(), drift_TH.abs())
    assert_sums(found, sums, sizes_of_terms, example.num_tokens)
    mean, square = sums.inputs_F / sums.mass, sums.squares_F / sums.mass
    assert_near(found.mean_F, mean, sizes_of_terms.inputs_F / sums.mass, example.num_tokens)
    assert_near(found.mean_square_F, square, square, example.num_tokens)
    # The difference of two numbers that each err so much.
    assert_near(found.variance_F, square - mean.square(), 3 * square, example.num_tokens)
    assert bool((found.variance_F >= 0).all())


@pytest.mark.parametrize("dtype", BOTH)
def test_pieces_of_tokens_and_rows_lose_nothing(dtype: torch.dtype) -> None:
    example = Drawn(3, 50, 37, ("dead", "loud"), dtype)
    parts = example.x_TF, example.other(NUM_OUTPUTS), example.other(NUM_OUTPUTS, 2)
    with mock.patch.multiple(product, CPU_PIECE_TOKENS=7, PRODUCT_ROWS=2):
        found = sums_of(*parts, sizes=50)
    assert_sums(found, domain_sums(*parts), domain_sums(*(part.abs() for part in parts)), 50)


@FEW
@given(examples=st.lists(drawn(channels=(6, 6)), min_size=1, max_size=4), silent=st.booleans())
def test_pooling_is_the_sum_of_weighted_domains(examples: list[Drawn], silent: bool) -> None:
    domains, sums, sizes = {}, [], []
    for number, example in enumerate(examples):
        loudness = 0.0 if silent and number == 0 else 10.0**number
        parts = [loudness * part for part in (example.x_TF, example.other(NUM_OUTPUTS), example.other(NUM_OUTPUTS, 2))]
        domains[str(number)] = sums_of(*parts)
        sums.append(domain_sums(*parts))
        sizes.append(domain_sums(*(part.abs() for part in parts)))
    weights = {name: (number + 1) / 10 for number, name in enumerate(domains)}
    pooled = pool(domains, weights)
    assert pooled.sum_F.dtype == torch.float32
    factors = [domain_factor("energy", weights[name], float(each.energy)) for name, each in domains.items()]
    expected, bounds = (weighted(list(zip(factors, each, strict=True))) for each in (sums, sizes))
    assert_sums(pooled, expected, bounds, 40 + 2 * len(examples))


@pytest.mark.parametrize("name", ["sum_F", "sum_squares_F", "energy", "cross_FH", "gram", "mass"])
def test_clearing_leaves_nothing(name: str) -> None:
    found, _ = drawn_sums(Drawn(1, 10, 4))
    found.clear()
    kept = getattr(found, name)
    assert kept == 0 if name == "mass" else not bool((kept.full() if name == "gram" else kept).any())
    assert not found.mean_F.any() and not found.mean_square_F.any(), "and no division by no token"


def test_sums_over_batches_are_in_float64() -> None:
    """A large sum and then many small ones, which float32 would lose."""
    one, many = torch.full((1, 1), 4096.0), torch.ones(64, 1)
    found = Statistics.empty(1, CPU, gram=True, drift_size=1)
    for x_TF in [one, *[many, many[:1] / 16] * 10]:
        found.update(x_TF, x_TF, x_TF)
    assert found.cross_FH is not None
    expected = 4096.0**2 + 10 * (64 + 1 / 256)
    for sums in (found.gram.full(), found.cross_FH, found.energy, found.sum_squares_F):
        assert float(sums) == expected
    assert float(found.sum_F) == 4096 + 10 * (64 + 1 / 16)


@pytest.mark.parametrize("dtype", BOTH)
def test_the_order_of_batches_and_who_sums_them_does_not_show_in_a_bit(dtype: torch.dtype) -> None:
    example = Drawn(4, 400, 33, (), dtype)
    parts = [part.split(16) for part in (example.x_TF, example.other(NUM_OUTPUTS), example.other(NUM_OUTPUTS, 2))]
    pieces = list(zip(*parts, strict=True))

    def gathered(chosen: list[tuple[torch.Tensor, ...]]) -> Statistics:
        found = Statistics.empty(33, CPU, gram=True, drift_size=NUM_OUTPUTS)
        for piece in chosen:
            found.update(*piece)
        return found

    forth, back, *ranks = (gathered(each) for each in (pieces, pieces[::-1], *(pieces[rank::3] for rank in range(3))))
    ranks[0].merge(ranks[1])
    ranks[0].merge(ranks[2])
    for other in (back, ranks[0]):
        assert forth.gram is not None and other.gram is not None
        assert torch.equal(forth.gram.full(), other.gram.full())
        for name in ("sum_F", "sum_squares_F", "energy"):
            assert torch.equal(getattr(forth, name), getattr(other, name)), name


def test_precision_setting_is_restored() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError), product.exact_product_precision(torch.bfloat16):
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 37])
def test_half_of_a_gram_is_stored_and_the_whole_or_a_part_returned(size: int) -> None:
    x_TF = Drawn(size, 3, size).x_TF
    gram = Gram(size, CPU)
    gram.add_product(x_TF)
    whole = x_TF.double().T @ x_TF.double()
    assert_near(gram.full(), whole, x_TF.abs().double().T @ x_TF.abs().double(), 3)
    assert_near(gram.diagonal(), whole.diagonal(), whole.diagonal(), 3)
    assert sum(block.numel() for block in gram.blocks) <= size * (size + -(-size // 8)) / 2 + size
    found, generator = gram.full(), torch.Generator().manual_seed(size)
    assert float((found - found.T).abs().max()) <= 1e-4 * float(found.abs().max())
    for _ in range(8):  # a part may lie left of the diagonal and right of it
        rows, columns = (torch.rand(size, generator=generator).lt(0.5).nonzero().flatten() for _ in range(2))
        assert torch.equal(gram.part(rows, columns), found[rows][:, columns])


# OBS scores, damage and minimax

narrow_or_wide = st.sampled_from([1, 2, 3])


def hessian_of(example: Drawn, damping: float = 1e-2) -> tuple[Gram, torch.Tensor]:
    gram = Gram(example.num_channels, CPU)
    gram.add_product(example.x_TF)
    return gram, damped_gram(gram, damping)


@FEW
@given(example=drawn(special=("dead", "equal", "constant")), damping=st.sampled_from([1e-4, 1.0]))
def test_damping_adds_to_the_diagonal_alone_and_keeps_it_positive(example: Drawn, damping: float) -> None:
    gram, hessian = hessian_of(example, damping)
    added = hessian - gram.full()
    assert hessian.dtype == torch.float64
    assert torch.equal(added, added.diagonal().diag()) and bool((added.diagonal() > 0).all())
    more = damped_gram(gram, 2 * damping) - gram.full()
    if bool(gram.diagonal().any()):
        torch.testing.assert_close(more, 2 * added, rtol=1e-6, atol=1e-9 * float(gram.diagonal().max()))
    else:
        assert torch.equal(added, torch.eye(example.num_channels, dtype=torch.float64))
    identity = inverse_of(hessian.clone()) @ hessian
    torch.testing.assert_close(identity, torch.eye(len(hessian), dtype=torch.float64), rtol=0, atol=1e-8)


@FEW
@given(
    examples=st.lists(drawn(channels=(12, 12), special=("dead", "constant")), min_size=1, max_size=3, unique=True),
    width=narrow_or_wide,
    silent=st.booleans(),
)
def test_damage_is_that_of_cutting_and_refitting_outright(examples: list[Drawn], width: int, silent: bool) -> None:
    domains, sums, reader = damaged_domains(examples, silent=silent)
    columns_UW = torch.arange(12).view(width, -1).T
    pooled = pool(domains, dict.fromkeys(domains, 1 / len(domains))).gram
    assert pooled is not None
    num_keep = len(columns_UW) // 2
    hessian = damped_gram(pooled, 1e-2)
    scores = removal_scores(reader, hessian, columns_UW).sort().values
    # Otherwise rounding may decide which unit goes.
    assume(float(scores[-num_keep] - scores[-num_keep - 1]) > 1e-3 * float(scores.max()))
    found = removal_damage(domains, pooled, reader, columns_UW, num_keep, 1e-2)
    expected, sizes = cut_damage(sums, hessian, reader, columns_UW, num_keep)
    assert_near(found, expected, sizes, 2 * 12)  # two products over the inputs


def damaged_domains(examples: list[Drawn], *, silent: bool = False):
    """Return domains by name, their sums with the product's Gram, and a reader."""
    reader = Drawn(77, 4, 12).x_TF
    domains, sums = {}, []
    for number, example in enumerate(examples):
        x_TF = (0.0 if silent and number == 0 else 10.0**number) * example.x_TF
        domains[str(number)] = sums_of(x_TF, x_TF @ reader.T, example.other(4))
        gram = domains[str(number)].gram
        assert gram is not None
        own = domain_sums(x_TF, x_TF.double() @ reader.double().T)
        sums.append(Sums(own.mass, own.inputs_F, own.squares_F, own.energy, gram.full()))
    return domains, sums, reader


@FEW
@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6), part=st.sampled_from([0.01, 1 / 3, 0.9]))
def test_the_nearest_weights_above_a_floor(weights: list[float], part: float) -> None:
    weights_D, floor = torch.tensor(weights, dtype=torch.float64), part / len(weights)
    found = _at_least(weights_D, floor)
    torch.testing.assert_close(found, scaled_into(weights_D, floor), rtol=1e-9, atol=1e-12)


# The last step is the best, or the one before.
@pytest.mark.parametrize(("seed", "best"), [(1, 4), (28, 3)])
def test_minimax_takes_the_best_of_five_steps(seed: int, best: int) -> None:
    shares = {"0": 0.2, "1": 0.3, "2": 0.5}
    examples = [Drawn(seed, 4, 12), Drawn(seed + 100, 30, 12), Drawn(seed + 200, 7, 12, ("dead",))]
    domains, sums, reader = damaged_domains(examples)
    columns_UW, weights_D, tried = torch.arange(12)[:, None], torch.tensor(list(shares.values())).double(), []
    weights_D = scaled_into(weights_D, 1 / 9)
    for _ in range(5):
        pooled = pool(domains, dict(zip(shares, weights_D.tolist(), strict=True))).gram
        assert pooled is not None
        errors_D, _ = cut_damage(sums, damped_gram(pooled, 1e-2), reader, columns_UW, 6)
        tried.append((float(errors_D.max()), weights_D))
        weights_D = scaled_into(weights_D * (0.5 * errors_D / errors_D.mean()).exp(), 1 / 9)
    assert [worst for worst, _ in tried].index(min(worst for worst, _ in tried)) == best
    expected = min(tried, key=lambda each: each[0])[1]
    found = minimax_weights(domains, shares, reader, columns_UW, 6, 1e-2)
    assert list(found.values()) == pytest.approx(expected.tolist(), rel=1e-4)


def test_where_nothing_goes_the_shares_stay() -> None:
    domains, _, reader = damaged_domains([Drawn(1, 4, 12), Drawn(2, 30, 12)])
    columns_UW = torch.arange(12)[:, None]
    found = minimax_weights(domains, {"0": 0.2, "1": 0.8}, reader, columns_UW, len(columns_UW), 1e-2)
    assert found == pytest.approx({"0": 0.2, "1": 0.8})


@FEW
@given(scores=st.lists(st.sampled_from([0.0, 1.0, 2.0, -1.0]), min_size=1, max_size=12), data=st.data())
def test_the_highest_scores_stay_and_the_lower_index_wins(scores: list[float], data: st.DataObject) -> None:
    num_keep = data.draw(st.integers(0, len(scores)))
    found = keep_highest(torch.tensor(scores), num_keep).tolist()
    assert found == sorted(sorted(range(len(scores)), key=lambda each: (-scores[each], each))[:num_keep])
