"""`secateur trim` end to end: tokens go and nothing else, and every text reads back as it was."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from bpe_tokenizer import CORPUS, SAMPLES, SPACE, bpe_tokenizer, sentencepiece_tokenizer
from models import saved, tiny_llama
from run_cli import Outcome, run_cli
from transformers import AutoModelForCausalLM, AutoTokenizer

NUM_ROWS, NUM_TOKENS, SIZE = 640, 630, 448
PROSE = "the pruned channels of a layer are read by one linear map and written by two others".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model whose tokenizer knows several scripts, and a text that speaks English alone."""
    place = tmp_path_factory.mktemp("trim")
    tokenizer = bpe_tokenizer(vocab_size=NUM_TOKENS, corpus=[*CORPUS, *SAMPLES.values(), " ".join(PROSE)] * 4)
    saved(place / "model", tiny_llama(vocab_size=NUM_ROWS), tokenizer)
    lines = [" ".join(PROSE[start % 17 :] + PROSE[: start % 7]) for start in range(600)]
    (place / "prose.txt").write_text("\n".join(f"{line} {number}" for number, line in enumerate(lines)))
    return place


SMALL = ("--set", "calibration.num_tokens=1280", "--set", "calibration.sequence_length=32")


def trim(place: Path, model: Path, out: Path) -> Outcome:
    domain = f"prose={place / 'prose.txt'}"
    return run_cli("trim", model, out, "--domain", domain, "--vocabulary", SIZE, "--set", "seed=3", *SMALL)


@pytest.fixture(scope="module")
def done(place: Path) -> Outcome:
    return trim(place, place / "model", place / "smaller")


def kept_ids(out: Path) -> list[int]:
    new_ids = json.loads((out / "tokens.json").read_text())["new_ids"]
    return [index for index, new in enumerate(new_ids) if new is not None]


def test_tokens_alone_go_and_the_logits_are_those_of_the_dense_model(place, done):
    assert done.status == 0, done.stderr
    dense, small = (AutoModelForCausalLM.from_pretrained(place / name) for name in ("model", "smaller"))
    assert small.config.vocab_size == SIZE and small.config.intermediate_size == dense.config.intermediate_size
    ids = torch.tensor(kept_ids(place / "smaller"))
    asked = torch.randint(SIZE, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(small(asked).logits, dense(ids[asked]).logits[..., ids], atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(place / "smaller")
    for text in (*SAMPLES.values(), " ".join(PROSE)):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # It says what went and what that costs.
    result = json.loads((place / "smaller" / "result.json").read_text())
    assert result["widths"] == {} and result["dense_losses"].keys() == result["pruned_losses"].keys() == {"prose"}
    vocabulary = result["vocabulary"]
    assert (vocabulary["num_before"], vocabulary["num_after"]) == (NUM_ROWS, SIZE)
    # Nothing else goes, so the losses of the trim are those of the result, and it is measured once.
    losses = [result[key]["prose"]["nats_per_token"] for key in ("dense_losses", "pruned_losses")]
    assert vocabulary["nats"] == {"prose": losses} and vocabulary["foretold"] > 0
    assert result["dense_size"]["num_params"] - result["pruned_size"]["num_params"] == (NUM_ROWS - SIZE) * 2 * 48
    assert result["reload_max_abs_difference"] == 0
    saved = (place / "smaller" / "recipe.yaml").read_text()
    assert "seed: 3" in saved and "vocabulary: 448" in saved and "groups: []" in saved


def test_digits_and_other_ascii_stay_where_bytes_could_spell_them(tmp_path):
    """Text without a digit: by its length a digit in its byte costs nothing, and the model has never read one so."""
    tokenizer = sentencepiece_tokenizer("gemma", 420)
    saved(tmp_path / "model", tiny_llama(vocab_size=len(tokenizer)), tokenizer)
    draw, words = random.Random(0), "the ferry leaves at they said it hours def fare distance return".split()
    (tmp_path / "prose.txt").write_text("\n".join(" ".join(draw.choices(words, k=12)) for _ in range(900)))
    arguments = ["trim", tmp_path / "model", tmp_path / "out", "--domain", f"prose={tmp_path / 'prose.txt'}"]
    outcome = run_cli(*arguments, "--vocabulary", 320, "--force", *SMALL)
    assert outcome.status == 0, outcome.stderr
    small = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert small.tokenize("06:15 12345") == [*"06:15", SPACE, *"12345"]


def test_ids_that_only_the_generation_config_names_stay_and_are_counted_before_text_is_read(place, done, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    rarest = sorted(set(range(NUM_TOKENS)).difference(kept_ids(place / "smaller")))[-8:]
    names = [tokenizer.convert_ids_to_tokens(index) for index in rarest]
    a, b, c, d, e, f, g, h = rarest
    generation = {"suppress_tokens": [a], "begin_suppress_tokens": [b], "eos_token_id": [1, c]}
    generation |= {"bad_words_ids": [[d, e]], "forced_eos_token_id": [f], "forced_decoder_ids": [[1, g]]}
    generation |= {"pad_token_id": h}
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation))
    assert done.status == 0
    outcome = trim(place, tmp_path / "model", tmp_path / "out")
    assert outcome.status == 0, outcome.stderr
    assert set(rarest) <= set(kept_ids(tmp_path / "out"))
    small = AutoTokenizer.from_pretrained(tmp_path / "out")
    said = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    ids = [*said["suppress_tokens"], *said["begin_suppress_tokens"], said["eos_token_id"][1], *said["bad_words_ids"][0]]
    ids += [*said["forced_eos_token_id"], said["forced_decoder_ids"][0][1], said["pad_token_id"]]
    assert small.convert_ids_to_tokens(ids) == names and said["forced_decoder_ids"][0][0] == 1
