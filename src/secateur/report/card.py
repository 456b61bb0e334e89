"""The model card of a result: its metadata for the hub, and its text. In: a run's records. No local
path.

The metadata is the hub's: https://huggingface.co/docs/hub/model-cards.
"""

import re
from collections.abc import Iterator

from huggingface_hub import ModelCardData

from secateur.facts import Ancestor
from secateur.files import without_places
from secateur.recipe import Domain, Recipe
from secateur.report.page import code, escaped, markdown
from secateur.report.records import RecoveryRecord, Summary
from secateur.report.rows import (
    beside_verdict,
    caveats,
    headline,
    note_rows,
    quality_and_size,
    recovery_card,
    verdict,
    who_suffers,
)

CARD_FILE = "README.md"
TAGS = ("secateur", "pruned", "structured-pruning")
NUM_WORST = 3  # domains named as those that suffered most
# Not huggingface_hub's ModelCard, which warns of a card without metadata and refuses one that is
# not YAML.
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def card_data(summary: Summary, recipe: Recipe) -> ModelCardData:
    """Return the hub's metadata. What is not known is None, which is left out; `unknown` says
    why.
    """
    dense = summary.lineage[-1] if summary.lineage else Ancestor("", None, 0)
    base_model = next(
        (checkpoint.hub_id for checkpoint in reversed(summary.lineage) if checkpoint.hub_id), None
    )
    datasets = {
        without_places(domain.dataset)
        for domain in recipe.calibration.domains.values()
        if domain.dataset
    }
    return ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,  # the hub knows no `pruned`
        datasets=sorted(datasets) or None,
        language=None if summary.vocabulary else list(dense.languages) or None,
        library_name="transformers",
        license=dense.license,
        license_name=dense.license_name,
        license_link=dense.license_link,
        pipeline_tag="image-text-to-text"
        if summary.loaded_by == "AutoModelForImageTextToText"
        else "text-generation",
        tags=list(TAGS),
    )


def unknown(data: ModelCardData, summary: Summary) -> Iterator[str]:
    """Yield a sentence about each part of the metadata that is not known."""
    if data.license is None:
        yield (
            "the licence of the dense model is not known, so the card names none; add license to "
            "its first lines."
        )
    if data.base_model is None:
        yield (
            "the hub id of the dense model is not known, so the card names none; add base_model to "
            "its first lines."
        )
    if data.language is None and summary.vocabulary is not None:
        yield (
            "the vocabulary was trimmed, so the card does not repeat the languages of the dense "
            "model."
        )


def with_metadata(card: str, data: ModelCardData) -> str:
    """Return the card with this metadata in place of its own, if it has any."""
    return f"---\n{data.to_yaml()}\n---\n{_FRONT_MATTER.sub('', card, count=1)}"


def model_card(summary: Summary, recipe: Recipe) -> str:
    """Return the card: what was removed, measured, how to load it, what it is bad at, how it was
    made.
    """
    trimmed = [] if summary.vocabulary is None else [escaped(who_suffers(summary.vocabulary)), ""]
    lines = [
        "",
        f"# {escaped(summary.model)}, pruned by secateur",
        "",
        *trimmed,
        f"**{escaped(verdict(summary))}.**",
        "",
        escaped(beside_verdict(summary)),
        "",
        *_loading(summary),
        "",
        *markdown(quality_and_size(summary)),
        "",
        *_calibrated_on(summary, recipe),
        "",
        "## How it was made",
        "",
        f"- command: {code(summary.command)}"
        if summary.command
        else "- from Python: `secateur.prune`",
        *(f"- {label}: {escaped(text)}" for label, text in note_rows(summary)),
        f"- versions: {escaped(', '.join(map(' '.join, summary.versions.items())))}",
        "- all options: `recipe.yaml`; kept units: `keep.json`; every step: `run.jsonl`; all "
        "figures: `result.json`",
        *(f"- note: {escaped(note)}" for note in caveats(summary)),
    ]
    return with_metadata("\n".join(lines) + "\n", card_data(summary, recipe))


def _calibrated_on(summary: Summary, recipe: Recipe) -> Iterator[str]:
    """Yield which text the run saw, and the domains that lost most, against the dense model."""
    yield from ("## What it was calibrated on, and what it is bad at", "")
    for name, num_tokens in summary.calibration.num_tokens.items():
        source = source_text(recipe.calibration.domains[name])
        yield f"- {escaped(f'{name}: {num_tokens:,} tokens ({source})')}"
    ratios = [
        (summary.pruned_losses[name].perplexity / dense.perplexity, name)
        for name, dense in summary.dense_losses.items()
    ]
    ratios.sort(reverse=True)
    lost = [
        f"{name} ({ratio:.2f} times the dense model's perplexity)"
        for ratio, name in ratios
        if ratio > 1
    ]
    worst = ", ".join(lost[:NUM_WORST])
    other = (
        "Text of other kinds, and other languages, were not measured, and can have lost much more."
    )
    none = "No measured domain lost." if ratios else "Losses were not measured."
    suffers = f"It lost most on {worst}." if worst else none
    yield from ("", escaped(f"{suffers} {other}"))


def source_text(domain: Domain) -> str:
    """Return where a domain's text comes from, files by their names alone."""
    key, value = domain.source
    public = without_places(value, key)
    known = {"installed": "text of installed Python packages", "answers": "questions of its own"}
    source = ", ".join(public) if key == "files" else known.get(key) or f"{key} {public}"
    return f"answers of the dense model to {source}" if domain.answers else source


def _loading(summary: Summary) -> list[str]:
    how, first, trust, config = "Loads with stock transformers:", [], "", ""
    if summary.has_layers_of_different_widths:
        how = (
            "Its layers have widths of their own, which stock modelling cannot build. Load it with "
            "secateur, or let transformers run the modelling file beside the weights:"
        )
        first = ["import secateur", "", 'model = secateur.load("path/to/this/directory")', ""]
        trust, config = ", trust_remote_code=True", ", config=model.config"
    return [
        f"{escaped(headline(summary))}. {how}",
        "",
        "```python",
        *first,
        f"from transformers import {summary.loaded_by}, AutoTokenizer",
        "",
        f'model = {summary.loaded_by}.from_pretrained("path/to/this/directory"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory"{config})',
        "```",
    ]


def recovered_card(card: str | None, record: RecoveryRecord) -> str:
    """Return the pruned model's card, or a new one, with a section on the recovery before how it
    was made.
    """
    text = f"# {escaped(record.pruned)}, recovered by secateur\n" if card is None else card
    before, heading, after = text.partition("\n## How it was made\n")
    return f"{before.rstrip()}\n\n{recovery_card(record)}{heading}{after}"
