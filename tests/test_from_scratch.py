"Weights from nothing, very small: every stage runs, resumes, and leaves what a run can start from."
import shutil

import pytest
import torch
from safetensors.torch import load_file

from wmpo_nb import from_scratch
from wmpo_nb.alignment import load_world_model
from wmpo_nb.demo import Parts
from wmpo_nb.from_scratch import JoinedWindows, make_weights, shipped_weights
from wmpo_nb.presets import UserError, load_preset
from wmpo_nb.run import Run
from wmpo_nb.trajectory import read_shards
from wmpo_nb.vae import load_vae

SMALL = {"pretrain_data.tasks": '["lift", "stack"]', "sft.demonstrations": 4, "sft.steps": 3, "pretrain_data.demonstrations": 6,
         "pretrain_data.near_misses": 4, "pretrain_data.play": 2, "vae_training.steps": 3, "pretraining.steps": 3, "reward_pretraining.steps": 3}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder, preset = tmp_path_factory.mktemp("scratch"), load_preset("tiny_lift", {k: str(v) for k, v in SMALL.items()})
    run = Run(folder, preset, "test", 0)
    make_weights(run, preset, workers=2)
    return folder, preset, run


def test_what_was_made_can_be_started_from(scratch):
    folder, preset, _ = scratch
    parts = Parts(folder / "weights", preset)
    assert parts.vae.config.scaling_factor != 1.0 and parts.stats.mask.tolist() == [True] * 6 + [False]


@pytest.mark.parametrize("name", ["tiny_lift", "tiny_stack"])
def test_shipped_weights_are_those_of_the_preset(name):
    preset = load_preset(name)
    parts = Parts(shipped_weights(preset), preset)
    assert parts.base.instruction == preset.task.instruction and parts.classifier().config.threshold > 0.3


def test_a_task_without_shipped_weights_says_for_which_there_are():
    with pytest.raises(UserError, match="shipped for lift, stack, not for stack_free: name yours with --policy or --weights"):
        shipped_weights(load_preset("tiny_stack_free"))


def test_weights_are_written_small_enough_to_be_shipped(scratch):
    types = {path.name: {load_file(path)[key].dtype for key in load_file(path) if load_file(path)[key].ndim > 1}
             for path in (scratch[0] / "weights").rglob("*.safetensors")}
    assert types == {"model.safetensors": {torch.bfloat16}, "vae.safetensors": {torch.bfloat16}, "reward.safetensors": {torch.bfloat16},
                     "world_model.safetensors": {torch.int8}}


def test_data_come_from_several_tasks_and_the_right_seeds(scratch):
    folder, preset, _ = scratch
    lift, stack = (read_shards(folder / "data/pretraining" / task) for task in ("lift", "stack"))
    assert len(lift) == 12 and len(stack) == 2 + 1 + 1
    assert lift.frames.shape[1] == 33 and stack.frames.shape[1] == 49
    assert not set(lift.state_id.tolist()) & set(stack.state_id.tolist())
    assert all(2_000_000 <= s < 3_000_000 for s in lift.state_id.tolist() + stack.state_id.tolist())
    assert all(1_000_000 <= s < 2_000_000 for s in read_shards(folder / "data/demonstrations").state_id.tolist())


def test_finished_stages_are_not_repeated(scratch, monkeypatch):
    folder, preset, _ = scratch
    for name in ("make_demonstrations", "make_pretraining_data", "train_base_policy", "train_autoencoder", "pretrain_world_model",
                 "pretrain_reward"):
        monkeypatch.setattr(from_scratch, name, lambda *_: pytest.fail("repeated"))
    make_weights(Run(folder, preset, "test", 0, resume=True), preset)


def test_joined_windows_are_drawn_by_their_number():
    class Source:
        def __init__(self, value, count): self.value, self.count = value, count
        def __len__(self): return self.count
        def sample(self, generator, n, chunk_starts): return torch.full((n, 1), self.value), torch.full((n, 1), self.value)
    first, second = JoinedWindows([Source(0.0, 900), Source(1.0, 100)]).sample(torch.Generator().manual_seed(0), 4000)
    assert torch.equal(first, second) and abs(first.mean().item() - 0.1) < 0.02


def test_a_warm_start_goes_on_from_the_shipped_weights(tmp_path, scratch):
    cold, _, _ = scratch
    still = {"pretrain_data.warm_start": True, "pretrain_data.tasks": '["lift"]', "vae_training.learning_rate": 0, "pretraining.learning_rate": 0,
             "pretraining.muon_learning_rate": 0}
    run = Run(tmp_path, load_preset("tiny_lift", {k: str(v) for k, v in (SMALL | still).items()}), "test", 0)
    for name in ("data", "weights"): shutil.copytree(cold / name, tmp_path / name)
    vae, shipped = from_scratch.train_autoencoder(run, run.preset), load_vae(shipped_weights(load_preset("tiny_lift")) / "vae.safetensors")
    for part in ("encoder", "decoder"):      # not the biases between them, which centre the latents of other frames
        torch.testing.assert_close(getattr(vae.module, part).state_dict(), getattr(shipped.module, part).state_dict())
    world_model = from_scratch.pretrain_world_model(run, run.preset, vae)
    shipped = load_world_model(shipped_weights(load_preset("tiny_lift")) / "world_model.safetensors", run.preset.world_model)
    torch.testing.assert_close(world_model.state_dict(), shipped.state_dict())


def test_the_world_model_sees_the_task_that_the_policy_sees():
    preset = load_preset("tiny_lift", {"task.image_size": "32", "task.placement": "0.1", "pretrain_data.tasks": '["lift", "stack"]'})
    assert from_scratch._task_config(preset, "lift") == preset.task
    other, shipped = from_scratch._task_config(preset, "stack"), load_preset("tiny_stack").task
    assert (other.image_size, other.placement, other.horizon, other.camera_fovy) == (32, shipped.placement, shipped.horizon, shipped.camera_fovy)
