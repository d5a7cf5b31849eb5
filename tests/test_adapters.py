"Low-rank adapters, activation checkpointing and the films of practice: what each changes, and what it must not."
from copy import deepcopy
from dataclasses import replace

import pytest
import test_policy
import test_wmpo
import test_world_model
import torch
from helpers import refusal
from PIL import Image

from wmpo_nb.policy import Adapters, OpenVLAOFT, add_adapters, adapters_off, save_trained, trained_part, whole_weights
from wmpo_nb.presets import Preset, WorldModelTrainConfig
from wmpo_nb.run import Checkpointer, Run
from wmpo_nb.training import EMA, checkpoint_blocks
from wmpo_nb.sft import main as sft_main
from wmpo_nb.sft import train_sft
from wmpo_nb.wmpo import trial_film
from wmpo_nb.world_model import train_world_model

GRPO = replace(test_wmpo.CONFIG, lora_rank=4, iterations=3, learning_rate=5e-3)
CLONE = replace(test_policy.SHORT, lora_rank=4, optimizer="adamw")


def state(module): return {key: value.clone() for key, value in module.state_dict().items()}


def base_of(adapted): return {key.replace(".base_layer", ""): value for key, value in adapted.state_dict().items() if ".lora_" not in key}


def same(one, other): return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def clone(policy, **options):
    chunks = torch.rand(12, 8, 7, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return train_sft(policy, test_policy.some_frames(12), chunks, replace(CLONE, **options))


def new_policy():
    torch.manual_seed(0)
    policy = OpenVLAOFT(test_policy.CONFIG, test_policy.STATS, "lift")
    policy.bfloat16 = False
    return policy


# --- adapters ------------------------------------------------------------------------------------------------------

def test_adapters_begin_without_effect_and_by_seed():
    plain, frames = new_policy().eval(), test_policy.some_frames(2)
    before, random = plain.action_logits(frames), torch.get_rng_state()
    adapted = add_adapters(deepcopy(plain), 4, seed=1)
    assert torch.equal(torch.get_rng_state(), random), "nobody else's random numbers change"
    assert torch.equal(adapted.action_logits(frames), before)
    assert same(state(adapted), state(add_adapters(deepcopy(plain), 4, seed=1)))
    assert not same(state(adapted), state(add_adapters(deepcopy(plain), 4, seed=2)))
    assert add_adapters(deepcopy(plain), 0).adapter_rank == 0 and trained_part(plain) is plain
    assert not adapted.language_model.lm_head.weight.requires_grad
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == Adapters(adapted).state_dict().keys()


@pytest.mark.parametrize("train", [
    lambda: (test_wmpo.new_policy(), lambda policy: test_wmpo.train(policy, config=GRPO)),
    lambda: (new_policy(), clone)], ids=["grpo", "sft"])
def test_training_changes_only_the_adapters(train):
    policy, go_on = train()
    before = state(policy)
    start = Adapters(add_adapters(deepcopy(policy), 4)).state_dict()
    go_on(policy)
    assert same(base_of(policy), before)
    ended = Adapters(policy).state_dict()
    moved = {key for key in ended if not torch.equal(ended[key], start[key])}
    # the last block of a featurizer is never computed
    computed = {key for key in ended if f"blocks.{len(policy.vision_backbone.featurizer.blocks) - 1}." not in key}
    assert moved == computed


def test_merged_weights_say_the_same(tmp_path):
    policy, frames = clone(new_policy(), learning_rate=1e-2).eval(), test_policy.some_frames(2)
    with adapters_off(policy): base = policy.action_logits(frames)
    trained = policy.action_logits(frames)
    assert (trained - base).abs().max() > 1e-2, "nothing was learnt"
    new_policy().save_pretrained(tmp_path / "start")
    save_trained(tmp_path / "trained", policy, tmp_path / "start")
    loaded = OpenVLAOFT.from_pretrained(tmp_path / "trained").eval()
    loaded.bfloat16 = False
    assert loaded.state_dict().keys() == new_policy().state_dict().keys() == whole_weights(policy).keys()
    torch.testing.assert_close(loaded.action_logits(frames), trained, atol=1e-4, rtol=1e-4)


def test_the_start_policy_is_the_policy_without_adapters():
    policy, frames, tokens = new_policy().eval(), test_policy.some_frames(2), torch.full((2, 56), 300)
    before = policy.log_probs(frames, tokens, 1.0)
    clone(policy, learning_rate=1e-2).eval()
    with adapters_off(policy): off = policy.log_probs(frames, tokens, 1.0)
    assert torch.equal(off, before) and not torch.equal(policy.log_probs(frames, tokens, 1.0), before)
    history = []
    test_wmpo.train(test_wmpo.new_policy(), config=GRPO, log=lambda i, **numbers: history.append(numbers["start_kl"]))
    assert history[0] == pytest.approx(0, abs=1e-6) and history[-1] > 1e-6


@pytest.mark.parametrize("stage", ["grpo", "sft"])
def test_a_resumed_run_ends_with_the_same_adapters(stage, tmp_path):
    def go(steps, folder):
        checkpointer = folder and Checkpointer(folder, 1)
        if stage == "grpo":
            return test_wmpo.train(test_wmpo.new_policy(), config=replace(GRPO, iterations=steps, validate_every=1), checkpointer=checkpointer)
        chunks = torch.rand(12, 8, 7, generator=torch.Generator().manual_seed(1)) * 2 - 1
        config = replace(CLONE, steps=steps, warmup_steps=0, decay_steps=0)
        return train_sft(new_policy(), test_policy.some_frames(12), chunks, config, checkpointer=checkpointer)
    unbroken = go(3, None)
    go(2, tmp_path)
    torch.manual_seed(99)
    assert same(state(go(3, tmp_path)), state(unbroken))
    saved = torch.load(sorted(tmp_path.glob("step_*"))[-1] / "state.pt", weights_only=True)["objects"]
    assert all(".lora_" in key for key in saved["policy"]) and len(saved["policy"]) == len(Adapters(unbroken).state_dict())
    if stage == "sft": assert all(".lora_" in key for key in saved["ema"]["average"])


def test_an_average_of_adapters_is_as_small_as_they_are():
    policy = add_adapters(new_policy(), 4)
    average = EMA(trained_part(policy), 0.9)
    assert average.average.keys() == Adapters(policy).state_dict().keys()
    average.copy_to(trained_part(policy))


def test_adapters_want_a_policy_to_begin_with(capsys, tmp_path):
    assert "--start" in refusal(sft_main, capsys, "--data", str(tmp_path), "--sft.lora_rank", "4", "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# --- activation checkpointing --------------------------------------------------------------------------------------

def kept_and_gradients(module, loss):
    "Bytes kept for the backward pass, the loss, and the gradients of `loss(module)`."
    kept = {}
    def note(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor): value = loss(module)
    value.backward()
    size = sum(nbytes for storage, nbytes in kept.items() if storage not in weights)
    return size, value.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make, loss", [
    (new_policy, lambda policy: policy.log_probs(test_policy.some_frames(4), torch.full((4, 56), 300), 1.0).mean()),
    (lambda: add_adapters(new_policy(), 4), lambda policy: policy.log_probs(test_policy.some_frames(4), torch.full((4, 56), 300), 1.0).mean()),
    (lambda: test_world_model.small_world_model(),
     lambda model: model.loss(*test_world_model.windows(4, 0), torch.Generator().manual_seed(0)))], ids=["policy", "adapters", "world model"])
def test_checkpointing_changes_the_memory_and_nothing_else(make, loss):
    torch.manual_seed(3)
    plain = make()
    with torch.no_grad():
        for p in plain.parameters(): p.add_(0.02 * torch.randn_like(p))        # zeros would hide gradients
    frugal = checkpoint_blocks(checkpoint_blocks(deepcopy(plain)))             # twice is once
    assert frugal.state_dict().keys() == plain.state_dict().keys()
    (much, one, gradients), (little, other, recomputed) = kept_and_gradients(plain, loss), kept_and_gradients(frugal, loss)
    assert torch.equal(one, other) and same(gradients, recomputed)
    assert little < 0.8 * much


def test_the_field_reaches_every_training(monkeypatch):
    calls = []
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *arguments, **options: calls.append(1) or original(*arguments, **options))
    frugal = {"activation_checkpointing": True}
    results = []
    for fields in ({}, frugal):
        sample = lambda generator, count: test_world_model.windows(count, int(torch.randint(99, (), generator=generator)))
        flow = WorldModelTrainConfig(batch_size=2, steps=2, warmup_steps=0, decay_steps=0, optimizer="adamw", **fields)
        results.append([
            state(test_wmpo.train(test_wmpo.new_policy(), config=replace(test_wmpo.CONFIG, iterations=1, **fields))),
            state(clone(new_policy(), lora_rank=0, **fields)),
            state(train_world_model(test_world_model.small_world_model(), sample, flow, seed=0))])
        assert bool(calls) == bool(fields)
    for one, other in zip(*results): assert same(one, other)


# --- films ---------------------------------------------------------------------------------------------------------

def test_practice_is_filmed_every_so_many_iterations(tmp_path):
    def practise(iterations, resume=False, **fields):
        run = Run(tmp_path / "run", Preset(), "test", resume=resume)
        test_wmpo.train(test_wmpo.new_policy(), config=replace(test_wmpo.CONFIG, iterations=iterations, **fields), run=run,
                        checkpointer=Checkpointer(tmp_path / "checkpoints", 1))
        run.close()
        return sorted(path.name for path in (tmp_path / "run").glob("videos/*"))
    assert practise(1, videos_every=0) == []
    assert practise(4, resume=True, videos_every=3) == ["grpo_000003.gif"]
    with Image.open(tmp_path / "run/videos/grpo_000003.gif") as film:
        assert film.size == (4 * 20, 20) and film.n_frames > 1                  # four siblings of 16 pixels and their frames
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "run/tensorboard/grpo"))
    events.Reload()
    assert [event.step for event in events.Images("film")] == [3]


def test_a_film_tells_success_from_failure():
    batch, _ = test_wmpo.collected()
    pictures = trial_film(batch[:4])
    assert len(pictures) == batch.frames.shape[1] and pictures[0].shape == (20, 80, 3)
    for i, success in enumerate(batch.success[:4].tolist()):
        assert pictures[-1][0, 20 * i].tolist() == ([0, 160, 0] if success else [200, 0, 0])
    assert (pictures[0][2:18, 2:18] == batch.frames[0, 0].numpy()).all()
    assert len(trial_film(batch[:4], longest=2)) == 2 and trial_film(batch[:2], side=8)[0].shape == (12, 24, 3)
