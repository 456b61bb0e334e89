"""A fit that rounding spoils is told of in the summary's warnings."""

import torch

from secateur.pruning.result import ill_conditioned
from secateur.recipe import parse_recipe
from tests.model.test_exactness import prune_tiny, random_calibration
from tests.models import tiny_llama


def test_a_warning_names_the_worst_fit_and_only_where_one_is_spoiled() -> None:
    model, recipe = tiny_llama(), parse_recipe({"repair": {"damping": 1e-9}})
    with torch.no_grad():
        # The second half of the second layer's channels are copies of the first.
        mlp = model.model.layers[1].mlp
        for writer in (mlp.gate_proj, mlp.up_proj):
            writer.weight[56:] = writer.weight[:56]
    _, lines = prune_tiny(model, random_calibration(), damping=1e-9)
    (warning,) = ill_conditioned(lines, recipe)
    assert "1 of 3 fits" in warning and "in layer 1, ffn with condition" in warning
    assert ill_conditioned(lines[:1], recipe) == ()
    raised = [{**lines[0], "damping": 1e-7}, {**lines[2], "condition": 2.0**21}]
    assert "2 of 2 fits" in ill_conditioned(raised, recipe)[0] and "layer 0" in ill_conditioned(raised, recipe)[0]
    both = [{**lines[0], "condition": 2.0**21}, {**lines[2], "condition": 2.0**22}]
    assert "in layer 2, ffn with condition 4.2e+06 and damping 1e-09" in ill_conditioned(both, recipe)[0]
