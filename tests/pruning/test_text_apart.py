"""What judges a run is seen by nothing that chooses, fits or trains: on the paths that people use, judging on."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from bpe_tokenizer import CORPUS, SAMPLES, bpe_tokenizer
from models import saved, tiny_llama
from run_cli import run_cli
from torch import Tensor

from secateur.data import pool
from secateur.data.blocks import JudgedText, LearningText
from secateur.evaluation.text import named_blocks, recipe_blocks
from secateur.formats.save import Verification
from secateur.log import silent
from secateur.model.checkpoint import load_tokenizer, open_checkpoint
from secateur.pruning import run, trim
from secateur.pruning.run import Run
from secateur.recipe import Domain
from secateur.recovery import polish
from secateur.stream import judge
from secateur.vocabulary import order

DOMAINS, NUM_DOCUMENTS, LENGTH, NUM_JUDGED = ("prose", "code"), 400, 32, 8
OPTIONS = ["--vocabulary", "auto", "--remove", "0.3", "--set", "seed=1"]
SET = ["calibration.num_tokens=1280", f"calibration.sequence_length={LENGTH}", "polish.num_tokens=2560"]
LEARNERS = ("counts", "price of tokens", "calibration", "polish")


@dataclasses.dataclass
class Seen:
    """What every part of a run has seen: its name, the tokenizer, and blocks or documents of ids."""

    parts: list[tuple[str, str, Tensor]]
    tokenizers: dict[str, Any]
    reads: Counter[str]

    def documents(self, wanted: str) -> set[str]:
        """Return the names of the documents, which are in every word."""
        found: set[str] = set()
        for part, tokenizer, ids in self.parts:
            if part == wanted:
                found |= set(re.findall(r"[pc]\d{4}(?=;)", self.tokenizers[tokenizer].decode(ids.flatten())))
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, and two domains, each word of which names its document."""
    place = tmp_path_factory.mktemp("apart")
    tokenizer = bpe_tokenizer(vocab_size=630, corpus=[*CORPUS, *SAMPLES.values()] * 4)
    saved(place / "model", tiny_llama(vocab_size=640), tokenizer)
    for name in DOMAINS:
        texts = [f" the {name[0]}{number:04d}; of" * (9 if number % 7 else 60) for number in range(NUM_DOCUMENTS)]
        (place / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return place


@pytest.fixture(scope="module")
def seen(place: Path) -> Seen:
    """A run by the command line."""
    found = Seen([], {"dense": load_tokenizer(open_checkpoint(place / "model"))}, Counter())

    def note(part: str, tokenizer: str, blocks: Iterable[Tensor]) -> None:
        found.parts.extend((part, tokenizer, ids) for ids in blocks)

    def watch(module: Any, name: str, look: Callable[..., None]) -> None:
        original = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            look(*arguments, **options)
            return original(*arguments, **options)

        patched.setattr(module, name, call)

    def losses(_model: Any, _arch: Any, blocks: Any, _progress: Any, stage: str, *_: Any) -> None:
        if stage == "evaluate pruned":
            for name in DOMAINS:
                note("judged", "trimmed", blocks[name].ids_NT)

    def batches(_name: str, ids_NT: Tensor, *, held_out: bool, **_: Any) -> None:
        note("guard" if held_out else "calibration", "trimmed", ids_NT)

    count = order.count_tokens

    def counted(documents: Iterable[Tensor], num_rows: int) -> Any:
        documents = list(documents)
        note("counts", "dense", documents)
        return count(documents, num_rows)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pool, "JUDGED_TOKENS", NUM_JUDGED * LENGTH)
        patched.setattr("secateur.formats.save.verify_reload", lambda *_: Verification(0.0))
        patched.setattr(order, "count_tokens", counted)
        watch(pool, "documents", lambda name, *_: found.reads.update([name]))
        watch(trim, "make_batches", lambda _, ids_NT, **__: note("price of tokens", "dense", ids_NT))
        watch(run, "make_batches", batches)
        watch(judge, "domain_losses", losses)
        watch(polish, "whole_steps", lambda blocks, *_: note("polish", "trimmed", [block.ids_T for block, _ in blocks]))
        domains = [f"--domain={name}={place / name}.jsonl" for name in DOMAINS]
        sets = [option for each in SET for option in ("--set", each)]
        outcome = run_cli("prune", place / "model", place / "out", *OPTIONS, *domains, *sets)
        assert outcome.status == 0, outcome.stderr
        reads = Counter(found.reads)
    found.reads = reads
    found.tokenizers["trimmed"] = load_tokenizer(open_checkpoint(place / "out"))
    return found


@pytest.mark.parametrize("part", LEARNERS)
def test_no_document_that_judges_or_guards_is_learnt_by(part: str, seen: Seen) -> None:
    judged, guards, learnt = (seen.documents(which) for which in ("judged", "guard", part))
    assert judged and guards and learnt and not judged & guards
    assert not learnt & judged, f"{part} has text that judges"
    assert not learnt & guards, f"{part} has text that guards"


def test_all_the_rest_is_counted_and_every_domain_is_read_once(seen: Seen) -> None:
    every = {f"{name[0]}{number:04d}" for name in DOMAINS for number in range(NUM_DOCUMENTS)}
    left_out = every - seen.documents("counts")
    assert seen.documents("judged") | seen.documents("guard") <= left_out
    assert len(left_out) <= len(seen.documents("judged") | seen.documents("guard")) + 2 * len(DOMAINS)
    assert seen.reads == dict.fromkeys(DOMAINS, 1)


def test_the_result_says_which_documents_are_whose_and_evaluate_finds_those_that_judged(place, seen, monkeypatch):
    monkeypatch.setattr(pool, "JUDGED_TOKENS", NUM_JUDGED * LENGTH)
    facts = json.loads((place / "out" / "result.json").read_text())["calibration"]
    assert facts["num_judged_tokens"] == dict.fromkeys(DOMAINS, NUM_JUDGED * LENGTH)
    assert all(0 < judged < held_out for judged, held_out in facts["allotted"].values())
    blocks, notes = recipe_blocks(place / "out", seen.tokenizers["trimmed"], silent)
    assert notes == ()
    again = Seen([("again", "trimmed", part.ids_NT) for part in blocks.values()], seen.tokenizers, Counter())
    assert again.documents("again") == seen.documents("judged")


def test_what_learns_cannot_ask_for_what_judges() -> None:
    for kind in (LearningText, Run):
        assert not [field.name for field in dataclasses.fields(kind) if "judged" in field.name]
        assert not [name for name in dir(kind) if "judged" in name]
    assert not {"held_out", "calibration", "domains"} & set(dir(JudgedText))


def test_evaluate_on_a_domain_of_the_run_is_on_documents_that_it_did_not_use(place, seen, monkeypatch):
    monkeypatch.setattr(pool, "JUDGED_TOKENS", NUM_JUDGED * LENGTH)
    domains, tokenizer = {"mine": Domain(files=(str(place / "prose.jsonl"),))}, seen.tokenizers["trimmed"]

    def drawn(num_blocks: int) -> tuple[set[str], tuple[str, ...]]:
        blocks, notes = named_blocks(domains, num_blocks, LENGTH, tokenizer, silent, place / "out")
        found = Seen([("mine", "trimmed", blocks["mine"].ids_NT)], seen.tokenizers, Counter())
        return found.documents("mine"), notes

    # A trim has counted every document that does not judge or guard.
    fresh, notes = drawn(2)
    assert fresh <= seen.documents("judged") and not notes
    most, [note] = drawn(600)
    assert re.fullmatch(r"the run learnt by text that has 13-grams of this one \(mine \d+%\), which flatters.*\.", note)
    monkeypatch.setattr("secateur.evaluation.text.COUNTED_BY_A_TRIM", 0)
    used = set.union(*(seen.documents(part) for part in ("guard", "calibration", "polish")))
    assert most & used
    fresh, notes = drawn(60)
    assert len(fresh) > 10 and not fresh & used and not notes
