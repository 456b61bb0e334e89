"""Tokens per second of training, and its share of the matrix products that this machine can do.

Times the parts of a step as a polish takes it: the layers' forward; the loss, with the heads of both
models and the gradient of what the trained one's reads; the layers' backward; the update. The model
teaches itself, so that nothing is pruned. Prints
a Markdown table: medians over the steps, operations by `recovery.weights`, and what share they are of
what one large product in the same dtype would do. The last line has the tokens per second.

    python benchmarks/training.py [--model smollm2-135m] [--length 512] [--blocks 1] [--steps 7]

`--blocks`: of `--length` tokens, in one forward pass and one step; by default as many as a polish has.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.evaluation.bench import prefill_flops_per_token
from secateur.model.bind import bind, head_of
from secateur.model.checkpoint import load
from secateur.recipe import PolishSettings
from secateur.recovery.loss import distillation_loss, loss_in_forward, states_of
from secateur.recovery.weights import autocasts, prepare_weights
from secateur.stream.device import CPU, keeping_freed, multiplies_in_software
from secateur.stream.losses import final_states

ROWS, WIDTH = 1024, 2048


def timed(seconds: list[float], work: Callable[[], Any]) -> Any:
    """Run the work, add its seconds and return what it returns."""
    start = time.perf_counter()
    found = work()
    seconds.append(time.perf_counter() - start)
    return found


def product_rate(dtype: torch.dtype) -> float:
    """Return the operations per second of a large product, the best of three."""
    left, right = torch.zeros(ROWS, WIDTH, dtype=dtype), torch.zeros(4 * WIDTH, WIDTH, dtype=dtype)
    seconds: list[float] = []
    for _ in range(3):
        timed(seconds, lambda: left @ right.T)
    return 2 * left.numel() * len(right) / min(seconds)


def main() -> None:
    """Time the steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--steps", type=int, default=7)
    options = parser.parse_args()
    settings = PolishSettings()
    blocks = options.blocks or min(settings.blocks_per_device, settings.blocks_per_step(options.length))
    model: Any = load(options.model)
    dtype = torch.float32 if multiplies_in_software(CPU, model.dtype) else model.dtype
    shape, generator = (blocks, options.length), torch.Generator().manual_seed(0)
    ids_BT = torch.randint(model.config.vocab_size, shape, generator=generator)
    arch, num_tokens = bind(model), ids_BT.numel()
    head = copy.deepcopy(head_of(model, arch))  # in the model's dtype, as a judge has it
    states_PD = torch.cat([final_states(model, arch, ids_1T) for ids_1T in ids_BT.split(1)])
    at_each = 2 * model.get_output_embeddings().weight.numel()  # FLOPs per token of the head
    layers = prefill_flops_per_token(model, options.length) - at_each / options.length
    whole = layers + at_each
    prepare_weights(model, settings.train, float_all=not autocasts(model.dtype, on_cpu=True))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, fused=True)
    next_P = ids_BT[:, 1:].flatten()
    seconds: dict[str, list[float]] = {name: [] for name in ("forward", "loss", "backward", "update")}

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            return states_of(model, arch, ids_BT)

    def loss_of(found_PD: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            facts = found_PD, head_of(model, arch), next_P, (states_PD, head)
            return distillation_loss(*facts, kl_share=settings.kl_share)

    def update() -> None:
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    inside = loss_in_forward(model, arch, settings.kl_share, in_shards=False)
    with keeping_freed(), inside:
        for _ in range(options.steps + 1):
            found_PD = timed(seconds["forward"], forward)
            loss = timed(seconds["loss"], partial(loss_of, found_PD))
            timed(seconds["backward"], loss.backward)
            timed(seconds["update"], update)
    peak = product_rate(dtype)
    flops = {"forward": layers, "loss": 3 * (whole - layers), "backward": 2 * layers, "update": 0.0}
    print(f"{options.model}, {dtype}, {torch.get_num_threads()} threads, one step of {num_tokens:,} tokens;")
    print(f"a large product runs at {peak / 1e9:,.0f} GFLOP/s\n")
    print("| part | ms | GFLOP | of the product's rate |")
    print("|---|---:|---:|---:|")
    total = 0.0
    for name, found in seconds.items():
        took, work = statistics.median(found[1:]), flops[name] * num_tokens
        total += took
        print(f"| {name} | {1000 * took:,.0f} | {work / 1e9:,.0f} | {work / took / peak:.0%} |")
    work = sum(flops.values()) * num_tokens
    print(f"| all | {1000 * total:,.0f} | {work / 1e9:,.0f} | {work / total / peak:.0%} |\n")
    print(f"{num_tokens / total:,.0f} tokens/s; at the product's rate alone {num_tokens * peak / work:,.0f}")


if __name__ == "__main__":
    main()
