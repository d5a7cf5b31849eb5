"The VAE's promises: shapes, truncation, one scaling each way, batches that do not matter, training that resumes exactly."
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from wmpo_nb.presets import UserError, VAEConfig, VAETrainConfig
from wmpo_nb.run import Checkpointer
from wmpo_nb.trajectory import read_shards, write_shard
from wmpo_nb.vae import (
    VAE, edge_loss, frame_sampler, kl_loss, load_vae, main, normalise_latents, psnr, reconstruct_batch, reconstruct_shards, save_vae,
    to_frames, to_pixels, train_vae)

SMALL = VAEConfig(latent_channels=4, block_out_channels=(8, 8), norm_num_groups=1, scaling_factor=0.5)
TRAINING = VAETrainConfig(steps=6, batch_size=4, warmup_steps=2, decay_steps=2, checkpoint_every=3, log_every=1)


def small_vae(seed=0, **changes):
    torch.manual_seed(seed)
    return VAE(replace(SMALL, **changes)).eval()


def some_frames(*shape, seed=0):
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_every_grey_level_survives_the_change_of_format():
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16, 1).expand(-1, -1, -1, -1, 3)
    pixels = to_pixels(frames)
    assert pixels.shape == (1, 3, 1, 16, 16) and pixels.min() == -1 and pixels.max() == 1
    # truncation may take one level off where the float is a hair below an integer, and never adds one
    difference = frames.int() - to_frames(pixels).int()
    assert difference.min() == 0 and difference.max() <= 1


def test_frames_are_truncated_and_clipped_not_rounded():
    levels = torch.tensor([100.2, 100.5, 100.99, -30.0, 300.0])
    pixels = (levels / 255 * 2 - 1).reshape(1, 1, 1, 1, 5).expand(1, 3, 1, 1, 5)
    assert to_frames(pixels)[0, 0, 0, :, 0].tolist() == [100, 100, 100, 0, 255]


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_shapes_and_types(size):
    vae, frames = small_vae(), some_frames(2, 3, *size)
    latents = vae.encode(frames)
    assert latents.shape == (2, 4, 3, size[0] // 2, size[1] // 2) and latents.dtype == torch.float32
    assert vae.decode(latents).shape == frames.shape and vae.decode(latents).dtype == torch.uint8
    assert vae.encode(frames[:, 0]).shape[2] == 1
    assert vae.reconstruct(frames[:, 0]).shape == frames[:, 0].shape


def test_video_and_single_frames_agree():
    vae, frames = small_vae(), some_frames(2, 3, 16, 16)
    singles = torch.stack([vae.encode(frames[:, t])[:, :, 0] for t in range(3)], 2)
    assert torch.allclose(vae.encode(frames), singles, atol=1e-5)


def test_scaling_is_applied_once_each_way():
    vae, frames = small_vae(), some_frames(2, 1, 16, 16)
    plain = small_vae(scaling_factor=1.0)
    assert torch.allclose(vae.encode(frames), 0.5 * plain.encode(frames), atol=1e-6)
    latents = torch.randn(2, 4, 1, 8, 8)
    assert torch.allclose(vae.decode_pixels(0.5 * latents), plain.decode_pixels(latents), atol=1e-5)
    assert not torch.allclose(vae.decode_pixels(latents), plain.decode_pixels(latents), atol=1e-2)


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_micro_batches_do_not_change_results(size):
    vae, frames = small_vae(), some_frames(2, 3, 16, 16)
    split = small_vae(micro_batch_size=size)
    seeded = [v.encode(frames, torch.Generator().manual_seed(3)) for v in (vae, split)]
    assert torch.allclose(*seeded, atol=1e-5)
    assert torch.allclose(vae.decode_pixels(seeded[0]), split.decode_pixels(seeded[0]), atol=1e-5)


def test_mode_repeats_and_samples_follow_the_generator():
    vae, frames = small_vae(), some_frames(1, 2, 16, 16)
    mode, first, again, other = (vae.encode(frames, g and torch.Generator().manual_seed(g)) for g in (None, 1, 1, 2))
    assert torch.equal(mode, vae.encode(frames)) and torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first, mode)
    mean, std = vae.posterior(to_pixels(frames)[0].transpose(0, 1))
    assert ((first - mode).abs() <= 6 * 0.5 * std.max()).all()


def test_losses_against_numbers_made_by_hand():
    target = torch.zeros(1, 3, 2, 2)
    pixels = target.clone()
    pixels[..., 1] = 0.5                                     # a vertical edge that is not there
    assert edge_loss(pixels, target).item() == pytest.approx(0.5)
    assert edge_loss(pixels + 1, pixels).item() == pytest.approx(0.0)
    assert kl_loss(torch.zeros(3), torch.ones(3)).item() == 0
    assert kl_loss(torch.full((2,), 2.0), torch.ones(2)).item() == pytest.approx(2.0)
    black, off_by_one = torch.zeros(8, dtype=torch.uint8), torch.ones(8, dtype=torch.uint8)
    assert psnr(black, off_by_one) == pytest.approx(48.13, abs=0.01)


def test_the_disturbance_is_noise_of_its_own_and_teaches_the_encoder_nothing(monkeypatch):
    "With a decoder that changes nothing: the spread that scales it is a number, not a way to make the task easier."
    vae, noise, strength = small_vae(), torch.randn(2, 3, 4, 8, 8), torch.tensor([0.0, 0.5, 2.0])[:, None, None, None]
    mean, std = (torch.rand(3, 4, 8, 8, requires_grad=True) for _ in range(2))
    monkeypatch.setattr(VAE, "posterior", lambda self, images: (mean, std))
    monkeypatch.setattr(vae.module, "decode", lambda latents: SimpleNamespace(sample=latents))
    pixels, *_ = vae(None, noise, strength)
    torch.testing.assert_close(pixels, mean + std * noise[0] + strength * mean.std() * noise[1])
    pixels.sum().backward()
    assert torch.equal(mean.grad, torch.ones_like(mean))


def test_normalised_latents_have_unit_variance_and_the_same_images():
    vae, frames = small_vae(scaling_factor=1.0), some_frames(16, 16, 16)
    before = vae.decode_pixels(vae.encode(frames))
    normalise_latents(vae, frames)
    latents = vae.encode(frames)
    assert latents.std().item() == pytest.approx(1, abs=1e-3)
    assert latents.mean(dim=(0, 2, 3, 4)).abs().max() < 1e-3
    assert torch.allclose(vae.decode_pixels(latents), before, atol=1e-4)


def test_training_makes_better_pictures():
    frames = some_frames(1, 8, 8).repeat_interleave(2, 1).repeat_interleave(2, 2).expand(8, -1, -1, -1).contiguous()
    vae = small_vae()
    before = psnr(vae.reconstruct(frames), frames)
    train_vae(vae, frames, replace(TRAINING, steps=60, learning_rate=5e-3, decay_steps=20, ema=0.9))
    assert psnr(vae.reconstruct(frames), frames) > before + 3


def test_a_resumed_training_equals_an_unbroken_one(tmp_path):
    frames, logs = some_frames(12, 16, 16), [{}, {}]
    whole = train_vae(small_vae(), frames, TRAINING, seed=5, log=lambda step, **n: logs[0].update({step: n["loss"]}))

    class Stop(Exception): pass

    def stop_at_four(step, **numbers):
        if step == 4: raise Stop
    with pytest.raises(Stop):
        train_vae(small_vae(), frames, TRAINING, seed=5, checkpointer=Checkpointer(tmp_path, 3), log=stop_at_four)
    resumed = train_vae(small_vae(seed=9), frames, TRAINING, seed=5, checkpointer=Checkpointer(tmp_path, 3),
                        log=lambda step, **n: logs[1].update({step: n["loss"]}))
    assert sorted(logs[1]) == [3, 4, 5] and all(logs[0][step] == logs[1][step] for step in logs[1])
    assert resumed.config == whole.config
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


def test_a_sampler_may_stand_for_the_frames():
    frames, asked = some_frames(12, 16, 16), []

    def sampler(size, generator):
        asked.append(size)
        return frame_sampler(frames)(size, generator)
    a, b = train_vae(small_vae(), frames, TRAINING), train_vae(small_vae(), sampler, TRAINING)
    assert asked[:6] == [4] * 6
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_a_loss_that_is_not_finite_stops_the_training():
    vae = small_vae()
    with torch.no_grad(): vae.module.quant_conv.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="step 0"): train_vae(vae, some_frames(4, 16, 16), TRAINING)


def test_saved_and_loaded(tmp_path):
    vae, frames = small_vae(scaling_factor=0.7), some_frames(2, 16, 16)
    save_vae(tmp_path / "vae.safetensors", vae)
    loaded = load_vae(tmp_path / "vae.safetensors")
    assert loaded.config == vae.config and torch.equal(loaded.encode(frames), vae.encode(frames))
    (tmp_path / "vae.safetensors").write_bytes(b"short")
    for name in ("vae.safetensors", "absent.safetensors"):
        with pytest.raises(UserError): load_vae(tmp_path / name)


def test_reconstructed_batch_keeps_everything_but_the_frames():
    from test_reward import trials
    batch, vae = trials(size=16), small_vae()
    seen = reconstruct_batch(vae, batch)
    assert seen.frames.shape == batch.frames.shape and not torch.equal(seen.frames, batch.frames)
    assert seen.actions is batch.actions and torch.equal(seen.success, batch.success)


def test_pictures_pass_the_vae_on_disk_as_in_memory(tmp_path):
    from test_reward import trials
    batch, vae = trials(size=16), small_vae()
    write_shard(tmp_path / "data/a.tar", batch)
    write_shard(tmp_path / "seen/leftover.tar", batch)
    seen = reconstruct_shards(vae, read_shards(tmp_path / "data", stored=True), tmp_path / "seen")
    assert torch.equal(seen.frames[:], reconstruct_batch(vae, batch).frames) and torch.equal(seen.success, batch.success)
    assert len(list((tmp_path / "seen").iterdir())) == len(batch)


def test_command(tmp_path, capsys):
    from test_reward import trials
    write_shard(tmp_path / "data/a.tar", trials(size=64))
    argv = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "run"), "--vae_training.steps", "2",
            "--vae.block_out_channels", "[8, 8]", "--vae_training.batch_size", "2"]
    assert main(argv) == 0
    assert load_vae(tmp_path / "run/vae.safetensors").config.block_out_channels == (8, 8)
    assert main(argv) == 2 and "--resume" in capsys.readouterr().err
    assert main(["--preset", "coffee_128", *argv, "--output", str(tmp_path / "other")]) == 2 and "downloaded" in capsys.readouterr().err
    assert main(["--data", str(tmp_path / "nothing"), "--output", str(tmp_path / "run2")]) == 2
    assert not (tmp_path / "run2").exists()


def test_the_command_learns_from_what_happened(tmp_path, monkeypatch):
    "The picture that stands still after the end of a trial is not seen again and again."
    from test_reward import trials
    batch, seen = trials(size=64), []
    write_shard(tmp_path / "data/a.tar", batch)
    monkeypatch.setattr("wmpo_nb.vae.train_vae", lambda vae, frames, *_, **__: seen.append(frames) or vae)
    assert main(["--data", str(tmp_path / "data"), "--output", str(tmp_path / "run"), "--vae.block_out_channels", "[8, 8]"]) == 0
    assert torch.equal(seen[0], torch.cat([video[:length + 1] for video, length in zip(batch.frames, batch.length)]))
