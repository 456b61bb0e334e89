"""Statistics are sums: one batch equals many, in any order; halves merge to the whole; float32 stays near float64."""

import pytest
import torch

from secateur.stream.statistics import Statistics, domain_weight, exact_product_precision, pool

SIZES = [1, 5, 12, 33]


def gather(batches: list[tuple[torch.Tensor, torch.Tensor]], num_inputs: int) -> Statistics:
    statistics = Statistics.empty(num_inputs, torch.device("cpu"), gram=True)
    for x_TF, y_TH in batches:
        statistics.update(x_TF, y_TH)
    return statistics


def draw(num_inputs: int, num_tokens: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_inputs)
    x_TF = torch.randn(num_tokens, num_inputs, generator=generator) * 3 + 1
    return x_TF, torch.randn(num_tokens, 7, generator=generator)


def assert_same(left: Statistics, right: Statistics) -> None:
    assert left.mass == right.mass
    for name in ("sum_F", "sum_squares_F", "energy"):
        torch.testing.assert_close(getattr(left, name), getattr(right, name), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(left.gram.full(), right.gram.full(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("num_inputs", SIZES)
def test_many_batches_in_any_order_equal_one(num_inputs: int) -> None:
    x_TF, y_TH = draw(num_inputs)
    pieces = list(zip(x_TF.split(17), y_TH.split(17), strict=True))
    whole = gather([(x_TF, y_TH)], num_inputs)
    assert_same(gather(pieces, num_inputs), whole)
    assert_same(gather(pieces[::-1], num_inputs), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_batches_and_who_sums_them_does_not_show_in_a_bit(dtype: torch.dtype) -> None:
    x_TF, y_TH = (part.to(dtype) for part in draw(33, 400))
    pieces = list(zip(x_TF.split(16), y_TH.split(16), strict=True))
    forth, back = gather(pieces, 33), gather(pieces[::-1], 33)
    ranks = [gather(pieces[rank::3], 33) for rank in range(3)]
    ranks[0].merge(ranks[1])
    ranks[0].merge(ranks[2])
    for other in (back, ranks[0]):
        assert torch.equal(forth.gram.full(torch.float64), other.gram.full(torch.float64))
        for name in ("sum_F", "sum_squares_F", "energy"):
            assert torch.equal(getattr(forth, name), getattr(other, name)), name


@pytest.mark.parametrize("num_inputs", SIZES)
def test_halves_merge_to_the_whole(num_inputs: int) -> None:
    x_TF, y_TH = draw(num_inputs)
    merged = gather([(x_TF[:20], y_TH[:20])], num_inputs)
    merged.merge(gather([(x_TF[20:], y_TH[20:])], num_inputs))
    assert_same(merged, gather([(x_TF, y_TH)], num_inputs))


@pytest.mark.parametrize("num_inputs", SIZES)
def test_sums_are_near_float64(num_inputs: int) -> None:
    x_TF, y_TH = draw(num_inputs, 500)
    statistics, x = gather(list(zip(x_TF.split(64), y_TH.split(64), strict=True)), num_inputs), x_TF.double()
    gram = x.T @ x
    scale = gram.diagonal().max()
    assert ((statistics.gram.full().double() - gram).abs().max() / scale) < 1e-5
    torch.testing.assert_close(statistics.mean_F.double(), x.mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics.variance_F.double(), x.var(dim=0, correction=0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(statistics.gram.diagonal(), statistics.sum_squares_F, rtol=1e-5, atol=1e-3)


def test_bfloat16_products_are_exact_but_for_addition_order() -> None:
    x_TF = torch.randn(400, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    statistics = gather([(x_TF, x_TF)], 48)
    gram = x_TF.double().T @ x_TF.double()
    assert (statistics.gram.full().double() - gram).abs().max() / gram.max() < 1e-5


def test_precision_setting_is_restored() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError), exact_product_precision(torch.bfloat16):
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == before


def test_energy_weighting_gives_every_domain_the_same_say() -> None:
    # A power of two scales every product and sum without rounding, so any processor gives equal bits.
    x_TF, y_TH = draw(5)
    loud, quiet = gather([(128 * x_TF, 128 * y_TH)], 5), gather([(x_TF, y_TH)], 5)
    weighted = [domain_weight("energy", 0.5, float(domain.energy)) * domain.sum_squares_F for domain in (loud, quiet)]
    assert torch.equal(*weighted)
    assert domain_weight("tokens", 0.5, 9.0) == domain_weight("tokens", 0.5, 1.0) == 1.0
    assert domain_weight("energy", 0.5, 0.0) == 0.0


def test_pooling_weighs_every_sum_by_share_and_energy() -> None:
    (x_TF, y_TH), by_domain = draw(5), {}
    for name, scale in {"loud": 10.0, "quiet": 1.0}.items():
        by_domain[name] = Statistics.empty(5, torch.device("cpu"), gram=True, drift_size=7)
        by_domain[name].update(scale * x_TF, scale * y_TH, y_TH)
    pooled, quiet = pool(by_domain, {"loud": 0.25, "quiet": 0.75}), by_domain["quiet"]
    assert float(pooled.energy) == pytest.approx(1)
    torch.testing.assert_close(pooled.gram.full(), quiet.gram.full() / quiet.energy)
    for found, summed in ((pooled.sum_F, quiet.sum_F), (pooled.cross_FH, quiet.cross_FH)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, ((0.25 / 10 + 0.75) * summed / quiet.energy).float())


def test_clear_forgets_and_non_finite_shows() -> None:
    x_TF, y_TH = draw(5)
    statistics = gather([(x_TF, y_TH)], 5)
    statistics.clear()
    assert_same(statistics, gather([], 5))
    statistics.update(x_TF.fill_(torch.nan), y_TH)
    assert not statistics.is_finite()


@pytest.mark.parametrize("num_inputs", SIZES)
def test_any_part_of_a_gram_is_that_part_of_the_whole(num_inputs: int) -> None:
    gram = gather([draw(num_inputs)], num_inputs).gram
    generator = torch.Generator().manual_seed(num_inputs)
    for _ in range(8):
        rows, columns = (torch.rand(num_inputs, generator=generator).lt(0.5).nonzero().flatten() for _ in range(2))
        assert torch.equal(gram.part(rows, columns), gram.full()[rows][:, columns])
    # The blocks on the diagonal are multiplied whole, in an order of their own on either side.
    torch.testing.assert_close(gram.full(), gram.full().T, rtol=1e-5, atol=1e-3)
