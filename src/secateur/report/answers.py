"""What pruning cost on the dense model's own answers, for people. In: `OwnAnswers`. Out: sentences and rows."""

from collections.abc import Iterator

from secateur.report.page import Table
from secateur.stream.own_answers import ANSWER_TOKENS, OwnAnswers


def answers_sentence(answers: OwnAnswers) -> str:
    """Say how the answers changed, for a reader who knows no nats."""
    before, after = answers.ended
    again, more = answers.repeated
    return (
        f"asked {answers.num_prompts} questions that no step of the run had seen, it would choose "
        f"{answers.same_first:.0%} of the words that the dense model answers itself (at each it loses "
        f"{answers.nats_lost:.2f} ± {answers.standard_error:.2f} nats); {after:.0%} of its own answers end within "
        f"{ANSWER_TOKENS} tokens (dense {before:.0%}), and {more:.0%} of what it writes repeats itself (dense "
        f"{again:.0%})"
    )


def answer_rows(answers: OwnAnswers | None) -> Iterator[tuple[str, str, str, str]]:
    """Yield (label, dense, pruned, difference) on the dense model's own answers."""
    if answers is None:
        return
    lost = f"{answers.nats_lost:+.3f} ± {answers.standard_error:.3f}"
    yield "own answers, nats/token", f"{answers.dense_nats:.3f}", f"{answers.nats:.3f}", lost
    yield "their words it would choose", "all", f"{answers.same_first:.1%}", ""
    for label, (before, after) in (("answers that end", answers.ended), ("repeats itself", answers.repeated)):
        yield label, f"{before:.1%}", f"{after:.1%}", f"{100 * (after - before):+.1f} points"


def answer_tables(answers: OwnAnswers | None) -> list[Table]:
    """Return the answers of both models to a few prompts, side by side."""
    if answers is None:
        return []
    return [
        Table(pair.prompt, (), [("dense", pair.dense), ("pruned", pair.pruned)], numbers=False)
        for pair in answers.shown
    ]


def answer_note(answers: OwnAnswers | None) -> Iterator[tuple[str, str]]:
    """Yield of which text the figures on answers are."""
    if answers is not None:
        yield (
            "own answers",
            f"the dense model's, greedy, up to {ANSWER_TOKENS} tokens, {answers.num_tokens:,} in all, to "
            f"{answers.num_prompts} prompts that come with secateur; ± is one standard error over prompts",
        )
