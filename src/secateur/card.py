"""The model card that lies beside the weights. In: a `Summary`. Out: Markdown with the run's own table and command."""

from secateur.summary import Summary
from secateur.tables import caveats, headline, markdown, note_rows, quality_and_size, verdict


def model_card(summary: Summary) -> str:
    """Return the card: what was removed, the measured table, how to load it, how it was made."""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [secateur, structured-pruning]",
        "---",
        "",
        f"# {summary.model}, pruned by secateur",
        "",
        verdict(summary),
        "",
        *_loading(summary),
        "",
        *markdown(quality_and_size(summary)),
        "",
        "## How it was made",
        "",
        f"- command: `{summary.command}`" if summary.command else "- from Python: `secateur.prune`",
    ]
    lines += [f"- {label}: {text}" for label, text in note_rows(summary) if label != "it writes"]
    lines += [f"- versions: {', '.join(f'{name} {version}' for name, version in summary.versions.items())}"]
    lines += [
        "- all options: `recipe.yaml`; kept units: `keep.json`; every step: `run.jsonl`; all figures: `result.json`"
    ]
    lines += [f"- note: {caveat}" for caveat in caveats(summary)]
    return "\n".join(lines) + "\n"


def _loading(summary: Summary) -> list[str]:
    how, first, trust = "Loads with stock transformers:", [], ""
    if summary.has_layers_of_different_widths:
        how = (
            "Its layers have widths of their own, which stock modelling cannot build. Load it with secateur, or let "
            "transformers run the modelling file that lies beside the weights:"
        )
        first = ["import secateur", "", 'model = secateur.load("path/to/this/directory")', ""]
        trust = ", trust_remote_code=True"
    return [
        f"{headline(summary)}. {how}",
        "",
        "```python",
        *first,
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory"{trust})',
        "```",
    ]
