"""Which file to take for N megabytes? A dense model and smaller ones in GGUF types, judged by llama.cpp itself.

Exports every model in every type, and measures each file in llama.cpp: bits per byte on documents
of six domains that no result was calibrated on, and decoded tokens/s, all models of a type in
turns. Of each document the first `PIECE` characters are read, behind a line's end, so that every byte
counts, until a domain has `--num-bytes`. The error is that of the paired difference
from the dense model in the first type, over documents.
OUT/measured.json keeps what is measured; delete it to measure anew.

    secateur prune smollm2-135m out/20 --recipe benchmarks/equal_bytes.yaml --remove 0.2
    OMP_NUM_THREADS=1 python benchmarks/equal_bytes.py out dense=smollm2-135m 20%=out/20
        [--types q8_0 q6_k ...] [--num-bytes 4608] [--page docs/results/equal_bytes.md]

Needs the development text (benchmarks/text.py fetches it; or SECATEUR_DATA) and llama-cpp-python.
"""

import argparse
import json
import math
import statistics
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from texts import HYBRID, text_file
from torch.nn.functional import cross_entropy

import secateur
from secateur.data.rows import read_rows
from secateur.evaluation.bench import Runner, decode_rates, paired_ratio, take_turns
from secateur.facts import Workload
from secateur.formats.save import open_llama_cpp, save_checkpoint
from secateur.log import silent
from secateur.model.checkpoint import load_model, load_tokenizer, open_checkpoint

TYPES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")
PIECE = 1000  # characters
WORK = Workload(batch=1, prompt_tokens=32, new_tokens=32, repeats=5)
BEGIN, END = "<!-- table: equal_bytes.py --page {} -->", "<!-- end of table -->"
Rows = dict[str, dict[str, dict[str, Any]]]  # by type, then by model


def directory(reference: str, place: Path) -> str:
    """Return the model as a directory: export reads safetensors, and a GGUF model is saved at `place`."""
    checkpoint = open_checkpoint(reference)
    if not checkpoint.gguf_file:
        return reference
    if not place.exists():
        staged = place.with_name(f"{place.name}-unfinished")
        staged.mkdir(parents=True, exist_ok=True)
        tokenizer = load_tokenizer(checkpoint)
        save_checkpoint(load_model(checkpoint), tokenizer, staged, carry_from=None)
        staged.rename(place)
    return str(place)


def documents(domain: str, num_bytes: int) -> list[str]:
    """Return the beginnings of the domain's evaluation documents, `num_bytes` of UTF-8 or a little more."""
    found, left = list[str](), num_bytes
    for _, row in read_rows(Path(text_file(domain, 1))):
        if left > 0:
            found.append(str(row["text"])[:PIECE])
            left -= len(found[-1].encode())
    return found


def bits_per_byte(file: Path, texts: dict[str, list[str]]) -> dict[str, list[float]]:
    """Return, by domain, the bits that llama.cpp needs for each document, per byte of it."""
    with closing(open_llama_cpp(file, PIECE + 2)) as model:
        # Not the file's first token: a model that is never given one, as Qwen2, reads badly behind it.
        first = model.tokenize(b"\n", add_bos=False)

        def bits(text: str) -> float:
            data = text.encode()
            ids = [*first, *model.tokenize(data, add_bos=False, special=False)]
            model.reset()
            model.eval(ids)
            logits = torch.from_numpy(np.array(model.scores[len(first) - 1 : len(ids) - 1]))
            return (
                cross_entropy(logits, torch.tensor(ids[len(first) :]), reduction="sum").item() / math.log(2) / len(data)
            )

        return {domain: [bits(text) for text in found] for domain, found in texts.items()}


def runner(file: Path) -> Runner:
    """Load the file and return a run of greedy generation that gives the seconds to each new token."""
    import llama_cpp  # a package that few have

    # The last position's logits alone, as a server asks for them.
    threads, num_context = torch.get_num_threads(), WORK.prompt_tokens + WORK.new_tokens
    options: dict[str, Any] = {"n_threads": threads, "n_threads_batch": threads, "verbose": False}
    model = llama_cpp.Llama(str(file), n_ctx=num_context, n_gpu_layers=0, **options)
    # Timing needs no real text.
    ids = [position * 7919 % model.n_vocab() for position in range(WORK.prompt_tokens)]

    def run() -> list[float]:
        model.reset()
        start, times, pending = time.perf_counter(), list[float](), ids
        for _ in range(WORK.new_tokens):
            model.eval(pending)
            pending = [model.sample(temp=0.0)]
            times.append(time.perf_counter() - start)
        return times

    return run


def over(bits: dict[str, list[float]], dense: dict[str, list[float]]) -> tuple[float, float]:
    """Return the mean over domains of what `bits` are over those of the dense model, and its standard error."""
    differences = {name: [own - other for own, other in zip(bits[name], dense[name], strict=True)] for name in bits}
    variance = sum(statistics.variance(each) / len(each) for each in differences.values()) / len(bits) ** 2
    return statistics.mean(statistics.mean(each) for each in differences.values()), math.sqrt(variance)


def measure(rows: Rows, models: dict[str, str], types: list[str], num_bytes: int, out: Path) -> None:
    """Export and measure what `rows` lack; `rows` and the file in OUT get it type by type."""
    texts = {domain: documents(domain, num_bytes) for domain in HYBRID}
    for type_name in types:
        found = rows.setdefault(type_name, {})
        if not models.keys() - found.keys():
            continue
        files = {name: out / f"{name.strip('%')}-{type_name}.gguf" for name in models}
        for name, file in files.items():
            done = secateur.export(models[name], file, type_name=type_name, check=False, overwrite=True)
            bits = found[name]["bits"] if name in found else bits_per_byte(file, texts)
            found[name] = {"bytes": done.num_bytes, "bits": bits}
            print(f"{type_name} {name}: {done.num_bytes / 1e6:.1f} MB, {mean_bits(found[name]):.4f} bits", flush=True)
        runs = take_turns([runner(file) for file in files.values()], WORK.repeats, silent)
        rates = dict(zip(models, ([*decode_rates(run, WORK)] for run in runs), strict=True))
        for name, rate in rates.items():
            against = paired_ratio(rate, rates[next(iter(models))])
            faster = [against.median, against.lowest, against.highest]
            found[name] |= {"decode": statistics.median(rate), "faster": faster}
        (out / "measured.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        for file in files.values():
            file.unlink()


def mean_bits(row: dict[str, Any]) -> float:
    return statistics.mean(statistics.mean(each) for each in row["bits"].values())


def table(rows: Rows) -> str:
    """Return the files by size, the largest first; those that no file of at most their size beats are in bold."""
    dense = next(iter(next(iter(rows.values())).values()))
    files = [(name, kind, row) for kind, found in rows.items() for name, row in found.items()]
    files.sort(key=lambda each: -each[2]["bytes"])
    head = ["model", "type", "MB", *HYBRID, "mean bits per byte", "over dense", "tokens/s", "times dense, same type"]
    lines = [f"| {' | '.join(head)} |", f"|---|---|{'---:|' * (len(head) - 2)}"]
    for name, kind, row in files:
        bits, (more, error) = mean_bits(row), over(row["bits"], dense["bits"])
        best = not any(other["bytes"] <= row["bytes"] and mean_bits(other) < bits for _, _, other in files)
        ratio, low, high = row["faster"]
        cells = [f"{row['bytes'] / 1e6:.1f}", *(f"{statistics.mean(each):.3f}" for each in row["bits"].values())]
        cells += [f"**{bits:.3f}**" if best else f"{bits:.3f}", f"{more:+.3f} ± {error:.3f}", f"{row['decode']:.1f}"]
        lines.append(f"| {' | '.join([name, kind, *cells])} | {ratio:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL", help="the dense one first")
    parser.add_argument("--types", nargs="+", default=[*TYPES], metavar="TYPE")
    parser.add_argument("--num-bytes", type=int, default=4608, help="of text per domain")
    parser.add_argument("--page", type=Path, help="write the table between this page's marks")
    asked = parser.parse_args()
    models = dict(each.split("=", 1) for each in asked.models)
    asked.out.mkdir(parents=True, exist_ok=True)
    kept = asked.out / "measured.json"
    rows: Rows = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    places = {name: directory(reference, asked.out / name) for name, reference in models.items()}
    measure(rows, places, asked.types, asked.num_bytes, asked.out)
    print(text := table(rows))
    if asked.page is not None:
        begin = BEGIN.format(models[next(iter(models))].rsplit("/", 1)[-1])
        before, _, rest = asked.page.read_text(encoding="utf-8").partition(begin)
        after = rest.partition(END)[2]
        asked.page.write_text(f"{before}{begin}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
