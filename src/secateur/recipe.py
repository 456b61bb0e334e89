"""The recipe: all that a run does, in groups of keys. It holds all defaults of the product.

What depends on the model is None here; `pruning.resolve` fills it in, and that copy is saved.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from secateur.errors import RecipeError
from secateur.files import is_size
from secateur.plugins import SCORE_GROUP, SOURCE_GROUP, default_domains, mixture, plugin_names
from secateur.recipe_errors import sentence_of

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """A frozen model that refuses unknown keys. Made by its name it raises RecipeError."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    if not TYPE_CHECKING:  # who checks types knows the fields

        def __init__(self, **data: Any) -> None:
            try:
                super().__init__(**data)
            except ValidationError as error:
                raise RecipeError(sentence_of(error, type(self))) from None

        __init__.__pydantic_base_init__ = True  # a recipe as a whole is validated without it


class Training(Strict):
    """End-to-end training, until the model predicts more like the dense one.

    learning_rate: the highest; a tenth of the steps leads up to it, a cosine down. None: 0.001
    times the root mean square of the layers' matrices in a polish, 0.0005 times in `recover`, and
    ten times as much for `lora`. batch_tokens: per optimizer step, over all processes.
    blocks_per_device: per forward pass. kl_share: the part of the loss that is KL to the dense
    model's predictions; the rest is cross-entropy. 0: no teacher. train: all weights but embedding
    and head (`layers`), all weights (`full`), or low-rank additions that are merged at the end
    (`lora`, needs secateur[recover]). lora_rank: of these. gradient_checkpointing: computes
    activations again in place of storing them. evaluations: number of
    held-out ones on the way, beside those before and after; the weights of the least loss stay.
    patience: stop after so many without a fall.
    """

    learning_rate: Positive | None = None
    batch_tokens: Count = 512
    blocks_per_device: Count = 2
    kl_share: Share = 0.5
    train: Literal["layers", "full", "lora"] = "layers"
    lora_rank: Count = 16
    gradient_checkpointing: bool = False
    evaluations: Annotated[int, Field(ge=0)] = 4
    patience: Count = 2


class PolishSettings(Training):
    """Training as the last step of a prune. `polish: false` is short for `{num_tokens: 0}`.

    num_tokens: of all domains together. None for as many as the calibration has, and for none
    unless `repair.compensate` is `least_squares` and more than tokens may go.
    """

    num_tokens: Annotated[int, Field(ge=0)] | None = None
    evaluations: Annotated[int, Field(ge=0)] = 0


class RecoverySettings(Training):
    """Training after pruning. num_tokens: of all domains together.

    held_out_blocks: per domain, to guard.
    """

    num_tokens: Count = 300_000
    held_out_blocks: Count = 8


InstalledDomain = Literal["web", "encyclopedia", "dialogue", "multilingual", "code", "mathematics", "science"]
WeightingName = Literal["tokens", "energy", "minimax"]
BudgetName = Literal["uniform", "curve"]
INSTALLED_DOMAINS: tuple[str, ...] = get_args(InstalledDomain)
VOCABULARY = "vocabulary"
# The built-in names of `scores.SCORES`, which imports torch. Packages add others, see `plugins`.
SCORE_NAMES = ("random", "magnitude", "wanda", "flap", "obs", "paper", "reap")
# A domain has exactly one of these keys, its source. Packages add others.
SOURCE_NAMES = ("installed", "files", "dataset")


class Domain(Strict):
    """A calibration domain: exactly one source, and its share of the tokens relative to others.

    A source is one of the first three keys, or the name of one that an installed package registers.
    installed: text in installed Python packages. files: local tables (.jsonl .json .csv .tsv
    .parquet), text and code (.txt .md .py ...), directories or patterns (data/**/*.md), relative to
    the working directory. dataset: a `datasets` hub id, with `config` and `split`. answers:
    what the dense model answers, before it is pruned, to the source's rows as prompts (a chat up to
    its first user's turn); without a source, to prompts that come with secateur. Answers alone count.
    config, revision, split: of a `dataset`. column: of the text in tables; a list of messages goes
    through the chat template, and without a column `text` so do the usual forms of chats
    (docs/data.md). share: of the tokens, relative to the other domains. protect: the share by which
    this domain's held-out loss may rise (0.05 for 5%), for budget `curve`.
    """

    model_config = ConfigDict(extra="allow")  # sources of packages; other keys are refused below

    installed: InstalledDomain | None = None
    files: tuple[str, ...] | None = None
    dataset: str | None = None
    answers: bool = False
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    column: str = "text"
    share: Positive = 1.0
    protect: Positive | None = None

    @field_validator("files", mode="before")
    @classmethod
    def _one_file_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        unknown = [key for key in data if key not in cls.model_fields] if isinstance(data, dict) else []
        unknown = [key for key in unknown if key not in plugin_names(SOURCE_GROUP)]
        wrong = [InitErrorDetails(type="extra_forbidden", loc=(str(key),), input=data[key]) for key in unknown]
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return data

    @model_validator(mode="after")
    def _exactly_one_source(self) -> "Domain":
        given = self._sources()
        if len(given) != 1 and not (self.answers and not given):
            names = ", ".join((*SOURCE_NAMES, *plugin_names(SOURCE_GROUP)))
            raise ValueError(f"needs exactly one of {names}; got {' and '.join(given) or 'none'}")
        return self

    @property
    def source(self) -> tuple[str, Any]:
        """Return the source's key and value; `answers` for the prompts that come with secateur."""
        return next(iter(self._sources().items()), ("answers", True))

    def _sources(self) -> dict[str, Any]:
        built_in = {name: getattr(self, name) for name in SOURCE_NAMES}
        others = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        return {name: value for name, value in built_in.items() if value} | others


class Calibration(Strict):
    """The text to measure on.

    num_tokens: of all domains, without the held-out tenth, which comes on top. None: 16 per
    channel, at least 51,200. sequence_length: tokens per block. None: 512, or the model's
    positions if fewer. answers: the share of the tokens, in calibration and polish, that are
    answers of the dense model: of the domains that have them, else of one named `answers`. None:
    half where the domains are the default ones and the model has a chat template, else as the
    domains say.
    """

    domains: dict[str, Domain] = Field(default_factory=default_domains, validate_default=True, min_length=1)
    num_tokens: Annotated[int, Field(gt=0)] | None = None
    sequence_length: Annotated[int, Field(ge=8)] | None = None
    answers: Share | None = None

    @field_validator("domains", mode="before")
    @classmethod
    def _a_mixture_has_a_name(cls, value: Any) -> Any:
        return mixture(value) if isinstance(value, str) else value


class Remove(Strict):
    """What to remove. `remove: 0.2` is short for `remove: {share: 0.2}`.

    share: of all parameters of the dense model, tied weights once; met within one aligned unit per
    layer. to: in its place, what may stay: parameters, as 0.4B, or the bytes of weights, as 8GB.
    context: tokens whose KV cache must fit in these bytes too. groups: the kinds of units to
    remove: `ffn`, `shared`, `experts` or `expert_ffn`, and `kv_heads` (with their query heads) or
    `query_heads` (one of every KV head). None: FFN channels (`ffn`), or `experts` if the model has
    some. depth: number of whole layers to remove first, those that
    change predictions least; part of `share`. None: as many as spare the widths the worst. layers:
    remove these and measure none; `depth` is their number. protected_layers: stay whole. Negative
    layer numbers count from the end. min_keep: the least share of a group that stays. align: widths
    are multiples of it. None: 256 if the dense ones are and 8 times 256 stays, which k-quants need;
    else 64, or 128 from 4096 channels on. vocabulary: the number of tokens that stay, a multiple of
    64, or `auto`: as many as make tokens and units cost the least together; what goes is part of
    `share`. Group `vocabulary` is short for `auto`. With `groups: []` tokens go alone. keep_text:
    files whose every token stays. keep_scripts: as [latin, cyrillic], scripts whose tokens stay.
    """

    share: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.2
    to: str | None = None
    context: Count | None = None
    groups: tuple[str, ...] | None = None
    depth: Annotated[int, Field(ge=0)] | None = None
    layers: tuple[int, ...] = ()
    protected_layers: tuple[int, ...] = ()
    min_keep: Annotated[float, Field(ge=0, lt=1)] = 0.0
    align: Count | None = None
    vocabulary: Count | Literal["auto"] | None = None
    keep_text: tuple[str, ...] = ()
    keep_scripts: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _the_group_is_the_key(cls, data: Any) -> Any:
        groups = data.get("groups") if isinstance(data, dict) else None
        if not isinstance(groups, list | tuple) or VOCABULARY not in groups:
            return data
        return {**data, "groups": [n for n in groups if n != VOCABULARY], VOCABULARY: data.get(VOCABULARY) or "auto"}

    @property
    def group_names(self) -> tuple[str, ...]:
        """`groups`, once a model has filled them."""
        assert self.groups is not None, "open the model first"
        return self.groups

    @model_validator(mode="after")
    def _one_size_and_something_goes(self) -> "Remove":
        if self.to is not None and "share" in self.model_fields_set:
            raise ValueError("share and to each say how much goes; give one of them")
        if self.context is not None and (self.to is None or not is_size(self.to)):
            raise ValueError("context is the cache that must fit beside the weights; give their bytes too: to: 8GB")
        if self.vocabulary is None and self.groups == ():
            raise ValueError("groups is empty and vocabulary is not given, so nothing would go; name a group")
        if self.vocabulary is None and (self.keep_text or self.keep_scripts):
            raise ValueError("keep_text and keep_scripts say which tokens stay; give vocabulary: auto or a number too")
        return self


class Choose(Strict):
    """How to choose the units to remove. Higher score = keep.

    score: which units of a layer stay. obs_batch: reader columns that score `obs` removes between
    two updates. None: a 48th of the reader's columns, at least 32. budget: how many units each
    layer keeps. `uniform`: the same share of every group; `curve`: least predicted KL, from
    measured error curves and slopes. probe_blocks: blocks per domain on which budget `curve`
    measures KL. domain_weighting: how domains count in a statistic. `energy`: divided by their
    output energy, times their share; `tokens`: as they are; `minimax`: so that the worst domain's
    error falls. rounds: equal steps to the share; each measures and plans anew.
    """

    score: str = "obs"
    obs_batch: Count | None = None
    budget: BudgetName = "uniform"
    probe_blocks: Count = 1
    domain_weighting: WeightingName = "energy"
    rounds: Count = 1

    @field_validator("score", mode="before")
    @classmethod
    def _known_score(cls, value: Any) -> Any:
        names = SCORE_NAMES if value in SCORE_NAMES else (*SCORE_NAMES, *plugin_names(SCORE_GROUP))
        if value in names:
            return value
        raise PydanticCustomError("literal_error", "unknown score", {"expected": ", ".join(names)})


class Repair(Strict):
    """How to repair what stays.

    compensate: what refits the weights that read the units; `bias` is FLAP's, where the family can
    store one. damping: each channel's ridge, relative to its own entry on the Gram matrix's
    diagonal. With fewer than 10 tokens per channel it is at least 0.001 times what is missing to
    10. damping_factors: each group tries the damping times each of these, and takes the best on
    held-out text. target_mix: the part of the drift (dense minus pruned stream) that an MLP's
    reader corrects. None: 0.5 where the family adds an MLP's output as it is.
    """

    compensate: Literal["none", "bias", "least_squares"] = "least_squares"
    damping: Positive = 1e-3
    damping_factors: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)
    target_mix: Share | None = None


class Machine(Strict):
    """Where a run computes, and in how much memory.

    device: `cpu`, `cuda`, `cuda:1`, `mps`, ... None: a GPU if torch finds one. device_budget: such
    as 20GB; layers are onloaded one at a time if they do not all fit. None: most of what is free.
    memory_budget: such as 6GB, beyond interpreter and page cache; weights that do not fit stay on
    disk. compute_dtype: `float32` computes so one layer at a time, and stores the weights as they
    were. None: `stored`, and `float32` on CPUs that multiply bfloat16 in software.
    """

    device: str | None = None
    device_budget: str | None = None
    memory_budget: str | None = None
    compute_dtype: Literal["stored", "float32"] | None = None


class Output(Strict):
    """What to measure and write.

    evaluate: held-out loss before and after, on 1,024 tokens of each domain or as many as it says,
    on 23 documents of other sources, and on a chat model's own answers to 48 prompts, of both a share
    as large as of 1,024 tokens; standard errors tell how far to trust all. keep_rounds: also a checkpoint after each
    round but the last, before the polish. max_shard_size: of the written safetensors files.
    """

    evaluate: bool | Count = True
    keep_rounds: bool = False
    max_shard_size: str = "5GB"


class Recipe(Strict):
    """One run: what to remove, how to choose, how to repair, the text, the machine, the output.

    seed: of the calibration draw. polish: training as the last step, with its defaults if it is
    `default`, none if it is false. recover: training after pruning.
    """

    seed: Annotated[int, Field(ge=0)] = 0
    remove: Remove = Remove()
    choose: Choose = Choose()
    repair: Repair = Repair()
    calibration: Calibration = Calibration()
    machine: Machine = Machine()
    output: Output = Output()
    polish: PolishSettings = PolishSettings()
    recover: RecoverySettings | None = None

    def filled(self, **groups: dict[str, Any]) -> "Recipe":
        """Return the recipe with other values in groups: `filled(remove={"align": 64})`."""
        update = {name: getattr(self, name).model_copy(update=values) for name, values in groups.items()}
        return self.model_copy(update=update)

    @field_validator("polish", mode="before")
    @classmethod
    def _a_word_is_short(cls, value: Any) -> Any:
        if isinstance(value, dict | PolishSettings):
            return value
        if value not in ("default", False):
            raise ValueError("must be default, false or a mapping of its keys")
        return {} if value else {"num_tokens": 0}

    @field_validator("remove", mode="before")
    @classmethod
    def _a_number_is_the_share(cls, value: Any) -> Any:
        return value if isinstance(value, dict | Remove) else {"share": value}
