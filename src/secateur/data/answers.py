"""What the dense model answers, as calibration text: whole conversations, whose answers alone
count.

In: a model and prompts as its chat template writes them. Out: conversations, and blocks of them
with a mask. A prompt gives context and counts for nothing.

B conversations at a time, T tokens of a block, N blocks, V tokens of the vocabulary.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from random import Random
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicLayer

from secateur.data.blocks import Blocks, JudgedText, LearningText, ids_of
from secateur.data.forms import chat_text, closing_of_turn
from secateur.errors import CalibrationError, NumericsError
from secateur.facts import Size
from secateur.log import Progress, silent
from secateur.model.bind import CACHE_NAMES, Arch, head_of, kv_cache_bytes_per_token
from secateur.model.stock import CausalLM, Tokenizer, eval_mode

# Conversations written together. A step reads all weights, whatever its rows; on a CPU more than so
# many rows gain little, since each computes for itself.
CPU_ROWS, DEVICE_ROWS, LEAST_ROWS = 64, 256, 4
# What their keys and values may take, or a quarter of the weights if that is more.
CACHE_BYTES = 1_000_000_000
# Rows leave the batch together once this share of it is finished: each time the cache is copied.
FINISHED_SHARE = 1 / 8
# Tokens that a layer's keys and values have room for, before they are copied to a larger place.
ROOM = 64
# At 1 a small model drifts, and greedily it says too little that is different: LOG, 2026-11-30.
TEMPERATURE = 0.7
# Of so many conversations at least this share differs from those before, or there are too few
# prompts.
PATIENCE, LEAST_FRESH = 100, 1 / 20
# What a step costs beside its rows, in tokens, as measured on a processor: so progress is even.
STEP_TOKENS = 32
# A gap at a block's end is filled with a part of a conversation if it is longer than this share of
# it.
LARGEST_GAP = 1 / 8

Steps = Callable[[Sequence[tuple[str, Callable[[], dict[str, Tensor]]]]], list[dict[str, Tensor]]]
"""Named steps of work to what each gives: shared out over ranks, or kept by an earlier run."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """`ids_T`: the tokens that the model read and wrote; of these `num_prompt` are the prompt."""

    ids_T: Int64[Tensor, " T"]
    num_prompt: int

    @property
    def is_answer_T(self) -> Bool[Tensor, " T"]:
        """Which tokens the model wrote."""
        return torch.arange(len(self.ids_T)) >= self.num_prompt

    @property
    def answer_T(self) -> Int64[Tensor, " A"]:
        """What the model wrote."""
        return self.ids_T[self.num_prompt :]


# Gives a conversation in another tokenizer's tokens.
Told = Callable[[Conversation], Conversation]
# What guards a run, and judges it too; and what it learns by.
Part = Literal["held-out", "learning"]
# The conversations of a domain's part so far.
Written = dict[tuple[str, Part], list[Conversation]]


class Request(NamedTuple):
    """A conversation that is to be written: its number in a domain's part, and the ids of its
    prompt.
    """

    domain: str
    part: Part
    number: int
    prompt: list[int]


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
        """Return how many conversations are written at a time; it depends on the model alone.

        Raises CalibrationError for a model without a cache of keys and values.
        """
        per_row = self.length * kv_cache_bytes_per_token(self.model)
        if not per_row:
            raise CalibrationError(
                "answers: the model keeps no keys and values while it writes; leave them out."
            )
        weights = Size.of(self.model).num_bytes
        most = CPU_ROWS if self.model.device.type == "cpu" else DEVICE_ROWS
        return max(LEAST_ROWS, min(most, max(CACHE_BYTES, weights // 4) // per_row))

    @property
    def ends(self) -> frozenset[int]:
        """Return the tokens that end an answer: the model's, the tokenizer's and the template's."""
        own = getattr(self.model.generation_config, "eos_token_id", None)
        own = own if isinstance(own, list | tuple) else [own]
        closing = _first_added(closing_of_turn(self.tokenizer), self.tokenizer)
        return frozenset(
            token
            for token in (*own, self.tokenizer.eos_token_id, closing)
            if isinstance(token, int)
        )


@dataclass(frozen=True, slots=True)
class Answers:
    """What a speaker answers, written as far as it is asked for.

    `prompts`: by domain, as the chat template writes them up to the answer; where they are too few,
    each is answered more than once. What guards and what is learnt by have prompts of their own,
    the first a tenth of them. `written`: by domain and part.
    """

    speaker: Speaker
    prompts: Mapping[str, Sequence[str]]
    do: Steps
    progress: Progress = silent
    written: Written = field(default_factory=Written)

    def blocks(
        self, domain: str, num_blocks: Mapping[Part, int], told: Told | None = None
    ) -> dict[Part, Blocks]:
        """Return so many blocks of each part, of its first conversations.

        `told`: what gives a conversation in another tokenizer's tokens. Raises CalibrationError for
        too few prompts or answers, or if no prompt leaves room for one; NumericsError if a logit is
        not finite.
        """
        prompts: dict[Part, list[list[int]]] = {
            part: self._asked(domain, part) for part in num_blocks
        }
        # Batches whose longest answers are cut, of which the last one fills what is missing.
        stage, length = f"answers, {domain}", self.speaker.length
        num_batches = 1 + -(-2 * sum(num_blocks.values()) // self.speaker.rows)
        total = sum(num_blocks.values()) * length + num_batches * STEP_TOKENS * (length // 2)

        def num_written() -> int:
            return sum(_num_tokens(self._so_far(domain, part)) for part in num_blocks)

        tell = _Counter(self.progress, stage, total, num_written())
        while True:
            blocks: dict[Part, Blocks] = {
                part: self._filled(domain, part, number, told)
                for part, number in num_blocks.items()
            }
            missing: dict[Part, int] = {
                part: number - len(blocks[part]) for part, number in num_blocks.items()
            }
            if not any(missing.values()):
                self.progress(stage, total, total)
                return blocks
            tell.done = max(tell.done, num_written())
            self._write(
                [
                    request
                    for part, number in missing.items()
                    if number
                    for request in self._wanted(domain, part, number, prompts[part])
                ],
                tell,
            )

    def _filled(self, domain: str, part: Part, num_blocks: int, told: Told | None) -> Blocks:
        """Return the part's blocks, fewer where what is written does not fill them."""
        own = _once(self._so_far(domain, part))
        end = self.speaker.tokenizer.eos_token_id
        filler = Conversation(torch.tensor([end if isinstance(end, int) else 0]), num_prompt=0)
        if told is not None:
            own, filler = [*map(told, own)], told(filler)
        return _filled(own, num_blocks, self.speaker.length, int(filler.ids_T[-1]))

    def _so_far(self, domain: str, part: Part) -> list[Conversation]:
        return self.written.setdefault((domain, part), [])

    def _asked(self, domain: str, part: Part) -> list[list[int]]:
        """Return the ids of the part's prompts that leave at least half of a block for the
        answer.
        """
        given = self.prompts[domain]
        if len(given) < 2:
            raise CalibrationError(
                f"domain '{domain}': too few prompts (got {len(given)}), since what guards the run "
                "has prompts of its own; give 2 or more."
            )
        tenth = -(-len(given) // 10)
        own = given[:tenth] if part == "held-out" else given[tenth:]
        tokenizer, most = self.speaker.tokenizer, self.speaker.length // 2
        ids = [ids_of(text, tokenizer) for text in own]
        fitting = [prompt for prompt in ids if 0 < len(prompt) <= most]
        if not fitting:
            raise CalibrationError(
                f"domain '{domain}': no prompt has {most} tokens or less, so none leaves room for "
                f"an answer in a block of {self.speaker.length}; raise "
                "calibration.sequence_length, or give other prompts."
            )
        return fitting

    def _write(self, requests: list[Request], tell: Callable[[int], None]) -> None:
        """Write these conversations in batches of like size; the ranks share them."""
        num_batches = -(-len(requests) // self.speaker.rows)
        places = [len(requests) * batch // num_batches for batch in range(num_batches + 1)]
        batches = [requests[start:end] for start, end in pairwise(places)]
        steps = [
            (
                f"answers-{batch[0].domain}-{batch[0].part}-{batch[0].number}"
                f"-{batch[-1].part}-{batch[-1].number}",
                partial(_batch, self.speaker, batch, tell),
            )
            for batch in batches
        ]
        for batch, tensors in zip(batches, self.do(steps), strict=True):
            for request, conversation in zip(batch, _unflat(tensors), strict=True):
                self._so_far(request.domain, request.part).append(conversation)

    def _wanted(
        self, domain: str, part: Part, missing: int, prompts: list[list[int]]
    ) -> list[Request]:
        """Return as many more conversations as should fill the missing blocks, by the mean of those
        that are written.

        At first that is taken to be half of a block, seldom less than it is, so that nothing is
        written for nothing. Later a block more than is missing is asked for, so that few batches
        are small. Tokens of conversations that fit into no block do not count: a batch takes as
        long for two rows as for many.
        """
        length, first = self.speaker.length, len(self._so_far(domain, part))
        fresh = _once(self._so_far(domain, part))
        if first >= PATIENCE and len(fresh) < LEAST_FRESH * first:
            raise CalibrationError(
                f"domain '{domain}': the model gives the same answers again and again; give more "
                "prompts, or lower calibration.num_tokens."
            )
        num_tokens = (missing + bool(first)) * length
        mean = (_num_tokens(fresh) + length / 2) / (first + 1)
        numbers = range(first, first + max(1, round(num_tokens / mean)))
        return [Request(domain, part, number, prompts[number % len(prompts)]) for number in numbers]


def _num_tokens(conversations: Sequence[Conversation]) -> int:
    return sum(len(conversation.ids_T) for conversation in conversations)


def with_answers(
    text: LearningText, judged: JudgedText, answers: Answers, told: Told | None = None
) -> tuple[LearningText, JudgedText]:
    """Return both texts with all blocks of answers, of which those that guard judge, too.

    `told`, errors: as for `Answers.blocks`.
    """
    domains, judging = list(text.domains), dict(judged.blocks)
    for index, domain in enumerate(domains):
        if not domain.blocks.is_meta:
            continue
        num_blocks: dict[Part, int] = {
            "held-out": len(domain.held_out),
            "learning": len(domain.blocks),
        }
        blocks = answers.blocks(domain.name, num_blocks, told)
        domains[index] = replace(domain, held_out=blocks["held-out"], blocks=blocks["learning"])
        judging[domain.name] = blocks["held-out"]
    return replace(text, domains=tuple(domains)), replace(judged, blocks=judging)


def _filled(written: list[Conversation], num_blocks: int, length: int, filler: int) -> Blocks:
    """Return so many blocks of the fewest conversations that fill them, in order; all that these
    fill if not so many.

    So the blocks do not depend on how many more were written in the last batch.
    """
    fitting = [conversation for conversation in written if conversation.num_prompt < length]
    num_tokens, least = 0, num_blocks * length * (1 - LARGEST_GAP)
    for count, conversation in enumerate(fitting, start=1):
        num_tokens += len(conversation.ids_T)
        if num_tokens >= least and len(packing(fitting[:count], length)) >= num_blocks:
            return packed(fitting[:count], length, filler)[:num_blocks]
    return packed(fitting, length, filler)[:num_blocks]


def greedy_answers(
    speaker: Speaker, prompts: Sequence[str], num_tokens: int, stage: str, progress: Progress
) -> list[Conversation]:
    """Return what the speaker answers to each prompt of a user, its first choice at every token.

    An answer ends by itself, or behind `num_tokens`. Raises NumericsError if a logit is not finite.
    """
    conversations, rows = list[Conversation](), speaker.rows
    all_ids = [_prompt(text, speaker) for text in prompts]
    batches = [all_ids[start : start + rows] for start in range(0, len(all_ids), rows)]
    total = sum(map(len, all_ids)) + num_tokens * (len(prompts) + STEP_TOKENS * len(batches))
    tell = _Counter(progress, stage, total)
    for prompt_ids in batches:
        conversations += _continued(speaker, prompt_ids, None, num_tokens, tell)
    progress(stage, total, total)
    return conversations


def _batch(
    speaker: Speaker, requests: list[Request], tell: Callable[[int], None]
) -> dict[str, Tensor]:
    """Return the conversations of these requests, which share the batch but no draw, for the
    store.
    """
    prompts = [request.prompt for request in requests]
    seeds = [
        f"{speaker.seed}:{request.domain}-{request.part}:{request.number}" for request in requests
    ]
    # An answer is cut at half of a block.
    written = _continued(speaker, prompts, seeds, speaker.length // 2, tell)
    sizes = [[len(conversation.ids_T), conversation.num_prompt] for conversation in written]
    return {
        "ids": torch.cat([conversation.ids_T for conversation in written]),
        "sizes": torch.tensor(sizes),
    }


def _prompt(text: str, speaker: Speaker) -> list[int]:
    written = chat_text(
        [{"role": "user", "content": text}], speaker.tokenizer, "a prompt", answered=True
    )
    return ids_of(written, speaker.tokenizer)


def _first_added(text: str, tokenizer: Tokenizer) -> int | None:
    """Return the first token of the text if it was added to the vocabulary, as marks of turns
    are.
    """
    ids = ids_of(text.lstrip(), tokenizer)
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


@torch.inference_mode()
def _continued(
    speaker: Speaker,
    prompts: list[list[int]],
    seeds: list[str] | None,
    most: int,
    tell: Callable[[int], None],
) -> list[Conversation]:
    """Return each prompt and what the model writes behind it, until it ends it or has written
    `most` tokens.

    With `seeds` it draws at `TEMPERATURE`; without, each token is its first choice.

    Prompts are padded on their left, behind a mask; each row has draws of its own, so a row depends
    on the others by rounding alone. Rows that are over leave the batch.
    """
    model, head, ends = speaker.model, head_of(speaker.model, speaker.arch), speaker.ends
    backbone = model.get_submodule(speaker.arch.backbone)
    takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters
    draws = None if seeds is None else [Random(seed) for seed in seeds]
    drawn = [list[int]() for _ in prompts]
    ids = [torch.tensor(prompt, device=model.device) for prompt in prompts]
    fed_BT = pad_sequence(ids, batch_first=True, padding_side="left")
    mask_BT = pad_sequence([*map(torch.ones_like, ids)], batch_first=True, padding_side="left")
    rows, cache, num_read = list(range(len(prompts))), dict[str, Any](), sum(map(len, prompts))

    def is_over(ids: list[int]) -> bool:
        return len(ids) >= most or (len(ids) > 0 and ids[-1] in ends)

    with eval_mode(model):
        while True:
            # Positions count from each prompt's own first token.
            positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)[:, -fed_BT.shape[1] :]
            where = {"position_ids": positions_BT} if takes_positions else {}
            output = backbone(fed_BT, attention_mask=mask_BT, use_cache=True, **where, **cache)
            name = next(key for key in CACHE_NAMES if key in output)
            logits_BV = head(output.last_hidden_state[:, -1])[:, : len(speaker.tokenizer)]
            highest_B, next_B = logits_BV.max(dim=-1)
            if not bool(highest_B.isfinite().all()):
                raise NumericsError(
                    "answers: the model gives no finite logits; use it in bfloat16 or float32 and "
                    "check its weights."
                )
            if draws is not None:
                uniform_B = torch.tensor([draws[row].random() for row in rows])
                next_B = _draw(logits_BV / TEMPERATURE, uniform_B)
            for row, token in zip(rows, next_B.tolist(), strict=True):
                if not is_over(drawn[row]):
                    drawn[row].append(token)
            open_rows = [place for place, row in enumerate(rows) if not is_over(drawn[row])]
            tell(num_read + STEP_TOKENS + len(open_rows))
            num_read = 0
            if not open_rows:
                return [
                    Conversation(torch.tensor([*prompt, *answer]), len(prompt))
                    for prompt, answer in zip(prompts, drawn, strict=True)
                ]

            # Drop what is finished, then append what was drawn.
            if len(rows) - len(open_rows) >= FINISHED_SHARE * len(rows):
                stay_B = torch.tensor(open_rows, device=model.device)
                output[name].batch_select_indices(stay_B)
                mask_BT, next_B = mask_BT[stay_B], next_B[stay_B]
                rows = [rows[place] for place in open_rows]
            fed_BT, cache = next_B[:, None], {name: _with_room(output[name])}
            mask_BT = torch.cat([mask_BT, torch.ones_like(fed_BT)], dim=1)


class _Roomy(DynamicLayer):
    """A layer's keys and values in buffers with room for `ROOM` tokens more: a step copies its own
    token alone.
    """

    keys: Any
    values: Any

    def __init__(self, keys: Any, values: Any) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._buffers: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write behind what is there, and return all keys and values."""
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if not self._buffers or end > self._buffers[0].shape[-2]:
            self._buffers = tuple(
                pad(states, (0, 0, 0, end + ROOM - start)) for states in (self.keys, self.values)
            )
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = states
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows alone."""
        super().batch_select_indices(indices)
        self._buffers = ()


def _with_room(cache: Any) -> Any:
    """Return the cache with room in each layer that would else be copied whole at every step."""
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[number] = _Roomy(layer.keys, layer.values)
    return cache


def _draw(logits_BV: Float[Tensor, "B V"], uniform_B: Float[Tensor, " B"]) -> Int64[Tensor, " B"]:
    """Return the token at which the summed probabilities pass each row's number between 0 and 1."""
    sums_BV = logits_BV.float().softmax(dim=-1).cumsum(dim=-1)
    # The last sum is 1 up to rounding.
    aims_B = uniform_B.to(sums_BV) * sums_BV[:, -1]
    found_B = torch.searchsorted(sums_BV, aims_B[:, None], right=True)[:, 0]
    return found_B.clamp_max(sums_BV.shape[1] - 1)


def packed(conversations: Sequence[Conversation], length: int, filler: int) -> Blocks:
    """Return the blocks of a `packing`. `filler` fills their gaps and does not count."""
    number, empty = 0, torch.zeros(0, length, dtype=torch.int64)
    rows = [empty], [empty], [empty.bool()]
    for places in packing(conversations, length):
        block = [conversations[place] for place in places]
        parts = [
            (each.ids_T, torch.full_like(each.ids_T, place), each.is_answer_T)
            for place, each in enumerate(block, start=number)
        ]
        number += len(block)
        # A gap is filled, and what is too long is cut.
        gap, fillers = length - _num_tokens(block), (filler, number - 1, False)
        for column, tensors, value in zip(rows, zip(*parts, strict=True), fillers, strict=True):
            column.append(pad(torch.cat(tensors), (0, gap), value=value))
    return Blocks(*map(torch.vstack, rows))


def packing(conversations: Sequence[Conversation], length: int) -> list[list[int]]:
    """Return the places of the conversations in each block, as many blocks as these fill.

    Each begins with the first that is left; the longest that fits comes next, until none does. A
    gap of more than `LARGEST_GAP` of a block takes a conversation whose answer is cut at the
    block's end; a smaller one, or one for which there is none, stays. A block with a larger gap for
    which nothing is left is left out.
    """
    sizes = [len(conversation.ids_T) for conversation in conversations]
    left = dict.fromkeys(range(len(sizes)))
    of_size: dict[int, dict[int, None]] = {}
    for place, size in enumerate(sizes):
        of_size.setdefault(size, {})[place] = None
    blocks = list[list[int]]()
    while left:
        block, gap, place = list[int](), length, next(iter(left))
        while place is not None:
            block.append(place)
            del left[place], of_size[sizes[place]][place]
            gap -= sizes[place]
            longest = next((size for size in range(gap, 0, -1) if of_size.get(size)), None)
            if longest is not None:
                place = next(iter(of_size[longest]))
            elif gap > LARGEST_GAP * length:
                place = next((each for each in left if conversations[each].num_prompt < gap), None)
            else:
                place = None
        if not left and gap > LARGEST_GAP * length:
            break
        blocks.append(block)
    return blocks


def _once(conversations: list[Conversation]) -> list[Conversation]:
    """Return the conversations without those that were had before."""
    first: dict[tuple[int, ...], Conversation] = {}
    for conversation in conversations:
        first.setdefault(tuple(conversation.ids_T.tolist()), conversation)
    return list(first.values())


@dataclass(slots=True)
class _Counter:
    """Moves a progress by the tokens read and written, and by `STEP_TOKENS` a step. `done`: so
    far.
    """

    progress: Progress
    stage: str
    total: int
    done: int = 0

    def __post_init__(self) -> None:
        self(0)

    def __call__(self, num_tokens: int) -> None:
        self.done += num_tokens
        self.progress(self.stage, min(self.done, self.total - 1), self.total)


def _unflat(tensors: dict[str, Tensor]) -> list[Conversation]:
    lengths, prompts = tensors["sizes"].T.tolist()
    parts = tensors["ids"].split(lengths)
    return [Conversation(ids_T.clone(), num) for ids_T, num in zip(parts, prompts, strict=True)]
