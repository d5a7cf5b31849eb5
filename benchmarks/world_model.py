"""World-model training throughput: windows per second of variants, measured turn by turn in one process.

    python benchmarks/world_model.py                   # every variant, one thread
    python benchmarks/world_model.py --threads 2 --rounds 8

Machines are shared and noisy, so the variants take turns and the table gives each one's best step and its ratio to the
first. What a variant changes is in `VARIANTS`; everything else is the preset `tiny_lift`.
"""
import argparse
import statistics
import time

import torch
from accelerate import Accelerator

from wmpo_nb.alignment import make_world_model
from wmpo_nb.presets import load_preset
from wmpo_nb.training import EMA, fast_precision, make_optimizer, train_step

VARIANTS = {
    "as shipped: bfloat16, Muon, hidden 128": {},
    "float32": {"precision": False},
    "AdamW instead of Muon": {"pretraining.optimizer": "adamw"},
    "torch.compile": {"compile": True},
    "hidden 192 (6 heads)": {"stdit.hidden_size": 192, "stdit.num_heads": 6},
    "64 tokens a frame (patch 2)": {"stdit.patch_size": "[1, 2, 2]"},
}


def stepper(options: dict):
    "A function that makes one training step of the variant and returns its windows per second."
    options = dict(options)
    precision, compiled = options.pop("precision", True), options.pop("compile", False)
    preset = load_preset("tiny_lift", {name: str(value) for name, value in options.items()})
    config, size = preset.pretraining, preset.task.image_size // 4
    torch.manual_seed(0)
    world_model, generator = make_world_model(preset).train(), torch.Generator().manual_seed(0)
    if compiled: world_model.stdit.compile()
    accelerator = Accelerator()
    model, optimizer = accelerator.prepare(world_model, make_optimizer(world_model.named_parameters(), config))
    ema = EMA(world_model, config.ema)
    latents = torch.randn(config.batch_size, preset.stdit.in_channels, 12, size, size, generator=generator)
    actions = torch.randn(config.batch_size, 8, preset.stdit.action_dim, generator=generator)

    def step() -> float:
        since = time.perf_counter()
        def loss_of(latents, actions):
            with fast_precision("cpu", precision): return {"loss": model(latents, actions, generator)}
        train_step(accelerator, loss_of, (latents, actions), model, optimizer, config.warmup_steps, config)
        ema.update(world_model)
        return config.batch_size / (time.perf_counter() - since)
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="measured steps of each variant (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps = {name: stepper(options) for name, options in VARIANTS.items()}
    for step in steps.values(): step(), step()                       # allocate, compile
    rates = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items(): rates[name].append(step())
    first = max(next(iter(rates.values())))
    print("| variant | windows per second: best | median | best, ratio to the first |\n|---|---|---|---|")
    for name, seen in rates.items():
        print(f"| {name} | {max(seen):.1f} | {statistics.median(seen):.1f} | {max(seen) / first:.2f} |")


if __name__ == "__main__": main()
