"""JSON that secateur wrote itself, read back into the dataclass it came from."""

from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from secateur.errors import CheckpointError

Kind = TypeVar("Kind")


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
