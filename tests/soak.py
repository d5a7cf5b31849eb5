"""kill -9 every stage at random moments, resume, and compare with a run that nobody touched.

    python tests/soak.py --kills 20                       # all stages, about an hour on two cores
    python tests/soak.py --kills 3 --stages grpo reward   # some of them

Not part of the test suite, which kills one stage once (`test_cluster.py`). Every run is the real command in its own process,
at a size at which a step takes milliseconds. A run that ends before it has been killed often enough is followed by another. What
is compared: weights, trajectories and verdicts, byte for byte; metrics.jsonl and the ledger, without the numbers that measure time
or memory.
"""
import argparse
import json
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
from wmpo_nb.collect import _fingerprint, batched
from wmpo_nb.dream import Dream
from wmpo_nb.policy import OpenVLAOFT, load_policy
from wmpo_nb.presets import Preset, load_preset, seeds_for
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
STAGES = {"sft": {"sft.steps": 120, "sft.checkpoint_every": 20}, "vae": {"vae_training.steps": 300, "vae_training.checkpoint_every": 20},
            "world_model": {"pretraining.steps": 200, "pretraining.checkpoint_every": 20},
            "alignment": {"alignment.steps": 200, "alignment.checkpoint_every": 20},
            "reward": {"reward_pretraining.steps": 200, "reward_pretraining.checkpoint_every": 20},
            "grpo": {"grpo.iterations": 7, "grpo.groups": 3, "grpo.group_size": 4, "grpo.draw_multiple": 5, "grpo.mini_batch": 6,
                     "grpo.micro_batch": 2, "grpo.max_draws": 10},
          "collect": {"collect.trajectories": 160}, "evaluate": {"evaluation.states": 96},
          # a random policy lifts nothing: all groups are kept, and only the weight decay moves the weights
          "baseline_grpo": {"collect.trajectories": 36, "grpo.groups": 2, "grpo.group_size": 4, "grpo.mini_batch": 4, "grpo.micro_batch": 2,
                            "grpo.accuracy_low": 0.0, "grpo.accuracy_high": 1.0},
          "baseline_dpo": {"collect.trajectories": 48, "grpo.mini_batch": 8, "grpo.micro_batch": 2}}
MEASURED = ("frames_per_second", "memory_mb", "seconds")
KEPT = ("*.safetensors", "*.tar", "evaluations.json", "evaluation.md", "variants.json", "done.json")


def small_preset(stage: str | None = None) -> Preset:
    return load_preset("tiny_lift", {name: str(value) for name, value in (SMALL | STAGES.get(stage, {})).items()})


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
    cache_dreams(folder, replace(dreamt, success=dreamt.score >= judge.config.threshold))


def cache_dreams(folder: Path, batch):
    "Dreams, half of them successes, where `wmpo-baseline dpo` looks for the real trials it would otherwise collect."
    preset = small_preset("baseline_dpo")
    cache = folder / "cache" / _fingerprint(load_policy(folder / "policy", preset), preset, 0, "collection")
    for i, seeds in enumerate(batched(seeds_for("collection", len(batch), 0), 32)):
        write_shard(cache / f"{seeds[0]}_{len(seeds)}.tar", batch[32 * i:32 * i + len(seeds)])


def command(stage: str, parts: Path, output: Path) -> list[str]:
    "The command of `stage` on the `parts`."
    data, vae, stats = ["--data", parts / "data"], ["--vae", parts / "vae.safetensors"], ["--stats", parts / "stats.json"]
    module, own = {
        "sft": ("sft", data), "vae": ("vae", data), "world_model": ("alignment", [*data, *vae, *stats]),
        "alignment": ("alignment", [*data, *vae, *stats, "--align", parts / "world_model.safetensors"]), "reward": ("reward", data),
        "grpo": ("wmpo", [*data, *vae, "--policy", parts / "policy", "--world-model", parts / "world_model.safetensors",
                          "--reward", parts / "reward.safetensors", "--save-every", 3]),
        "collect": ("collect", ["--policy", parts / "policy", "--workers", 0]),
        "evaluate": ("evaluation", ["--policy", parts / "policy", "--baseline", parts / "policy"]),
        "baseline_grpo": ("baselines", ["grpo", "--policy", parts / "policy", "--workers", 0, "--selection", 8]),
        "baseline_dpo": ("baselines", ["dpo", "--policy", parts / "policy", "--cache", parts / "cache", "--epochs", 12, "--rates", 0.1, 0.01,
                                       "--workers", 0, "--selection", 8])}[stage]
    fields = [word for name, value in (SMALL | STAGES[stage]).items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", f"wmpo_nb.{module}", *map(str, own), "--output", str(output), *map(str, fields)]


def start(words: list[str]) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(words: list[str]):
    process = start(words)
    errors = process.communicate()[1]
    if process.returncode: raise RuntimeError(f"exit code {process.returncode}: {errors[-2000:]}")


def end_early(words: list[str], output: Path, delay: float, how=signal.SIGKILL, sign="config.json") -> int | None:
    "Start, wait `delay` seconds from the moment that it writes the file `sign`, and send the signal; the exit code, None if it was over before."
    path = output / sign
    before = path.stat().st_mtime_ns if path.exists() else 0
    process = start(words)
    while process.poll() is None:
        if path.exists() and path.stat().st_mtime_ns > before: break
        time.sleep(0.02)
    time.sleep(delay)
    if process.poll() is not None and process.returncode == 0: return None
    process.send_signal(how)
    errors = process.communicate()[1]
    if process.returncode not in (-how, 0): raise RuntimeError(f"exit code {process.returncode}: {errors[-2000:]}")
    return process.returncode


def results(output: Path) -> dict:
    "What the run made: files as bytes, and the metrics and the ledger without what measures this machine."
    found = {str(path.relative_to(output)): path.read_bytes() for name in KEPT for path in sorted(output.rglob(name))}
    found["metrics"] = [{name: value for name, value in entry.items() if name not in MEASURED} for entry in read_metrics(output)]
    ledger = json.loads((output / "ledger.json").read_text())
    return found | {"ledger": {name: value for name, value in ledger.items() if name not in MEASURED}}


def killed(stage: str, parts: Path, output: Path, kills: int, longest: float, rng: random.Random) -> int:
    "One run of `stage`, killed `kills` times, each within `longest` seconds of its work, or until it is over; how often it was killed."
    words, hits = command(stage, parts, output), 0
    while hits < kills:
        resume = ["--resume"] if (output / "config.json").exists() else []
        if end_early(words + resume, output, rng.uniform(0, longest)) != -signal.SIGKILL: return hits
        hits += 1
    finish(words + (["--resume"] if (output / "config.json").exists() else []))
    return hits


def soak(stage: str, parts: Path, folder: Path, kills: int, seed: int = 0) -> int:
    "Compare an unbroken run of `stage` with runs that are killed `kills` times in all; the number of these runs."
    rng, hits, runs = random.Random(seed), 0, 0
    finish(command(stage, parts, folder / "unbroken"))
    longest = max(0.5, (time.time() - (folder / "unbroken/config.json").stat().st_mtime) / 3)
    wanted = results(folder / "unbroken")
    assert any(name.endswith((".safetensors", ".tar", "evaluations.json")) for name in wanted), f"{stage}: made nothing"
    while hits < kills:
        output = folder / f"killed_{runs}"
        hits += killed(stage, parts, output, kills - hits, longest, rng)
        runs, found = runs + 1, results(output)
        assert found.keys() == wanted.keys(), f"{stage}: other files: {sorted(found)} instead of {sorted(wanted)}"
        for name in wanted: assert found[name] == wanted[name], f"{stage}: {name} differs after {hits} kills"
    return runs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_parts(Path(folder))
        for stage in args.stages:
            began = time.perf_counter()
            runs = soak(stage, Path(folder), Path(folder) / stage, args.kills, args.seed)
            print(f"{stage}: the same result after {args.kills} kills in {runs} runs ({time.perf_counter() - began:.0f} s)", flush=True)


if __name__ == "__main__": main()
