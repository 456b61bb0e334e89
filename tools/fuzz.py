"""Damage files that users and models bring, and see that each ends in success or in one sentence.

    python tools/fuzz.py [--only recipes configs] [--inputs 10000] [--seconds 300] [--seed 0]

Every input is a valid file, made here from tiny models, with one to three changes: bits, cuts,
splices, other types, huge numbers, deep nesting, repeated keys. It goes through the function that a
run reads it with. Anything but a result or a SecateurError is a finding: another exception, more
than `HANG_SECONDS`, more than `MEMORY_BYTES`, or a file outside the input's own directory. Input n
has the seed SEED + n, so a finding comes again with `--only KIND --seed ITS_SEED --inputs 1`. Ends
with status 1 if there is any.
"""

import argparse
import copy
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch  # noqa: E402
import yaml  # noqa: E402
from families import tiny_family  # noqa: E402
from models import tiny_llama  # noqa: E402
from tiny_tokenizer import tiny_tokenizer  # noqa: E402

from secateur.data.rows import read_rows  # noqa: E402
from secateur.data.sources import documents  # noqa: E402
from secateur.errors import SecateurError  # noqa: E402
from secateur.log import RunLog  # noqa: E402
from secateur.model.bind import bind  # noqa: E402
from secateur.model.checkpoint import (  # noqa: E402
    check_weights,
    load_model,
    load_tokenizer,
    meta_model,
    open_checkpoint,
)
from secateur.model.stock import quiet_transformers  # noqa: E402
from secateur.recipe import (  # noqa: E402
    Domain,
    as_recipe,
    dump_recipe,
    parse_recipe,
)
from secateur.store import Store, _sealed, place_beside  # noqa: E402

HANG_SECONDS, MEMORY_BYTES = 30, 6 << 30
FAMILIES = ("llama", "qwen2", "mixtral", "gemma2", "gpt2", "deepseek_v3")
HUGE = (-1, 0, 1, 3, 1e7, 10**7, 2**31, 2**63, 2**64, 10**30, -(10**30), 1e308, float("nan"), float("inf"), 0.5)
STRANGE = ("", "\x00", "\u202e", "\ud800", "\ufeff", "🙂" * 9, "../../x", "/", "null", "1e7", "%s", "a" * 5000)
YAML_WORDS = (
    "&a [*a]",
    "*b",
    "!!timestamp x",
    "!!bool x",
    "0x_",
    "2001-99-99",
    "<<: *a",
    "!!python/name:os.system",
    "? ",
)
TEMPLATES = (
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 10 ** (10 ** 10) }}{{ 'x' * 10 ** 12 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages[0].content.x.y + 1 }}",
)
Random = random.Random


@dataclass(frozen=True, slots=True)
class Seed:
    """A valid file: its path inside the input's directory, its bytes, and how to find JSON in it."""

    path: str
    content: bytes
    form: str = "text"  # text, json, yaml, lines, sealed, safetensors


@dataclass(frozen=True, slots=True)
class Kind:
    """Files of one kind. `prepare` fills a directory with what stays; `read` is the product's."""

    seeds: list[Seed]
    read: Callable[[Path], object]
    prepare: Callable[[Path], object] = lambda place: None


class Hang(BaseException):
    """An input takes too long."""


# --- Changes


def changed(seed: Seed, others: list[Seed], choose: Random) -> bytes:
    """Return the seed's bytes after one to three changes, of its values or of its bytes."""
    content = seed.content
    for _ in range(choose.randint(1, 3)):
        if seed.form != "text" and choose.random() < 0.6:
            with suppress(ValueError, RecursionError, yaml.YAMLError, AttributeError, LookupError, struct.error):
                content = _with_values(seed.form, content, choose)
        else:
            content = choose.choice(BYTES)(content, choose.choice(others).content, choose)
    return content


def _flip(content: bytes, other: bytes, choose: Random) -> bytes:
    data = bytearray(content or b"x")
    for _ in range(choose.choice((1, 1, 2, 16))):
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    return bytes(data)


def _cut(content: bytes, other: bytes, choose: Random) -> bytes:
    first, last = sorted(choose.randrange(len(content) + 1) for _ in range(2))
    return choose.choice((content[:first], content[first:], content[:first] + content[last:]))


def _splice(content: bytes, other: bytes, choose: Random) -> bytes:
    at, begin = choose.randrange(len(content) + 1), choose.randrange(len(other) + 1)
    return content[:at] + other[begin : begin + choose.choice((1, 8, 99, 5000))] + content[at:]


def _insert(content: bytes, other: bytes, choose: Random) -> bytes:
    at = choose.randrange(len(content) + 1)
    texts = [choose.choice(STRANGE), choose.choice(YAML_WORDS), "[" * 5000, str(choose.choice(HUGE)), "9" * 5000]
    added = choose.choice(texts).encode("utf-8", "surrogatepass")
    return content[:at] + choose.choice((added, choose.randbytes(choose.choice((1, 4, 64))))) + content[at:]


def _swap_digits(content: bytes, other: bytes, choose: Random) -> bytes:
    places = [at for at in range(len(content)) if content[at : at + 1].isdigit()]
    if not places:
        return content
    at = choose.choice(places)
    return content[:at] + str(choose.choice(HUGE)).encode() + content[at + 1 :]


BYTES = (_flip, _cut, _splice, _insert, _swap_digits)


def _with_values(form: str, content: bytes, choose: Random) -> bytes:
    """Return the file with one value changed; its length or digest fits again."""
    if form == "lines":
        lines = content.decode().split("\n")
        at = choose.randrange(len(lines))
        lines[at] = _with_values("json", lines[at].encode(), choose).decode("utf-8", "surrogatepass")
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    if form == "yaml":
        value = _with_value(yaml.load(content, yaml.CSafeLoader), choose)
        text = yaml.dump(value, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=choose.random() < 0.5)
        return text.encode("utf-8", "surrogatepass")
    if form == "safetensors":
        end = 8 + struct.unpack("<Q", content[:8])[0]
        header = _with_values("json", content[8:end], choose)
        return struct.pack("<Q", len(header)) + header + content[end:]
    value = _with_value(json.loads(content), choose)
    if form == "sealed":
        if not isinstance(value, dict):
            raise ValueError("every sealed record is a mapping")
        value.pop("sha256", None)
        return _sealed(value)
    text = json.dumps(value, ensure_ascii=choose.random() < 0.5)
    if choose.random() < 0.1:  # the same key again
        again = json.dumps(next(iter(value), "a") if isinstance(value, dict) else "a")
        text = text.replace("{", f"{{{again}: {json.dumps(choose.choice(HUGE))}, ", 1)
    return text.encode("utf-8", "surrogatepass")


def _with_value(value: Any, choose: Random) -> Any:
    """Return the value with one part of it replaced, removed or wrapped."""
    inside = [value]
    for outer in inside:
        inside += [each for each in _values(outer) if isinstance(each, dict | list) and each]
    outer = choose.choice([each for each in inside if isinstance(each, dict | list)] or [None])
    if outer is None or (outer is value and choose.random() < 0.05):
        return _strange(value, choose)
    key = choose.choice(list(outer) if isinstance(outer, dict) else range(len(outer)))
    what = choose.random()
    if what < 0.1:
        del outer[key]
    elif what < 0.2 and isinstance(outer, dict):
        outer[choose.choice(STRANGE)] = outer.pop(key)
    elif what < 0.3 and isinstance(outer, dict):
        # A copy: else a value could come to hold itself.
        outer[key] = copy.deepcopy(choose.choice(_values(choose.choice(inside)) or [None]))
    else:
        outer[key] = _strange(outer[key], choose)
    return value


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, list) else []


def _strange(value: Any, choose: Random) -> Any:
    deep: Any = value
    for _ in range(choose.choice((1, 90, 120, 300))):
        deep = [deep] if choose.random() < 0.5 else {"a": deep}
    plain = [None, True, False, [], {}, [value], {"a": value}, str(value), [value, value], [[]], {"": None}]
    return choose.choice((choose.choice(plain), choose.choice(HUGE), choose.choice(STRANGE), deep, *TEMPLATES[:1]))


# --- Kinds


def kinds(place: Path) -> dict[str, Callable[[], Kind]]:
    """Return what makes each kind, by name. `place`: a directory for what the kinds share."""
    model = place / "model"
    if not model.is_dir():
        _save(tiny_llama(), model)
        tiny_tokenizer().save_pretrained(model)
    makers = (_recipes, _configs, _headers, _gguf, _jsonl, _tokenizers, _journals)
    return {maker.__name__.removeprefix("_"): lambda maker=maker: maker(model) for maker in makers}


def _save(model: Any, directory: Path) -> None:
    with quiet_transformers():
        model.save_pretrained(directory)


def _seeds(directory: Path, forms: dict[str, str]) -> list[Seed]:
    return [Seed(name, (directory / name).read_bytes(), form) for name, form in forms.items()]


def _recipes(model: Path) -> Kind:
    full = {
        "remove": {"share": 0.3, "groups": ["ffn", "kv_heads"], "depth": 1},
        "choose": {"rounds": 3, "budget": "curve", "score": "obs"},
        "repair": {"damping": 0.01},
        "calibration": {"domains": {"a": {"files": ["a.txt"], "share": 0.5}, "b": {"answers": True}}, "num_tokens": 99},
        "recover": {"num_tokens": 5000},
        "output": {"evaluate": 99},
    }
    presets = sorted((ROOT / "src" / "secateur" / "presets").glob("*.yaml"))
    texts = [*(file.read_text() for file in presets), dump_recipe(parse_recipe(full)), "preset: best\nremove: 0.2\n"]
    texts.append("a: &a [x, x]\nb: &b [*a, *a]\nremove: {share: 0.2, layers: *b}\n")
    return Kind(
        [Seed("recipe.yaml", text.encode(), "yaml") for text in texts], lambda at: as_recipe(at / "recipe.yaml")
    )


def _configs(model: Path) -> Kind:
    def read(place: Path) -> object:
        return bind(meta_model(open_checkpoint(place, weights=False).config))

    texts = [json.dumps(tiny_family(name).config.to_dict(), default=str).encode() for name in FAMILIES]
    return Kind([Seed("config.json", text, "json") for text in texts], read)


def _headers(model: Path) -> Kind:
    shape, split = meta_model(open_checkpoint(model).config), model.parent / "split"
    if not split.is_dir():
        _save(tiny_llama(), split)
        whole = open_checkpoint(model)
        loaded = load_model(whole)
        with quiet_transformers():
            loaded.save_pretrained(split, max_shard_size="60KB")
        (split / "model.safetensors").unlink(missing_ok=True)

    def read(place: Path) -> object:
        checkpoint = open_checkpoint(place)
        check_weights(checkpoint, shape)
        return load_model(checkpoint, mapped=len(list(place.iterdir())) % 2 == 0)

    def prepare(place: Path) -> None:
        for file in (*split.iterdir(), model / "generation_config.json"):
            shutil.copy(file, place)

    shards = {file.name: "safetensors" for file in split.glob("*.safetensors")}
    others = {"model.safetensors.index.json": "json", "generation_config.json": "json"}
    whole = Seed("model.safetensors", (model / "model.safetensors").read_bytes(), "safetensors")
    return Kind([whole, *_seeds(split, shards | others)], read, prepare)


def _gguf(model: Path) -> Kind:
    file = model.parent / "tiny.gguf"
    if not file.is_file():
        _write_gguf(file)

    def read(place: Path) -> object:
        checkpoint = open_checkpoint(place / "tiny.gguf")
        bind(meta_model(checkpoint.config))
        load_tokenizer(checkpoint)
        return load_model(checkpoint)

    return Kind([Seed("tiny.gguf", file.read_bytes())], read)


def _write_gguf(file: Path) -> None:
    """Write one layer and a few words: the package gguf takes milliseconds for each."""
    import gguf

    words = ["a", "b", "ab", "<eos>"]
    writer = gguf.GGUFWriter(file, "llama")
    numbers = {"context_length": 64, "embedding_length": 8, "block_count": 1, "feed_forward_length": 16}
    numbers |= {"head_count": 2, "head_count_kv": 1, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": 4}
    for name, number in (numbers | {"vocab_size": len(words), "eos_token_id": 3}).items():
        getattr(writer, f"add_{name}")(number)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    for name, tensor in tiny_llama(num_layers=1, vocab_size=len(words), **sizes).state_dict().items():
        writer.add_tensor(names.get_name(name.removesuffix(".weight")) + ".weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _jsonl(model: Path) -> Kind:
    tokenizer = tiny_tokenizer()
    chat = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 3
    rows = [{"text": "some words", "n": 1}, {"text": "ä 🙂", "x": [1, {"y": None}]}, "a string"]
    lines = ["\n".join(map(json.dumps, each)).encode() for each in (rows, chat)]
    seeds = [Seed("rows.jsonl", each, "lines") for each in lines]
    seeds += [Seed("rows.json", json.dumps(each).encode(), "json") for each in ({"rows": rows[:2]}, chat)]
    seeds += [Seed("rows.csv", b'text,n\r\n"a ""b"" c",1\r\nd,2\r\n'), Seed("rows.txt", "one\ntwo ä\n".encode())]

    def read(place: Path) -> object:
        (file,) = place.iterdir()
        list(read_rows(file))
        return list(documents("mine", Domain(files=(str(file),)), tokenizer, 0))

    return Kind(seeds, read)


def _tokenizers(model: Path) -> Kind:
    source = model.parent / "tokenizer"
    if not source.is_dir():
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]})
        tokenizer.save_pretrained(source)
        (source / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')
        (source / "added_tokens.json").write_text('{"<eos>": 256}')
    rows = json.dumps({"messages": [{"role": "user", "content": "hi"}]})

    def read(place: Path) -> object:
        tokenizer = load_tokenizer(open_checkpoint(place, weights=False))
        domain = Domain(files=(str(place / "rows.jsonl"),))
        return [tokenizer(text, verbose=False)["input_ids"] for text in documents("mine", domain, tokenizer, 0)]

    def prepare(place: Path) -> None:
        shutil.copytree(source, place, dirs_exist_ok=True)
        shutil.copy(model / "config.json", place)
        (place / "rows.jsonl").write_text(rows)

    files = {file.name: "json" for file in source.glob("*.json")} | {
        file.name: "text" for file in source.glob("*.jinja")
    }
    hostile = [Seed("chat_template.jinja", text.encode()) for text in TEMPLATES]
    return Kind(_seeds(source, files) + hostile, read, prepare)


def _journals(model: Path) -> Kind:
    source, inputs = model.parent / "out", {"recipe": {"seed": 1, "model": ["a", None]}, "model file": {"a": "0" * 64}}

    def steps(store: Store) -> list[Any]:
        store.check_input("calibration text", "f" * 64)
        return [
            store.find("round-1") if store.has("round-1") else None,
            store.value("plan", lambda: {"ffn": [1, 2]}),
            store.value("price", lambda: 0.5, depends_on={"a": 1}),
        ]

    def opened(place: Path) -> Any:
        options: dict[str, Any] = {"overwrite": False, "protected": model}
        return Store.open(place / "out", inputs, RunLog(), **options)

    if not place_beside(source).is_dir():
        with suppress(KeyboardInterrupt), opened(source.parent) as store:
            store.save("round-1", {"keep": torch.arange(4), "weight": torch.ones(2, 3)}, {"event": "group", "layer": 0})
            store.log.write({"event": "note", "text": "x"})
            steps(store)
            raise KeyboardInterrupt

    def read(place: Path) -> object:
        with opened(place) as store:
            return steps(store)

    def prepare(place: Path) -> None:
        shutil.copytree(place_beside(source), place_beside(place / "out"), dirs_exist_ok=True)

    folder = place_beside(source)
    forms = {f"{folder.name}/{file.name}": "sealed" for file in folder.glob("*.json")}
    forms |= {f"{folder.name}/{file.name}": "safetensors" for file in folder.glob("*.safetensors")}
    return Kind(_seeds(folder.parent, forms), read, prepare)


# --- Runs


@contextmanager
def watched() -> Iterator[None]:
    """Raise `Hang` after `HANG_SECONDS`; where no Python runs, end the process with a traceback."""

    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    faulthandler.dump_traceback_later(3 * HANG_SECONDS, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def try_input(kind: Kind, seed: int, parent: Path) -> tuple[str, str]:
    """Return "accepted", "refused" or what went wrong, and the place in the code.

    `parent`: a scratch directory; the input lies in a directory of it, and nothing else may appear.
    """
    choose = Random(seed)
    source = choose.choice(kind.seeds)
    content = changed(source, kind.seeds, choose)
    place = parent / "input"
    place.mkdir()
    outcome, where = "accepted", ""
    try:
        kind.prepare(place)
        (place / source.path).write_bytes(content)
        with watched():
            kind.read(place)
    except SecateurError as error:
        outcome = "refused" if len(str(error).splitlines()) == 1 else f"no sentence: {error}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/src/secateur/" in frame.filename]
        where = f"{ours[-1].filename.rpartition('/secateur/')[2]}:{ours[-1].lineno}" if ours else ""
        outcome = f"{type(error).__name__}: {' '.join(str(error).split())[:160]} ({source.path})"
    finally:
        shutil.rmtree(place)
    if strangers := [path.name for path in parent.rglob("*")]:
        outcome = f"left files outside its directory: {strangers}"
        for path in parent.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return outcome, where


def run(kind: Kind, num_inputs: int, seconds: float, seed: int) -> tuple[Counter[str], dict[str, int]]:
    """Return the number of inputs by outcome, and each finding with the seed that first shows it."""
    counts, findings = Counter[str](), dict[str, int]()
    before, start = Path.cwd(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="secateur-fuzz-") as parent:
        os.chdir(parent)
        try:
            for number in range(seed, seed + num_inputs):
                if time.monotonic() - start > seconds:
                    break
                outcome, where = try_input(kind, number, Path(parent))
                counts[outcome if outcome in ("accepted", "refused") else "findings"] += 1
                if outcome not in ("accepted", "refused"):
                    key = f"{where} {outcome.partition(':')[0]}"
                    if all(not known.startswith(key) for known in findings):
                        findings[f"{where} {outcome}"] = number
        finally:
            os.chdir(before)
    return counts, findings


def main() -> None:
    """Try the inputs and print a line for each kind and for each finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="KIND", help="by default all kinds")
    parser.add_argument("--inputs", type=int, default=10_000, help="of each kind")
    parser.add_argument("--seconds", type=float, default=300, help="at most, for each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.enable()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    num_findings = 0
    with tempfile.TemporaryDirectory(prefix="secateur-fuzz-seeds-") as place:
        makers = kinds(Path(place))
        for name in options.only or makers:
            start = time.monotonic()
            counts, findings = run(makers[name](), options.inputs, options.seconds, options.seed)
            numbers = ", ".join(f"{counts[each]:,} {each}" for each in ("accepted", "refused", "findings"))
            print(f"{name}: {counts.total():,} inputs, {numbers}, {time.monotonic() - start:.0f} s", flush=True)
            for found, seed in findings.items():
                print(f"  --only {name} --seed {seed} --inputs 1: {found}", flush=True)
            num_findings += counts["findings"]
    sys.exit(num_findings > 0)


if __name__ == "__main__":
    main()
