"""Which model types can be pruned: every causal LM and image-text type of the installed transformers.

    python benchmarks/families.py [--only TYPE ...] [--page docs/families.md]

Of each type a tiny random model is made from transformers' own default config. Every group that
`secateur.model.bind` offers is cut by a fifth, saved, and reloaded by stock transformers; the logits must
be those of the model with silent units. So must the tokens that it generates with the type's own cache,
where the model with silent units generates any. The walk must give what the forward pass gives. `--page`
writes the tables into the page, between its two marks; with `--only`, the other rows stay. About six
minutes on two cores. Three types of images need the packages timm and torchvision.
"""

import argparse
import copy
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context
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

from secateur.model.bind import Arch, bind, decoder_layers, head_of, places
from secateur.model.group import Group, cut
from secateur.model.guesses import Unrouted, silence, some_units
from secateur.model.per_layer import record_widths
from secateur.model.stock import quiet_transformers
from secateur.model.twin import run, token_ids, twins
from secateur.stream.losses import states_for_head
from secateur.stream.walk import Walk, make_batches

KINDS: dict[str, tuple[Any, Any]] = {
    "causal language models": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "models that read images": (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
}
MARKS = "<!-- types: made by benchmarks/families.py -->", "<!-- end of types -->"
SECONDS = 240
MOST_SIZES = 8
SHARE = 0.2
CLOSE = 2e-5
NEW_TOKENS = 6

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = ROPE | {"mrope_section": [16, 24, 24]}
INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
}
# What transformers' default config of a type leaves out, so that not even transformers can run it.
DEFAULTS: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},  # what it switches to for a short text
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "deepseek_v2": {
        "num_experts_per_tok": 6,
        "n_routed_experts": 64,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
    },
    "dots1": {
        "n_routed_experts": 64,
        "n_shared_experts": 1,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 8, "moe_topk": 2},
    "hunyuan_vl": {"text_config": {"head_dim": 128, "rope_parameters": ROPE | {"mrope_section": [16, 16, 16, 16]}}},
    "aya_vision": {
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_attention_heads": 16}
    },
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}},
    "glm4v_moe": {"text_config": {"head_dim": 128}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "4/8"},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 31, "num_experts_per_tok": 6},
        "vision_config": {"sam_config": {"downsample_channels": [512, 896]}},
    },
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 704}},
    "vision-encoder-decoder": {
        "encoder": {"model_type": "vit"},
        "decoder": {"model_type": "trocr"},  # as in TrOCR
    },
    "perception_lm": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {"embed_dim": 1024, "img_size": [448, 448], "depth": 23, "global_pool": ""},
        },
    },
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "step3p7": {"text_config": {"sliding_window": 512}},
    "qwen2_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen2_5_omni_thinker": {"text_config": {"rope_parameters": MROPE}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": ROPE}}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "nemotron": {"num_key_value_heads": 8},
}
# Why a type cannot be pruned, where the error is transformers' own.
REASONS = (
    ("timm library", "needs the package timm"),
    ("Input language unknown", "needs a language to be set"),
    ("is_decoder=True", "its default config is no decoder"),
    ("can be run to try cuts on", "its default config does not run, made small"),
    ("integer modulo by zero", "its default config does not run, made small"),
    ("has no head", "its class has no head"),
    ("also says the size", "its config key says another width, too"),
    ("no key of the config", "no config key says its width"),
    ("loaded again", "reloaded, it is not what was cut"),
    ("how its stacks are read", "its experts are stacked in another way"),
    ("saved and loaded tensors differ", "transformers does not read what it writes"),
    ("Unrecognized configuration class", "transformers has no such class of it"),
    ("Exactly 1 of pixel_values", "it runs with a picture alone"),
    ("cannot be None", "it drafts for another model"),
    ("Bbox is required", "it needs places of words"),
    ("tie_weights_keys", "its layers share weights"),
    ("stand alone", "no channels that stand alone in its layers"),
)


FEW_WORDS = {
    "StrictDataclassClassValidationError": "its own class refuses its default config",
    "IndexError": "its default config lacks what it reads",
    "NotImplementedError": "transformers does not name its embedding",
    "AttributeError": "its default config lacks what it reads",
    "TypeError": "its default config lacks what it reads",
}


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


def tiny(model_type: str, auto: Any) -> Iterator[Any]:
    """Yield tiny random models of the type, of several sizes, from transformers' default config."""
    with torch.device("meta"):
        model = auto.from_config(CONFIG_MAPPING[model_type](**DEFAULTS.get(model_type, {})))
    layers = list(model.get_submodule(places(model)[1]).children())
    kinds = [str([(name, each.shape) for name, each in layer.named_parameters()]) for layer in layers]
    deepest = max(kinds.index(kind) for kind in kinds)
    return twins(type(model), model.config, sum(each.numel() for each in model.parameters()), max(2, deepest + 1))


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


def check_groups(model: Any, names: tuple[str, ...], auto: Any) -> None:
    """Cut a fifth of the groups, save, reload by stock transformers; raise ValueError if it is not the mask."""
    whole, masked = copy.deepcopy(model), copy.deepcopy(model)
    arch, unrouted = bind(whole), []
    bind(masked)
    for group in arch.select(names):
        keep = some_units(group, kept(group))
        silent, layer = (decoder_layers(each, arch)[group.layer] for each in (masked, whole))
        unrouted += silence(silent, group, keep)
        cut(layer, group, keep)
    record_widths(whole, arch)
    with Unrouted(unrouted):
        expected = run(masked)
        continued = generated(masked)
    if torch.allclose(expected, run(model), atol=1e-6):
        raise ValueError("silent units change nothing")
    with tempfile.TemporaryDirectory() as directory, quiet_transformers():
        whole.save_pretrained(directory)
        is_known = type(whole.config) in auto._model_mapping
        loader = auto if is_known else type(whole)  # a text part alone may have no class of its own
        reloaded, info = loader.from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    if any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise ValueError("saved and loaded tensors differ")
    difference = (run(reloaded.eval()) - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    if not difference <= CLOSE:
        raise ValueError(f"reloaded logits differ by {difference:.1e}")
    if continued is not None and not torch.equal(generated(reloaded), continued):
        raise ValueError("reloaded, it generates other tokens")


def generated(model: Any) -> Any:
    """Return greedy tokens behind a text, written with the model's cache; None if the type does not generate."""
    ids = token_ids(model)[:1]
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": True}
    try:
        return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    except Exception:  # transformers' own, of a model that nothing was cut from
        return None


def kept(group: Group) -> int:
    """Return how many units stay: four fifths, as near as the group allows."""
    counts = [count for count in range(1, group.num_units) if group.allows(count)]
    return min(counts, key=lambda count: abs(count - (1 - SHARE) * group.num_units))


def tried(model_type: str, kind: str) -> tuple[tuple[str, ...], str]:
    """Return the groups that hold, and why there are none or not all."""
    auto = KINDS[kind][0]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        with at_most(SECONDS), quiet_transformers():
            for model in islice(tiny(model_type, auto), MOST_SIZES):
                arch = bind(model)
                names = tuple(dict.fromkeys(group.name for group in arch.groups if group.num_units > 1))
                if not names:
                    return (), why_none(arch)
                check_walk(model, arch)
                held, problems = _held(model, names, auto)
                if held:  # else transformers may not read what it writes of a model of these sizes
                    break
            return held, problems[-1] if problems else ""
    except Exception as error:  # a row of the table, whatever fails
        return (), reason(error)


def _held(model: Any, names: tuple[str, ...], auto: Any) -> tuple[tuple[str, ...], list[str]]:
    """Return the groups that hold, tried together where they do not cut the same, else alone."""
    together = tuple(name for name in names if name not in ("query_heads", "expert_ffn"))
    try:
        check_groups(model, together, auto)
        held = list(together)
    except Exception:
        held = []
    problems = []
    for name in (name for name in names if name not in held):
        try:
            check_groups(model, (name,), auto)
            held.append(name)
        except Exception as error:
            problems.append(reason(error))
    return tuple(name for name in names if name in held), problems


def why_none(arch: Arch) -> str:
    """Return why nothing can be cut: what is wrong with the FFN or the experts."""
    reasons = [arch.omits[name] for name in ("ffn", "experts", "shared") if name in arch.omits]
    return in_few_words(reasons[0]) if reasons else "no FFN and no experts in its layers"


def in_few_words(text: str) -> str:
    """Return a reason in at most eight words."""
    return next((words for part, words in REASONS if part in text), " ".join(text.split()[:8]))


def reason(error: Exception) -> str:
    """Return the error in a few words."""
    text = " ".join(str(error).split())
    if any(part in text for part, _ in REASONS):
        return in_few_words(text)
    if "layer by layer: " in text:
        return text.partition("layer by layer: ")[2].rstrip(".")
    return FEW_WORDS.get(type(error).__name__, f"{type(error).__name__}: {text}")


def table(rows: dict[str, tuple[tuple[str, ...], str]]) -> list[str]:
    """Return a table of model types."""
    lines = ["| `model_type` | groups | if none, why |", "|---|---|---|"]
    for model_type, (groups, why) in sorted(rows.items()):
        lines.append(f"| `{model_type}` | {', '.join(groups)} | {'' if groups else why} |")
    return lines


def rows_in(page: str, kind: str) -> dict[str, tuple[tuple[str, ...], str]]:
    """Return the table of that kind as a page has it, for types that are not tried again."""
    section = page.partition(f"### {kind.capitalize()}")[2].partition("###")[0].partition(MARKS[1])[0]
    cells = [[each.strip() for each in line.split("|")] for line in section.splitlines()[4:] if line.startswith("| `")]
    return {name.strip("`"): (tuple(filter(None, groups.split(", "))), why) for _, name, groups, why, _ in cells}


def wide(rows: dict[str, tuple[tuple[str, ...], str]]) -> int:
    """Return how many types lose more than heads."""
    return sum(any(not name.endswith("heads") for name in groups) for groups, _ in rows.values())


def main() -> int:
    """Try every type; print a line each, and write the page."""
    parser = argparse.ArgumentParser(description="Try every model type of the installed transformers.")
    parser.add_argument("--only", nargs="+", default=[], metavar="TYPE")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    page = options.page.read_text(encoding="utf-8") if options.page else ""
    lines: list[str] = []
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    started = time.perf_counter()
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        for kind, (_, names) in KINDS.items():
            chosen = [name for name in names if name in options.only or not options.only]
            rows = {}
            for name, row in zip(chosen, pool.map(tried, chosen, [kind] * len(chosen)), strict=True):
                rows[name] = row
                print(f"{name:26} {' '.join(row[0])}  {row[1]}", flush=True)
            print(f"{kind}: {wide(rows)} of {len(rows)}, {time.perf_counter() - started:.0f} s in all", flush=True)
            rows = (rows_in(page, kind) | rows) if options.only else rows
            title = f"### {kind.capitalize()}: {wide(rows)} of {len(rows)} lose FFN channels or experts"
            lines += ["", title, "", *table(rows)]
    runs = ", in several runs" if options.only else f" in {time.perf_counter() - started:.0f} seconds"
    lines[:0] = [f"Made with transformers {transformers.__version__} at {commit.stdout.strip()}{runs}."]
    if options.page:
        before, rest = page.split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        options.page.write_text(before + "\n".join([MARKS[0], "", *lines, "", MARKS[1]]) + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
