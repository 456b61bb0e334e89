"""Changes to files: damage that nobody meant, and other values in JSON."""

import json
import random
from pathlib import Path
from typing import Any


def flip_a_bit(directory: Path, choose: random.Random) -> bool:
    """Flip one random bit of one random file below the directory; False if no file has any."""
    files = sorted(file for file in directory.rglob("*") if file.is_file() and file.stat().st_size)
    if files:
        flip_a_bit_of(choose.choice(files), choose)
    return bool(files)


def flip_a_bit_of(file: Path, choose: random.Random) -> None:
    """Flip one random bit of the file."""
    flip(file, choose.randrange(file.stat().st_size), choose.randrange(8))


def flip(file: Path, place: int, bit: int = 0) -> None:
    """Flip one bit of the file."""
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)


def truncate(file: Path, choose: random.Random) -> None:
    """Cut the file off at a random byte."""
    data = file.read_bytes()
    file.write_bytes(data[: choose.randrange(len(data))])


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of the file's object; a file that is not there has none."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(before | changes), encoding="utf-8")
