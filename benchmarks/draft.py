"""How often the dense model accepts a result's drafted tokens in transformers' assisted generation.

python benchmarks/draft.py RESULT DENSE: prints one line sampling at temperature 1 and one greedily, to be
compared with the row of `secateur evaluate RESULT --against DENSE` on the same domains.
"""

import argparse
from typing import Any

import torch
from transformers.generation.candidate_generator import AssistedCandidateGenerator

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
    asked = parser.parse_args()
    found = [open_checkpoint(asked.dense), open_checkpoint(asked.result)]
    tokenizer, (dense, draft) = load_tokenizer(found[0]), (load_model(each).float().eval() for each in found)
    domains = {name: Domain.model_validate({"installed": name}) for name in asked.domains}
    blocks, _ = named_blocks(domains, max(4, asked.prompts), BLOCK_TOKENS, tokenizer, silent)
    steps = counted()
    settings: Any = draft.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = asked.drafted, "constant"
    settings.assistant_confidence_threshold = 0.0
    for which, how in (("sampled", SAMPLED), ("greedy", {"do_sample": False})):
        steps.clear()
        torch.manual_seed(0)
        num_new = 0
        for ids_T in (blocks[name][number] for number in range(asked.prompts) for name in asked.domains):
            prompt = {"input_ids": ids_T[None, :PROMPT_TOKENS]}
            prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
            out = dense.generate(**prompt, assistant_model=draft, max_new_tokens=asked.new_tokens, **how)
            num_new += out.shape[1] - PROMPT_TOKENS
        accepted = sum(matches for matches, _ in steps)
        tried = sum(min(matches + 1, drafted) for matches, drafted in steps)
        rate, per_step = accepted / tried, num_new / len(steps)
        print(f"{which}: {accepted} of {tried} tried tokens accepted ({rate:.1%}), {per_step:.2f} tokens a step")


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
