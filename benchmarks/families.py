"""Which model types can be pruned: every causal LM and image-text type of the installed transformers.

    python benchmarks/families.py [--only TYPE ...] [--page docs/families.md]

Of each type a tiny random model is made from transformers' own default config. Every group that
`secateur.model.bind` offers is cut by a fifth, saved, and reloaded by stock transformers; the logits must
be those of the model with silent units. The walk must give what the forward pass gives. `--page` writes
the tables into the page, between its two marks. About 15 minutes on two cores.
"""

import argparse
import copy
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from secateur.model.bind import Arch, bind, decoder_layers, head_of
from secateur.model.config import quiet_transformers
from secateur.model.group import Group
from secateur.model.guesses import Unrouted, close_to, mask, remove, some_units
from secateur.model.per_layer import record_widths
from secateur.model.structure import places
from secateur.model.twin import run, token_ids, twin
from secateur.stream.losses import states_for_head
from secateur.stream.walk import Walk, make_batches

CAUSAL, IMAGES = "causal language models", "models that read images"
MARKS = "<!-- types: made by benchmarks/families.py -->", "<!-- end of types -->"
SECONDS = 240
SHARE = 0.2
CLOSE = 2e-5

# What transformers' default config of a type leaves out, so that not even transformers can run it.
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "num_experts_per_tok": 6,
        "n_routed_experts": 64,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
    },
    "dots1": {"n_routed_experts": 64, "n_shared_experts": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128},
}
# Why a type cannot be pruned, where the error is transformers' own.
REASONS = (
    ("timm library", "needs the package timm"),
    ("Input language unknown", "needs a language to be set"),
    ("is_decoder=True", "its default config is no decoder"),
)


class TooLong(Exception):
    """A type takes more than its seconds."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise TooLong in the block after so many seconds."""

    def stop(*_: Any) -> None:
        raise TooLong(f"takes more than {seconds} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def tiny(model_type: str, auto: Any) -> Any:
    """Return a tiny random model of the type, from transformers' default config."""
    config = CONFIG_MAPPING[model_type](**DEFAULTS.get(model_type, {}))
    with torch.device("meta"):
        model = auto.from_config(config)
    layers = list(model.get_submodule(places(model)[1]).children())
    kinds = [str([(name, each.shape) for name, each in layer.named_parameters()]) for layer in layers]
    deepest = max(kinds.index(kind) for kind in kinds)
    return twin(type(model), config, sum(each.numel() for each in model.parameters()), max(2, deepest + 1))


def check_walk(model: Any, arch: Arch) -> None:
    """Raise ValueError unless the walk gives what the forward pass gives."""
    ids = token_ids(model)
    walk = Walk(model, arch, make_batches("d", ids, held_out=False))
    for index in range(arch.num_layers):
        list(walk.run(index, to_middle=True))
        walk.advance(index)
    with torch.no_grad():
        states = [states_for_head(model, arch, *pair) for pair in zip(walk.batches, walk.hidden_BTD, strict=True)]
        logits = head_of(model, arch)(torch.cat(states))
    if not torch.allclose(logits, run(model)[:, :-1].flatten(0, 1), atol=1e-4, rtol=1e-4):
        raise ValueError("the walk is not the forward pass")


def check_group(model: Any, name: str, auto: Any) -> None:
    """Cut a fifth of the group, save, reload by stock transformers; raise ValueError if it is not the mask."""
    whole, masked = copy.deepcopy(model), copy.deepcopy(model)
    arch, unrouted = bind(whole), []
    bind(masked)
    for group in arch.select((name,)):
        keep = some_units(group, kept(group))
        silent, layer = (decoder_layers(each, arch)[group.layer] for each in (masked, whole))
        if group.kind == "experts":
            unrouted += close_to(silent, group, keep)
        else:
            mask(silent, group, keep)
        remove(layer, group, keep)
    record_widths(whole, arch)
    with Unrouted(unrouted):
        expected = run(masked)
    if torch.allclose(expected, run(model), atol=1e-6):
        raise ValueError(f"{name}: silent units change nothing")
    with tempfile.TemporaryDirectory() as directory, quiet_transformers():
        whole.save_pretrained(directory)
        reloaded, info = auto.from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    if any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise ValueError(f"{name}: saved and loaded tensors differ")
    difference = (run(reloaded.eval()) - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    if not difference <= CLOSE:
        raise ValueError(f"{name}: reloaded logits differ by {difference:.1e}")


def kept(group: Group) -> int:
    """Return how many units stay: four fifths, as near as the group allows."""
    counts = [count for count in range(1, group.num_units) if group.allows(count)]
    return min(counts, key=lambda count: abs(count - (1 - SHARE) * group.num_units))


def tried(model_type: str, auto: Any) -> tuple[tuple[str, ...], str]:
    """Return the groups that hold, and why there are none or not all."""
    problems = []
    try:
        with at_most(SECONDS), quiet_transformers():
            model = tiny(model_type, auto)
            arch = bind(model)
            names = tuple(dict.fromkeys(group.name for group in arch.groups if group.num_units > 1))
            check_walk(model, arch)
            held = []
            for name in names:
                try:
                    check_group(model, name, auto)
                    held.append(name)
                except Exception as error:  # a row of the table, whatever fails
                    problems.append(f"{name}: {reason(error)}")
            return tuple(held), "; ".join(problems) if names else why_none(arch)
    except Exception as error:
        return (), reason(error)


def why_none(arch: Arch) -> str:
    """Return why nothing can be cut: what is wrong with the FFN or the experts."""
    reasons = [arch.omits[name] for name in ("ffn", "experts", "shared") if name in arch.omits]
    return reasons[0] if reasons else "no FFN and no experts in its layers"


def reason(error: Exception) -> str:
    """Return the error in a few words."""
    text = " ".join(str(error).split())
    for part, words in REASONS:
        if part in text:
            return words
    if "layer by layer: " in text:
        return text.partition("layer by layer: ")[2].rstrip(".")
    return f"{type(error).__name__}: {text}"[:160]


def table(rows: dict[str, tuple[tuple[str, ...], str]]) -> list[str]:
    """Return a table of model types."""
    lines = ["| `model_type` | groups | if none, why |", "|---|---|---|"]
    for model_type, (groups, why) in sorted(rows.items()):
        lines.append(f"| `{model_type}` | {', '.join(groups)} | {'' if groups else why} |")
    return lines


def main() -> int:
    """Try every type; print a line each, and write the page."""
    parser = argparse.ArgumentParser(description="Try every model type of the installed transformers.")
    parser.add_argument("--only", nargs="+", default=[], metavar="TYPE")
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    kinds: dict[str, tuple[Any, Any]] = {
        CAUSAL: (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        IMAGES: (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    }
    lines = [f"Made with transformers {transformers.__version__}."]
    started = time.perf_counter()
    for title, (auto, names) in kinds.items():
        rows = {}
        for model_type in names:
            if options.only and model_type not in options.only:
                continue
            began = time.perf_counter()
            rows[model_type] = tried(model_type, auto)
            groups, why = rows[model_type]
            print(f"{model_type:26} {time.perf_counter() - began:5.1f} s  {' '.join(groups)}  {why}", flush=True)
        number = sum(bool(groups) for groups, _ in rows.values())
        print(f"{title}: {number} of {len(rows)}, {time.perf_counter() - started:.0f} s in all", flush=True)
        lines += ["", f"### {title.capitalize()}: {number} of {len(rows)}", "", *table(rows)]
    if options.page:
        before, rest = options.page.read_text(encoding="utf-8").split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        options.page.write_text(before + "\n".join([MARKS[0], "", *lines, "", MARKS[1]]) + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
