"""Run by path in a fresh process: load a directory with plain transformers, write its logits.

In (argv): directory, a safetensors file with `input_ids`, the file to write, device, threads.
Out: that file, with `logits`; as metadata `problem` (the loader's complaints, empty if none) and
`class` (of transformers, which loaded it). It also has the model write, which needs a cache, and
loads the tokenizer. Imports nothing of secateur, as a user's program would not. Only the package's
own modelling file is ever run, for per-layer widths: a directory that holds or names other code is
loaded without any, and the tokenizer always is.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

# One behind the prompt and some by the cache: each reads all weights.
NUM_NEW_TOKENS = 4
OWN_CODE = Path(__file__).parents[1] / "model" / "modeling_per_layer.py"


def main(directory: str, ids_file: str, out_file: str, device: str, num_threads: str) -> None:
    """Load the directory, compute logits and write them."""
    torch.set_num_threads(int(num_threads))
    ids_BT = load_file(ids_file)["input_ids"].to(device)
    config = json.loads(Path(directory, "config.json").read_text(encoding="utf-8"))
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config["model_type"])
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config["model_type"])
    is_wrapped = causal is None or (causal != whole and config["architectures"] == [whole])
    auto: Any = AutoModelForImageTextToText if is_wrapped else AutoModelForCausalLM
    loaded: Any = auto.from_pretrained(
        directory, output_loading_info=True, trust_remote_code=runs_own_code(directory, config)
    )
    model, info = loaded[0].to(device), loaded[1]
    # A class that needs a picture has a language model inside that does not: the innermost with a
    # head.
    inner = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings()
    ]
    language = [
        model,
        *(module for module in inner if model.get_input_embeddings() in set(module.modules())),
    ][-1]
    with torch.inference_mode():
        logits_BTV = language(input_ids=ids_BT, use_cache=False).logits
        first_1T = ids_BT[:1]
        options = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False}
        language.generate(first_1T, attention_mask=torch.ones_like(first_1T), **options)
    # The loader only warns if both of two tied tensors are stored, and differ.
    tied: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    parameter = model.get_parameter_or_buffer
    info["untied"] = [
        name for name, source in tied.items() if parameter(name) is not parameter(source)
    ]
    problem = "; ".join(
        f"{kind}: {sorted(map(str, names))}" for kind, names in info.items() if names
    )
    if Path(directory, "tokenizer_config.json").is_file():
        # Without `config` it reads the model's, which stock config classes may refuse for per-layer
        # heads.
        AutoTokenizer.from_pretrained(directory, config=model.config, trust_remote_code=False)
    save_file(
        {"logits": logits_BTV.contiguous().cpu()},
        out_file,
        {"problem": problem, "class": auto.__name__},
    )


def runs_own_code(directory: str, config: dict[str, Any]) -> bool:
    """Whether the config names the package's modelling file, and the directory holds no other."""
    names = config.get("auto_map", {})
    is_ours = bool(names) and all(
        re.fullmatch(rf"{OWN_CODE.stem}\.\w+", str(name)) for name in names.values()
    )
    return is_ours and all(
        file.read_bytes() == OWN_CODE.read_bytes() for file in Path(directory).rglob("*.py")
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
