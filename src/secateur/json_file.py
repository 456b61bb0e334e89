"""Dataclasses as JSON files: written by `Record`, read back by `parse_json` into the dataclass that they came from."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from secateur.errors import CheckpointError

Kind = TypeVar("Kind")


@dataclass(frozen=True, slots=True)
class Record:
    """What one command found, as plain numbers. It is written to JSON, read back and rendered from one dataclass."""

    def plain(self) -> dict[str, Any]:
        """Return the fields as a mapping; a record adds what follows from them, or leaves out what was not measured."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Return the record as indented JSON."""
        return json.dumps(self.plain(), indent=2, default=lambda model: model.model_dump()) + "\n"

    @classmethod
    def from_json(cls: type[Kind], text: str | bytes, where: str) -> Kind:
        """Return the record that `to_json` wrote. Raises CheckpointError, naming `where`, if it did not."""
        return parse_json(cls, text, where)


def parse_json(kind: type[Kind], text: str | bytes, where: str) -> Kind:
    """Return the dataclass; keys that it has no field for are left out.

    Raises CheckpointError, naming `where` and the first field that is missing or wrong.
    """
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"{part}: " for part in first["loc"])
        raise CheckpointError(
            f"{where}: {field}{first['msg'].lower()}; it was changed or written by another version of secateur; "
            "make it anew."
        ) from None
