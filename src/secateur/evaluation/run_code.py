"""Whether code that a model wrote passes its tests, in a process of its own that can do little harm.

In: programs and tests. Out: the share that pass, in the form of Hugging Face's metric `code_eval`.
What the process may not do is in `code_child`.
"""

import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("code_child.py")
# Of a clock on the wall; the child also has a limit on its seconds of processor time.
MAX_SECONDS = 30


def passes(program: str, tests: str) -> bool:
    """Return whether `program` followed by `tests` runs to its end.

    The process has no network, little memory and time, and writes no file. A program that ends before
    its tests have run does not pass: only what runs to the end repeats a number that was drawn for it.
    """
    drawn = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="code-") as folder:
        try:
            child = subprocess.run(
                args=[sys.executable, "-I", "-S", "-B", str(CHILD), drawn],
                input=f"{program}\n{tests}\n",
                capture_output=True,
                cwd=folder,
                env={},
                encoding="utf-8",
                errors="replace",
                timeout=MAX_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return False
    return child.returncode == 0 and child.stdout.endswith(drawn)


class CodeMetric:
    """Stands for the metric `code_eval`, which the harness's tasks ask the hub for."""

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,)
    ) -> tuple[dict[str, float], dict[int, Any]]:
        """Return pass@1 over the problems: the mean share of a problem's candidates that pass.

        Raises ValueError for another `k`: tasks that sample many candidates are not run here.
        """
        if tuple(k) != (1,):
            raise ValueError(f"pass@k is measured for k = 1 alone, got {list(k)}")
        verdicts = [
            [passes(candidate, tests) for candidate in candidates]
            for tests, candidates in zip(references, predictions, strict=True)
        ]
        shares = [sum(verdict) / len(verdict) for verdict in verdicts]
        return {"pass@1": sum(shares) / len(shares)}, dict(enumerate(verdicts))


def load_metric(path: str, *_: Any, **__: Any) -> CodeMetric:
    """Return the metric that a task asks for, in place of `evaluate.load`. Raises ValueError for others."""
    if path != "code_eval":
        raise ValueError(f"the metric {path} is on the hub alone")
    return CodeMetric()
