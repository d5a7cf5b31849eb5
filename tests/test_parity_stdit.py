"STDiT against numbers computed by the published implementation, and its keys against those of the real size."
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from wmpo_nb.presets import STDiTConfig, load_preset
from wmpo_nb.stdit import STDiT

GOLDENS = Path(os.environ.get("WMPO_GOLDENS", Path(__file__).parent / "goldens"))
RECORD = json.loads((GOLDENS / "world_model_stdit_tiny.json").read_text())
TENSORS = load_file(GOLDENS / "world_model_stdit_tiny.safetensors")


def read(prefix):
    "The tensors whose names start with `prefix`, without it."
    return {key.removeprefix(prefix): value for key, value in TENSORS.items() if key.startswith(prefix)}


def golden_config(text_weights=True):
    "The STDiTConfig of the golden file. The constant 15 is written into upstream's forward pass."
    names = ("depth", "hidden_size", "num_heads", "mlp_ratio", "in_channels", "action_dim", "caption_channels",
             "model_max_length", "input_sq_size")
    known = {name: RECORD["config"][name] for name in names if name in RECORD["config"]}
    patch_size = tuple(RECORD["config"]["patch_size"])
    return STDiTConfig(patch_size=patch_size, context_timestep=15.0, text_weights=text_weights, **known)


def golden_stdit(text_weights=True):
    model = STDiT(golden_config(text_weights))
    weights = read("state_dict.")
    if not text_weights: weights = {key: weights[key] for key in model.state_dict()}
    model.load_state_dict(weights, strict=True)
    return model


def case_inputs(case):
    given = read(f"in.{case}.")
    size = float(given["height"][0]), float(given["width"][0])
    return given["x"], given["timestep"], given["y"], given["x_mask"].bool(), size


def assert_close(ours, reference, tolerance=1e-4):
    limit = tolerance * max(1.0, reference.abs().max().item())
    assert (ours.reshape(reference.shape) - reference).abs().max().item() <= limit


@pytest.mark.parametrize("text_weights", [True, False])
@pytest.mark.parametrize("case", list(RECORD["cases"]))
def test_output(case, text_weights):
    with torch.no_grad(): ours = golden_stdit(text_weights)(*case_inputs(case))
    assert_close(ours, TENSORS[f"out.{case}"])


@pytest.mark.parametrize("case", [c for c in RECORD["cases"] if f"mid.{c}.x_embed" in TENSORS])
@torch.no_grad()
def test_every_stored_intermediate(case):
    model, (x, timestep, actions, x_mask, size) = golden_stdit(), case_inputs(case)
    reference = read(f"mid.{case}.")

    def check(name, ours):
        if name in reference: assert_close(ours, reference[name])
    tokens, conditioning = model.embed(x, size), model.conditioning(timestep, actions, x_mask)
    assert_close(model.x_embedder(x), reference["x_embed"])
    assert_close((tokens - model.x_embedder(x))[0, 0], reference["pos_emb"])
    assert_close(model.action_embedder(actions, x.shape[2])[:len(x)], reference["action_embedding"])
    check("t_emb", conditioning.t)
    check("t0_emb", conditioning.t_context.expand(len(x), -1, -1))
    for i, (spatial, temporal) in enumerate(zip(model.spatial_blocks, model.temporal_blocks)):
        tokens = spatial(tokens, conditioning.spatial)
        check(f"spatial_{i}", tokens)
        tokens, _ = temporal(tokens, conditioning.temporal, model.rope)
        check(f"temporal_{i}", tokens)
    check("final_layer", model.final_layer(tokens, conditioning.t, conditioning.t_context, conditioning.generated))


def test_gradients():
    "The dead weights get no gradient, `none_action` gets zeros, every other norm agrees."
    model = golden_stdit()
    loss = model(*case_inputs("train"))[:, :RECORD["config"]["in_channels"]].square().mean()
    assert_close(loss, TENSORS["out.train_loss_first4_sq_mean"])
    loss.backward()
    parameters = dict(model.named_parameters())
    for name, norm in RECORD["grad_norms_train_first4_sq_mean"].items():
        if norm is None: assert parameters[name].grad is None, name
        else: assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), name


def test_autocast_stays_close():
    "In bfloat16 the outputs keep about two digits."
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): ours = golden_stdit()(*case_inputs("train"))
    reference = TENSORS["out.train"]
    assert ((ours.float() - reference).norm() / reference.norm()).item() < 0.03


def test_keys_at_the_papers_size():
    "Every key and shape of the released checkpoints, on the meta device."
    with torch.device("meta"): model = STDiT(load_preset("coffee_128").stdit)
    reference = json.loads((GOLDENS / "shapes_world_model_stdit_xl2.json").read_text())
    shapes = reference.get("shapes") or reference.get("tensors")
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == shapes
    assert [name for name, _ in model.named_buffers()] == reference["buffers"]
    assert sum(value.numel() for value in model.state_dict().values()) == reference["total_numel"]
