"""Does least squares matter, whichever channels go? A study: every method on the same text, two draws each.

python examples/study.py smollm2-135m study
"""

import sys

import yaml

import secateur

STUDY = """
question: Does least squares matter, whichever channels go?
ratios: [0.2]
seeds: [0, 1]
recipe:
  polish: false
  calibration: {num_tokens: 8192, sequence_length: 256, domains: {code: {installed: code}}}
evaluation: {num_blocks: 4}
methods:
  random: {recipe: {choose: {score: random}, repair: {compensate: none}}}
  random, refitted: {recipe: {choose: {score: random}}}
  default, not refitted: {recipe: {repair: {compensate: none}}}
  default: {}
"""

model, out = sys.argv[1:3]
with open("study.yaml", "w") as file:
    yaml.safe_dump({"model": model, **yaml.safe_load(STUDY)}, file, sort_keys=False)
comparison = secateur.compare("study.yaml", out, progress=secateur.bars())
for cell in comparison.cells:
    print(f"draw {cell.seed}, {cell.method}: perplexity {cell.perplexity:.2f}")
print(f"{out}/table.md says which differences two draws tell apart.")
