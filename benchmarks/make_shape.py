"""Write a sharded checkpoint of random bfloat16 weights in the shape of a known model.

Weights are normal with standard deviation 0.02, norms 1. At most one shard is in memory at a time.
The tokenizer is that of `--tokenizer` (any local model).

    python benchmarks/make_shape.py qwen2.5-7b OUT [--layers 28] [--tokenizer smollm2-135m]
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config

from secateur.model.checkpoint import load_tokenizer, meta_model, open_checkpoint

SHAPES = {
    "qwen2.5-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "qwen2.5-32b": {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "qwen2.5-0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "small": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
SHARD_BYTES = 4_000_000_000


def write_shape(shape: str, out: Path, num_layers: int | None = None, tokenizer: str = "smollm2-135m") -> None:
    """Write the checkpoint into `out`, which must not exist."""
    out.mkdir(parents=True)
    sizes = SHAPES[shape] | ({"num_hidden_layers": num_layers} if num_layers else {})
    config = Qwen2Config(**sizes, max_position_embeddings=4096, dtype="bfloat16", architectures=["Qwen2ForCausalLM"])
    config.save_pretrained(out)
    load_tokenizer(open_checkpoint(tokenizer)).save_pretrained(out)
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    num_shards, shard_of, total = 0, {}, 0
    for name, parameter in meta_model(config).named_parameters():
        held = sum(tensor.nbytes for tensor in shards[0].values())
        if held and held + parameter.nbytes > SHARD_BYTES:
            num_shards = _write(out, shards.pop(), num_shards, shard_of)
            shards.append({})
        shards[0][name] = _random(name, parameter.shape, generator)
        total += parameter.nbytes
    _write(out, shards.pop(), num_shards, shard_of)
    index = {"metadata": {"total_size": total}, "weight_map": shard_of}
    (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    print(f"{total / 1e9:.2f} GB in {num_shards + 1} files: {out}")


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def _write(out: Path, shard: dict[str, torch.Tensor], number: int, shard_of: dict[str, str]) -> int:
    file = f"model-{number + 1:05}.safetensors"
    save_file(shard, out / file, metadata={"format": "pt"})
    shard_of |= dict.fromkeys(shard, file)
    return number + 1


def main() -> None:
    """Write the checkpoint named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokenizer", default="smollm2-135m")
    options = parser.parse_args()
    write_shape(options.shape, options.out, options.layers, options.tokenizer)


if __name__ == "__main__":
    main()
