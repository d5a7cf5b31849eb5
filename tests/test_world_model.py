"The world model's loss, imagination and training."
from dataclasses import replace

import pytest
import torch
from helpers import STATS
from torch import nn
from wmpo_nb.alignment import LatentWindows, align, encode_windows, imagine_trajectory, main
from wmpo_nb.flow import resolution_shift, shift_timesteps
from wmpo_nb.from_scratch import shipped_weights
from wmpo_nb.presets import STDiTConfig, UserError, WorldModelConfig, WorldModelTrainConfig, load_preset
from wmpo_nb.run import Checkpointer
from wmpo_nb.stdit import STDiT
from wmpo_nb.trajectory import write_shard
from wmpo_nb.world_model import WorldModel, train_world_model

SMALL = STDiTConfig(depth=1, hidden_size=48, num_heads=4, in_channels=2, patch_size=(1, 2, 2))


def small_world_model(seed=0, **config):
    torch.manual_seed(seed)
    return WorldModel(WorldModelConfig(**config), STDiT(SMALL))


def windows(count=1, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 12, 4, 4, generator=generator), torch.randn(count, 8, 7, generator=generator)


class FixedVelocity(nn.Module):
    "A stand-in for the STDiT that remembers what it was shown and answers what it was told."
    config = SMALL

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, timestep, actions, x_mask, image_size):
        self.seen = x, timestep, x_mask, image_size
        return self.answer


def test_window_loss_by_hand():
    latents, actions = windows(3)
    noise, timestep = torch.randn_like(latents), torch.tensor([0.0, 300.0, 1000.0])
    answer = torch.randn(3, 4, 12, 4, 4)
    stdit = FixedVelocity(answer)
    losses = WorldModel(WorldModelConfig(context_noise=50.0), stdit).losses_at(latents, actions, noise, timestep)
    for b in range(3):
        total = 0.0
        for frame in range(4, 12):
            total += (answer[b, :2, frame] - (latents[b, :, frame] - noise[b, :, frame])).square().sum().item()
        assert losses[b].item() == pytest.approx(total / (8 * 2 * 4 * 4), rel=1e-5)
    noisy, _, x_mask, image_size = stdit.seen
    assert image_size == (64, 64) and x_mask.tolist() == [[False] * 4 + [True] * 8] * 3
    torch.testing.assert_close(noisy[:, :, :4], 0.95 * latents[:, :, :4] + 0.05 * noise[:, :, :4])
    torch.testing.assert_close(noisy[1, :, 4:], 0.7 * latents[1, :, 4:] + 0.3 * noise[1, :, 4:])
    torch.testing.assert_close(noisy[2, :, 4:], noise[2, :, 4:])


@pytest.mark.parametrize("history, action_dim", [(0, 28), (2, 7), (2, 21)])
def test_both_configurations_agree_on_what_is_told(history, action_dim):
    with pytest.raises(UserError, match=f"needs stdit.action_dim {7 * (history + 2) if history else 7}, not {action_dim}"):
        WorldModel(WorldModelConfig(action_history=history), STDiT(replace(SMALL, action_dim=action_dim)))


@pytest.mark.parametrize("steps", [3, 8, 12])
def test_a_trajectory_may_end_within_a_chunk(steps):
    "As many frames as actions, each answering to its own action; what is whole does not depend on what follows."
    world_model, generator = small_world_model().eval(), lambda: torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in world_model.parameters(): p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    first, actions = torch.randn(2, 2, 1, 4, 4), torch.randn(2, 16, 7)
    dream = imagine_trajectory(world_model, first, actions[:, :steps], generator(), steps=2)
    assert dream.shape == (2, 2, steps + 1, 4, 4) and torch.equal(dream[:, :, :1], first)
    whole = steps // 8 * 8 + 1
    assert torch.allclose(dream[:, :, :whole], imagine_trajectory(world_model, first, actions, generator(), steps=2)[:, :, :whole], atol=1e-5)
    other = actions[:, :steps].clone()
    other[:, -1] *= -1
    assert not torch.allclose(dream[:, :, -1], imagine_trajectory(world_model, first, other, generator(), steps=2)[:, :, -1], atol=1e-4)


def test_loss_ignores_the_context_and_the_spare_channels():
    latents, actions = windows(2)
    noise, timestep, answer = torch.randn_like(latents), torch.rand(2) * 1000, torch.randn(2, 4, 12, 4, 4)
    other = answer.clone()
    other[:, :, :4] += 10
    other[:, 2:] += 10
    loss = lambda out: WorldModel(WorldModelConfig(), FixedVelocity(out)).losses_at(latents, actions, noise, timestep)
    assert torch.equal(loss(answer), loss(other))


def test_timestep_transform_is_the_identity_at_256_pixels():
    timestep = torch.linspace(0, 1000, 50)
    assert resolution_shift(256, 256, 12) == 1.0
    torch.testing.assert_close(shift_timesteps(timestep, resolution_shift(256, 256, 12)), timestep, rtol=1e-6, atol=0)


def test_timestep_shift_moves_practice_towards_noise():
    mean = {}
    for shift in (1.0, 3.0):
        world_model = WorldModel(WorldModelConfig(timestep_shift=shift), FixedVelocity(torch.zeros(64, 4, 12, 4, 4)))
        world_model.loss(*windows(64), torch.Generator().manual_seed(0))
        mean[shift] = world_model.stdit.seen[1].mean()
    assert mean[3.0] > mean[1.0] + 100


@pytest.mark.parametrize("context, chunk, steps, shift", [(4, 8, 3, 1.0), (2, 5, 4, 2.0), (1, 8, 1, 1.0)])
def test_imagination_with_and_without_cache(context, chunk, steps, shift):
    world_model = small_world_model(context_frames=context, chunk_size=chunk, flow_steps=steps, timestep_shift=shift)
    with torch.no_grad():
        for p in world_model.parameters(): p.add_(0.1 * torch.randn_like(p) if p.requires_grad else 0)
    past, noise, actions = torch.randn(2, 2, context, 4, 4), torch.randn(2, 2, chunk, 4, 4), torch.randn(2, chunk, 7)
    cached, plain = (world_model.imagine(past, actions, noise, cached=c) for c in (True, False))
    assert cached.shape == noise.shape and not cached.requires_grad
    assert (cached - plain).abs().max() <= 1e-5 * max(1, plain.abs().max())


def test_fewer_steps_than_usual_may_be_asked_for(monkeypatch):
    world_model, (latents, actions), taken, denoise = small_world_model(flow_steps=5), windows(), [], STDiT.denoise
    monkeypatch.setattr(STDiT, "denoise", lambda *arguments: taken.append(steps) or denoise(*arguments))
    for steps in (2, None): world_model.imagine(latents[:, :, :4], actions, latents[:, :, 4:], steps)
    assert taken == [2] * 2 + [None] * 5


def test_a_dream_does_not_depend_on_who_else_is_in_the_batch():
    world_model = small_world_model()
    past, noise, actions = torch.randn(3, 2, 4, 4, 4), torch.randn(3, 2, 8, 4, 4), torch.randn(3, 8, 7)
    together = world_model.imagine(past, actions, noise)
    alone = world_model.imagine(past[1:2], actions[1:2], noise[1:2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


def config(steps, **fields):
    small = dict(batch_size=4, warmup_steps=2, decay_steps=0, ema=0.9, log_every=1, checkpoint_every=2)
    return WorldModelTrainConfig(**{**small, **fields, "steps": steps})


def sample(generator, count):
    latents, actions = windows(16)
    index = torch.randint(0, 16, (count,), generator=generator)
    return latents[index], actions[index]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resumed_training_equals_unbroken_training(tmp_path, optimizer):
    unbroken, logged = small_world_model(), {}
    train_world_model(unbroken, sample, config(5, optimizer=optimizer), seed=3,
                      log=lambda step, **numbers: logged.update({step: numbers}))

    def dies(generator, count, calls=[]):
        calls.append(0)
        if len(calls) == 4: raise KeyboardInterrupt
        return sample(generator, count)
    with pytest.raises(KeyboardInterrupt):
        train_world_model(small_world_model(), dies, config(5, optimizer=optimizer), seed=3,
                          checkpointer=Checkpointer(tmp_path, every=2))
    resumed, relogged = small_world_model(seed=9), {}
    train_world_model(resumed, sample, config(5, optimizer=optimizer), seed=3,
                      checkpointer=Checkpointer(tmp_path, every=2),
                      log=lambda step, **numbers: relogged.update({step: numbers}))
    assert sorted(relogged) == [2, 3, 4] and all(relogged[s] == logged[s] for s in relogged)
    for (name, a), b in zip(unbroken.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name


def test_same_seed_same_weights_other_seed_other_weights():
    states = []
    for seed in (0, 0, 1):
        states.append(train_world_model(small_world_model(), sample, config(2), seed=seed).state_dict())
    key = "stdit.spatial_blocks.0.mlp.fc1.weight"
    assert torch.equal(states[0][key], states[1][key]) and not torch.equal(states[0][key], states[2][key])


def test_a_loss_that_is_not_a_number_stops_the_run():
    def broken(generator, count): return torch.full((count, 2, 12, 4, 4), float("nan")), torch.zeros(count, 8, 7)
    with pytest.raises(RuntimeError): train_world_model(small_world_model(), broken, config(3), seed=0)


def test_one_window_is_learned_and_dreamt_back():
    "After 150 steps on one window the model turns any noise into its eight frames."
    latents, actions = windows()
    same = lambda generator, count: (latents.expand(count, -1, -1, -1, -1), actions.expand(count, -1, -1))
    settings = config(150, batch_size=8, learning_rate=4e-3, muon_learning_rate=0.05, ema=0.95, decay_steps=50)
    world_model = train_world_model(small_world_model(), same, settings, seed=0)
    assert not world_model.training
    noise = torch.randn(1, 2, 8, 4, 4, generator=torch.Generator().manual_seed(7))
    dreamt = world_model.imagine(latents[:, :, :4], actions, noise, steps=8)
    error = (dreamt - latents[:, :, 4:]).square().mean()
    assert error < 0.1 * latents[:, :, 4:].var(), error


# --- windows and alignment ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_alignment_practises_the_asked_share_of_windows_where_dreams_begin(share, monkeypatch):
    "Latents that tell the time say where a window begins: in its last frame of context."
    latents = torch.arange(25.0).half()[None, :, None, None, None].expand(2, -1, 2, 4, 4)
    monkeypatch.setattr("wmpo_nb.alignment.train_world_model", lambda _, sample, *__, **___: sample(torch.Generator().manual_seed(0), 64))
    timed = LatentWindows(latents, torch.zeros(2, 24, 7), torch.tensor([24, 19]), WorldModelConfig())
    drawn, _ = align(None, timed, config(1, chunk_starts=share), seed=0)
    starts = drawn[:, 0, 3, 0, 0]
    assert set(starts[64 - round(64 * share):].tolist()) == ({0, 8, 16} if share else set())
    assert share == 1 or (starts[:32] % 8 != 0).any()


def test_windows_hold_the_actions_that_were_executed():
    "A noisy hand's intentions do not say what happens next."
    from test_reward import trials
    from test_vae import small_vae
    batch = replace(trials(2), actions=torch.rand(2, 24, 7), intended=torch.rand(2, 24, 7))
    assert torch.equal(encode_windows(small_vae(), batch, STATS, WorldModelConfig()).actions_n, STATS.normalize(batch.actions))


def test_the_command_aligns_and_pretrains_with_settings_of_their_own(tmp_path, monkeypatch):
    from test_reward import trials
    used, weights = [], shipped_weights(load_preset("tiny_lift"))
    monkeypatch.setattr("wmpo_nb.alignment.align", lambda world_model, windows, config, **_: used.append(config))
    write_shard(tmp_path / "data/a.tar", trials(2))
    words = ["--data", tmp_path / "data", "--vae", weights / "vae.safetensors", "--stats", weights / "policy_lift/dataset_statistics.json"]
    for name, more in (("alignment", ["--align", weights / "world_model.safetensors"]), ("pretraining", [])):
        assert main([str(word) for word in [*words, *more, "--output", tmp_path / name, f"--{name}.steps", 3]]) == 0
        assert used[-1] == getattr(load_preset("tiny_lift", {f"{name}.steps": "3"}), name)
