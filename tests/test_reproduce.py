"""The reproducer's path in miniature: from the released tree to a trained policy and its exam, by the real commands.

The tree is the one of test_hub.py, for stack_three, and so are its server and its sizes. Every command gets the paper preset with
sizes overridden, and nothing else but the task: `stack_three_free`, which needs no MimicGen."""
import json
import shutil
import subprocess
import sys
import threading
from configparser import ConfigParser
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_hub import Hub, environment, write_policy, write_release, write_statistics

from wmpo_nb.alignment import load_world_model
from wmpo_nb.policy import load_policy
from wmpo_nb.presets import load_preset
from wmpo_nb.reward import load_reward, save_reward, trajectory_scores
from wmpo_nb.run import read_metrics
from wmpo_nb.weights import load_tensors
from wmpo_nb.simulator import Simulator, Style, script_trials
from wmpo_nb.trajectory import read_shards, rollout, write_shard
from wmpo_nb.wmpo import dream_starts
from wmpo_nb.vae import load_vae

SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(Path(__file__).parent.parent / "settings.ini")
SCRIPTS = dict(line.split("=") for line in SETTINGS["DEFAULT"]["console_scripts"].split("\n")[1:])
SIZES = {
    "task.image_size": "16", "task.horizon": "112", "task.control_hz": "10", "world_model.image_size": "16",
    "stdit.depth": "1", "stdit.hidden_size": "16", "stdit.num_heads": "2",
    "policy.image_size": "16", "policy.patch_size": "8", "policy.vision_dims": "[16, 24]", "policy.vision_depths": "[2, 2]",
    "policy.vision_heads": "[2, 2]", "policy.hidden_size": "8", "policy.intermediate_size": "16", "policy.num_layers": "1",
    "policy.num_heads": "2",
    "reward.image_size": "16", "reward.patch_size": "8", "reward.hidden_size": "16", "reward.num_layers": "1",
    "reward.num_heads": "2", "reward.intermediate_size": "32",
    "collect.trajectories": "2", "alignment.steps": "2", "alignment.batch_size": "2", "reward_training.steps": "2",
    "reward_training.batch_size": "4", "grpo.iterations": "1", "grpo.groups": "2", "grpo.mini_batch": "8", "evaluation.states": "1"}
OVERRIDES = {"task.name": "stack_three_free"} | SIZES
PRESET = load_preset("stack_three_128", OVERRIDES)
CHUNKS = PRESET.task.chunks


def add_stack_three(root):
    "What test_hub's tree has for coffee and square, for stack_three."
    checkpoints = root / "checkpoint_files"
    weights = load_tensors(checkpoints / "SFT_models/coffee")
    write_policy(checkpoints / "SFT_models/stack_three", weights)
    write_policy(checkpoints / "WMPO_models/stack_three/P_128", {key: -value for key, value in weights.items()})
    write_statistics(checkpoints / "SFT_models/stack_three/dataset_statistics.json", "stack_three")
    shutil.copytree(checkpoints / "world_models/coffee", checkpoints / "world_models/stack_three")
    for number in range(3):
        path = root / f"data_files/first_images/stack_three/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(path)


class Shell:
    "Runs the package's commands as their console scripts do, in processes of their own, and keeps what they print."
    def __init__(self, folder, endpoint): self.folder, self.environment = folder, environment(endpoint, folder)

    def __call__(self, command, *options):
        module, function = SCRIPTS[command].split(":")
        code = f"import sys; sys.argv[0] = {command!r}; from {module} import {function}; sys.exit({function}())"
        done = subprocess.run([sys.executable, "-c", code, *map(str, options)], cwd=self.folder, env=self.environment, text=True,
                              capture_output=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def stage(self, command, *options):
        "A command with the paper's preset, in small."
        sizes = [word for key, value in OVERRIDES.items() for word in (f"--{key}", value)]
        return self(command, "--preset", "stack_three_128", *sizes, "--output", command, *options)


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    root, folder = tmp_path_factory.mktemp("release"), tmp_path_factory.mktemp("work")
    write_release(root)
    add_stack_three(root)
    server = Hub({path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Shell(folder, f"http://127.0.0.1:{server.server_port}")
    server.shutdown()


def add_successes(folder):
    "A policy of random weights never builds a tower: two trials of the scripted expert give the judge what success looks like."
    with Simulator(PRESET.task, 0) as simulator: batch = script_trials(simulator, [1, 2], [Style()] * 2)
    assert batch.success.all()
    tokens = torch.zeros(2, CHUNKS, 56)
    write_shard(folder / "expert.tar", replace(batch, tokens=tokens.long(), log_probs=tokens))


def split_threshold(reward, dream, policy, states):
    "Two steps teach a judge nothing: give it the threshold that half of the dreams pass, so that siblings differ."
    dream.classifier.config = replace(dream.classifier.config, threshold=2.0)
    batch = rollout(policy, dream, states, chunks=CHUNKS, group_size=4, temperature=1.6)
    ends = torch.arange(108, batch.frames.shape[1] + 1)
    peaks = trajectory_scores(dream.classifier, batch.frames, batch.length, ends).amax(1)
    dream.classifier.config = replace(dream.classifier.config, threshold=float(peaks.median()))
    save_reward(reward, dream.classifier)


def test_from_the_released_checkpoints_to_a_trained_policy(shell):
    out = shell("wmpo-download", "--task", "stack_three", "--cache", "cache", "--parts", "sft,wmpo,pretrained,reward,vae,data")
    root = shell.folder / out.rpartition("verified in ")[2].strip()
    checkpoints = root / "checkpoint_files"
    sft, vae = checkpoints / "SFT_models/stack_three", checkpoints / "world_models/vae"
    released_reward, stats = checkpoints / "reward_models/videomae_stack_three.pth", sft / "dataset_statistics.json"

    shell.stage("wmpo-collect", "--policy", sft, "--workers", "0")
    data = shell.folder / "wmpo-collect/data"
    assert read_shards(data).frames.shape == (2, PRESET.task.horizon + 1, 16, 16, 3)
    add_successes(data)

    pretrained = checkpoints / "world_models/OpenX_pretrained"
    shell.stage("wmpo-train-world-model", "--data", data, "--vae", vae, "--stats", stats, "--align", pretrained)
    aligned = shell.folder / "wmpo-train-world-model/world_model.safetensors"
    before, after = load_world_model(pretrained, preset=PRESET, dtype=torch.float32), load_world_model(aligned)
    assert after.config.flow_steps == 30 and after.stdit.config.context_timestep == 15 and after.stdit.config.bf16_positions
    moved = {key: not torch.equal(value, before.state_dict()[key]) for key, value in after.state_dict().items()}
    assert moved["stdit.action_embedder.fc.0.weight"] and not moved["stdit.spatial_blocks.0.cross_attn.proj.weight"]

    shell.stage("wmpo-train-reward", "--data", data, "--vae", vae, "--start", released_reward)
    reward = shell.folder / "wmpo-train-reward/reward.safetensors"
    assert not (reward.parent / "seen").exists()               # the pictures it learnt from are not left behind
    judge, policy = load_reward(reward), load_policy(sft, PRESET)
    assert judge.config.first_clip_end == 108 and "f1" in read_metrics(reward.parent)[-1]
    assert not torch.equal(judge.classifier.weight, load_reward(released_reward, preset=PRESET).classifier.weight)

    from wmpo_nb.dream import Dream
    dream = Dream(load_world_model(aligned, PRESET.world_model), load_vae(vae), judge, policy.stats)
    split_threshold(reward, dream, policy, dream_starts(data))
    shell.stage("wmpo-train", "--policy", sft, "--data", data, "--world-model", aligned, "--vae", vae, "--reward", reward)
    trained, numbers = shell.folder / "wmpo-train/policy", read_metrics(shell.folder / "wmpo-train")[0]
    assert numbers["grad_norm"] > 0 and numbers["optimiser_steps"] >= 1 and 0 < numbers["success"] < 1
    new = load_policy(trained, PRESET)
    assert not torch.equal(new.projector.fc1.weight, policy.projector.fc1.weight)
    # upstream's scripts can read it: same files, same keys; and nobody's Python came along
    names = lambda folder: {path.name for path in folder.iterdir() if path.suffix == ".json" and "index" not in path.name}
    assert names(trained) == names(sft) and not list(trained.glob("*.py")) and json.loads((trained / "config.json").read_text())["model_type"] == "openvla"
    assert load_tensors(trained).keys() == load_tensors(sft).keys()

    wmpo = checkpoints / "WMPO_models/stack_three/P_128"
    table = shell.stage("wmpo-evaluate", "--policy", trained, "--baseline", wmpo, "--stats", stats)
    assert "(0/1)" in table and table.count("\n") == 4
