"""Is the dreamt hand where the real one is? Before asking why a dream misjudges a grasp, ask whether it knows where the hand went.

    python benchmarks/hand.py --data runs/scratch/data/pretraining/lift --trials runs/lift9/held_out
    python benchmarks/hand.py --data ... --trials ... --world-model runs/lift9/world_model.safetensors

Two answers to the same question, in pixels, for each camera and some steps of the trials: how far the middle of the hand in the
dream of the recorded actions is from where it really was; and how far off a small network is that never sees a picture but is
told all actions so far, trained for a minute on scripted trials. If the second is nearer than the first, the world model has
not learnt what its own inputs say. The middle of the hand is that of all pixels that differ from the empty table and are not
red, so the arm must be hidden (`task.draw_arm false`).
"""
import argparse
from pathlib import Path

import torch
from torch import nn

from wmpo_nb.alignment import load_world_model
from wmpo_nb.experiments import open_loop
from wmpo_nb.presets import load_preset
from wmpo_nb.trajectory import TrajectoryBatch, load_stats, read_shards
from wmpo_nb.vae import load_vae

STEPS = (8, 10, 12, 16, 20)
LEAST = 25                                              # pixels of the hand below which it is not in view


def red(frames): return frames[..., 0] > 1.5 * frames[..., 1]


def middles(frames: torch.Tensor, empty: torch.Tensor, views: int) -> torch.Tensor:
    "Column of the middle of the hand in uint8 frames [B, T, H, W, 3], for each view one below the other: [B, T, views], nan when unseen."
    frames = frames.float()
    hand = ((frames - empty).abs().amax(-1) > 30) & ~red(frames) & ~red(empty)
    hand = hand.unflatten(2, (views, -1)).float()
    count = hand.sum((3, 4))
    column = (hand.sum(3) * torch.arange(hand.shape[-1])).sum(3) / count.clamp(min=1)
    return column.where(count > LEAST, torch.nan)


def told(actions: torch.Tensor, step: int) -> torch.Tensor:
    "What is known at `step` from actions [B, T, 7] alone: their sums, the last three, and which step it is."
    known = torch.cat([actions[:, :step, :6].sum(1) / 4, actions[:, step - 3:step].flatten(1)], 1)
    which = nn.functional.one_hot(torch.tensor(STEPS.index(step)), len(STEPS)).expand(len(actions), -1)
    return torch.cat([known, which], 1)


def examples(batch: TrajectoryBatch, columns: torch.Tensor) -> tuple:
    "Inputs, middles [N, views] and steps [N] of all moments at which the hand is in every view."
    rows = []
    for step in STEPS:
        seen = ~columns[:, step].isnan().any(-1) & (batch.length >= step)
        rows.append((told(batch.actions[seen], step), columns[seen, step], torch.full((int(seen.sum()),), step)))
    return [torch.cat(column) for column in zip(*rows)]


def reckon(inputs: torch.Tensor, columns: torch.Tensor, steps: int = 3000):
    "A function from told numbers to the middles of the hand, learnt by the L1 loss."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(inputs.shape[1], 192), nn.SiLU(), nn.Linear(192, 192), nn.SiLU(), nn.Linear(192, columns.shape[1]))
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (256,))
        loss = (10 * net(inputs[chosen]) + 32 - columns[chosen]).abs().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step(); schedule.step()
    return lambda x: 10 * net(x).detach() + 32


def table(errors: dict) -> str:
    "errors: {name: {step: float [N, views]}} -> Markdown: median and 90th percentile of each view."
    lines = ["| pixels off: median (90 %), each view | " + " | ".join(f"step {s}" for s in STEPS) + " |", "|---" * (len(STEPS) + 1) + "|"]
    for name, by_step in errors.items():
        cells = [", ".join(f"{view.median():.1f} ({view.quantile(0.9):.1f})" for view in by_step[s].T) for s in STEPS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="scripted trials: what the small network learns from")
    parser.add_argument("--trials", required=True, type=Path, metavar="DIR", help="the policy's trials that are dreamt")
    parser.add_argument("--weights", type=Path, default=Path("wmpo_nb/weights/lift"), metavar="DIR", help="VAE, statistics and world model")
    parser.add_argument("--world-model", type=Path, metavar="FILE", help="instead of that of --weights")
    parser.add_argument("--count", type=int, default=64, help="trials to dream")
    args = parser.parse_args()
    preset = load_preset("tiny_lift")
    if preset.task.draw_arm: parser.error("the preset draws the whole arm: the middle of the hand cannot be told from it")
    views = 1 + bool(preset.task.second_camera)
    scripted, real = read_shards(args.data), read_shards(args.trials)[:args.count]
    empty = scripted.frames[:, 0].float().median(0).values
    columns = middles(real.frames, empty, views)
    inputs, truth, steps = examples(real, columns)
    net = reckon(*examples(scripted, torch.cat([middles(part.frames, empty, views) for part in
                                                (scripted[i:i + 50] for i in range(0, len(scripted), 50))]))[:2])
    off = (net(inputs) - truth).abs()
    errors = {"a small network told the actions": {s: off[steps == s] for s in STEPS}}
    stats = load_stats(args.weights / f"policy_{preset.task.name}/dataset_statistics.json")
    world_model = load_world_model(args.world_model or args.weights / "world_model.safetensors")
    dreamt = open_loop(world_model, load_vae(args.weights / "vae.safetensors"), stats, real, seed=0)
    off = (middles(dreamt, empty, views) - columns).abs()
    errors["the dream"] = {s: off[(real.length >= s) & ~off[:, s].isnan().any(-1), s] for s in STEPS}
    print(f"{len(scripted)} scripted trials, {len(real)} dreamt ones, {views} view(s)\n\n{table(errors)}")


if __name__ == "__main__": main()
