"""Which tokens may go, what they are merged from, and tokenizers of those that stay: every text decodes as before."""

import copy
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from bpe_tokenizer import CORPUS, SPACE, bpe_tokenizer, sentencepiece_tokenizer
from models import tiny_llama
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertTokenizer, ByT5Tokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer
from transformers.models.llama.tokenization_llama import LlamaTokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from secateur.errors import CheckpointError
from secateur.model.stock import quiet_transformers
from secateur.vocabulary.kept import KeptTokens
from secateur.vocabulary.tokenizer import Vocabulary, read_vocabulary, trimmed_tokenizer, with_parts

NUM_PADDING = 7
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Enough text for tokens of several syllables, in scripts of one to four bytes a character.
PROSE = Path(__file__).parents[2].joinpath("LICENSE").read_text(encoding="utf-8").split("\n")[:150]
LEARNT_FROM = [*PROSE, *CORPUS, "Паром шёл медленно. 海面很平静。 naïve 🚀🚀", "the  two   spaces\n\n\tand tabs"] * 3


def unigram_tokenizer(*, byte_fallback: bool) -> PreTrainedTokenizerFast:
    """Return a Unigram tokenizer in the way of Gemma's kind (bytes) or T5's (an unknown token, spaces collapsed)."""
    backend = Tokenizer(models.Unigram())
    special = ["<pad>", "</s>", "<unk>", *(BYTES if byte_fallback else [])]
    trainer = trainers.UnigramTrainer(
        vocab_size=500 + len(special), show_progress=False, special_tokens=special, unk_token="<unk>"
    )
    if byte_fallback:
        backend.normalizer = normalizers.Replace(" ", SPACE)
        backend.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
        backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(LEARNT_FROM, trainer)
    written = json.loads(backend.to_str())
    written["model"]["byte_fallback"] = byte_fallback
    written["added_tokens"] = written["added_tokens"][:3]
    backend = Tokenizer.from_str(json.dumps(written))
    backend.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def of_class(kind: type, built: PreTrainedTokenizerFast, **options: Any) -> Any:
    """Return a tokenizer of the class, which makes its own backend, with the tokens of `built`."""
    model = json.loads(built.backend_tokenizer.to_str())["model"]
    merges = {"merges": [tuple(pair) for pair in model["merges"]]} if "merges" in model else {}
    vocabulary = model["vocab"] if merges else [tuple(each) for each in model["vocab"]]
    return kind(vocab=vocabulary, **merges, **options)


def trained(rule: str) -> PreTrainedTokenizerFast:
    """Return `bpe_tokenizer` with more tokens."""
    found = bpe_tokenizer(rule)
    learner = Tokenizer.from_str(found.backend_tokenizer.to_str())
    learner.normalizer = None
    special = ["<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        LEARNT_FROM,
        trainers.BpeTrainer(vocab_size=700, show_progress=False, special_tokens=special, initial_alphabet=alphabet),
    )
    learner.normalizer = found.backend_tokenizer.normalizer
    learner.add_tokens([AddedToken("<think>", normalized=False)])
    more = {"bos_token": "<|start|>", "eos_token": "<|end|>", "chat_template": found.chat_template}
    return PreTrainedTokenizerFast(tokenizer_object=learner, **more)


MADE = {
    "byte-level": lambda: trained("qwen2"),
    "ignore-merges": lambda: trained("llama-bpe"),
    "llama": lambda: sentencepiece_tokenizer("llama", 420),
    "gemma": lambda: sentencepiece_tokenizer("gemma", 420),
    "unigram-bytes": lambda: unigram_tokenizer(byte_fallback=True),
    "unigram-unknown": lambda: unigram_tokenizer(byte_fallback=False),
    "class-qwen2": lambda: of_class(Qwen2Tokenizer, trained("qwen2"), eos_token="<|end|>"),
    "class-gpt2": lambda: of_class(GPT2Tokenizer, trained("gpt-2"), eos_token="<|end|>"),
    "class-llama": lambda: of_class(LlamaTokenizer, sentencepiece_tokenizer("llama", 420)),
    "class-t5": lambda: of_class(T5Tokenizer, unigram_tokenizer(byte_fallback=False)),
}
BPE = ["byte-level", "ignore-merges", "llama", "gemma"]
UNIGRAM = ["unigram-bytes", "unigram-unknown"]


@cache
def made(kind: str) -> tuple[Any, Vocabulary]:
    with quiet_transformers():
        tokenizer = MADE[kind]()
    return tokenizer, read_vocabulary(tokenizer, model_for(tokenizer))


def model_for(tokenizer: Any, **more: Any) -> Any:
    with torch.device("meta"):
        return tiny_llama(vocab_size=len(tokenizer) + NUM_PADDING, **more)


def some_kept(vocabulary: Vocabulary, seed: int, share: float = 0.5) -> KeptTokens:
    choose = random.Random(seed)
    chosen = [index for index in sorted(vocabulary.texts) if choose.random() < share]
    return KeptTokens(tuple(sorted(with_parts(vocabulary, chosen))), vocabulary.num_rows)


def random_texts(vocabulary: Vocabulary, number: int, seed: int = 0) -> list[str]:
    """Return texts of the tokens' own, of characters of several scripts, and of any characters at all."""
    # Unigram's library reads the name of a byte, spelt out in text, as that byte.
    choose, words = random.Random(seed), sorted(text for text in vocabulary.texts.values() if "<0x" not in text)
    scripts = [(32, 126), (0x80, 0x2FF), (0x370, 0x6FF), (0x900, 0x97F), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF)]

    def piece() -> str:
        kind = choose.random()
        if kind < 0.5:
            return choose.choice(words)
        if kind < 0.65:
            return choose.choice([" ", "  ", "\n", "\t", "'s", "1234", "\r\n\r\n", "e\u0301"])
        low, high = (0, 0x10FFFF) if kind > 0.9 else choose.choice(scripts)
        drawn = (choose.randint(low, high) for _ in range(choose.randint(1, 6)))
        return "".join(chr(code) for code in drawn if not 0xD800 <= code < 0xE000)

    return ["".join(piece() for _ in range(choose.randint(1, 10))) for _ in range(number)]


def check_texts(dense: Any, trimmed: Any, kept: KeptTokens, texts: list[str]) -> None:
    """Assert that texts decode as before; those whose tokens all stay have the same ones; none is unknown now."""
    old, new = (each.backend_tokenizer for each in (dense, trimmed))
    before, after = ([each.ids for each in backend.encode_batch(texts)] for backend in (old, new))
    decoded = [backend.decode_batch(ids, skip_special_tokens=False) for backend, ids in ((old, before), (new, after))]
    assert decoded[0] == decoded[1]
    assert 0 <= min(min(ids, default=0) for ids in after)
    assert max(max(ids, default=0) for ids in after) < len(kept.dense_ids)
    stay = set(kept.dense_ids)
    assert any(set(ids) <= stay for ids in before) and any(not set(ids) <= stay for ids in before)
    for ids, others in zip(before, after, strict=True):
        assert not set(ids) <= stay or [kept.new_ids[index] for index in ids] == others
        assert dense.unk_token_id in ids or trimmed.unk_token_id not in others


@pytest.mark.parametrize("kind", MADE)
def test_every_text_decodes_as_before(kind):
    tokenizer, vocabulary = made(kind)
    for seed, share in ((0, 0.5), (1, 0.0), (2, 0.9)):
        kept = some_kept(vocabulary, seed, share)
        assert len(kept.dense_ids) < len(tokenizer)
        texts = random_texts(vocabulary, 500, seed)
        check_texts(tokenizer, trimmed_tokenizer(tokenizer, kept), kept, texts)


@pytest.mark.parametrize("kind", MADE)
def test_dropping_no_token_changes_no_byte(kind, tmp_path):
    tokenizer, vocabulary = made(kind)
    everything = KeptTokens(tuple(range(vocabulary.num_rows)), vocabulary.num_rows)
    tokenizer.save_pretrained(tmp_path / "dense")
    trimmed_tokenizer(tokenizer, everything).save_pretrained(tmp_path / "same")
    dense, same = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("dense", "same"))
    assert dense["tokenizer.json"] == same["tokenizer.json"] and dense.keys() == same.keys()
    config, other = (json.loads(files["tokenizer_config.json"]) for files in (dense, same))
    assert {key: config[key] for key in other if key in config} == {key: other[key] for key in other if key in config}
    assert config.keys() <= other.keys()


@pytest.mark.parametrize("kind", MADE)
def test_stock_loading_gives_the_same_tokenizer(kind, tmp_path):
    tokenizer, vocabulary = made(kind)
    kept = some_kept(vocabulary, 3)
    trimmed = trimmed_tokenizer(tokenizer, kept)
    trimmed.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(trimmed) is type(tokenizer) and type(loaded).__name__ == type(trimmed).__name__
    assert trimmed.special_tokens_map == loaded.special_tokens_map == tokenizer.special_tokens_map
    assert trimmed.chat_template == loaded.chat_template == tokenizer.chat_template
    assert trimmed.name_or_path == tokenizer.name_or_path
    for text in random_texts(vocabulary, 200):
        assert trimmed(text).input_ids == loaded(text).input_ids
    new = kept.new_ids
    assert [new[index] for index in tokenizer("").input_ids] == trimmed("").input_ids
    names = {text: new[index] for text, index in tokenizer.get_vocab().items() if new[index] is not None}
    assert trimmed.get_vocab() == loaded.get_vocab() == names
    added = {new[index]: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    assert {index: str(token) for index, token in loaded.added_tokens_decoder.items()} == added


@pytest.mark.parametrize("kind", ["byte-level", "llama", "gemma"])
def test_parts_suffice(kind):
    tokenizer, vocabulary = made(kind)
    names = {index: text for text, index in tokenizer.get_vocab().items()}
    dense = tokenizer.backend_tokenizer.model
    reached = [each for each in vocabulary.parts if [token.id for token in dense.tokenize(names[each])] == [each]]
    assert len(reached) > 80
    for index in random.Random(0).sample(reached, 30):
        kept = KeptTokens(tuple(sorted(with_parts(vocabulary, [index]))), vocabulary.num_rows)
        model = trimmed_tokenizer(tokenizer, kept).backend_tokenizer.model
        assert [token.id for token in model.tokenize(names[index])] == [kept.new_ids[index]]


def test_the_last_of_several_merges_is_the_one_that_happens():
    merges = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc"), ("abc", "d"), ("ab", "cd"), ("c", "d")]
    names = ["a", "b", "c", "d", "bc", "ab", "abc", "cd", "abcd"]
    backend = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, merges))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    parts = read_vocabulary(tokenizer, model_for(tokenizer, bos_token_id=None, eos_token_id=None)).parts
    # b and c merge first, so abc is a + bc though ab + c comes before it in the list; and abcd is abc + d.
    shown = {names[whole]: tuple(names[part] for part in those) for whole, those in parts.items()}
    assert shown == {"bc": ("b", "c"), "ab": ("a", "b"), "cd": ("c", "d"), "abc": ("a", "bc"), "abcd": ("abc", "d")}


@pytest.mark.parametrize("kind", UNIGRAM)
def test_parts_of_pieces_are_the_library_s_own_without_them(kind):
    tokenizer, vocabulary = made(kind)
    pieces = [tuple(each) for each in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]]
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    long = [piece for piece, index in ids.items() if len(piece) > 2 and index not in vocabulary.fixed]
    assert not vocabulary.needs_parts and len(long) > 100
    for piece in long:
        without = models.Unigram([each for each in pieces if each[0] != piece], 2, kind == "unigram-bytes")
        found = [token.value for token in without.tokenize(piece)]
        assert [ids[each] for each in found] == list(vocabulary.parts[ids[piece]]), piece


@pytest.mark.parametrize("kind", UNIGRAM)
def test_pieces_do_not_need_their_parts(kind):
    tokenizer, vocabulary = made(kind)
    lone = [index for index in vocabulary.parts if not with_parts(vocabulary, []) >= set(vocabulary.parts[index])]
    for index in lone[:20]:
        kept = with_parts(vocabulary, [index])
        assert kept == vocabulary.fixed | {index}
        trimmed = trimmed_tokenizer(tokenizer, KeptTokens(tuple(sorted(kept)), vocabulary.num_rows))
        (token,) = trimmed.backend_tokenizer.model.tokenize(tokenizer.convert_ids_to_tokens(index))
        assert token.id == sorted(kept).index(index)


@pytest.mark.parametrize("kind", MADE)
def test_what_never_goes(kind):
    tokenizer, vocabulary = made(kind)
    ids = tokenizer.get_vocab()
    falls_back = "<0x00>" in ids
    assert set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder) <= vocabulary.fixed
    assert not falls_back or {ids[name] for name in BYTES} <= vocabulary.fixed
    single = {index for text, index in ids.items() if len(text) == 1}
    # Text never spells these in bytes where each of them is a token, so the model has not learnt to.
    always = {index for text, index in ids.items() if len(text) == 1 and (text.isascii() or text.isdecimal())}
    assert always <= vocabulary.fixed and (falls_back or single <= vocabulary.fixed)
    assert not falls_back or any(vocabulary.texts[index] == "3" for index in always)
    # Bytes would be decoded to the sign itself, not to a space.
    template = {index for text in ("<|start|>", "<|end|>") for index in tokenizer(text).input_ids}
    assert not tokenizer.chat_template or template <= vocabulary.fixed
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    assert not falls_back or (single - always) & read_vocabulary(plain, model_for(plain)).fixed == {ids[SPACE]}
    assert set(vocabulary.texts) == set(ids.values()) and max(vocabulary.fixed) < len(tokenizer)
    assert vocabulary.num_rows == len(tokenizer) + NUM_PADDING


def test_tokens_that_templates_and_configs_name_stay():
    tokenizer, vocabulary = made("byte-level")
    words = [index for index in vocabulary.parts if index not in vocabulary.fixed]
    ferry = tokenizer(" ferry").input_ids
    assert not set(ferry) & vocabulary.fixed
    tokenizer = MADE["byte-level"]()
    for template in ("{% if true %} ferry{% endif %}", "{{ ' ferry' + message }}", {"default": "", "tool": " ferry"}):
        tokenizer.chat_template = template
        assert set(ferry) <= read_vocabulary(tokenizer, model_for(tokenizer)).fixed
    tokenizer.chat_template = "{% this is no template"
    model = model_for(tokenizer)
    # A padding row that a config names stays too.
    model.config.pad_token_id, model.generation_config.suppress_tokens = len(tokenizer) + 2, [words[5], -1]
    fixed = read_vocabulary(tokenizer, model).fixed
    assert fixed - vocabulary.fixed == {len(tokenizer) + 2, words[5]}


def test_tokens_of_post_processors_and_the_unknown_token_stay():
    tokenizer, vocabulary = made("unigram-unknown")
    one, two, unknown = sorted(set(vocabulary.parts) - vocabulary.fixed)[-3:]
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    written["model"]["unk_id"] = unknown
    written["added_tokens"] = []
    names = [piece for piece, _ in written["model"]["vocab"]]
    written["padding"] = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    written["padding"] |= {"pad_id": one, "pad_type_id": 0, "pad_token": names[one]}
    backend = Tokenizer.from_str(json.dumps(written))
    backend.post_processor = processors.Sequence(
        [
            processors.RobertaProcessing((names[one], one), (names[two], two)),
            processors.TemplateProcessing(f"{names[one]} $A", None, [(names[one], one)]),
        ]
    )
    other = PreTrainedTokenizerFast(tokenizer_object=backend)
    found = read_vocabulary(other, model_for(other, bos_token_id=None, eos_token_id=None))
    assert {one, two, unknown} <= found.fixed
    kept = some_kept(found, 0)
    trimmed = json.loads(trimmed_tokenizer(other, kept).backend_tokenizer.to_str())
    roberta, template = trimmed["post_processor"]["processors"]
    assert roberta["sep"] == [names[one], kept.new_ids[one]] and roberta["cls"] == [names[two], kept.new_ids[two]]
    assert template["special_tokens"][names[one]]["ids"] == [kept.new_ids[one]]
    assert trimmed["model"]["unk_id"] == kept.new_ids[unknown] != unknown
    assert trimmed["padding"]["pad_id"] == kept.new_ids[one] != one


def test_tokens_whose_parts_decode_to_something_else_stay():
    # This decoder takes every sign of a space off the first token, so two in one token are not two tokens.
    pieces = [("<unk>", 0.0), (SPACE, -1.0), (SPACE * 2, -1.5), ("a", -1.0), (f"{SPACE}a", -1.5), ("aa", -1.0)]
    pieces += [("xy", -1.0), ("x", -2.0), ("axy", -1.0)]  # y alone is no piece
    backend = Tokenizer(models.Unigram(pieces, 0))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    vocabulary = read_vocabulary(tokenizer, model_for(tokenizer, bos_token_id=None, eos_token_id=None))
    free = {pieces[index][0] for index in set(vocabulary.texts) - vocabulary.fixed}
    assert {SPACE * 2, "xy"}.isdisjoint(free) and {f"{SPACE}a", "aa"} <= free


def test_tokens_whose_parts_decode_to_something_else_within_a_text_stay():
    # This decoder drops a token that repeats the one before it: a text's first token has none before it.
    backend = Tokenizer(models.BPE({"b": 0, "a": 1, "ba": 2}, [("b", "a")]))
    backend.decoder = decoders.CTC(pad_token="<pad>", word_delimiter_token="|", cleanup=False)
    assert backend.decoder.decode(["ba"]) == backend.decoder.decode(["b", "a"])
    assert backend.decoder.decode(["b", "ba"]) != backend.decoder.decode(["b", "b", "a"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    vocabulary = read_vocabulary(tokenizer, model_for(tokenizer, bos_token_id=None, eos_token_id=None))
    assert vocabulary.parts == {2: (0, 1)} and vocabulary.fixed == {0, 1, 2}


def test_a_word_whose_characters_are_no_tokens_stays():
    names = ["a", "b", "ab", "ac"]  # ac comes from no merge; c is no token
    backend = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, [("a", "b")], ignore_merges=True))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    vocabulary = read_vocabulary(tokenizer, model_for(tokenizer, bos_token_id=None, eos_token_id=None))
    assert vocabulary.fixed == {0, 1, 3}


def test_texts_can_be_read():
    tokenizer, vocabulary = made("byte-level")
    (ferry,) = tokenizer(" ferry").input_ids
    assert vocabulary.texts[ferry] == " ferry"
    assert vocabulary.texts[tokenizer("<think>").input_ids[0]] == "<think>"
    assert vocabulary.texts[tokenizer("\N{ROCKET}").input_ids[0]] in ("\N{ROCKET}", "\N{REPLACEMENT CHARACTER}")
    shown = {text for text in vocabulary.texts.values() if len(text) == 1}
    assert {chr(code) for code in range(128)} <= shown and "\N{REPLACEMENT CHARACTER}" in shown
    tokenizer, vocabulary = made("llama")
    assert " leaves" in vocabulary.texts.values()


def test_a_special_token_without_a_row_is_not_of_the_trimmed_tokenizer(tmp_path):
    # Gemma 3's text models share a tokenizer whose token for images has no row.
    tokenizer = MADE["gemma"]()
    num_rows = len(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    tokenizer.init_kwargs["image_token"] = "<image>"
    with torch.device("meta"):
        vocabulary = read_vocabulary(tokenizer, tiny_llama(vocab_size=num_rows))
    assert num_rows not in vocabulary.texts
    kept = some_kept(vocabulary, 0)
    trimmed = trimmed_tokenizer(tokenizer, kept)
    trimmed.save_pretrained(tmp_path)
    for each in (trimmed, AutoTokenizer.from_pretrained(tmp_path)):
        ids = each("a<image>b").input_ids
        assert max(ids) < len(kept.dense_ids) == len(each) and "<image>" in each.decode(ids)
    assert "<image>" not in (tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")


def test_other_kinds_are_refused():
    model = model_for(made("byte-level")[0])
    suffixed = Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    suffixed.decoder = decoders.BPEDecoder()
    prefixed = Tokenizer(models.BPE({"a": 0, "##a": 1}, [], continuing_subword_prefix="##"))
    prefixed.decoder = decoders.WordPiece()
    cases = {
        "is WordPiece": BertTokenizer(vocab={"[UNK]": 0, "a": 1}),
        "is WordLevel": PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))),
        "has no tokenizer.json": ByT5Tokenizer(),
        "by a prefix or suffix": PreTrainedTokenizerFast(tokenizer_object=suffixed),
        "prefix or suffix": PreTrainedTokenizerFast(tokenizer_object=prefixed),
        "has no decoder": PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, []))),
    }
    for sentence, tokenizer in cases.items():
        with pytest.raises(CheckpointError, match=sentence):
            read_vocabulary(tokenizer, model)


def test_a_class_that_gives_other_ids_is_refused():
    class Other(PreTrainedTokenizerFast):
        def get_vocab(self) -> dict[str, int]:
            return {text: index + 1 for text, index in super().get_vocab().items()}

    tokenizer = Other(tokenizer_object=bpe_tokenizer().backend_tokenizer)
    kept = KeptTokens(tuple(range(300)), len(tokenizer))
    with pytest.raises(CheckpointError, match=r"Other, as which .* gives the kept tokens other ids; leave"):
        trimmed_tokenizer(tokenizer, kept)


def test_a_special_token_that_loading_adds_is_refused_for_it_has_no_row(tmp_path):
    class Other(PreTrainedTokenizerFast):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.add_special_tokens({"pad_token": "<own>"})

    tokenizer, vocabulary = made("byte-level")
    kept = some_kept(vocabulary, 3)
    with pytest.raises(CheckpointError, match=r"Other, as which .* adds <own>, which then has no row; leave"):
        trimmed_tokenizer(Other(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>"), kept)
    # The class that stock transformers takes beside a Qwen2 config has an end-of-text token of its own.
    trimmed_tokenizer(tokenizer, kept, LlamaConfig()).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, config=Qwen2Config())
    assert (
        loaded.get_vocab()["<|endoftext|>"]
        == len(loaded) - 1
        == sum(index in vocabulary.texts for index in kept.dense_ids)
    )
    with pytest.raises(CheckpointError, match=r"Qwen2Tokenizer, as which .* adds <\|endoftext\|>, which") as error:
        trimmed_tokenizer(tokenizer, kept, Qwen2Config())
    assert "\n" not in str(error.value)
