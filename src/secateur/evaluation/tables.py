"""What the command line prints of each verb's result, as tables.

In: a result. Out: tables. Imports nothing that computes.
"""

from collections.abc import Callable
from typing import Any

from secateur.errors import RecipeError
from secateur.evaluation.study import Comparison, comparison_table
from secateur.report.page import Tables
from secateur.report.records import (
    BenchResult,
    Evaluation,
    Inspection,
    Measurement,
    RecoveryRecord,
    Summary,
)
from secateur.report.report import measurement_table
from secateur.report.rows import (
    bench_table,
    evaluation_table,
    inspection_table,
    recovery_table,
    summary_table,
)

_TABLES: dict[type, Callable[[Any], Tables]] = {
    Summary: summary_table,
    Inspection: inspection_table,
    Measurement: measurement_table,
    Evaluation: evaluation_table,
    BenchResult: bench_table,
    RecoveryRecord: recovery_table,
    Comparison: comparison_table,
}


def table(result: Any) -> Tables:
    """Return the tables that the command line prints of a result; a notebook draws them.

    `result`: what `prune`, `measure`, `inspect`, `evaluate`, `bench`, `recover` or `compare`
    returned. Raises RecipeError for anything else.
    """
    record = getattr(result, "summary", result)  # that of a run, whose module imports what trains
    shown = _TABLES.get(type(record))
    if shown is None:
        raise RecipeError(
            "table: takes what prune, measure, inspect, evaluate, bench, recover or compare "
            f"returned, got {record!r}."
        )
    return shown(record)
