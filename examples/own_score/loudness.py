"""A score of your own: how loud a channel is. Install it once, then name it in any recipe.

pip install --no-deps examples/own_score
python examples/own_score/loudness.py smollm2-135m
"""

import sys

from secateur import Score


def loudest(inputs):
    """The root mean square of what a unit gives, whatever is made of it. Higher means keep."""
    return inputs.statistics.mean_square_F[inputs.columns_UW].sum(dim=1).sqrt()


score = Score(loudest, needs="moments")

if __name__ == "__main__":
    import secateur

    for name in ("random", "loudest", "obs"):
        recipe = {"remove": 0.1, "choose": {"score": name}, "calibration": {"num_tokens": 8192}, "polish": False}
        losses = secateur.prune(sys.argv[1], recipe).summary.pruned_losses
        nats = sum(loss.nats_per_token for loss in losses.values()) / len(losses)
        print(f"{name}: {nats:.3f} nats per token")
