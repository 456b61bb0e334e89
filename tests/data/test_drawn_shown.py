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

LENGTH, TOKENIZER, WITHOUT_END = 24, tiny_tokenizer(), tiny_tokenizer()
WITHOUT_END.eos_token = None
SHARES = {"short": 1.0, "tiny": 0.01}  # 3 of others


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("drawn")
    short = [f"{number:02d} is a document of {'so many ' * (number % 5)}words" for number in range(40)]
    (place / "short.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in short))
    for name, sizes in {"few": (33, 12, 3), "two": (48, 48), "one": (72,), "less": (27, 12)}.items():
        few = [
            "".join(f"{letter}{at:02d}" for at in range(size // 3)) for letter, size in zip("xyz", sizes, strict=False)
        ]
        (place / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in few))
    (place / "wide.txt").write_text("one line\n" + "".join(f"{number:03d} and on " for number in range(24)))
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


SHORT, AGAIN, LONG = {"short": ["short.jsonl"]}, {"again": ["again.csv"]}, {"long": ["p.txt", "q.txt"]}
FEW, TWO, ONE, LESS = ({name: [f"{name}.jsonl"]} for name in ("few", "two", "one", "less"))
CASES: dict[str, tuple[dict[str, list[str]], dict[str, Any], dict[str, Any]]] = {
    "one domain": (SHORT, {"num_tokens": 96, "num_judged_tokens": 30}, {}),
    "its training goes on": (SHORT, {"num_tokens": 48, "num_training_tokens": 120, "num_judged_tokens": 24}, {}),
    "a guard of three": (SHORT, {"num_tokens": 96, "least_held_out": 3}, {}),
    "domains with documents in common": (SHORT | AGAIN, {"num_tokens": 192, "num_judged_tokens": 48}, {}),
    "a small share": (SHORT | {"tiny": ["q.txt"]}, {"num_tokens": 240, "num_judged_tokens": 24}, {}),
    "many blocks": (LONG, {"num_tokens": 24 * 19 + 13}, {}),
    "long documents are shared": (LONG, {"num_tokens": 192, "num_judged_tokens": 96}, {}),
    "a line longer than a piece": ({"wide": ["wide.txt"]}, {"num_tokens": 192}, {}),
    "two documents in all parts": (TWO, {"num_tokens": 48, "least_held_out": 2}, {}),
    "one document in all parts": (ONE, {"num_tokens": 24, "num_judged_tokens": 24}, {}),
    "a rest that did not fit, without ends": (FEW, {"num_tokens": 24}, {"tokenizer": WITHOUT_END}),
    "too little of all": (LESS, {"num_tokens": 48, "num_judged_tokens": 72}, {}),
    "half of what there is is too short to judge": (AGAIN, {"num_tokens": 480, "num_judged_tokens": 240}, {}),
    "it must judge": (AGAIN, {"num_tokens": 480, "num_judged_tokens": 240}, {"must_judge": True}),
    "too short to learn by": (AGAIN, {"num_tokens": 9600}, {}),
    "too short to train on": (AGAIN, {"num_tokens": 96, "num_training_tokens": 9600}, {"key": "polish.num_tokens"}),
    "given": (SHORT, {"num_tokens": 72, "num_judged_tokens": 24}, {"allotted": {"short": Allotted(5, 9)}}),
    "one of two is read": (SHORT | LONG, {"num_tokens": 240, "num_judged_tokens": 24}, {"only": {"long"}}),
}


def text_of(domains: dict[str, list[str]]) -> Any:
    shared_out = {name: {"files": files, "share": SHARES.get(name, 3.0)} for name, files in domains.items()}
    return Calibration.model_validate({"domains": shared_out, "sequence_length": LENGTH}).domains


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_decides_which_document_is_for_what(seed: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    lines = list[str]()
    for name, (domains, amounts, options) in CASES.items():
        pool = TextPool(LENGTH, TOKENIZER, seed)
        lines.append(name)
        try:
            lines.append(shown_split(pool.split(text_of(domains), Amounts(**amounts), **options)))
        except CalibrationError as error:
            lines += [f"  refused: {error}"]
    lines += ["drawn for others"]
    for domains in (SHORT, LESS):
        try:
            [drawn] = TextPool(LENGTH, TOKENIZER, seed).draw(text_of(domains), 3).values()
            lines += shown_blocks("judges", drawn)
        except CalibrationError as error:
            lines += [f"  refused: {error}"]
    assert_shown(f"drawn/seed-{seed}", "\n".join(lines))
