"""Specs against real modules: sizes, parameter counts, and the errors that name the nearest known thing."""

import pytest

from secateur.errors import ArchError
from secateur.model.bind import bind
from tests.families import tiny_family
from tests.models import tiny_gemma3, tiny_llama


def test_groups_that_cut_the_same_reader_exclude_each_other() -> None:
    with pytest.raises(ArchError, match=r"kv_heads and query_heads cut the same self_attn\.o_proj"):
        bind(tiny_llama()).select(("kv_heads", "ffn", "query_heads"))


def test_a_switch_of_the_config_says_whether_an_mlp_adds_directly() -> None:
    """Granite scales what is added; OPT norms it if its config says so."""
    assert bind(tiny_family("opt")).mlp_adds_directly and not bind(tiny_family("opt-post-norm")).mlp_adds_directly
    assert bind(tiny_llama()).mlp_adds_directly and not bind(tiny_gemma3()).mlp_adds_directly
