"""Keep transformers and huggingface_hub off the user's terminal while we call them.

Everything they would warn about that matters for a result (missing, unexpected or mismatched tensors, odd generation
settings) is checked by our own code, which raises instead. Not thread-safe: verbosity is global in those libraries.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence log lines, progress bars and warnings of both libraries inside the block, and restore them after."""
    verbosity, hub_verbosity = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    bars_were_on = transformers_logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity(logging.CRITICAL)
        hub_logging.set_verbosity(logging.CRITICAL)
        transformers_logging.disable_progress_bar()  # switches the hub's bars too
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            hub_logging.set_verbosity(hub_verbosity)
            if bars_were_on:
                transformers_logging.enable_progress_bar()
