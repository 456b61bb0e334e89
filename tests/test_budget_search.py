"""The search finds better plans of the same size, never worse ones, and leaves the model as it was."""

import copy

import pytest
import torch
from models import tiny_ids, tiny_llama

from secateur.arch import bind, decoder_layers, linear
from secateur.budget import Plan, plan_of
from secateur.budget_curve import curve_plan
from secateur.budget_search import SearchSettings, search_plan
from secateur.level_database import LevelDatabase
from secateur.prices import parameter_prices
from secateur.probe import Probe
from secateur.profile import ProfileSettings, profile
from secateur.walk import make_batches

PROFILE = ProfileSettings("energy", {"prose": 0.5, "code": 0.5}, 1e-4, 16, 16, 0.3, 2, 64)
SEARCH = SearchSettings(seed=0, generations=6, offspring=6, probe_blocks=2)


class Case:
    """A model whose middle layers are almost silent, so that equal widths are far from best; two groups, all levels."""

    def __init__(self, directory) -> None:
        self.model = tiny_llama(num_layers=4)
        with torch.no_grad():
            for layer in self.model.model.layers[1:3]:
                layer.mlp.down_proj.weight *= 0.1
        self.arch = bind(self.model)
        self.groups = self.arch.select(("ffn", "kv_heads"))
        self.prices = parameter_prices(self.arch, self.groups, self.model)
        self.batches = [
            *make_batches("prose", tiny_ids(batch=6, length=40), held_out=False, batch_tokens=80),
            *make_batches("code", tiny_ids(batch=6, length=40, seed=1) % 40, held_out=False, batch_tokens=80),
        ]
        self.database = LevelDatabase(directory)
        self.profiles = profile(self.model, self.arch, self.groups, self.batches, PROFILE, database=self.database)

    def plan_of(self, num_keep) -> Plan:
        return plan_of(self.groups, self.prices, num_keep)

    def equal_plan(self) -> Plan:
        return self.plan_of({key: 64 if key[1] == "ffn" else 2 for key in self.profiles})

    def search(self, start: Plan, settings: SearchSettings = SEARCH, **options) -> Plan:
        return search_plan(
            self.model, self.arch, self.groups, self.prices, self.database, start, self.batches, settings, **options
        )

    def kl(self, plan: Plan) -> dict[str, float]:
        model = copy.deepcopy(self.model)
        probe, layers = Probe(model, self.arch, self.batches, SEARCH.probe_blocks), decoder_layers(model, self.arch)
        for group in self.groups:
            key = (group.layer, group.name)
            self.database.load_into(linear(layers[group.layer], group.reader.module), key, plan.num_keep[key])
        return probe.kl()


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("levels"))


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def test_search_beats_equal_widths_at_no_more_parameters_and_leaves_the_model(case):
    before, start = copy.deepcopy(case.model), case.equal_plan()
    found = case.search(start)
    assert mean(case.kl(found)) < 0.8 * mean(case.kl(start))
    assert found.cost_after <= start.cost_after and found == case.plan_of(found.num_keep)
    assert all(found.num_keep[key] in found_profile.levels for key, found_profile in case.profiles.items())
    for (name, now), then in zip(case.model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then), name


def test_the_same_seed_finds_the_same_plan_and_more_generations_none_worse(case):
    start = case.equal_plan()
    assert case.search(start) == case.search(start)
    plans = [case.search(start, SearchSettings(0, generations, 4, 2)) for generations in (0, 1, 2, 4)]
    rises = [mean(case.kl(plan)) for plan in plans]
    assert plans[0] is start and rises == sorted(rises, reverse=True)


def test_a_start_that_nothing_beats_is_returned_itself(case):
    whole = case.plan_of({key: profile.levels[0] for key, profile in case.profiles.items()})
    assert case.search(whole) is whole


def test_search_does_not_worsen_the_curve_plan(case):
    start = curve_plan(case.groups, case.profiles, case.prices, 0.15)
    found = case.search(start)
    assert mean(case.kl(found)) <= mean(case.kl(start)) and found.cost_after <= start.cost_after


def test_groups_not_given_stay_and_are_measured_whole(case):
    groups = tuple(group for group in case.groups if group.layer != 1)
    whole = {(1, "ffn"): 112, (1, "kv_heads"): 2}
    start = case.plan_of(case.equal_plan().num_keep | whole)
    found = search_plan(case.model, case.arch, groups, case.prices, case.database, start, case.batches, SEARCH)
    assert found.num_keep.items() >= whole.items() and mean(case.kl(found)) < mean(case.kl(start))


def test_a_limited_domain_rises_no_higher_than_at_the_start(case):
    start = case.equal_plan()
    free, rise = case.search(start), case.kl(start)
    for domain in rise:
        limit = (rise[domain] + case.kl(free)[domain]) / 2
        assert case.kl(case.search(start, max_rise={domain: 0.0}))[domain] <= rise[domain]
        assert case.kl(case.search(start, max_rise={domain: limit}))[domain] <= max(limit, rise[domain])


def test_progress_counts_every_offspring(case):
    steps = []
    case.search(case.equal_plan(), SearchSettings(0, 2, 3, 1), progress=lambda *step: steps.append(step))
    assert steps == [("search", done, 6) for done in range(7)]
