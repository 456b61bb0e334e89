"""What pruning cost on the dense model's own answers, for people. In: `OwnAnswers`. Out: sentences and rows."""

from collections.abc import Iterator

from secateur.report.page import Table
from secateur.stream.own_answers import ANSWER_TOKENS, OwnAnswers


def lost_cell(answers: OwnAnswers) -> str:
    """Return the nats lost per token with their error over prompts."""
    return f"{answers.nats_lost:+.3f} ± {answers.standard_error:.3f}"


def answer_rows(answers: OwnAnswers | None) -> Iterator[tuple[str, str, str, str]]:
    """Yield (label, dense, pruned, difference) on the dense model's own answers."""
    if answers is None:
        return
    yield "own answers, nats/token", f"{answers.dense_nats:.3f}", f"{answers.nats:.3f}", lost_cell(answers)
    yield "same first choice there", "all", f"{answers.same_first:.1%}", ""
    for label, (before, after) in (("answers that end", answers.ended), ("repeats itself", answers.repeated)):
        yield label, f"{before:.1%}", f"{after:.1%}", f"{100 * (after - before):+.1f} points"


def answer_tables(answers: OwnAnswers | None) -> list[Table]:
    """Return the answers of both models to a few prompts, side by side."""
    if answers is None:
        return []
    return [
        Table(pair.prompt, (), [("dense", _printable(pair.dense)), ("pruned", _printable(pair.pruned))], numbers=False)
        for pair in answers.shown
    ]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text).strip("\n")


def answer_note(answers: OwnAnswers | None) -> Iterator[tuple[str, str]]:
    """Yield of which text the figures on answers are."""
    if answers is not None:
        yield (
            "own answers",
            f"the dense model's, greedy, up to {ANSWER_TOKENS} tokens, {answers.num_tokens:,} in all, to "
            f"{answers.num_prompts} prompts that come with secateur; ± is one standard error over prompts",
        )
