"""docs/families.md lists what the families' YAML files say; `python tests/test_docs_families.py` prints its table."""

from importlib import resources
from pathlib import Path

from secateur.model.bind import EXPERT_CHANNELS, EXPERTS
from secateur.model.spec import load_specs

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def table() -> str:
    rows = ["| family | `model_type` | models | groups |", "|---|---|---|---|"]
    for family, spec in load_specs().items():
        text = (resources.files("secateur.model.families") / f"{family}.yaml").read_text(encoding="utf-8")
        models = (
            text.splitlines()[0]
            .removeprefix("# ")
            .partition(". ")[0]
            .partition(" and every")[0]
            .partition(": ")[0]
            .removesuffix(".")
        )
        types = ", ".join(f"`{name}`" for name in spec.model_types)
        groups = sorted(spec.groups, key=lambda name: (name != "ffn", name)) + [EXPERTS] * bool(spec.experts)
        groups += [EXPERT_CHANNELS] * bool(spec.experts and spec.experts.channels.num_units)
        rows.append(f"| {family} | {types} | {models} | {', '.join(groups)} |")
    return "\n".join(rows)


def test_the_docs_list_the_families() -> None:
    assert table() in PAGE.read_text(encoding="utf-8")


def test_every_group_is_offered_or_left_out_with_a_reason() -> None:
    for family, spec in load_specs().items():
        for group in ("kv_heads", "query_heads"):
            assert (group in spec.groups) != (group in spec.omits), f"{family}: {group}"
        assert all(len(reason.split()) > 4 for reason in spec.omits.values())


if __name__ == "__main__":
    print(table())
