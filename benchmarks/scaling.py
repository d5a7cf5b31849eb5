"""What a second process brings: imagined frames and updates per second, and memory, with 1, 2, ... processes of one machine.

    python benchmarks/scaling.py                                # 1 and 2 processes, one thread each
    python benchmarks/scaling.py --processes 1 2 4 8 --rounds 5
    python benchmarks/scaling.py --machine "8 x H100, 96 cores" --append benchmarks/README.md

Practice of `tiny_lift` with random networks: the same groups are imagined, and the same update made, whoever shares the work.
The numbers are those of the best round, on machines that are shared and noisy; memory is the most any process held.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from wmpo_nb.alignment import make_world_model
from wmpo_nb.dream import Dream
from wmpo_nb.policy import OpenVLAOFT
from wmpo_nb.presets import load_preset
from wmpo_nb.reward import SuccessClassifier
from wmpo_nb.processes import is_main, prepare, start_processes, sum_over_processes, wait_for_all
from wmpo_nb.training import make_optimizer
from wmpo_nb.trajectory import ActionStats, InitialState, TrajectoryBatch
from wmpo_nb.vae import VAE
from wmpo_nb.wmpo import _memory, try_states, update

ROOT, CHUNKS = Path(__file__).parent.parent, 2


def timed(function):
    "(seconds until all processes have done it, result)."
    wait_for_all()
    since = time.perf_counter()
    result = function()
    wait_for_all()
    return time.perf_counter() - since, result


def worker(path: str, rounds: int):
    "One of the processes: imagine and learn `rounds` times after a first one that does not count; the first writes `path`."
    accelerator, preset = start_processes(), load_preset("tiny_lift")
    torch.manual_seed(0)
    stats = ActionStats.from_actions(torch.rand(50, 7) * 2 - 1)
    policy = OpenVLAOFT(preset.policy, stats, "lift")
    parts = make_world_model(preset), VAE(preset.vae), SuccessClassifier(replace(preset.reward, threshold=1.0))
    dream = Dream(*(part.to(accelerator.device) for part in parts), stats)
    # every group counts as informative, so that the update has them all
    config = replace(preset.grpo, groups=4, group_size=4, rollout_groups=1, mini_batch=8, micro_batch=2, accuracy_low=0.0, accuracy_high=1.0)
    policy, optimizer = prepare(accelerator, policy, make_optimizer(policy.named_parameters(), config))
    states = [InitialState(i, torch.full((64, 64, 3), 60 * i, dtype=torch.uint8)) for i in range(config.groups)]
    dreaming, learning, frames = [], [], config.groups * config.group_size * CHUNKS * 8
    for _ in range(rounds + 1):
        seconds, (groups, _) = timed(lambda: try_states(policy.eval(), dream, states, config, chunks=CHUNKS, temperature=1.0, seed=0))
        dreaming.append(seconds)
        batch = TrajectoryBatch.cat(groups)
        seconds, numbers = timed(lambda: update(policy, optimizer, batch, config, temperature=1.0, accelerator=accelerator))
        learning.append(seconds / numbers["optimiser_steps"])
    memory = torch.zeros(accelerator.num_processes)
    memory[accelerator.process_index] = _memory()
    memory = sum_over_processes(memory).max().item()
    if is_main():
        Path(path).write_text(json.dumps({"frames": frames / min(dreaming[1:]), "updates": 1 / min(learning[1:]), "memory": memory}))


def measure(processes: int, rounds: int) -> dict:
    "The numbers of `worker` in so many processes, each with one thread."
    gpu = torch.cuda.is_available()
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | ({} if gpu else {"ACCELERATE_USE_CPU": "true"})
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/numbers.json"
        subprocess.run([sys.executable, *(launch if processes > 1 else []), __file__, "--worker", path, "--rounds", str(rounds)],
                       env=environment, check=True)
        return json.loads(Path(path).read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2, help="measured rounds (default: %(default)s)")
    parser.add_argument("--machine", default="", help="the machine, in words, for the table")
    parser.add_argument("--append", type=Path, metavar="FILE", help="add the lines to the table at the end of this file")
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker: return worker(args.worker, args.rounds)
    rows = []
    for processes in args.processes:
        found = measure(processes, args.rounds)
        rows.append(f"| {time.strftime('%Y-%m-%d')} | {args.machine} | {processes} | {found['frames']:.1f} | {found['updates']:.2f} | {found['memory']:.0f} |")
        print(rows[-1], flush=True)
    if args.append: args.append.write_text(args.append.read_text().rstrip("\n") + "\n" + "\n".join(rows) + "\n")


if __name__ == "__main__": main()
