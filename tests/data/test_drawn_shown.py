"""Which text of which document judges a run, guards it and teaches it, block by block: another draw is another run."""

import json
from pathlib import Path
from typing import Any

import pytest
from shown import assert_shown
from tiny_tokenizer import tiny_tokenizer

from secateur.data.blocks import Blocks
from secateur.data.pool import Allotted, Amounts, Split, TextPool
from secateur.errors import CalibrationError
from secateur.recipe import Calibration
from secateur.vocabulary.order import count_tokens

LENGTH, TOKENIZER = 24, tiny_tokenizer()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("drawn")
    short = [f"{number:02d} is a document of {'so many ' * (number % 5)}words" for number in range(40)]
    (place / "short.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in short))
    (place / "again.csv").write_text("text,n\n" + "\n".join(f'"{text}",1' for text in [*short[::3], *"abcdefgh"]))
    lines = ("\n".join(f"{name}{number:03d} a line" for number in range(90)) for name in "pq")
    for name, text in zip("pq", lines, strict=True):
        (place / f"{name}.txt").write_text(text)
    return place


def shown_blocks(part: str, blocks: Blocks) -> list[str]:
    texts = [TOKENIZER.decode(block.ids_T) for block in blocks]
    numbers = ["".join(f"{each:>2}" for each in block.document_T.unique(sorted=True).tolist()) for block in blocks]
    return [f"    {part:<12} {text!r:<40}{number}" for text, number in zip(texts, numbers, strict=True)]


def shown_split(split: Split) -> str:
    text, lines = split.learning.text, list[str]()
    for domain in text.domains:
        lines.append(f"  {domain.name}: {domain.share:.4f}, documents {split.allotted.get(domain.name)}")
        lines += shown_blocks("judges", split.judged.blocks[domain.name])
        lines += shown_blocks("guards", domain.held_out)
        lines += shown_blocks("calibrates", domain.calibration)
        lines += shown_blocks("trains", domain.training(99))
    for name, documents in split.learning.documents().items():
        counts = count_tokens(documents, len(TOKENIZER))
        lines.append(f"  counted of {name}: {int(counts.tokens_V.sum())}, {counts.damped_V.sum():.3f}")
    lines += [f"  {note}" for note in (*text.notes, *split.judged.notes, *split.notes)]
    num_tokens = sum(domain.calibration.num_tokens for domain in text.domains)
    num_held_out_tokens = sum(blocks.num_tokens for blocks in text.held_out.values())
    hashes = [each.content_hash[:8] for each in (text, split.judged)]
    return "\n".join([*lines, f"  {num_tokens} and {num_held_out_tokens} tokens, {', '.join(hashes)}"])


SHORT, AGAIN, LONG = {"short": ("short.jsonl",)}, {"again": ("again.csv",)}, {"long": ("p.txt", "q.txt")}
CASES: dict[str, tuple[dict[str, tuple[str, ...]], dict[str, Any], dict[str, Any]]] = {
    "one domain": (SHORT, {"num_tokens": 96, "num_judged_tokens": 30}, {}),
    "its training goes on": (SHORT, {"num_tokens": 48, "num_training_tokens": 120, "num_judged_tokens": 24}, {}),
    "a guard of three": (SHORT, {"num_tokens": 96, "least_held_out": 3}, {}),
    "domains with documents in common": (SHORT | AGAIN, {"num_tokens": 192, "num_judged_tokens": 48}, {}),
    "long documents are shared": (LONG, {"num_tokens": 192, "num_judged_tokens": 96}, {}),
    "half of what there is is too short to judge": (AGAIN, {"num_tokens": 480, "num_judged_tokens": 240}, {}),
    "it must judge": (AGAIN, {"num_tokens": 480, "num_judged_tokens": 240}, {"must_judge": True}),
    "too short to learn by": (AGAIN, {"num_tokens": 9600}, {}),
    "too short to train on": (AGAIN, {"num_tokens": 96, "num_training_tokens": 9600}, {"key": "polish.num_tokens"}),
    "documents that are given": (
        SHORT,
        {"num_tokens": 72, "num_judged_tokens": 24},
        {"allotted": {"short": Allotted(5, 9)}},
    ),
    "one of two is read": (SHORT | LONG, {"num_tokens": 240, "num_judged_tokens": 24}, {"only": {"long"}}),
}


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_decides_which_document_is_for_what(seed: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    lines = list[str]()
    for name, (domains, amounts, options) in CASES.items():
        shares = {domain: 1.0 + 2 * (domain != "short") for domain in domains}
        text = Calibration.model_validate(
            {
                "domains": {each: {"files": files, "share": shares[each]} for each, files in domains.items()},
                "sequence_length": LENGTH,
            }
        )
        try:
            lines += [
                name,
                shown_split(TextPool(LENGTH, TOKENIZER, seed).split(text.domains, Amounts(**amounts), **options)),
            ]
        except CalibrationError as error:
            lines += [f"  refused: {error}"]
    text = Calibration.model_validate({"domains": {"short": {"files": SHORT["short"]}}, "sequence_length": LENGTH})
    lines += [
        "drawn for others",
        *shown_blocks("judges", TextPool(LENGTH, TOKENIZER, seed).draw(text.domains, 3)["short"]),
    ]
    assert_shown(f"drawn/seed-{seed}", "\n".join(lines))
