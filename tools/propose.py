"""Propose a spec for an unknown family: `python tools/propose.py MODEL > mine.yaml`.

In: a model whose family has no spec. Out: YAML, with comments on what a person must check.
It is derived from the model's modules on the meta device. Widths are recognised by their sizes; a
group is proposed only if a config with a smaller number builds smaller linears. The proposal is a
family once it lies in src/secateur/model/families and its tests pass; see docs/extend.md.
"""

import argparse
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from secateur.errors import CheckpointError, SecateurError
from secateur.model.bind import head_width, text_config
from secateur.model.checkpoint import meta_model, open_checkpoint

CHANNEL_WORDS = ("intermediate", "ffn", "inner")
LOGIT_KEYS = {"final_logit_softcapping": "cap", "logit_scale": "multiply", "logits_scaling": "divide"}


def proposed_spec(reference: str | Path) -> str:
    """Return the YAML for a model; read no weights. Raises CheckpointError as `open_checkpoint`."""
    return spec_text(meta_model(open_checkpoint(reference, weights=False).config))


def spec_text(model: PreTrainedModel) -> str:
    """Return the proposal, or a comment on what is missing for one."""
    config: Any = text_config(model)
    found = _layers(model, config.num_hidden_layers)
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    if found is None or head is None:
        missing = "list of decoder layers" if found is None else "head"
        return f"# No spec can be proposed: this {type(model).__name__} has no {missing}.\n"
    name, layer = found
    backbone = model.base_model_prefix if hasattr(model, model.base_model_prefix) else name.rpartition(".")[0]
    lines = [
        f"# Proposed from the modules of {type(model).__name__}; see docs/extend.md. Check every line, then test.",
        f"model_types: [{config.model_type}]",
        f"backbone: {backbone}",
        f"layers: {name}",
        f"head: {head}",
        f"attention: {_attention(layer, config) or 'null'}",
        "middle: null  # or the module of a layer whose input is the residual stream behind attention: faster",
        "mlp_adds_directly: false  # true where the MLP's output joins the residual stream as it is: better",
    ]
    lines += [
        f"logits: {{{what}: {key}}}  # check that the model does this"
        for key, what in LOGIT_KEYS.items()
        if hasattr(config, key)
    ]
    groups = [*_heads(model, layer, config), *_channels(model, layer, config)]
    lines += ["groups:" if any(line.endswith(":") for line in groups) else "groups: {}", *groups]
    return "\n".join([*lines, *_experts(layer, config)]) + "\n"


def _layers(model: nn.Module, num_layers: int) -> tuple[str, nn.Module] | None:
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    # The last layer: the few layers that may differ come first.
    return next(((name, module[-1]) for name, module in lists), None)


def _linears(layer: nn.Module) -> dict[str, nn.Module]:
    """Return linears by name, GPT-2's transposed ones among them."""
    return {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}


def _shape(linear: Any) -> tuple[int, int]:
    """Return (outputs, inputs)."""
    shape = tuple(linear.weight.shape)
    return shape if isinstance(linear, nn.Linear) else (shape[1], shape[0])


def _channels(model: PreTrainedModel, layer: nn.Module, config: Any) -> Iterator[str]:
    shapes, done = {name: _shape(linear) for name, linear in _linears(layer).items()}, set()
    for key, width in _widths(config):
        reader = next((n for n, shape in shapes.items() if shape == (config.hidden_size, width)), None)
        name = "shared" if "shared" in str(reader) else "ffn"
        if reader is None or name in done:
            continue
        if name == "shared" and any(width in p.shape for p in layer.parameters() if p.ndim == 3):
            yield "  # No shared: the config has one width for shared and routed experts."
            continue
        if not _follows(model, {key: width // 2}, reader, (config.hidden_size, width // 2)):
            continue
        place, wanted = reader.rpartition(".")[0], {width: "[1]", 2 * width: "[1, 1]"}
        writers = {
            writer: wanted[outputs]
            for writer, (outputs, inputs) in shapes.items()
            if writer.rpartition(".")[0] == place and outputs in wanted and inputs == config.hidden_size
        }
        done.add(name)
        yield f"  {name}:"
        yield from _group("channel", key, writers, {reader: "[1]"})
        if not _in_all_layers(model, config, reader):
            yield "    in_some_layers: true"
        if "[1, 1]" in writers.values():
            yield "    # One linear makes two rows per channel: check that they lie as two halves; else write [2]."
    if not done:
        yield "  # No ffn: no linear from a width of the config to hidden_size follows the config."


def _in_all_layers(model: PreTrainedModel, config: Any, name: str) -> bool:
    found = _layers(model, config.num_hidden_layers)
    assert found is not None
    return all(name in _linears(layer) for layer in model.get_submodule(found[0]).children())


def _heads(model: PreTrainedModel, layer: nn.Module, config: Any) -> Iterator[str]:
    attention = _attention(layer, config)
    if attention is None:
        yield "  # No heads: no linear reads heads x head_dim."
        return
    queries, keys, width = config.num_attention_heads, getattr(config, "num_key_value_heads", None), head_width(config)
    module = layer.get_submodule(attention)
    reader = _head_reader(layer, config)
    assert reader is not None
    if keys is None or not _pins(model, config, reader):
        yield "  # No heads: the width of a head follows from hidden_size and the number of heads."
        return
    vectors = [p.numel() for n, p in module.named_parameters() if p.ndim == 1 and not n.endswith("bias")]
    if any(size in (queries * width, keys * width) and size > width for size in vectors):
        yield "  # No heads: a norm spans all heads of queries or keys."
        return
    if queries in vectors and queries != width:
        yield "  # No heads: a vector has one entry for each."
        return
    sizes = {(queries + 2 * keys) * width: "[q, kv, kv]", keys * width: "[kv]"}
    writers = {
        f"{attention}.{n}": "[q]" if _is_query(n, _shape(m)[0], queries, keys, width) else sizes[_shape(m)[0]]
        for n, m in _linears(module).items()
        if f"{attention}.{n}" != reader and (_shape(m)[0] in sizes or _shape(m)[0] == queries * width)
    }
    yield "  kv_heads:"
    yield from _group("KV head", "num_key_value_heads", writers, {reader: "[q]"})
    yield "    # Check that nothing else has one entry per head: norms, sinks, gates."


def _is_query(name: str, rows: int, queries: int, keys: int, width: int) -> bool:
    return rows == queries * width and (queries != keys or "q" in name.rpartition(".")[2].split("_")[0])


def _head_reader(layer: nn.Module, config: Any) -> str | None:
    wanted = (config.hidden_size, config.num_attention_heads * head_width(config))
    inside = [n for n, m in _linears(layer).items() if _shape(m) == wanted and "." in n]
    return inside[-1] if inside else None


def _attention(layer: nn.Module, config: Any) -> str | None:
    reader = _head_reader(layer, config)
    return None if reader is None else reader.rpartition(".")[0]


def _experts(layer: nn.Module, config: Any) -> Iterator[str]:
    keys = {key: value for key, value in config.to_dict().items() if "experts" in key and isinstance(value, int)}
    for name, module in layer.named_modules():
        stacks = [p for p in module.parameters(recurse=False) if p.ndim == 3]
        key = next((key for key, value in keys.items() if stacks and len(stacks[0]) == value), None)
        if key is None:
            continue
        routers = [
            n
            for n, m in layer.named_modules()
            if any(len(p) == keys[key] and p.ndim == 2 for p in m.parameters(recurse=False))
        ]
        yield "experts:"
        yield f"  experts: {name}"
        yield f"  router: {routers[0] if routers else '?'}"
        yield "  router_rows: [weight]  # check that all its tensors with a row per expert are named"
        yield f"  num_units: {key}"
        yield "  top_k: num_experts_per_tok"
        yield f"  counts: [{name}.num_experts]  # and wherever else a forward pass reads the number"
        return


def _group(unit: str, key: str, writers: dict[str, str], reader: dict[str, str]) -> Iterator[str]:
    yield f"    unit: {unit}"
    yield f"    num_units: {key}"
    yield f"    writers: {{{', '.join(f'{name}: {segments}' for name, segments in writers.items())}}}"
    yield f"    reader: {{{', '.join(f'{name}: {segments}' for name, segments in reader.items())}}}"


def _widths(config: Any) -> list[tuple[str, int]]:
    values = config.to_dict().items()
    return [(k, v) for k, v in values if isinstance(v, int) and any(word in k for word in CHANNEL_WORDS)]


def _pins(model: PreTrainedModel, config: Any, reader: str) -> bool:
    """Say whether the config can have fewer heads of the same width."""
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    per_key = queries // keys
    fewer = max(keys // 2, 1)
    changes = {"num_attention_heads": fewer * per_key, "num_key_value_heads": fewer, "head_dim": head_width(config)}
    return _follows(model, changes, reader, (config.hidden_size, fewer * per_key * head_width(config)))


def _follows(model: PreTrainedModel, changes: dict[str, int], linear: str, shape: tuple[int, int]) -> bool:
    """Say whether a config with these changes builds the linear with that shape."""
    changed = copy.deepcopy(model.config)
    for key, value in changes.items():
        setattr(changed.get_text_config(), key, value)
    try:
        found = _layers(meta_model(changed), changed.get_text_config().num_hidden_layers)
    except CheckpointError:
        return False
    assert found is not None
    return _shape(_linears(found[1])[linear]) == shape


def main() -> None:
    """Print the proposal; if the model cannot be opened, one sentence and status 2."""
    parser = argparse.ArgumentParser(description="Print a spec to start from, for a family that has none.")
    parser.add_argument("model", help="a local directory or a hub id; no weights are read")
    try:
        print(proposed_spec(parser.parse_args().model), end="")
    except SecateurError as error:
        print(f"propose: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
