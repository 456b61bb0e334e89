"""Text of installed packages, from packages and a standard library made for the test: which files, and what of them."""

import importlib.metadata
import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from random import Random

import pytest

from secateur.data.sources import MIN_DOCSTRING_CHARACTERS, MIN_SOURCE_BYTES, installed_documents
from secateur.errors import CalibrationError
from secateur.recipe import INSTALLED_DOMAINS, Calibration

LONG = "x" * MIN_DOCSTRING_CHARACTERS
SHORT = "x" * (MIN_DOCSTRING_CHARACTERS - 1)
SOURCE = "# source\n" + "pass\n" * (MIN_SOURCE_BYTES // 5)


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


class Site:
    """Where the test's packages are installed."""

    def __init__(self, folder: Path) -> None:
        self.packages, self.library = folder / "site", folder / "library"
        self.packages.mkdir()
        self.library.mkdir()

    def install(self, name: str, files: dict[str, str]) -> None:
        """Install a package with files by path."""
        info = f"{name.replace('-', '_')}-1.dist-info"
        held = {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n\n"}
        held |= files
        put(self.packages, held | {f"{info}/RECORD": "".join(f"{path},,\n" for path in held)})


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made, all_of_them = Site(tmp_path), importlib.metadata.distributions

    def one(name: str) -> importlib.metadata.Distribution:
        found = [each for each in all_of_them(path=[str(made.packages)]) if each.metadata["Name"] == name]
        if not found:
            raise PackageNotFoundError(name)
        return found[0]

    monkeypatch.setattr(importlib.metadata, "distributions", lambda: all_of_them(path=[str(made.packages)]))
    monkeypatch.setattr(importlib.metadata, "distribution", one)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(made.library) if name == "stdlib" else None)
    return made


def texts(kind: str, seed: int = 0) -> list[str]:
    return list(installed_documents(kind, Random(seed)))


def test_code_is_the_librarys_own_and_not_tables_or_tests(site: Site) -> None:
    wanted = {"a.py": SOURCE + "#a", "folder/b.py": SOURCE + "#b", "folder/deep/c.py": SOURCE + "#c"}
    skipped = ("test", "tests", "idlelib", "site-packages", "dist-packages", "encodings", "pydoc_data")
    put(site.library, wanted)
    put(site.library, {f"{name}/d.py": SOURCE for name in skipped} | {"folder/test/e.py": SOURCE})
    put(site.library, {"_sysconfigdata_linux.py": SOURCE, "small.py": "p" * (MIN_SOURCE_BYTES - 1)})
    (site.library / "notes.txt").write_text(SOURCE)
    assert sorted(texts("code")) == sorted(wanted.values())
    put(site.library, {"exact.py": "p" * MIN_SOURCE_BYTES})
    assert "p" * MIN_SOURCE_BYTES in texts("code")
    text = "# -*- coding: latin-1 -*-\n# schön\n" + SOURCE
    (site.library / "old.py").write_bytes(text.encode("latin-1"))
    assert text in texts("code"), "read in the coding that it names"


def test_the_seed_decides_the_order_and_documents_are_read_when_they_are_due(site: Site) -> None:
    put(site.library, {f"m{number}.py": f"{SOURCE}# {number}" for number in range(12)})
    first = texts("code")
    assert first == texts("code") != texts("code", 1)
    assert sorted(first) == sorted(texts("code", 1)) and first != sorted(first)
    found = installed_documents("code", Random(0))
    next(found)
    put(site.library, {f"m{number}.py": SOURCE + "# changed" for number in range(12)})
    assert list(found) == [SOURCE + "# changed"] * 11


MODULE = f'''"""The module. {LONG}"""

def plain():
    """{LONG} plain"""
    def inner():
        """{LONG} inner"""

async def waits():
    """{LONG} waits"""

def short():
    """{SHORT}"""

def exact():
    """{LONG}"""

class Thing:
    """{LONG} thing"""
    def method(self):
        """First line.

        {LONG} method
        """

value = "{LONG}"
'''


@pytest.mark.parametrize("kind", ["mathematics", "science"])
def test_docstrings_stand_under_their_qualified_names(site: Site, kind: str) -> None:
    package = {"mathematics": "sympy", "science": "scipy"}[kind]
    site.install(package, {f"{package}/part/module.py": MODULE})
    where = f"{package}.part.module"
    expected = [
        f"{where}\n\nThe module. {LONG}",
        f"{where}.plain\n\n{LONG} plain",
        f"{where}.plain.inner\n\n{LONG} inner",
        f"{where}.waits\n\n{LONG} waits",
        f"{where}.exact\n\n{LONG}",
        f"{where}.Thing\n\n{LONG} thing",
        f"{where}.Thing.method\n\nFirst line.\n\n{LONG} method",
    ]
    assert texts(kind) == ["\n\n".join(expected)]


def test_docstrings_of_a_packages_own_files_alone(site: Site) -> None:
    documented = f'"""{LONG}"""'
    files = {
        "sklearn/__init__.py": documented,
        "sklearn/a.py": documented,
        "sklearn/tests/b.py": documented,
        "sklearn/test/c.py": documented,
        "sklearn/d.txt": documented,
        "sklearn/e.py": "this is no Python (",
        "sklearn/f.py": "value = 1",
        "other/g.py": documented,
    }
    site.install("scikit-learn", files)
    assert sorted(texts("science")) == [f"sklearn\n\n{LONG}", f"sklearn.a\n\n{LONG}"]


def test_dialogue_names_speakers_by_letters_in_their_order(site: Site) -> None:
    def turn(*messages: tuple[str, str]) -> list[dict[str, str]]:
        return [{"sender": sender, "text": text} for sender, text in messages]

    conversations = {
        "2": {"messages": [turn(("zoe", "hi")), turn(("amy", "hello"), ("zoe", "how are you"))]},
        "1": {"messages": [turn(("amy", "morning"), ("bob", "evening"), ("amy", "night"))]},
    }
    site.install("chitchat-dataset", {"chitchat_dataset/dataset.json": json.dumps(conversations)})
    assert sorted(texts("dialogue")) == sorted(["A: hi\nB: hello\nA: how are you", "A: morning\nB: evening\nA: night"])
    assert {texts("dialogue", seed)[0][3] for seed in range(10)} == {"h", "m"}


def test_general_text_is_split_into_its_documents_and_rests_are_left_out(site: Site) -> None:
    folder, short, long = "exllamav3/conversion/standard_cal_data", "y" * 199, "z" * 200
    pages = f"{long} one\u2028of two\n{short}\n\n{long} two\n"
    bodies = [f"T\n\n{long}", short, long]
    articles = "".join(f'<doc id="1" url="u" title="T">\n{body}\n\n</doc>\n' for body in bodies)
    files = {"c4.utf8": pages, "wiki.utf8": articles, "multilingual.utf8": f"{long} \u00e4\n{short}"}
    site.install("exllamav3", {f"{folder}/{name}": text for name, text in files.items()})
    assert sorted(texts("web")) == [f"{long} one\u2028of two", f"{long} two"]
    assert sorted(texts("encyclopedia")) == [f"T\n\n{long}", long]
    assert texts("multilingual") == [f"{long} \u00e4"]


@pytest.mark.parametrize("kind", INSTALLED_DOMAINS)
def test_what_is_not_installed_is_one_sentence(site: Site, kind: str) -> None:
    with pytest.raises(CalibrationError, match=rf"^calibration text '{kind}': it comes from .*install it.*\.$"):
        texts(kind)


def test_the_default_domains_are_a_general_mix_where_its_text_is_installed(site: Site) -> None:
    technical = ["code", "mathematics", "science"]
    assert list(Calibration().domains) == technical
    site.install("chitchat-dataset", {"chitchat_dataset/dataset.json": "{}"})
    assert list(Calibration().domains) == ["dialogue", *technical]
    site.install("exllamav3", {"exllamav3/c4.utf8": "", "exllamav3/wiki.utf8": ""})
    mixed = Calibration().domains
    assert list(mixed) == ["web", "encyclopedia", "dialogue", "code", "mathematics", "science"]
    assert all(domain.source == ("installed", name) for name, domain in mixed.items())
