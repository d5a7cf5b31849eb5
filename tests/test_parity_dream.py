"A whole imagined rollout against the published implementation's: contexts, sampler, the frame the policy sees, the film."
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from test_parity_stdit import golden_stdit
from test_parity_vae import CASES, golden_vae
from wmpo_nb.dream import Dream
from wmpo_nb.presets import RewardConfig, WorldModelConfig
from wmpo_nb.reward import SuccessClassifier
from wmpo_nb.trajectory import ActionStats
from wmpo_nb.vae import to_pixels
from wmpo_nb.world_model import WorldModel

GOLDENS = Path(os.environ.get("WMPO_GOLDENS", Path(__file__).parent / "goldens"))
RECORD = json.loads((GOLDENS / "imagined_rollout_tiny.json").read_text())
TENSORS = load_file(GOLDENS / "imagined_rollout_tiny.safetensors")


def golden_dream():
    "The dream made of the golden networks, which takes actions as they are; asleep in front of the golden pictures."
    config = WorldModelConfig(flow_steps=RECORD["config"]["steps"], image_size=RECORD["size_info"]["height"], context_noise=15.0, timestep_shift=1.0)
    vae = golden_vae(CASES[-1])[0]
    dream = Dream(WorldModel(config, golden_stdit()), vae, SuccessClassifier(RewardConfig()), ActionStats(-torch.ones(7), torch.ones(7), torch.ones(7).bool()))
    first = TENSORS["in.init_images_u8"].repeat_interleave(RECORD["config"]["repeat"], 0)
    # the released code draws the first latent from the encoder's distribution
    with torch.no_grad(): latents = vae.encode_pixels(to_pixels(first[:, None]), TENSORS["in.vae_encode_noise"])
    dream.context, dream.acted = latents.repeat(1, 1, config.context_frames, 1, 1), torch.zeros(len(first), 0, 7)
    return dream, first


def test_imagined_rollout(monkeypatch):
    monkeypatch.setenv("WMPO_PRECISION", "fp32")        # the golden's; a CPU with fast bfloat16 would round
    dream, first = golden_dream()
    running, film = torch.arange(len(first)), [first[:, None]]
    for chunk, (actions, noise) in enumerate(zip(TENSORS["in.normalized_actions"], TENSORS["in.z_noise"])):
        context, generated = TENSORS["mid.context_latents"][chunk], TENSORS["mid.sample_out"][chunk][:, :, dream.context.shape[2]:]
        assert (dream.context - context).abs().max() <= 1e-4 * max(1, context.abs().max().item())
        actions = actions.view(len(first), -1, 7)
        dream.acted = torch.cat([dream.acted, actions], 1)
        film.append(dream.imagine(running, actions, noise))
        latents = dream.context[:, :, -generated.shape[2]:]
        assert (latents - generated[:, :, -latents.shape[2]:]).abs().max() <= 1e-4 * max(1, generated.abs().max().item())
        shown = TENSORS["mid.frame_shown_to_policy_u8"][chunk].int()
        assert (film[-2][:, -1].int() - shown).abs().max() <= 1
    assert (torch.cat(film, 1).int() - TENSORS["out.video_u8"].int()).abs().max() <= 1
