"""What the Trainer is given: steps, warm-up, weights; and what its events turn into."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from models import tiny_llama
from transformers import TrainerControl, TrainerState

from secateur.data.blocks import Block
from secateur.errors import RecipeError
from secateur.model.stock import quiet_transformers
from secateur.recipe import RecoverySettings
from secateur.recovery import train
from secateur.recovery.text import RecoveryText
from secateur.recovery.train import Checkpoints, Listener, Work, _arguments
from secateur.recovery.weights import handed_over, merge, prepare_weights, wants_shards, weight_size, with_lora
from secateur.store import Services


def work_with(place: Any, **settings: Any) -> Work:
    """Return what `_arguments` reads of a recovery."""
    work = object.__new__(Work)
    work.settings, work.directory, work.seed, work.on_cpu = RecoverySettings(**settings), place, 7, True
    return work


def arguments_of(place: Any, num_steps: int, **settings: Any) -> Any:
    with quiet_transformers():
        return _arguments(work_with(place, **settings), torch.float32, 4, num_steps, 0.25)


def test_the_schedule_is_the_one_that_the_docs_tell(tmp_path):
    found = arguments_of(tmp_path, 95)
    assert (found.max_steps, found.warmup_steps, found.learning_rate) == (95, 9, 0.25)
    assert (found.lr_scheduler_type, found.weight_decay, found.max_grad_norm) == ("cosine", 0.0, 1.0)
    assert (found.save_steps, found.save_total_limit) == (48, None)  # see Checkpoints
    assert (found.eval_strategy, found.load_best_model_at_end) == ("no", False), "what comes last stays"
    assert found.seed == 7 and found.bf16 is False
    assert found.train_sampling_strategy == "sequential"
    # The first step of a warm-up has a rate of 0.
    assert [arguments_of(tmp_path, steps).warmup_steps for steps in (5, 1)] == [1, 0]
    assert [arguments_of(tmp_path, steps).save_steps for steps in (9, 300, 5000)] == [5, 150, 150]


def test_the_rate_follows_the_size_of_the_weights():
    model = tiny_llama(tied=False)
    large = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in large.named_parameters():
            weight.mul_(3 if weight.dim() > 1 and "layers" in name else 7)  # vectors, embedding and head do not count
    linears = [each for each in model.model.layers.modules() if isinstance(each, torch.nn.Linear)]
    weights = torch.cat([each.weight.detach().double().flatten() for each in linears])
    expected = float(weights.square().mean().sqrt())
    assert weight_size(model) == pytest.approx(expected, rel=1e-12)
    assert weight_size(large) == pytest.approx(3 * expected, rel=1e-6)


def test_a_step_is_shared_out_over_passes(tmp_path):
    found = arguments_of(tmp_path, 8, blocks_per_device=2)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (2, 2)


def test_progress_counts_tokens_and_the_last_step_is_not_saved(tmp_path):
    move = Mock()
    heard = Listener("recover", Checkpoints(Path("trainer"), "recover", print), 100, move)
    arguments, control = arguments_of(tmp_path, 10), TrainerControl(should_save=True)
    heard.on_train_begin(arguments, TrainerState(global_step=4, max_steps=10), control)
    heard.on_step_end(arguments, TrainerState(global_step=6, max_steps=10), control)
    assert move.call_args_list == [call("recover", 400, 1000), call("recover", 600, 1000)] and control.should_save
    heard.on_step_end(arguments, TrainerState(global_step=10, max_steps=10), control)
    assert not control.should_save


def test_low_rank_additions_are_merged_in_float32_into_copies():
    torch.manual_seed(0)
    model = tiny_llama().to(torch.bfloat16)
    prepare_weights(model, "lora", float_all=False)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert all((dtype == torch.float32) == ("norm" in name) for name, dtype in dtypes.items())
    old = {name: parameter.data for name, parameter in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in old.items()}
    trained: Any = with_lora(model)
    additions = {name: module for name, module in trained.named_modules() if hasattr(module, "lora_A")}
    expected = {}
    for name, module in additions.items():
        factors = [getattr(module, key)["default"].weight for key in ("lora_B", "lora_A")]
        for factor in factors:
            factor.data.normal_(std=0.05)
            assert factor.dtype == torch.float32
        key = name.removeprefix("base_model.model.") + ".weight"
        expected[key] = (before[key].float() + 2 * factors[0] @ factors[1]).to(torch.bfloat16)
    assert len(expected) == 7 * 3
    merge(trained)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.get(name, before[name])), name
        assert torch.equal(old[name], before[name]), f"{name}: cannot be put back"


def test_a_copy_for_the_shards_has_the_weights_and_leaves_frozen_ones_frozen():
    model = tiny_llama(tie_word_embeddings=True)
    weights = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    model.get_input_embeddings().weight.requires_grad_(False)
    copied = handed_over(model)
    assert {name: parameter.data_ptr() for name, parameter in copied.named_parameters()} == weights
    frozen = [name for name, parameter in copied.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]


def test_shards_are_for_several_processes_and_version_two(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not wants_shards()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="asks for version 1, allowed is 2"):
        wants_shards()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert wants_shards()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not wants_shards()


def test_words_stay_and_all_else_moves_in_the_weights_own_dtype(monkeypatch, tmp_path):
    """What is free to move while the Trainer runs, in which dtype, and in which dtype it ends."""
    seen: dict[str, tuple[torch.dtype, bool]] = {}
    monkeypatch.setattr(train, "_take_back", lambda *_: None)
    monkeypatch.setattr("secateur.recovery.weights.multiplies_in_software", lambda *_: in_software)

    def run(resume_from_checkpoint: str | None) -> None:
        seen.update({name: (each.dtype, each.requires_grad) for name, each in work.pruned.named_parameters()})

    arguments = SimpleNamespace(gradient_checkpointing=False)
    trainer = SimpleNamespace(state=TrainerState(global_step=3), args=arguments, train=run)
    monkeypatch.setattr(train, "_trainer", lambda *_, **__: trainer)
    words = {"model.embed_tokens.weight", "lm_head.weight"}
    for settings, moves, has_teacher, in_software in (
        ({"train": "layers", "kl_share": 0.0}, False, False, False),
        ({"train": "layers", "kl_share": 0.0}, False, False, True),
        ({"train": "full", "kl_share": 0.5}, True, True, False),
    ):
        work = work_with(tmp_path, batch_tokens=64, **settings)
        work.services = Services()
        work.pruned, work.teacher, work.states = tiny_llama().to(torch.bfloat16), tiny_llama(), None
        zeros_T = torch.zeros(32, dtype=torch.long)
        work.text = RecoveryText((Block(zeros_T, zeros_T),) * 8, {}, 32, "")
        before = {name: each.detach().clone() for name, each in work.pruned.named_parameters()}
        assert train.recover_logits(work) == 3 * 2 * 32
        assert (work.teacher is not None) == has_teacher
        low = {name for name, (dtype, _) in seen.items() if dtype == torch.bfloat16}
        assert low == (set() if moves or in_software else words), "without autocast there is one dtype"
        assert {dtype for name, (dtype, _) in seen.items() if name not in low} == {torch.float32}
        assert {name for name, (_, free) in seen.items() if not free} == (set() if moves else words)
        for name, parameter in work.pruned.named_parameters():
            assert parameter.dtype == torch.bfloat16 and not parameter.requires_grad
            assert torch.equal(parameter, before[name])
