"""How often the dense model accepts a result's drafted tokens, in transformers and in llama.cpp.

python benchmarks/draft.py RESULT DENSE: prints one line sampling at temperature 1 and one greedily in
transformers' assisted generation, to be compared with the row of `secateur evaluate RESULT --against DENSE`
on the same domains. With --llama-cpp, of both models' GGUF files in llama-cpp-python, one line greedily.
"""

import argparse
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dense import write_dense
from transformers.generation.candidate_generator import AssistedCandidateGenerator

import secateur
from secateur.evaluation.text import named_blocks
from secateur.log import silent
from secateur.model.checkpoint import load_model, load_tokenizer, open_checkpoint
from secateur.recipe import Domain

PROMPT_TOKENS, BLOCK_TOKENS = 64, 256
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result")
    parser.add_argument("dense")
    parser.add_argument("--domains", nargs="+", default=["web", "code"])
    parser.add_argument("--prompts", type=int, default=2, help="per domain")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--drafted", type=int, default=4, help="tokens a step")
    parser.add_argument("--llama-cpp", action="store_true", help="there, in place of transformers")
    asked = parser.parse_args()
    found = [open_checkpoint(asked.dense), open_checkpoint(asked.result)]
    tokenizer = load_tokenizer(found[0])
    domains = {name: Domain.model_validate({"installed": name}) for name in asked.domains}
    blocks, _ = named_blocks(domains, max(4, asked.prompts), BLOCK_TOKENS, tokenizer, silent)
    prompts = [blocks[name][number][:PROMPT_TOKENS] for number in range(asked.prompts) for name in asked.domains]
    if asked.llama_cpp:
        in_llama_cpp(asked, prompts)
        return
    dense, draft = (load_model(each).float().eval() for each in found)
    steps = counted()
    settings: Any = draft.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = asked.drafted, "constant"
    settings.assistant_confidence_threshold = 0.0
    for which, how in (("sampled", SAMPLED), ("greedy", {"do_sample": False})):
        steps.clear()
        torch.manual_seed(0)
        num_new = 0
        for ids_T in prompts:
            prompt = {"input_ids": ids_T[None]}
            prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
            out = dense.generate(**prompt, assistant_model=draft, max_new_tokens=asked.new_tokens, **how)
            num_new += out.shape[1] - PROMPT_TOKENS
        tell(which, steps, num_new)


def tell(which: str, steps: list[tuple[int, int]], num_new: int) -> None:
    """Print the share of the tried tokens that were accepted, and the tokens a step."""
    accepted = sum(matches for matches, _ in steps)
    tried = sum(min(matches + 1, drafted) for matches, drafted in steps)
    rate, per_step = accepted / tried, num_new / len(steps)
    print(f"{which}: {accepted} of {tried} tried tokens accepted ({rate:.1%}), {per_step:.2f} tokens a step")


def in_llama_cpp(asked: argparse.Namespace, prompts: list[torch.Tensor]) -> None:
    """Draft greedily in llama.cpp; tell the rate, and whether the dense model alone writes the same."""
    import llama_cpp
    from llama_cpp.llama_speculative import LlamaDraftModel

    class Draft(LlamaDraftModel):
        def __init__(self, path: Path) -> None:
            self.model = llama_cpp.Llama(str(path), n_ctx=BLOCK_TOKENS, verbose=False)
            self.asked: list[tuple[int, list[int]]] = []

        def __call__(self, input_ids: Any, /, **_: Any) -> Any:
            drafted = list(islice(self.model.generate(input_ids, temp=0), asked.drafted))
            self.asked.append((len(input_ids), drafted))
            return np.array(drafted, dtype=np.intc)

    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.gguf" for name in ("dense", "result")}
        for name, path in files.items():
            model = write_dense(getattr(asked, name), path.with_suffix(""))
            secateur.export(model, path, type_name="f16", check=False)
        draft, steps, num_new, same = Draft(files["result"]), [], 0, 0
        alone, helped = (
            llama_cpp.Llama(str(files["dense"]), n_ctx=BLOCK_TOKENS, draft_model=each, logits_all=True, verbose=False)
            for each in (None, draft)
        )
        for ids_T in prompts:
            draft.asked.clear()
            texts = [list(islice(each.generate(ids_T.tolist(), temp=0), asked.new_tokens)) for each in (alone, helped)]
            same, num_new = same + (texts[0] == texts[1]), num_new + asked.new_tokens
            for length, drafted in draft.asked:
                follows = texts[1][length - len(ids_T) :][: len(drafted)]
                pairs = list(zip(drafted, follows, strict=False))
                wrong = next((place for place, (mine, its) in enumerate(pairs) if mine != its), len(pairs))
                if follows:
                    steps.append((wrong, len(follows)))
        tell("greedy in llama.cpp", steps, num_new)
        print(f"{same} of {len(prompts)} texts are those of the dense model alone")


def counted() -> list[tuple[int, int]]:
    """Return a list that gets, for every step from now on, the accepted and the drafted tokens."""
    steps: list[tuple[int, int]] = []
    update = AssistedCandidateGenerator.update_candidate_strategy

    def noted(self: Any, input_ids: Any, scores: Any, num_matches: int) -> None:
        steps.append((int(num_matches), scores.shape[1] - 1))
        update(self, input_ids, scores, num_matches)

    AssistedCandidateGenerator.update_candidate_strategy = noted
    return steps


if __name__ == "__main__":
    main()
