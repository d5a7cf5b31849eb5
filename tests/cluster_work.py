"A little of every training stage, run by `test_cluster.py` in one process and in two: `cluster_work.py FOLDER`."
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import test_policy
import test_reward
import test_vae
import test_wmpo
import test_world_model

from wmpo_nb.alignment import save_world_model
from wmpo_nb.baselines import train_dpo, train_online
from wmpo_nb.evaluation import evaluate
from wmpo_nb.policy import OpenVLAOFT
from wmpo_nb.presets import WorldModelTrainConfig
from wmpo_nb.reward import train_reward
from wmpo_nb.processes import is_sharded, processes, start_processes, wait_for_all
from wmpo_nb.run import Checkpointer
from wmpo_nb.sft import train_sft
from wmpo_nb.trajectory import rollout
from wmpo_nb.vae import reconstruct_shards, train_vae
from wmpo_nb.wmpo import gather, train_wmpo
from wmpo_nb.world_model import train_world_model

# rounds of six states for three groups: some rounds leave groups over, which wait
GRPO = replace(test_wmpo.CONFIG, iterations=3, validate_every=3, groups=3, rollout_groups=1, draw_multiple=6, mini_batch=6, micro_batch=1, learning_rate=2e-4)
SHORT = {"steps": 4, "warmup_steps": 1, "decay_steps": 1, "log_every": 1, "learning_rate": 2e-4}
# Muon makes matrices orthogonal in bfloat16 and turns the last bit of a sum into a difference one can see: not compared here
ADAM = {"optimizer": "adamw"} | SHORT


def weights(module):
    "All weights as one vector float32, of a sharded network too."
    values = [value.full_tensor() if is_sharded(value) else value for value in module.state_dict().values()]
    return torch.cat([value.detach().float().flatten() for value in values])


def practise(folder, iterations, history=None, stop=None, **fields):
    """GRPO in the bandit, with checkpoints in `folder`; the policy's weights. `fields` of `GRPO` are replaced. Fails in the iteration
    `stop`, when those before it are saved."""
    policy = test_wmpo.new_policy()
    def log(iteration, **numbers):
        if history is not None: history.append(numbers)
        if iteration == stop: raise KeyboardInterrupt
    train_wmpo(policy, test_wmpo.Brightness(), test_wmpo.STATES, replace(GRPO, iterations=iterations, **fields), chunks=2, temperature=1.0,
               checkpointer=Checkpointer(folder, 1), log=log)
    return weights(policy)


def practise_in_part(folder):
    "Two of three iterations."
    try: practise(folder, 3, stop=2)
    except KeyboardInterrupt: pass


def spend(folder, history=None, stop=None):
    "Online GRPO with 60 trials of the bandit, with checkpoints in `folder`; the policy's weights. Fails after the iteration `stop`."
    policy = test_wmpo.new_policy()
    def log(iteration, **numbers):
        if history is not None: history.append(numbers)
        if iteration == stop: raise KeyboardInterrupt
    train_online(policy, test_wmpo.Brightness(), test_wmpo.STATES, GRPO, budget=60, chunks=2, temperature=1.0,
                 checkpointer=Checkpointer(folder, 1), log=log)
    return weights(policy)


def prefer(folder, stop=None):
    "DPO on trials of the bandit, as `spend`."
    policy, recorded = test_wmpo.new_policy(), rollout(test_wmpo.new_policy(), test_wmpo.Brightness(), test_wmpo.STATES, chunks=2, temperature=1.0)
    def log(step, **numbers):
        if step == stop: raise KeyboardInterrupt
    train_dpo(policy, recorded, GRPO, epochs=1, temperature=1.0, checkpointer=Checkpointer(folder, 1), log=log)
    return weights(policy)


def clone():
    torch.manual_seed(0)
    policy = OpenVLAOFT(test_policy.CONFIG, test_policy.STATS, "lift")
    policy.bfloat16 = False
    chunks = torch.rand(12, 8, 7, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return weights(train_sft(policy, test_policy.some_frames(12), chunks, replace(test_policy.SHORT, batch_size=8, **ADAM)))


def autoencode():
    # the disturbance is scaled by the spread of the part at hand, so only without it is the result the same
    config = replace(test_vae.TRAINING, latent_noise=0.0, batch_size=6, **SHORT)
    return weights(train_vae(test_vae.small_vae(), test_vae.some_frames(20, 8, 8), config))


def dream(folder=None, steps=4, save=None, **fields):
    "A few steps of `train_world_model`, with checkpoints in `folder`; the weights, also written to the file `save`. `fields` are replaced."
    sample = lambda generator, count: test_world_model.windows(count, int(torch.randint(99, (), generator=generator)))
    config = WorldModelTrainConfig(batch_size=6, **ADAM | {"steps": steps} | fields)
    checkpointer = Checkpointer(folder, 1) if folder else None
    world_model = train_world_model(test_world_model.small_world_model(), sample, config, seed=0, checkpointer=checkpointer)
    if save: save_world_model(save, world_model)
    return weights(world_model)


def judge(folder: Path):
    "Weights of a classifier that learnt from frames on disk, each process having passed a share of them through the VAE, and the frames."
    config = replace(test_reward.TRAINING, **ADAM)
    seen = reconstruct_shards(test_vae.small_vae(), test_reward.trials(), folder)
    return weights(train_reward(test_reward.small_classifier(), seen, config)), seen.frames[:]


def go_back(folder: Path) -> int:
    "The step that is restored when the second process, if there is one, cannot read the newest checkpoint."
    checkpointer, load = Checkpointer(folder, 1).register(layer=torch.nn.Linear(2, 2)), torch.load
    for step in (1, 2): checkpointer.save(step)
    wait_for_all()
    def lying(path, **options):
        if processes()[0] == 1 and "step_000002" in str(path): raise OSError("a disk that lies")
        return load(path, **options)
    torch.load = lying
    try: return checkpointer.restore()
    finally: torch.load = load


def examine(policy=None):
    "Three batches: not as many for each of two processes."
    result = evaluate(policy or test_wmpo.new_policy(), test_wmpo.Brightness(), test_wmpo.STATES, chunks=2, batch=5, temperature=1.0)
    return torch.stack([result.state_id, result.success.long(), result.finish_step])


def work(folder: Path) -> dict:
    start_processes()
    batch, numbers = gather(test_wmpo.new_policy(), test_wmpo.Brightness(), test_wmpo.STATES, GRPO, chunks=2, temperature=1.0, seed=0)
    history, spent = [], []
    found = {"policy": practise(folder / "whole", 3, history), "online": spend(folder / "online", spent), "dpo": prefer(folder / "dpo"),
             "spent": [(numbers["spent"], numbers["success"]) for numbers in spent]}
    practise_in_part(folder / "part")
    found["reward"], found["seen"] = judge(folder / "seen")
    return found | {"processes": processes()[1], "batch": vars(batch), "success": numbers["success"], "history": history,
                    "restored": go_back(folder / "lying"), "sft": clone(), "vae": autoencode(), "world_model": dream(), "evaluation": examine()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = work(Path(sys.argv[1]))
    torch.save(found, Path(sys.argv[1]) / f"found_{os.environ.get('RANK', '0')}.pt")
