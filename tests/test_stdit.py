"Properties of STDiT that carry the method: causality, the exact context cache, which weights are alive."
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from wmpo_nb.presets import STDiTConfig
from wmpo_nb.stdit import RotaryEmbedding, STDiT, _Normalise, attend, causal_mask, fused, position_embedding

SIZE = (64, 64)
SMALL = STDiTConfig(depth=2, hidden_size=48, num_heads=4, in_channels=4, patch_size=(1, 2, 2))


def awake(config=SMALL, seed=0):
    "An STDiT whose temporal half is not the identity it is initialised to."
    torch.manual_seed(seed)
    model = STDiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad: parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs(config=SMALL, batch=2, context=4, chunk=8, side=(8, 8), seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.in_channels, context + chunk, *side, generator=generator)
    actions = torch.randn(batch, chunk, config.action_dim, generator=generator)
    timestep = 1000 * torch.rand(batch, generator=generator)
    x_mask = (torch.arange(context + chunk) >= context).expand(batch, -1)
    return x, timestep, actions, x_mask, SIZE


@pytest.mark.parametrize("j", range(8))
@torch.no_grad()
def test_an_action_changes_its_own_frame_and_later_ones_only(j):
    model, (x, timestep, actions, x_mask, size) = awake(), inputs()
    changed = actions.clone()
    changed[:, j] += 1
    before, after = (model(x, timestep, a, x_mask, size) for a in (actions, changed))
    assert torch.equal(before[:, :, :4 + j], after[:, :, :4 + j])
    assert all(not torch.allclose(before[:, :, f], after[:, :, f], atol=1e-4) for f in range(4 + j, 12))


@torch.no_grad()
def test_no_action_and_no_noise_reaches_the_context_in_any_block():
    model, (x, timestep, actions, x_mask, size) = awake(), inputs()
    other = torch.cat([x[:, :, :4], torch.randn_like(x[:, :, 4:])], 2)
    runs = []
    for latents, t, a in ((x, timestep, actions), (other, timestep / 2, actions + 1)):
        seen = []
        hooks = [b.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
                 for b in [*model.spatial_blocks, *model.temporal_blocks]]
        model(latents, t, a, x_mask, size)
        for hook in hooks: hook.remove()
        runs.append(seen)
    for one, two in zip(*runs):
        assert torch.equal(one[:, :4], two[:, :4])
        assert not torch.allclose(one[:, 4:], two[:, 4:], atol=1e-3)


@pytest.mark.parametrize("frame", [5, 8, 11])
@torch.no_grad()
def test_noise_of_a_frame_never_changes_earlier_frames(frame):
    model, (x, timestep, actions, x_mask, size) = awake(), inputs()
    changed = x.clone()
    changed[:, :, frame] += 1
    before, after = (model(latents, timestep, actions, x_mask, size) for latents in (x, changed))
    assert torch.equal(before[:, :, :frame], after[:, :, :frame])
    assert not torch.allclose(before[:, :, frame:], after[:, :, frame:], atol=1e-3)


@pytest.mark.parametrize("config, shape", [
    (SMALL, dict()),
    (replace(SMALL, depth=3, num_heads=2, in_channels=8), dict(batch=3)),
    (SMALL, dict(context=2, chunk=3, side=(6, 10))),
    (replace(SMALL, patch_size=(1, 1, 1)), dict(context=1, chunk=5, side=(4, 4))),
    (replace(SMALL, context_timestep=15.0, bf16_positions=True), dict(side=(5, 7))),
])
@torch.no_grad()
def test_cached_context_gives_the_same_output(config, shape):
    model, (x, timestep, actions, x_mask, size) = awake(config), inputs(config, **shape)
    context = int((~x_mask[0]).sum())
    plain = model(x, timestep, actions, x_mask, size)[:, :, context:]
    cache = model.encode_context(x[:, :, :context], size)
    cached = model.denoise(x[:, :, context:], timestep, actions, cache, size)
    assert cached.shape == plain.shape
    assert (cached - plain).abs().max() <= 1e-5 * max(1, plain.abs().max())


def test_which_weights_are_alive():
    "`none_action` gets a zero gradient, the text weights and RoPE none, all others a non-zero one."
    model = awake(replace(SMALL, text_weights=True, caption_channels=8))
    model(*inputs())[:, :4, 4:].square().mean().backward()
    for name, parameter in model.named_parameters():
        dead = any(part in name for part in ("cross_attn", "y_embedder", "fps_embedder", "rope"))
        if dead: assert parameter.grad is None, name
        elif "none_action" in name: assert parameter.grad.abs().max() == 0
        else: assert parameter.grad.abs().max() > 0, name


def test_normalise_has_the_gradient_autograd_gives():
    x, weight = torch.randn(5, 3, 2, 8, requires_grad=True), torch.rand(2, 8, requires_grad=True)
    grad = torch.randn(5, 3, 2, 8)
    plain = weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    ours = _Normalise.apply(x, weight)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(torch.autograd.grad(ours, (x, weight), grad), torch.autograd.grad(plain, (x, weight), grad)):
        torch.testing.assert_close(a, b)


def test_rotary_embedding_makes_scores_depend_on_the_distance_only():
    rope = RotaryEmbedding(16)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    score = lambda i, j: (rope(q, i) * rope(k, j)).sum()
    torch.testing.assert_close(score(7, 3), score(4, 0), atol=1e-4, rtol=1e-4)
    assert (score(7, 3) - score(7, 4)).abs() > 1e-3


def test_position_embedding_puts_the_column_first():
    grid = position_embedding(2, 3, 16, scale=0.5).unflatten(0, (2, 3))
    assert torch.equal(grid[0, :, :8], grid[1, :, :8]) and torch.equal(grid[:, 0, 8:], grid[:, 2, 8:])
    assert not torch.equal(grid[0, 0, :8], grid[0, 1, :8]) and not torch.equal(grid[0, 0, 8:], grid[1, 0, 8:])


def test_causal_mask_of_a_cached_chunk_is_the_end_of_the_full_one():
    assert torch.equal(causal_mask(8, 12), causal_mask(12, 12)[4:])


def test_attend_equals_torch():
    q, k, v = torch.randn(3, 2, 3, 5, 8)
    reference = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attend(q * 8**-0.5, k, v, causal_mask(5, 5)), reference)


@torch.no_grad()
def test_bf16_positions_round_the_timestep():
    "bfloat16 has 8 bits: between 512 and 1024 only multiples of 4 exist."
    x, _, actions, x_mask, size = inputs()
    run = lambda model, t: model(x, torch.full((2,), t), actions, x_mask, size)
    rounded, exact = awake(replace(SMALL, bf16_positions=True)), awake()
    assert torch.equal(run(rounded, 600.0), run(rounded, 601.0))
    assert not torch.equal(run(exact, 600.0), run(exact, 601.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.no_grad()
def test_cuda_attention_path_agrees():
    model, args = awake(), inputs()
    reference = model(*args)
    on_device = model.cuda()(*[a.cuda() if torch.is_tensor(a) else a for a in args])
    torch.testing.assert_close(on_device.cpu(), reference, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("axes", [(3,), (2, 3), (2, 2, 3)])
def test_what_runs_on_a_gpu_is_the_same_attention_by_a_fused_kernel(axes):
    q, k, v = (torch.randn(*axes, 4, tokens, 16) for tokens in (6, 9, 9))
    torch.testing.assert_close(fused(q, k, v, causal_mask(6, 9)), attend(q, k, v, causal_mask(6, 9)))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION): fused(q, k, v)            # refuses what it cannot take, five axes for one
