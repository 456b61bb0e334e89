"""Run by path in a Python that has vLLM: load a model, then time one run for every line read.

In (argv): a file with a JSON object: vLLM's `options`, `prompt` (token ids), `batch`, `new_tokens`.
Out, a JSON line each: {"version"} once it is loaded, and for every run the seconds to each new token;
or {"error"}, and the end. Imports nothing of secateur, which that Python may not have.
"""

import json
import os
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

NUMBERS = count()  # every request has a name of its own


def main() -> None:
    """Answer on what was standard output, where vLLM's own lines would come between."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    asked = json.loads(Path(sys.argv[1]).read_text())
    try:
        version, engine = load(asked["options"])
        print(json.dumps({"version": version}), file=answers)
        for _ in sys.stdin:
            print(json.dumps(run(engine, asked["prompt"], asked["batch"], asked["new_tokens"])), file=answers)
    except Exception as error:  # vLLM's own, of any kind: the parent makes a sentence of it
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)


def load(options: dict[str, Any]) -> tuple[str, Any]:
    """Return vLLM's version and its engine in this process, whose `step` gives each token."""
    import vllm  # pyright: ignore[reportMissingImports]  # in another environment
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    if not current_platform.is_cpu():
        raise RuntimeError(f"this vLLM is built for {current_platform.device_name}, not for the CPU")
    return vllm.__version__, vllm.LLM(**options).llm_engine


def run(engine: Any, prompt: list[int], batch: int, new_tokens: int) -> list[float]:
    """Generate greedily past any end of text; return the seconds until all rows had each token."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    sampling = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=new_tokens)
    start, times = time.perf_counter(), list[float]()
    for _ in range(batch):
        engine.add_request(str(next(NUMBERS)), {"prompt_token_ids": prompt}, sampling)
    while engine.has_unfinished_requests():
        found = [len(each.outputs[0].token_ids) for each in engine.step()]
        if len(found) == batch and min(found) > len(times):
            times.append(time.perf_counter() - start)
    assert len(times) == new_tokens, "the rows of the batch got their tokens in different steps"
    return times


if __name__ == "__main__":
    main()
