"""Structures that are odd or hostile: each is refused or cut right, never cut wrong."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ElectraConfig,
    ElectraForCausalLM,
    Gemma4TextConfig,
    GitConfig,
    GitForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

from secateur.errors import ArchError, RecipeError
from secateur.model.bind import bind, decoder_layers, head_of, places
from secateur.model.group import cut, linear
from secateur.model.guesses import Unrouted, silence, some_units
from secateur.model.modules import Logits
from secateur.model.per_layer import record_widths
from secateur.pruning.resolve import layers_to_expect
from secateur.recipe import parse_recipe
from tests.model.test_exactness import check_walk, logits_of
from tests.models import randomised, sizes, tiny_ids

SIZES = sizes(num_layers=2)


class Plain(nn.Module):
    """The ordinary FFN; others change one thing."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.width, hidden = config.intermediate_size, config.hidden_size
        self.gate_proj = nn.Linear(hidden, self.width, bias=False)
        self.up_proj = nn.Linear(hidden, self.width, bias=False)
        self.down_proj = nn.Linear(self.width, hidden, bias=False)

    def inner(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.inner(x))


def plain_but(change: Callable[[Any, Any], None] = lambda *_: None, **methods: Callable[..., Tensor]) -> type[Plain]:
    """Return an FFN of which `change` makes other parts, or with other methods."""

    class Odd(Plain):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            change(self, config)

    for name, method in methods.items():
        setattr(Odd, name, method)
    return Odd


def of_width(width: Callable[[int], int]) -> type[Plain]:
    """Return an FFN as wide as this function of the config's number says."""

    class Odd(Plain):
        def __init__(self, config: Any) -> None:
            super().__init__(LlamaConfig(**SIZES | {"intermediate_size": width(config.intermediate_size)}))

    return Odd


def fused(number: int) -> Callable[[Any, Any], None]:
    """Put so many parts into one linear; how its rows lie is left to others."""

    def change(ffn: Any, config: Any) -> None:
        ffn.all_proj = nn.Linear(config.hidden_size, number * ffn.width, bias=False)
        del ffn.gate_proj, ffn.up_proj

    return change


def three_parts(ffn: Any, x: Tensor) -> Tensor:
    a, b, c = ffn.all_proj(x).chunk(3, dim=-1)
    return a * b.sigmoid() * c.tanh()


def another_beside(ffn: Any, config: Any) -> None:
    ffn.other_up = nn.Linear(config.hidden_size, ffn.width, bias=False)
    ffn.other_down = nn.Linear(ffn.width, config.hidden_size, bias=False)


def model_with(ffn: type[nn.Module], change: Callable[[Any], None] = lambda _: None, **sizes: Any) -> Any:
    """Return a tiny Llama whose FFNs are of this class; `change` is applied to whatever it builds."""

    class Odd(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp = ffn(config)
            change(self)
            self.post_init()

    torch.manual_seed(0)
    return randomised(Odd(LlamaConfig(**SIZES | sizes)), 0)


def alternating(ffn: Any, x: Tensor) -> Tensor:
    both = ffn.all_proj(x).unflatten(-1, (-1, 2))
    return both[..., 0].sigmoid() * both[..., 1]


def halves(ffn: Any, x: Tensor) -> Tensor:
    up, gate = ffn.all_proj(x).chunk(2, dim=-1)
    return gate.sigmoid() * up


RIGHT = {
    "plain": Plain,
    "up before gate, in halves": plain_but(fused(2), inner=halves),
    "gate and up alternate": plain_but(fused(2), inner=alternating),
    "as wide as the stream": Plain,
    "reader used twice": plain_but(forward=lambda self, x: Plain.forward(self, x) + self.down_proj(self.up_proj(x))),
    "weights tied": plain_but(lambda ffn, _: setattr(ffn.up_proj, "weight", ffn.gate_proj.weight)),
    "changes its input in place": plain_but(forward=lambda self, x: self.down_proj(self.inner(x.mul_(2)))),
    "one channel squared": plain_but(inner=lambda self, x: self.up_proj(x).square()),
}


@pytest.mark.parametrize("name", RIGHT)
def test_an_odd_ffn_is_cut_right_or_not_at_all(name: str) -> None:
    sizes = {"intermediate_size": SIZES["hidden_size"]} if name == "as wide as the stream" else {}
    model, masked = (model_with(RIGHT[name], **sizes) for _ in range(2))
    arch = bind(model)
    groups = [group for group in arch.groups if group.name == "ffn"]
    assert groups or arch.omits["ffn"]
    assert groups or name in ("as wide as the stream", "one channel squared", "weights tied")
    for group in groups:
        keep = some_units(group, 40)
        silence(masked.model.layers[group.layer], group, keep)
        cut(decoder_layers(model, arch)[group.layer], group, keep)
        assert linear(model.model.layers[group.layer], group.reader.module).in_features == 40
    torch.testing.assert_close(logits_of(model, tiny_ids()), logits_of(masked, tiny_ids()), atol=1e-5, rtol=1e-5)


WRONG = {
    "channels are normalised": plain_but(
        forward=lambda self, x: self.down_proj(nn.functional.normalize(self.inner(x) + 0.1, dim=-1))
    ),
    "softmax over channels": plain_but(inner=lambda self, x: self.up_proj(x).softmax(dim=-1) * 10),
    "channels are moved": plain_but(inner=lambda self, x: self.up_proj(x).roll(1, dims=-1) * self.gate_proj(x)),
    "channels are pooled": plain_but(
        inner=lambda self, x: self.up_proj(x).unflatten(-1, (-1, 4)).softmax(-1).flatten(-2)
    ),
    "their mean is read too": plain_but(
        forward=lambda self, x: self.down_proj(self.inner(x)) + self.inner(x + 1).mean(-1, keepdim=True)
    ),
    "scaled by their number": plain_but(
        forward=lambda self, x: self.down_proj(self.inner(x)) / self.down_proj.in_features**0.5 * 9
    ),
    "their number is written down": plain_but(inner=lambda self, x: self.up_proj(x).view(*x.shape[:-1], self.width)),
    "three parts in one linear": plain_but(fused(3), inner=three_parts),
    "two side by side": plain_but(
        another_beside, forward=lambda self, x: Plain.forward(self, x) + self.other_down(self.other_up(x).relu())
    ),
    "one gates another": plain_but(
        lambda ffn, config: setattr(ffn, "router", Plain(config)),
        forward=lambda self, x: Plain.forward(self, x) * self.router(x).sigmoid(),
    ),
    "a width that no key says": of_width(lambda _: 72),
    "a key that says more": plain_but(
        lambda ffn, _: setattr(ffn, "scale", nn.Parameter(torch.ones(ffn.width))),
        forward=lambda self, x: Plain.forward(self, x) * self.scale.mean(),
    ),
    "no two calls alike": plain_but(inner=lambda self, x: self.up_proj(x) * torch.rand(())),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_ffn_that_cannot_be_cut_is_refused_with_a_reason(name: str) -> None:
    try:
        arch = bind(model_with(WRONG[name]))
    except ArchError as error:
        assert "cannot be walked layer by layer: layers pass on more than one hidden state" in str(error)
        return
    assert "ffn" not in {group.name for group in arch.groups}
    assert {group.name for group in arch.groups} == {"kv_heads", "query_heads"}
    with pytest.raises(ArchError, match=r"remove.groups: a model of type llama"):
        arch.select(("ffn",))


@pytest.mark.parametrize("multiple", [47, 48, 49, 50, 72, 75])
def test_a_key_to_whose_multiple_the_width_is_rounded_does_not_say_it(multiple: int) -> None:
    rounded_up = of_width(lambda key: -(-141 // key) * key)  # as xLSTM has it
    arch = bind(model_with(rounded_up, intermediate_size=multiple))
    assert "ffn" not in {group.name for group in arch.groups}
    assert arch.omits["ffn"] == "no key of the config says how many there are"


@pytest.mark.parametrize(("number", "is_cut"), [(4, True), (5, False)])
def test_a_key_may_count_a_few_channels_at_once(number: int, is_cut: bool) -> None:
    groups = bind(model_with(of_width(lambda key: number * key), intermediate_size=64)).groups
    assert {group.per_key for group in groups if group.name == "ffn"} == ({number} if is_cut else set())


def test_a_model_that_never_runs_says_why() -> None:
    class Blind(LlamaForCausalLM):
        num_calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            Blind.num_calls += 1
            raise ValueError("an image is needed")

    with pytest.raises(ArchError, match=r"^model type 'llama': no small model of it .* \(an image is needed\)\.$"):
        bind(Blind(LlamaConfig(**SIZES)))
    assert Blind.num_calls < 20, "the same problem again and again ends it"


def test_an_ffn_that_layers_share_is_not_cut() -> None:
    def share(model: Any) -> None:
        model.model.layers[1].mlp = model.model.layers[0].mlp

    assert "ffn" not in {group.name for group in bind(model_with(Plain, share)).groups}


def test_layers_that_a_class_of_the_users_own_changes_are_built_with_their_model() -> None:
    model = model_with(
        plain_but(lambda ffn, _: delattr(ffn, "gate_proj"), inner=lambda self, x: self.up_proj(x).relu())
    )
    own, arch = type(model), bind(model)
    for group in arch.ffns:
        cut(decoder_layers(model, arch)[group.layer], group, torch.arange(64))
    record_widths(model, arch)
    assert model.config.intermediate_size == 64 and type(model) is own


class Looped(LlamaModel):
    """Runs its layers twice, the second time on the first one's output."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = super().forward(*args, **kwargs).last_hidden_state
        return super().forward(inputs_embeds=first, use_cache=False)


class ByKeywords(LlamaModel):
    """Calls its layers by keywords alone."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.layers:
            plain = layer.forward
            layer.forward = lambda hidden_states, plain=plain, **others: plain(hidden_states, **others)

    def forward(self, input_ids: Any, **_: Any) -> Any:
        hidden = self.embed_tokens(input_ids)
        positions = self.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        for layer in self.layers:
            hidden = layer(hidden_states=hidden, position_embeddings=positions)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


@pytest.mark.parametrize(
    ("backbone", "why"),
    [(Looped, "layers do not run once each, in order"), (ByKeywords, "layers are called by keywords alone")],
)
def test_a_backbone_that_cannot_be_walked_is_refused(backbone: type[LlamaModel], why: str) -> None:
    class Odd(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = backbone(config)
            self.post_init()

    with pytest.raises(ArchError, match=f"cannot be walked layer by layer: {why}"):
        bind(randomised(Odd(LlamaConfig(**SIZES)), 0))


def test_a_second_reader_of_the_stream_between_layers_is_refused() -> None:
    """A layer that adds what the first layer was given: the walk would not know it."""

    def change(model: Any) -> None:
        kept: list[Tensor] = []
        first, second = model.model.layers
        first.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        second.register_forward_pre_hook(lambda _, args: (args[0] + kept[-1], *args[1:]))

    with pytest.raises(ArchError, match="cannot be walked layer by layer: layers pass on more than one hidden state"):
        bind(model_with(Plain, change))


def test_a_head_of_several_modules_in_a_row_is_found() -> None:
    """Electra's prediction layer and its output embedding are beside each other."""
    sizes = {"hidden_size": 32, "embedding_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = ElectraConfig(**sizes, num_hidden_layers=2, vocab_size=320, is_decoder=True)
    model = randomised(ElectraForCausalLM(config).eval(), 0)
    arch, ids = bind(model), tiny_ids()
    assert arch.head == "generator_predictions+generator_lm_head"
    with torch.no_grad():
        states = model.get_submodule(arch.backbone)(ids).last_hidden_state
        assert torch.allclose(head_of(model, arch)(states), model(ids).logits, atol=1e-5)


def test_the_decoder_is_found_beside_a_larger_tower_of_images() -> None:
    seeing = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = GitForCausalLM(GitConfig(vision_config=seeing | {"image_size": 32}, vocab_size=320, **sizes))
    assert places(model)[1] == "git.encoder.layer"


class Loud(LlamaForCausalLM):
    """Its logits are scaled, then capped."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits * self.config.louder / self.config.cap) * self.config.cap
        return output


def test_logits_that_are_scaled_and_capped_are_found() -> None:
    assert bind(Loud(LlamaConfig(**SIZES, louder=3.0, cap=5.0))).logits == Logits(3.0, 1.0, 5.0)


GEMMA4 = {"vocab_size": 64, "vocab_size_per_layer_input": 64, "hidden_size": 32, "hidden_size_per_layer_input": 0}
GEMMA4 |= {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA4 |= {"num_kv_shared_layers": 0, "head_dim": 8, "global_head_dim": 16, "enable_moe_block": True}
GEMMA4 |= {"layer_types": ["sliding_attention", "full_attention"], "moe_intermediate_size": 16}
GEMMA4 |= {"num_experts": 6, "top_k_experts": 2}


def test_experts_beside_an_ffn_go_as_in_gemma_4(tmp_path: Path) -> None:
    model = randomised(AutoModelForCausalLM.from_config(Gemma4TextConfig(**GEMMA4)).eval(), 0)
    whole, masked = copy.deepcopy(model), copy.deepcopy(model)
    arch = bind(whole)
    assert {group.name for group in arch.groups} == {"shared", "experts", "expert_ffn"}
    unrouted = []
    for group in arch.select(("experts",)):
        assert (group.num_units, group.at_least) == (6, 2)
        keep = some_units(group, 4)
        unrouted += silence(decoder_layers(masked, arch)[group.layer], group, keep)
        cut(decoder_layers(whole, arch)[group.layer], group, keep)
    record_widths(whole, arch)
    whole.save_pretrained(tmp_path)
    ids = tiny_ids(vocab_size=64)
    with Unrouted(unrouted):
        expected = logits_of(masked, ids)
    assert not torch.allclose(expected, logits_of(model, ids), atol=1e-4)
    assert torch.allclose(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), ids), expected, atol=1e-5)


def test_no_expert_goes_whose_tokens_a_table_names_as_in_deepseek_v4() -> None:
    """The table is a buffer of zeros in a twin, so that a cut without it would seem right."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    experts = {"n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "qk_rope_head_dim": 8}
    ranks = {"q_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2, "hc_mult": 2, "sliding_window": 8}
    index = {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 4, "compress_ratios": [0, 4]}
    offered = {}
    for num_hash_layers in (0, 1):
        config = AutoConfig.for_model(
            "deepseek_v4", **sizes, **experts, **heads, **ranks, **index, num_hash_layers=num_hash_layers
        )
        arch = bind(AutoModelForCausalLM.from_config(config))
        offered[num_hash_layers] = {group.name for group in arch.groups}
    assert offered == {0: {"experts"}, 1: set()}
    assert not arch.select(())
    with pytest.raises(
        ArchError, match=r"^a model of type deepseek_v4 has no units that can go: experts: a stored table says"
    ):
        arch.select(("ffn",))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_layers_that_are_given_what_depends_on_the_text_as_in_gemma_4(dtype: torch.dtype, tolerance: float) -> None:
    config = Gemma4TextConfig(**GEMMA4 | {"hidden_size_per_layer_input": 8, "enable_moe_block": False})
    model = randomised(AutoModelForCausalLM.from_config(config).eval(), 0).to(dtype)
    arch = bind(model)
    assert (arch.by_text, arch.middle) == ({"per_layer_input"}, None)
    assert "ffn" in {group.name for group in arch.groups}
    check_walk(model, tiny_ids(batch=6, vocab_size=64), tolerance)


def test_layers_that_read_what_the_one_before_them_computed_as_in_glm_5() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
    experts = {"n_routed_experts": 6, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    ranks = {"v_head_dim": 8, "head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16}
    index = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 4, "indexer_types": ["full", "shared"] * 2}
    depth = {"num_hidden_layers": 4, "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 2}
    config = AutoConfig.for_model("glm_moe_dsa", **sizes, **experts, **heads, **ranks, **index, **depth)
    model = randomised(AutoModelForCausalLM.from_config(config).eval(), 0)
    arch = bind(model)
    assert (arch.carried, arch.middle) == ((("prev_topk_indices", 1),), None)
    assert {"ffn", "experts"} <= {group.name for group in arch.groups}
    check_walk(model, tiny_ids(batch=6, vocab_size=64), 1e-5)
    with pytest.raises(RecipeError, match=r"^remove.depth: layers of glm_moe_dsa are given more than hidden states"):
        layers_to_expect(parse_recipe({"remove": {"share": 0.2, "depth": 1}}), arch, config)


def test_layers_that_give_lists_are_refused() -> None:
    config = OpenAIGPTConfig(n_layer=2, n_embd=48, n_head=4, vocab_size=320, n_positions=64)
    with pytest.raises(ArchError, match="model type 'openai-gpt' cannot be walked layer by layer"):
        bind(randomised(OpenAIGPTLMHeadModel(config), 0))
