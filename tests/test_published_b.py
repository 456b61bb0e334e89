"""ShortGPT, 2SSP, SliceGPT and `preset: paper` of `benchmarks/published`, and how its models are judged."""

import copy
import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_ids, tiny_llama, tiny_qwen2
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "published"))

import judge
import run
import shortgpt
import slicegpt
import table
import two_ssp
from pruned import count_parameters

pytestmark = pytest.mark.slow  # what is compared with, which no user runs

SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_layers": 4, "tied": True}
METHODS = ("shortgpt", "two_ssp", "slicegpt", "slicegpt_tied", "paper")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def one_step(name: str, model: Any) -> int:
    """The parameters of the smallest thing that a method removes."""
    config, layers = model.config, model.model.layers
    channels = 3 * config.hidden_size * len(layers)
    stream = config.vocab_size + count_parameters(layers) // config.hidden_size + 4 * len(layers) * config.hidden_size
    steps = {"shortgpt": count_parameters(layers[0]), "two_ssp": channels, "paper": 8 * channels}
    return steps.get(name, stream)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2])
def test_removes_the_share(name: str, build: Any) -> None:
    """What remains is `1 - share` of all parameters, to half a step, and is what the model holds."""
    model = build(**SIZES)
    total, step = count_parameters(model), one_step(name, model)
    pruned = importlib.import_module(name).prune(model, tiny_ids(batch=4, length=48), 0.25, 0)
    assert pruned.model is model
    assert pruned.num_parameters == count_parameters(model)
    assert abs(total - pruned.num_parameters - 0.25 * total) <= step / 2 + 1
    assert model(tiny_ids()).logits.isfinite().all()


def test_shortgpt_takes_the_layer_that_does_nothing() -> None:
    """A layer whose output is its input has influence 0 and goes; the others compute what they did."""
    model = tiny_llama(**SIZES)
    for linear in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        nn.init.zeros_(linear.weight)
    dense = model(tiny_ids()).logits
    assert abs(float(shortgpt.block_influence(model, tiny_ids())[1])) < 1e-6
    pruned = shortgpt.prune(model, tiny_ids(), 0.15, 0)
    assert pruned.notes == "layers removed: [1]"
    assert model.config.num_hidden_layers == 3
    torch.testing.assert_close(model(tiny_ids()).logits, dense)


def test_2ssp_judges_each_attention_by_the_whole_model() -> None:
    """The loss without an attention, begun at its layer, is that of a whole pass without it."""
    model, ids_T = tiny_llama(**SIZES), tiny_ids()[0]
    found = two_ssp.losses_without(model, ids_T, [2])
    assert sorted(found) == [0, 1, 3]
    for index, loss in found.items():
        without = copy.deepcopy(model)
        without.model.layers[index].self_attn = two_ssp.NoAttention()
        wanted = without(ids_T[None], labels=ids_T[None]).loss
        assert loss == pytest.approx(float(wanted), rel=1e-5)


def test_2ssp_keeps_the_loudest_channels() -> None:
    """Channels whose activation is 0 go first, and with them alone nothing changes."""
    model = tiny_llama(**SIZES)
    for layer in model.model.layers:
        nn.init.zeros_(layer.mlp.up_proj.weight[:48])
    dense, total = model(tiny_ids()).logits, count_parameters(model)
    share = 4 * 48 * 3 * 64 / total
    pruned = two_ssp.prune(model, tiny_ids(), share, 0)
    assert pruned.notes.startswith("144 of 192 channels; attentions removed, in order: []")
    torch.testing.assert_close(model(tiny_ids()).logits, dense)


def centred(model: Any) -> Any:
    """The model with the mean of each embedding taken off, its head as it was."""
    changed = copy.deepcopy(model)
    weight = changed.model.embed_tokens.weight.data
    changed.lm_head.weight = nn.Parameter(weight.clone())
    changed.model.embed_tokens.weight = nn.Parameter(weight - weight.mean(-1, keepdim=True))
    return changed


@pytest.mark.parametrize("tied", [False, True])
def test_slicegpt_without_slicing_is_the_same_function(tied: bool) -> None:
    """At full width only the centred embedding is another."""
    model = tiny_qwen2(**SIZES)
    wanted = centred(model)(tiny_ids()).logits
    slicegpt.fuse_norms(model, tied=tied)
    slicegpt.rotate_and_slice(model, tiny_ids(), 64, tied=tied)
    torch.testing.assert_close(model(tiny_ids()).logits, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_slicegpt_tied_is_the_same_function_with_fewer_parameters() -> None:
    """At one width both give the same logits, unlike the dense model's."""
    models = [tiny_llama(**SIZES) for _ in range(2)]
    dense = models[0](tiny_ids()).logits
    for model, tied in zip(models, (False, True), strict=True):
        slicegpt.fuse_norms(model, tied=tied)
        slicegpt.rotate_and_slice(model, tiny_ids(), 40, tied=tied)
    untied, tied = (model(tiny_ids()).logits for model in models)
    scale = float(untied.abs().max())
    torch.testing.assert_close(tied, untied, rtol=1e-3, atol=1e-4 * scale)
    assert float((untied - dense).abs().max()) > 0.01 * scale
    assert count_parameters(models[1]) < count_parameters(models[0])


def test_answers_are_scored_as_one_by_one() -> None:
    """Answers behind one prompt in one pass have the log-likelihoods of passes of their own."""
    model = tiny_llama(**SIZES)
    prompt, answers = [5, 9, 11, 3], [[7], [8, 2, 90], [4, 4]]
    for answer, (loglik, greedy) in zip(answers, judge.answer_logliks(model, prompt, answers), strict=True):
        log_p = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        rows = log_p[len(prompt) - 1 : len(prompt) + len(answer) - 1]
        assert loglik == pytest.approx(float(rows[range(len(answer)), answer].sum()), rel=1e-5)
        assert greedy == (rows.argmax(-1).tolist() == answer)


def finished(row: str, draw: int, nats: list[float], acc: list[float]) -> list[dict[str, Any]]:
    """The two lines of a row of two domains, the second constant."""
    domains = {"web": nats, "code": [1.0, 1.0], "wikitext2": [math.log(20.0)]}
    facts = {"removed": 0.2, "repair": "none", "notes": "", "prune_seconds": 3.0}
    key = {"row": row, "share": 0.2, "draw": draw}
    return [key | {"part": "text", "nats": domains} | facts, key | {"part": "tasks", "tasks": {"piqa": {"acc": acc}}}]


def test_table_compares_block_by_block() -> None:
    """A row that is worse by the same amount on each block is worse by that amount without error."""
    ours, theirs = [[2.0, 4.0], [3.0, 9.0]], [[2.5, 4.5], [3.5, 9.5]]
    lines = [line for draw, nats in enumerate(ours) for line in finished("secateur", draw, nats, [1.0, 0.0])]
    lines += [line for draw, nats in enumerate(theirs) for line in finished("wanda_sp", draw, nats, [1.0, 1.0])]
    printed = table.markdown(lines)
    row = next(text for text in printed.splitlines() if text.startswith("| Wanda-sp |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # Mean of the domains' means, (5 + 1) / 2; the error is half of web's: sqrt(38 / 3 / 4) / 2 of 2.5, 4.5, 3.5, 9.5.
    error = math.sqrt(sum((x - 5) ** 2 for x in (2.5, 4.5, 3.5, 9.5)) / 3 / 4) / 2
    assert cells[1:7] == ["20.0%", "none", "2", f"3.000 ± {error:.3f}", "+0.250 ± 0.000", "20"]
    assert cells[7:] == ["1.000 ± 0.000", "1.000 ± 0.000", "3"]


def test_only_the_tables_of_a_page_change(tmp_path: Path) -> None:
    """What is between the comments is replaced, twice too; what is around them stays."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n{run.BEGIN}\nold\n{run.END}\nafter\n", encoding="utf-8")
    for tables in ("first", "second"):
        run.write_into(page, tables)
    assert page.read_text(encoding="utf-8") == f"before\n{run.BEGIN}\n\nsecond\n\n{run.END}\nafter\n"


def test_finished_rows_are_read_without_a_torn_line(tmp_path: Path) -> None:
    """A run that was killed in the middle of a line does that row again."""
    assert run.read_lines(tmp_path) == []
    (tmp_path / run.LINES).write_text('{"row": "flap"}\n{"row": "wan', encoding="utf-8")
    assert run.read_lines(tmp_path) == [{"row": "flap"}]
