"""Domains to documents: every format gives the same documents, every mistake is one sentence, nothing is imported."""

import csv
import gzip
import itertools
import json
import os
import re
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.errors import HTTPError
from shown import assert_sentences, refusal
from tiny_tokenizer import tiny_tokenizer
from warm import WarmProcesses

from secateur.data import rows as rows_of_files
from secateur.data import sources
from secateur.data.sources import documents
from secateur.errors import CalibrationError
from secateur.plugins import GENERAL_TEXT, general_text, mixtures
from secateur.recipe import INSTALLED_DOMAINS, Calibration, Domain

TEXTS = ["one, with a comma", 'two "quoted"\nand a line', "drei: schön\u2028x", "four", "five"]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
STRUCTURED = [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz"]
TOKENIZER = tiny_tokenizer()


def read(path: Path, *, column: str = "text", seed: int = 0) -> list[str]:
    return list(documents("mine", Domain(files=(str(path),), column=column), TOKENIZER, seed))


def sentence(path: Path, column: str = "text") -> str:
    with pytest.raises(CalibrationError) as caught:
        read(path, column=column)
    message = str(caught.value)
    assert path.name in message and message.endswith((".", "?")) and "\n" not in message
    return message


def put(path: Path, data: str | bytes) -> Path:
    data = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def put_rows(path: Path, rows: list[dict]) -> Path:
    match path.name.removesuffix(".gz").rpartition(".")[2]:
        case "jsonl":
            return put(path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
        case "json":
            return put(path, json.dumps({"version": 1, "data": rows}))
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            return path
    plain = path.with_name("plain")
    with plain.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return put(path, plain.read_bytes())


@pytest.mark.parametrize("suffix", STRUCTURED)
def test_every_structured_format_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    rows = [{"id": str(number), "text": text, "body": text} for number, text in enumerate(TEXTS)]
    reference = read(put_rows(tmp_path / "reference.jsonl", rows))
    path = put_rows(tmp_path / f"rows{suffix}", rows)
    assert sorted(reference) == sorted(TEXTS)
    assert read(path) == read(path, column="body") == reference
    assert any(read(path, seed=seed) != reference for seed in (1, 2, 3))


def test_text_files_are_cut_at_line_boundaries_and_lose_nothing(tmp_path: Path) -> None:
    text = "".join(f"line {number} of this file\n" for number in range(2000))
    parts = read(put(tmp_path / "a.txt", text))
    assert parts == read(put(tmp_path / "a.txt.gz", text))
    assert len(parts) == 6 and all(part.endswith("file\n") for part in parts)
    assert sum(len(part) >= 8000 for part in parts) == 5
    assert sorted("".join(parts).splitlines()) == sorted(text.splitlines())


def test_long_csv_fields_are_read_and_the_global_limit_is_left_as_it_was(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    long = "x" * (limit + 1)
    assert read(put(tmp_path / "a.csv", f"text\n{long}\n")) == [long]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("suffix", [".jsonl", ".json.gz", ".parquet"])
def test_chats_go_through_the_chat_template(tmp_path: Path, suffix: str) -> None:
    path = put_rows(tmp_path / f"chat{suffix}", [{"messages": CHAT}])
    assert read(path) == read(path, column="messages") == ["[user] hi\n[assistant] hello\n"]


PACKED = gzip.compress(b"text " * 1000)
EVERY = [".txt", ".jsonl", ".json", ".csv", ".txt.gz", ".jsonl.gz"]
BROKEN: dict[str, str | bytes] = {
    "a.docx": "x",
    "a.parquet.gz": "x",
    **{f"empty{suffix}": b"" for suffix in (*EVERY, ".parquet")},
    **{f"blank{suffix}": b" \n" for suffix in EVERY},
    **{f"not_utf8{suffix}": b"abc\xffdef\n" for suffix in EVERY[:5]},
    "half_a_row.jsonl": '{"text": "x"}\n\n{"text": \n',
    "a_number.jsonl": '"x"\n{"text": 3}',
    "a_list.jsonl": "[1]",
    "a_truth.json": '["x", true]',
    "a_surrogate.jsonl": '{"text": "\\ud800"}',
    "two_lists.json": '{"a": [], "b": []}',
    "half_a_list.json": "[1,",
    "an_open_quote.csv": 'text\n"open\n',
    "no_parquet.parquet": "PAR1 no",
}
# What is written as it stands, not compressed again.
ARCHIVES = {"not": b"text", "cut": PACKED[:-9], "changed": PACKED[:12] + b"\0\0\0" + PACKED[15:]}
ARCHIVES["no block of this type"] = PACKED[:10] + b"\x07" + PACKED[11:]


def test_files_that_are_broken_are_one_sentence_each(tmp_path: Path) -> None:
    said = {"missing": sentence(tmp_path / "none.txt")}
    said |= {name: sentence(put(tmp_path / name, data)) for name, data in BROKEN.items()}
    for name, data in ARCHIVES.items():
        (tmp_path / "packed.txt.gz").write_bytes(data)
        said[f"gzip: {name}"] = sentence(tmp_path / "packed.txt.gz")
    pyarrow.parquet.write_table(pyarrow.table({}), tmp_path / "no_column.parquet")
    said["no column"] = sentence(tmp_path / "no_column.parquet")
    said["a number in parquet"] = sentence(put_rows(tmp_path / "number.parquet", [{"text": 3}]))
    for suffix in STRUCTURED:
        path = put_rows(tmp_path / f"another_column{suffix}", [{"id": "1", "content": "x"}])
        said[f"another column{suffix}"] = sentence(path, column="contents")
    path, bare = put_rows(tmp_path / "chat.jsonl", [{"messages": CHAT}]), tiny_tokenizer()
    bare.chat_template = None
    said["no template"] = refusal(lambda: list(documents("mine", Domain(files=(str(path),)), bare, 0)))
    said = {name: re.sub(r"(JSON|gzip|parquet|CSV) \(.*\)", r"\1 (...)", each) for name, each in said.items()}
    assert_sentences("data/broken", said, tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "text\nx\n"),
        ("a.jsonl", '{"text": "x"}'),
        ("A.JSONL.GZ", '{"text": "x"}'),
        ("a.json", '["x"]'),
        ("a.txt", "x"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_suffixes_in_capitals_are_known_and_a_byte_order_mark_is_no_text(
    tmp_path: Path, name: str, text: str, encoding: str
) -> None:
    data = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("GZ") else data)
    assert read(tmp_path / name) == ["x"]


@pytest.mark.parametrize("offline", [True, False])
def test_datasets_are_streamed_where_there_is_a_network(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    asked: list[Any] = []

    class Rows(list):
        def shuffle(self, seed: int) -> "Rows":
            asked.append(seed)
            return self

    def load(*arguments: Any, **options: Any) -> Rows:
        asked.append((arguments, options))
        return Rows([{"body": "x"}, {"body": "y"}])

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("datasets.load_dataset", load)
    domain = Domain(dataset="somebody/something", config="small", revision="abc", split="test", column="body")
    assert list(documents("mine", domain, TOKENIZER, 3)) == ["x", "y"]
    told = {"split": "test", "revision": "abc", "streaming": not offline}
    assert asked[0] == (("somebody/something", "small"), told)
    assert asked[1] == Random("3:mine").getrandbits(32)


def test_a_connection_that_breaks_while_rows_come_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows:
        def shuffle(self, seed: int) -> Iterator[dict[str, str]]:
            yield {"text": "x"}
            raise HTTPError("Server disconnected without\nsending a response.")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Rows())
    found = documents("mine", Domain(dataset="somebody/something"), TOKENIZER, 3)
    assert next(found) == "x"
    with pytest.raises(CalibrationError, match=r"something: cannot be loaded \(Server disconnected without sending a"):
        next(found)


def test_files_are_shuffled_together_and_those_that_do_not_fit_memory_read_in_parts_by_their_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"a": 300, "b": 100, "c": 4}
    files = [
        put_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name}{at:03}"} for at in range(count)])
        for name, count in counts.items()
    ]
    domain = Domain(files=tuple(map(str, files)))
    whole = list(documents("mine", domain, TOKENIZER, 0))
    assert sorted(whole) == sorted(f"{name}{at:03}" for name, count in counts.items() for at in range(count))
    assert {text[0] for text in whole[:20]} >= {"a", "b"}
    monkeypatch.setattr(sources, "MAX_BYTES_SHUFFLED", 100 * (2 * sources.BYTES_PER_VALUE + 4))
    found = list(documents("mine", domain, TOKENIZER, 0))
    assert sorted(found) == sorted(whole) and found == list(documents("mine", domain, TOKENIZER, 0)) != whole
    first = [text[0] for text in found[:100]]
    assert 70 < first.count("a") < 80 and 20 < first.count("b") < 30 and "c" in first
    assert found[:100] != sorted(found[:100])


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits so small that they are met at once."""
    monkeypatch.setattr(sources, "MAX_BYTES_SHUFFLED", 2**17)
    monkeypatch.setattr(rows_of_files, "MAX_LINE_BYTES", 2**14)
    monkeypatch.setattr(rows_of_files, "MAX_JSON_BYTES", 2**20)
    monkeypatch.setattr(rows_of_files, "MAX_ROW_GROUP_BYTES", 2**22)


def put_bomb(path: Path, part: bytes, times: int) -> Path:
    """Write gzip's bytes of `part` many times over: members that follow each other are one file."""
    path.write_bytes(gzip.compress(part) * times)
    return path


def peak_of(read_some: Callable[[], object]) -> int:
    """Return the most bytes that Python held at once."""
    tracemalloc.start()
    try:
        read_some()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize(
    ("name", "part", "said"),
    [
        ("line.txt.gz", b"x" * 2**20, "line 1: 16.4 kB without a line of text; break it into lines"),
        ("line.jsonl.gz", b"x" * 2**20, "line 1: 16.4 kB without a line of text; break it into lines"),
        ("field.csv.gz", b'"' + b"text\n" * 2**18, "not valid CSV (field larger than field limit"),
        ("list.json.gz", b"[1, " * 2**18, "is longer than 1.0 MB; write it as .jsonl"),
        ("blank.txt.gz", b"\n" * 2**20, ": 16.4 kB without a line of text; break it into lines"),
    ],
)
def test_what_must_be_read_whole_is_not_without_bounds(tmp_path: Path, name: str, part: bytes, said: str) -> None:
    path = put_bomb(tmp_path / name, part, 2**11)  # some 2 GB
    assert peak_of(lambda: said in sentence(path) or pytest.fail(sentence(path))) < 2**24


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize(
    ("name", "part"), [("a.txt.gz", b"a line of text\n" * 2**16), ("a.jsonl.gz", b'{"text": "a row"}\n' * 2**16)]
)
def test_no_more_is_read_than_is_asked_for(tmp_path: Path, name: str, part: bytes) -> None:
    path = put_bomb(tmp_path / name, part, 2**10)  # 1 GB
    domain = Domain(files=(str(path),))
    assert peak_of(lambda: list(itertools.islice(documents("mine", domain, TOKENIZER, 0), 40))) < 2**24


@pytest.mark.usefixtures("tight")
def test_rows_of_parquet_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(pyarrow.repeat(0, 10**6), ["a text " * 200])})
    pyarrow.parquet.write_table(table, path)
    assert path.stat().st_size < 200_000  # for 1.4 GB
    domain = Domain(files=(str(path),))
    before = pyarrow.total_allocated_bytes()
    seen: list[int] = []

    def read_some() -> None:
        for _ in itertools.islice(documents("mine", domain, TOKENIZER, 0), 300):
            seen.append(pyarrow.total_allocated_bytes() - before)

    assert peak_of(read_some) < 2**24 and max(seen) < 2**24


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize("column", [["x" * 100 + str(number) for number in range(10**5)], [[None] * 10**6]])
def test_a_row_group_that_is_too_large_is_one_sentence(tmp_path: Path, column: list[Any]) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, use_dictionary=False)
    assert re.search(r"row group 1: holds \d+\.\d MB, more than 4\.2 MB; write the file with smaller", sentence(path))


DIGESTS = """
import hashlib, itertools, sys
from random import Random
from secateur.data.sources import installed_documents
before = set(sys.modules)
for kind in sys.argv[1:]:
    for text in itertools.islice(installed_documents(kind, Random("0:x")), 5):
        print(kind, hashlib.sha256(text.encode()).hexdigest())
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}), file=sys.stderr)
"""


def test_installed_text_is_not_imported_and_the_same_in_every_process(
    warm: WarmProcesses, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = [kind for kind in INSTALLED_DOMAINS if kind not in GENERAL_TEXT or general_text(kind) is not None]
    done = warm.run([sys.executable, "-c", DIGESTS, *kinds], env=dict(os.environ))  # with a hash seed of its own
    monkeypatch.setattr(sys, "argv", ["-c", *kinds])
    exec(DIGESTS, {})
    digests = capsys.readouterr().out.splitlines()
    assert done.stdout.splitlines() == digests and len(set(digests)) == 5 * len(kinds)
    packages = {"mpmath", "networkx", "scipy", "sklearn", "chitchat_dataset", "pydoc_data"}
    assert done.returncode == 0 and not packages & set(done.stderr.split())


@pytest.mark.parametrize("package", ["datasets", "pyarrow"])
def test_missing_optional_packages_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    path = put_rows(tmp_path / "a.parquet", [{"text": "x"}])
    monkeypatch.setitem(sys.modules, package, None)
    domain = Domain(files=(str(path),)) if package == "pyarrow" else Domain(dataset="somebody/something")
    with pytest.raises(CalibrationError, match=rf"{package}; install secateur\[data\]\.$"):
        list(documents("mine", domain, TOKENIZER, 0))


def test_offline_datasets_read_local_data_and_never_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "local").mkdir()
    put_rows(tmp_path / "local" / "train.jsonl", [{"text": text} for text in TEXTS])
    local = Domain(dataset=str(tmp_path / "local"))
    assert sorted(documents("mine", local, TOKENIZER, 0)) == sorted(TEXTS)
    with pytest.raises(CalibrationError) as caught:
        list(documents("mine", Domain(dataset="somebody/no-such-dataset"), TOKENIZER, 0))
    said = str(caught.value)
    assert said.startswith("dataset somebody/no-such-dataset: cannot be loaded")
    assert "HF_HUB_OFFLINE=1" in said and "local cache" in said and "files" in said


def test_streamed_datasets_are_shuffled_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    put_rows(tmp_path / "train.jsonl", [{"text": str(number)} for number in range(50)])
    domain = Domain(dataset=str(tmp_path))
    first, again, other = (list(documents("mine", domain, TOKENIZER, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other) == sorted(map(str, range(50)))
    with pytest.raises(
        CalibrationError, match=r"cannot be loaded \(.*nowhere.*check its id, config, revision and split"
    ):
        list(documents("mine", Domain(dataset=str(tmp_path), split="nowhere"), TOKENIZER, 0))


@pytest.mark.parametrize("mixture", mixtures())
def test_a_mixture_is_of_data_sets_each_at_one_revision(mixture: str) -> None:
    domains = Calibration(domains=mixture).domains  # pyright: ignore[reportArgumentType]
    assert set(domains) == set(INSTALLED_DOMAINS), "the kinds of text of the defaults"
    assert all(domain.source[0] == "dataset" and len(domain.revision or "") == 40 for domain in domains.values())
