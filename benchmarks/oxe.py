"""How fast robot videos become windows: windows per second for each worker, and processor seconds for each window.

    python benchmarks/oxe.py                                         # miniatures made here, 1 and 2 workers
    python benchmarks/oxe.py --workers 1 2 4 8 --data oxe            # the mixture on the hub
    python benchmarks/oxe.py --machine "8 x H100, 96 cores" --append benchmarks/oxe.md

A window is 12 frames, resized to the preset's size, with its actions. The numbers are those of the best round, and files are in the
disk's cache. Processor seconds are the better number on a machine that others use, too.
"""
import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from wmpo_nb.oxe import Conventions, Mixture, Source, WindowStream, find_sources, write_dataset
from wmpo_nb.presets import load_preset

# name: size of the pictures, codec, version of the format
MINIATURES = {"256 x 256, H.264, v2.1": ((256, 256), "libx264", "v2.1"), "256 x 256, AV1, v3.0": ((256, 256), "libsvtav1", "v3.0"),
              "480 x 640, H.264, v2.1": ((480, 640), "libx264", "v2.1")}


def make(folder, size, codec, version, episodes=4, steps=60):
    "A data set of a textured picture that slides past."
    random = np.random.default_rng(0)
    picture = np.kron(random.integers(0, 255, (size[0] // 8, size[1] // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    frames = np.stack([np.roll(picture, 3 * t, 1) for t in range(steps)])
    write_dataset(folder, [(frames, random.normal(size=(steps, 7)).astype(np.float32)) for _ in range(episodes)], 10, version=version, codec=codec)
    return [Source(str(folder))]


def measure(mixture, workers: int, batch_size: int, batches: int, rounds: int) -> tuple[float, float]:
    "(windows per second, processor seconds per window), best of `rounds`."
    stream, best, cost = WindowStream(mixture, batch_size, seed=0, workers=workers), float("inf"), float("inf")
    for _ in range(stream.ahead + 1): stream.next()                          # reading ahead has begun, caches are warm
    for _ in range(rounds):
        since, used = time.perf_counter(), time.process_time()
        for _ in range(batches): stream.next()
        best, cost = min(best, time.perf_counter() - since), min(cost, time.process_time() - used)
    stream.close()
    return batch_size * batches / best, cost / (batch_size * batches)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", metavar="PATH", help="data sets, as for wmpo-train-world-model (default: miniatures made here)")
    parser.add_argument("--preset", default="coffee_128", help="size of the windows (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=4, help="windows of a batch (default: %(default)s, those of one GPU in the paper)")
    parser.add_argument("--batches", type=int, default=8, help="in each round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--machine", default="", help="the machine, in words, for the table")
    parser.add_argument("--append", type=Path, metavar="FILE", help="add the lines to the table at the end of this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    preset, rows = load_preset(args.preset), []
    with tempfile.TemporaryDirectory() as folder:
        if args.data: found = {" ".join(args.data): find_sources(args.data)}
        else: found = {name: make(Path(folder) / str(i), *how) for i, (name, how) in enumerate(MINIATURES.items())}
        for name, sources in found.items():
            mixture = Mixture(sources, preset, Conventions())
            for workers in args.workers:
                speed, cost = measure(mixture, workers, args.batch_size, args.batches, args.rounds)
                rows.append(f"| {time.strftime('%Y-%m-%d')} | {args.machine} | {name} | {workers} | {speed:.1f} | {speed / workers:.1f} | {1000 * cost:.0f} |")
                print(rows[-1], flush=True)
    if args.append: args.append.write_text(args.append.read_text().rstrip("\n") + "\n" + "\n".join(rows) + "\n")


if __name__ == "__main__": main()
