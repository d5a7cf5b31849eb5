"Intervals, tests and fidelity numbers against values known from elsewhere."
import json
import math
from dataclasses import replace

import pytest
import torch

from wmpo_nb.evaluation import (Agreement, Evaluation, agreement, evaluate, mcnemar, over_trainings, paired_difference, psnr_by_frame,
                                relative_length, replay, success_row, success_table, wilson)
from wmpo_nb.trajectory import ActionChunk, InitialState, TrajectoryBatch


@pytest.mark.parametrize("k, n, low, high", [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634),
                                             (1, 29, 0.0061, 0.1718), (81, 263, 0.2553, 0.3662)])
def test_wilson_published_values(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_of_nothing_knows_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


def paired(both, won, lost, neither):
    before = torch.tensor([True] * both + [False] * won + [True] * lost + [False] * neither)
    after = torch.tensor([True] * both + [True] * won + [False] * lost + [False] * neither)
    return before, after


@pytest.mark.parametrize("won, lost, p", [(0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (8, 0, 2 / 256), (0, 8, 2 / 256),
                                          (7, 1, 18 / 256), (12, 2, 212 / 2 ** 14)])
def test_mcnemar_by_hand(won, lost, p):
    assert mcnemar(*paired(3, won, lost, 4)) == pytest.approx(p)


def test_mcnemar_of_many_disagreements_is_finite():
    assert 0 <= mcnemar(*paired(0, 1500, 1000, 0)) < 1e-20


def test_paired_difference_published_value():
    # Newcombe 1998, Statistics in Medicine 17:2635, method 10, for (a, b, c, d) = (36, 12, 2, 0)
    assert paired_difference(*paired(36, 12, 2, 0)) == pytest.approx((0.2, 0.0569, 0.3404), abs=1e-4)


def test_alike_pairs_narrow_the_interval_by_a_corrected_correlation():
    "By hand: phi is (20 * 16 - 2 * 12 - 25) / sqrt(32 * 18 * 22 * 28) = 0.455, the Wilson intervals are 0.5014 to 0.7586 and 0.3116 to 0.5769."
    assert paired_difference(*paired(20, 12, 2, 16)) == pytest.approx((0.2, 0.0562, 0.3292), abs=1e-4)


def test_the_interval_over_trainings_is_students():
    assert over_trainings([0.1, 0.2, 0.3]) == pytest.approx((0.2 - 4.30265 * 0.1 / 3 ** 0.5, 0.2 + 4.30265 * 0.1 / 3 ** 0.5), abs=1e-5)
    assert over_trainings([0.1, 0.3]) is None


@pytest.mark.parametrize("table", [(0, 0, 0, 5), (5, 0, 0, 0), (0, 5, 0, 0), (2, 1, 1, 2)])
def test_paired_difference_is_sane_at_the_edges(table):
    difference, low, high = paired_difference(*paired(*table))
    assert -1 <= low <= difference <= high <= 1
    mirrored = paired_difference(*reversed(paired(*table)))
    assert mirrored == pytest.approx((-difference, -high, -low), abs=1e-6)


class Ramp:
    "Brightness grows by the first action number; reaching 100 is success."
    def __init__(self, drift=0.0): self.drift = drift

    def reset(self, states, streams):
        self.level = torch.tensor([float(s.state_id) for s in states])
        return self.draw()

    def draw(self): return self.level.clamp(0, 255).byte()[:, None, None, None].expand(-1, 4, 4, 3)

    def step(self, actions):
        frames = []
        for action in actions.unbind(1):
            self.level = self.level + action[:, 0] + self.drift
            frames.append(self.draw())
        return torch.stack(frames, 1)

    def judge(self, batch):
        arrived = batch.frames[:, :, 0, 0, 0] >= 100
        batch.success = arrived.any(1)
        batch.finish_step = torch.where(batch.success, arrived.int().argmax(1), batch.length)
        return batch


class Step:
    def __init__(self, size): self.size, self.temperatures = size, set()

    def act(self, frames, streams, temperature):
        self.temperatures.add(temperature)
        actions = torch.zeros(len(frames), 8, 7)
        actions[..., 0] = self.size
        return ActionChunk(torch.full((len(frames), 56), 300), torch.zeros(len(frames), 56), actions)


STATES = [InitialState(i, torch.full((4, 4, 3), i, dtype=torch.uint8)) for i in range(60, 100, 5)]


def test_evaluate_is_greedy_and_does_not_depend_on_the_batch():
    policy = Step(2.0)
    one, many = (evaluate(policy, Ramp(), STATES, chunks=2, batch=size) for size in (1, 5))
    assert policy.temperatures == {0.0}
    assert one.to_dict() == many.to_dict()
    assert one.state_id.tolist() == [s.state_id for s in STATES]
    assert one.success.tolist() == [s.state_id >= 68 for s in STATES]
    assert one.finish_step[-1] == 3                                    # 95, 97, 99, 101
    assert Evaluation.from_dict(json.loads(json.dumps(one.to_dict()))).to_dict() == one.to_dict()


def test_trials_and_replays_throw_the_dice_of_their_seed():
    from wmpo_nb.trajectory import rollout
    class Shaky(Ramp):
        def reset(self, states, streams):
            self.drift = streams.uniform(())
            return super().reset(states, streams)

    policy = Step(1.0)
    one, same, other = (evaluate(policy, Shaky(), STATES, chunks=2, batch=size, seed=seed, temperature=0.5) for size, seed in ((8, 3), (3, 3), (8, 4)))
    assert policy.temperatures == {0.5} and one.to_dict() == same.to_dict() != other.to_dict()
    real = rollout(policy, Shaky(), STATES, chunks=2, seed=3)
    assert torch.equal(replay(Shaky(), real, seed=3).frames, real.frames) and not torch.equal(replay(Shaky(), real, seed=4).frames, real.frames)


def test_relative_length_counts_successes_only():
    base = Evaluation(torch.arange(3), torch.tensor([True, True, False]), torch.tensor([10, 30, 64]))
    other = Evaluation(torch.arange(3), torch.tensor([True, False, False]), torch.tensor([10, 64, 64]))
    assert relative_length(base, other) == 50.0
    never = Evaluation(torch.arange(3), torch.zeros(3).bool(), torch.full((3,), 64))
    assert math.isnan(relative_length(base, never))


def test_table_holds_the_numbers():
    base = Evaluation(torch.arange(4), torch.tensor([True, False, False, False]), torch.full((4,), 20))
    better = Evaluation(torch.arange(4), torch.tensor([True, True, True, False]), torch.full((4,), 10))
    head, rule, first, second = success_table({"base": base, "WMPO": better}).splitlines()
    assert len({line.count("|") for line in (head, rule, first, second)}) == 1
    assert "25.0 % (1/4)" in first and "75.0 % (3/4)" in second and "+50.0 (" in second and "50 %" in second
    with pytest.raises(ValueError, match="same starts"):
        success_row("x", better, Evaluation(torch.arange(4) + 1, base.success, base.finish_step))


def trajectories(policy, world):
    from wmpo_nb.trajectory import rollout
    return rollout(policy, world, STATES, chunks=2, group_size=2)


def test_replay_repeats_a_batch_in_its_own_world():
    real = trajectories(Step(2.0), Ramp())
    again = replay(Ramp(), real)
    for name in ("frames", "actions", "tokens", "success", "finish_step", "state_id", "member"):
        assert torch.equal(getattr(real, name), getattr(again, name)), name
    perfect = agreement(real, again)
    assert perfect.balanced_accuracy == 1.0 and perfect.false_success_rate == 0.0 and set(perfect.psnr) == {100.0}


def test_kind_and_unkind_worlds_err_on_different_sides():
    real = trajectories(Step(2.0), Ramp())
    kind, unkind = (agreement(real, replay(Ramp(drift), real)) for drift in (1.0, -1.0))
    assert kind.confusion[0][1] > 0 and kind.confusion[1][0] == 0
    assert unkind.confusion[0][1] == 0 and unkind.confusion[1][0] > 0
    assert kind.psnr[0] == 100.0 and kind.psnr[1] > kind.psnr[2] > kind.psnr[3]


def test_replay_takes_scripted_trials_without_tokens():
    real = trajectories(Step(2.0), Ramp())
    real.tokens, real.log_probs = torch.zeros(len(real), 0, 56).long(), torch.zeros(len(real), 0, 56)
    assert torch.equal(replay(Ramp(), real).frames, real.frames)


def test_replay_plays_chunks_as_they_were_decided():
    lengths = []
    class Narrow(Ramp):
        def step(self, actions): lengths.append(actions.shape[1]); return super().step(actions)
    real = trajectories(Step(2.0), Ramp())
    real.tokens = real.tokens.repeat_interleave(2, 1)[:, :, :28]           # chunks of four
    replay(Narrow(), real)
    assert set(lengths) == {4} and sum(lengths) == real.actions.shape[1]


def test_agreement_numbers_by_hand():
    a = Agreement([[6, 2], [1, 3]], [])
    assert a.false_success_rate == 0.25 and a.balanced_accuracy == 0.75
    assert math.isnan(Agreement([[0, 0], [1, 3]], []).false_success_rate)
    assert Agreement([[0, 0], [1, 3]], []).balanced_accuracy == 0.75


def test_psnr_by_hand_and_only_where_executed():
    real = torch.zeros(2, 3, 4, 4, 3, dtype=torch.uint8)
    dreamt = real.clone()
    dreamt[0, 1], dreamt[1, 1:] = 10, 20
    psnr = psnr_by_frame(real, dreamt, torch.tensor([1, 1]))
    assert psnr[0] == 100 and float(psnr[1]) == pytest.approx(10 * math.log10(255 ** 2 / 250), abs=1e-4)
    assert math.isnan(psnr[2])


def test_fidelity_is_asked_to_the_end_of_the_real_trial():
    "The dream of the first trial believed in success after eight steps, and stands still; the second trial ended there."
    real = trajectories(Step(2.0), Ramp())[:2]
    real.length = torch.tensor([16, 8])
    dreamt = replace(real, frames=real.frames.clone(), length=torch.tensor([8, 16]))
    dreamt.frames[:, 9:] += torch.tensor([10, 60], dtype=torch.uint8)[:, None, None, None, None]
    assert agreement(real, dreamt).psnr == pytest.approx([100.0] * 9 + [10 * math.log10(255 ** 2 / 100)] * 8, abs=1e-3)


def test_agreement_refuses_different_actions():
    real = trajectories(Step(2.0), Ramp())
    with pytest.raises(ValueError, match="same actions"): agreement(real, trajectories(Step(1.0), Ramp()))
    assert isinstance(real, TrajectoryBatch)


def test_an_exam_from_a_file_of_states_is_that_of_its_seeds(tmp_path, capsys):
    "`wmpo-evaluate --states`: the same places of cube and arm give the same trials, whoever says them."
    from wmpo_nb.from_scratch import shipped_weights
    from wmpo_nb.evaluation import main
    from wmpo_nb.presets import UserError, load_preset, seeds_for
    from wmpo_nb.simulator import Environment, Simulator
    from wmpo_nb.trajectory import save_states
    env, states = Environment(load_preset("tiny_lift").task), []
    for seed in seeds_for("test", 6):
        env.place(seed)
        states.append(env.env.sim.get_state().flatten())
    other = env.env.sim.model.get_xml().replace("0.4", "0.5")
    env.close()
    save_states(tmp_path / "states.npz", states, [""] * 6)
    outcomes = {}
    for name, extra in (("seeds", []), ("states", ["--states", str(tmp_path / "states.npz")])):
        assert main(["--policy", str(shipped_weights(load_preset("tiny_lift")) / "policy_lift"), "--output", str(tmp_path / name), "--evaluation.states", "5", *extra]) == 0
        record = json.loads((tmp_path / name / "evaluations.json").read_text())["policy"]
        outcomes[name] = record["success"], record["finish_step"]
    assert outcomes["states"] == outcomes["seeds"]
    assert len(set(outcomes["seeds"][1])) > 1, "all trials end alike: the comparison above says nothing"
    policy = str(shipped_weights(load_preset("tiny_lift")) / "policy_lift")
    assert main(["--policy", policy, "--output", str(tmp_path / "chosen"), "--evaluation.states", "2", "--selection", "--seed", "3"]) == 0
    assert json.loads((tmp_path / "chosen" / "evaluations.json").read_text())["policy"]["state_id"] == seeds_for("selection", 2, 3)
    assert json.loads((tmp_path / "chosen" / "ledger.json").read_text())["simulator_steps"] > 0
    assert main(["--policy", policy, "--output", str(tmp_path / "both"), "--selection", "--states", "a.npz"]) == 2
    with pytest.raises(UserError, match="cannot load another"):         # a table of another size, say, would be ignored
        Simulator(load_preset("tiny_lift").task, workers=0).reset([InitialState(0, None, states[0], other)])
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    assert main(["--policy", str(shipped_weights(load_preset("tiny_lift")) / "policy_lift"), "--output", str(tmp_path / "out"), "--states", str(tmp_path / "broken.npz")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) >= 1 and not (tmp_path / "out").exists()
