"""kill -9 every training stage at random moments, resume, and compare with a run that nobody touched.

    python tests/soak.py --kills 20                       # all stages, about an hour on two cores
    python tests/soak.py --kills 3 --stages grpo reward   # some of them

Not part of the test suite, which kills one stage once (`test_cluster.py`). Every run is the real command in its own process,
at a size at which a step takes milliseconds. What is compared: the final weights, byte for byte; metrics.jsonl, without the
numbers that measure time or memory; that no temporary file is left.
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_reward import trials

from wmpo_nb.alignment import make_world_model, save_world_model
from wmpo_nb.dream import Dream
from wmpo_nb.policy import OpenVLAOFT
from wmpo_nb.presets import Preset, load_preset
from wmpo_nb.reward import SuccessClassifier, save_reward
from wmpo_nb.run import read_metrics
from wmpo_nb.trajectory import ActionStats, InitialState, rollout, save_stats, write_shard
from wmpo_nb.vae import VAE, save_vae

ROOT = Path(__file__).parent.parent
SMALL = {"task.image_size": 16, "task.horizon": 24, "policy.image_size": 16, "policy.vision_dims": "[16]", "policy.vision_depths": "[3]",
         "policy.vision_heads": "[2]", "policy.hidden_size": 32, "policy.intermediate_size": 32, "policy.num_layers": 2,
         "policy.num_heads": 2, "vae.block_out_channels": "[8, 8]", "stdit.depth": 1, "stdit.hidden_size": 32, "stdit.num_heads": 2,
         "stdit.patch_size": "[1, 2, 2]", "world_model.image_size": 16, "world_model.flow_steps": 2, "reward.image_size": 16,
         "reward.hidden_size": 16, "reward.num_layers": 1, "reward.num_heads": 2, "reward.intermediate_size": 32}
# enough steps for a few seconds of work after the seconds of starting up
TRAINING = {"sft": {"sft.steps": 120, "sft.checkpoint_every": 20}, "vae": {"vae_training.steps": 300, "vae_training.checkpoint_every": 20},
            "world_model": {"pretraining.steps": 200, "pretraining.checkpoint_every": 20},
            "alignment": {"alignment.steps": 200, "alignment.checkpoint_every": 20},
            "reward": {"reward_pretraining.steps": 200, "reward_pretraining.checkpoint_every": 20},
            "grpo": {"grpo.iterations": 7, "grpo.groups": 3, "grpo.group_size": 4, "grpo.draw_multiple": 5, "grpo.mini_batch": 6,
                     "grpo.micro_batch": 2, "grpo.max_draws": 10}}
MEASURED = ("frames_per_second", "memory_mb")


def small_preset() -> Preset: return load_preset("tiny_lift", {name: str(value) for name, value in SMALL.items()})


def make_parts(folder: Path):
    "Random networks and trials for the commands to begin with. The judge's threshold lies in the middle of what it says of dreams."
    preset, stats = small_preset(), ActionStats.from_actions(torch.rand(50, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    torch.manual_seed(0)
    batch = trials(12)
    policy, world_model, vae = OpenVLAOFT(preset.policy, stats, preset.task.instruction), make_world_model(preset), VAE(preset.vae).eval()
    write_shard(folder / "data/trials.tar", batch)
    policy.save_pretrained(folder / "policy")
    save_stats(folder / "stats.json", stats, "lift")
    save_vae(folder / "vae.safetensors", vae)
    save_world_model(folder / "world_model.safetensors", world_model)
    judge = SuccessClassifier(replace(preset.reward, threshold=1.0))
    states = [InitialState(int(i), frame) for i, frame in zip(batch.state_id, batch.frames[:, 0])]
    dreamt = rollout(policy.eval(), Dream(world_model, vae, judge, stats), states, chunks=3, group_size=4, temperature=1.0)
    judge.config = replace(judge.config, threshold=float(dreamt.score.median()))
    save_reward(folder / "reward.safetensors", judge)


def command(stage: str, parts: Path, output: Path) -> list[str]:
    "The command of `stage` on the `parts`."
    data, vae, stats = ["--data", parts / "data"], ["--vae", parts / "vae.safetensors"], ["--stats", parts / "stats.json"]
    module, own = {
        "sft": ("sft", data), "vae": ("vae", data), "world_model": ("alignment", [*data, *vae, *stats]),
        "alignment": ("alignment", [*data, *vae, *stats, "--align", parts / "world_model.safetensors"]), "reward": ("reward", data),
        "grpo": ("wmpo", [*data, *vae, "--policy", parts / "policy", "--world-model", parts / "world_model.safetensors",
                          "--reward", parts / "reward.safetensors"])}[stage]
    fields = [word for name, value in (SMALL | TRAINING[stage]).items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", f"wmpo_nb.{module}", *map(str, own), "--output", str(output), *map(str, fields)]


def start(words: list[str]) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(words: list[str]):
    process = start(words)
    errors = process.communicate()[1]
    if process.returncode: raise RuntimeError(f"exit code {process.returncode}: {errors[-2000:]}")


def end_early(words: list[str], output: Path, delay: float, how=signal.SIGKILL) -> int | None:
    "Start, wait `delay` seconds from the moment that it begins to write, and send the signal; the exit code, None if it was over before."
    before = (output / "metrics.jsonl").stat().st_mtime_ns if (output / "metrics.jsonl").exists() else 0
    process = start(words)
    while process.poll() is None:
        path = output / "metrics.jsonl"
        if path.exists() and path.stat().st_mtime_ns > before: break
        time.sleep(0.02)
    time.sleep(delay)
    if process.poll() is not None and process.returncode == 0: return None
    process.send_signal(how)
    errors = process.communicate()[1]
    if process.returncode not in (-how, 0): raise RuntimeError(f"exit code {process.returncode}: {errors[-2000:]}")
    return process.returncode


def results(output: Path) -> tuple[dict, list]:
    "Final weights as bytes by file, and the metrics that do not measure this machine."
    files = {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*.safetensors"))}
    return files, [{name: value for name, value in entry.items() if name not in MEASURED} for entry in read_metrics(output)]


def soak(stage: str, parts: Path, folder: Path, kills: int, seed: int = 0) -> int:
    "Compare an unbroken run of `stage` with one killed `kills` times; the number of kills that hit a running process."
    rng, hits = random.Random(seed), 0
    began = time.perf_counter()
    finish(command(stage, parts, folder / "unbroken"))
    longest = max(0.5, (time.perf_counter() - began) / 4)
    for kill in range(kills):
        resume = ["--resume"] if (folder / "killed/config.json").exists() else []
        hits += end_early(command(stage, parts, folder / "killed") + resume, folder / "killed", rng.uniform(0, longest)) is not None
        if not list((folder / "killed").glob("checkpoints/step_*")): continue
    finish(command(stage, parts, folder / "killed") + ["--resume"])
    (unbroken, entries), (killed, others) = results(folder / "unbroken"), results(folder / "killed")
    assert unbroken and unbroken.keys() == killed.keys(), f"{stage}: other files: {sorted(killed)} instead of {sorted(unbroken)}"
    assert unbroken == killed, f"{stage}: weights differ after {hits} kills"
    assert entries == others, f"{stage}: metrics differ after {hits} kills"
    left = [str(path) for path in (folder / "killed").rglob("*.tmp")]
    return hits if not left else hits + 0 * print(f"{stage}: left by a kill, removed by the next save: {left}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--stages", nargs="+", choices=TRAINING, default=list(TRAINING))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_parts(Path(folder))
        for stage in args.stages:
            began = time.perf_counter()
            hits = soak(stage, Path(folder), Path(folder) / stage, args.kills, args.seed)
            print(f"{stage}: the same weights and metrics after {hits} kills ({time.perf_counter() - began:.0f} s)", flush=True)


if __name__ == "__main__": main()
