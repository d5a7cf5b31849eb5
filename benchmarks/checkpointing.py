"""What activation checkpointing saves: memory of one forward and backward pass with and without it, side by side in one run.

    python benchmarks/checkpointing.py
    python benchmarks/checkpointing.py --machine "one core of a laptop"

`tiny_lift` with the networks four times as deep, because memory that blocks share out is what is at stake; batches as in training.
Memory is what PyTorch allocates beside weights and gradients, at its peak, by its own profiler.
"""
import argparse
import time

import torch
from torch.profiler import ProfilerActivity, profile

from wmpo_nb.alignment import make_world_model
from wmpo_nb.policy import OpenVLAOFT, action_ids
from wmpo_nb.presets import load_preset
from wmpo_nb.training import checkpoint_blocks
from wmpo_nb.trajectory import ActionStats

DEEP = {"policy.num_layers": "16", "policy.vision_depths": "[16]", "stdit.depth": "16"}


def policy_case(preset):
    "The policy and the loss of one forward pass of `wmpo-train`: the chunks of `micro_batch` trajectories."
    frames = torch.zeros(preset.grpo.micro_batch * preset.task.chunks, 64, 64, 3, dtype=torch.uint8)
    policy = OpenVLAOFT(preset.policy, ActionStats.from_actions(torch.rand(50, 7) * 2 - 1), "lift")
    return policy, lambda: policy.log_probs(frames, torch.full((len(frames), 56), action_ids(policy.config).start), 1.0).mean()


def world_model_case(preset):
    "The world model and the loss of one batch of windows."
    model, count = make_world_model(preset), preset.pretraining.batch_size
    latents, actions = torch.randn(count, 4, 12, 16, 16), torch.randn(count, 8, preset.stdit.action_dim)
    return model, lambda: model.loss(latents, actions, torch.Generator().manual_seed(0))


def peak(events) -> float:
    "The most that was allocated at a time, MB, by the profiler's events."
    now = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 1e6


def measure(case, preset, enabled: bool) -> float:
    "MB at the peak of a forward and backward pass."
    torch.manual_seed(0)
    module, loss = case(preset)
    checkpoint_blocks(module.train(), enabled)
    loss().backward()                                  # the gradients are there from now on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: loss().backward()
    return peak(prof.profiler.kineto_results.events())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="", help="the machine, in words, for the table")
    args = parser.parse_args()
    preset = load_preset("tiny_lift", DEEP)
    for name, case in (("policy", policy_case), ("world model", world_model_case)):
        for enabled in (False, True):
            memory = measure(case, preset, enabled)
            print(f"| {time.strftime('%Y-%m-%d')} | {args.machine} | {name} | {'yes' if enabled else 'no'} | {memory:.0f} |", flush=True)


if __name__ == "__main__": main()
