"""What judges models: the one judge of `prune`, `evaluate` and `recover`.

In: text by domain, prompts that no run learns by; the dense model, then what was pruned from it.
Out: the `Judgement` on each: on the dense model's own answers, on text of other sources, and by
domain on text like what a run learnt by. The dense model answers greedily, so each token of an
answer is also its first choice there: where the pruned model's first choice is the same token, both
would go on alike.

P prompts, A tokens of an answer, T tokens of a conversation, D hidden size.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.data.answers import Conversation, Speaker, greedy_answers
from secateur.data.blocks import Block, Text, other_text
from secateur.data.sources import shipped
from secateur.errors import NumericsError
from secateur.facts import ANSWER_TOKENS, AnswerPair, Judgement, Loss, OwnAnswers
from secateur.log import Progress, silent
from secateur.model.bind import Arch, bind, head_of
from secateur.model.stock import CausalLM, Tokenizer
from secateur.ranks import from_first
from secateur.store import Store
from secateur.stream.losses import HEAD_POSITIONS, domain_losses, head_inputs, predicted_tokens
from secateur.vocabulary.kept import Trim
from secateur.vocabulary.retokenised import in_tokens_of, retokenised

# A text that says the same four tokens again repeats itself.
REPEATED_TOKENS = 4
# Prompts whose two answers are shown side by side.
PAIRS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class AnswerSheet:
    """The dense model's answers, and its nats for each of them. `ids`: of a prompt and its
    answer.
    """

    prompts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    num_prompt: tuple[int, ...]
    nats: tuple[float, ...]

    @property
    def conversations(self) -> list[Conversation]:
        """Prompts and answers."""
        pairs = zip(self.ids, self.num_prompt, strict=True)
        return [Conversation(torch.tensor(ids), num_prompt) for ids, num_prompt in pairs]


def ask(speaker: Speaker, prompts: Sequence[str], progress: Progress) -> AnswerSheet:
    """Return what the dense model answers to the prompts, and its nats for that.

    All ranks call this, and the first one writes. Raises NumericsError if a logit is not finite.
    """
    conversations = from_first(
        lambda: greedy_answers(speaker, prompts, ANSWER_TOKENS, "ask the dense model", progress)
    )
    nats_P, _ = _nats(speaker, conversations, "dense on its answers", progress)
    return AnswerSheet(
        prompts=tuple(prompts),
        ids=tuple(tuple(each.ids_T.tolist()) for each in conversations),
        num_prompt=tuple(each.num_prompt for each in conversations),
        nats=tuple(nats_P.tolist()),
    )


def judge(
    speaker: Speaker,
    sheet: AnswerSheet,
    dense_tokenizer: Tokenizer,
    progress: Progress = silent,
    *,
    speaks: bool = True,
) -> OwnAnswers:
    """Return how the pruned model, `speaker`, stands to the dense one on the sheet's answers.

    With nats n_p and m_p of prompt p's answer by the pruned and by the dense model, and a_p tokens
    of it, nats lost are r = sum_p (n_p - m_p) / sum_p a_p. Their variance is that of a ratio, P /
    (P - 1) sum_p (n_p - m_p - r a_p)^2 / (sum_p a_p)^2.

    Unless it `speaks` it is not asked what it answers by itself, and counts as if it answered
    alike. `dense_tokenizer`: the sheet's, of which the speaker's may be a trim; nats are then of
    the same text in the trimmed tokens, per token of the dense tokenizer.

    Raises NumericsError if a logit is not finite.
    """
    # The same text in the pruned model's tokens.
    own = conversations = sheet.conversations
    if speaker.tokenizer is not dense_tokenizer:
        own = [*map(in_tokens_of(dense_tokenizer, speaker.tokenizer), own)]
    nats_P, same_first = _nats(speaker, own, "pruned on the dense model's answers", progress)

    # Per token of the dense tokenizer; the spread is that over prompts.
    tokens_P = torch.tensor([len(each.answer_T) for each in conversations], dtype=torch.float64)
    dense_P = torch.tensor(sheet.nats, dtype=torch.float64)
    lost_P = nats_P - dense_P
    lost = lost_P.sum() / tokens_P.sum()
    deviation = (lost_P - lost * tokens_P).square().sum().sqrt() / tokens_P.sum()
    num_prompts = len(sheet.prompts)

    # What the pruned model answers by itself.
    written, stage = conversations, "ask the pruned model"
    if speaks:
        written = from_first(
            lambda: greedy_answers(speaker, sheet.prompts, ANSWER_TOKENS, stage, progress)
        )
    pairs = list(zip(sheet.prompts, conversations, written, strict=True))[:PAIRS_SHOWN]
    return OwnAnswers(
        num_prompts=num_prompts,
        num_tokens=int(tokens_P.sum()),
        dense_nats=float(dense_P.sum() / tokens_P.sum()),
        nats=float(nats_P.sum() / tokens_P.sum()),
        standard_error=float(deviation) * math.sqrt(num_prompts / max(num_prompts - 1, 1)),
        same_first=same_first,
        ended=(_ended(conversations), _ended(written)),
        repeated=(_repeated(conversations), _repeated(written)),
        shown=tuple(
            AnswerPair(
                prompt=prompt,
                dense=_text(dense, dense_tokenizer),
                pruned=_text(pruned, speaker.tokenizer),
            )
            for prompt, dense, pruned in pairs
        ),
    )


def _nats(
    speaker: Speaker, conversations: Sequence[Conversation], stage: str, progress: Progress
) -> tuple[Float[Tensor, " P"], float]:
    """Return the nats of each answer, and the share of all their tokens that are the model's first
    choice.
    """
    model, arch, num_words = speaker.model, speaker.arch, len(speaker.tokenizer)
    head, nats, num_same, num_tokens = head_of(model, arch), list[float](), 0, 0
    text = [
        Block(conversation.ids_T, torch.zeros_like(conversation.ids_T))
        for conversation in conversations
    ]
    states = head_inputs(model, arch, text, progress, stage)
    for states_PD, each in zip(states, conversations, strict=True):
        # State t predicts token t + 1.
        losses_A, same_A = _losses(states_PD[each.num_prompt - 1 :], head, each.answer_T, num_words)
        # Some devices have no float64.
        nats.append(float(losses_A.cpu().double().sum()))
        num_same += int(same_A.sum())
        num_tokens += len(same_A)
    nats_P = torch.tensor(nats, dtype=torch.float64)
    if not bool(nats_P.isfinite().all()):
        raise NumericsError(f"{stage}: a loss is not finite; the model gives no finite logits.")
    return nats_P, num_same / num_tokens


@torch.inference_mode()
def _losses(
    states_AD: Tensor, head: nn.Module, answer_A: Int64[Tensor, " A"], num_words: int
) -> tuple[Tensor, Tensor]:
    """Return -log p of each token, and whether it is the first choice, a slice of logits at a time.

    `num_words`: of the tokenizer, in which an answer is written; a model may have rows beyond them.
    """
    device = next(head.parameters()).device
    losses, same = [], []
    for states_SD, ids_S in zip(
        states_AD.split(HEAD_POSITIONS), answer_A.split(HEAD_POSITIONS), strict=True
    ):
        logits_SV = head(states_SD.to(device)).float()
        ids_S = ids_S.to(device)
        losses.append(nn.functional.cross_entropy(logits_SV, ids_S, reduction="none"))
        same.append(logits_SV[:, :num_words].argmax(dim=-1) == ids_S)
    return torch.cat(losses), torch.cat(same)


def _ended(conversations: Sequence[Conversation]) -> float:
    """Return the share of answers that are shorter than they might be: these ended by
    themselves.
    """
    num_ended = sum(len(conversation.answer_T) < ANSWER_TOKENS for conversation in conversations)
    return num_ended / len(conversations)


def _repeated(conversations: Sequence[Conversation]) -> float:
    """Return the share of the answers' runs of `REPEATED_TOKENS` tokens that the answer had
    before.
    """
    num_runs = num_repeated = 0
    for conversation in conversations:
        ids = conversation.answer_T.tolist()
        runs = [
            tuple(ids[start : start + REPEATED_TOKENS])
            for start in range(len(ids) - REPEATED_TOKENS + 1)
        ]
        num_runs += len(runs)
        num_repeated += len(runs) - len(set(runs))
    return num_repeated / max(num_runs, 1)


def _text(conversation: Conversation, tokenizer: Tokenizer) -> str:
    return str(tokenizer.decode(conversation.answer_T, skip_special_tokens=True)).strip()


# Among the texts by their names; no domain's name ends with a space.
OTHER = "other text "


@dataclass(frozen=True, slots=True)
class ToJudge:
    """A model to judge. `which`: its name in progress and store.

    `load`: returns it, and is called only if needed. `length`: the most tokens of a conversation.
    `depends_on`: what its figures depend on beside the text, in a store that outlives the run.
    """

    which: str
    load: Callable[[], tuple[CausalLM, Arch]]
    length: int
    depends_on: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, model: CausalLM, which: str, length: int) -> "ToJudge":
        """Return a model that is in memory."""
        return cls(which, lambda: (model, bind(model)), length)

    def speaker(self, tokenizer: Tokenizer) -> Speaker:
        """Return the model as one that answers, which draws nothing."""
        model, arch = self.load()
        return Speaker(model=model, arch=arch, tokenizer=tokenizer, seed="", length=self.length)


class Judge:
    """Judges models by the same text and answers; ranks share the work, and all get the figures.

    `text`: by domain, in tokens of `tokenizer`, the pruned model's. `trim`: what took tokens from
    the dense one's. `config`: of a model, for the most tokens that it reads. `share`: of the
    documents and prompts that come with the package. `prompts`: in place of these. The store keeps
    the figures.
    """

    def __init__(
        self,
        text: Mapping[str, Text],
        tokenizer: Tokenizer,
        config: Any,
        store: Store,
        progress: Progress = silent,
        trim: Trim | None = None,
        share: float = 1.0,
        prompts: tuple[str, ...] | None = None,
    ) -> None:
        documents = _first(shipped("other_text.yaml"), share, least=2)
        self.text: Mapping[str, Text] = {**text, OTHER: other_text(documents, tokenizer, config)}
        self.dense_text, self.tokenizer, self.dense_tokenizer = self.text, tokenizer, tokenizer
        self.num_tokens: dict[str, dict[int, int]] | None = None
        if trim is not None:
            self.dense_text = retokenised(self.text, trim.tokenizer, trim.dense_tokenizer)
            self.dense_tokenizer = trim.dense_tokenizer
            self.num_tokens = predicted_tokens(self.dense_text)
        self._store, self._progress = store, progress
        self._prompts = prompts or _first(shipped("prompts.yaml"), share, least=1)
        self._sheet: AnswerSheet | None = None

    def dense(self, model: ToJudge, *, asks: bool) -> Judgement:
        """Judge the dense model, before any other. `asks`: it answers prompts, if it has a chat
        template.

        Raises NumericsError if a loss is not finite.
        """
        # First what may fail: a chat template of the user's own.
        if asks and self.dense_tokenizer.chat_template is not None:
            self._sheet = self._kept(
                f"answers of {model.which}",
                lambda: ask(model.speaker(self.dense_tokenizer), self._prompts, self._progress),
                model,
                {"prompts": self._prompts, "tokens": ANSWER_TOKENS},
                kind=AnswerSheet,
            )
        losses = self._losses(model, self.dense_text, None)
        return Judgement(losses, losses.pop(OTHER))

    def pruned(self, model: ToJudge, *, speaks: bool = True) -> Judgement:
        """Judge a model that was pruned from the dense one, see `judge`. Raises NumericsError for
        NaN or infinity.
        """
        losses = self._losses(model, self.text, self.num_tokens)
        answers, sheet = None, self._sheet
        if sheet is not None:
            answers = self._kept(
                f"own answers, {model.which}",
                lambda: judge(
                    model.speaker(self.tokenizer),
                    sheet,
                    self.dense_tokenizer,
                    self._progress,
                    speaks=speaks,
                ),
                model,
                {"sheet": sheet},
                kind=OwnAnswers,
            )
        return Judgement(losses, losses.pop(OTHER), answers)

    def _losses(
        self, model: ToJudge, text: Mapping[str, Text], num_tokens: dict[str, dict[int, int]] | None
    ) -> dict[str, Loss]:
        stage = f"evaluate {model.which}"

        def measured() -> dict[str, Loss]:
            return domain_losses(*model.load(), text, self._progress, stage, num_tokens)

        depends_on = {
            "text": {name: digest_of(blocks) for name, blocks in text.items()},
            "per": num_tokens,
        }
        return self._kept(stage, measured, model, depends_on, kind=dict[str, Loss])

    def _kept(
        self,
        name: str,
        compute: Callable[[], Any],
        model: ToJudge,
        depends_on: Mapping[str, Any],
        kind: Any,
    ) -> Any:
        """Return the value from the store, or compute and keep it."""
        facts = model.depends_on
        if facts is not None:
            digest = hashlib.sha256(str(depends_on).encode()).hexdigest()
            facts = {**facts, "judged by": digest}
        return self._store.value(name, compute, kind=kind, depends_on=facts)


def _first(texts: tuple[str, ...], share: float, *, least: int) -> tuple[str, ...]:
    return texts[: max(least, int(share * len(texts)))]


def digest_of(text: Text) -> str:
    """Return the sha256 of a text's blocks: ids, documents and masks."""
    digest = hashlib.sha256()
    for block in text:
        for part in block:
            if part is not None:
                digest.update(f"{len(part)} ".encode() + part.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
