"""Answers of the dense model: drawn, the same in any batch; prompts that count for nothing."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_llama, tiny_mistral
from texts import documents_of
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from secateur.data import answers
from secateur.data.answers import Answers, Conversation, Speaker, packed, with_answers
from secateur.data.blocks import Blocks, JudgedText, LearningDomain, LearningText
from secateur.data.forms import closing_of_turn
from secateur.data.sources import documents, shipped
from secateur.errors import CalibrationError, NumericsError
from secateur.model.bind import bind
from secateur.model.group import cut
from secateur.model.per_layer import record_widths
from secateur.recipe import Domain
from tests.families import tiny_family

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking %}~{% endif %}{% endif %}"
)
LENGTH = 64


def speaker(model: Any, *, seed: str = "0", length: int = LENGTH, template: str = TEMPLATE) -> Speaker:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    is_llama, num_layers = isinstance(model, LlamaForCausalLM), model.config.num_hidden_layers
    model_without_bias = tiny_llama(num_layers=num_layers) if is_llama else model
    return Speaker(model, bind(model_without_bias), tokenizer, seed, length)


def talkative() -> Any:
    """Return a model that ends a turn after some fifteen tokens."""
    model = tiny_llama(num_layers=1)
    bias = torch.zeros(model.config.vocab_size)
    bias[256] = 2.9
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


Steps = Sequence[tuple[str, Callable[[], dict[str, Tensor]]]]


def unheard(_: int) -> None:
    """Hear of no progress."""


def at_once(steps: Steps) -> list[dict[str, Tensor]]:
    return [compute() for _, compute in steps]


ASKED = tuple(f"<user>{number}<eos><assistant>" for number in range(30))


def written(of: Speaker, num_blocks: int = 4, prompts: Sequence[str] = ASKED, name: str = "answers") -> Any:
    return Answers(of, {name: prompts}, at_once).blocks(name, {"learning": num_blocks})["learning"]


def likeliest(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1, :257].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "make", [tiny_llama, tiny_mistral, tiny_gemma3, partial(tiny_family, "gpt2", seed=2, tie_word_embeddings=False)]
)
def test_every_token_follows_from_its_own_prompt_and_all_those_before(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "ROOM", 4)  # so that keys and values move several times
    model = make()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 1e4  # so certain that a draw is the likeliest
    prompts = [[5], list(range(40, 53)), list(range(7))]
    expected = [likeliest(model, prompt, 17) for prompt in prompts]
    ends = frozenset({expected[0][2], expected[1][10]})
    monkeypatch.setattr(answers.Speaker, "ends", ends)
    written = answers._continued(speaker(model), prompts, [*"abc"], 17, unheard)
    drawn = [conversation.answer_T.tolist() for conversation in written]
    sizes = [next((size for size, token in enumerate(ids, start=1) if token in ends), 17) for ids in expected]
    assert min(sizes) < max(sizes)
    assert drawn == [ids[:size] for ids, size in zip(expected, sizes, strict=True)]


def test_a_step_copies_its_own_keys_and_values_alone() -> None:
    roomy = answers._Roomy(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
    states = [torch.full((2, 1, 1, 4), float(step)) for step in range(answers.ROOM)]
    places = {roomy.update(each, -each)[0].untyped_storage().data_ptr() for each in states}
    assert len(places) == 1
    assert torch.equal(roomy.keys, torch.cat([torch.ones(2, 1, 3, 4), *states], dim=-2))
    assert torch.equal(roomy.values[..., 3:, :], -roomy.keys[..., 3:, :])


def test_reading_prompts_and_steps_of_few_rows_move_the_progress_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first token, behind all prompts, and the last ones, of one long answer, take for ever."""
    monkeypatch.setattr(answers, "CPU_ROWS", answers.LEAST_ROWS)
    of, heard = speaker(tiny_llama()), list[tuple[int, int]]()
    asked = ["one", "another one", "two", "three", "four"]
    written = answers.greedy_answers(of, asked, 5, "ask", lambda _, done, total: heard.append((done, total)))
    in_prompts = [conversation.num_prompt for conversation in written]
    steps = [[max(0, len(c.ids_T) - c.num_prompt - step) > 0 for c in written] for step in range(6)]
    total = sum(in_prompts) + 5 * (5 + 2 * answers.STEP_TOKENS)
    assert {of_all for _, of_all in heard} == {total} and [done for done, _ in heard] == sorted(d for d, _ in heard)
    first = sum(in_prompts[:4]) + answers.STEP_TOKENS + sum(steps[1][:4])
    assert [heard[0], heard[1], heard[-1]] == [(0, total), (first, total), (total, total)]


def test_a_stage_that_goes_on_begins_behind_what_is_written() -> None:
    """Else it is foretold at a speed that no model has."""
    heard = list[int]()
    dense = Answers(speaker(talkative()), {"a": ASKED}, at_once)
    dense.blocks("a", {"learning": 2})
    before = sum(len(conversation.ids_T) for conversation in dense.written["a", "learning"])
    replace(dense, progress=lambda _, done, total: heard.append(done)).blocks("a", {"learning": 6})
    assert heard[0] == before and heard == sorted(heard)


def test_the_first_token_has_the_models_distribution() -> None:
    model = tiny_llama()
    prompt = [9, 8, 7]
    with torch.no_grad():
        likely = (model(torch.tensor([prompt])).logits[0, -1, :257] / answers.TEMPERATURE).softmax(dim=-1)
    seeds = [str(number) for number in range(4000)]
    written = answers._continued(speaker(model), [prompt] * 4000, seeds, 1, unheard)
    drawn = torch.cat([conversation.answer_T for conversation in written])
    shares = torch.bincount(drawn, minlength=257) / 4000
    assert 0.5 * (shares - likely).abs().sum() < 0.12  # total variation; 257 equal shares of 4000 would be 0.3 away
    assert 0.5 * (shares - 1 / 257).abs().sum() > 0.2


def test_an_answer_is_cut_at_half_of_a_block() -> None:
    of, requests = (
        speaker(tiny_llama(num_layers=1), seed="1"),
        [answers.Request("d", "learning", number, [5, 6, 7]) for number in range(8)],
    )
    sizes_B2 = answers._batch(of, requests, unheard)["sizes"]
    assert (sizes_B2[:, 0] - sizes_B2[:, 1]).max() == LENGTH // 2


def test_a_number_between_0_and_1_names_the_token_at_which_the_sum_passes_it() -> None:
    logits_BV = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log().expand(6, -1)
    numbers = torch.tensor([0.0, 0.4999, 0.5001, 0.7499, 0.7501, 1.0])
    assert answers._draw(logits_BV, numbers).tolist() == [0, 0, 2, 2, 3, 3]


def test_conversations_are_the_same_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = talkative()
    several = written(speaker(model), 6)
    monkeypatch.setattr(answers, "CPU_ROWS", 3)
    monkeypatch.setattr(answers, "LEAST_ROWS", 1)
    few = written(speaker(model), 6)
    assert torch.equal(few.ids_NT, several.ids_NT)
    other = written(speaker(model, seed="1"), 6)
    assert not torch.equal(few.ids_NT, other.ids_NT)
    assert not torch.equal(few.ids_NT, written(speaker(model), 6, name="polish").ids_NT)


def test_a_model_whose_layers_have_heads_of_their_own_number_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    arch = bind(model)
    [group] = (each for each in arch.select(("kv_heads",)) if each.layer == 1)
    cut(model.model.layers[1], group, torch.tensor([0]))
    record_widths(model, arch)
    monkeypatch.setattr(answers, "CACHE_BYTES", 10 * 2 * (2 + 1 + 2) * 12 * LENGTH * 4)
    assert Speaker(model, bind(model), tiny_tokenizer(), "0", LENGTH).rows == 10


def test_more_blocks_begin_with_the_same_conversations() -> None:
    of = speaker(talkative())
    some, more = written(of, 2), written(of, 8)
    first = some.ids_NT[0, : int((some.document_NT[0] == 0).sum())]
    assert torch.equal(more.ids_NT[0, : len(first)], first)


def test_only_answers_count() -> None:
    of = speaker(talkative())
    blocks = written(of)
    assert blocks.ids_NT.shape == (4, LENGTH) and int(blocks.ids_NT.max()) < 257 and not blocks.ids_NT.is_inference()
    assert closing_of_turn(of.tokenizer) == "<eos><assistant>~"  # where it is asked to, a model reasons
    assert [answers._first_added(text, of.tokenizer) for text in (" <eos>a", "a<eos>", " ")] == [256, None, None]
    for ids_T, counted_T in zip(blocks.ids_NT, blocks.counted_NT, strict=True):
        text = of.tokenizer.decode(ids_T)
        assert text.startswith("<user>") and "<eos><assistant>" in text
        assert counted_T.any() and not counted_T.all()


def test_what_fills_a_block_is_told_in_the_other_tokens_too() -> None:
    """The end of a text may be beyond the last row of a trimmed model."""
    of = speaker(talkative())
    of.tokenizer.eos_token = "<eos>"
    last = of.model.config.vocab_size - 1
    asked = Answers(of, {"answers": ASKED}, at_once)
    plain = asked.blocks("answers", {"learning": 4})["learning"]
    told = asked.blocks("answers", {"learning": 4}, lambda each: Conversation(last - each.ids_T, each.num_prompt))
    filler = of.tokenizer.eos_token_id
    assert bool(((plain.ids_NT == filler) & ~plain.counted_NT).any())
    assert torch.equal(told["learning"].ids_NT, last - plain.ids_NT)


def test_prompts_of_files_are_answered_and_again_where_they_are_few() -> None:
    of = speaker(talkative())
    prompts = [f"<user>{letter}<eos><assistant>" for letter in "abcd"]
    blocks = written(of, 4, prompts)
    for document in range(int(blocks.document_NT.max()) + 1):
        mine = blocks.document_NT == document
        ids, counted = blocks.ids_NT[mine], blocks.counted_NT[mine]
        num_prompt = int(counted.nonzero()[0])
        assert of.tokenizer.decode(ids[:num_prompt]) in prompts
    assert len(blocks.ids_NT.unique(dim=0)) == 4


def test_a_prompt_longer_than_half_of_a_block_is_left_out() -> None:
    of = speaker(talkative())
    short, long = "<user>a<eos><assistant>", "<user>" + "b" * LENGTH
    blocks = written(of, 4, [long, short, long, short, long, short])
    assert "bb" not in of.tokenizer.decode(blocks.ids_NT.flatten())
    with pytest.raises(CalibrationError, match="no prompt has 32 tokens or less"):
        written(of, 4, [long] * 3)


def test_a_model_that_gives_the_same_answers_again_is_an_error() -> None:
    model = talkative()
    with torch.no_grad():
        model.lm_head.weight *= 1e4
    with pytest.raises(CalibrationError, match="gives the same answers again and again"):
        written(speaker(model), 40, ASKED[:3])


def test_a_model_without_finite_logits_is_refused() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    with pytest.raises(NumericsError, match="gives no finite logits"):
        written(speaker(model))


def test_steps_are_what_is_kept_and_read_back() -> None:
    of, kept, asked = speaker(talkative()), dict[str, dict[str, Tensor]](), list[str]()

    def keeping(steps: Steps) -> list[dict[str, Tensor]]:
        asked.extend(name for name, _ in steps)
        for name, compute in steps:
            if name not in kept:
                kept[name] = compute()
        return [kept[name] for name, _ in steps]

    first = Answers(of, {"own": ASKED}, keeping).blocks("own", {"learning": 4})["learning"]
    assert len(asked) == len(set(asked)) and all(name.startswith("answers-own-learning-") for name in asked)
    again = Answers(of, {"own": ASKED}, lambda steps: [kept[name] for name, _ in steps])
    assert torch.equal(again.blocks("own", {"learning": 4})["learning"].ids_NT, first.ids_NT)
    # What is written already is not asked for again.
    num_asked = len(asked)
    assert len(replace(again, do=keeping).blocks("own", {"learning": 2})["learning"]) == 2
    assert len(asked) == num_asked


def test_guard_and_what_is_learnt_by_have_other_prompts() -> None:
    of = speaker(talkative())
    prompts = ASKED
    found = Answers(of, {"a": prompts}, at_once).blocks("a", {"held-out": 2, "learning": 2})
    texts = {part: of.tokenizer.decode(blocks.ids_NT.flatten()) for part, blocks in found.items()}
    used = {part: {prompt for prompt in prompts if prompt in text} for part, text in texts.items()}
    assert used["held-out"] <= set(prompts[:3])
    assert used["learning"] <= set(prompts[3:]) and all(used.values())
    with pytest.raises(CalibrationError, match=r"too few prompts \(got 1\)"):
        Answers(of, {"a": prompts[:1]}, at_once).blocks("a", {"learning": 1})


def test_what_guards_judges_too_and_nothing_else_is_written_to_judge() -> None:
    def unwritten(count: int) -> Blocks:
        return documents_of(torch.empty(count, LENGTH, dtype=torch.int64, device="meta"))

    some = documents_of(torch.zeros(3, LENGTH, dtype=torch.int64))
    plain = LearningDomain("prose", 1.0, some, 2, some[:1])  # before those with answers
    text = LearningText((plain, LearningDomain("a", 1.0, unwritten(3), 2, unwritten(1))), LENGTH)
    found = Answers(speaker(talkative()), {"a": ASKED}, at_once)
    learning, judged = with_answers(text, JudgedText({"a": unwritten(8)}), found)
    first, domain = learning.domains
    assert first is plain
    assert [len(domain.blocks), len(domain.calibration), len(domain.held_out)] == [3, 2, 1]
    assert judged.blocks["a"] is domain.held_out
    assert set(found.written) == {("a", "learning"), ("a", "held-out")}


def test_both_parts_are_written_in_few_batches_of_like_size() -> None:
    of, sizes = speaker(talkative()), list[int]()

    def measuring(steps: Steps) -> list[dict[str, Tensor]]:
        found = at_once(steps)
        sizes.extend(len(tensors["sizes"]) for tensors in found)
        return found

    alone = written(of, 40)
    both = Answers(of, {"answers": ASKED}, measuring).blocks("answers", {"held-out": 2, "learning": 40})
    # A conversation does not depend on what else is written with it.
    assert torch.equal(both["learning"].ids_NT, alone.ids_NT)
    assert sizes[0] == sizes[1] == 42 and max(sizes) <= answers.CPU_ROWS


def test_what_is_cut_off_at_the_end_of_blocks_is_written_anew_in_few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three conversations of 25 tokens share a block of 64."""

    def batch(_: Speaker, requests: list[answers.Request], __: Callable[[int], None]) -> dict[str, Tensor]:
        ids = [torch.full((25,), request.number) for request in requests]
        return {"ids": torch.cat(ids), "sizes": torch.tensor([[25, 10]] * len(requests))}

    monkeypatch.setattr(answers, "_batch", batch)
    monkeypatch.setattr(answers.Speaker, "rows", 1000)
    batches = list[int]()

    def counted(steps: Steps) -> list[dict[str, Tensor]]:
        batches.append(len(steps))
        return at_once(steps)

    asked = Answers(speaker(tiny_llama()), {"answers": ASKED}, counted)
    assert len(asked.blocks("answers", {"learning": 90})["learning"]) == 90
    assert len(batches) <= 4


def test_without_a_source_the_prompts_that_come_with_secateur_are_asked_and_none_of_them_judges() -> None:
    tokenizer = speaker(tiny_llama()).tokenizer
    first, second = (list(documents("answers", Domain(answers=True), tokenizer, seed)) for seed in (0, 1))
    questions = shipped("questions.yaml")
    assert first != second and sorted(first) == sorted(second)
    assert sorted(first) == sorted(f"<user>{text}<eos><assistant>~" for text in questions)
    assert len(set(questions)) == len(questions) > 200
    assert not {text.casefold() for text in questions} & {text.casefold() for text in shipped("prompts.yaml")}


def conversation(size: int, num_prompt: int, start: int = 0) -> Conversation:
    return Conversation(torch.arange(start, start + size), num_prompt)


def test_blocks_hold_whole_conversations_and_the_last_is_cut() -> None:
    given = [conversation(10, 4), conversation(3, 1, 20), conversation(5, 2, 40), conversation(9, 3, 60)]
    blocks = packed(given, 16, 99)
    # 10, then 5 as the longest that fits; a gap of one token is filled. Then 9, and 3 whose rest is too much.
    assert blocks.ids_NT.tolist()[0] == [*range(10), *range(40, 45), 99]
    assert blocks.document_NT.tolist()[0] == [0] * 10 + [1] * 6
    counted = [False] * 4 + [True] * 6 + [False] * 2 + [True] * 3 + [False]
    assert blocks.counted_NT.tolist()[0] == counted
    assert len(blocks.ids_NT) == 1  # 9 and 3 leave a gap of 4, which nothing is left to fill


def test_a_gap_is_filled_with_a_conversation_that_is_cut() -> None:
    blocks = packed([conversation(10, 4), conversation(9, 7, 20), conversation(9, 3, 40)], 16, 99)
    # The second has a prompt that is longer than the gap.
    assert blocks.ids_NT.tolist()[0] == [*range(10), *range(40, 46)]
    assert blocks.counted_NT[0, -4:].tolist() == [False, True, True, True]
    each = packed([conversation(6, 2, 10 * number) for number in range(8)], 12, 0)
    assert each.ids_NT[:, 0].tolist() == [0, 20, 40, 60], "a block begins with the conversation that is first"
    assert each.document_NT[:, 0].tolist() == [0, 2, 4, 6]


def test_a_row_is_a_prompt_up_to_its_first_users_turn(tmp_path: Path) -> None:
    template = "{% if tools %}{{ tools[0]['function']['name'] }}|{% endif %}" + TEMPLATE
    tokenizer = speaker(tiny_llama(), template=template).tokenizer
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    later = [{"role": "assistant", "content": "no"}, {"role": "user", "content": "why"}]
    asked: dict[str, dict[str, Any]] = {
        "add": {"instruction": "add", "output": "3"},
        "add\n\n1 2": {"instruction": "add", "input": "1 2"},
        "say": {"id": "1", "prompt": "say"},
        "what": {"question": "what", "answer": None},
        "how many": {"question": "how many", "answer": 72},
        "where": {"question": "where", "answer": ["here", "there"]},
        "plain": {"text": "plain"},
    }
    chats = [[*turns, *later], later[:1]]
    rows = [*asked.values(), *({"messages": chat} for chat in chats), {"messages": turns, "tools": [{"name": "f"}]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    noted = list[str]()
    domain = Domain(files=(str(tmp_path / "rows.jsonl"),), answers=True)
    found = set(documents("a", domain, tokenizer, 0, lambda what, _: noted.append(what)))
    system, end = "<system>be brief<eos>", "<eos><assistant>~"
    assert found == {f"{system}<user>hi{end}", f"f|{system}<user>hi{end}", *(f"<user>{said}{end}" for said in asked)}
    assert noted == ["chats left out, since no user says anything in them"]


def test_prompts_that_leave_no_room_in_the_tokens_of_another_tokenizer_fill_nothing():
    short, long = (Conversation(torch.arange(size), num_prompt) for size, num_prompt in ((6, 2), (14, 9)))
    found = answers._filled([long, short, long, short], 1, 8, 0)
    assert found.ids_NT.tolist() == answers._filled([short, short], 1, 8, 0).ids_NT.tolist()


def test_what_a_tokenizer_puts_before_each_text_is_in_no_prompt_and_no_end() -> None:
    plain = speaker(talkative())
    begun = replace(plain, tokenizer=tiny_tokenizer(begins=True))
    begun.tokenizer.chat_template = TEMPLATE
    assert torch.equal(written(plain).ids_NT, written(begun).ids_NT)
    assert closing_of_turn(plain.tokenizer) == closing_of_turn(begun.tokenizer)
