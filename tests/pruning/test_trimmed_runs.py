"""Tokens in a run's budget: what the model loses, what losses and records count, the same bytes by every way."""

import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bpe_tokenizer import CORPUS, SAMPLES, bpe_tokenizer
from models import num_params, opened, saved, tiny_llama
from recipes import grouped
from run_ranks import run_forked_ranks
from safetensors.torch import load_file
from shown import assert_shown
from stops import stopped_again_and_again, weights
from texts import documents_of
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.facts import Loss
from secateur.formats.gguf import export_gguf
from secateur.formats.save import Verification
from secateur.log import silent
from secateur.methods.budget import token_prices
from secateur.model.checkpoint import open_checkpoint
from secateur.pruning import trim as trimming
from secateur.pruning.open import Opened
from secateur.pruning.resolve import resolve
from secateur.pruning.text import run_text
from secateur.pruning.trim import plan_trim
from secateur.pruning.trimmed import too_dear, vocabulary_facts
from secateur.recipe import parse_recipe
from secateur.recovery.text import run_text_again
from secateur.store import Services
from secateur.stream.losses import predicted_tokens
from secateur.vocabulary.kept import KeptTokens, Trim, kept_tokens_of
from secateur.vocabulary.order import PieceNats
from secateur.vocabulary.retokenised import retokenised
from secateur.vocabulary.tokenizer import read_vocabulary, trimmed_tokenizer, with_parts
from tests.families import tiny_family
from tests.trims import prose_file
from tests.vocabulary.test_tokenizer import NUM_PADDING, made


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """No reload, but of the result that several tests look at."""
    monkeypatch.setattr("secateur.formats.save.verify_reload", lambda *_: Verification(0.0))


CHILD = Path(__file__).parents[1].joinpath("ranks_child.py")


TOKENIZER, VOCABULARY = made("byte-level")
NUM_ROWS = len(TOKENIZER) + NUM_PADDING


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("tied"), tiny_llama(tied=True, vocab_size=NUM_ROWS), TOKENIZER)


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("untied"), tiny_llama(vocab_size=NUM_ROWS), TOKENIZER)


@pytest.fixture(scope="module", params=["tied", "untied"])
def dense(request) -> Path:
    return request.getfixturevalue(request.param)


def loaded(place: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)


def asking(model: Any, tokenizer: Any, short: dict[str, Any]) -> Opened:
    return replace(opened(model, parse_recipe(grouped(short))), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def asked(recipe: dict[str, Any]) -> dict[str, Any]:
    return {**recipe, "remove": 0.3, "vocabulary": 448}


@pytest.fixture(scope="module")
def cut(dense, asked, tmp_path_factory) -> secateur.Result:
    """The dense model less tokens and channels, written and proved."""
    return secateur.prune(dense, grouped(asked), out=tmp_path_factory.mktemp("cut") / "out", force=True)


def test_tokens_and_channels_together_reach_the_share(dense, cut):
    before, after = (AutoModelForCausalLM.from_pretrained(each) for each in (dense, cut.out))
    kept = kept_tokens_of(cut.out)
    assert kept is not None and len(kept.dense_ids) == 448 == after.config.vocab_size
    # Half a step of all three layers: 4 channels of 144 parameters each.
    assert abs(num_params(before) - num_params(after) - 0.3 * num_params(before)) <= 3 * 4 * 144
    assert cut.summary.remove_reached == 1 - num_params(after) / num_params(before)
    old, new = (each.get_input_embeddings().weight for each in (before, after))
    assert torch.equal(new, old[torch.tensor(kept.dense_ids)])
    assert cut.recipe.remove.vocabulary == 448


def test_a_saved_recipe_repeats_the_run(tied, asked, tmp_path):
    told: list[str] = []
    wanted = {**asked, "vocabulary": "auto", "removed_layers": [0], "rounds": 2, "remove": 0.5}
    options = {"force": True, "tell": told.append}
    found = secateur.prune(tied, grouped(wanted), out=tmp_path / "out", **options)
    assert isinstance(found.recipe.remove.vocabulary, int)
    assert "first measures how many of its" in told[0] and " removes " in told[1]
    told.clear()
    assert secateur.prune(tied, found.recipe, out=tmp_path / "again", **options).recipe == found.recipe
    assert not any("first measures" in sentence for sentence in told)
    assert weights(tmp_path / "again") == weights(tmp_path / "out")


def test_losses_are_those_that_evaluate_finds_in_nats_per_token_of_the_dense_tokenizer(dense, cut, tmp_path):
    found = secateur.evaluate(cut.out, dense, out=tmp_path)
    for name, losses in (("dense", cut.summary.dense_losses), ("pruned", cut.summary.pruned_losses)):
        for domain, quality in found.models[name].domains.items():
            assert losses[domain].nats_per_token == pytest.approx(quality.nats_per_token, rel=1e-5)
            assert losses[domain].num_tokens == quality.num_tokens


def test_a_trim_is_judged_on_its_own_before_channels_go(dense, cut):
    """On the guard's text, in nats per dense token, by the dense model whose softmax has the kept tokens alone."""
    facts = cut.summary.vocabulary
    (model, old), (_, new) = loaded(dense), loaded(cut.out)
    dense_ids = torch.tensor(kept_tokens_of(cut.out).dense_ids)  # type: ignore[union-attr]

    def nats(ids_T: torch.Tensor, kept: torch.Tensor) -> float:
        with torch.no_grad():
            logits = model(ids_T[None]).logits[0, :-1].double()
        return -float((logits.gather(1, ids_T[1:, None])[:, 0] - logits[:, kept].logsumexp(-1)).sum())

    text = run_text_again(cut.out, cut.recipe, new, silent).learning.text
    assert facts is not None and facts.nats.keys() == {domain.name for domain in text.domains}
    for domain in text.domains:
        before, after, tokens = 0.0, 0.0, 0
        for ids_T in domain.held_out.ids_NT:  # plain ASCII
            in_dense = torch.tensor([int(dense_ids[ids_T[0]]), *old(new.decode(ids_T[1:]))["input_ids"]])
            before += nats(in_dense, torch.arange(model.config.vocab_size))
            after += nats(dense_ids[ids_T], dense_ids)
            tokens += len(in_dense) - 1
        assert facts.nats[domain.name] == pytest.approx((before / tokens, after / tokens), rel=1e-5)
    assert facts.foretold is not None and facts.foretold > 0


@pytest.mark.parametrize("changes", [{}, {"groups": [], "evaluate": False}], ids=str)
def test_a_trim_that_costs_too_much_is_not_written_but_by_force_nor_repeated(changes, untied, asked, tmp_path):
    """A model that knows nothing spreads its nats over more tokens: this trim costs more than half a nat."""
    # The text has all of the tokenizer's words, of which hardly any stay.
    domains = {"prose": {"files": [str(prose_file(tmp_path))]}}
    calibration = {"domains": domains, "num_tokens": 640, "sequence_length": 32}
    recipe = grouped({**asked, "vocabulary": 320, "calibration": calibration, **changes})
    message = (
        r"^remove\.vocabulary: with 320 of its 708 tokens the model loses \d\.\d\d nats per token of held-out text "
        r"\(prose \d\.\d\d\), where the counts foretold \d\.\d\d, so nothing is written; .*--force\.$"
    )
    with pytest.raises(secateur.SecateurError, match=message):
        secateur.prune(untied, recipe, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = secateur.prune(untied, recipe, out=tmp_path / "out", force=True, overwrite=True)
    (note,) = [each for each in found.summary.warnings if each.startswith("remove.vocabulary: with 320")]
    assert note.endswith("it was written all the same, as --force says.") and (tmp_path / "out").exists()
    with pytest.raises(secateur.SecateurError, match=r"with 320 of its 708 tokens .*, so nothing is written"):
        secateur.prune(untied, {}, out=tmp_path / "again", like=tmp_path / "out")


def unigram_model(place: Path, likely: list[int]) -> Path:
    """Save a model with a chat template whose logits are the same everywhere: about 21 of likely tokens, else 0."""
    model, tokenizer = tiny_llama(vocab_size=NUM_ROWS), copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = tiny_tokenizer().chat_template
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 50.0
        model.model.norm.weight[0] = 1.0
        model.lm_head.weight.zero_()
        model.lm_head.weight[likely, 0] = 3.0
    return saved(place, model, tokenizer)


def test_tokens_that_answers_alone_have_stay_and_those_of_their_prompts_go(untied, asked, tmp_path):
    asked = {**asked, "groups": [], "vocabulary": 448}
    plain = secateur.prune(untied, grouped(asked), out=tmp_path / "plain", force=True)
    stayed = set(kept_tokens_of(plain.out).dense_ids)
    words = [i for i, text in VOCABULARY.texts.items() if i not in stayed and text.strip().isalpha() and len(text) > 3]
    said, prompted = words[:8], words[8:40]
    prompts = [{"prompt": TOKENIZER.decode([prompted[n % len(prompted)]] * 4)} for n in range(60)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in prompts), encoding="utf-8")
    chat = {"files": [str(file)], "column": "prompt", "answers": True}
    domains = {**asked["calibration"]["domains"], "chat": chat}
    recipe = grouped({**asked, "calibration": {**asked["calibration"], "domains": domains}})
    found = secateur.prune(unigram_model(tmp_path / "model", said), recipe, out=tmp_path / "out", force=True)
    kept = set(kept_tokens_of(tmp_path / "out").dense_ids)
    assert set(said) <= kept and not kept & set(prompted)
    # What the trim cost these answers is in its verdict: nothing, as all of their tokens stayed.
    before, after = found.summary.vocabulary.nats["chat"]
    assert before == pytest.approx(math.log(len(said)), rel=0.05) and after == pytest.approx(before, rel=1e-3)


TRIM = Trim(KeptTokens((0, 1), 3), tiny_tokenizer(), tiny_tokenizer())


def losses_of(*domains: list[float]) -> dict[str, tuple[Loss, Loss]]:
    """Return domains whose documents of a token each lose these nats, of 3 before."""
    pairs = (([3.0] * len(lost), [3 + nats for nats in lost]) for lost in domains)
    return {f"d{n}": tuple(Loss.of(nats, [1] * len(nats)) for nats in pair) for n, pair in enumerate(pairs)}


@pytest.mark.parametrize(
    ("lost", "foretold", "is_refused"),
    [
        ([[0.1, 0.1], [0.1, 0.1]], 0.06, False),
        ([[0.1, 0.1], [0.1, 0.1]], 0.04, True),  # more than twice as much
        ([[0.25, 0.25], [0.25, 0.25]], 0.125, False),  # twice as much
        ([[0.04, 0.04], [0.04, 0.04]], 0.001, False),  # too little to tell apart
        ([[0.3, -0.1], [0.3, -0.1]], 0.04, False),  # documents differ so much that it may be chance
        ([[0.3, -0.1] * 400, [0.3, -0.1] * 400], 0.04, True),
        ([[0.51, 0.51], [-0.2, -0.2]], 0.4, True),  # one domain is ruined
        ([[0.49, 0.49], [0.49, 0.49]], 0.4, False),
        ([[0.2, 0.2]], None, False),  # nothing was foretold
        ([[0.6, 0.6]], None, True),
    ],
)
def test_what_is_too_dear(lost, foretold, is_refused):
    told = too_dear(losses_of(*lost), replace(TRIM, foretold=foretold))
    assert (told is not None) == is_refused
    assert told is None or ("foretold" in told) == (foretold is not None)


def test_stopped_or_streamed_or_shared_the_bytes_are_the_same(untied, asked, warm, tmp_path):
    wanted = {**asked, "vocabulary": "auto", "depth": 1, "remove": 0.5}
    whole = secateur.prune(untied, grouped(wanted), out=tmp_path / "whole", force=True)
    out = tmp_path / "resumed"
    stopped_again_and_again(lambda: secateur.prune(untied, grouped(wanted), out=out, force=True), out, first=2, more=5)
    assert weights(out) == weights(tmp_path / "whole")
    # Enough for all but the weights.
    secateur.prune(untied, grouped({**wanted, "memory_budget": "1.7MB"}), out=tmp_path / "streamed", force=True)
    assert weights(tmp_path / "streamed")["model.safetensors"] == weights(tmp_path / "whole")["model.safetensors"]
    jobs = {"trim": {"model": str(untied), "recipe": wanted, "write": False}}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    status, _, said = run_forked_ranks(warm, 2, CHILD, tmp_path / "jobs.json", tmp_path / "ranks")
    assert status == 0, said
    shared, ours = load_file(tmp_path / "ranks" / "trim.safetensors"), dict(whole.model.state_dict())
    assert shared.keys() == ours.keys() and all(torch.equal(shared[name], ours[name]) for name in ours)


def planned(model: Any, tokenizer: Any, short: dict[str, Any]) -> str:
    """Return what `auto` plans if tokens cost nothing and channels much."""
    ready = asking(model, tokenizer, {**short, "vocabulary": "auto"})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("secateur.methods.tokens.nats_with", lambda *_: 0.0)
        patched.setattr("secateur.pruning.trim._channel_law", lambda *_: lambda share_N: 1e6 * share_N.clamp(min=0))
        found = resolve(plan_trim(ready, Services(), run_text(ready, silent)))
    taken = 1 - found.plans[-1].cost_after / found.prices.total
    widths = list(found.plans[-1].num_keep.values())
    tokens = f"{found.recipe.remove.vocabulary} of {model.config.vocab_size} tokens"
    return f"    {tokens}, layers {found.layers}, widths {widths} by {found.align}, {taken:.5f} of all parameters"


def test_what_auto_plans_where_tokens_cost_nothing(tied, asked):
    model, tokenizer = loaded(tied)
    wide = tiny_llama(num_layers=1, vocab_size=NUM_ROWS, intermediate_size=2304)
    # 20 tokens less than go to 448 are 960 parameters; a step of widths is 3,456 for all layers, 1,152 for one.
    few_too_many = (model.config.vocab_size - 448 - 20) * token_prices(model, 1) / num_params(model)
    cases = [
        ("nothing else goes", model, {"remove": 0.1, "groups": []}),
        ("within half a step of all", model, {"remove": few_too_many}),
        ("not within half a step of one layer", model, {"remove": few_too_many, "budget": "curve"}),
        ("channels alone would go in steps of 32, not 256", wide, {"remove": 0.1, "align": None}),
        ("what a layer leaves; 64 tokens more would be 0.374", model, {"remove": 0.35, "depth": 1}),
        ("the same, named", model, {"remove": 0.35, "removed_layers": [0]}),
        ("the same, no widths", model, {"remove": 0.35, "depth": 1, "groups": []}),
        ("384 if channels of the protected layer could go too", model, {"remove": 0.35, "protected_layers": [0]}),
        ("more than all tokens and these channels: a layer", model, {"remove": 0.5, "protected_layers": [0]}),
    ]
    lines = [f"{why}\n{planned(of, tokenizer, {**asked, **short})}" for why, of, short in cases]
    assert_shown("plans/auto", "\n".join(lines))


def test_auto_keeps_more_tokens_where_trims_are_measured_to_cost_more(tied, asked, monkeypatch):
    ready = asking(*loaded(tied), {**asked, "vocabulary": "auto", "remove": 0.2})
    monkeypatch.setattr("secateur.pruning.trim._channel_law", lambda *_: lambda share_N: 1000 * share_N.clamp(min=0))
    trims, chosen = list[int](), dict[float, tuple[int, list[int]]]()
    for factor in (0.0, 0.002, 1.0):

        def nats_with(*arguments: Any, factor: float = factor) -> float:
            trim = arguments[4]
            trims.append(0 if trim is None else trim.kept.num_dense - len(trim.kept.dense_ids))
            return 3 + factor * trims[-1] ** 2

        monkeypatch.setattr("secateur.methods.tokens.nats_with", nats_with)
        trim = plan_trim(ready, Services(), run_text(ready, silent)).trim
        assert trim is not None
        gone = trim.kept.num_dense - len(trim.kept.dense_ids)
        assert trim.foretold == pytest.approx(factor * gone**2)
        chosen[factor] = gone, trims.copy()
        trims.clear()
    # The dense model, a quarter and a half of what may go, and what is best by those.
    assert chosen == {0.0: (388, [0, 68, 196, 388]), 0.002: (260, [0, 68, 196, 260]), 1.0: (0, [0, 68, 196])}


def test_what_no_trim_can_mend_is_told_before_auto_measures(tied, asked, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.pruning.trim._channel_law", None)
    layers = r"remove\.depth: 1 layers of 23,136 parameters each make it 0.224"
    with pytest.raises(secateur.SecateurError, match=layers):
        secateur.prune(tied, grouped({**asked, "remove": 0.2, "depth": 1, "vocabulary": "auto"}))
    model = saved(tmp_path / "bytes", tiny_llama(vocab_size=260), tiny_tokenizer())
    with pytest.raises(secateur.RecipeError, match=r"none of the model's 260 rows can go, .*; leave it out\.$"):
        secateur.prune(model, {"remove": {"groups": [], "vocabulary": 192}}, out=tmp_path / "out")


def test_tokens_go_by_shares_of_domains_whatever_weighs_units_unless_the_worst_counts(tied, asked):
    orders = {}
    for weighting in ("energy", "tokens", "minimax"):
        ready = asking(*loaded(tied), {**asked, "domain_weighting": weighting})
        dense, text = trimming._read(ready, Services()), run_text(ready, silent)
        counts = trimming._counts(dense, text, trimming._Hand(ready, {}, {}, {}, 0.0))
        orders[weighting] = trimming._removal(dense, counts, PieceNats()).ids
    assert orders["energy"] == orders["tokens"] != orders["minimax"]


def test_a_model_in_memory_loses_its_tokens_in_place(tied, asked):
    model, tokenizer = loaded(tied)
    found = secateur.prune(model, grouped(asked), tokenizer=tokenizer, force=True)
    assert found.model is model and model.config.vocab_size == 448 == len(found.tokenizer)
    text = "ferry Паром 🚀"
    assert found.tokenizer.decode(found.tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    "changes", [{"groups": []}, {"groups": ["experts"], "vocabulary": None, "removed_layers": [0]}]
)
def test_a_model_whose_ffns_are_all_of_experts_loses_tokens_and_layers(changes, asked):
    model = tiny_family("mixtral", vocab_size=NUM_ROWS)
    size, recipe = num_params(model), grouped({**asked, "remove": 0.5, **changes})
    assert num_params(secateur.prune(model, recipe, tokenizer=TOKENIZER, force=True).model) < size


def test_what_a_trim_reads_of_the_weights_is_told_by_the_run(asked, tmp_path):
    """The trim loads the weights, and the run that has them already said nothing on them."""
    pytest.importorskip("gguf")
    model = tiny_llama(vocab_size=NUM_ROWS)
    model.get_output_embeddings().weight.data.copy_(model.get_input_embeddings().weight * 1.001)
    export_gguf(open_checkpoint(saved(tmp_path / "model", model, TOKENIZER)), tmp_path / "twice.gguf", "f32")
    result = secateur.prune(tmp_path / "twice.gguf", grouped(asked), force=True)
    assert any("one matrix twice" in note for note in result.summary.warnings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocabulary": 450}, r"450 of .* cannot stay; give a multiple of 64 \(such as 448 or 512\)"),
        ({"vocabulary": 64}, r"remove\.vocabulary: 64 of the model's .* from 320"),
        ({"vocabulary": 6400}, r"remove\.vocabulary: 6,400 of the model's"),
        ({"keep_scripts": ["latin"]}, "448 of .* from 704"),  # 320 without it
        ({"vocabulary": 448, "remove": 0.01}, r"remove\.vocabulary: the tokens that go are 0\.\d+ of all"),
        ({"vocabulary": "auto", "groups": ["kv_heads"]}, "auto weighs tokens against FFN channels"),
    ],
)
def test_what_needs_no_text_is_refused_before_any_is_read(changes, said, tied, asked, tmp_path, monkeypatch):
    """By inspect, too."""
    recipe = grouped({**asked, **changes})
    monkeypatch.setattr("secateur.pruning.text.RunText.learning", lambda _: pytest.fail("text was read"))
    with pytest.raises(secateur.SecateurError, match=said) as error:
        secateur.prune(tied, recipe, out=tmp_path / "out")
    sentence = str(error.value)
    try:
        found = secateur.inspect(tied, recipe)
    except secateur.SecateurError as told:
        assert str(told) == sentence
    else:  # a share out of reach is a note, and the nearest one is shown
        assert sentence.removesuffix(".") in found.warnings[0] and "remove" in changes


def test_the_whole_vocabulary_as_a_size_leaves_channels_alone_to_go(tied, asked, tmp_path):
    assert NUM_ROWS % 64, "what `auto` saves if it takes no token need not be a multiple of 64"
    for name, vocabulary in (("all", NUM_ROWS), ("none", None)):
        found = secateur.prune(tied, grouped({**asked, "vocabulary": vocabulary}), out=tmp_path / name, force=True)
        assert found.recipe.remove.vocabulary == vocabulary
    assert (tmp_path / "all/model.safetensors").read_bytes() == (tmp_path / "none/model.safetensors").read_bytes()


RULES = " ".join(sign * 32 for sign in "=-+*#~") * 2
WORDS = "institutional neurotransmitters understood assertAlmostEqual"
LEARNT = [*CORPUS, *SAMPLES.values(), WORDS, "Паром море море", RULES] * 4


@pytest.fixture(scope="module")
def trimmed() -> Trim:
    """All that may go of every second token is gone."""
    dense = bpe_tokenizer(vocab_size=900, corpus=LEARNT)
    vocabulary = read_vocabulary(dense, tiny_llama(vocab_size=960))
    stay = with_parts(vocabulary, range(0, 900, 2))
    kept = KeptTokens(tuple(index for index in range(960) if index in stay or index > 950), 960)
    return Trim(kept, dense, trimmed_tokenizer(dense, kept))


def test_tokens_and_scripts_are_counted_in_both_tokenizers(trimmed):
    texts = {"prose": CORPUS[0] * 4, "море": "Паром море " * 9}
    blocks = {name: documents_of(torch.tensor([trimmed.tokenizer(text)["input_ids"]])) for name, text in texts.items()}
    losses = {"prose": (Loss(3.0, 0.1, 9), Loss(3.25, 0.1, 9))}
    dense = retokenised(blocks, trimmed.tokenizer, trimmed.dense_tokenizer)
    before, now = predicted_tokens(dense), predicted_tokens(blocks)
    num_tokens = {name: (sum(before[name].values()), sum(now[name].values())) for name in blocks}
    facts = vocabulary_facts(replace(trimmed, foretold=0.2), num_tokens, losses)
    assert (facts.num_before, facts.num_after) == (960, len(trimmed.kept.dense_ids))
    for name, text in texts.items():
        first, *rest = trimmed.tokenizer.tokenize(text)  # context alone, in both
        behind = text.removeprefix(trimmed.tokenizer.convert_tokens_to_string([first]))
        assert facts.by_domain[name] == (len(trimmed.dense_tokenizer.tokenize(behind)), len(rest))
    assert facts.by_domain["prose"][1] > facts.by_domain["prose"][0]
    assert facts.nats == {"prose": (3.0, 3.25)} and facts.foretold == 0.2

    def count(ids: Any, letters: str) -> int:
        return sum(bool(re.search(letters, trimmed.dense_tokenizer.decode([index]))) for index in ids if index < 900)

    scripts = {"cyrillic": "[\u0400-\u04ff]", "latin": "[a-zA-ZñáäöüéíóúßÄÖÜ]", "devanagari": "[\u0904-\u0939]"}
    for script, letters in scripts.items():
        expected = (count(range(900), letters), count(trimmed.kept.dense_ids, letters))
        assert facts.scripts[script] == expected and expected[0] > expected[1] > 0, script


def test_a_token_beyond_the_models_rows_is_none(trimmed):
    found = vocabulary_facts(replace(trimmed, kept=KeptTokens(tuple(range(899)), 899)), {}, {})
    assert found.num_before == found.num_after == 899 and found.scripts["latin"][0] == found.scripts["latin"][1] > 0
