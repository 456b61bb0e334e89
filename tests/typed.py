"""What jaxtyping's hook for imports (pyproject.toml) does to a function, at a third of its time.

By itself it checks each parameter twice and binds each call's arguments for the sake of shapes, in functions without
arrays too, and compiles its checks of an inner function anew at each call of the outer one.

While the hook imports a module, Python finds no compiled file of whatever that one imports. So what is heavy is
imported here, before it.
"""

import dataclasses
import inspect
from typing import Any

import jaxtyping
from beartype import beartype
from transformers import AutoModelForCausalLM, Trainer  # noqa: F401

WHOLE = jaxtyping.jaxtyped


def jaxtyped(*, typechecker: Any) -> Any:
    """Return the decorator: of the dataclass or function, beartype alone if its hints name no array and no string."""

    def checked(function: Any) -> Any:
        if "<locals>" in function.__qualname__:
            return function
        hints = function.__annotations__.values()
        if "jaxtyping" in repr(hints) or any(isinstance(hint, str) for hint in hints):
            return WHOLE(function, typechecker=typechecker)
        return beartype(function)

    def decorate(defined: Any) -> Any:
        if not inspect.isclass(defined):
            return checked(defined)
        if dataclasses.is_dataclass(defined):
            defined.__init__ = checked(defined.__init__)
        return defined

    return decorate


jaxtyping.jaxtyped = jaxtyped
