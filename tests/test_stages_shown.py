"""What every verb reports while it works: each stage with its steps, from none to all, and the lines it tells."""

import inspect
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
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


def test_the_stages_of_every_verb(place, checkpoints, recipe, monkeypatch):
    monkeypatch.setattr("secateur.formats.save.verify_reload", lambda *_: Verification(0.0))
    model, out = checkpoints["llama"], place / "out"

    def prune(out: str, *, model: Path = model, **changes: Any) -> Callable[..., Any]:
        return partial(secateur.prune, model, grouped({**recipe, **changes}), out=place / out)

    training = {**TRAINING, "held_out_blocks": 1}
    less = {**recipe, "calibration": {**recipe["calibration"], "num_tokens": 640}}
    verbs: dict[str, Callable[..., Any]] = {
        "prune, two rounds, trained": prune("out", rounds=2, remove=0.3, polish=TRAINING),
        "prune, layers and widths by layer": prune("layers", depth=1, remove=0.45, budget="curve"),
        "prune, tokens": prune("tokens", model=place / "words", vocabulary="auto", remove=0.3),
        "prune, two sizes": partial(secateur.prune_sizes, model, grouped(recipe), (0.1, 0.2), out=place / "two sizes"),
        "evaluate": partial(secateur.evaluate, out, model),
        "bench": partial(secateur.bench, out, model, prompt_tokens=8, new_tokens=2, repeats=2),
        "recover": partial(secateur.recover, out, model, {"recover": training}, out=place / "better"),
        "measure": partial(secateur.measure, model, grouped(less), out=place / "sizes"),
        "compare": partial(secateur.compare, place / "study.yaml", place / "cells"),
        "export": partial(secateur.export, place / "words", place / "m.gguf", type_name="f16", check=False),
        "verify": partial(secateur.verify, out),
        "push": partial(secateur.push, out, "me/it", dry_run=True),
        "inspect": partial(secateur.inspect, model, grouped(recipe)),
    }
    study = {"question": "Which?", "model": str(model), "ratios": [0.2], "seeds": [0], "recipe": grouped(less)}
    study |= {"methods": {"ours": {}}, "evaluation": {"num_blocks": 2}}
    (place / "study.yaml").write_text(yaml.safe_dump(study))
    texts = list[str]()
    for name, verb in verbs.items():
        heard = Heard()
        with nullcontext() if name in TRAINS else saved_tensors_hooks(no_gradient, no_gradient):
            tell = {"tell": heard.lines.append} if "tell" in inspect.signature(verb).parameters else {}
            result = verb(progress=heard.progress, **tell)
        heard.lines += result.summary.warnings if isinstance(result, secateur.Result) else getattr(result, "notes", ())
        texts += [name, heard.text(place).replace(str(model.parent), "MODELS")]
    events = [line["event"] for line in lines_of(out)]
    texts += ["events of the first run", "  " + " ".join(events)]
    assert_shown("stages", "\n".join(texts))
