"""A tokenizer's tokens: which may go, what they are merged from, the tokenizer of those that stay,
and bytes.

All of it is read from the backend's JSON; texts are split by the `tokenizers` library alone. The
model's own side, rows and configs, is `vocabulary.kept`.
"""

import json
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment
from jinja2.exceptions import TemplateSyntaxError
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from torch import Tensor
from transformers import AutoTokenizer

from secateur.errors import CheckpointError
from secateur.model.checkpoint import Checkpoint, load_tokenizer
from secateur.model.stock import CausalLM, Tokenizer, quiet_transformers
from secateur.vocabulary.kept import KeptTokens, Trim, check_weights_by_token, ids_named_by

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how pieces of SentencePiece spell a space
# Steps of decoders that read pieces one by one.
_BY_PIECE = ("ByteLevel", "ByteFallback", "Metaspace", "Replace")
# A part of tokenizer.json.
Parsed = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A model's tokens; rows of the embedding that are in none of the dicts are padding rows.

    `num_rows`: rows of the embedding. `texts`: each token's text; half characters are shown as
    U+FFFD. `parts`: what a token is merged from, or becomes without it (Unigram); bytes and single
    characters have none. `needs_parts`: whether a token that stays needs its parts, as merges do.
    `fixed`: ids that never go; of padding rows only those that a config names. `bytes`: which byte
    each token of a byte fallback is.
    """

    num_rows: int
    texts: dict[int, str]
    parts: dict[int, tuple[int, ...]]
    needs_parts: bool
    fixed: frozenset[int]
    bytes: dict[int, int] = field(default_factory=dict[int, int])

    def scripts(self) -> dict[int, frozenset[str]]:
        """Return the scripts of each token's letters, see `scripts_of`."""
        return {index: scripts_of(text) for index, text in self.texts.items()}


def read_vocabulary(tokenizer: Tokenizer, model: CausalLM) -> Vocabulary:
    """Read the tokenizer's tokens and those that the model's configs name.

    Raises CheckpointError for a tokenizer whose tokens cannot go: without a backend, or of another
    kind than BPE or Unigram.
    """
    check_weights_by_token(model)
    embedding: Any = model.get_input_embeddings()
    backend, parsed = _backend_of(tokenizer)
    num_rows, rules = embedding.num_embeddings, parsed["model"]
    ids = _ids(parsed, num_rows)
    pieces = {text: ids[text] for text in _model_ids(parsed) if text in ids}
    is_bpe, is_byte_level = rules["type"] == "BPE", "ByteLevel" in decoder_steps(tokenizer)
    values = range(256) if rules.get("byte_fallback") else ()
    byte_tokens = {byte: pieces[byte_piece(byte)] for byte in values if byte_piece(byte) in pieces}
    parts = _merged_from(rules, pieces) if is_bpe else _best_without(rules, pieces, byte_tokens)
    symbols = [text for text in pieces if len(text) == 1]
    parts |= {
        pieces[symbol]: spelt for symbol in symbols if (spelt := _in_bytes(symbol, byte_tokens))
    }
    texts = _texts(parsed, ids, is_byte_level=is_byte_level)
    fixed = {pieces[symbol] for symbol in symbols if pieces[symbol] not in parts}
    # No text that a model learnt from spells these in bytes, as every one of them is a token there.
    fixed |= {
        index
        for index, text in texts.items()
        if len(text) == 1 and (text.isascii() or text.isdecimal())
    }
    fixed |= (
        {*byte_tokens.values()}
        | _told_apart(backend, pieces, parts)
        | _without_cover(pieces, byte_tokens)
    )
    fixed |= _named(tokenizer, backend, parsed) | ids_named_by(model)
    return Vocabulary(
        num_rows=num_rows,
        texts=texts,
        parts=parts,
        needs_parts=is_bpe,
        fixed=frozenset(fixed & set(range(num_rows))),
        bytes={index: byte for byte, index in byte_tokens.items()},
    )


def with_parts(vocabulary: Vocabulary, ids: Iterable[int]) -> set[int]:
    """Return `ids`, those that never go, and all that these are merged from."""
    needed, left = set(), [*ids, *vocabulary.fixed]
    while left:
        index = left.pop()
        if index not in needed:
            needed.add(index)
            left += vocabulary.parts.get(index, ()) if vocabulary.needs_parts else ()
    return needed


# Words in the Unicode names of letters; the first word is the script, if it is none of these.
_LETTERS, _NO_SCRIPTS = (
    {"LETTER", "IDEOGRAPH", "SYLLABLE", "CHARACTER"},
    {"MODIFIER", "FULLWIDTH", "HALFWIDTH"},
)


def scripts_of(text: str) -> frozenset[str]:
    """Return the scripts of the text's letters, as `latin`, `cyrillic` or `cjk`."""
    names = (
        [*unicodedata.name(letter, "?").replace("-", " ").split()]
        for letter in text
        if letter.isalpha()
    )
    found = (
        words[0].lower()
        for words in names
        if words[0] not in _NO_SCRIPTS and not _LETTERS.isdisjoint(words)
    )
    return frozenset(found)


def scripts_left(tokenizer: Tokenizer, kept: KeptTokens) -> dict[str, tuple[int, int]]:
    """Return how many of the tokenizer's tokens have letters of each script: of all, and of the
    kept ones.
    """
    backend: Any = tokenizer.backend_tokenizer
    ids = sorted(index for index in backend.get_vocab().values() if index < kept.num_dense)
    texts = backend.decode_batch([[index] for index in ids], skip_special_tokens=False)
    before, left = Counter[str](), Counter[str]()
    for index, text in zip(ids, texts, strict=True):
        before.update(scripts := scripts_of(text))
        left.update(scripts if kept.new_ids[index] is not None else ())
    return {script: (number, left[script]) for script, number in sorted(before.items())}


def _backend_of(tokenizer: Tokenizer) -> tuple[Any, Parsed]:
    backend, name = getattr(tokenizer, "backend_tokenizer", None), type(tokenizer).__name__
    if not isinstance(backend, Backend):
        raise CheckpointError(
            f"vocabulary: the model's tokenizer ({name}) has no tokenizer.json, so its tokens "
            "cannot go; save it as a fast tokenizer first, or leave vocabulary out."
        )
    parsed = json.loads(backend.to_str())
    model = parsed["model"]
    if model["type"] not in ("BPE", "Unigram"):
        raise CheckpointError(
            f"vocabulary: the model's tokenizer is {model['type']}, and tokens of BPE or Unigram "
            "alone can go; leave vocabulary out."
        )
    if (
        model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or backend.decoder is None
    ):
        raise CheckpointError(
            "vocabulary: the model's tokenizer marks the parts of words by a prefix or suffix, or "
            "has no decoder, so its tokens cannot go; leave vocabulary out."
        )
    return backend, parsed


def _model_ids(parsed: Parsed) -> dict[str, int]:
    """Return the ids of the model's own tokens, without those that were only added."""
    vocabulary = parsed["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {piece: index for index, (piece, _) in enumerate(vocabulary)}


def _ids(parsed: Parsed, num_rows: int) -> dict[str, int]:
    """Return every token's id. Those without a row are left out: added ones, as `check_rows`
    refuses others.
    """
    ids = _model_ids(parsed) | {token["content"]: token["id"] for token in parsed["added_tokens"]}
    return {text: index for text, index in ids.items() if index < num_rows}


def _texts(parsed: Parsed, ids: dict[str, int], *, is_byte_level: bool) -> dict[int, str]:
    added = {token["content"] for token in parsed["added_tokens"]}
    decode = decoders.ByteLevel().decode
    return {
        index: text
        if text in added
        else decode([text])
        if is_byte_level
        else text.replace(SPACE, " ")
        for text, index in ids.items()
    }


def _merged_from(model: Parsed, pieces: dict[str, int]) -> dict[int, tuple[int, ...]]:
    """Return the pair that each token is merged from last.

    Where several merges make a token, the tokenizer without them splits it into the pair that it
    has before the last merge. Tokens that no merge makes are left out.
    """
    merges: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    for rank, (left, right) in enumerate(model["merges"]):
        merges[left + right].append((rank, left, right))
    parts_of: dict[int, tuple[int, ...]] = {}
    for text, ways in merges.items():
        pair: tuple[str, ...] = ways[0][1:]
        if len(ways) > 1:
            within = _within(text, pieces)
            ranked = sorted(way for part in within for way in merges.get(part, ()))
            known = [way[1:] for way in ranked if within >= set(way[1:])]
            bpe = models.BPE({part: number for number, part in enumerate(within)}, known)
            pair = tuple(token.value for token in bpe.tokenize(text))
        if len(pair) == 2 and "".join(pair) == text and pieces.keys() >= {text, *pair}:
            parts_of[pieces[text]] = tuple(pieces[part] for part in pair)
    return parts_of


def _in_bytes(symbol: str, byte_tokens: dict[int, int]) -> tuple[int, ...] | None:
    """Return the tokens of the character's bytes; None if the byte fallback does not cover it."""
    is_covered = byte_tokens.keys() >= {*symbol.encode()}
    return tuple(byte_tokens[byte] for byte in symbol.encode()) if is_covered else None


def _best_without(
    model: Parsed, pieces: dict[str, int], byte_tokens: dict[int, int]
) -> dict[int, tuple[int, ...]]:
    """Return how a Unigram tokenizer would split each piece if it were not there; characters
    without a piece in bytes.

    Where the byte fallback does not cover a character, it is left out.
    """
    scores = dict(model["vocab"])
    # By the least score the library prices unknown characters.
    least = min(scores.items(), key=lambda piece_score: piece_score[1])
    parts_of: dict[int, tuple[int, ...]] = {}
    for piece in (piece for piece in pieces if len(piece) > 1):
        known = _within(piece, pieces)
        library = models.Unigram([least, *((part, scores[part]) for part in sorted(known))], 0)
        parts: list[int] = []
        for token in library.tokenize(piece):
            if token.value in known:
                parts.append(pieces[token.value])
            else:
                parts += [
                    byte for symbol in token.value for byte in _in_bytes(symbol, byte_tokens) or ()
                ]
        parts_of[pieces[piece]] = tuple(parts)
    return parts_of


def _within(text: str, pieces: dict[str, int]) -> set[str]:
    """Return the pieces that are parts of the text, without itself."""
    parts = {
        text[start:end] for start in range(len(text)) for end in range(start + 1, len(text) + 1)
    }
    return (parts - {text}) & pieces.keys()


def _without_cover(pieces: dict[str, int], byte_tokens: dict[int, int]) -> set[int]:
    """Return the tokens that hold a character which neither a token nor the byte fallback
    spells.
    """
    symbols = set().union(*pieces)
    unspelt = {
        symbol for symbol in symbols if symbol not in pieces and not _in_bytes(symbol, byte_tokens)
    }
    return {index for text, index in pieces.items() if not unspelt.isdisjoint(text)}


def _told_apart(
    backend: Any, pieces: dict[str, int], parts: dict[int, tuple[int, ...]]
) -> set[int]:
    """Return the tokens whose parts do not decode to the same text, at the start of a text or
    within it.
    """
    text_of = {index: text for text, index in pieces.items()}
    decode, differing = backend.decoder.decode, set[int]()
    for index, those in parts.items():
        one, more = [text_of[index]], [text_of[part] for part in those]
        if decode(one) != decode(more) or decode(one * 3) != decode(one + more + one):
            differing.add(index)
    return differing


def _named(tokenizer: Tokenizer, backend: Any, parsed: Parsed) -> set[int]:
    """Return special and added tokens, those of the post-processor and of the chat template's own
    text.
    """
    special: Any = tokenizer.all_special_ids
    named = {token["id"] for token in parsed["added_tokens"]} | set(special)
    _renumbered(parsed["post_processor"], named.add)
    if (unknown := parsed["model"].get("unk_id")) is not None:
        named.add(unknown)
    if unknown := parsed["model"].get("unk_token"):
        named.add(backend.token_to_id(unknown))
    for text in _template_texts(tokenizer.chat_template):
        named |= set(backend.encode(text, add_special_tokens=False).ids)
    return named - {None}


def _template_texts(template: Any) -> set[str]:
    """Return the text that chat templates write themselves: what is outside of tags, and strings in
    them.
    """
    texts = set()
    for source in (
        template.values() if isinstance(template, dict) else [template] if template else []
    ):
        try:
            tokens = list(Environment(trim_blocks=True, lstrip_blocks=True).lex(source))
        except TemplateSyntaxError:
            continue  # nor can transformers write text with it
        texts |= {text for _, kind, text in tokens if kind == "data"}
        texts |= {text[1:-1].replace("\\n", "\n") for _, kind, text in tokens if kind == "string"}
    return texts


def trimmed_tokenizer(tokenizer: Tokenizer, kept: KeptTokens, config: Any = None) -> Tokenizer:
    """Return a tokenizer of the same class that has the kept tokens alone, under their new ids.

    Merges of other tokens are gone; text is prepared, cut and decoded as before. It is made by
    saving, rewriting and loading, so it is what a user of the saved files gets. Raises
    CheckpointError if the class, or the one that transformers takes beside the model's `config`,
    makes other tokens of the files: a special one that it adds would have no row.
    """
    _, parsed = _backend_of(tokenizer)
    ids = _ids(parsed, kept.num_dense)
    expected = {
        text: new for text, index in ids.items() if (new := kept.new_ids[index]) is not None
    }
    with tempfile.TemporaryDirectory(prefix="secateur-tokenizer-") as scratch, quiet_transformers():
        tokenizer.save_pretrained(scratch)
        for file in Path(scratch).iterdir():
            if file.is_file() and file.name not in ("tokenizer_config.json", "chat_template.jinja"):
                file.unlink()
        _write_json(Path(scratch) / "tokenizer.json", _trimmed(parsed, kept))
        removed = {token["content"] for token in parsed["added_tokens"]} - expected.keys()
        settings = Path(scratch) / "tokenizer_config.json"
        _write_json(settings, _without(json.loads(settings.read_text(encoding="utf-8")), removed))
        trimmed: Any = type(tokenizer).from_pretrained(scratch)
        _check_tokens(trimmed, expected)
        if config is not None:
            _check_tokens(
                AutoTokenizer.from_pretrained(scratch, config=config, trust_remote_code=False),
                expected,
            )
    trimmed.name_or_path = trimmed.init_kwargs["name_or_path"] = tokenizer.name_or_path
    return trimmed


def trim_like(
    there: Checkpoint, kept: KeptTokens, tokenizer: Tokenizer, model: CausalLM, name: str
) -> Trim:
    """Return the trim to the tokens that stayed in another result, `there`, which has them in its
    files.

    `name`: of the model. Raises CheckpointError if they are not the same tokens here, or if one
    goes that is needed here.
    """
    vocabulary, expected = read_vocabulary(tokenizer, model), load_tokenizer(there).get_vocab()
    new = trimmed_tokenizer(tokenizer, kept, model.config)
    lost = sorted(vocabulary.fixed - set(kept.dense_ids))
    differ = sorted(new.get_vocab().items() ^ expected.items())
    if lost or differ:
        odd = vocabulary.texts.get(lost[0], lost[0]) if lost else differ[0][0]
        raise CheckpointError(
            f"like {there.reference}: token {odd!r} is not the same in the tokenizer of {name}, so "
            "the tokens that stayed there cannot stay here; leave like out to choose them anew."
        )
    return Trim(kept, tokenizer, new)


def _check_tokens(loaded: Any, expected: dict[str, int]) -> None:
    name, ids = type(loaded).__name__, loaded.get_vocab()
    if ids != expected:
        added = sorted(ids.keys() - expected.keys())
        does = (
            f"adds {added[0]}, which then has no row"
            if added
            else "gives the kept tokens other ids"
        )
        raise CheckpointError(
            f"vocabulary: {name}, as which transformers loads the trimmed tokenizer, {does}; leave "
            "vocabulary out."
        )


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _without(value: Any, removed: set[str]) -> Any:
    """Return the tokenizer's config without tokens that are gone."""
    if isinstance(value, dict):
        return {
            key: _without(item, removed) for key, item in value.items() if not _names(item, removed)
        }
    if isinstance(value, list):
        return [_without(item, removed) for item in value if not _names(item, removed)]
    return value


def _names(value: Any, removed: set[str]) -> bool:
    text = value.get("content") if isinstance(value, dict) else value
    return isinstance(text, str) and text in removed


def _trimmed(parsed: Parsed, kept: KeptTokens) -> Parsed:
    """Return the backend's JSON with the kept tokens alone, ids renumbered everywhere."""
    new_ids, model = kept.new_ids, dict(parsed["model"])

    def new(index: int) -> int | None:
        return new_ids[index] if index < kept.num_dense else None

    if model["type"] == "BPE":
        model["vocab"] = {
            text: new(index) for text, index in model["vocab"].items() if new(index) is not None
        }
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if model["vocab"].keys() >= {left, right, left + right}
        ]
    else:
        model["vocab"] = [
            piece for index, piece in enumerate(model["vocab"]) if new(index) is not None
        ]
        model["unk_id"] = None if model["unk_id"] is None else new(model["unk_id"])
    added = [
        {**token, "id": new(token["id"])}
        for token in parsed["added_tokens"]
        if new(token["id"]) is not None
    ]
    trimmed = {**parsed, "model": model, "added_tokens": added}
    trimmed["post_processor"] = _renumbered(parsed["post_processor"], new)
    if trimmed["padding"]:
        trimmed["padding"] = {**trimmed["padding"], "pad_id": new(trimmed["padding"]["pad_id"])}
    return trimmed


def _renumbered(step: Parsed | None, new: Any) -> Parsed | None:
    """Return the post-processor with the ids of its tokens renumbered."""
    if step is None:
        return None
    step = dict(step)
    if "processors" in step:
        step["processors"] = [_renumbered(processor, new) for processor in step["processors"]]
    if step["type"] == "TemplateProcessing":
        named = step["special_tokens"].items()
        step["special_tokens"] = {
            name: {**token, "ids": [new(index) for index in token["ids"]]} for name, token in named
        }
    for key in {"sep", "cls"} & step.keys():
        step[key] = [step[key][0], new(step[key][1])]
    return step


def byte_piece(byte: int) -> str:
    """Return SentencePiece's name of a byte."""
    return f"<0x{byte:02X}>"


def num_bytes(tokenizer: Tokenizer, blocks_NT: Iterable[Tensor]) -> int:
    """Return how many bytes of text the tokens after the first of each block stand for.

    A byte token is one byte, a symbol of byte-level BPE one, any other piece its UTF-8 with spaces
    for their marks; a special token is none. So the tokens of a text add up to the length of its
    UTF-8, and so do those of blocks that cut it within a character. A space that the tokenizer puts
    before every text does not count behind a special token, where a text begins.

    Tokenizers that spell words in another way, as WordPiece does, never cut a character: their text
    is decoded.
    """
    reader: Any = tokenizer
    if not (steps := decoder_steps(reader)):
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return sum(len(str(reader.decode(ids_T[1:], **options)).encode()) for ids_T in blocks_NT)
    added = reader.added_tokens_decoder
    special = {*reader.all_special_ids, *(index for index, token in added.items() if token.special)}
    before_text = reader.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0][0]

    @cache
    def piece(index: int) -> str:
        return str(reader.convert_ids_to_tokens(index))

    @cache
    def length(index: int) -> int:
        if index in special:
            return 0
        if "ByteLevel" in steps:
            return len(piece(index).encode() if index in added else piece(index))
        is_byte = (
            "ByteFallback" in steps
            and piece(index).startswith("<0x")
            and len(piece(index)) == len("<0x00>")
        )
        return 1 if is_byte else len(piece(index).replace(SPACE, " ").encode())

    total = 0
    for ids_T in blocks_NT:
        for last, index in pairwise(ids_T.tolist()):
            total += length(index)
            if before_text != "a" and last in special and piece(index).startswith(before_text):
                total -= 1
    return total


def decoder_steps(reader: Any) -> set[str]:
    """Return the kinds of steps of a decoder that reads pieces one by one; none if it does not."""
    backend = getattr(reader, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return set()
    if any(
        getattr(backend.model, key, None)
        for key in ("continuing_subword_prefix", "end_of_word_suffix")
    ):
        return set()
    decoder = json.loads(backend.decoder.__getstate__())
    kinds = {step["type"] for step in decoder.get("decoders", [decoder])}
    return kinds if kinds.intersection(_BY_PIECE) else set()
