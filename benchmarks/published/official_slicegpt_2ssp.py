"""Holds SliceGPT, 2SSP and ShortGPT against their authors' code, or formula, on a small random Llama.

    python benchmarks/published/official_slicegpt_2ssp.py --slicegpt CLONE --two-ssp CLONE

CLONE: a checkout of microsoft/TransformerCompression (needs ml_collections) or of
FabrizioSandri/2SSP. Their functions are imported from there and run on the CPU in float32. Both
were written for attentions that return three values and layers that return tuples, so small
wrappers give them those. ShortGPT's authors have published no code: its scores are held against
equation 1 on the hidden states that stock transformers gives. Prints the largest differences.
"""

import argparse
import copy
import importlib
import sys
import types
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import shortgpt
import slicegpt as ours_slicegpt
import torch
import two_ssp
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

SHARE, NUM_BLOCKS, LENGTH = 0.25, 6, 48


def small_model(*, tied: bool) -> LlamaForCausalLM:
    """Six layers of 64 with grouped heads, norms not 1, float32; loud enough that blocks differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data = 1 + 0.2 * torch.randn_like(parameter) if "norm" in name else 0.12 * torch.randn_like(parameter)
    return model


def tokens() -> Tensor:
    """The calibration blocks."""
    return torch.randint(1, 97, (NUM_BLOCKS, LENGTH), generator=torch.Generator().manual_seed(1))


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest of `theirs`."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).abs().max() / theirs.abs().max())


def logits(model: PreTrainedModel) -> Tensor:
    """The model's logits on other tokens than those of calibration."""
    ids = torch.randint(1, 97, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def three_values(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return an attention's forward as it was: output, weights, cache."""

    def forward(self: nn.Module, *args: Any, **keywords: Any) -> tuple[Any, ...]:
        for name in ("past_key_value", "output_attentions"):
            keywords.pop(name, None)
        return (*stock(self, *args, **keywords), None)

    return forward


def official_slicegpt(clone: Path, model: PreTrainedModel, blocks_NT: Tensor, width: int) -> PreTrainedModel:
    """Slice by the authors' code, with the bases of PCA as they are."""
    sys.path.insert(0, str(clone / "src"))
    # Their package's own __init__ imports data sets and tools for GPUs that slicing does not need.
    package = types.ModuleType("slicegpt")
    package.__path__ = [str(clone / "src" / "slicegpt")]
    with mock.patch.dict(sys.modules, {"slicegpt": package}):
        adapter = importlib.import_module("slicegpt.adapters.llama_adapter").LlamaModelAdapter(model)
        fusion = importlib.import_module("slicegpt.layernorm_fusion")
        rotate = importlib.import_module("slicegpt.rotate")
        scheduler = importlib.import_module("slicegpt.slicing_scheduler").ConstSlicingScheduler(width)
        importlib.import_module("slicegpt.config").config.device = torch.device("cpu")
    model.config.torch_dtype = torch.float32
    fusion.replace_layers(adapter, verbose=False)
    fusion.fuse_modules(adapter)
    model.eval()
    batches = [{"input_ids": ids_T[None], "attention_mask": torch.ones_like(ids_T[None])} for ids_T in blocks_NT]
    rotate.rotate_and_slice(adapter, batches, scheduler, final_orientation="pca")
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: output[0])
    return model


def compare_slicegpt(clone: Path) -> None:
    """Print the differences of weights that signs of eigenvectors leave alone, and of logits."""
    forward = three_values(modeling_llama.LlamaAttention.forward)
    for tied in (False, True):
        model, blocks_NT = small_model(tied=tied), tokens()
        width = ours_slicegpt.width_for(model, SHARE, tied=False)
        ours = ours_slicegpt.prune(copy.deepcopy(model), blocks_NT, SHARE, 0).model
        mine = logits(ours)
        with mock.patch.object(modeling_llama.LlamaAttention, "forward", forward):
            theirs = official_slicegpt(clone, copy.deepcopy(model), blocks_NT, width)
            reference = logits(theirs)
        readers = [
            (a.mlp.up_proj.weight, b.mlp.up_proj.weight)
            for a, b in zip(ours.model.layers, theirs.model.layers, strict=True)
        ]
        weights = max(difference(a.abs(), b.abs()) for a, b in readers)
        dense = difference(logits(model), reference)
        sizes = {sum(p.numel() for p in each.parameters()) for each in (ours, theirs)}
        print(
            f"SliceGPT, tied {tied}: {width} of 64 dimensions; |weights| {weights:.1e}, logits "
            f"{difference(mine, reference):.1e} (the dense model's are {dense:.1e} away); parameters {sizes}"
        )


def compare_two_ssp(clone: Path) -> None:
    """Print whether both keep the same, and the difference of logits."""
    sys.path.insert(0, str(clone))
    with mock.patch.dict(sys.modules):
        pruning, utilities = (importlib.import_module(f"src.{name}") for name in ("pruning", "utilities"))
    perplexity = utilities.evaluate_perplexity

    def on_cpu(model: PreTrainedModel, ids_1T: Tensor, **_: Any) -> float:
        return perplexity(model, ids_1T, seq_len=LENGTH, enable_tqdm=False, device="cpu")

    def old_layer(self: Any, hidden_states: Tensor, **keywords: Any) -> Tensor:
        # A masked attention is a function of three values, the first the number 0.
        added = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **keywords)[0]
        hidden_states = hidden_states + added
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    model, blocks_NT = small_model(tied=False), tokens()
    layers: Any = model.model.layers
    share, total = 0.6, sum(p.numel() for p in model.parameters())
    in_layers = sum(p.numel() for p in layers.parameters())
    ours = two_ssp.prune(copy.deepcopy(model), blocks_NT, share, 0)
    theirs = copy.deepcopy(model)
    with (
        mock.patch.object(utilities, "evaluate_perplexity", on_cpu),
        mock.patch.object(modeling_llama.LlamaDecoderLayer, "forward", old_layer),
    ):
        calibration = [ids_T[None] for ids_T in blocks_NT]
        norms = list(zip(*(_states(utilities, theirs, ids) for ids in calibration), strict=True))
        found = [torch.stack(each).mean(0) for each in norms]
        pruning.two_stage_2ssp(theirs, calibration, share * total / in_layers)
        reference = logits(theirs)
    scores = max(difference(a, b) for a, b in zip(two_ssp.activation_norms(model, blocks_NT), found, strict=True))
    removed = [index for index, layer in enumerate(theirs.model.layers) if not hasattr(layer.self_attn, "q_proj")]
    mine = [index for index, layer in enumerate(ours.model.model.layers) if not hasattr(layer.self_attn, "q_proj")]
    print(
        f"2SSP: scores {scores:.1e}; attentions removed {mine}, theirs {removed}; "
        f"logits {difference(logits(ours.model), reference):.1e}; {ours.notes}"
    )


def _states(utilities: Any, model: PreTrainedModel, ids_1T: Tensor) -> list[Tensor]:
    return [states_TF.norm(dim=0, p=2) for states_TF in utilities.get_mlp_hidden_state(model, ids_1T).values()]


def compare_shortgpt() -> None:
    """Print the difference from equation 1, in float64, on stock hidden states."""
    model, blocks_NT = small_model(tied=False).double(), tokens()
    model.model.norm = nn.Identity()  # The last of stock's hidden states is behind it.
    with torch.no_grad():
        states = model(blocks_NT, output_hidden_states=True).hidden_states
    wanted = torch.stack(
        [1 - ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean() for x, y in pairwise(states)]
    )
    found = shortgpt.block_influence(model.float(), blocks_NT)
    print(f"ShortGPT: block influence {difference(found, wanted):.1e} from equation 1; BI {found.tolist()}")


def main() -> None:
    """Compare what clones are given for; ShortGPT always."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slicegpt", type=Path)
    parser.add_argument("--two-ssp", type=Path)
    arguments = parser.parse_args()
    compare_shortgpt()
    if arguments.two_ssp:
        compare_two_ssp(arguments.two_ssp.resolve())
    if arguments.slicegpt:
        compare_slicegpt(arguments.slicegpt.resolve())


if __name__ == "__main__":
    main()
