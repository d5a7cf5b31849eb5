"The parts of a step: weight average, learning rate, optimisers."
import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from wmpo_nb.presets import UserError, WorldModelTrainConfig
from wmpo_nb.processes import start_processes
from wmpo_nb.run import Checkpointer
from wmpo_nb.training import Diverged, EMA, Optimizers, is_block_matrix, learning_rate_at, make_optimizer, train_step


def test_ema_is_the_weighted_mean_of_the_weights():
    layer, values = nn.Linear(1, 1, bias=False), [3.0, -1.0, 4.0, 1.5]
    nn.init.constant_(layer.weight, 2.0)
    ema, expected = EMA(layer, 0.2), 2.0
    for n, value in enumerate(values):
        nn.init.constant_(layer.weight, value)
        ema.update(layer)
        decay = min(0.2, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    other = EMA(nn.Linear(1, 1, bias=False), 0.2)
    other.load_state_dict(ema.state_dict())
    other.copy_to(layer)
    assert layer.weight.item() == pytest.approx(expected) and other.updates == 4


def test_ema_of_half_precision_weights_is_kept_in_float32():
    layer = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(layer.weight, 1.0)
    ema = EMA(layer, 0.9999)
    ema.updates = 10**6
    nn.init.constant_(layer.weight, 2.0)
    ema.update(layer)
    assert ema.average["weight"].item() == pytest.approx(1.0001, abs=1e-6)    # in bfloat16 it would stay 1


def test_an_average_without_decay_holds_no_weights_and_changes_none():
    layer = nn.Linear(1, 1, bias=False)
    ema = EMA(layer, 0.0)
    nn.init.constant_(layer.weight, 2.0)
    ema.update(layer)
    ema.copy_to(layer)
    assert layer.weight.item() == 2.0 and not ema.state_dict()["average"]


def test_learning_rate_without_warmup_or_decay_is_constant():
    config = WorldModelTrainConfig(steps=10, warmup_steps=0, decay_steps=0)
    assert {learning_rate_at(step, config) for step in range(10)} == {config.learning_rate}


def test_the_rate_rises_stays_and_falls_to_nothing():
    config = WorldModelTrainConfig(learning_rate=2.0, steps=20, warmup_steps=4, decay_steps=5)
    assert [learning_rate_at(step, config) for step in range(21)] == pytest.approx([0.5, 1.0, 1.5, *[2.0] * 13, 1.6, 1.2, 0.8, 0.4, 0.0])


def test_muon_takes_block_matrices_only():
    names = ("spatial_blocks.0.attn.qkv.weight", "temporal_blocks.3.mlp.fc1.weight", "model.layers.1.mlp.up_proj.weight")
    assert all(is_block_matrix(name, torch.zeros(2, 2)) for name in names)
    others = ("spatial_blocks.0.scale_shift_table", "t_block.1.weight", "x_embedder.proj.weight", "lm_head.weight")
    assert not any(is_block_matrix(name, torch.zeros(2, 2)) for name in others)
    assert not is_block_matrix("blocks.0.norm.weight", torch.zeros(2))


def test_optimizers_share_no_parameter_and_skip_frozen_ones():
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "blocks": nn.ModuleList([nn.Linear(4, 4)])})
    model["head"].bias.requires_grad_(False)
    optimizer = make_optimizer(model.named_parameters(), WorldModelTrainConfig())
    assert isinstance(optimizer, Optimizers)
    parameters = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len(set(parameters)) == 3
    with pytest.raises(UserError, match="adamw or muon"):
        make_optimizer(model.named_parameters(), WorldModelTrainConfig(optimizer="sgd"))


def block_and_head(config):
    torch.manual_seed(0)
    model = nn.ModuleDict({"head": nn.Linear(4, 1), "blocks": nn.ModuleList([nn.Linear(4, 4)])})
    return model, make_optimizer(model.named_parameters(), config)


def take(model, optimizer, config, step=0, checkpointer=None, change=lambda loss: loss):
    "A step down a loss with a steep gradient, or down what `change` makes of it; its numbers."
    loss_of = lambda x: {"loss": change(100 * model["head"](model["blocks"][0](x)).square().mean())}
    return train_step(start_processes(), loss_of, (torch.ones(8, 4),), model, optimizer, step, config, checkpointer)


def one_step(config, step=0):
    "Model, optimizer and numbers of one step."
    model, optimizer = block_and_head(config)
    return model, optimizer, take(model, optimizer, config, step)


def test_muon_has_a_rate_of_its_own_the_decay_is_everybodys_and_warm_up_scales_each():
    config = WorldModelTrainConfig(learning_rate=1e-3, muon_learning_rate=0.5, weight_decay=0.03, warmup_steps=10, steps=100, decay_steps=0)
    _, optimizer, _ = one_step(config, step=3)
    groups = {type(o).__name__: o.param_groups[0] for o in optimizer.optimizers}
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx({"AdamW": 0.4e-3, "Muon": 0.2})
    assert {group["weight_decay"] for group in groups.values()} == {0.03}
    assert [p.shape for p in groups["Muon"]["params"]] == [(4, 4)]


@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_a_step_clips_the_joint_norm_and_says_what_it_was(limit):
    model, _, numbers = one_step(WorldModelTrainConfig(grad_clip=limit))
    norm = float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    assert numbers["grad_norm"] > 10 and norm == pytest.approx(min(limit, numbers["grad_norm"]), rel=1e-4)


CONSTANT = WorldModelTrainConfig(warmup_steps=0, decay_steps=0)


def test_both_optimisers_step_go_on_where_they_were_and_forget_the_last_gradient():
    model, optimizer, _ = one_step(CONSTANT)
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), block_and_head(CONSTANT)[0].parameters()))
    other = deepcopy(model)
    resumed = make_optimizer(other.named_parameters(), CONSTANT)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    for pair in ((model, optimizer), (other, resumed)): take(*pair, CONSTANT, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    for group in optimizer.param_groups: group["initial_lr"] = 0.0
    first, second = (take(model, optimizer, CONSTANT, step) for step in (2, 3))
    assert first == pytest.approx(second) and first["grad_norm"] > 0


@pytest.mark.parametrize("said, change", [("the loss is nan", lambda loss: loss * math.nan), ("the loss explodes", lambda loss: loss + 1e9),
                                          ("the gradient's norm is", lambda loss: (loss - loss.detach()).sqrt())],
                         ids=["loss", "explosion", "gradient"])
def test_a_step_that_goes_wrong_is_named_and_not_taken(tmp_path, said, change):
    (model, optimizer), checkpointer = block_and_head(CONSTANT), Checkpointer(tmp_path, every=99)
    for step in range(21): take(model, optimizer, CONSTANT, step, checkpointer)
    before = deepcopy(model.state_dict())
    with pytest.raises(Diverged, match=f"{said}.* at step 21"): take(model, optimizer, CONSTANT, 21, checkpointer, change)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
