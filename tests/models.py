"""Tiny random causal LMs for tests: fp32, grouped queries, biases where the family has them, norms not all ones."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from tiny_tokenizer import tiny_tokenizer

from secateur.facts import Size
from secateur.formats.save import save_checkpoint
from secateur.model.bind import bind
from secateur.model.stock import quiet_transformers
from secateur.pruning.open import Opened
from secateur.pruning.resolve import checked
from secateur.recipe import Recipe

# Within it checkpoints are saved in files of so many bytes.
shards_of = partial(patch, "secateur.formats.save.MAX_SHARD_BYTES")


def opened(model: Any, recipe: Recipe) -> Opened:
    """Return a model in memory, on the meta device too, opened with a recipe that fits it."""
    return checked(Opened(None, model, bind(model), Size.of(model), recipe, model.device))


def _tiny(kind: Any, *, tied: bool = False, num_layers: int = 3, seed: int = 0, norm_mean: float = 1, **values: Any):
    """Return a random model of the class in eval mode; `values` replace those of its config."""
    return randomised(kind(kind.config_class(**sizes(tied, num_layers) | values)), seed, norm_mean)


tiny_llama = partial(_tiny, transformers.LlamaForCausalLM)
tiny_qwen2 = partial(_tiny, transformers.Qwen2ForCausalLM)
tiny_qwen3 = partial(_tiny, transformers.Qwen3ForCausalLM, head_dim=16)
tiny_mistral = partial(_tiny, transformers.MistralForCausalLM, sliding_window=8)
tiny_gemma = partial(_tiny, transformers.GemmaForCausalLM, tied=True, norm_mean=0, head_dim=16)
# Every other layer has a window.
TWO_KINDS = {"query_pre_attn_scalar": 16, "sliding_window": 8, "sliding_window_pattern": 2}
tiny_gemma3 = partial(_tiny, transformers.Gemma3ForCausalLM, tied=True, norm_mean=0, head_dim=16, **TWO_KINDS)


def tiny_ids(*, batch: int = 2, length: int = 16, seed: int = 0, vocab_size: int = 320) -> torch.Tensor:
    """Return random token ids, (batch, length)."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def sizes(tied: bool = False, num_layers: int = 3) -> dict[str, Any]:
    """Return what the config of a tiny model says."""
    layers = {"num_hidden_layers": num_layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 320, "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {"hidden_size": 48, "intermediate_size": 112, "max_position_embeddings": 256, **layers, **tokens}


def randomised(model: Any, seed: int, norm_mean: float = 1) -> Any:
    # Larger than the library's 0.02 initialisation, so that every part of the model moves the logits. Gemma's norms
    # multiply by 1 + weight, so that their weights lie around 0.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(norm_mean + 0.1 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model.eval()


def saved(place: Path, model: Any, tokenizer: Any = None, **options: Any) -> Path:
    """Let transformers write the model with a tokenizer, the tiny one unless another is given; return the directory."""
    with quiet_transformers():
        model.save_pretrained(place, **options)
        (tokenizer or tiny_tokenizer()).save_pretrained(place)
    return place


def written(place: Path, model: Any, tokenizer: Any = None, *, num_bytes: int = 10**9, **options: Any) -> Path:
    """Write them as a run does, in files of so many bytes; return the directory."""
    place.mkdir(exist_ok=True)
    with shards_of(num_bytes):
        save_checkpoint(model, tokenizer or tiny_tokenizer(), place, **{"carry_from": None} | options)
    return place


def num_params(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def logits_of(model: Any, ids_BT: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_ids() if ids_BT is None else ids_BT, use_cache=False).logits
