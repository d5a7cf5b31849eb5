"The baselines: the budget is the world's to count and never exceeded, DPO's gradient is the right one, both resume to the bit."
import json
import math
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from helpers import SMALL, STATS, refusal
from wmpo_nb import baselines
from wmpo_nb.baselines import (_settings, affordable, batch_variants, dpo_coefficients, dpo_loss, dpo_step, main, pair_up, run_dpo, run_grpo,
                               train_dpo, train_online, trajectory_log_probs, try_variants)
from wmpo_nb.grpo import action_mask
from wmpo_nb.policy import OpenVLAOFT
from wmpo_nb.presets import GRPOConfig, Preset, UserError, load_preset, seeds_for
from wmpo_nb.run import Checkpointer, Run, read_metrics
from wmpo_nb.training import Diverged
from wmpo_nb.trajectory import InitialState, rollout
from wmpo_nb.wmpo import gather, update

CONFIG = GRPOConfig(group_size=4, groups=4, max_draws=2, mini_batch=8, micro_batch=4, learning_rate=1e-3)
STATES = [InitialState(i, torch.zeros(16, 16, 3, dtype=torch.uint8)) for i in range(40)]
torch.set_num_threads(1)       # networks this small only lose by sharing


class Brightness:
    "A bandit: every number of an action makes the picture brighter; a chunk bright enough is a success."
    def __init__(self, needed=0.1): self.needed = needed

    def reset(self, states, streams):
        self.level = torch.full((len(states),), 100.0)
        return self.draw()

    def draw(self): return self.level.clamp(0, 255).byte()[:, None, None, None].expand(-1, 16, 16, 3)

    def step(self, actions):
        frames = []
        for action in actions.unbind(1):
            self.level = self.level + 50 * action.mean(1)
            frames.append(self.draw())
        return torch.stack(frames, 1)

    def judge(self, batch):
        bright = batch.frames[:, :, 0, 0, 0] >= 100 + 400 * self.needed
        batch.success = bright.any(1)
        batch.finish_step = torch.where(batch.success, bright.int().argmax(1), batch.length)
        return batch


class Metered:
    "A world that counts what is asked of it: `trials` begun, and control `steps` of those that were judged."
    def __init__(self, world): self.world, self.trials, self.steps = world, 0, 0

    def reset(self, states, streams):
        self.trials += len(states)
        return self.world.reset(states, streams)

    def step(self, actions): return self.world.step(actions)

    def judge(self, batch):
        batch = self.world.judge(batch)
        self.steps += int(batch.length.sum())
        return batch


class Never(Brightness):
    def judge(self, batch):
        batch.success = torch.zeros(len(batch), dtype=torch.bool)
        return batch


def new_policy():
    torch.manual_seed(0)
    policy = OpenVLAOFT(SMALL, STATS, "brighter")
    policy.bfloat16 = False
    return policy


def weights(policy): return torch.cat([p.detach().flatten() for p in policy.parameters()])


@pytest.fixture(scope="module")
def recorded(): return rollout(new_policy(), Brightness(), STATES, chunks=2, temperature=1.0)


def online(budget, world=None, config=CONFIG, temperature=1.0, **options):
    world = Metered(world or Brightness())
    policy = train_online(new_policy(), world, STATES, config, budget=budget, chunks=2, temperature=temperature, **options)
    return policy, world


@pytest.mark.parametrize("budget", [4, 17, 50, 64, 131])
@pytest.mark.parametrize("variant", ["large", "small"])
def test_the_budget_is_spent_and_never_exceeded(budget, variant):
    "Counted by the world, not by the loop. Draws that are to be rounded up, to feed many processes, are not: they would cost."
    rows = []
    world = online(budget, config=replace(batch_variants(CONFIG)[variant], draw_multiple=16), log=lambda i, **n: rows.append(n))[1]
    assert budget - CONFIG.group_size < world.trials <= budget
    assert rows[-1]["spent"] == world.trials and sum(row["trajectories"] for row in rows) == world.trials
    assert sum(row["frames"] for row in rows) == world.steps == world.trials * 16


def test_trials_without_a_lesson_cost_as_much():
    rows = []
    policy, world = online(64, Never(), log=lambda i, **n: rows.append(n))
    assert 60 < world.trials <= 64 and torch.equal(weights(policy), weights(new_policy()))
    assert rows and all(row["groups"] == row["success"] == 0 for row in rows)


def test_what_is_affordable_is_paid_for_in_the_worst_case():
    found = [(left, affordable(CONFIG, left)) for left in range(CONFIG.group_size, 70)]
    assert all(1 <= config.groups * config.max_draws * config.group_size <= left for left, config in found)
    assert [(config.groups, config.max_draws) for left, config in found if left in (4, 12, 16, 69)] == [(1, 1), (3, 1), (4, 1), (4, 2)]


def test_a_budget_below_one_group_is_refused():
    assert affordable(CONFIG, 3) is None
    with pytest.raises(UserError, match="fewer than one group"): online(3)


def test_small_batches_have_an_eighth_of_groups_and_rate():
    paper = batch_variants(GRPOConfig(groups=64, group_size=8, mini_batch=128, learning_rate=5e-6))
    assert paper["large"].groups == 64 and paper["small"].groups == 8
    assert paper["small"].learning_rate == pytest.approx(5e-6 / 8) and paper["small"].mini_batch == 64


def test_online_resumes_to_the_bit_and_the_ledger_counts(tmp_path):
    def run(name, interrupt=None):
        def log(iteration, **numbers):
            record.log("grpo", iteration, **numbers)
            if iteration == interrupt: raise KeyboardInterrupt
        record = Run(tmp_path / name, Preset(), "test", 0, resume=(tmp_path / name).exists())
        checkpoints = Checkpointer(tmp_path / name / "checkpoints", 1)
        policy, _ = online(100, run=record, checkpointer=checkpoints, log=log)
        record.close()
        return weights(policy), record.ledger
    whole, ledger = run("whole")
    with pytest.raises(KeyboardInterrupt): run("broken", interrupt=1)       # after an update that was not saved
    resumed, again = run("broken")
    assert torch.equal(whole, resumed)
    counts = ("real_trajectories", "simulator_steps", "optimiser_steps")
    assert [getattr(again, c) for c in counts] == [getattr(ledger, c) for c in counts]
    assert 96 < ledger.real_trajectories <= 100 and ledger.optimiser_steps > 2 and ledger.imagined_frames == 0
    assert [e["step"] for e in read_metrics(tmp_path / "broken")] == [e["step"] for e in read_metrics(tmp_path / "whole")]


def test_dpo_loss_by_hand():
    loss, stats = dpo_loss(torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 0.5]), 0.5)
    assert float(loss) == pytest.approx((math.log(1 + math.exp(-1.0)) + math.log(1 + math.exp(1.25))) / 2)
    assert stats["accuracy"] == 0.5 and stats["margin"] == pytest.approx((1.0 - 1.25) / 2)
    assert float(dpo_loss(torch.tensor([300.0]), torch.tensor([-300.0]), 1.0)[0]) == 0          # no overflow
    assert dpo_coefficients(torch.zeros(4), torch.zeros(4), 0.1).tolist() == pytest.approx([-0.1 / 8] * 4)


@pytest.mark.parametrize("micro_batch", [1, 3, 16])
def test_the_step_is_the_gradient_of_the_loss(recorded, micro_batch):
    "Against autograd through the plain loss of whole trajectories, from a policy that is not its own reference."
    from accelerate import Accelerator

    pairs = pair_up(recorded.success, 0)[:4]
    batch = recorded[pairs.T.flatten()]
    mask = action_mask(batch.finish_step, 2)
    assert not mask.all()                                        # some trials end early: their later tokens must not count
    reference = trajectory_log_probs(new_policy(), batch, mask, 0.7, 4) + torch.linspace(-1, 1, 8)
    policy = new_policy()
    total = torch.stack([(policy.log_probs(batch.frames[b, [0, 8]], batch.tokens[b], 0.7) * mask[b]).sum() for b in range(8)])
    loss, _ = dpo_loss(*(total - reference).chunk(2), 0.3)
    loss.backward()
    wanted = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    other = new_policy()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.0)
    numbers = dpo_step(other, optimizer, batch, reference, replace(CONFIG, micro_batch=micro_batch, grad_clip=0.0), beta=0.3,
                       temperature=0.7, accelerator=Accelerator())
    found = torch.cat([p.grad.flatten() for p in other.parameters() if p.grad is not None])
    assert numbers["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert (found - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize("won, lost", [(1, 9), (9, 1), (5, 5), (3, 7)])
def test_pairs_use_everything(won, lost):
    success = torch.tensor([True] * won + [False] * lost)[torch.randperm(won + lost, generator=torch.Generator().manual_seed(won))]
    pairs = pair_up(success, 3)
    assert len(pairs) == max(won, lost) and success[pairs[:, 0]].all() and not success[pairs[:, 1]].any()
    assert pairs.unique().tolist() == list(range(won + lost))
    rarer = pairs[:, 0 if won < lost else 1].unique(return_counts=True)[1]
    assert int(rarer.max() - rarer.min()) <= 1
    assert torch.equal(pairs, pair_up(success, 3))


@pytest.mark.parametrize("outcome", [True, False])
def test_one_sided_data_is_refused(recorded, outcome):
    batch = replace(recorded, success=torch.full((len(recorded),), outcome))
    with pytest.raises(UserError, match="succeed" if outcome else "fail"): train_dpo(new_policy(), batch, CONFIG, temperature=1.0)


def test_dpo_learns_the_preference_and_resumes_to_the_bit(recorded, tmp_path):
    rows = []
    def train(policy, folder=None, stop=None, run=None):
        def log(step, **numbers):
            rows.append(numbers)
            if step == stop: raise KeyboardInterrupt
        checkpoints = Checkpointer(folder, 1) if folder else None
        return weights(train_dpo(policy, recorded, CONFIG, beta=0.3, epochs=2, temperature=0.7, checkpointer=checkpoints, log=log, run=run))
    run = Run(tmp_path / "run", Preset(), "test", 0)
    whole = train(new_policy(), run=run)
    run.close()
    pairs, n = CONFIG.mini_batch // 2, int(recorded.success.sum())
    assert run.ledger.optimiser_steps == len(rows) == 2 * math.ceil(max(n, len(recorded) - n) / pairs)
    assert rows[-1]["margin"] == pytest.approx(0.3 * (rows[-1]["chosen"] - rows[-1]["rejected"]), rel=1e-4)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and rows[-1]["loss"] < 0.5
    assert rows[-1]["chosen"] > rows[-1]["rejected"]
    with pytest.raises(KeyboardInterrupt): train(new_policy(), tmp_path / "checkpoints", stop=3)
    assert torch.equal(train(new_policy(), tmp_path / "checkpoints"), whole)


def test_adapters_are_all_that_changes(recorded, tmp_path):
    "Both baselines take the policy's options; the base weights stay, and what is saved has the adapters merged."
    frugal = replace(CONFIG, lora_rank=2, activation_checkpointing=True)
    for policy in (online(40, config=frugal)[0], train_dpo(new_policy(), recorded, frugal, epochs=1, temperature=1.0)):
        adapters = {name for name, _ in policy.named_parameters() if ".lora_" in name}
        start, kept = dict(new_policy().named_parameters()), {name.replace(".base_layer", ""): p for name, p in policy.named_parameters()
                                                              if name not in adapters}
        assert adapters and all(torch.equal(kept[name], p) for name, p in start.items())
        policy.save_pretrained(tmp_path)
        assert not torch.equal(weights(OpenVLAOFT.from_pretrained(tmp_path)), weights(new_policy()))


@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_numbers_that_are_not_finite_name_the_checkpoint(recorded, method, tmp_path):
    policy, calls = new_policy(), []
    original = policy.log_probs_and_entropy

    def poisoned(*arguments):
        calls.append(1)
        log_probs, entropy = original(*arguments)
        return (log_probs * float("nan") if list(tmp_path.glob("step_000001")) else log_probs), entropy

    policy.log_probs_and_entropy = poisoned
    options = dict(temperature=1.0, checkpointer=Checkpointer(tmp_path, 1))
    with pytest.raises(Diverged, match=r"not finite at step 1\. Last checkpoint: .*step_000001"):
        if method == "dpo": train_dpo(policy, recorded, CONFIG, **options)
        else: train_online(policy, Brightness(), STATES, CONFIG, budget=100, chunks=2, **options)
    assert calls


def test_the_best_variant_on_selection_states_is_kept_and_none_is_trained_twice(tmp_path, monkeypatch):
    rates, trained = {"worse": 0.25, "better": 0.5, "broken": 0.75}, []

    def train(run, policy, name):
        trained.append(name)
        assert torch.equal(weights(policy), weights(start())), "each begins with the base policy"
        (run.folder / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
        if name == "broken" and trained.count(name) == 1: raise KeyboardInterrupt
        with torch.no_grad(): next(policy.parameters()).fill_(rates[name])
        return {"spent": len(trained)}

    new_policy().save_pretrained(tmp_path / "start")
    start = partial(OpenVLAOFT.from_pretrained, tmp_path / "start")
    monkeypatch.setattr(baselines, "_select", lambda run, policy, count, workers: float(next(policy.parameters()).detach().mean()))
    trainers = {name: partial(train, name=name) for name in rates}
    run = Run(tmp_path / "run", Preset(), "test", 0)
    found = try_variants(run, start, {name: trainers[name] for name in ("worse", "better")}, 4, 0)
    assert found["chosen"] == "better" and found["worse"] == {"spent": 1, "selection_success": 0.25, "selection_states": 4}
    with pytest.raises(KeyboardInterrupt): try_variants(run, start, trainers, 4, 0)
    # of the policy's size: those of a variant that is done are gone, those of one that is not are needed
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["broken"]
    assert try_variants(run, start, trainers, 4, 0)["chosen"] == "broken"
    run.close()
    assert trained == ["worse", "better", "broken", "broken"]
    assert try_variants(Run(tmp_path / "alone", Preset(), "test", 0), start, {"worse": trainers["worse"]}, 4, 0)["worse"]["selection_success"] is None
    kept = OpenVLAOFT.from_pretrained(tmp_path / "run/policy")
    assert float(next(kept.parameters()).detach().mean()) == 0.75


def test_training_and_choosing_have_states_of_their_own_and_the_settings_of_the_preset(tmp_path, monkeypatch):
    class Idle(nullcontext):
        steps = 0
        def __init__(self, task, workers, **options): super().__init__()

    trained, chosen = [], []
    def practise(policy, world, states, config, *, run, stage, **options):
        trained.append(([s.state_id for s in states], config, options))
        run.log(stage, 0, spent=8)
    def clone(policy, batch, config, **options): trained.append((batch, config, options))
    def examine(policy, world, states, **options):
        chosen.append(([s.state_id for s in states], options))
        Idle.steps += 10
        return SimpleNamespace(rate=0.5)
    for name, double in (("train_online", practise), ("train_dpo", clone), ("evaluate", examine), ("Simulator", Idle)): monkeypatch.setattr(baselines, name, double)
    new_policy().save_pretrained(tmp_path / "start")
    start = partial(OpenVLAOFT.from_pretrained, tmp_path / "start")
    run = Run(tmp_path / "grpo", load_preset("tiny_lift", {"collect.trajectories": "8", "collect.temperature": "0.9"}), "test", 3)
    run_grpo(run, start, selection=5, workers=0)
    assert [states for states, _, _ in trained] == [seeds_for("collection", 8, 3)] * 2
    assert [config for _, config, _ in trained] == [*batch_variants(run.preset.grpo).values()]
    assert all((o["budget"], o["temperature"], o["seed"]) == (8, 0.9, 3) for _, _, o in trained)
    run_dpo(run, start, "the batch", rates=(0.5, 0.25), beta=0.2, epochs=3, selection=5, workers=0)
    assert [config.learning_rate / run.preset.grpo.learning_rate for _, config, _ in trained[2:]] == [0.25, 0.5]
    assert all((batch, o["beta"], o["epochs"], o["temperature"], o["seed"]) == ("the batch", 0.2, 3, 0.9, 3) for batch, _, o in trained[2:])
    assert [o["checkpointer"].folder.name for _, _, o in trained] == ["large", "small", "0.25", "0.5"]     # none goes on from another's
    assert run.ledger.simulator_steps == 40
    assert chosen == [(seeds_for("selection", 5, 3), {"chunks": run.preset.task.chunks})] * 4            # greedy, which is what evaluate is
    run.close()


def test_each_epoch_pairs_anew_and_each_iteration_throws_other_dice(recorded, monkeypatch):
    pairs, seeds, temperatures = [], [], set()
    monkeypatch.setattr(baselines, "pair_up", lambda success, seed: pairs.append(pair_up(success, seed)) or pairs[-1])
    for seed in (0, 1): train_dpo(new_policy(), recorded[:12], CONFIG, epochs=2, temperature=1.0, seed=seed)
    assert len({tuple(found.flatten().tolist()) for found in pairs}) == len(pairs) == 4
    def warm(function): return lambda *arguments, temperature, **options: temperatures.add(temperature) or function(*arguments, temperature=temperature, **options)
    monkeypatch.setattr(baselines, "gather", warm(lambda *arguments, seed, **options: seeds.append(seed) or gather(*arguments, seed=seed, **options)))
    monkeypatch.setattr(baselines, "update", warm(update))
    for seed in (0, 1): online(36, temperature=0.7, seed=seed)
    assert len(seeds) > 3 and len({*seeds}) == len(seeds) and temperatures == {0.7}


def test_dpo_clips_its_gradient(recorded):
    from accelerate import Accelerator
    batch, policy = recorded[pair_up(recorded.success, 0)[:4].T.flatten()], new_policy()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    step = partial(dpo_step, policy, optimizer, batch, torch.zeros(8), replace(CONFIG, grad_clip=1e-3), beta=0.3, temperature=1.0, accelerator=Accelerator())
    numbers = step()
    assert step() == pytest.approx(numbers), "nothing is left of the gradient before"
    norm = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]).norm()
    assert numbers["grad_norm"] > 1e-2 and float(norm) == pytest.approx(1e-3, rel=1e-3)


def message(capsys, *arguments): return refusal(main, capsys, *arguments)


def test_bad_input_is_answered_before_work(capsys, tmp_path):
    out = ("--output", str(tmp_path / "run"))
    assert "nowhere" in message(capsys, "grpo", "--policy", "nowhere", *out)
    assert "less than one group" in message(capsys, "grpo", "--collect.trajectories", "7", *out)
    assert "must be positive" in message(capsys, "dpo", "--epochs", "0", *out)
    assert "positive and different" in message(capsys, "dpo", "--rates", "0.1", "0.1", *out)
    assert "--selection" in message(capsys, "dpo", "--selection", "0", *out)
    assert "at most 10000 seeds" in message(capsys, "dpo", "--selection", "10001", *out)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_variants_are_chosen_on_as_many_states_after_a_resume(method):
    "What a run is called is compared when it is resumed."
    few, many = (baselines._settings(baselines._parser().parse_args([method, "--selection", count])) for count in ("8", "64"))
    assert few != many


def test_the_commands_in_the_simulator_killed_and_resumed(tmp_path):
    "Real processes, the real simulator, the shipped policy; DPO finds the trajectories where WMPO keeps them."
    tiny = ["--workers", "0", "--collect.trajectories", "8", "--grpo.group_size", "4", "--grpo.groups", "1", "--grpo.max_draws", "1",
            "--grpo.accuracy_low", "0", "--grpo.accuracy_high", "1", "--task.horizon", "32"]
    start = [sys.executable, "-c", "from wmpo_nb.baselines import main; raise SystemExit(main())"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    grpo = [*start, "grpo", "--variant", "small", *tiny, "--output", str(tmp_path / "grpo")]
    first = subprocess.Popen(grpo, env=env, start_new_session=True)
    while first.poll() is None and not list((tmp_path / "grpo").glob("checkpoints/small/step_000001")): time.sleep(0.05)
    if first.poll() is None: os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    subprocess.run([*grpo, "--resume"], env=env, check=True)
    ledger = json.loads((tmp_path / "grpo/ledger.json").read_text())
    assert ledger["real_trajectories"] == 8 and 0 < ledger["simulator_steps"] <= 8 * 32 and ledger["imagined_frames"] == 0
    assert [e["spent"] for e in read_metrics(tmp_path / "grpo")] == [4, 8]
    assert json.loads((tmp_path / "grpo/variants.json").read_text())["small"]["spent"] == 8
    done = subprocess.run([*start, "dpo", *tiny, "--epochs", "1", "--rates", "0.1", "0.01", "--selection", "2", "--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "dpo")],
                          env=env, capture_output=True, text=True)
    shards = list((tmp_path / "cache").glob("*/*.tar"))
    assert len(shards) == 1
    if done.returncode: assert "DPO needs successes and failures" in done.stderr       # eight trials may all end alike
    else:
        assert json.loads((tmp_path / "dpo/ledger.json").read_text())["real_trajectories"] == 8         # both rates learn from the same
        assert json.loads((tmp_path / "dpo/variants.json").read_text()).keys() == {"0.1", "0.01"}
    folder = "grpo" if done.returncode else "dpo"
    assert (tmp_path / folder / "policy/model.safetensors").stat().st_size > 100_000


def test_of_equal_rates_the_smallest_is_chosen_in_whatever_order_they_are_given():
    options = {"selection": 8, "method": "dpo", "beta": 0.1, "epochs": 1}
    assert _settings(Namespace(rates=[0.1, 0.01], **options)) == _settings(Namespace(rates=[0.01, 0.1], **options))
