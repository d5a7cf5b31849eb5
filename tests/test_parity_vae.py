"The VAE against numbers computed by the published wrapper, and its keys against those of the real size."
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from wmpo_nb.presets import VAEConfig, load_preset
from wmpo_nb.vae import VAE, to_frames

GOLDENS = Path(os.environ.get("WMPO_GOLDENS", Path(__file__).parent / "goldens"))
RECORD = json.loads((GOLDENS / "sdxl_vae_wrapper_tiny.json").read_text())
TENSORS = load_file(GOLDENS / "sdxl_vae_wrapper_tiny.safetensors")
CASES = sorted(name.removeprefix("out.z_") for name in TENSORS if name.startswith("out.z_"))


def golden_vae(case):
    "The VAE of the golden file; `mb4` folds four frames at a time, `mbNone` all."
    config, size = RECORD["config"], case.removeprefix("mb")
    vae = VAE(VAEConfig(
        latent_channels=config["latent_channels"], block_out_channels=tuple(config["block_out_channels"]),
        layers_per_block=config["layers_per_block"], norm_num_groups=config["norm_num_groups"], mid_block_add_attention=True,
        scaling_factor=RECORD["wrapper_scaling_factor"], micro_batch_size=1000 if size == "None" else int(size)))
    weights = {key.removeprefix("state_dict."): value for key, value in TENSORS.items() if key.startswith("state_dict.")}
    vae.load_state_dict(weights, strict=True)
    return vae.eval(), weights


def close(value, reference):
    assert value.shape == reference.shape
    assert (value - reference).abs().max() <= 1e-4 * max(1.0, reference.abs().max().item())


@pytest.mark.parametrize("case", CASES)
def test_sampled_latents(case):
    vae, _ = golden_vae(case)
    with torch.no_grad(): close(vae.encode_pixels(TENSORS["in.x"], TENSORS[f"enc.noise_{case}"]), TENSORS[f"out.z_{case}"])


@pytest.mark.parametrize("case", [case for case in CASES if f"out.dec_{case}" in TENSORS])
def test_decoded_pixels_and_frames(case):
    vae, _ = golden_vae(case)
    with torch.no_grad(): pixels = vae.decode_pixels(TENSORS[f"out.z_{case}"])
    reference = TENSORS[f"out.dec_{case}"]
    close(pixels, reference)
    levels = ((reference * 0.5 + 0.5) * 255).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).int()
    assert (to_frames(pixels).int() - levels).abs().max() <= 1


def test_posterior():
    vae, _ = golden_vae("mbNone")
    images = TENSORS["in.x"].transpose(1, 2).flatten(0, 1)
    with torch.no_grad(): mean, std = vae.posterior(images)
    close(mean, TENSORS["enc.mean"])
    close(std, TENSORS["enc.std"])


def test_mode_is_the_scaled_mean():
    vae, _ = golden_vae("mbNone")
    with torch.no_grad(): latents = vae.encode_pixels(TENSORS["in.x"])
    mean = TENSORS["enc.mean"].unflatten(0, (len(latents), -1)).transpose(1, 2)
    close(latents, mean * RECORD["wrapper_scaling_factor"])


def test_plain_diffusers_keys_load_too():
    vae, weights = golden_vae("mbNone")
    fresh = VAE(vae.config)
    fresh.load_state_dict({key.removeprefix("module."): value for key, value in weights.items()}, strict=True)
    assert all(torch.equal(fresh.state_dict()[key], value) for key, value in weights.items())


@pytest.mark.parametrize("preset", ["coffee_128", "square_1280"])
def test_keys_and_shapes_of_the_real_size(preset):
    shapes = json.loads((GOLDENS / "shapes_sdxl_vae.json").read_text())["shapes"]
    with torch.device("meta"): vae = VAE(load_preset(preset).vae)
    own = {key: list(value.shape) for key, value in vae.state_dict().items()}
    assert own == {f"module.{key}": shape for key, shape in shapes.items()}
    assert vae.config.scaling_factor == 0.13025 and vae.config.micro_batch_size == 64
