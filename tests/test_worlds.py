"One loop, two worlds: the simulator and the dream behind the same three methods, with the shipped networks."
import subprocess
import sys
import textwrap
from copy import copy
from dataclasses import fields, replace

import pytest
import torch

from wmpo_nb import dream as dream_room
from wmpo_nb.alignment import LatentWindows, load_world_model, make_world_model, save_world_model
from wmpo_nb.collect import _fingerprint, gather_trajectories
from wmpo_nb.demo import Parts
from wmpo_nb.from_scratch import shipped_weights
from wmpo_nb.dream import Dream
from wmpo_nb.evaluation import agreement, replay
from wmpo_nb.policy import OpenVLAOFT
from wmpo_nb.presets import UserError, load_preset, seeds_for
from wmpo_nb.reward import judge
from wmpo_nb.run import Run
from wmpo_nb.simulator import Simulator, initial_states
from wmpo_nb.training import fast_precision
from wmpo_nb.trajectory import ActionStats, Streams, TrajectoryBatch, rollout, states_for

PRESET = load_preset("tiny_lift")
CHUNKS = 3


@pytest.fixture(scope="module")
def parts(): return Parts(shipped_weights(PRESET), PRESET)


@pytest.fixture(scope="module")
def dream(parts): return Dream(parts.world_model(), parts.vae, parts.classifier(), parts.stats)


@pytest.fixture(scope="module")
def simulator():
    with Simulator(PRESET.task, 0) as world: yield world


@pytest.fixture(scope="module")
def states(simulator): return initial_states(simulator, seeds_for("selection", 2))


@pytest.mark.parametrize("name", ["simulator", "dream"])
def test_the_same_loop_runs_in_both(name, request, parts, states):
    world = request.getfixturevalue(name)
    batch = rollout(parts.base, world, states, chunks=CHUNKS, group_size=2, temperature=1.6, seed=3)
    assert batch.frames.shape == (4, 8 * CHUNKS + 1, 64, 64, 3) and batch.frames.dtype == torch.uint8
    assert batch.actions.shape == (4, 8 * CHUNKS, 7) and batch.tokens.shape == (4, CHUNKS, 56) == batch.log_probs.shape
    assert batch.success.dtype == torch.bool and batch.finish_step.dtype == torch.int64
    assert (batch.finish_step <= batch.length).all() and batch.state_id.tolist() == [states[0].state_id] * 2 + [states[1].state_id] * 2
    # both begin with the same picture, and siblings part
    assert torch.equal(batch.frames[::2, 0], torch.stack([s.frame for s in states]))
    assert not torch.equal(batch.actions[0], batch.actions[1])


@pytest.mark.parametrize("name", ["simulator", "dream"])
def test_same_seed_same_trajectories(name, request, parts, states):
    world = request.getfixturevalue(name)
    one, two = (rollout(parts.base, world, states, chunks=2, temperature=1.6, seed=4) for _ in range(2))
    for f in fields(TrajectoryBatch): assert torch.equal(getattr(one, f.name), getattr(two, f.name)), f.name


def test_dreaming_takes_no_simulator_step(parts, dream, states):
    before = Simulator.steps
    rollout(parts.base, dream, states, chunks=2, temperature=1.6)
    assert Simulator.steps == before


def test_a_dream_needs_no_simulator_at_all(tmp_path, states):
    "In a process where importing MuJoCo or robosuite fails, the dream still runs."
    torch.save(torch.stack([s.frame for s in states]), tmp_path / "frames.pt")
    code = textwrap.dedent(f"""
        import sys
        sys.modules['mujoco'] = sys.modules['robosuite'] = None
        import torch
        from wmpo_nb.demo import Parts
        from wmpo_nb.from_scratch import shipped_weights
        from wmpo_nb.dream import Dream
        from wmpo_nb.presets import Preset
        from wmpo_nb.trajectory import InitialState, rollout
        parts = Parts(shipped_weights(Preset()), Preset())
        dream = Dream(parts.world_model(), parts.vae, parts.classifier(), parts.stats)
        frames = torch.load(r'{tmp_path / "frames.pt"}', weights_only=True)
        batch = rollout(parts.base, dream, [InitialState(i, f) for i, f in enumerate(frames)], chunks=2)
        assert batch.frames.shape[1] == 17
    """)
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_verdict_while_dreaming_is_the_verdict_afterwards(parts, dream, states):
    "Chunk by chunk or over the whole film: the same success and the same step (threshold low, so that some succeed)."
    threshold = dream.classifier.config.threshold
    try:
        dream.classifier.config = type(dream.classifier.config)(**{**vars(dream.classifier.config), "threshold": 0.02})
        batch = rollout(parts.base, dream, states, chunks=4, group_size=4, temperature=1.6, seed=5)
        success, finish = judge(dream.classifier, batch.frames, batch.length)
    finally:
        dream.classifier.config = type(dream.classifier.config)(**{**vars(dream.classifier.config), "threshold": threshold})
    assert torch.equal(success, batch.success)
    assert torch.equal(finish[success], batch.finish_step[success])


@pytest.mark.parametrize("counts", [True, False])
def test_only_the_very_last_clip_may_not_count(parts, dream, states, monkeypatch, counts):
    "Upstream ignores the clip that ends with the video, not those that end with an earlier chunk."
    monkeypatch.setattr(dream.classifier, "config", replace(dream.classifier.config, threshold=0.5, last_clip_counts=counts))
    for at in (16, 32):
        def only_the_clip_at(classifier, frames, length, ends):
            first = dream.seen.shape[1] - frames.shape[1]          # a dream hands over no frame that it need not
            return (first + ends == at + 1).float().expand(len(frames), -1)
        monkeypatch.setattr(dream_room, "trajectory_scores", only_the_clip_at)
        batch = rollout(parts.base, dream, states, chunks=4)
        assert batch.success.tolist() == [counts or at == 16] * len(states) and batch.finish_step.tolist() == [at] * len(states)


def scored(dream, monkeypatch, scores):
    "Let clips that end in frame t score `scores[t]`, others 0. Returns a list of the frames in which the clips end that are scored."
    ended = []
    def trajectory_scores(classifier, frames, length, ends):
        assert (ends >= classifier.config.clip_length).all()        # each clip lies within the frames that are handed over
        last = (dream.seen.shape[1] - frames.shape[1] + ends - 1).tolist()
        ended.extend(last)
        return torch.tensor([scores.get(t, 0.0) for t in last]).expand(len(frames), -1)
    monkeypatch.setattr(dream_room, "trajectory_scores", trajectory_scores)
    monkeypatch.setattr(dream.classifier, "config", replace(dream.classifier.config, threshold=0.5))
    return ended


def test_each_clip_of_a_dream_is_scored_once(parts, dream, states, monkeypatch):
    ended = scored(dream, monkeypatch, {})
    rollout(parts.base, dream, states, chunks=4)
    assert ended == list(range(7, 33))


def test_a_verdict_has_the_highest_score_and_the_whole_chunk(parts, dream, states, monkeypatch):
    "The chunk in which success is seen was dreamt to its end; the highest score may be of an earlier chunk."
    scored(dream, monkeypatch, {8: 0.4, 9: 0.1, 13: 0.1})
    failure = rollout(parts.base, dream, states, chunks=3)
    assert torch.equal(failure.score, torch.full((2,), 0.4)) and failure.length.tolist() == [24, 24] and not failure.success.any()
    scored(dream, monkeypatch, {8: 0.4, 13: 0.9})
    success = rollout(parts.base, dream, states, chunks=3)
    assert success.finish_step.tolist() == [13, 13] and success.length.tolist() == [16, 16] and success.success.all()


def test_a_dream_begins_with_the_most_likely_latents_of_its_first_frame(dream, states):
    first = dream.reset(states, Streams(0, [0, 1], [0, 0]))
    with fast_precision(dream.device): expected = dream.vae.encode(first)
    assert torch.equal(dream.context, expected.expand_as(dream.context))


def test_a_dream_keeps_its_own_noise_when_another_has_ended(dream, states, monkeypatch):
    heard, imagine = [], Dream.imagine
    monkeypatch.setattr(Dream, "imagine", lambda self, running, actions, noise: heard.append(noise) or imagine(self, running, actions, noise))
    dream.reset(states, Streams(0, [0, 1], [0, 0]))
    dream.finish[0] = 5
    dream.step(torch.zeros(2, 8, 7))
    assert torch.equal(heard[0], Streams(0, [0, 1], [0, 0]).normal(heard[0].shape[1:])[1:])


def test_a_finished_dream_is_not_continued(dream, states):
    dream.reset(states, Streams(0, [0, 1], [0, 0]))
    dream.step(torch.zeros(2, 8, 7))
    dream.finish[0] = 5
    count = Dream.frames
    frames = dream.step(torch.zeros(2, 8, 7))
    assert Dream.frames - count == 8
    assert (frames[0] == frames[0, :1]).all() and not (frames[1] == frames[1, :1]).all()


def test_fate_of_one_dream_does_not_change_another(dream, states):
    "The second dream is the same whether or not the first has finished."
    seen = []
    for finish in (0, 5):
        dream.reset(states, Streams(0, [0, 1], [0, 0]))
        dream.finish[0] = finish
        seen.append(dream.step(torch.zeros(2, 8, 7))[1].int())
    assert (seen[0] - seen[1]).abs().float().mean() < 1.0     # bf16 products may round differently with the batch size


def test_context_is_never_encoded_again(parts, dream, states):
    "The context of the second chunk is the first chunk's own latents."
    dream.reset(states, Streams(0, [0, 1], [0, 0]))
    calls, encode = [], dream.vae.encode
    dream.vae.encode = lambda *a, **k: calls.append(1) or encode(*a, **k)
    try:
        for _ in range(2): dream.step(torch.zeros(2, 8, 7))
    finally: del dream.vae.encode
    assert not calls and dream.context.shape[2] == PRESET.world_model.context_frames


def test_replaying_in_the_simulator_is_reality(parts, simulator, states):
    "The open-loop comparison has no error of its own: reality replayed is reality."
    real = rollout(parts.base, simulator, states, chunks=CHUNKS, temperature=1.0, seed=6)
    again = replay(simulator, real)
    assert torch.equal(again.frames, real.frames) and torch.equal(again.success, real.success)
    assert agreement(real, again).psnr[1] == 100


def test_a_dream_is_told_what_training_windows_are(parts, states, monkeypatch):
    preset = load_preset("tiny_lift", {"world_model.action_history": "2", "stdit.action_dim": "28"})
    world_model, told = make_world_model(preset), []
    imagine = type(world_model).imagine
    monkeypatch.setattr(type(world_model), "imagine", lambda self, context, actions, *rest: told.append(actions) or imagine(self, context, actions, *rest))
    world = Dream(world_model, parts.vae, parts.classifier(), parts.stats)
    world.reset(states, Streams(0, [state.state_id for state in states], [0] * len(states)))
    actions = torch.rand(len(states), 16, 7) * 2 - 1
    for chunk in actions.split(8, 1): world.step(chunk)
    windows = LatentWindows(torch.zeros(len(states), 17, 4, 2, 2), parts.stats.normalize(actions), torch.tensor([16, 16]), preset.world_model)
    assert len(told) == 2
    for start, seen in zip((0, 8), told):
        want = windows.at(torch.tensor([[b, start] for b in range(len(states))]))[1]
        assert want.shape == (len(states), 8, 28) and torch.allclose(seen, want, atol=1e-6)


def test_sizes_that_do_not_agree_are_refused(tmp_path):
    with pytest.raises(UserError, match="stdit.action_dim 28, not 7"):
        make_world_model(load_preset("tiny_lift", {"world_model.action_history": "2", "stdit.action_dim": "7"}))
    told = load_preset("tiny_lift", {"world_model.action_history": "2", "stdit.action_dim": "28"})
    save_world_model(tmp_path / "told.safetensors", make_world_model(told))
    assert load_world_model(tmp_path / "told.safetensors", told.world_model).config == told.world_model
    with pytest.raises(UserError, match="trained with world_model.action_history 2, not 0"):
        load_world_model(tmp_path / "told.safetensors", replace(told.world_model, action_history=0))


def test_recorded_trials_belong_to_all_that_decides_them(parts):
    "The same weights that crop their pictures otherwise, or mean other actions by their words, act otherwise."
    name = lambda policy, temperature="0.7": _fingerprint(policy, load_preset("tiny_lift", {"collect.temperature": temperature}), 6, "collection")
    crops, means = copy(parts.base), copy(parts.base)
    crops.config = replace(crops.config, center_crop=0.8)
    means.stats = replace(means.stats, q99=means.stats.q99 * 2)
    assert name(parts.base) == name(copy(parts.base))
    assert len({name(parts.base), name(crops), name(means), name(parts.base, "0.8")}) == 4


def test_trials_are_booked_once_and_a_policy_that_never_succeeds_is_said(tmp_path, capsys):
    preset = load_preset("tiny_lift", {"task.horizon": "8", "reward.first_clip_end": "8"})
    torch.manual_seed(0)
    stats = ActionStats(torch.full((7,), -1.0).double(), torch.ones(7).double(), torch.arange(7) < 6)
    policy, run = OpenVLAOFT(preset.policy, stats, "lift").eval(), Run(tmp_path / "run", preset, "test")
    for _ in range(2): batch = gather_trajectories(run, policy, tmp_path / "cache", 0, count=2)
    assert (run.ledger.real_trajectories, run.ledger.simulator_steps) == (2, int(batch.length.sum())) and not batch.success.any()
    assert "not one trial succeeds" in capsys.readouterr().err


def test_trials_are_the_states_and_dice_that_were_asked_for(parts, simulator, tmp_path):
    "Of another seed than the run's, not from the first state on, at the preset's temperature: the same as tried by hand."
    preset = load_preset("tiny_lift", {"task.horizon": "8", "reward.first_clip_end": "8", "collect.temperature": "0.7"})
    batch = gather_trajectories(Run(tmp_path / "run", preset, "test", 3), parts.base, tmp_path / "cache", 0, seed=4, first=1, count=2)
    by_hand = rollout(parts.base, simulator, states_for("collection", 3, 4)[1:], chunks=1, temperature=0.7, seed=4)
    for name in ("state_id", "tokens", "log_probs", "frames"): assert torch.equal(getattr(batch, name), getattr(by_hand, name)), name
