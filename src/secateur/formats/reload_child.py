"""Run by path in a fresh process: load a directory with plain transformers, write its logits.

In (argv): directory, a safetensors file with `input_ids`, the file to write, device, threads.
Out: that file, with `logits`; as metadata `problem` (the loader's complaints, empty if none) and
`text` (a greedy continuation). Imports nothing of secateur, as a user's program would not.
The directory's code is run for per-layer widths alone.
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
    """Load the directory, compute logits, generate text and write both."""
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
    text = " ".join(map(str, new_ids))
    if Path(directory, "tokenizer_config.json").is_file():
        # AutoTokenizer reads the model's config; stock config classes may refuse per-layer heads.
        text = str(AutoTokenizer.from_pretrained(directory, trust_remote_code=per_layer).decode(new_ids))
    save_file({"logits": logits_BTV.contiguous().cpu()}, out_file, {"problem": problem, "text": text})


if __name__ == "__main__":
    main(*sys.argv[1:])
