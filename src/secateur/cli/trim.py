"""The command `trim`: a prune that takes tokens of the vocabulary and nothing else."""

from typing import Annotated, Any

import typer

import secateur.cli.common as common
from secateur.cli.prune import prune_and_tell
from secateur.recipe_file import parse_recipe


@common.app.command(
    epilog="Example: secateur trim Qwen/Qwen2.5-0.5B smaller --vocabulary 65536 --domain chat=chat.jsonl "
    "--keep-script latin,cyrillic"
)
def trim(
    model: common.Model,
    out: common.Out,
    vocabulary: Annotated[
        int, typer.Option(min=1, metavar="N", help="How many tokens stay, a multiple of 64; see secateur inspect.")
    ],
    domain: common.Domains = None,
    keep_text: common.KeepText = None,
    keep_script: common.KeepScript = None,
    seed: common.Seed = None,
    overwrite: common.Overwrite = False,
    force: common.Force = False,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Keep the N tokens of MODEL that its domains need most, and write the smaller checkpoint to OUT.

    Every text still reads back as it was, in more tokens. Held-out text judges what that costs, domain by domain.
    """
    remove = {"groups": [], "vocabulary": vocabulary, **common.kept(keep_text, keep_script)}
    data: dict[str, Any] = {"remove": remove}
    data |= {} if seed is None else {"seed": seed}
    data |= {"calibration": {"domains": common.parse_domains(domain)}} if domain else {}
    recipe = parse_recipe(data, "command line")
    prune_and_tell(model, out, recipe, resume=False, overwrite=overwrite, force=force, quiet=quiet, as_json=as_json)
