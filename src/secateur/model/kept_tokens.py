"""The tokens of a dense model that stay: rows of its embedding and head, ids in its configs.

The tokenizer's own side of it is `model.vocabulary`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import CheckpointError
from secateur.files import json_of
from secateur.model.modules import CausalLM

TOKENS_FILE = "tokens.json"


@dataclass(frozen=True)
class KeptTokens:
    """Token `n` of the pruned model is token `dense_ids[n]` of the dense one, which has more rows.

    `num_dense`: rows of the dense embedding. `dense_ids` ascend, so tokens keep their order.
    """

    dense_ids: tuple[int, ...]
    num_dense: int

    @cached_property
    def new_ids(self) -> list[int | None]:
        """Each dense token's new id; None for those that went."""
        found: list[int | None] = [None] * self.num_dense
        for new, dense in enumerate(self.dense_ids):
            found[dense] = new
        return found

    def write(self, directory: Path) -> None:
        """Write the map from dense ids to new ones as `tokens.json`."""
        content = {"num_dense": self.num_dense, "num_kept": len(self.dense_ids), "new_ids": self.new_ids}
        (directory / TOKENS_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")


def kept_tokens_of(directory: Path) -> KeptTokens | None:
    """Return the map that `directory` holds; None without one. Raises CheckpointError if damaged."""
    path = directory / TOKENS_FILE
    if not path.is_file():
        return None
    try:
        new_ids = json_of(path.read_text(encoding="utf-8"))["new_ids"]
        dense_ids = tuple(dense for dense, new in enumerate(new_ids) if new is not None)
        if [new for new in new_ids if new is not None] != list(range(len(dense_ids))):
            raise ValueError("its new ids do not count up")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); use the file that secateur wrote.") from None
    return KeptTokens(dense_ids, len(new_ids))


@torch.no_grad()
def keep_tokens(model: CausalLM, kept: KeptTokens) -> None:
    """Leave the kept tokens' rows in embedding and head, and give the configs the new ids, in place.

    Tied weights stay tied; a model on the meta device works too. Raises CheckpointError if the
    model has other parameters by token, or its rows are not those that `kept` counts.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding)
    _check_rows(model, embedding, head, kept)
    index = torch.tensor(kept.dense_ids, device=embedding.weight.device)
    was_tied = head is not None and head.weight is embedding.weight
    embedding.weight = _rows_of(embedding.weight, index)
    embedding.num_embeddings = len(kept.dense_ids)
    if embedding.padding_idx is not None:
        embedding.padding_idx = kept.new_ids[embedding.padding_idx]
    if isinstance(head, nn.Linear):
        head.weight = embedding.weight if was_tied else _rows_of(head.weight, index)
        head.bias = None if head.bias is None else _rows_of(head.bias, index)
        head.out_features = len(kept.dense_ids)
    if isinstance(getattr(model, "vocab_size", None), int):
        model.vocab_size = len(kept.dense_ids)
    _renumber(model.config, kept)
    if model.generation_config is not None:
        _renumber(model.generation_config, kept)
    model.config.get_text_config().vocab_size = len(kept.dense_ids)


def _rows_of(parameter: nn.Parameter | torch.Tensor, index: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.index_select(0, index.to(parameter.device)), requires_grad=parameter.requires_grad)


def _check_rows(model: CausalLM, embedding: nn.Embedding, head: nn.Module | None, kept: KeptTokens) -> None:
    num_rows, allowed = embedding.num_embeddings, {id(embedding.weight)}
    allowed |= {id(each) for each in ([] if head is None else head.parameters())}
    others = [name for name, each in model.named_parameters() if num_rows in each.shape and id(each) not in allowed]
    if others:
        raise CheckpointError(
            f"vocabulary: the model has other weights by token than embedding and head ({others[0]}), so tokens "
            "cannot go; leave vocabulary out."
        )
    if num_rows != kept.num_dense:
        raise CheckpointError(
            f"{TOKENS_FILE}: is of a model with {kept.num_dense:,} tokens, and this one has {num_rows:,}; give the "
            "model that was pruned."
        )


def ids_in(config: Any) -> dict[str, Any]:
    """Return the config's keys that hold token ids, with their values, at any depth.

    Such keys end in `_token_id`, `_token_ids` or `_token_index`, or are generation settings that
    hold lists of ids. Negative ids, which name no token, are left as they are.
    """
    return dict(_found(config.to_dict(), ()))


def ids_named_by(model: CausalLM) -> set[int]:
    """Return the ids that the model's config and generation config name."""
    configs = [model.config, *([] if model.generation_config is None else [model.generation_config])]
    return {index for config in configs for value in ids_in(config).values() for index in _numbers(value)}


def _numbers(value: Any) -> Iterable[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value:
            yield from _numbers(each)


def _found(values: dict[str, Any], path: tuple[str, ...]) -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _found(value, (*path, key))
        elif value is not None and _names_ids(key):
            yield ".".join((*path, key)), value


_ENDINGS = ("_token_id", "_token_ids", "_token_index", "_tokens_ids")
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias")


def _names_ids(key: Any) -> bool:
    return isinstance(key, str) and (key.endswith(_ENDINGS) or key in _LISTS)


def _renumber(config: Any, kept: KeptTokens) -> None:
    """Give every id in the config, and in the configs inside it, its new number."""
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and not isinstance(value, type):
            _renumber(value, kept)
        elif value is not None and _names_ids(key):
            setattr(config, key, _renumbered(value, kept, key))


def _renumbered(value: Any, kept: KeptTokens, key: str) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_renumbered(each, kept, key) for each in value)
    if isinstance(value, dict):
        return {_renumbered(one, kept, key): other for one, other in value.items()}
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < kept.num_dense:
        return value
    new = kept.new_ids[value]
    if new is None:
        raise CheckpointError(f"vocabulary: config key '{key}' names token {value}, which is not kept.")
    return new
