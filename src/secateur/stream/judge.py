"""What judges models: the one judge of `prune`, `evaluate` and `recover`.

In: text by domain; the dense model, then what was pruned from it. Out: the `Judgement` on each: on the
dense model's own answers, on text of other sources, and by domain on text like what a run learnt by.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from secateur.data.answers import Speaker
from secateur.data.blocks import Text, blocks_of
from secateur.data.other_text import other_documents, other_text
from secateur.data.retokenised import retokenised
from secateur.facts import Loss
from secateur.log import Progress, silent
from secateur.model.bind import Arch
from secateur.model.checkpoint import Tokenizer
from secateur.model.kept_tokens import Trim
from secateur.model.modules import CausalLM
from secateur.store import Store
from secateur.stream.losses import domain_losses, predicted_tokens
from secateur.stream.own_answers import ANSWER_TOKENS, AnswerSheet, OwnAnswers, ask, judge, judging_prompts

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

    def speaker(self, tokenizer: Tokenizer) -> Speaker:
        """Return the model as one that answers, which draws nothing."""
        model, arch = self.load()
        return Speaker(model=model, arch=arch, tokenizer=tokenizer, seed="", length=self.length)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a model lost, in nats per token of the dense tokenizer.

    `domains`: on text of the kinds that the run learnt by. `other`: on text of other sources.
    `answers`: on the dense model's own; None for that model, and where it was not asked.
    """

    domains: dict[str, Loss]
    other: Loss
    answers: OwnAnswers | None = None


class Judge:
    """Judges models by the same text and answers; ranks share the work, and all get the figures.

    `text`: by domain, in tokens of `tokenizer`, the pruned model's. `trim`: what took tokens from the
    dense one's. `config`: of a model, for the most tokens that it reads. `share`: of the documents and
    prompts that come with the package. The store keeps the figures.
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
    ) -> None:
        documents = _first(other_documents(), share, least=2)
        self.text: Mapping[str, Text] = {**text, OTHER: other_text(documents, tokenizer, config)}
        self.dense_text, self.tokenizer, self.dense_tokenizer = self.text, tokenizer, tokenizer
        self.num_tokens: dict[str, dict[int, int]] | None = None
        if trim is not None:
            self.dense_text = retokenised(self.text, trim.tokenizer, trim.dense_tokenizer)
            self.dense_tokenizer = trim.dense_tokenizer
            self.num_tokens = {name: predicted_tokens(blocks) for name, blocks in self.dense_text.items()}
        self._store, self._progress, self._share = store, progress, share
        self._sheet: AnswerSheet | None = None

    def dense(self, model: ToJudge, *, asks: bool = True) -> Judgement:
        """Judge the dense model, before any other. `asks`: it answers prompts, if it has a chat template.

        Raises NumericsError if a loss is not finite.
        """
        losses = self._losses(model, self.dense_text, None)
        if asks and self.dense_tokenizer.chat_template is not None:
            prompts = _first(judging_prompts(), self._share, least=1)
            plain = self._kept(
                f"answers of {model.which}",
                lambda: ask(model.speaker(self.dense_tokenizer), prompts, self._progress).plain(),
                model,
                {"prompts": prompts, "tokens": ANSWER_TOKENS},
            )
            self._sheet = AnswerSheet.of(prompts, plain)
        return Judgement(losses, losses.pop(OTHER))

    def pruned(self, model: ToJudge) -> Judgement:
        """Judge a model that was pruned from the dense one. Raises NumericsError if a loss is not finite."""
        losses = self._losses(model, self.text, self.num_tokens)
        answers, sheet = None, self._sheet
        if sheet is not None:
            plain = self._kept(
                f"own answers, {model.which}",
                lambda: asdict(judge(model.speaker(self.tokenizer), sheet, self.dense_tokenizer, self._progress)),
                model,
                {"sheet": sheet.plain()},
            )
            answers = OwnAnswers.of(plain)
        return Judgement(losses, losses.pop(OTHER), answers)

    def _losses(
        self, model: ToJudge, text: Mapping[str, Text], num_tokens: dict[str, dict[int, int]] | None
    ) -> dict[str, Loss]:
        stage = f"evaluate {model.which}"

        def measured() -> dict[str, Any]:
            losses = domain_losses(*model.load(), text, self._progress, stage, num_tokens)
            return {name: asdict(loss) for name, loss in losses.items()}

        depends_on = {"text": {name: digest_of(blocks) for name, blocks in text.items()}, "per": num_tokens}
        return {name: Loss(**loss) for name, loss in self._kept(stage, measured, model, depends_on).items()}

    def _kept(self, name: str, compute: Callable[[], Any], model: ToJudge, depends_on: Mapping[str, Any]) -> Any:
        """Return the value from the store, or compute and keep it."""
        if model.depends_on is None:
            return self._store.value(name, compute)
        digest = hashlib.sha256(str(depends_on).encode()).hexdigest()
        return self._store.value(name, compute, depends_on={**model.depends_on, "judged by": digest})


def _first(texts: tuple[str, ...], share: float, *, least: int) -> tuple[str, ...]:
    return texts[: max(least, int(share * len(texts)))]


def digest_of(text: Text) -> str:
    """Return the sha256 of a text's blocks: ids, documents and masks."""
    digest = hashlib.sha256()
    for block in blocks_of(text):
        for part in block:
            digest.update(b"" if part is None else f"{len(part)} ".encode() + part.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
