"""The command line's application: shared options, the progress bar, how a process ends."""

import glob
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

import secateur
from secateur.errors import RecipeError
from secateur.files import without_places, yaml_of
from secateur.log import TELLING_SHARES, Progress
from secateur.plugins import default_domains, mixture, mixtures
from secateur.recipe import INSTALLED_DOMAINS, SHARE_OF_ANSWERS, Keys, merged, preset_texts

# Without a terminal: at least so long between two lines of a stage, and longer in runs of hours.
LINE_SECONDS, LINE_SHARE = 10.0, 1 / 60


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Yield a listener that draws a bar per stage, or without a terminal prints lines."""
    console = Console(stderr=True)
    if not console.is_interactive:
        yield _lines()
        return
    columns = (TextColumn("{task.description:<24}"), BarColumn(bar_width=30), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    bars = RichProgress(*columns, *times, console=console)
    tasks = {}

    def listen(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            bars.start()  # not before: a run that fails at once prints only its sentence
            tasks[stage] = bars.add_task(stage, total=total)
        if done < bars.tasks[tasks[stage]].completed:  # anew, which has a clock of its own
            bars.reset(tasks[stage], total=total, completed=done)
        bars.update(tasks[stage], completed=done, total=total)

    try:
        yield listen
    finally:
        if tasks:
            bars.stop()


def _lines(clock: Callable[[], float] = time.monotonic) -> Progress:
    """Return a listener for pipes and log files.

    It prints a line as a stage first begins, and then every so often what is left of it. Each
    begins with the time since the start, in h:mm:ss. A stage that goes back has begun anew.
    """
    start = last = clock()
    begun: dict[str, tuple[float, int]] = {}  # by stage: when, and how much was done then
    reached: dict[str, int] = {}

    def listen(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = clock()
        is_new = stage not in begun
        if is_new or done < reached[stage]:
            begun[stage] = (now, done)
        reached[stage] = done
        is_due = done < total and now - last >= max(LINE_SECONDS, (now - start) * LINE_SHARE)
        if not is_new and not is_due:
            return
        since, before = begun[stage]
        text = stage if is_new else f"{stage}: {done:,} of {total:,}"
        if done - before >= max(1, TELLING_SHARES[0] * total):
            text += f", about {_clock((now - since) * (total - done) / (done - before))} left"
        last = now
        tell(f"{_clock(now - start)} {text}")

    return listen


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


IN_ONE_PROCESS = frozenset({"bench", "export", "inspect", "push", "verify"})


def has_ranks() -> bool:
    """Whether a launcher started more than one process."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def launched() -> Iterator[None]:
    """Join the other ranks while the block runs, and leave together with them.

    Raises RecipeError for a command that runs in one process, RankError if not all ranks start.
    """
    if not has_ranks():
        yield
        return
    from secateur.ranks import joined

    with joined():
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        if command in IN_ONE_PROCESS:
            raise RecipeError(
                f"{command}: runs in one process, got {os.environ['WORLD_SIZE']} ranks; start it "
                "without torchrun."
            )
        try:
            yield
        except SystemExit as end:  # also raised on success
            if end.code:
                raise


def last_word(sentence: str) -> str | None:
    """Return the sentence to print as this process ends; None if another rank prints it."""
    if not has_ranks():
        return sentence
    from secateur.ranks import last_word

    return last_word(sentence)


# Ctrl-C, `kill`, and the end of the terminal, where the system knows it.
_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
STOPPED_BY = {128 + number: number for number in _SIGNALS}
PATIENCE_SECONDS = 5.0


@contextmanager
def stoppable(patience_seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Within the block SIGINT, SIGTERM and SIGHUP raise SystemExit with status 128 + signal.

    Under nohup SIGHUP stays ignored. If the block does not end within `patience_seconds`, the
    process exits with that status.
    """
    handlers = {
        number: signal.signal(number, _stop)
        for number in _SIGNALS
        if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN
    }
    heard, told = socket.socketpair()
    told.setblocking(False)
    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(heard, patience_seconds), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        told.close()  # ends the thread
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _stop(number: int, frame: object) -> None:
    # An exception, so that half-written directories are removed; not KeyboardInterrupt, which typer
    # turns into an exit of its own.
    raise SystemExit(128 + number)


def _watch(heard: socket.socket, patience_seconds: float) -> None:
    with heard:
        number = 0
        while 128 + number not in STOPPED_BY:
            data = heard.recv(1)
            if not data:
                return
            number = data[0]
        heard.settimeout(patience_seconds)
        try:
            while heard.recv(1):
                pass
        except TimeoutError:
            print(
                "secateur: interrupted in a long operation; the same command goes on.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(128 + number)


app = typer.Typer(
    help=(
        "Make large language models smaller: whole channels out, ordinary Hugging Face checkpoints "
        "back."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> bool:
    if wanted:
        print(f"secateur {secateur.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None:
    pass


# Shows paths and generated text as they are, with brackets and colons.
CONSOLE = Console(markup=False, emoji=False, highlight=False)
if not CONSOLE.width:  # COLUMNS=0, which some shells without a terminal say
    CONSOLE.width = 80

Model = Annotated[
    str, typer.Argument(help="A local directory, a hub id, a .gguf file, or smollm2-135m.")
]
Out = Annotated[
    Path, typer.Argument(help="The directory to write; it appears complete or not at all.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT if it is an earlier result.")
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Write a trim that costs more than was foretold or is bearable."),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, mps, ...; by default a GPU if torch finds one."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]
RecipeFile = Annotated[
    str | None,
    typer.Option("--recipe", metavar="FILE", help="A YAML recipe; the options here override it."),
]
Preset = Annotated[
    str | None,
    typer.Option(help=f"Start from {', '.join(preset_texts())}; --recipe and options override it."),
]
Remove = Annotated[
    float | None, typer.Option(help="Share of all parameters to remove; tied weights count once.")
]
Answers = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE|FILE",
        help=(
            "Share of the text that the dense model answers itself; 0 for none. FILE[:COLUMN]: "
            "half of the text is what it answers to these prompts."
        ),
    ),
]
Domains = Annotated[
    list[str] | None,
    typer.Option(
        "--domain",
        metavar="NAME[=FILE[:COLUMN]]",
        help=(
            f"Domain of text, repeatable: one of {', '.join(INSTALLED_DOMAINS)}, any name with a "
            f"text file, or a mixture that is streamed from the hub: {', '.join(mixtures())}."
        ),
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help=(
            "Any key of the recipe, repeatable: calibration.num_tokens=8192 (YAML); see secateur "
            "recipe."
        ),
    ),
]
To = Annotated[
    str | None,
    typer.Option(
        "--to",
        metavar="SIZE",
        help="What may stay: parameters, as 0.4B, or bytes, as 8GB; not --remove.",
    ),
]
OtherDense = Annotated[
    bool,
    typer.Option(
        "--other-dense", help="The dense model is meant to be another than the one that was pruned."
    ),
]


def task_names(tasks: str | None, directory: Path | None) -> tuple[str, ...]:
    """Return the names in `--tasks`. Raises RecipeError if `--tasks-data` is no directory."""
    if directory is not None and not directory.is_dir():
        raise RecipeError(f"--tasks-data {directory}: there is no such directory.")
    return tuple(name.strip() for name in tasks.split(",")) if tasks else ()


def tell(text: str) -> None:
    """Print a line that is not a result."""
    print(text, file=sys.stderr, flush=True)


def show(record: Any, written: str = "", *, as_json: bool = False) -> None:
    """Print what a command found as JSON, or as tables and where it was `written`. Other ranks
    print nothing.
    """
    from secateur.ranks import is_first

    if record is None or not is_first():
        return
    if as_json:
        print(record.to_json(), end="")
        return
    CONSOLE.print(secateur.table(record))
    if written:
        CONSOLE.print(f"Written to {written}.", soft_wrap=True)


def command_line(out: Path) -> str:
    """Return this command for the model card: paths by their last part."""
    return shlex.join(["secateur", *(_public(word, out) for word in sys.argv[1:])])


def _public(word: str, out: Path) -> str:
    """Return a word of the command line, its path (of NAME=FILE that behind the sign) by its last
    part.
    """
    name, sign, value = word.partition("=") if re.match(r"[\w.-]+=", word) else ("", "", word)
    if value.startswith(("{", "[")) and "/" in value:
        return f"{name}=..."  # recipe.yaml has it whole
    return f"{name}{sign}{out.name if value == str(out) else without_places(value)}"


def shares(text: str | None) -> list[float]:
    """Return the numbers in `--remove`. Raises RecipeError for what is none."""
    try:
        return [] if text is None else [float(number) for number in text.split(",")]
    except ValueError:
        raise RecipeError(
            f"--remove {text}: give a share such as 0.2, or several with commas between."
        ) from None


def parse_domains(texts: list[str]) -> dict[str, Keys]:
    """Return `--domain` as a recipe's `calibration.domains`."""
    domains: dict[str, Keys] = {}
    for text in texts:
        name, separator, file = text.partition("=")
        if separator and not (name and file):
            raise RecipeError(
                f"--domain {text}: give NAME=FILE, or one of {', '.join(INSTALLED_DOMAINS)}."
            )
        new = mixtures().get(text) or {name: of_file(file) if separator else {"installed": name}}
        if twice := [name for name in new if name in domains]:
            raise RecipeError(
                f"--domain {twice[0]}: given twice; list several files of one domain in a recipe."
            )
        domains |= new
    return domains


def with_answers(data: Keys, answers: str | None) -> Keys:
    """Return a recipe's keys with `--answers`: a share of the text, or the file whose prompts are
    answered.
    """
    if answers is None:
        return data
    calibration = dict(data.get("calibration", {}))
    try:
        calibration["answers"] = float(answers)
    except ValueError:
        source = of_file(answers)
        place = Path(source["files"][0]).expanduser()
        if not answers.strip() or not (place.exists() or glob.glob(str(place), recursive=True)):
            raise RecipeError(
                f"--answers {answers}: is no share and no file; give a share from 0 to 1, or a "
                "file of prompts."
            ) from None
        domains = calibration.get("domains", default_domains())
        domains = mixture(domains) if isinstance(domains, str) else domains
        if not domains.get("answers", {"answers": True}).get("answers"):
            raise RecipeError(
                f"--answers {answers}: a domain of text is called 'answers'; call it by another "
                "name."
            ) from None
        calibration["domains"] = {**domains, "answers": {**source, "answers": True}}
        calibration.setdefault("answers", SHARE_OF_ANSWERS)
    return {**data, "calibration": calibration}


def of_file(text: str) -> Keys:
    """Return the source of FILE or FILE:COLUMN; a file whose name has a colon is found first."""
    file, colon, column = text.rpartition(":")
    if not (file and colon and column) or "/" in column or Path(text).expanduser().exists():
        return {"files": [text]}
    return {"files": [file], "column": column}


def parse_sets(texts: list[str] | None) -> Keys:
    """Return `--set KEY=VALUE` as a mapping of a recipe's keys; the last one of a key counts."""
    keys: Keys = {}
    for text in texts or ():
        key, separator, written = text.partition("=")
        if not separator or not all(key.split(".")):
            raise RecipeError(f"--set {text}: give KEY=VALUE, such as calibration.num_tokens=8192.")
        try:
            value = yaml_of(written)
        except ValueError as error:
            raise RecipeError(f"--set {text}: the value is no YAML ({error}); quote it.") from None
        for name in reversed(key.split(".")):
            value = {name: value}
        keys = merged(keys, value)
    return keys
