"""What `inspect` says of a vocabulary: its share, the tokens that the domains' text has, what a trim frees."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from bpe_tokenizer import CORPUS, bpe_tokenizer
from families import tiny_family
from models import tiny_llama
from rich.console import Console
from texts import learning_text
from tiny_tokenizer import tiny_tokenizer

import secateur
from secateur.data.pool import CHARACTERS_PER_TOKEN
from secateur.errors import RecipeError
from secateur.model.config import quiet_transformers
from secateur.pruning import inspect as inspecting
from secateur.recipe_file import parse_recipe
from secateur.report.rows import inspection_table

NUM_ROWS, WIDTH = 640, 48
WORDS = [
    f"{start}{middle}{end}" for start in "brst" for middle in ("ark", "olm", "ing") for end in ("", "er", "ed", "s")
]


def saved(place: Path, *, tied: bool) -> Path:
    with quiet_transformers():
        tiny_llama(tied=tied, vocab_size=NUM_ROWS).save_pretrained(place)
        bpe_tokenizer(vocab_size=400, corpus=[*CORPUS, *WORDS, *WORDS, *WORDS]).save_pretrained(place)
    return place


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "own head"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"), tied=request.param)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "a.txt").write_text("the ferry leaves at 06:15\nthey said it leaves\n" * 30)
    (tmp_path / "b.txt").write_text("\n".join(WORDS * 9))
    domains = {name: {"files": str(tmp_path / f"{name}.txt")} for name in "ab"}
    return {"calibration": {"domains": domains, "num_tokens": 640, "sequence_length": 32}, "remove": {"align": 8}}


def test_share_use_and_what_a_trim_frees(model, recipe, tmp_path):
    found = secateur.inspect(model, recipe, vocabulary=True)
    vocabulary, tokenizer = found.vocabulary, bpe_tokenizer(vocab_size=400, corpus=[*CORPUS, *WORDS, *WORDS, *WORDS])
    per_token = WIDTH if json.loads((model / "config.json").read_text())["tie_word_embeddings"] else 2 * WIDTH
    assert (vocabulary.num_tokens, vocabulary.num_params) == (NUM_ROWS, NUM_ROWS * per_token)
    drawn = learning_text(parse_recipe(recipe).calibration, 640, tokenizer, 0)
    held_out = {domain.name: Counter(domain.held_out.ids_NT.flatten().tolist()) for domain in drawn.domains}
    ids = {name: Counter(tokenizer((tmp_path / f"{name}.txt").read_text())["input_ids"]) for name in "ab"}
    ids = {name: [*(all_ids - held_out[name]).elements()] for name, all_ids in ids.items()}
    assert all(sum(each.values()) == 64 for each in held_out.values())
    assert vocabulary.num_counted == {name: len(of) for name, of in ids.items()}
    assert vocabulary.used == {name: len(set(of)) for name, of in ids.items()}
    # What is used, all that it is merged from, and what never goes: bytes and the three added tokens.
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    parts = {tokenizer.convert_tokens_to_ids(left + right): (left, right) for left, right in merges}
    stay, left = set(), [*ids["a"], *ids["b"]]
    while left:
        if (each := left.pop()) not in stay:
            stay.add(each)
            left += tokenizer.convert_tokens_to_ids(list(parts.get(each, ())))
    stay |= {index for text, index in tokenizer.get_vocab().items() if len(text) == 1 or text.startswith("<")}
    assert vocabulary.smallest == -(-len(stay) // 64) * 64 < NUM_ROWS
    assert vocabulary.params_freed == (NUM_ROWS - vocabulary.smallest) * per_token
    said = terminal(found)
    assert f"640 tokens, {vocabulary.num_params / found.size.num_params:.1%} of all parameters" in said
    assert (
        f"a {vocabulary.used['a']}, b {vocabulary.used['b']}" in said and f"({vocabulary.smallest} tokens stay)" in said
    )


def terminal(found: Any) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(inspection_table(found))
    return " ".join(capture.get().split())


def test_no_more_text_is_looked_at_than_takes_seconds(model, recipe, monkeypatch):
    monkeypatch.setattr(inspecting, "MOST_COUNTED", 20)
    counted = secateur.inspect(model, recipe, vocabulary=True).vocabulary.num_counted
    assert all(20 <= count <= 20 + 32 * CHARACTERS_PER_TOKEN for count in counted.values())  # whole pieces


def test_without_tokenizer_or_text_it_says_why_and_all_else(model, recipe, tmp_path):
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.json").write_bytes((model / "config.json").read_bytes())
    alone = secateur.inspect(tmp_path / "alone", recipe, vocabulary=True)
    assert alone.vocabulary.used == {} and alone.vocabulary.smallest is None
    assert "has no tokenizer" in terminal(alone) and "what the domains use is not known" in terminal(alone)
    gone = {"self": {"answers": True}}
    answered = secateur.inspect(model, {"calibration": {"domains": gone}}, vocabulary=True)
    assert "every domain is of the model's answers" in terminal(answered)
    missing = {"a": {"files": str(tmp_path / "nowhere.txt")}}
    assert "nowhere.txt" in terminal(secateur.inspect(model, {"calibration": {"domains": missing}}, vocabulary=True))


def test_text_is_read_for_the_vocabulary_alone_when_asked(model, recipe, monkeypatch):
    monkeypatch.setattr(inspecting, "TextPool", lambda *_: pytest.fail("text was read"))
    found = secateur.inspect(model, recipe)
    assert found.vocabulary.num_tokens == NUM_ROWS and found.vocabulary.used == {}
    assert "of all parameters" in terminal(found) and "domains" not in terminal(found).split("could also go")[0]


def test_a_recipe_that_takes_tokens(model, recipe):
    alone = {**recipe, "remove": {"vocabulary": 384, "groups": []}}
    found = secateur.inspect(model, alone)
    per_token = found.vocabulary.num_params // NUM_ROWS
    assert found.num_params_after == found.size.num_params - 256 * per_token
    assert found.remove_reached == pytest.approx(256 * per_token / found.size.num_params)
    both = secateur.inspect(model, {**recipe, "remove": {"vocabulary": 384, "align": 8, "share": 0.3, "depth": 0}})
    assert both.remove_reached == pytest.approx(0.3, abs=0.02)
    plain = secateur.inspect(model, {**recipe, "remove": {"align": 8, "share": 0.3, "depth": 0}})
    assert both.remove_reached == pytest.approx(plain.remove_reached, abs=0.03)
    assert both.groups[0].num_keep > plain.groups[0].num_keep
    assert both.largest_remove == pytest.approx(plain.largest_remove + 256 * per_token / found.size.num_params)
    measured = secateur.inspect(model, {**recipe, "remove": {"vocabulary": "auto", "align": 8}})
    assert "auto measures in the run" in measured.warnings[0]
    with pytest.raises(RecipeError, match=r"remove\.vocabulary: 64 of the model's 640 rows cannot stay"):
        secateur.inspect(model, {**recipe, "remove": {"vocabulary": 64}})


def test_a_group_that_protected_layers_alone_have_is_not_in_the_table(recipe, tmp_path):
    with quiet_transformers():
        tiny_family("qwen3_moe-mixed").save_pretrained(tmp_path / "model")  # layer 1 alone has an FFN of channels
        tiny_tokenizer().save_pretrained(tmp_path / "model")
    remove = {"share": 0.2, "align": 8, "groups": ["ffn", "experts"], "protected_layers": [1]}
    found = secateur.inspect(tmp_path / "model", {**recipe, "remove": remove})
    assert [group.name for group in found.groups] == ["experts"]
