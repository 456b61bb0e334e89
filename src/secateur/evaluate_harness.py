"""lm-evaluation-harness as a library: quiet, on a model in memory, reporting to our progress bar.

In: a model and its tokenizer. Out: what the harness makes of them. Nothing is changed of what it computes; its log
lines, bars, prints and its report on the machine are kept away.
"""

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.checkpoint_quiet import quiet_transformers
from secateur.errors import RecipeError


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep the harness off the terminal inside the block. Raises RecipeError if it is not installed."""
    # DISABLE_MULTIPROC: resampling in this process, which the standard errors of some metrics need.
    with quiet_transformers(), contextlib.redirect_stdout(io.StringIO()), patch.dict(os.environ, DISABLE_MULTIPROC="1"):
        try:
            import datasets
            import lm_eval.api.task
        except ImportError:
            raise RecipeError("--tasks: needs lm-evaluation-harness; install secateur[evaluate].") from None
        logger = logging.getLogger("lm_eval")
        level, bars_were_off = logger.level, datasets.are_progress_bars_disabled()
        logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        try:
            with patch.object(lm_eval.api.task, "tqdm", _no_bar):
                yield
        finally:
            logger.setLevel(level)
            if not bars_were_off:
                datasets.enable_progress_bars()


def _no_bar(items: Any, **_: Any) -> Any:
    return items


@cache
def task_manager() -> Any:
    """Return the harness's index of its task files; reading them all takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def simple_evaluate(**arguments: Any) -> dict[str, Any]:
    """Call `lm_eval.simple_evaluate`, without its report on the machine and the working directory's git commit."""
    import lm_eval

    run: Any = lm_eval.simple_evaluate
    with (
        patch("lm_eval.evaluator.add_env_info", lambda storage: None),
        patch("lm_eval.evaluator.get_git_commit_hash", lambda: None),
        patch("tqdm.tqdm", _no_bar),
    ):
        return run(**arguments)


def reporting_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, progress: Callable[[int, int], None]
) -> Any:
    """Return the harness's own wrapper of a model; `progress` is told requests done and their number."""
    from lm_eval.models import huggingface

    wrapper: Any = huggingface.HFLM

    class Reporting(wrapper):
        num_done = num_requests = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
            self.num_done, self.num_requests = 0, len(requests)
            found = super()._loglikelihood_tokens(requests, **options)
            progress(self.num_requests, self.num_requests)  # one call can answer several requests
            return found

        def _model_call(self, inps: Any, *arguments: Any, **options: Any) -> Any:
            self.num_done += len(inps)
            progress(min(self.num_done, self.num_requests), self.num_requests)
            return super()._model_call(inps, *arguments, **options)

    return Reporting(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
