"""Damage to files that nobody meant."""

import random
from pathlib import Path


def flip_a_bit(directory: Path, choose: random.Random) -> bool:
    """Flip one random bit of one random file of the directory; False if no file has any."""
    files = sorted(file for file in directory.glob("*") if file.stat().st_size) if directory.is_dir() else []
    if not files:
        return False
    file = choose.choice(files)
    data = bytearray(file.read_bytes())
    place = choose.randrange(len(data))
    data[place] ^= 1 << choose.randrange(8)
    file.write_bytes(data)
    return True
