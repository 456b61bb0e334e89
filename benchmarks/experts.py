"""Which experts can go: REAP over domains against frequency and chance, on a small mixture trained here.

    python benchmarks/experts.py --minutes 5 --seeds 0 1 2

Trains a Mixtral of a few million parameters on bytes of several domains of `../shared/data` (or SECATEUR_DATA), so that
its experts differ, then drops 25 and 50% of every layer's experts by each score, with nothing refitted, and prints nats
per byte on evaluation text, mean over domains. Every seed draws `random`'s choice, and the others' calibration, anew.
"""

import argparse
import copy
import gzip
import json
import os
import statistics
import time
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from secateur.arch import bind
from secateur.experts import prune_experts
from secateur.loss import domain_losses
from secateur.walk import Walk, make_batches

DATA = Path(os.environ.get("SECATEUR_DATA", Path(__file__).parents[2] / "shared" / "data")) / "text"
DOMAINS = {"web": "web_c4", "code": "code", "math": "math_gsm8k", "zh": "zh_cmrc", "science": "science_qasper"}
LENGTH, NUM_EXPERTS = 128, 16
SCORES = {
    "reap, energy per domain": ("obs", "energy"),
    "reap, one pool": ("obs", "tokens"),
    "frequency": ("frequency", "energy"),
    "random": ("random", "energy"),
}


def blocks(name: str, which: str) -> torch.Tensor:
    """Return a domain's text as blocks of bytes."""
    with gzip.open(DATA / f"{name}_{which}.jsonl.gz", "rt", encoding="utf-8") as file:
        text = "\n".join(json.loads(line)["text"] for line in file).encode()
    text = text[: len(text) // LENGTH * LENGTH]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(-1, LENGTH)


def trained(text: dict[str, torch.Tensor], minutes: float) -> MixtralForCausalLM:
    """Return a mixture trained for so long on batches that mix all domains."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256, hidden_size=96, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=NUM_EXPERTS, num_experts_per_tok=2, router_aux_loss_coef=0.01,
        output_router_logits=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    end, step = time.monotonic() + 60 * minutes, 0
    while (left := end - time.monotonic()) > 0:
        ids_BT = torch.cat([each[torch.randint(len(each), (3,))] for each in text.values()])
        loss = model(ids_BT, labels=ids_BT).loss
        optimiser.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * max(left / (60 * minutes), 0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        step += 1
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {step} steps of {len(ids_BT)} x {LENGTH} bytes")
    model.config.output_router_logits = False
    return model.eval()


def pruned_loss(model, calibration, evaluation, name: str, remove: float, seed: int) -> float:
    """Return nats per byte, mean over domains, once so many of every layer's experts are gone."""
    model = copy.deepcopy(model)
    score, weighting = SCORES[name]
    arch, shares = bind(model), {domain: 1 / len(calibration) for domain in calibration}
    generator = torch.Generator().manual_seed(seed)
    batches = [
        batch
        for domain, text in calibration.items()
        for batch in make_batches(domain, text[torch.randperm(len(text), generator=generator)[:48]], held_out=False)
    ]
    walk = Walk(model, arch, batches)
    for group in arch.select(("experts",)):
        num_keep = round(group.num_units * (1 - remove))
        prune_experts(walk, group, num_keep, score, weighting, shares, 1000 * seed + group.layer)
        walk.advance(group.layer)
    losses = domain_losses(model, arch, evaluation)
    return sum(loss.nats_per_token for loss in losses.values()) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    calibration = {domain: blocks(name, "calib") for domain, name in DOMAINS.items()}
    evaluation = {domain: blocks(name, "eval")[::37][:40] for domain, name in DOMAINS.items()}
    model = trained(calibration, options.minutes)
    losses = domain_losses(model, bind(model), evaluation)
    print(f"dense: {sum(loss.nats_per_token for loss in losses.values()) / len(losses):.4f} nats per byte")
    for remove in (0.25, 0.5):
        for name in SCORES:
            found = [pruned_loss(model, calibration, evaluation, name, remove, seed) for seed in options.seeds]
            spread = max(found) - min(found)
            print(f"{remove:.0%}  {name:24} {statistics.mean(found):.4f}  spread {spread:.4f}", flush=True)


if __name__ == "__main__":
    main()
