"""Prune a model for your own text: chats and code, of which the code must not get worse than by a tenth.

python examples/your_domains.py Qwen/Qwen2.5-0.5B smaller chats.jsonl src/ [TOKENS]
"""

import sys

import secateur

model, out, chats, code, *tokens = sys.argv[1:]
domains = {
    "chat": {"files": [chats], "share": 2},  # rows with messages, or prompt and answer: docs/data.md
    "code": {"files": [code], "protect": 0.1},  # all files below a folder
}
recipe = {
    "remove": {"share": 0.2, "align": 1},
    "choose": {"budget": "curve"},  # layers get widths of their own, so secateur.load opens the result
    "calibration": {"domains": domains, "num_tokens": int(tokens[0]) if tokens else 51_200},
}
result = secateur.prune(model, recipe, out=out, progress=secateur.bars())

# Judged by documents that nothing in the run learnt by.
for name, dense in result.summary.dense_losses.items():
    pruned = result.summary.pruned_losses[name]
    print(f"{name}: perplexity {dense.perplexity:.2f} -> {pruned.perplexity:.2f}")
