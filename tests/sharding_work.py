"What `test_sharding.py` runs in processes that share one copy of the policy: `sharding_work.py FOLDER work`, then `between` and `resume`."
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import cluster_work
import test_policy
import test_wmpo

from wmpo_nb.policy import OpenVLAOFT
from wmpo_nb.presets import UserError
from wmpo_nb.processes import is_sharded, place, processes, start_processes
from wmpo_nb.run import Checkpointer
from wmpo_nb.sft import train_sft

FRUGAL = {"lora_rank": 4, "activation_checkpointing": True, "learning_rate": 2e-3}


def clone(folder, steps, **fields):
    "A few steps of `train_sft` with checkpoints in `folder`; the policy. `fields` of the configuration are replaced."
    torch.manual_seed(0)
    policy = OpenVLAOFT(test_policy.CONFIG, test_policy.STATS, "lift")
    policy.bfloat16 = False
    chunks = torch.rand(12, 8, 7, generator=torch.Generator().manual_seed(1)) * 2 - 1
    config = replace(test_policy.SHORT, batch_size=8, **cluster_work.ADAM | {"steps": steps, "decay_steps": 0} | fields)
    return train_sft(policy, test_policy.some_frames(12), chunks, config, checkpointer=Checkpointer(folder, 1))


def numbers_held(policy) -> tuple[int, int]:
    "How many of the weights this process holds, and how many there are."
    return sum(p.to_local().numel() if is_sharded(p) else p.numel() for p in policy.parameters()), sum(p.numel() for p in policy.parameters())


def held_between() -> tuple[int, int]:
    "`numbers_held` after a forward pass, before the backward one."
    policy = place(start_processes(), test_wmpo.new_policy())
    policy.action_logits(test_policy.some_frames(2))
    return numbers_held(policy)


def work(folder: Path) -> dict:
    accelerator = start_processes()
    found = {"processes": processes()[1], "held": numbers_held(place(accelerator, test_wmpo.new_policy())), "history": [], "between": held_between(),
             "exam": cluster_work.examine(place(accelerator, test_wmpo.new_policy()))}
    found["policy"] = cluster_work.practise(folder / "whole", 3, found["history"])
    cluster_work.practise_in_part(folder / "part")
    found["resumed"] = cluster_work.practise(folder / "part", 3)
    found["adapters"] = cluster_work.practise(folder / "adapters", 2, **FRUGAL)
    for name, learn in (("online", cluster_work.spend), ("dpo", cluster_work.prefer)):
        found[name] = learn(folder / name)
        try: learn(folder / f"{name}_part", stop=1)
        except KeyboardInterrupt: found[f"{name}_resumed"] = learn(folder / f"{name}_part")
    fields = {"decay_steps": 0, "activation_checkpointing": True}
    found["world_model"] = cluster_work.dream(folder / "world_model", save=folder / "world_model.safetensors", **fields)
    cluster_work.dream(folder / "world_model_part", steps=2, **fields)
    found["world_model_resumed"] = cluster_work.dream(folder / "world_model_part", **fields)
    policy = clone(folder / "sft", 4)
    found["sft"] = cluster_work.weights(policy)
    policy.save_pretrained(folder / "policy")
    clone(folder / "sft_part", 2)
    found["sft_resumed"] = cluster_work.weights(clone(folder / "sft_part", 4))
    try: clone(folder / "muon", 1, optimizer="muon")
    except UserError as error: found["muon"] = str(error)
    return found


def between(folder: Path) -> dict:
    "The same with weights that stay gathered between the two passes."
    return {"between": held_between(), "policy": cluster_work.practise(folder / "between", 3)}


def resume(folder: Path) -> dict:
    "What other processes read from the checkpoints of `work`, and where they arrive an iteration later."
    return {"read": cluster_work.practise(folder / "part", 3), "longer": cluster_work.practise(folder / "part", 4)}


def damaged(folder: Path) -> dict:
    "Go on where one slice file of the last checkpoint is cut, and where both are."
    found = {"skipped": cluster_work.weights(clone(folder / "last", 4))}
    try: clone(folder / "all", 4)
    except UserError as error: found["refused"] = str(error)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {"work": work, "between": between, "resume": resume, "damaged": damaged}[sys.argv[2]](folder)
    torch.save(found, folder / f"found_{os.environ.get('RANK', '0')}.pt")
