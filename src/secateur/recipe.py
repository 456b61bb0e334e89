"""The recipe: all that a run does, in groups of keys, from a YAML file or a mapping. It holds all
defaults.

What depends on the model is None here; `pruning.resolve` fills it in, and that copy is saved.
"""

from collections.abc import Collection
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from secateur.errors import RecipeError, advice, one_line, one_of, shown, web_address
from secateur.files import without_places, yaml_of
from secateur.plugins import default_domains, mixture, score_names

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # as numpy, which a training seeds, takes them
Share = Annotated[float, Field(ge=0, le=1)]
# Keys of a recipe or of a part of it, as YAML and options give them: not checked yet.
Keys = dict[str, Any]


class Strict(BaseModel):
    """A frozen model that refuses unknown keys. Made by its name it raises RecipeError."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    if not TYPE_CHECKING:  # who checks types knows the fields

        def __init__(self, **data: Any) -> None:
            try:
                super().__init__(**data)
            except ValidationError as error:
                name = type(self).__name__
                wrong = sentence(error, type(self)).removeprefix(f"{name.lower()}: ")
                raise RecipeError(f"{name}: {wrong}") from None

        __init__.__pydantic_base_init__ = True  # a recipe as a whole is validated without it


class Training(Strict):
    """End-to-end training, until the model predicts more like the dense one."""

    learning_rate: Positive | None = None
    """the highest; a tenth of the steps leads up to it, a cosine down. None: 0.0005 times the root
    mean square of the layers' matrices, and ten times as much for `lora`.
    """
    batch_tokens: Count = 512
    """per optimizer step, over all processes."""
    blocks_per_device: Count = 2
    """per forward pass."""
    kl_share: Share = 0.5
    """the part of the loss that is KL to the dense model's predictions; the rest is cross-entropy.
    0: no teacher.
    """
    train: Literal["layers", "full", "lora"] = "layers"
    """all weights but embedding and head (`layers`), all weights (`full`), or low-rank additions
    that are merged at the end (`lora`, needs secateur[recover]).
    """
    gradient_checkpointing: bool = False
    """computes activations again in place of storing them."""

    def blocks_per_step(self, length: int) -> int:
        """Return how many blocks of `length` tokens make a step, at least one."""
        return max(1, self.batch_tokens // length)


class PolishSettings(Training):
    """Training as the last step of a prune. `polish: false` is short for `{num_tokens: 0}`."""

    num_tokens: Natural | None = None
    """of all domains together. None for as many as the calibration has, and for none unless
    `repair.compensate` is `least_squares` and more than tokens may go.
    """


class RecoverySettings(Training):
    """Training after pruning."""

    num_tokens: Count = 300_000
    """of all domains together."""
    held_out_blocks: Count = 8
    """per domain, to guard."""


InstalledDomain = Literal[
    "web", "encyclopedia", "dialogue", "multilingual", "code", "mathematics", "science"
]
WeightingName = Literal["tokens", "energy", "minimax"]
BudgetName = Literal["uniform", "curve"]
INSTALLED_DOMAINS: tuple[str, ...] = get_args(InstalledDomain)
# The built-in names of `scores.SCORES`, which imports torch. Packages add others, see `plugins`.
SCORE_NAMES = ("random", "magnitude", "wanda", "flap", "obs", "paper", "reap")
# Of the text of a run, where nothing else is said.
SHARE_OF_ANSWERS = 0.5
# A domain has exactly one of these keys, its source.
SOURCE_NAMES = ("installed", "files", "dataset")


class Domain(Strict):
    """A calibration domain: exactly one source, and its share of the tokens relative to others.

    A source is one of the first three keys.
    """

    installed: InstalledDomain | None = None
    """text in installed Python packages."""
    files: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    """local tables (.jsonl .json .csv .tsv .parquet), text and code (.txt .md .py ...), directories
    or patterns (data/**/*.md), relative to the working directory.
    """
    dataset: str | None = None
    """a `datasets` hub id, with `config` and `split`."""
    answers: bool = False
    """what the dense model answers, before it is pruned, to the source's rows as prompts (a chat up
    to its first user's turn); without a source, to prompts that come with secateur. Answers
    alone count.
    """
    config: str | None = None
    """of a `dataset`."""
    revision: str | None = None
    """of a `dataset`."""
    split: str = "train"
    """of a `dataset`."""
    column: str = "text"
    """of the text in tables; a list of messages goes through the chat template, and without a
    column `text` so do the usual forms of chats (docs/data.md).
    """
    share: Positive = 1.0
    """of the tokens, relative to the other domains."""
    protect: Positive | None = None
    """the share by which this domain's held-out loss may rise (0.05 for 5%), for budget `curve`."""

    @field_validator("files", mode="before")
    @classmethod
    def _one_file_is_a_list(cls, value: Any) -> Any:
        return [value] if value and isinstance(value, str) else value

    @model_validator(mode="after")
    def _exactly_one_source(self) -> "Domain":
        given = self._sources()
        if len(given) != 1 and not (self.answers and not given):
            names = ", ".join(SOURCE_NAMES)
            raise ValueError(f"needs exactly one of {names}; got {' and '.join(given) or 'none'}")
        return self

    @property
    def source(self) -> tuple[str, Any]:
        """Return the source's key and value; `answers` for the prompts that come with secateur."""
        return next(iter(self._sources().items()), ("answers", True))

    def _sources(self) -> Keys:
        return {name: value for name in SOURCE_NAMES if (value := getattr(self, name))}


class Calibration(Strict):
    """The text to measure on."""

    domains: dict[str, Domain] = Field(
        default_factory=default_domains, validate_default=True, min_length=1
    )
    num_tokens: Annotated[int, Field(gt=0)] | None = None
    """of all domains, without the held-out tenth, which comes on top. None: 16 per channel, at
    least 51,200.
    """
    sequence_length: Annotated[int, Field(ge=8)] | None = None
    """tokens per block. None: 256, or the model's positions if fewer."""
    answers: Share | None = None
    """the share of the tokens, in calibration and polish, that are answers of the dense model: of
    the domains that have them, else of one named `answers`. None: half where the domains are the
    default ones and the model has a chat template, else as the domains say.
    """

    @property
    def answered(self) -> dict[str, Domain]:
        """The domains of what the dense model answers."""
        return {name: domain for name, domain in self.domains.items() if domain.answers}

    @property
    def of_text(self) -> dict[str, Domain]:
        """The domains that are text as it is."""
        return {name: domain for name, domain in self.domains.items() if not domain.answers}

    @field_validator("domains", mode="before")
    @classmethod
    def _a_mixture_has_a_name(cls, value: Any) -> Any:
        if isinstance(value, dict) and any(
            str(name).strip() != name or not name.isprintable() for name in value
        ):
            raise ValueError("names must be printable text without blanks at their ends")
        return mixture(value) if isinstance(value, str) else value


class Remove(Strict):
    """What to remove. `remove: 0.2` is short for `remove: {share: 0.2}`."""

    share: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.2
    """of all parameters of the dense model, tied weights once; met within one aligned unit per
    layer.
    """
    to: str | None = None
    """in its place, what may stay: parameters, as 0.4B, or the bytes of weights, as 8GB."""
    groups: tuple[str, ...] | None = None
    """the kinds of units to remove: `ffn`, `shared`, `experts` or `expert_ffn`, and `kv_heads`
    (with their query heads) or `query_heads` (one of every KV head). None: `experts` if the model
    has some that can go, else FFN channels (`ffn`), or what stands for them (`expert_ffn`,
    `shared`).
    """
    depth: Natural | None = None
    """number of whole layers to remove first, those that change predictions least; part of `share`.
    None: as many as spare the widths the worst.
    """
    layers: tuple[int, ...] = ()
    """remove these and measure none; `depth` is their number."""
    protected_layers: tuple[int, ...] = ()
    """stay whole. Negative layer numbers count from the end."""
    align: Count | None = None
    """widths are multiples of it. None: 256 if the dense ones are and 8 times 256 stays, which
    k-quants need; else 64, or 128 from 4096 channels on.
    """
    vocabulary: Count | Literal["auto"] | None = None
    """the number of tokens that stay, a multiple of 64, or `auto`: as many as make tokens and units
    cost the least together; what goes is part of `share`. With `groups: []` tokens go alone.
    """
    keep_scripts: tuple[str, ...] = ()
    """as [latin, cyrillic], scripts whose tokens stay."""

    @property
    def group_names(self) -> tuple[str, ...]:
        """`groups`, once a model has filled them."""
        assert self.groups is not None, "open the model first"
        return self.groups

    @model_validator(mode="after")
    def _one_size_and_something_goes(self) -> "Remove":
        if self.to is not None and "share" in self.model_fields_set:
            raise ValueError("share and to each say how much goes; give one of them")
        if self.vocabulary is None and self.groups == ():
            raise ValueError(
                "groups is empty and vocabulary is not given, so nothing would go; name a group"
            )
        if self.vocabulary is None and self.keep_scripts:
            raise ValueError(
                "keep_scripts says which tokens stay; give vocabulary: auto or a number too"
            )
        return self


class Choose(Strict):
    """How to choose the units to remove. Higher score = keep."""

    score: str = "obs"
    """which units of a layer stay."""
    budget: BudgetName = "uniform"
    """how many units each layer keeps. `uniform`: the same share of every group; `curve`: least
    predicted KL, from measured error curves and slopes.
    """
    domain_weighting: WeightingName = "energy"
    """how domains count in a statistic. `energy`: divided by their output energy, times their
    share; `tokens`: as they are; `minimax`: so that the worst domain's error falls.
    """
    rounds: Count = 1
    """equal steps to the share; each measures and plans anew."""

    @field_validator("score", mode="before")
    @classmethod
    def _known_score(cls, value: Any) -> Any:
        names = SCORE_NAMES if value in SCORE_NAMES else (*SCORE_NAMES, *score_names())
        if value in names:
            return value
        raise PydanticCustomError("literal_error", "unknown score", {"expected": ", ".join(names)})


class Repair(Strict):
    """How to repair what stays."""

    compensate: Literal["none", "least_squares"] = "least_squares"
    """what refits the weights that read the units."""
    damping: Positive = 1e-3
    """each channel's ridge, relative to its own entry on the Gram matrix's diagonal. With fewer
    than 10 tokens per channel it is at least 0.001 times what is missing to 10.
    """
    target_mix: Share | None = None
    """the part of the drift (dense minus pruned stream) that an MLP's reader corrects. None: 0.5
    where the family adds an MLP's output as it is.
    """


class Machine(Strict):
    """Where a run computes, and in how much memory."""

    device: str | None = None
    """`cpu`, `cuda`, `cuda:1`, `mps`, ... None: a GPU if torch finds one."""
    device_budget: str | None = None
    """such as 20GB; layers are onloaded one at a time if they do not all fit. None: most of what is
    free.
    """
    memory_budget: str | None = None
    """such as 6GB, beyond interpreter and page cache; weights that do not fit stay on disk."""
    compute_dtype: Literal["stored", "float32"] | None = None
    """`float32` computes so, and stores the weights as they were. None: `stored`, and `float32` on
    CPUs that have no instructions for bfloat16.
    """


class Output(Strict):
    """What to measure and write."""

    evaluate: bool | Count = True
    """held-out loss before and after, on 1,024 tokens of each domain or as many as it says, on 23
    documents of other sources, and on a chat model's own answers to 48 prompts, of both a share
    as large as of 1,024 tokens; standard errors tell how far to trust all.
    """


class Recipe(Strict):
    """One run: what to remove, how to choose, how to repair, the text, the machine, the output."""

    seed: Seed = 0
    """of the calibration draw."""
    remove: Remove = Remove()
    choose: Choose = Choose()
    repair: Repair = Repair()
    calibration: Calibration = Calibration()
    machine: Machine = Machine()
    output: Output = Output()
    polish: PolishSettings = PolishSettings()
    """training as the last step, with its defaults if it is `default`, none if it is false."""
    recover: RecoverySettings | None = None
    """training after pruning."""

    def filled(self, **groups: Keys) -> "Recipe":
        """Return the recipe with other values in groups: `filled(remove={"align": 64})`."""
        update = {
            name: getattr(self, name).model_copy(update=values) for name, values in groups.items()
        }
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


def sentence(error: ValidationError, model: type[BaseModel]) -> str:
    """Return what is wrong with a recipe: the key, what it got, what is allowed, the nearest known
    name.
    """
    errors = error.errors()
    # A wrong list for a key that takes a name or a list is not a wrong name.
    first = next(
        (e for e in errors if e["type"] != "literal_error" or isinstance(e["input"], str)),
        errors[0],
    )
    location = [
        part for part in map(str, first["loc"]) if not part.startswith(("literal[", "tuple["))
    ]
    key = ".".join(location) or model.__name__.lower()
    kind, got = first["type"], first.get("input")
    if kind == "extra_forbidden" and key == "preset":
        return (
            "preset: belongs to a mapping; where a recipe is asked for, give "
            f"{{'preset': {got!r}, ...}}."
        )
    if kind == "extra_forbidden":
        fields = model.model_fields.items()
        parts = ((group, part) for group, field in fields for part in _groups_in(field.annotation))
        elsewhere = [f"{group}.{key}" for group, part in parts if key in part.model_fields]
        if elsewhere:
            return f"unknown key '{key}'; did you mean {' or '.join(elsewhere)}?"
        allowed = _allowed_keys(location[:-1], model)
        return f"unknown key '{key}'; {advice(location[-1], allowed, one_of(allowed))}"
    if kind == "literal_error":
        allowed = first.get("ctx", {}).get("expected", "")
        names = allowed.replace("'", "").replace(" or ", ", ").split(", ")
        return f"unknown {key} {shown(got)}; allowed: {', '.join(names)}; {advice(str(got), names)}"
    message = (
        "must be a list" if kind == "tuple_type" else first["msg"].removeprefix("Value error, ")
    )
    if location[:2] == ["remove", "vocabulary"]:  # a number or a name, so pydantic says two things
        key = "remove.vocabulary"
        message = "must be auto, or how many tokens stay, a multiple of 64"
    return f"{key}: {message}, got {shown(got)}."


def _groups_in(annotation: Any) -> list[type[BaseModel]]:
    kinds = (annotation, *get_args(annotation))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _allowed_keys(location: list[str], model: type[BaseModel]) -> list[str]:
    """Return the keys that may stand at a place of the recipe, or of its part."""
    for name in location:
        if name in model.model_fields:  # else it is the name of a domain
            model = _groups_in(model.model_fields[name].annotation)[0]
    top = ["preset"] if model.__name__ == "Recipe" else []
    return [*top, *model.model_fields]


RECIPE_FILE = "recipe.yaml"


def parse_recipe(data: Any, where: str = "recipe") -> Recipe:
    """Return the validated recipe. `where`: its source, for messages. `preset`: one of `presets/`.

    Raises RecipeError: the key, what it got, what is allowed, the nearest known name.
    """
    data = _mapping(data, where)
    if "preset" in data:
        data = over_preset(data, where)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{where}: {sentence(error, Recipe)}") from None


def _mapping(data: Any, where: str) -> Keys:
    if not isinstance(data, dict):
        raise RecipeError(
            f"{where}: a recipe is a mapping of keys to values, got {type(data).__name__}."
        )
    return data


# Keys of `remove`, and the key below that says the same otherwise.
REPLACES = {"to": "share", "share": "to", "layers": "depth"}
AnyRecipe = Recipe | Keys | Path | str | None


def as_recipe(recipe: AnyRecipe) -> Recipe:
    """Return a recipe from a Recipe, a mapping, a YAML file or None. Raises RecipeError."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Path | str):
        return parse_recipe(load_recipe(recipe), f"recipe {recipe}")
    return parse_recipe(recipe or {})


def recipe_in(directory: Path) -> Recipe | None:
    """Return the recipe that a run wrote into a model's directory; None if there is none."""
    path = directory / RECIPE_FILE
    return as_recipe(path) if path.is_file() else None


def over_preset(data: Keys, where: str) -> Keys:
    """Return `data` merged over the preset that it names. Raises RecipeError if unknown."""
    texts, own = preset_texts(), dict(data)
    name = own.pop("preset")
    if not isinstance(name, str) or name not in texts:
        hint = advice(str(name), texts)
        raise RecipeError(f"{where}: unknown preset '{name}'; allowed: {', '.join(texts)}; {hint}")
    return merged(yaml.safe_load(texts[name]), own)


def preset_texts() -> dict[str, str]:
    """Return the presets' YAML by name."""
    return {
        name: path.read_text(encoding="utf-8") for name, path in shipped_yaml("presets").items()
    }


def shipped_yaml(folder: str) -> dict[str, Path]:
    """Return the YAML files of a folder of the package, by name."""
    paths = sorted(Path(str(resources.files("secateur") / folder)).glob("*.yaml"))
    return {path.stem: path for path in paths}


def merged(base: Keys, changes: Keys) -> Keys:
    """Return `base` with `changes` merged in; `remove: 0.2` is `remove: {share: 0.2}`.

    Of `remove`, a size and a share replace each other, and layers their number.
    """
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        if key == "remove" and (isinstance(old, dict) or isinstance(value, dict)):
            old, value = (
                each if isinstance(each, dict) or each is None else {"share": each}
                for each in (old, value)
            )
            replaced = {REPLACES.get(name) for name in value or {}}
            old = {name: part for name, part in (old or {}).items() if name not in replaced}
        result[key] = (
            merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return result


def recipe_over(base: Keys, changes: Recipe, but: Collection[str] = ()) -> Recipe:
    """Return a run's recipe with the keys of `changes` that were given, `but` for these groups; its
    domains replace.
    """
    keys = changes.model_dump(mode="json", exclude_unset=True, exclude={*but})
    if "domains" in keys.get("calibration", {}):
        base.get("calibration", {}).pop("domains", None)
    return parse_recipe(merged(base, keys), "recipe")


def load_recipe(file: Path | str) -> Keys:
    """Read a recipe file as a plain mapping, so that options can override keys before validation.

    Raises RecipeError if the file is a web address, missing, not UTF-8 or not YAML.
    """
    where = f"recipe {file}"
    if web_address(str(file)):
        raise RecipeError(
            f"{where}: is a web address, and a recipe is a local file; download it, and give that."
        )
    try:
        data = yaml_of(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{where}: cannot be read ({one_line(error)}); give a YAML file in UTF-8."
        ) from None
    return {} if data is None else _mapping(data, where)


def write_recipe(directory: Path, recipe: Recipe) -> None:
    """Write a run's recipe into the directory of its result."""
    (directory / RECIPE_FILE).write_text(dump_recipe(recipe), encoding="utf-8")


def dump_recipe(recipe: Recipe, *, places: bool = True) -> str:
    """Return the recipe as YAML that `parse_recipe` reads back to an equal recipe.

    Without `places` paths of this machine are their last parts, as others may see them.
    """
    values = recipe.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(values if places else without_places(values), sort_keys=False)
