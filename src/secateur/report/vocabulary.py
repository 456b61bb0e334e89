"""A trimmed vocabulary for people: rows of terminal and card, the page's tables, who suffers."""

from collections.abc import Iterator, Mapping

from secateur.report.page import Table
from secateur.report.records import Inspection, Summary, VocabularyFacts

# Scripts of fewer tokens are not named, nor more than so many of those that lose most.
LEAST_TOKENS, MOST_SCRIPTS = 16, 5

TokenCounts = Mapping[str, tuple[int, int]]


def growth(before: int, after: int) -> float:
    """Return the share of tokens that the same text takes more."""
    return after / before - 1 if before else 0.0


def of_dense(summary: Summary) -> str:
    """Return which tokens losses are counted per, if not simply the model's own."""
    return "" if summary.vocabulary is None else " of the dense tokenizer"


def who_suffers(facts: VocabularyFacts) -> str:
    """Say what the trim costs the run's own domains, and which scripts lose most of their tokens."""
    before, after = (sum(column) for column in zip(*facts.by_domain.values(), strict=True))
    lost = [cut - dense for dense, cut in facts.nats.values()]
    own = f"takes {growth(before, after):.1%} more tokens"
    if lost:
        own += f" and loses {sum(lost) / len(lost):.2f} nats per token by it"
    scripts = ", ".join(f"{left:,} of {had:,} {script} tokens" for script, (had, left) in _worst(facts))
    worse = f" What is written in these scripts is predicted worse: {scripts} stay." if scripts else ""
    return (
        f"The vocabulary was trimmed from {facts.num_before:,} to {facts.num_after:,} tokens. Held-out text of the "
        f"run's own domains {own}.{worse}"
    )


def _worst(facts: VocabularyFacts) -> list[tuple[str, tuple[int, int]]]:
    """Return the scripts that lose the largest share of their tokens, and these before and behind it."""
    lost = sorted((-growth(*counts), script) for script, counts in facts.scripts.items() if counts[0] >= LEAST_TOKENS)
    return [(script, facts.scripts[script]) for share, script in reversed(lost) if share > 0][:MOST_SCRIPTS]


def vocabulary_notes(facts: VocabularyFacts) -> Iterator[tuple[str, str]]:
    """Yield what a trim does to text: more tokens and nats by domain, scripts that lose most."""
    yield "text growth", f"{_growths(facts.by_domain, 1)} more tokens for the same held-out text"
    if facts.nats:
        more = ", ".join(f"{name} {after - before:+.3f}" for name, (before, after) in facts.nats.items())
        told = "" if facts.foretold is None else f"; {facts.foretold:.3f} were foretold"
        yield "trim alone", f"{more} nats per token of the dense tokenizer{told}"
    if scripts := _worst(facts):
        yield "scripts", f"tokens that stay: {', '.join(f'{name} {b:,} of {a:,}' for name, (a, b) in scripts)}"


def _growths(counts: TokenCounts, digits: int) -> str:
    return ", ".join(f"{name} {growth(*pair):+.{digits}%}" for name, pair in counts.items())


def vocabulary_cell(inspection: Inspection) -> str:
    """Say what share of the model its tokens are, how many the domains use, and what a trim can free."""
    found, total = inspection.vocabulary, inspection.size.num_params
    said = f"{found.num_tokens:,} tokens, {found.num_params / total:.1%} of all parameters"
    if found.problem is not None:
        return f"{said}; what the domains use is not known: {found.problem}"
    if found.smallest is None or found.params_freed is None:
        return said
    used = ", ".join(f"{name} {count:,}" for name, count in found.used.items())
    num_counted = sum(found.num_counted.values())
    return (
        f"{said}; in {num_counted:,} tokens of the domains' text are so many different ones: {used}. A trim frees up "
        f"to {found.params_freed / total:.1%} before it takes one of these ({found.smallest:,} tokens stay); other "
        "text then takes more tokens"
    )


def vocabulary_tables(facts: VocabularyFacts) -> list[Table]:
    """Return tokens and nats of the same text by domain, before and after a trim."""
    header = ("domain", "dense", "without tokens", "change")
    rows = [(name, f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}") for name, (a, b) in facts.nats.items()]
    return [
        _counted("Tokens of the same held-out text", "domain", facts.by_domain),
        Table("Nats per dense token of held-out text, by the trim alone", header, rows),
    ]


def _counted(caption: str, what: str, counts: TokenCounts) -> Table:
    rows = [
        (name, f"{before:,}", f"{after:,}", f"{growth(before, after):+.1%}") for name, (before, after) in counts.items()
    ]
    return Table(caption, (what, "dense", "pruned", "change"), rows)
