"""Change the code on purpose, one place at a time, and see whether the tests notice.

    python tools/mutants.py [--only methods stream] [--sample 20 --seed 0] [--processes 2]

Each file in `tests/mutants` lists mutations: a `file` of the package, the text `old` that occurs in
it once, the text `new` that takes its place, and the `tests` that must then fail. A mutation that
no test can see has `equivalent: why`; it is counted apart and not run. Each is tried on a copy of
`src` with its tests alone. A run in which the tests pass (a survivor), do not start, or in which
`old` has gone, ends with status 1.
"""

import argparse
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # a mutation may loop: then it counts as killed
KILLED, SURVIVED, BROKEN = "killed", "SURVIVED", "BROKEN"


@dataclass(frozen=True, slots=True)
class Mutation:
    """One change: `old` becomes `new` in src/secateur/`file`; `tests` lie below tests/."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""

    def apply(self, source: Path) -> None:
        """Change the file below `source`. Raises ValueError unless `old` occurs exactly once."""
        target = source / "secateur" / self.file
        text = target.read_text(encoding="utf-8")
        if text.count(self.old) != 1 or self.old == self.new:
            raise ValueError(f"{self.file}: {self.old!r} occurs {text.count(self.old)} times, not once")
        target.write_text(text.replace(self.old, self.new), encoding="utf-8")


def mutations(only: list[str]) -> list[Mutation]:
    """Return the mutations of all lists, or of those named."""
    found = []
    for file in sorted((ROOT / "tests" / "mutants").glob("*.yaml")):
        if not only or file.stem in only:
            for each in yaml.safe_load(file.read_text(encoding="utf-8")):
                found.append(Mutation(**(each | {"tests": tuple(each["tests"])})))
    return found


def outcome(mutation: Mutation | None, tests: tuple[str, ...]) -> str:
    """Run the tests on a copy of src with the mutation; `None` changes nothing."""
    with tempfile.TemporaryDirectory(prefix="secateur-mutant-") as folder:
        source = Path(folder, "src")
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        if mutation is not None:
            mutation.apply(source)
        child = os.fork()
        if child == 0:
            _run_tests(source, Path(folder, "log"), tests)
        return _wait(child)


def _wait(child: int) -> str:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            # pytest: 0 all passed, 1 some failed, anything else did not run them.
            return {0: SURVIVED, 1: KILLED}.get(os.waitstatus_to_exitcode(status), BROKEN)
        time.sleep(0.05)
    os.killpg(child, 9)
    os.waitpid(child, 0)
    return KILLED


def _run_tests(source: Path, log: Path, tests: tuple[str, ...]) -> None:
    """Never return: run pytest in this process, a fork that has torch loaded, and end it."""
    os.setpgid(0, 0)
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = str(source)  # for the processes that tests start
    sys.path[:0] = [str(source), str(ROOT)]  # as `python -m pytest` has it
    sys.dont_write_bytecode = True
    with log.open("w") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        import pytest

        # No cache: several run at once. The warning is about what the parent imported.
        options = [
            "-x",
            "-p",
            "no:cacheprovider",
            "--hypothesis-profile=first",
            "-W",
            "ignore::pytest.PytestAssertRewriteWarning",
        ]
        code = pytest.main([*options, *(f"tests/{test}" for test in tests)])
    os._exit(int(code))


def main() -> None:
    """Try the mutations, print those that survive, and a table of counts by file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="lists in tests/mutants, without .yaml")
    parser.add_argument("--file", help="only mutations of this file, such as methods/scores.py")
    parser.add_argument("--sample", type=int, help="try so many, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    everything = [each for each in mutations(options.only) if options.file in (None, each.file)]
    chosen = [each for each in everything if not each.equivalent]
    if options.sample:
        chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))
    load_heavy_packages()

    with ThreadPoolExecutor(options.processes) as pool:
        unchanged = sorted({each.tests for each in chosen})
        for tests, found in zip(unchanged, pool.map(lambda tests: outcome(None, tests), unchanged), strict=True):
            if found != SURVIVED:
                sys.exit(f"these tests fail without any mutation: {' '.join(tests)}")
        results = []
        for each, found in zip(chosen, pool.map(lambda each: outcome(each, each.tests), chosen), strict=True):
            results.append(found)
            if found != KILLED:
                print(f"{found} {each.file}: {each.old!r} -> {each.new!r}, tests {' '.join(each.tests)}", flush=True)
            elif len(results) % 10 == 0:
                print(f"{len(results)} of {len(chosen)} tried", flush=True)
    print_counts(chosen, results, sum(bool(each.equivalent) for each in everything))
    sys.exit(any(found != KILLED for found in results))


def load_heavy_packages() -> None:
    """Import what most tests import, secateur excepted: each fork then starts in no time."""
    import beartype  # noqa: F401
    import hypothesis.strategies  # noqa: F401
    import torch  # noqa: F401
    from transformers import (  # noqa: F401  # noqa: F401
        Gemma3ForCausalLM,
        GemmaForCausalLM,
        LlamaForCausalLM,
        MistralForCausalLM,
        PreTrainedTokenizerFast,
        Qwen2ForCausalLM,
        Qwen3ForCausalLM,
    )


def print_counts(chosen: list[Mutation], results: list[str], num_equivalent: int) -> None:
    """Print how many were killed, by file and in all."""
    tried = Counter(each.file for each in chosen)
    killed = Counter(each.file for each, found in zip(chosen, results, strict=True) if found == KILLED)
    for file in sorted(tried):
        print(f"{file:<36} {killed[file]:>4} of {tried[file]:>4} killed")
    share = killed.total() / max(len(chosen), 1)
    print(f"{killed.total()} of {len(chosen)} mutations killed ({share:.1%}); {num_equivalent} equivalent, not tried")


if __name__ == "__main__":
    main()
