"""Timing a GGUF file in llama.cpp. In: a file and a workload of one prompt. Out: a runner for `bench.take_turns`."""

import time
from pathlib import Path

from secateur.bench import Runner, prompt_ids
from secateur.facts import Workload
from secateur.llama_cpp import open_llama_cpp


def llama_cpp_runner(file: Path, workload: Workload) -> Runner:
    """Load the file and return a runner of greedy generation, its prompt the same as the transformers runner's."""
    assert workload.batch == 1
    model = open_llama_cpp(file, workload.prompt_tokens + workload.new_tokens, all_logits=False)
    ids = prompt_ids(workload, model.n_vocab())

    def run() -> list[float]:
        model.reset()
        start, times, pending = time.perf_counter(), list[float](), ids
        for _ in range(workload.new_tokens):
            model.eval(pending)
            pending = [model.sample(temp=0.0)]
            times.append(time.perf_counter() - start)
        return times

    return run
