"""Tokens of the dense model that stay in a result: the map between both (`tokens.json`), and the
model's own side.

That is rows of embedding and head, and ids in the configs; the tokenizer's side is
`vocabulary.tokenizer`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError
from secateur.files import json_of
from secateur.model.checkpoint import TOKENS_FILE, Checkpoint, load_tokenizer
from secateur.model.stock import CausalLM, Tokenizer


@dataclass(frozen=True)
class KeptTokens:
    """Token `n` of the pruned model is token `dense_ids[n]` of the dense one, which has more rows.

    `num_dense`: rows of the dense embedding. `dense_ids` ascend, so tokens keep their order.
    """

    dense_ids: tuple[int, ...]
    num_dense: int

    @property
    def num_kept(self) -> int:
        """Tokens that stay."""
        return len(self.dense_ids)

    @cached_property
    def new_ids(self) -> list[int | None]:
        """Each dense token's new id; None for those that went."""
        new_ids: list[int | None] = [None] * self.num_dense
        for new, dense in enumerate(self.dense_ids):
            new_ids[dense] = new
        return new_ids

    def write(self, directory: Path) -> None:
        """Write the map from dense ids to new ones as `tokens.json`."""
        content = {"num_dense": self.num_dense, "num_kept": self.num_kept, "new_ids": self.new_ids}
        (directory / TOKENS_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Trim:
    """A trim of the vocabulary: the dense tokens that stay, and both models' tokenizers.

    `foretold`: nats per dense token of text that it costs by the counts; None if nothing was
    counted.
    """

    kept: KeptTokens
    dense_tokenizer: Tokenizer
    tokenizer: Tokenizer
    foretold: float | None = None


def kept_tokens_of(directory: Path) -> KeptTokens | None:
    """Return the map that `directory` holds; None without one. Raises CheckpointError if
    damaged.
    """
    path = directory / TOKENS_FILE
    if not path.is_file():
        return None
    try:
        new_ids = json_of(path.read_text(encoding="utf-8"))["new_ids"]
        dense_ids = tuple(dense for dense, new in enumerate(new_ids) if new is not None)
        if [new for new in new_ids if new is not None] != list(range(len(dense_ids))):
            raise ValueError("its new ids do not count up")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); use the file that secateur wrote."
        ) from None
    return KeptTokens(dense_ids, len(new_ids))


def trim_between(
    pruned: Checkpoint,
    dense: Checkpoint,
    option: str,
    instead: str = "give the model that was pruned",
) -> Trim | None:
    """Return the trim that made the pruned model's tokens of the dense one's; None if both have the
    same.

    `option`: how the dense model was given. `instead`: advice. Raises CheckpointError if the
    tokens are others and no `tokens.json` of the pruned model explains it, or the numbers of
    logits differ.
    """
    tokenizer, other = load_tokenizer(pruned), load_tokenizer(dense)
    num_logits, num_dense = (model.config.get_text_config().vocab_size for model in (pruned, dense))
    ids, dense_ids = tokenizer.get_vocab(), other.get_vocab()
    if ids == dense_ids and num_logits == num_dense:
        return None
    kept = kept_tokens_of(pruned.directory)
    if kept is not None and (kept.num_kept, kept.num_dense) == (num_logits, num_dense):
        # Some multimodal families have special tokens without a row.
        new_ids = {
            text: kept.new_ids[index] for text, index in dense_ids.items() if index < num_dense
        }
        stayed = {text: new for text, new in new_ids.items() if new is not None}
        if stayed == {text: index for text, index in ids.items() if index < num_logits}:
            return Trim(kept, other, tokenizer)
    if ids != dense_ids:
        raise CheckpointError(
            f"{option} {dense.reference}: its tokenizer ({len(other):,} tokens) is not that of "
            f"{pruned.reference} ({len(tokenizer):,} tokens), so both would read different text; "
            f"{instead}."
        )
    raise CheckpointError(
        f"{option} {dense.reference}: it gives {num_dense:,} logits and {pruned.reference} "
        f"{num_logits:,}, so their predictions cannot be compared; give the model that was pruned."
    )


@torch.no_grad()
def keep_tokens(model: CausalLM, kept: KeptTokens) -> None:
    """Leave the kept tokens' rows in embedding and head, and give the configs the new ids, in
    place.

    Tied weights stay tied; a model on the meta device works too. Raises CheckpointError, before
    anything is changed, if the model has other weights by token, its rows are not those that
    `kept` counts, or its configs name a token that is not kept.
    """
    embedding, head = check_weights_by_token(model)
    _check_ids(model, embedding.num_embeddings, kept)
    index = torch.tensor(kept.dense_ids, device=embedding.weight.device)
    was_tied = head.weight is embedding.weight
    embedding.weight = _rows_of(embedding.weight, index)
    embedding.num_embeddings = head.out_features = kept.num_kept
    head.weight = embedding.weight if was_tied else _rows_of(head.weight, index)
    if head.bias is not None:
        head.bias = _rows_of(head.bias, index)
    sized: list[Any] = [
        module
        for module in model.modules()
        if getattr(module, "vocab_size", None) == kept.num_dense
    ]
    for module in sized:
        module.vocab_size = kept.num_kept
    for module in (embedding, *sized):
        if (padding := getattr(module, "padding_idx", None)) is not None and padding >= 0:
            module.padding_idx = kept.new_ids[padding]
    new_ids = kept.new_ids
    for config in _configs(model):
        _change(config, lambda index: new_ids[index] if 0 <= index < len(new_ids) else index)
    model.config.get_text_config().vocab_size = kept.num_kept


def _rows_of(parameter: Tensor, index: Tensor) -> nn.Parameter:
    return nn.Parameter(
        parameter.index_select(0, index.to(parameter.device)), requires_grad=parameter.requires_grad
    )


def check_weights_by_token(model: CausalLM) -> tuple[nn.Embedding, nn.Linear]:
    """Return embedding and head. Raises CheckpointError if the model has other weights by token
    than these.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    num_rows, known = embedding.num_embeddings, {embedding.weight, *head.parameters()}
    weights = [*model.named_parameters(), *model.named_buffers()]
    others = [name for name, weight in weights if num_rows in weight.shape and weight not in known]
    others += ["head"] if head.out_features != num_rows else []
    # Gemma 3n's embeddings of each layer have fewer rows than the first one.
    others += [key for key in vars(model.config.get_text_config()) if key.startswith("vocab_size_")]
    if others:
        raise CheckpointError(
            "vocabulary: the model has other weights by token than embedding and head "
            f"({others[0]}), so tokens cannot go; leave vocabulary out."
        )
    return embedding, head


def _check_ids(model: CausalLM, num_rows: int, kept: KeptTokens) -> None:
    if num_rows != kept.num_dense:
        raise CheckpointError(
            f"{TOKENS_FILE}: is of a model with {kept.num_dense:,} tokens, and this one has "
            f"{num_rows:,}; give the model that was pruned."
        )
    if lost := sorted(ids_named_by(model) & set(range(num_rows)) - set(kept.dense_ids)):
        raise CheckpointError(
            f"vocabulary: the model's config or generation config names token {lost[0]}, which is "
            "not kept; keep it."
        )


def ids_named_by(model: CausalLM) -> set[int]:
    """Return the ids that the model's config and generation config name, at any depth.

    Negative ids, and those beyond the embedding's rows, name no token of the model.
    """
    ids: set[int] = set()
    for config in _configs(model):
        _change(config, lambda index: ids.add(index) or index)
    return ids


def _configs(model: CausalLM) -> list[Any]:
    return [model.config, *([] if model.generation_config is None else [model.generation_config])]


# Token ids in configs: keys that end so, and single keys of transformers' families and of
# generation.
_ENDINGS = ("_token_id", "_token_ids", "_token_index", "_tokens_ids")
_KEYS = """
suppress_tokens begin_suppress_tokens bad_words_ids force_words_ids sequence_bias forced_decoder_ids
im_start_id im_end_id im_newline_id image_start_id image_end_id image_patch_id slice_start_id
slice_end_id newline_id bos_index eos_index pad_index unk_index mask_index
""".split()


def _change(config: Any, new: Callable[[int], Any]) -> None:
    """Replace every token id in the config, and in the configs inside it, by `new` of it."""
    for key, value in list(vars(config).items()):
        if not isinstance(value, type) and hasattr(value, "to_dict"):
            _change(value, new)
        elif key.endswith(_ENDINGS) or key in _KEYS:
            if key == "sequence_bias" and isinstance(value, list):
                setattr(config, key, [[_changed(ids, new), bias] for ids, bias in value])
            elif key == "forced_decoder_ids" and isinstance(value, list):
                setattr(
                    config, key, [[position, _changed(index, new)] for position, index in value]
                )
            elif value is not None:
                setattr(config, key, _changed(value, new))


def _changed(value: Any, new: Callable[[int], Any]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_changed(item, new) for item in value)
    if isinstance(value, dict):  # of a bias by tokens
        return {_changed(ids, new): bias for ids, bias in value.items()}
    return new(value) if isinstance(value, int) and not isinstance(value, bool) else value
