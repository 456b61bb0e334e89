"""Any model as a directory of safetensors: what other programs read, and what loads in a second."""

from pathlib import Path

from secateur.formats.save import save_checkpoint
from secateur.model.checkpoint import load_model, load_tokenizer, open_checkpoint


def write_dense(reference: str, place: Path) -> Path:
    """Write the model at `reference` to `place`, which may be an empty directory; return `place`."""
    checkpoint, staged = open_checkpoint(reference), place.with_name(f"{place.name}-unfinished")
    staged.mkdir(parents=True, exist_ok=True)
    parts = load_model(checkpoint), load_tokenizer(checkpoint)
    save_checkpoint(*parts, staged, carry_from=None)
    return staged.rename(place)
