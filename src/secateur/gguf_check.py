"""Proof that a GGUF file is the model: llama.cpp and transformers agree on a text, on a greedy path and on token ids.

In: the file and the checkpoint it was made from. Out: the figures, or an error if they disagree. transformers computes
in float32, so that a difference is the file's or llama.cpp's own rounding.
"""

import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from secateur.checkpoint import Checkpoint, load_model
from secateur.checkpoint_tokenizer import load_tokenizer
from secateur.errors import CheckpointError
from secateur.llama_cpp import open_llama_cpp

NUM_PROMPT, NUM_GREEDY = 48, 24


@dataclass(frozen=True, slots=True)
class Tolerance:
    """`perplexity_change`: a share. `gap_nats`: rounding may swap tokens that a model finds about equally likely."""

    perplexity_change: float
    gap_nats: float


# With q8_0 llama.cpp rounds weights and activations to 8 bits, which moves the perplexity of so short a text by up to
# some 2%, either way; an error in the conversion multiplies it.
_EXACT, _QUANTISED = Tolerance(0.01, 0.1), Tolerance(0.05, 0.5)

# Written for this check, so that no model was trained on it: prose, code, numbers, other scripts, odd spacing.
TEXT = """The ferry leaves Kirkwall at 06:15, an hour before the bakery on the corner opens its shutters, and whoever
wants bread on board has to buy it the evening before. Marit had forgotten again. She counted what was left in the
tin -- seven oatcakes, half a jar of rhubarb jam -- and decided that 3.5 hours without breakfast wouldn't kill anyone.

    def fare(distance_km: float, passengers: int = 1) -> float:
        \"\"\"Return the price in pounds; children under 5 travel free.\"\"\"
        return round(4.80 + 0.37 * distance_km, 2) * max(passengers, 1)

"Isn't it odd," said the purser, "that we've carried 12,408 people this year and not one of them asked what the
engine's called?" It was called Åsa, after the builder's daughter; the brass plate (1987) said so in letters nobody
read.  Паром шёл медленно. 海面很平静。 By ten the fog had gone, and the islands lay in the sun
like loaves on a board.
"""


@dataclass(frozen=True, slots=True)
class GgufCheck:
    """Perplexities of the held-out text; greedy tokens that are transformers' own choice, and how many there were.

    `largest_gap_nats`: how much likelier transformers finds its own choice than llama.cpp's, where they differ.
    """

    perplexity_transformers: float
    perplexity_llama_cpp: float
    num_tokens: int
    num_greedy_equal: int
    num_greedy: int
    largest_gap_nats: float


def check_gguf(file: Path, checkpoint: Checkpoint, type_name: str) -> GgufCheck:
    """Compare `file`, of weights in `type_name`, in llama.cpp with `checkpoint` in transformers.

    Raises CheckpointError if token ids differ, perplexity differs by more than 1% (q8_0: 5%), or llama.cpp takes a
    token that transformers finds clearly less likely than its own.
    """
    # With the token that starts a text, where the model has one: without it some models write nonsense.
    ids = list(load_tokenizer(checkpoint).encode(TEXT))
    with closing(open_llama_cpp(file, len(ids) + NUM_GREEDY, all_logits=True)) as model:
        _check_ids(checkpoint, ids, model.tokenize(TEXT.encode(), add_bos=True, special=False))
        model.eval(ids)
        perplexity = _perplexity(torch.from_numpy(np.array(model.scores[: len(ids)])), ids)
        greedy = _greedy(model, ids[:NUM_PROMPT])
    check = _against_transformers(checkpoint, ids, perplexity, greedy)
    _refuse(checkpoint, check, _QUANTISED if type_name == "q8_0" else _EXACT)
    return check


def _check_ids(checkpoint: Checkpoint, ids: list[int], theirs: list[int]) -> None:
    if theirs == ids:
        return
    position = next((i for i, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b), len(ids))
    raise CheckpointError(
        f"{checkpoint.reference}: llama.cpp splits text into other tokens than transformers, first at token "
        f"{position} of the check's text; the tokenizer cannot be exported."
    )


@torch.inference_mode()
def _against_transformers(checkpoint: Checkpoint, ids: list[int], perplexity: float, greedy: list[int]) -> GgufCheck:
    reference = load_model(checkpoint).float()
    own_perplexity = _perplexity(reference(torch.tensor([ids]), use_cache=False).logits[0], ids)
    path = torch.tensor([ids[:NUM_PROMPT] + greedy])
    logits_GV = reference(path, use_cache=False).logits[0, NUM_PROMPT - 1 : -1]
    gaps = logits_GV.amax(-1) - logits_GV.gather(-1, torch.tensor(greedy)[:, None])[:, 0]
    num_equal = int((gaps == 0).sum())
    return GgufCheck(own_perplexity, perplexity, len(ids), num_equal, len(greedy), gaps.max().item())


def _greedy(model: Any, prompt: list[int]) -> list[int]:
    model.reset()
    model.eval(prompt)
    greedy: list[int] = []
    for _ in range(NUM_GREEDY):
        greedy.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(greedy[-1:])
    return greedy


def _perplexity(logits_TV: torch.Tensor, ids: list[int]) -> float:
    return math.exp(cross_entropy(logits_TV[:-1].float(), torch.tensor(ids[1:])).item())


def _refuse(checkpoint: Checkpoint, check: GgufCheck, allowed: Tolerance) -> None:
    change = abs(check.perplexity_llama_cpp / check.perplexity_transformers - 1)
    if not change <= allowed.perplexity_change:  # so that NaN is refused too
        raise CheckpointError(
            f"{checkpoint.reference}: llama.cpp's perplexity {check.perplexity_llama_cpp:.3f} is {change:.1%} from "
            f"transformers' {check.perplexity_transformers:.3f}, allowed is {allowed.perplexity_change:.0%}; "
            "export with a more exact --type."
        )
    if not check.largest_gap_nats <= allowed.gap_nats:
        raise CheckpointError(
            f"{checkpoint.reference}: llama.cpp writes a token that transformers finds {check.largest_gap_nats:.2f} "
            f"nats less likely than its own, allowed is {allowed.gap_nats}; export with a more exact --type."
        )
