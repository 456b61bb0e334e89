"""Prompts that come with secateur: those that a model answers to learn by, and those that judge it.

In: the name of a file beside this one. Out: its prompts.
"""

from functools import cache
from importlib import resources

import yaml


@cache
def shipped_prompts(file: str) -> tuple[str, ...]:
    """Return a file's prompts, kinds by turns."""
    kinds = yaml.safe_load(resources.files("secateur").joinpath("data", file).read_bytes()).values()
    longest = max(map(len, kinds))
    return tuple(kind[number] for number in range(longest) for kind in kinds if number < len(kind))
