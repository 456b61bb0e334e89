"""Run by path in a fresh process: load a directory with plain transformers and write its logits and some text.

In (argv): directory, a safetensors file with `input_ids`, the file to write, device, number of threads. Out: that file,
with `logits`, and as metadata `problem` (what the loader reported; empty if nothing) and `text` (a greedy
continuation). Imports nothing of secateur: the point is that a user needs nothing of it. Per-layer widths need the
modelling file in the directory; for nothing else is code there run.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NUM_NEW_TOKENS = 24


def main(directory: str, ids_file: str, out_file: str, device: str, num_threads: str) -> None:
    torch.set_num_threads(int(num_threads))
    ids_BT = load_file(ids_file)["input_ids"].to(device)
    config = json.loads(Path(directory, "config.json").read_text(encoding="utf-8"))
    per_layer = "per_layer_config" in config
    is_wrapped = config["model_type"] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto: Any = AutoModelForImageTextToText if is_wrapped else AutoModelForCausalLM
    loaded: Any = auto.from_pretrained(directory, output_loading_info=True, trust_remote_code=per_layer)
    model, info = loaded[0].to(device), loaded[1]
    with torch.inference_mode():
        logits_BTV = model(ids_BT, use_cache=False).logits
        generated_1T = model.generate(
            ids_BT[:1], attention_mask=torch.ones_like(ids_BT[:1]), max_new_tokens=NUM_NEW_TOKENS, do_sample=False
        )
    new_ids = generated_1T[0, ids_BT.shape[1] :].tolist()
    problem = "; ".join(f"{kind}: {sorted(map(str, names))}" for kind, names in info.items() if names)
    metadata = {"problem": problem, "text": _text(directory, new_ids, per_layer)}
    save_file({"logits": logits_BTV.contiguous().cpu()}, out_file, metadata)


def _text(directory: str, ids: list[int], per_layer: bool) -> str:
    if not Path(directory, "tokenizer_config.json").is_file():
        return " ".join(map(str, ids))
    # AutoTokenizer reads the model's config, and some families' stock config class refuses per-layer head counts.
    return str(AutoTokenizer.from_pretrained(directory, trust_remote_code=per_layer).decode(ids))


if __name__ == "__main__":
    main(*sys.argv[1:])
