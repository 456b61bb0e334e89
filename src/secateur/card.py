"""The model card that lies beside the weights. In: a `Summary`. Out: Markdown with the run's own table and command."""

from secateur.summary import Summary
from secateur.tables import caveats, figure_rows, headline, loss_rows, note_rows, verdict


def model_card(summary: Summary) -> str:
    """Return the card: what was removed, the measured table, how to load it, how it was made."""
    names = list(summary.losses_by_name()) or ["dense", "pruned"]
    rows = [*loss_rows(summary), *((label, [dense, pruned]) for label, dense, pruned in figure_rows(summary))]
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
        "| held-out nats/token (perplexity) | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for label, cells in rows:
        lines.append(f"| {label} | " + " | ".join([*cells, *[""] * (len(names) - len(cells))]) + " |")
    lines += [
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
    if summary.has_layers_of_different_widths:
        return [
            f"{headline(summary)}. Its layers have widths of their own, which stock modelling cannot build. "
            "Load it with secateur, or let transformers run the modelling file that lies beside the weights:",
            "",
            "```python",
            "import secateur",
            "",
            'model = secateur.load("path/to/this/directory")',
            "",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory", trust_remote_code=True)',
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory", trust_remote_code=True)',
            "```",
        ]
    return [
        f"{headline(summary)}. Loads with stock transformers:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")',
        "```",
    ]
