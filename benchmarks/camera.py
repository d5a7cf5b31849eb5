"""Which camera shows whether a grasp will hold? A question of minutes, to ask before hours of training.

    python benchmarks/camera.py                        # about 20 minutes on one core
    python benchmarks/camera.py --states 300 --steps 200

The hand is moved over the table, the cube is put anywhere within 3.5 cm of the point between the fingers, the fingers close
for three steps, the hand rises for seven, and robosuite says whether the cube came along. Every camera photographs the hand
before and after closing. A small convolutional network then learns, for each camera, to tell the outcome from one picture; its
balanced accuracy on states it has not seen is what the picture shows. A world model that dreams in these pictures cannot
know better.
"""
import argparse

import numpy as np
import torch
from torch import nn

from wmpo_nb.presets import TaskConfig
from wmpo_nb.run import progress
from wmpo_nb.simulator import Environment

# name: (views, shadows); a view is (position, target, fovy). Of two views each gives the middle half of its rows.
FRONT, SIDE = ((0.60, 0.0, 0.95), (0, 0, 0.868), 31.4), ((0.0, 0.60, 0.95), (0, 0, 0.868), 31.4)
CAMERAS = {
    "front, 35 degrees up": ([((0.46, 0.0, 1.20), (0, 0, 0.87), 32.0)], False),
    "the same, with shadows": ([((0.46, 0.0, 1.20), (0, 0, 0.87), 32.0)], True),
    "28 degrees aside, 35 up, shadows": ([((0.46, 0.24, 1.25), (0, 0, 0.885), 30.0)], True),
    "45 degrees aside, 11 up, shadows": ([((0.42, 0.42, 0.98), (0, 0, 0.86), 28.0)], True),
    "front, 9 degrees up": ([FRONT], False),
    "side, 9 degrees up": ([SIDE], False),
    "straight down": ([((0.02, 0.0, 1.45), (0, 0, 0.82), 28.0)], False),
    "front and side, half a frame each": ([FRONT, SIDE], False),
}


def picture(env: Environment, views: list, shadows: bool) -> np.ndarray:
    "uint8 [64, 64, 3]; of two views the middle rows."
    import mujoco
    env.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = shadows
    frames = []
    for view in views:
        env.views = [view]
        frames.append(env.frame())
    quarter = len(frames[0]) // 4
    return frames[0] if len(frames) == 1 else np.concatenate([frame[quarter:-quarter] for frame in frames])


def photographs(env: Environment) -> np.ndarray: return np.stack([picture(env, *camera) for camera in CAMERAS.values()])


def hand_somewhere(env: Environment, rng) -> tuple:
    "Move the open hand low over the table; its snapshot and position, metres."
    env.reset(int(rng.integers(1_000_000)))
    target = np.array([*rng.uniform(-0.08, 0.08, 2), 0.822 + rng.uniform(-0.006, 0.03)])
    put_cube(env, 0.3, 0.3)                                      # out of the way
    for _ in range(16):
        action, distance = env.move_towards(target, 0.0, -1)
        env.step(action)
        if distance < 0.008: break
    return env.snapshot(), env.data.site_xpos[env.robot.eef_site_id].copy()


def put_cube(env: Environment, x: float, y: float):
    first, last = env.env.sim.model.get_joint_qpos_addr("cube_joint0")
    env.data.qpos[first:last] = [x, y, 0.8225, 1, 0, 0, 0]
    env.env.sim.forward()


def grasp(env: Environment, hand, rng) -> tuple:
    "Photographs before and after closing [cameras, 64, 64, 3] and whether the cube came along."
    put_cube(env, *(hand[:2] + rng.uniform(-0.035, 0.035, 2)))
    before = photographs(env)
    for _ in range(3): env.step([0, 0, 0, 0, 0, 0, 1])
    after = photographs(env)
    for _ in range(7): env.step([0, 0, 0.6, 0, 0, 0, 1])
    return before, after, env.success()


def make_states(count: int, seed: int, tries: int = 12) -> tuple:
    "Photographs [count, 2, cameras, 64, 64, 3] and outcomes bool [count]; `tries` cubes for each place of the hand."
    rng, env = np.random.default_rng(seed), Environment(TaskConfig(draw_arm=False, shadows=True))
    rows = []
    for _ in progress(range(-(-count // tries)), "grasps"):
        start, hand = hand_somewhere(env, rng)
        for _ in range(tries):
            env.restore(start)
            rows.append(grasp(env, hand, rng))
    before, after, success = zip(*rows[:count])
    return np.stack([np.stack(before), np.stack(after)], 1), np.array(success)


def network() -> nn.Module:
    layers, widths = [], (3, 24, 32, 48, 64)
    for i, o in zip(widths, widths[1:]): layers += [nn.Conv2d(i, o, 5 if i == 3 else 3, 2, 2 if i == 3 else 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 64), nn.ReLU(), nn.Linear(64, 1))


def balanced_accuracy(said: torch.Tensor, truth: torch.Tensor) -> float:
    return ((said[truth].float().mean() + (~said[~truth]).float().mean()) / 2).item()


def visible(pictures: np.ndarray, success: np.ndarray, steps: int, seed: int = 0) -> float:
    "Balanced accuracy of a network that sees one picture, trained on three quarters of the states, on the others."
    torch.manual_seed(seed)
    images, truth = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(success)
    cut = len(truth) * 3 // 4 // 12 * 12                         # no place of the hand on both sides
    images = (images - images[:cut].mean((0, 2, 3), keepdim=True)) / images[:cut].std((0, 2, 3), keepdim=True).clamp(min=1e-3)
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        chosen, shift = torch.randint(cut, (48,)), torch.randint(-3, 4, (2,)).tolist()
        logits = net(images[chosen].roll(shift, (2, 3)))[:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(logits, truth[chosen].float())
        optimizer.zero_grad(); loss.backward(); optimizer.step(); schedule.step()
    net.eval()
    with torch.no_grad(): return balanced_accuracy(net(images[cut:])[:, 0] > 0, truth[cut:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, default=1300)
    parser.add_argument("--steps", type=int, default=400, help="of training, for each network")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.states < 200: parser.error("fewer than 200 states say nothing")
    torch.set_num_threads(1)
    pictures, success = make_states(args.states, args.seed)
    print(f"{len(success)} grasps, {success.mean():.0%} hold\n\n| camera | before closing | after closing |\n|---|---|---|")
    for i, name in enumerate(CAMERAS):
        scores = [100 * visible(pictures[:, k, i], success, args.steps) for k in (0, 1)]
        print(f"| {name} | {scores[0]:.0f} % | {scores[1]:.0f} % |", flush=True)


if __name__ == "__main__": main()
