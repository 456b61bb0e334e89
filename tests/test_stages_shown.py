"""What every verb reports while it works: each stage with its steps, from none to all, and the lines it tells."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from bpe_tokenizer import CORPUS, SAMPLES, bpe_tokenizer
from models import saved, tiny_llama
from recipes import grouped
from shown import assert_shown
from stops import lines_of
from torch.autograd.graph import saved_tensors_hooks

import secateur
from secateur.formats.save import Verification

TRAINING = {"num_tokens": 256, "batch_tokens": 128, "learning_rate": 1e-3}
# What the clock, the memory or the last digit of a processor decides.
AMOUNTS = re.compile(r"\d+\.\d+(?!%)|\d[\d,]*(?= (MB|tokens/s))|(?<=-> )\d+")


TRAINS = {"prune, two rounds, trained", "recover"}


def no_gradient(_: Any) -> Any:
    """Stand where autograd keeps what a gradient needs, which takes the memory of every layer at once."""
    pytest.fail("nothing is trained here")


class Heard:
    """Notes stages and lines."""

    def __init__(self) -> None:
        self.stages: dict[str, list[str]] = {}
        self.lines: list[str] = []

    def progress(self, stage: str, done: int, total: int) -> None:
        self.stages.setdefault(stage, []).append(f"{done}/{total}")

    def text(self, place: Path) -> str:
        shown = [f"  {stage}: {' '.join(steps)}" for stage, steps in self.stages.items()]
        told = ["  says: " + AMOUNTS.sub("N", line) for line in self.lines]
        return "\n".join([*shown, *told]).replace(str(place), "PLACE")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("stages")
    tokenizer = bpe_tokenizer(vocab_size=630, corpus=[*CORPUS, *SAMPLES.values()] * 4)
    saved(place / "words", tiny_llama(vocab_size=640), tokenizer)
    return place


def test_the_stages_of_every_verb(
    place: Path, checkpoints: dict[str, Path], recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.formats.save.verify_reload", lambda *_: Verification(0.0))
    model, out = checkpoints["llama"], place / "out"

    def prune(*, model: Path = model, out: str | None = None, **changes: Any) -> Callable[..., Any]:
        asked = grouped({**recipe, **changes})
        return lambda **heard: secateur.prune(model, asked, out=None if out is None else place / out, **heard)

    less = {**recipe, "calibration": {**recipe["calibration"], "num_tokens": 640}}
    verbs: dict[str, Callable[..., Any]] = {
        "prune, two rounds, trained": prune(out="out", rounds=2, remove=0.3, polish=TRAINING),
        "prune, layers and widths by layer": prune(out="layers", depth=1, remove=0.45, budget="curve"),
        "prune, tokens": prune(out="tokens", model=place / "words", vocabulary="auto", remove=0.3),
        "prune, two sizes": lambda **heard: secateur.prune_sizes(
            model, grouped(recipe), (0.1, 0.2), out=place / "sizes of it", **heard
        ),
        "evaluate": lambda **heard: secateur.evaluate(out, model, **heard),
        "bench": lambda progress, tell: secateur.bench(
            out, model, prompt_tokens=8, new_tokens=2, repeats=2, progress=progress
        ),
        "recover": lambda **heard: secateur.recover(
            out, model, {"recover": {**TRAINING, "held_out_blocks": 1}}, out=place / "better", **heard
        ),
        "measure": lambda **heard: secateur.measure(model, grouped(less), out=place / "sizes", **heard),
        "compare": lambda **heard: secateur.compare(place / "study.yaml", place / "cells", **heard),
        "export": lambda progress, tell: secateur.export(
            place / "words", place / "m.gguf", type_name="f16", check=False, progress=progress
        ),
        "verify": lambda progress, tell: secateur.verify(out, progress=progress),
        "push": lambda progress, tell: secateur.push(out, "me/it", dry_run=True, progress=progress),
        "inspect": lambda progress, tell: secateur.inspect(model, grouped(recipe), progress=progress),
    }
    study = {"question": "Which?", "model": str(model), "ratios": [0.2], "seeds": [0], "recipe": grouped(less)}
    study |= {"methods": {"ours": {}}, "evaluation": {"num_blocks": 2}}
    (place / "study.yaml").write_text(yaml.safe_dump(study))
    texts = list[str]()
    for name, verb in verbs.items():
        heard = Heard()
        with nullcontext() if name in TRAINS else saved_tensors_hooks(no_gradient, no_gradient):
            result = verb(progress=heard.progress, tell=heard.lines.append)
        heard.lines += result.summary.warnings if isinstance(result, secateur.Result) else getattr(result, "notes", ())
        texts += [name, heard.text(place).replace(str(model.parent), "MODELS")]
    events = [line["event"] for line in lines_of(out)]
    texts += ["events of the first run", "  " + " ".join(events)]
    assert_shown("stages", "\n".join(texts))
