"""Run results in the runtimes that people use, each in a virtual environment of its own.

A dense model, a uniform result and one whose layers differ in width are converted by the runtime's
own tool, and run in float32. Greedy tokens and the log-probabilities of a text are compared with
transformers'; decode is timed in turns. Answers are kept, and `docs/runtimes.md` is written from all;
of a runtime without an answer the page keeps its rows, and also what stands behind the table.

    python benchmarks/runtimes.py [vllm llama-cpp mlx ...] [--model smollm2-135m] [--place DIR]
                                  [--tokens 8192] [--repeats 3] [--threads 1] [--page FILE]

`runtime_child.py` is what runs in those environments.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from runtime_child import NUM_PROMPT, NUM_TEXT, NUM_TIMED, RUNTIMES, call, of_logits

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("dense", "uniform", "per-layer")


@dataclass(frozen=True)
class Facts:
    """What transformers says of a model: log-probabilities of the text, and its bytes per token."""

    model: Any
    logprobs: list[float]
    decode_bytes: float


def facts_of(path: Path, text: list[int]) -> Facts:
    """Load a model in float32 with `secateur.load`."""
    import torch

    import secateur
    from secateur.evaluation.bench import least_costs
    from secateur.facts import Workload

    model: Any = secateur.load(path, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([text]), use_cache=False).logits[0].numpy()
    costs = least_costs(model, Workload(1, NUM_PROMPT, NUM_TIMED, 1))
    return Facts(model, of_logits(logits, text), costs.decode_bytes_per_token)


def judged(facts: Facts, prompts: list[list[int]], found: dict[str, Any]) -> dict[str, Any]:
    """Compare a runtime's answer with transformers on the same context.

    `equal`: tokens that are transformers' own choice behind the runtime's earlier ones. `gap`: how
    much likelier, in nats, transformers finds its own token. `change`: the largest difference of a
    log-probability of the text.
    """
    import torch

    equal, total, gap = 0, 0, 0.0
    for prompt, tokens in zip(prompts, found["tokens"], strict=True):
        with torch.inference_mode():
            logits = facts.model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        scores = logits.log_softmax(-1)
        gaps = scores.max(-1).values - scores.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        equal, total, gap = equal + int((gaps == 0).sum()), total + len(tokens), max(gap, float(gaps.max()))
    change = max(abs(own - their) for own, their in zip(facts.logprobs, found["logprobs"], strict=True))
    perplexities = [math.exp(-statistics.fmean(each)) for each in (found["logprobs"], facts.logprobs)]
    return {"equal": equal, "total": total, "gap": gap, "change": change, "perplexities": perplexities}


def make_models(model: str, paths: dict[str, Path], num_tokens: int, *, as_gguf: bool) -> None:
    """Write the dense model, and prune it by 30% with equal widths and with widths by layer."""
    from dense import write_dense

    import secateur

    text = {"calibration": {"num_tokens": num_tokens, "answers": 0}, "output": {"evaluate": False}}
    base = {"preset": "quick", "remove": 0.3, "polish": False, **text}
    if not paths["dense"].exists():
        write_dense(model, paths["dense"])
    for kind, more in (("uniform", {}), ("per-layer", {"choose": {"score": "wanda", "budget": "curve"}})):
        if not paths[kind].exists():
            secateur.prune(model, base | more, out=paths[kind])
    for path in paths.values() if as_gguf else ():
        if not path.with_suffix(".gguf").exists():
            secateur.export(path, path.with_suffix(".gguf"), type_name="f32", check=False)


def set_up(name: str, place: Path) -> Path:
    """Make the runtime's environment unless it is there; return its interpreter."""
    runtime, home = RUNTIMES[name], place / name
    python, done = home / "bin" / "python", home / "installed"
    if not done.exists():
        print(f"{name}: installing {' '.join(runtime.install)}", file=sys.stderr, flush=True)
        call([sys.executable, "-m", "venv", home])
        call([python, "-m", "pip", "install", "--quiet", *runtime.install])
        if runtime.remove:
            call([python, "-m", "pip", "uninstall", "--quiet", "--yes", *runtime.remove])
        done.touch()
    return python


def ask(name: str, place: Path, request: dict[str, Any]) -> None:
    """Run the child in the runtime's environment; its answer, or why there is none, is a file in `work`."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    asking, answering = (place / "work" / f"{name}.{kind}.json" for kind in ("request", "answer"))
    asking.parent.mkdir(parents=True, exist_ok=True)
    asking.write_text(json.dumps(request))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(request["threads"])}
    try:
        python = set_up(name, place)
        environment["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"  # a runtime's tools call one another
        call([python, "-P", Path(__file__).with_name("runtime_child.py"), name, asking, answering], env=environment)
    except RuntimeError as error:
        failed = {"version": "", "models": {kind: {"error": str(error)} for kind in request["models"]}}
        answering.write_text(json.dumps(failed))


def short(error: str) -> str:
    """Return an error's beginning for a cell of a table, without the folders of this machine."""
    line = " ".join(re.sub(r"(?<!\w)/[\w./-]+/", "", error).replace("|", "/").replace("`", "'").split())
    return line if len(line) <= 160 else line[:157] + "..."


def row(name: str, kind: str, run: str, answer: dict[str, Any], facts: dict[str, Facts]) -> str:
    """Return one row of the page's table. `run`: when, and how often it was timed."""
    runtime, models, found = RUNTIMES[name], answer["models"], answer["models"][kind]
    head = f"| {runtime.name} {answer['version']} | {kind} | {run} |"
    if "error" in found:
        return f"{head} does not load: `{short(found['error'])}` | | | | |"
    same, rates = found["judged"], [models.get(each, {}).get("rates") for each in ("dense", kind)]
    perplexity, expected = same["perplexities"]
    cells = f"{head} {same['equal']} of {same['total']}, {same['gap']:.1g} | {same['change']:.1g} |"
    cells += f" {perplexity:.4f} / {expected:.4f} |"
    if not rates[1]:
        return f"{cells} not timed | |"
    if kind == "dense" or not rates[0]:
        return f"{cells} {statistics.median(rates[1]):.1f} | |"
    ratio = statistics.median(own / dense for dense, own in zip(*rates, strict=True))
    ideal = facts["dense"].decode_bytes / facts[kind].decode_bytes
    return f"{cells} {statistics.median(rates[1]):.1f} | {ratio:.2f} of {ideal:.2f}: {ratio / ideal:.2f} |"


PAGE = """# Runtimes

Results in the runtimes that people use. `make runtimes` sets up each one in a virtual environment
of its own, converts the models by the runtime's own tool, runs them and writes this page.

Models: {model}, and results without 30% of all its parameters, with equal widths (`uniform`)
and with widths by layer (`per-layer`, `budget: curve`). Both are by `preset: quick` on
{tokens:,} tokens of calibration text, not trained: quality is not the subject here. Weights are bfloat16,
and every runtime gets them as float32. Threads: {threads}. Cores: {cores}, {cpu};
other programs used them too, so tokens/s are low and noisy.

- **run**: the day, and the number of timed runs.
- **tokens**: greedy tokens behind three prompts that are transformers' own choice after the same
  context, and by how many nats transformers finds its own token likelier where it is another.
  Where the model ends its text, ONNX Runtime GenAI stops, and CTranslate2 takes the second choice.
  ONNX Runtime alone has no cache: it writes a third of the tokens, and is not timed.
- **log-probability**: the largest difference from transformers over {text} tokens of text, in nats.
- **perplexity**: of that text, in the runtime / in transformers.
- **tokens/s**: of decode, the median of runs that alternate with the dense model.
- **of ideal**: the median ratio of rates to the dense model's, the ratio of bytes that one token
  must read, and the first over the second.

| runtime | model | run | tokens, nats | log-probability | perplexity | tokens/s | of ideal |
|---|---|---|---|---:|---:|---:|---|
{rows}
{tail}"""


def old_rows(name: str, page: str) -> list[str]:
    """Return the rows that a page has of a runtime."""
    return [line for line in page.splitlines() if re.match(rf"\| {re.escape(RUNTIMES[name].name)} [\d.]* \|", line)]


def main() -> None:
    """Make the models, run the runtimes that are asked for, and write the page from all answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtimes", nargs="*", choices=[*RUNTIMES, []], help="by default all")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--place", type=Path, default=ROOT / ".venv-runtimes")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration text")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "runtimes.md")
    parser.add_argument("--page-only", action="store_true", help="write the page from the answers that are there")
    options = parser.parse_args()
    from transformers import AutoTokenizer

    from secateur.formats.save import TEXT

    paths = {kind: options.place / "models" / kind for kind in KINDS}
    asked_for = [] if options.page_only else options.runtimes or RUNTIMES
    if options.page_only:
        paths = {kind: path for kind, path in paths.items() if path.exists()}
    else:
        make_models(options.model, paths, options.tokens, as_gguf="llama-cpp" in asked_for)
    ids = AutoTokenizer.from_pretrained(paths["dense"])(TEXT)["input_ids"][:NUM_TEXT]
    prompts = [ids[start : start + NUM_PROMPT] for start in range(0, NUM_TEXT, NUM_TEXT // 3)]
    request = {"models": {kind: str(path) for kind, path in paths.items()}, "prompts": prompts, "text": ids}
    request |= {"threads": options.threads, "repeats": options.repeats}
    request |= {"scratch": str(options.place / "work")}
    for name in asked_for:
        ask(name, options.place, request)
    facts, rows = {kind: facts_of(path, ids) for kind, path in paths.items()}, []
    page = options.page.read_text() if options.page.exists() else "|\n"
    for name in RUNTIMES:
        asked, answered = (options.place / "work" / f"{name}.{kind}.json" for kind in ("request", "answer"))
        if not answered.exists():
            rows += old_rows(name, page)
            continue
        answer, repeats = json.loads(answered.read_text()), json.loads(asked.read_text())["repeats"]
        run = f"{date.fromtimestamp(answered.stat().st_mtime)}, {repeats}"
        for kind, found in answer["models"].items():
            if "error" not in found:
                found["judged"] = judged(facts[kind], prompts, found)
        rows += [row(name, kind, run, answer, facts) for kind in answer["models"]]
    said = {"model": options.model, "tokens": options.tokens, "threads": options.threads}
    said |= {"tail": page[page.rindex("|\n") + 2 :]}
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "a CPU")
    said |= {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "text": NUM_TEXT, "rows": "\n".join(rows)}
    options.page.write_text(PAGE.format(**said))


if __name__ == "__main__":
    main()
