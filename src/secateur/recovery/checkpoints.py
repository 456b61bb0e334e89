"""Checkpoints of an interrupted training: the Trainer writes and reads them, a store has their digests.

In: the Trainer's folder. Out: the checkpoint to go on from, if one is undamaged.
"""

import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from secateur.errors import CheckpointError
from secateur.files import disk_errors
from secateur.log import Tell
from secateur.store import Store


class Checkpoints:
    """The directories that the Trainer saves, by step. Each is a step of a store, with its digests.

    `label`: the training's name in sentences. `tell`: gets a line about what is damaged.
    """

    def __init__(self, folder: Path, label: str, tell: Tell) -> None:
        self.folder, self.store = folder, Store(folder, label=label, tell=tell)

    def finish(self, step: int) -> None:
        """Save the digests of a checkpoint that is written; then remove all others."""
        self.store.save_files(self.path(step).name, self.path(step))
        for other in set(self._steps()) - {step}:
            self._remove(other)

    def last(self) -> Path | None:
        """Return the last checkpoint that is undamaged; None: begin anew.

        All others are removed, so that the Trainer does not meet them.
        """
        last: int | None = None
        for step in sorted(self._steps(), reverse=True):
            if last is None and self.store.has_files(self.path(step).name, self.path(step)):
                last = step
            else:
                self._remove(step)
        return None if last is None else self.path(last)

    def path(self, step: int) -> Path:
        """Return the directory of the checkpoint of this step, as the Trainer names it."""
        return self.folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    @contextmanager
    def errors_told(self) -> Iterator[None]:
        """Turn a full disk, and a checkpoint that holds code, into a CheckpointError."""
        with disk_errors(self.folder):
            try:
                yield
            except pickle.UnpicklingError:  # the Trainer opens pickles with weights_only
                raise CheckpointError(
                    f"{self.folder}: a checkpoint holds more than tensors, so it is not opened; delete the directory "
                    "and start again."
                ) from None
            except RuntimeError as error:
                # torch writes through a stream that knows no error numbers and has many words for one failure.
                if all(frame.f_code is not torch.save.__code__ for frame, _ in walk_tb(error.__traceback__)):
                    raise
                raise CheckpointError(
                    f"{self.folder}: a checkpoint could not be written whole; free some space or choose another place."
                ) from None

    def _steps(self) -> list[int]:
        return [int(path.name.rpartition("-")[2]) for path in self.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/")]

    def _remove(self, step: int) -> None:
        self.path(step).with_suffix(".json").unlink(missing_ok=True)
        shutil.rmtree(self.path(step))
