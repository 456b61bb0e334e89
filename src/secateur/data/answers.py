"""What the dense model answers, as calibration text: whole conversations, whose answers alone count.

In: a model and prompts as its chat template writes them, or none: then it writes the user's turns
too. Out: conversations, and blocks of them with a mask. A prompt gives context and counts for nothing.

B conversations at a time, T tokens of a block, N blocks, V tokens of the vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from secateur.data.blocks import Block, Blocks, JudgedText, LearningText
from secateur.data.chat import chat_text, user_turn
from secateur.data.retokenised import retokenised
from secateur.errors import CalibrationError, NumericsError
from secateur.log import Progress, silent
from secateur.model.bind import Arch, head_of
from secateur.model.checkpoint import Tokenizer, eval_mode
from secateur.model.modules import CausalLM

# Conversations written together. A step reads all weights, whatever its rows; on a CPU more than so
# many rows gain little, since each computes for itself.
CPU_ROWS, DEVICE_ROWS, LEAST_ROWS = 64, 256, 4
# What their keys and values may take, or a quarter of the weights if that is more.
CACHE_BYTES = 1_000_000_000
# The KV cache's name since transformers 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")
# Rows leave the batch together once this share of it is finished: each time the cache is copied.
FINISHED_SHARE = 1 / 8
# A user's turn that is longer is dropped. An answer is cut at half of a block.
TURN_TOKENS = 128
NOT_FINITE = "answers: the model gives no finite logits; use it in bfloat16 or float32 and check its weights."
# So many conversations without one that can be used, and there will be none.
PATIENCE = 200
# A gap at a block's end is filled with a part of a conversation if it is longer than this share of it.
LARGEST_GAP = 1 / 8

Steps = Callable[[Sequence[tuple[str, Callable[[], dict[str, Tensor]]]]], list[dict[str, Tensor]]]
"""Named steps of work to what each gives: shared out over ranks, or kept by an earlier run."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """`ids_T`: the tokens that the model read and wrote; of these `num_prompt` are the prompt."""

    ids_T: Int64[Tensor, " T"]
    num_prompt: int


# Gives a conversation in another tokenizer's tokens.
Told = Callable[[Conversation], Conversation]
Part = Literal["judged", "held-out", "learning"]


@dataclass(frozen=True, slots=True)
class Speaker:
    """The dense model that answers. `seed`: of all draws. `length`: of a block, in tokens."""

    model: CausalLM
    arch: Arch
    tokenizer: Tokenizer
    seed: str
    length: int

    @property
    def rows(self) -> int:
        """Return how many conversations are written at a time; it depends on the model alone."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_row = 2 * self.arch.num_layers * heads * size * self.length * self.model.dtype.itemsize
        weights = sum(weight.numel() * weight.element_size() for weight in self.model.parameters())
        most = CPU_ROWS if self.model.device.type == "cpu" else DEVICE_ROWS
        return max(LEAST_ROWS, min(most, max(CACHE_BYTES, weights // 4) // per_row))

    @property
    def ends(self) -> frozenset[int]:
        """Return the tokens that end an answer: the model's, the tokenizer's and the template's."""
        own = getattr(self.model.generation_config, "eos_token_id", None)
        own = own if isinstance(own, list | tuple) else [own]
        said = {*own, self.tokenizer.eos_token_id, _first_added(user_turn(self.tokenizer)[1], self.tokenizer)}
        return frozenset(each for each in said if isinstance(each, int))


@dataclass(slots=True)
class Written:
    """The conversations of a name so far. `num_drawn`: with those that could not be used."""

    conversations: list[Conversation] = field(default_factory=list[Conversation])
    num_drawn: int = 0


@dataclass(frozen=True, slots=True)
class Answers:
    """What a speaker answers, written as far as it is asked for.

    `prompts`: by domain, as the chat template writes them up to the answer; where they are too few,
    each is answered more than once. None: the speaker writes the users' turns as well. What judges,
    what guards and what is learnt by have prompts of their own, the first two a tenth of them each.
    `written`: by name of domain and part.
    """

    speaker: Speaker
    prompts: Mapping[str, Sequence[str] | None]
    do: Steps
    progress: Progress = silent
    written: dict[str, Written] = field(default_factory=dict[str, Written])

    def blocks(self, domain: str, part: Part, num_blocks: int, told: Told | None = None) -> Blocks:
        """Return blocks of the part's first conversations.

        `told`: what gives a conversation in another tokenizer's tokens. Raises CalibrationError for too
        few prompts, if none leaves room for an answer, or if the model writes no turn that ends;
        NumericsError if a logit is not finite.
        """
        name, length = f"{domain}-{part}", self.speaker.length
        stage, num_tokens = f"answers, {name}", num_blocks * length
        asked, written = self._asked(domain, part), self.written.setdefault(name, Written())
        self.progress(stage, 0, num_tokens)
        while True:
            own = _once(written.conversations, by_prompt=asked is None)
            own = own if told is None else map(told, own)
            blocks = _filled(list(own), num_blocks, length, self.speaker.tokenizer.eos_token_id or 0)
            if blocks is not None:
                self.progress(stage, num_tokens, num_tokens)
                return blocks
            self._write_on(name, num_tokens, asked)

    def _asked(self, domain: str, part: Part) -> list[list[int]] | None:
        """Return the part's prompts."""
        given = self.prompts[domain]
        if given is None:
            return None
        if len(given) < 3:
            raise CalibrationError(
                f"domain '{domain}': {len(given)} prompts are too few, since what guards the run and what judges it "
                "have prompts of their own; give 3 or more."
            )
        tenth = -(-len(given) // 10)
        places = {"judged": slice(tenth), "held-out": slice(tenth, 2 * tenth), "learning": slice(2 * tenth, None)}
        return _that_fit(given[places[part]], self.speaker, domain)

    def _write_on(self, name: str, num_tokens: int, asked: list[list[int]] | None) -> None:
        """Write as many more batches as should do, by the tokens of those before; the ranks share them."""
        written, rows, length = self.written[name], self.speaker.rows, self.speaker.length
        done = sum(len(each.ids_T) for each in written.conversations)
        if written.num_drawn >= PATIENCE and not done:
            raise CalibrationError(
                f"domain '{name}': the model writes no users' turns that end; give prompts as files, or leave answers "
                "out (calibration.answers: 0)."
            )
        mean = (done + length / 3) / (written.num_drawn + 1)
        wanted = max(1, round(1.02 * (num_tokens - done) / mean))
        sizes = [rows] * (wanted // rows) + ([wanted % rows] if wanted % rows else [])
        firsts = [written.num_drawn + sum(sizes[:place]) for place in range(len(sizes))]
        tell = _Counter(self.progress, f"answers, {name}", done, num_tokens)
        batches = [range(first, first + size) for first, size in zip(firsts, sizes, strict=True)]
        names = [f"answers-{name}-{numbers.start}-{numbers.stop}" for numbers in batches]
        work = [partial(_batch, self.speaker, numbers, asked, name, tell) for numbers in batches]
        for tensors in self.do(list(zip(names, work, strict=True))):
            written.conversations += _unflat(tensors)
        written.num_drawn += wanted


def with_answers(
    text: LearningText, judged: JudgedText, answers: Answers, told: Told | None = None
) -> tuple[LearningText, JudgedText]:
    """Return both texts with all blocks of answers. `told`, errors: as for `Answers.blocks`."""
    domains, judging = list(text.domains), dict(judged.blocks)
    for index, domain in enumerate(domains):
        if not domain.blocks.is_meta:
            continue
        own_judged = judging[domain.name]
        held_out = answers.blocks(domain.name, "held-out", len(domain.held_out), told)
        learning = answers.blocks(domain.name, "learning", len(domain.blocks), told)
        domains[index] = replace(domain, held_out=held_out, blocks=learning)
        judging[domain.name] = held_out
        if own_judged is not domain.held_out:
            judging[domain.name] = answers.blocks(domain.name, "judged", len(own_judged), told)
    return replace(text, domains=tuple(domains)), replace(judged, blocks=judging)


def in_tokens_of(source: Tokenizer, target: Tokenizer) -> Told:
    """Return what tells a conversation in tokens of `target`, prompt and answer each by itself."""

    def told(conversation: Conversation) -> Conversation:
        ids_T = conversation.ids_T
        is_answer_T = torch.arange(len(ids_T)) >= conversation.num_prompt
        [block] = retokenised({"": [Block(ids_T, torch.zeros_like(ids_T), is_answer_T)]}, source, target)[""]
        assert block.counted_T is not None, "it had a mask"
        return Conversation(block.ids_T, int((~block.counted_T).sum()))

    return told


def _filled(written: list[Conversation], num_blocks: int, length: int, filler: int) -> Blocks | None:
    """Return so many blocks of the fewest conversations that fill them, in order; None if they do not.

    So the blocks do not depend on how many more were written in the last batch.
    """
    fitting = [each for each in written if each.num_prompt < length]
    num_tokens = 0
    for count, conversation in enumerate(fitting, start=1):
        num_tokens += len(conversation.ids_T)
        if num_tokens < num_blocks * length * (1 - LARGEST_GAP):
            continue
        blocks = packed(fitting[:count], length, filler)
        if len(blocks) >= num_blocks:
            return blocks[:num_blocks]
    return None if num_blocks else packed([], length, filler)


def greedy_answers(
    speaker: Speaker, prompts: Sequence[str], num_tokens: int, stage: str, progress: Progress = silent
) -> list[Conversation]:
    """Return what the speaker answers to each prompt of a user, its first choice at every token.

    An answer ends by itself, or behind `num_tokens`. Raises NumericsError if a logit is not finite.
    """
    conversations, ends, total = list[Conversation](), speaker.ends, len(prompts) * num_tokens
    progress(stage, 0, total)
    for start in range(0, len(prompts), speaker.rows):
        asked = [_prompt(text, speaker) for text in prompts[start : start + speaker.rows]]
        tell = _Counter(progress, stage, start * num_tokens, total)
        written = _continued(speaker, asked, None, lambda ids: ids[-1] in ends or len(ids) >= num_tokens, tell)
        conversations += [
            Conversation(ids_T=torch.tensor([*prompt, *answer]), num_prompt=len(prompt))
            for prompt, answer in zip(asked, written, strict=True)
        ]
    progress(stage, total, total)
    return conversations


def _that_fit(prompts: Sequence[str], speaker: Speaker, name: str) -> list[list[int]]:
    """Return the prompts' ids, without those that leave less than half of a block for the answer."""
    ids = [speaker.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in prompts]
    fitting = [each for each in ids if 0 < len(each) <= speaker.length // 2]
    if not fitting:
        raise CalibrationError(
            f"domain '{name}': no prompt has {speaker.length // 2} tokens or less, so none leaves room for an answer "
            f"in a block of {speaker.length}; raise calibration.sequence_length, or give other prompts."
        )
    return fitting


def _batch(
    speaker: Speaker, numbers: range, asked: list[list[int]] | None, name: str, tell: Callable[[int], None]
) -> dict[str, Tensor]:
    return _flat(_conversations(speaker, numbers, asked, name, tell))


def _conversations(
    speaker: Speaker, numbers: range, asked: list[list[int]] | None, name: str, tell: Callable[[int], None]
) -> list[Conversation]:
    """Return the conversations of these numbers, which share the batch but no draw."""
    seeds = {number: f"{speaker.seed}:{name}:{number}" for number in numbers}
    if asked is None:
        turns = _turns(speaker, [f"{seed}:turn" for seed in seeds.values()])
        texts = {number: text for number, text in zip(numbers, turns, strict=True) if text}
        prompts = {number: _prompt(text, speaker) for number, text in texts.items()}
    else:
        prompts = {number: asked[number % len(asked)] for number in numbers}
    prompts = {number: ids for number, ids in prompts.items() if 0 < len(ids) <= speaker.length // 2}
    if not prompts:
        return []
    ends, most = speaker.ends, speaker.length // 2
    drawn = _continued(
        speaker,
        list(prompts.values()),
        [seeds[number] for number in prompts],
        lambda ids: ids[-1] in ends or len(ids) >= most,
        tell,
    )
    pairs = zip(prompts.values(), drawn, strict=True)
    return [Conversation(torch.tensor([*prompt, *answer]), len(prompt)) for prompt, answer in pairs]


def _turns(speaker: Speaker, seeds: list[str]) -> list[str]:
    """Return turns that the model writes as the user, "" for one that does not end or says nothing.

    Source: Xu et al. 2024, Magpie, arXiv 2406.08464, section 2.1; here at temperature 1.
    """
    tokenizer = speaker.tokenizer
    opening, closing = user_turn(tokenizer)
    # A space behind the opening belongs to the first word, which is one token with it.
    opening_ids: list[int] = tokenizer(opening.rstrip(" "), add_special_tokens=False, verbose=False)["input_ids"]
    added, own = _first_added(closing, tokenizer), tokenizer.eos_token_id
    ends = {each for each in (added, own) if each is not None}
    mark = (closing.split() or [closing])[0] if added is None else ""

    def ended(ids: list[int]) -> bool:
        return ids[-1] in ends or (bool(mark) and mark in tokenizer.decode(ids[-2 * len(mark) :]))

    if not opening_ids:
        opening_ids = [own if isinstance(own, int) else 0]
    drawn = _continued(
        speaker, [opening_ids] * len(seeds), seeds, lambda ids: ended(ids) or len(ids) >= TURN_TOKENS, lambda _: None
    )
    texts: list[str] = []
    for ids in drawn:
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        texts.append((text.split(mark)[0] if mark else text).strip() if ended(ids) else "")
    return texts


def _prompt(text: str, speaker: Speaker) -> list[int]:
    chat = [{"role": "user", "content": text}]
    written = chat_text(chat, speaker.tokenizer, "a user's turn that the model wrote", answered=True)
    return speaker.tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"]


def _first_added(text: str, tokenizer: Tokenizer) -> int | None:
    """Return the first token of the text if it was added to the vocabulary, as marks of turns are."""
    ids = tokenizer(text.lstrip(), add_special_tokens=False, verbose=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


@torch.inference_mode()
def _continued(
    speaker: Speaker,
    prompts: list[list[int]],
    seeds: list[str] | None,
    is_over: Callable[[list[int]], bool],
    tell: Callable[[int], None],
) -> list[list[int]]:
    """Return what the model writes behind each prompt, until `is_over`.

    With `seeds` it draws at temperature 1; without, each token is its first choice.

    Prompts are padded on their left, behind a mask; each row has draws of its own, so a row depends
    on the others by rounding alone. Rows that are over leave the batch.
    """
    model, head = speaker.model, head_of(speaker.model, speaker.arch)
    backbone = model.get_submodule(speaker.arch.backbone)
    takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters
    draws = None if seeds is None else [Random(seed) for seed in seeds]
    drawn = [list[int]() for _ in prompts]
    width = max(map(len, prompts))
    fed_BT = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    rows, cache = list(range(len(prompts))), dict[str, Any]()
    with eval_mode(model):
        while True:
            # Positions count from each prompt's own first token.
            positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)[:, -fed_BT.shape[1] :]
            where = {"position_ids": positions_BT} if takes_positions else {}
            output = backbone(fed_BT, attention_mask=mask_BT, use_cache=True, **where, **cache)
            name = next(each for each in CACHE_NAMES if each in output)
            logits_BV = head(output.last_hidden_state[:, -1])[:, : len(speaker.tokenizer)]
            numbers = None if draws is None else torch.tensor([draws[row].random() for row in rows])
            next_B = _first(logits_BV) if numbers is None else _draw(logits_BV, numbers)
            for row, token in zip(rows, next_B.tolist(), strict=True):
                if not (drawn[row] and is_over(drawn[row])):
                    drawn[row].append(token)
            open_rows = [place for place, row in enumerate(rows) if not is_over(drawn[row])]
            tell(len(open_rows))
            if not open_rows:
                return drawn

            # Drop what is finished, then append what was drawn.
            if len(rows) - len(open_rows) >= FINISHED_SHARE * len(rows):
                stay_B = torch.tensor(open_rows, device=model.device)
                output[name].batch_select_indices(stay_B)
                mask_BT, next_B, rows = mask_BT[stay_B], next_B[stay_B], [rows[place] for place in open_rows]
            fed_BT, cache = next_B[:, None], {name: output[name]}
            mask_BT = torch.cat([mask_BT, torch.ones_like(fed_BT)], dim=1)


def _draw(logits_BV: Float[Tensor, "B V"], uniform_B: Float[Tensor, " B"]) -> Int64[Tensor, " B"]:
    """Return the token at which the summed probabilities pass each row's number between 0 and 1."""
    sums_BV = logits_BV.float().softmax(dim=-1).cumsum(dim=-1)
    if not bool(torch.isfinite(sums_BV[:, -1]).all()):
        raise NumericsError(NOT_FINITE)
    # The last sum is 1 up to rounding.
    aims_B = uniform_B.to(sums_BV) * sums_BV[:, -1]
    found_B = torch.searchsorted(sums_BV, aims_B[:, None], right=True)[:, 0]
    return found_B.clamp_max(sums_BV.shape[1] - 1)


def _first(logits_BV: Float[Tensor, "B V"]) -> Int64[Tensor, " B"]:
    """Return each row's token of the highest logit."""
    highest = logits_BV.max(dim=-1)
    if not bool(torch.isfinite(highest.values).all()):
        raise NumericsError(NOT_FINITE)
    return highest.indices


def packed(conversations: Sequence[Conversation], length: int, filler: int) -> Blocks:
    """Return blocks of whole conversations, as many as these fill.

    Each begins with the first that is left; the longest that fits comes next, until none does. A gap
    of more than `LARGEST_GAP` of a block takes a conversation whose answer is cut at the block's end; a
    smaller one, or one for which there is none, is filled with `filler`, which does not count. A block
    with a larger gap for which nothing is left is left out.
    """
    left = list(conversations)
    ids: list[Tensor] = []
    answers: list[Tensor] = []
    documents: list[Tensor] = []
    number = 0
    while left:
        block, gap = [left.pop(0)], 0
        while (gap := length - sum(len(each.ids_T) for each in block)) > 0:
            fitting = [place for place, each in enumerate(left) if len(each.ids_T) <= gap]
            if fitting:
                block.append(left.pop(max(fitting, key=lambda place: len(left[place].ids_T))))
                continue
            if not left and gap > LARGEST_GAP * length:
                return _stacked(ids, answers, documents, length)
            cut = next((place for place, each in enumerate(left) if each.num_prompt < gap), None)
            if cut is None or gap <= LARGEST_GAP * length:
                break
            block.append(left.pop(cut))
        fill = [torch.full((max(gap, 0),), filler)]
        ids.append(torch.cat([*(each.ids_T for each in block), *fill])[:length])
        answered = [torch.arange(len(each.ids_T)) >= each.num_prompt for each in block]
        answers.append(torch.cat([*answered, torch.zeros(max(gap, 0), dtype=torch.bool)])[:length])
        numbers = [torch.full_like(each.ids_T, number + place) for place, each in enumerate(block)]
        number += len(block)
        documents.append(torch.cat([*numbers, torch.full((max(gap, 0),), number - 1)])[:length])
    return _stacked(ids, answers, documents, length)


def _stacked(ids: list[Tensor], answers: list[Tensor], documents: list[Tensor], length: int) -> Blocks:
    empty = torch.zeros(0, length, dtype=torch.int64)
    if not ids:
        return Blocks(empty, empty, empty.bool())
    return Blocks(torch.stack(ids), torch.stack(documents), torch.stack(answers))


def _once(conversations: list[Conversation], *, by_prompt: bool) -> Iterator[Conversation]:
    """Yield the conversations without those that were had before: with `by_prompt` their prompts, else the whole."""
    seen: set[tuple[int, ...]] = set()
    for each in conversations:
        key = tuple(each.ids_T[: each.num_prompt if by_prompt else None].tolist())
        if key not in seen:
            seen.add(key)
            yield each


@dataclass(slots=True)
class _Counter:
    """Moves a progress by the tokens written. `done`: before this batch."""

    progress: Progress
    stage: str
    done: int
    total: int

    def __call__(self, num_tokens: int) -> None:
        self.done += num_tokens
        self.progress(self.stage, min(self.done, self.total - 1), self.total)


def _flat(conversations: list[Conversation]) -> dict[str, Tensor]:
    ids = torch.cat([torch.zeros(0, dtype=torch.int64), *(each.ids_T for each in conversations)])
    sizes = torch.tensor([[len(each.ids_T), each.num_prompt] for each in conversations], dtype=torch.int64)
    return {"ids": ids, "sizes": sizes.view(-1, 2)}


def _unflat(tensors: dict[str, Tensor]) -> list[Conversation]:
    lengths, prompts = tensors["sizes"].T.tolist() if len(tensors["sizes"]) else ([], [])
    parts = tensors["ids"].split(lengths)
    return [Conversation(ids_T.clone(), num) for ids_T, num in zip(parts, prompts, strict=True)]
