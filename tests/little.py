"""What runs of the tests leave out, in the tests' own process and in those that they start."""

from importlib import import_module
from pathlib import Path

from secateur.formats.save import Verification

# What judges, in place of the files of the package.
JUDGING = {"prompts.yaml": ("Why?", "Two and two?"), "other_text.yaml": ("The bridge was closed.", "It rained.")}
# They have no text of their own to judge them, and few questions; the command line's have all.
JUDGED_BY_LITTLE = {
    "secateur.data.pool.JUDGED_TOKENS": 0,
    "secateur.stream.judge.ANSWER_TOKENS": 4,
    "secateur.stream.judge.shipped": JUDGING.__getitem__,
}
# A result is not loaded again in a process of its own, which takes longer than the run.
UNPROVED = {"secateur.formats.save.verify_reload": lambda *_: Verification(0.0)}


def leave_out() -> None:
    """Let every run of this process leave all of it out."""
    for name, value in (JUDGED_BY_LITTLE | UNPROVED).items():
        module, _, attribute = name.rpartition(".")
        setattr(import_module(module), attribute, value)


# Begins the code of a process that is started by `python -c`.
BEGUN = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import little; little.leave_out()\n"
