"""Whether a checkpoint of given widths can be served: vLLM's published rules, without running it; who else is asked.

In: a family, its widths after a run, a tensor-parallel size. Out: what stands against it, sentence by sentence. Nothing
is loaded. The rules are those that vLLM's config check and its parallel linears enforce: query heads divide by the
number of GPUs; KV heads divide by it or it by them; every width that is split divides by it; all layers are alike.
"""

from collections.abc import Mapping

from secateur.arch_spec import load_specs
from secateur.errors import RecipeError, advice

VLLM, LLAMA_CPP = "vllm", "llama.cpp"
SERVERS = (VLLM, LLAMA_CPP)
QUERY_HEADS, KV_HEADS = "num_attention_heads", "num_key_value_heads"


def check_server(server: str, num_gpus: int) -> None:
    """Raise RecipeError if the server is unknown, there are no GPUs, or llama.cpp is to split the model over some."""
    if server not in SERVERS:
        raise RecipeError(
            f"--check-for: unknown server '{server}'; allowed: {', '.join(SERVERS)}; {advice(server, SERVERS)}"
        )
    if num_gpus < 1:
        raise RecipeError(f"--tp: must be at least 1, got {num_gpus}.")
    if server == LLAMA_CPP and num_gpus > 1:
        raise RecipeError(f"--tp: is of vllm, got {num_gpus} with --check-for llama.cpp; leave it out.")


def check_vllm(
    num_gpus: int,
    family: str,
    widths: Mapping[str, frozenset[int]],
    *,
    heads_follow_hidden_size: bool = True,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what keeps vLLM from loading the model, by its rules, and what they do not settle.

    `widths`: by config key, all values that layers have of it. `heads_follow_hidden_size`: head_dim is
    hidden_size / heads, as it is until heads are cut.
    """
    problems = [
        f"{key} differs by layer ({min(values)} to {max(values)}), and vLLM builds all layers alike"
        for key, values in widths.items()
        if len(values) > 1
    ]
    for key, values in widths.items():
        for value in sorted(values):
            if key == KV_HEADS and value < num_gpus:
                if num_gpus % value:
                    problems.append(f"{num_gpus} GPUs cannot share {value} KV heads evenly ({key})")
            elif value % num_gpus and _is_split(key):
                problems.append(f"{key} is {value}, which {num_gpus} GPUs cannot split evenly")
    cautions = ["checked by vLLM's published rules; vLLM was not run"]
    known = load_specs()[family].serving.get(VLLM)
    if known is None:
        cautions.append(f"family {family} is not in vLLM's registry; its Transformers backend may run it")
    if not heads_follow_hidden_size and not (known and known.reads_head_dim):
        cautions.append(
            f"heads were cut, and vLLM's {family} was not found to read head_dim from the config; if it divides "
            f"hidden_size by the number of heads, it cannot load this"
        )
    return tuple(problems), tuple(cautions)


def _is_split(key: str) -> bool:
    """Say whether tensor parallelism splits what the key counts: experts are whole on every GPU, in slices."""
    return "experts" not in key
