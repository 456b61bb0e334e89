"""ONNX Runtime runs pruned models of every family and gives their logits. Needs onnxruntime and onnxscript; slow."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.model.bind import bind, decoder_layers
from secateur.model.checkpoint import load
from secateur.model.group import OF_EXPERTS
from secateur.model.per_layer import record_widths
from tests.families import FAMILIES, tiny_family
from tests.model.test_families import cut_units, kept_of
from tests.models import logits_of, tiny_ids

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# Rows whose pruned model, or whose dense one just as well, torch.onnx cannot export or ONNX Runtime cannot run.
_COMPLEX = "torch.onnx exports no complex numbers, in which the family's rotary positions are computed"
KNOWN_TO_FAIL = {"deepseek_v2": _COMPLEX, "deepseek_v2-groups": _COMPLEX, "llama4": _COMPLEX}


class Logits(torch.nn.Module):
    """The model as a function of token ids alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids_BT, use_cache=False).logits


def run_onnx(model: torch.nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    exported, buffer = torch.onnx.export(Logits(model), (ids_BT,), dynamo=True, verbose=False), io.BytesIO()
    exported.save(buffer)
    session = runtime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: ids_BT.numpy()})
    return torch.tensor(logits)


def row(name: str) -> Any:
    """Return the family's row; one that is known to fail is run all the same."""
    why = KNOWN_TO_FAIL.get(name)
    return pytest.param(name, False, marks=[pytest.mark.xfail(reason=why, strict=True)] if why else [])


UNEVEN = [(name, True) for name in "llama qwen2 qwen3 mistral gemma2 phi3 olmo2 starcoder2".split()]


@pytest.mark.parametrize(("name", "uneven"), [row(name) for name in FAMILIES] + UNEVEN)
def test_onnx_runtime_gives_the_pruned_models_logits(name: str, uneven: bool, tmp_path: Path) -> None:
    model, ids_BT = tiny_family(name), tiny_ids()
    arch = bind(model)
    for group in (each for each in arch.groups if each.name == "ffn" or not (uneven or each.name == "query_heads")):
        share = 0.25 * (1 + group.layer) if uneven else 0.5
        cut_units(decoder_layers(model, arch)[group.layer], group, kept_of(group, share))
    record_widths(model, arch)
    if any(group.kind in OF_EXPERTS for group in arch.groups):
        model.set_experts_implementation("batched_mm")  # the default's product of groups has no ONNX counterpart
    if uneven:
        model.save_pretrained(tmp_path)
        model = load(tmp_path)
        assert len({layer.down_proj.in_features for layer in model.modules() if hasattr(layer, "down_proj")}) != 1
    torch.testing.assert_close(run_onnx(model, ids_BT), logits_of(model, ids_BT), atol=1e-4, rtol=1e-4)
