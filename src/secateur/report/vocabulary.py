"""A trimmed vocabulary for people: rows of terminal and card, the page's tables, who suffers."""

from collections.abc import Iterator, Mapping

from secateur.report.page import Table
from secateur.report.records import Inspection, Summary, VocabularyFacts

# Languages whose text grows by less are not named; nor are scripts of fewer tokens in the terminal.
LEAST_GROWTH, LEAST_TOKENS, MOST_SCRIPTS = 0.01, 16, 5

TokenCounts = Mapping[str, tuple[int, int]]


def growth(before: int, after: int) -> float:
    """Return the share of tokens that the same text takes more."""
    return after / before - 1 if before else 0.0


def of_dense(summary: Summary) -> str:
    """Return which tokens losses are counted per, if not simply the model's own."""
    return "" if summary.vocabulary is None else " of the dense tokenizer"


def who_suffers(facts: VocabularyFacts) -> str:
    """Say which languages and domains take more tokens, the worst language first."""
    grown = sorted(((growth(*counts), name) for name, counts in facts.samples.items()), reverse=True)
    named = [(name, share) for share, name in grown if share >= LEAST_GROWTH]
    own = growth(*(sum(column) for column in zip(*facts.by_domain.values(), strict=True)))
    said = f"The vocabulary was trimmed from {facts.num_before:,} to {facts.num_after:,} tokens."
    if not named:
        return (
            f"{said} Text of the run's own domains takes {own:.1%} more tokens, samples of other languages about none."
        )
    (worst, most), *others = named
    languages = "".join(f", {name} {share:.0%}" for name, share in others)
    return f"{said} {worst} text takes {most:.0%} more tokens{languages}; text of the run's own domains {own:.1%}."


def vocabulary_notes(facts: VocabularyFacts) -> Iterator[tuple[str, str]]:
    """Yield what a trim does to text: more tokens by domain and language, scripts that lose most."""
    yield "text growth", f"{_growths(facts.by_domain, 1)} more tokens for the same held-out text"
    yield "languages", f"{_growths(facts.samples, 0)} more tokens, by a short sample of each"
    if facts.sample_nats:
        more = ", ".join(f"{name} {after - before:+.2f}" for name, (before, after) in facts.sample_nats.items())
        yield "languages, loss", f"{more} nats per token of the dense tokenizer, by the trim alone"
    lost = sorted((-growth(*counts), script) for script, counts in facts.scripts.items() if counts[0] >= LEAST_TOKENS)
    worst = [(script, facts.scripts[script]) for share, script in reversed(lost) if share > 0][:MOST_SCRIPTS]
    if worst:
        yield "scripts", f"tokens that stay: {', '.join(f'{name} {b:,} of {a:,}' for name, (a, b) in worst)}"


def _growths(counts: TokenCounts, digits: int) -> str:
    return ", ".join(f"{name} {growth(*pair):+.{digits}%}" for name, pair in counts.items())


def vocabulary_cell(inspection: Inspection) -> str:
    """Say what share of the model its tokens are, how many the domains use, and what a trim can free."""
    found, total = inspection.vocabulary, inspection.size.num_params
    said = f"{found.num_tokens:,} tokens, {found.num_params / total:.1%} of all parameters"
    if found.smallest is None or found.params_freed is None:
        return f"{said}; what the domains use is not known: {found.problem}"
    used = ", ".join(f"{name} {count:,}" for name, count in found.used.items())
    num_counted = sum(found.num_counted.values())
    return (
        f"{said}; in {num_counted:,} tokens of the domains' text are so many different ones: {used}. A trim frees up "
        f"to {found.params_freed / total:.1%} before it takes one of these ({found.smallest:,} tokens stay); other "
        "text then takes more tokens"
    )


def vocabulary_tables(facts: VocabularyFacts) -> list[Table]:
    """Return tokens of the same text by domain and language, before and after a trim."""
    return [
        _counted("Tokens of the same held-out text", "domain", facts.by_domain),
        _counted("Tokens of a few everyday sentences", "language", facts.samples),
    ]


def _counted(caption: str, what: str, counts: TokenCounts) -> Table:
    rows = [
        (name, f"{before:,}", f"{after:,}", f"{growth(before, after):+.1%}") for name, (before, after) in counts.items()
    ]
    return Table(caption, (what, "dense", "pruned", "change"), rows)
