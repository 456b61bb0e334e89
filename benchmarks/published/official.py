"""Holds the published methods against their authors' code, on a small random Llama.

    python benchmarks/published/official.py --flap CLONE --llm-pruner CLONE

CLONE: a checkout of CASIA-IVA-Lab/FLAP (also Wanda-sp) or of horseee/LLM-Pruner. Their functions
are imported from there and run on the CPU. GISP has no checkout here: its scores and threshold are
held against the formulae of its paper and code, in float64. Prints, for each method, the largest
relative difference of the scores, whether the kept sets are equal, and of the logits afterwards.
"""

import argparse
import copy
import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import flap
import gisp
import llm_pruner
import torch
import wanda_sp
from gradients import accumulate
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from uniform import Uniform
from units import cut, cut_channels, cut_heads, heads_of, keep_count, layers_of

RATIO, NUM_ROWS, LENGTH = 0.4, 24, 32


def small_config(head_dim: int, num_groups: int) -> LlamaConfig:
    """Four layers of four heads; the code of FLAP knows heads of 128 only."""
    return LlamaConfig(
        hidden_size=4 * head_dim,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=num_groups,
        vocab_size=97,
        max_position_embeddings=64,
        pad_token_id=0,
        attn_implementation="eager",
    )


def tokens() -> Tensor:
    """The rows of calibration."""
    return torch.randint(1, 97, (NUM_ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest of `theirs`."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def report(name: str, scores: float, equal: bool, logits: float) -> None:
    """One line of the result."""
    print(f"{name:28} scores {scores:.1e}  kept sets {'equal' if equal else 'DIFFER'}  logits {logits:.1e}")


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    """The logits of the rows of calibration."""
    return model(tokens(), use_cache=False).logits


@contextmanager
def flap_on_cpu(clone: Path, sorted_: list[Tensor], masks: list[Tensor]) -> Iterator[types.ModuleType]:
    """The authors' `lib.prune`, on the CPU in float32; notes what it sorts and the masks it cuts by."""
    sys.path.insert(0, str(clone))
    theirs = importlib.import_module("lib.prune")
    sort, compress = torch.sort, theirs.compress

    def noting_sort(values: Tensor, **options: Any) -> Any:
        sorted_.append(values.clone())
        return sort(values, **options)

    def noting_compress(
        layer: nn.Module, heads: Tensor | None, channels: Tensor | None, *rest: Any, **options: Any
    ) -> None:
        masks.append(heads if heads is not None else channels)
        compress(layer, heads, channels, *rest, **options)

    loader = [(row[None], None) for row in tokens()]
    with (
        mock.patch.object(theirs, "get_loaders", lambda *_, **__: (loader, None)),
        mock.patch.object(theirs, "compress", noting_compress),
        mock.patch.object(torch, "sort", noting_sort),
        mock.patch.object(torch, "half", torch.float32),
        mock.patch.object(torch.Tensor, "cuda", lambda self: self),
    ):
        yield theirs


def flap_models(clone: Path) -> tuple[nn.Module, PreTrainedModel]:
    """One random model, as the authors' class and as the stock one."""
    sys.path.insert(0, str(clone))
    theirs_type = importlib.import_module("models.hf_llama.modeling_llama").LlamaForCausalLM
    torch.manual_seed(0)
    theirs = theirs_type(small_config(128, 4)).eval()
    theirs.seqlen = LENGTH
    for layer in theirs.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            nn.init.zeros_(linear.bias)
    ours = LlamaForCausalLM(small_config(128, 4)).eval()
    missing, _ = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing, missing
    return theirs, ours


def check_flap(clone: Path) -> None:
    """Scores, kept sets and the result with biases of AL-AM with WIFV."""
    theirs, ours = flap_models(clone)
    attention, ffn = flap.measure(ours, tokens())
    scores_LH, scores_LC = flap.scores(attention, ffn, heads_of(ours).dim)
    arguments = types.SimpleNamespace(
        nsamples=NUM_ROWS, seed=0, metrics="WIFV", structure="AL-AM", pruning_ratio=RATIO, unstr=False
    )
    sorted_: list[Tensor] = []
    masks: list[Tensor] = []
    with flap_on_cpu(clone, sorted_, masks) as code:
        code.prune_flap(arguments, theirs, None, torch.device("cpu"))
    heads_LH, channels_LC = torch.stack(masks[::2]), torch.stack(masks[1::2])
    kept = keep_count(scores_LH, scores_LC, int((~heads_LH).sum() + (~channels_LC).sum()))
    flap.compensate(ours, kept, attention, ffn)
    cut(ours, kept)
    report(
        "FLAP (AL-AM, WIFV)",
        difference(torch.cat([scores_LH.flatten(), scores_LC.flatten()]), sorted_[0]),
        torch.equal(kept.heads, heads_LH) and torch.equal(kept.channels, channels_LC),
        difference(logits_of(ours), logits_of(theirs)),
    )


def check_wanda_sp(clone: Path) -> None:
    """Scores, kept sets and the result, each layer on the pruned stream."""
    theirs, ours = flap_models(clone)
    arguments = types.SimpleNamespace(nsamples=NUM_ROWS, seed=0, pruning_ratio=RATIO, unstr=False)
    their_scores: list[Tensor] = []
    their_masks: list[Tensor] = []
    with flap_on_cpu(clone, their_scores, their_masks) as code:
        code.prune_wanda_sp(arguments, theirs, None, torch.device("cpu"))
    our_scores: list[Tensor] = []
    our_masks: list[Tensor] = []

    def noting(scores: Tensor, num: int) -> Tensor:
        our_scores.append(scores)
        our_masks.append(scores >= scores.sort().values[num])
        return our_masks[-1]

    with mock.patch.object(wanda_sp, "without_lowest", noting):
        wanda_sp.prune_layers(ours, tokens(), Uniform(int(RATIO * 4), int(RATIO * 96)))
    report(
        "Wanda-sp",
        max(difference(*pair) for pair in zip(our_scores, their_scores, strict=True)),
        all(torch.equal(*pair) for pair in zip(our_masks, their_masks, strict=True)),
        difference(logits_of(ours), logits_of(theirs)),
    )


def llm_pruner_code(clone: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """The authors' `torch_pruning` and importances, without the models of other families."""
    for name in ("", ".models", ".pruner"):
        package = types.ModuleType("LLMPruner" + name)
        package.__path__ = [str(clone / ("LLMPruner" + name).replace(".", "/"))]
        sys.modules["LLMPruner" + name] = package
    graph = importlib.import_module("LLMPruner.torch_pruning")
    sys.modules["LLMPruner"].torch_pruning = graph
    return graph, importlib.import_module("LLMPruner.pruner.hf_llama_pruner")


def their_llm_pruner(clone: Path, model: PreTrainedModel, pruned: range) -> list[Tensor]:
    """Prunes `model` by the authors' script's settings; the scores, head width by head width."""
    graph, code = llm_pruner_code(clone)
    seen: list[Tensor] = []
    heads, layers = heads_of(model), layers_of(model)
    root = "q_proj" if heads.groups == heads.num else "k_proj"

    class Noting(code.TaylorImportance):
        def __call__(self, *arguments: Any, **options: Any) -> Tensor:
            seen.append(super().__call__(*arguments, **options))
            return seen[-1]

    accumulate(model, tokens())
    model.requires_grad_(True)
    pruner = graph.pruner.MetaPruner(
        model,
        tokens()[:2, :8],
        forward_fn=lambda module, ids: module(ids, use_cache=False).logits,
        importance=Noting(group_reduction="sum", taylor="param_first"),
        ch_sparsity=RATIO + 0.15,  # So that at least one of two key/value heads goes.
        ignored_layers=[],
        channel_groups={},
        consecutive_groups={getattr(layer.self_attn, root): heads.dim for layer in layers},
        customized_pruners={LlamaRMSNorm: code.hf_rmsnorm_pruner},
        root_module_types=None,
        root_instances=[getattr(layers[i].self_attn, root) for i in pruned] + [layers[i].mlp.gate_proj for i in pruned],
    )
    pruner.step()
    return seen


def check_llm_pruner(clone: Path, num_groups: int) -> None:
    """Scores, kept sets and the result of Taylor `param_first`, two of four layers."""
    torch.manual_seed(0)
    ours = LlamaForCausalLM(small_config(8, num_groups)).eval()
    theirs, pruned, heads, ratio = copy.deepcopy(ours), range(1, 3), heads_of(ours), RATIO + 0.15
    accumulate(ours, tokens())
    our_scores, expected = [], copy.deepcopy(ours)
    for index in pruned:
        layer, target = layers_of(ours)[index], layers_of(expected)[index]
        groups, channels = llm_pruner.group_scores(layer.self_attn, heads), llm_pruner.channel_scores(layer.mlp)
        our_scores += [groups, channels]
        keep_G = llm_pruner.without_lowest(groups, int(ratio * heads.groups))
        cut_heads(target, keep_G.repeat_interleave(heads.num // heads.groups), heads)
        cut_channels(target.mlp, llm_pruner.without_lowest(channels, 96 - int(96 * (1 - ratio))))
    their_scores = their_llm_pruner(clone, theirs, pruned)
    their_scores = [part.view(-1, heads.dim).sum(1) if part.numel() < 96 else part for part in their_scores]
    pairs = list(zip(expected.parameters(), theirs.parameters(), strict=True))
    equal = all(ours_.shape == theirs_.shape and torch.equal(ours_, theirs_) for ours_, theirs_ in pairs)
    report(
        f"LLM-Pruner, {num_groups} of 4 KV heads",
        max(difference(*pair) for pair in zip(our_scores, their_scores, strict=True)),
        equal,
        difference(logits_of(expected), logits_of(theirs)) if equal else float("nan"),
    )


def gisp_formulae(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Sum of |w g| over the weights of each unit by the size of its block, from per-row losses."""
    for row in tokens():
        logits = model(row[None], use_cache=False).logits[0, :-1]
        (nn.functional.cross_entropy(logits, row[1:]) / NUM_ROWS).backward()
    dim, heads_LH, channels_LC = heads_of(model).dim, [], []
    grouped = heads_of(model).groups < heads_of(model).num
    for layer in layers_of(model):
        names = ("q_proj",) if grouped else ("q_proj", "k_proj", "v_proj")
        attention, mlp = layer.self_attn, layer.mlp
        for head in range(heads_of(model).num):
            span = slice(head * dim, (head + 1) * dim)
            total = sum(product(getattr(attention, name).weight)[span].sum() for name in names)
            total = total + product(attention.o_proj.weight)[:, span].sum()
            heads_LH.append(total / (4 * dim * model.config.hidden_size))
        for channel in range(model.config.intermediate_size):
            total = product(mlp.up_proj.weight)[channel].sum() + product(mlp.gate_proj.weight)[channel].sum()
            total = total + product(mlp.down_proj.weight)[:, channel].sum()
            channels_LC.append(total / (3 * model.config.intermediate_size))
    return torch.stack(heads_LH), torch.stack(channels_LC)


def product(weight: Tensor) -> Tensor:
    """|w g| of every weight."""
    return (weight.detach() * weight.grad).abs()


def check_gisp(num_groups: int) -> None:
    """Scores of the dense model, and which units are gone after three steps of 5%."""
    torch.manual_seed(0)
    ours = LlamaForCausalLM(small_config(8, num_groups)).eval()
    exact = copy.deepcopy(ours).double()
    num_layers, num_units = len(layers_of(ours)), 4 * (4 + 96)
    accumulate(ours, tokens())
    ours_LU = torch.cat([part[:-1].flatten() for part in gisp.scores(ours)])
    theirs_LH, theirs_LC = (part.view(num_layers, -1) for part in gisp_formulae(exact))
    scores = difference(ours_LU, torch.cat([theirs_LH[:-1].flatten(), theirs_LC[:-1].flatten()]))
    exact.zero_grad()
    ours.zero_grad()
    equal, step = True, 0.05
    for index in range(3):
        accumulate(ours, tokens())
        kept = keep_count(*gisp.scores(ours), gisp.num_at(index, num_units, step))
        exact.zero_grad()
        flat = torch.cat([part.view(num_layers, -1).clone().flatten() for part in gisp_formulae(exact)])
        last = torch.zeros(num_units, dtype=torch.bool)
        last[num_layers * 4 - 4 : num_layers * 4] = last[num_units - 96 :] = True
        flat[last] = torch.inf
        threshold = torch.kthvalue(flat, num_units - int(num_units * (1 - index * step)) + 1).values
        expected = flat > threshold
        equal &= torch.equal(torch.cat([kept.heads.flatten(), kept.channels.flatten()]), expected)
        gisp.zero(ours, kept)
        gisp.zero(exact, kept)
    report(f"GISP, {num_groups} of 4 KV heads", scores, equal, difference(logits_of(ours).double(), logits_of(exact)))


def main() -> None:
    """Every check for which there is a checkout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flap", type=Path, help="a checkout of CASIA-IVA-Lab/FLAP")
    parser.add_argument("--llm-pruner", type=Path, help="a checkout of horseee/LLM-Pruner")
    arguments = parser.parse_args()
    if arguments.flap:
        check_flap(arguments.flap)
        check_wanda_sp(arguments.flap)
    for num_groups in (4, 2):
        if arguments.llm_pruner:
            check_llm_pruner(arguments.llm_pruner, num_groups)
        check_gisp(num_groups)


if __name__ == "__main__":
    main()
