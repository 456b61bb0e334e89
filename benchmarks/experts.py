"""Scores of whole experts compared on a small mixture that is trained here.

    python benchmarks/experts.py --steps 4000 --seeds 0 1 2 [--mixture DIRECTORY]

Trains a Mixtral of a few million parameters on bytes of several domains of `../shared/data` (or
SECATEUR_DATA), so that its experts differ; that takes ten minutes on one core. Then drops 25 and
50% of every layer's experts by each score, without a refit and with least squares. Prints nats per
byte on evaluation text, mean over domains. The mixture stays in DIRECTORY for the next run. Every
seed draws the calibration text, and the choice of `random`, anew.
"""

import argparse
import copy
import gzip
import json
import statistics
from pathlib import Path

import torch
from texts import DATA
from transformers import MixtralConfig, MixtralForCausalLM

from secateur.methods.experts import prune_experts
from secateur.methods.select import Task
from secateur.model.bind import bind
from secateur.model.checkpoint import load
from secateur.model.per_layer import record_widths
from secateur.pruning.group_step import method_of
from secateur.pruning.resolve import DEFAULT_TARGET_MIX
from secateur.recipe import parse_recipe
from secateur.stream.losses import domain_losses
from secateur.stream.walk import Walk, make_batches

DOMAINS = {"web": "web_c4", "code": "code", "math": "math_gsm8k", "zh": "zh_cmrc", "science": "science_qasper"}
LENGTH, NUM_EXPERTS = 128, 16
NUM_BLOCKS, NUM_HELD_OUT = 48, 6  # of each domain, for calibration
SCORES = {
    "energy per domain": ("obs", "energy"),
    "energy, one pool": ("obs", "tokens"),
    "reap per domain": ("reap", "energy"),
    "reap, one pool": ("reap", "tokens"),
    "random": ("random", "energy"),
}


def blocks(name: str, which: str) -> torch.Tensor:
    """Return a domain's text as blocks of bytes."""
    with gzip.open(DATA / f"{name}_{which}.jsonl.gz", "rt", encoding="utf-8") as file:
        text = "\n".join(json.loads(line)["text"] for line in file).encode()
    text = text[: len(text) // LENGTH * LENGTH]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(-1, LENGTH)


def trained(text: dict[str, torch.Tensor], num_steps: int) -> MixtralForCausalLM:
    """Return a mixture trained for `num_steps` steps on batches of all domains."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256, hidden_size=96, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=NUM_EXPERTS, num_experts_per_tok=2, router_aux_loss_coef=0.01,
        output_router_logits=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for step in range(num_steps):
        ids_BT = torch.cat([each[torch.randint(len(each), (3,))] for each in text.values()])
        loss = model(ids_BT, labels=ids_BT).loss
        optimiser.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * max(1 - step / num_steps, 0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{num_parameters:,} parameters, {num_steps} steps of {3 * len(text)} x {LENGTH} bytes")
    model.config.output_router_logits = False
    return model.eval()


def pruned_loss(model, calibration, evaluation, name: str, remove: float, seed: int, *, refit: bool) -> float:
    """Return nats per byte, mean over domains, without the share `remove` of all experts."""
    model = copy.deepcopy(model)
    score, weighting = SCORES[name]
    compensate, mix = ("least_squares", DEFAULT_TARGET_MIX) if refit else ("none", 0.0)
    choose, repair = {"score": score, "domain_weighting": weighting}, {"compensate": compensate, "target_mix": mix}
    recipe = parse_recipe({"choose": choose, "repair": repair})
    arch, shares = bind(model), {domain: 1 / len(calibration) for domain in calibration}
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for domain, text in calibration.items():
        chosen = text[torch.randperm(len(text), generator=generator)[: NUM_BLOCKS + NUM_HELD_OUT]]
        batches += make_batches(domain, chosen[:NUM_BLOCKS], held_out=False)
        batches += make_batches(domain, chosen[NUM_BLOCKS:], held_out=True)
    walk = Walk(model, arch, batches, dense=refit)
    for group in arch.select(("experts",)):
        if refit:
            walk.advance_dense(group.layer)
        num_keep = round(group.num_units * (1 - remove))
        prune_experts(Task(walk, group, num_keep, method_of(recipe), shares, 1000 * seed + group.layer))
        walk.advance(group.layer)
    record_widths(model, arch)
    losses = domain_losses(model, arch, evaluation)
    return sum(loss.nats_per_token for loss in losses.values()) / len(losses)


def main() -> None:
    """Train or load the mixture, then print a row per share, refit and score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--mixture", type=Path)
    options = parser.parse_args()
    calibration = {domain: blocks(name, "calib") for domain, name in DOMAINS.items()}
    evaluation = {domain: blocks(name, "eval")[::37][:40] for domain, name in DOMAINS.items()}
    if options.mixture and options.mixture.exists():
        model = load(options.mixture)
    else:
        model = trained(calibration, options.steps)
        if options.mixture:
            model.save_pretrained(options.mixture)
    losses = domain_losses(model, bind(model), evaluation)
    print(f"dense: {sum(loss.nats_per_token for loss in losses.values()) / len(losses):.4f} nats per byte\n")
    print("| removed | score | refit | nats per byte | largest minus smallest |\n|---:|---|---|---:|---:|")
    for remove in (0.25, 0.5):
        for refit in (False, True):
            for name in SCORES:
                found = [
                    pruned_loss(model, calibration, evaluation, name, remove, seed, refit=refit)
                    for seed in options.seeds
                ]
                cells = f"{statistics.mean(found):.4f} | {max(found) - min(found):.4f}"
                print(f"| {remove:.0%} | {name} | {'yes' if refit else 'no'} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
