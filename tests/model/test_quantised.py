"""Quantised checkpoints: what is read equals what transformers or compressed-tensors make of the same files."""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from damage import edit_json
from models import saved, tiny_llama
from recipes import grouped
from safetensors.torch import load_file, save_file
from shown import assert_sentences, refusal
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

import secateur
from secateur.model.checkpoint import load_model, meta_model, notes_on, open_checkpoint
from secateur.model.stock import quiet_transformers
from tests.families import tiny_family

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter, FP8BlockDequantizer
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"head_dim": 32}
Replace = Callable[[str, Tensor], dict[str, Tensor]]


def written(directory: Path, model: Any, said: dict[str, Any], replace: Replace, where: str = "_proj.weight") -> Path:
    """Save the model with every such weight replaced by its quantised parts, and a config that says so."""
    saved(directory, model.to(torch.bfloat16))
    file, tensors = directory / "model.safetensors", {}
    for name, weight in load_file(file).items():
        parts = replace(name, weight) if name.endswith(where) else {name: weight}
        tensors |= {part: each.contiguous() for part, each in parts.items()}
    save_file(tensors, file, {"format": "pt"})
    edit_json(directory / "config.json", quantization_config=said)
    return directory


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 64]}


def fp8(directory: Path, model: Any) -> Path:
    quantise = Fp8Quantize(SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=(32, 64))))
    return written(directory, model, FP8, lambda name, weight: quantise.convert({name: weight}))


def scheme_of(preset: str, strategy: str | None) -> QuantizationScheme:
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if strategy is not None:
        scheme.weights.strategy = strategy
    scheme.format = infer_module_format(torch.nn.Linear, scheme).value
    return scheme


def compressed_parts(weight: Tensor, scheme: QuantizationScheme) -> dict[str, Tensor]:
    """Return what compressed-tensors stores of a weight, with scales from its largest values."""
    args, state, given = scheme.weights, {"weight": weight}, {}
    groups = weight.unflatten(-1, (-1, args.group_size)) if args.group_size else weight.unsqueeze(1)
    if args.strategy == "tensor":
        groups = weight.reshape(1, 1, -1)
    if scheme.format.startswith("nvfp4"):
        state["weight_global_scale"] = given["global_scale"] = generate_gparam(*weight.float().aminmax())
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, **given)
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    return BaseCompressor.get_value_from_registry(scheme.format).compress(state, scheme)


def compressed(directory: Path, model: Any, preset: str, strategy: str | None = None) -> Path:
    scheme = scheme_of(preset, strategy)
    said = QuantizationConfig(
        config_groups={"group_0": scheme}, format=scheme.format, quantization_status="compressed", ignore=["lm_head"]
    ).model_dump(mode="json")

    def replace(name: str, weight: Tensor) -> dict[str, Tensor]:
        return {name.replace("weight", part, 1): each for part, each in compressed_parts(weight, scheme).items()}

    return written(directory, model, said, replace)


def mxfp4(directory: Path, model: Any) -> Path:
    def replace(name: str, weight: Tensor) -> dict[str, Tensor]:
        rows = weight.transpose(1, 2)  # as the format stores them: 32 inputs to a scale, two to a byte
        shape = (*rows.shape[:-1], rows.shape[-1] // 32)
        generator = torch.Generator().manual_seed(len(name))
        blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 126, shape, dtype=torch.uint8, generator=generator)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return written(directory, model, said, replace, where="_proj")


def llama(**sizes: Any) -> Any:
    return tiny_llama(**SIZES | sizes)


def experts() -> Any:
    return tiny_family("qwen3_moe", hidden_size=128, moe_intermediate_size=64, intermediate_size=128, head_dim=32)


def gpt_oss() -> Any:
    return tiny_family("gpt_oss", hidden_size=64, intermediate_size=64)


PRESETS = [("FP8", "tensor"), ("FP8_DYNAMIC", "channel"), ("INT8", "channel")]
PRESETS += [(preset, None) for preset in ("W8A16", "W4A16", "W4A16_ASYM", "NVFP4A16")]
FORMS: dict[str, tuple[Callable[[Path], Path], Any]] = {
    "fp8 in blocks": (lambda path: fp8(path, llama()), FineGrainedFP8Config(dequantize=True)),
    "fp8 in blocks, experts": (lambda path: fp8(path, experts()), FineGrainedFP8Config(dequantize=True)),
    "mxfp4": (lambda path: mxfp4(path, gpt_oss()), Mxfp4Config(dequantize=True)),
} | {
    f"{preset} {strategy}": (
        lambda path, preset=preset, strategy=strategy: compressed(path, llama(), preset, strategy),
        CompressedTensorsConfig(dequantize=True),
    )
    for preset, strategy in PRESETS
}


def weights_of(directory: Path) -> dict[str, Tensor]:
    return load_model(open_checkpoint(directory)).state_dict()


@pytest.mark.parametrize("form", FORMS)
def test_equals_what_transformers_makes_of_it(form: str, tmp_path: Path) -> None:
    write, how = FORMS[form]
    directory = write(tmp_path / "model")
    with quiet_transformers():
        theirs = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, quantization_config=how
        ).state_dict()
    ours = weights_of(directory)
    assert ours.keys() == theirs.keys()
    assert all(each.dtype == torch.bfloat16 and torch.equal(each, theirs[name]) for name, each in ours.items())


def test_fp8_with_blocks_that_do_not_divide_a_weight(tmp_path: Path) -> None:
    """As in DeepSeek's: transformers refuses it, or takes blocks of another size."""

    def replace(name: str, weight: Tensor) -> dict[str, Tensor]:
        blocks = tuple(-(-size // 128) for size in weight.shape)
        scales = torch.rand(blocks, generator=torch.Generator().manual_seed(len(name))) + 0.5
        return {name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}

    model, said = llama(num_layers=1, intermediate_size=192), FP8 | {"weight_block_size": [128, 128]}
    directory = written(tmp_path / "model", model, said, replace)
    tensors = load_file(directory / "model.safetensors")
    scales = {name.removesuffix("_scale_inv"): each.shape for name, each in tensors.items() if name.endswith("_inv")}
    assert {(2, 1), (1, 2)} <= set(scales.values())
    ours = weights_of(directory)
    targets = [name.removesuffix(".weight") for name in scales]
    theirs = FP8BlockDequantizer(targets=targets).process(tensors)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[each], theirs[each]) for each in ours)


def integers(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, generator=generator).to(torch.int32)


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def awq(directory: Path, model: Any) -> Path:
    def replace(name: str, weight: Tensor) -> dict[str, Tensor]:
        outputs, inputs = weight.shape
        module, seed = name.removesuffix(".weight"), len(name)
        scales = torch.rand(inputs // 32, outputs, generator=torch.Generator().manual_seed(seed)).half() / 64
        packed = {
            name: integers((size, outputs // 8), seed) for name, size in (("qweight", inputs), ("qzeros", inputs // 32))
        }
        return {f"{module}.{part}": each for part, each in (packed | {"scales": scales}).items()}

    return written(directory, model, AWQ, replace)


def test_awq_equals_what_compressed_tensors_makes_of_it(tmp_path: Path) -> None:
    directory = awq(tmp_path / "model", llama())
    ours = weights_of(directory)
    converter = AutoAWQConverter.from_autoawq_config(AWQ)
    parts = converter.process(load_file(directory / "model.safetensors"))
    (scheme,) = converter._build_quant_config().config_groups.values()
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    modules = [name.removesuffix(".weight_packed") for name in parts if name.endswith(".weight_packed")]
    assert len(modules) == 3 * 7
    for module in modules:
        own = {name.removeprefix(f"{module}."): each for name, each in parts.items() if name.startswith(f"{module}.")}
        theirs = compressor.decompress(own, scheme)["weight"].to(torch.bfloat16)
        assert torch.equal(ours[f"{module}.weight"], theirs), module


def gptq(directory: Path, model: Any, version: str, in_order: bool, bits: int, expected: dict[str, Tensor]) -> Path:
    """Write it, and into `expected` what it means: w = s (q - z), the first version storing z - 1."""

    def replace(name: str, weight: Tensor) -> dict[str, Tensor]:
        (outputs, inputs), per = weight.shape, 32 // bits
        generator = torch.Generator().manual_seed(len(name))
        quantised = torch.randint(2**bits, (inputs, outputs), generator=generator)
        zeros = torch.randint(1, 2**bits, (inputs // 32, outputs), generator=generator)
        scales = torch.rand(inputs // 32, outputs, generator=generator).half() / 2**bits
        group = torch.arange(inputs) // 32
        group = group if in_order else group[torch.randperm(inputs, generator=generator)]
        expected[name] = (scales[group] * (quantised - zeros[group]).half()).T.to(torch.bfloat16)
        stored = zeros if version == "gptq_v2" else zeros - 1
        qweight = sum(quantised[place::per] << bits * place for place in range(per))
        qzeros = sum(stored[:, place::per] << bits * place for place in range(per))
        parts = {"qweight": qweight.to(torch.int32), "qzeros": qzeros.to(torch.int32), "scales": scales}
        return {f"{name.removesuffix('weight')}{part}": each for part, each in (parts | {"g_idx": group.int()}).items()}

    said = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": not in_order}
    said |= {"checkpoint_format": version}
    return written(directory, model, said, replace)


def modelopt(directory: Path, model: Any, preset: str, expected: dict[str, Tensor]) -> Path:
    """Write it, and into `expected` what compressed-tensors makes of the same numbers."""
    scheme = scheme_of("NVFP4A16" if preset == "NVFP4" else "FP8", None)
    names = {"weight_packed": "weight", "weight_global_scale": "weight_scale_2"}
    compressor = BaseCompressor.get_value_from_registry(scheme.format)

    def replace(name: str, weight: Tensor) -> dict[str, Tensor]:
        parts = compressed_parts(weight, scheme)
        if "weight_global_scale" in parts:  # a power of two has an exact reciprocal
            parts["weight_global_scale"] = parts["weight_global_scale"].log2().round().exp2()
        expected[name] = compressor.decompress(parts, scheme)["weight"].to(torch.bfloat16)
        parts = {part: 1 / each if part == "weight_global_scale" else each for part, each in parts.items()}
        base = name.removesuffix("weight")
        parts = {f"{base}{names.get(part, part)}": each for part, each in parts.items()}
        return parts | {f"{base}input_scale": torch.ones(())}

    return written(directory, model, {"quant_method": "modelopt", "quant_algo": preset}, replace)


DEFINED = {
    f"{version}, {bits} bits{', in order' * in_order}": partial(gptq, version=version, in_order=in_order, bits=bits)
    for version, in_order, bits in product(("gptq", "gptq_v2"), (True, False), (2, 4, 8))
} | {preset: partial(modelopt, preset=preset) for preset in ("NVFP4", "FP8")}


@pytest.mark.parametrize("form", DEFINED)
def test_gptq_and_modelopt_are_read_by_their_formats_definitions(form: str, tmp_path: Path) -> None:
    expected: dict[str, Tensor] = {}
    ours = weights_of(DEFINED[form](tmp_path / "model", llama(num_layers=1), expected=expected))
    assert len(expected) == 7 and all(torch.equal(ours[name], each) for name, each in expected.items())


UNREAD: list[dict[str, Any]] = [{"quant_method": method} for method in ("bitsandbytes", "hqq")]
UNREAD += [{"quant_method": "awq", "bits": 4, "version": "gemv"}]
UNREAD += [{"quant_method": "gptq", "bits": 3}, {"quant_method": "gptq", "bits": 1}]
UNREAD += [{"quant_method": "compressed-tensors", "transform_config": {"a": 1}}]


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    directory = fp8(tmp_path / "model", llama(num_layers=1))
    said = dict[str, str]()
    for each in UNREAD:
        edit_json(directory / "config.json", quantization_config=FP8 | each)
        said[str(each)] = refusal(open_checkpoint, directory)
    edit_json(directory / "config.json", quantization_config=FP8)
    file, name = directory / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    scale = tensors.pop(f"{name}_scale_inv")
    save_file(tensors, file, {"format": "pt"})
    said["a scale that is missing"] = refusal(load_model, open_checkpoint(directory))
    assert_sentences("model/quantised", said, tmp_path)
    save_file(tensors | {f"{name}_scale_inv": scale[:3].contiguous()}, file, {"format": "pt"})
    assert f"weight {name}: cannot be dequantised" in refusal(load_model, open_checkpoint(directory))


def test_a_model_is_planned_in_bfloat16_and_says_what_it_came_from(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(compressed(tmp_path / "model", llama(num_layers=1), "W4A16"))
    model = meta_model(checkpoint.config)
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    (note,) = notes_on(checkpoint, model)
    assert note.startswith("The weights were quantised (compressed-tensors pack-quantized), and were made bfloat16")


def mxfp8(directory: Path, model: Any) -> Path:
    """Write bytes of FP8 with a power of two for each 32 inputs."""

    def replace(name: str, weight: Tensor) -> dict[str, Tensor]:
        scales = torch.randint(118, 126, (len(weight), weight.shape[1] // 32), dtype=torch.uint8)
        values = weight.to(torch.float8_e4m3fn)
        return {name: values, f"{name}_scale_inv": scales.view(torch.float8_e8m0fnu)}

    return written(directory, model, {"quant_method": "mxfp8", "weight_block_size": [1, 32]}, replace)


RUN = {form: FORMS[form][0] for form in ("fp8 in blocks, experts", "mxfp4")}
RUN |= {"mxfp8": lambda path: mxfp8(path, llama())}


@pytest.mark.parametrize("form", RUN)
def test_a_run_writes_bfloat16_that_loads_without_a_quantiser(form, recipe, tmp_path) -> None:
    directory = RUN[form](tmp_path / "model")
    experts = form in ("fp8 in blocks, experts", "mxfp4")
    share = {"share": 0.15} | ({"groups": ["experts"]} if experts else {})
    result = secateur.prune(directory, grouped(recipe | {"remove": share}), out=tmp_path / "out")
    assert result.summary.reload_max_abs_difference == 0
    assert result.summary.dense_size.num_params > result.summary.pruned_size.num_params
    assert any(note.startswith("The weights were quantised") for note in result.summary.warnings)
    assert {each.dtype for each in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()
    assert "were made bfloat16" in (tmp_path / "out/README.md").read_text()
