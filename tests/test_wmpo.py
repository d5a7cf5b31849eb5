"The training loop: on-policy, deterministic, resumable, blind to its world, loud when there is nothing to learn."
import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from helpers import SMALL, STATS
from wmpo_nb.policy import OpenVLAOFT
from wmpo_nb.presets import GRPOConfig, Preset, UserError, load_preset, seeds_for
from wmpo_nb.run import Checkpointer, Run, Stopped, heed_sigterm, read_metrics, told_to_stop
from wmpo_nb.training import make_optimizer
from wmpo_nb.trajectory import InitialState, rollout, write_shard
from wmpo_nb.wmpo import (NothingToLearn, draw_states, dream_starts, forward_passes, gather, kl_to_start, main, mix_seed, token_statistics,
                          train_wmpo, update, validate)

CONFIG = GRPOConfig(iterations=4, group_size=4, groups=4, mini_batch=8, micro_batch=4, learning_rate=1e-3)
torch.set_num_threads(1)       # networks this small only lose by sharing
STATES = [InitialState(i, torch.zeros(16, 16, 3, dtype=torch.uint8)) for i in range(12)]


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


class Always(Brightness):
    def __init__(self, verdict): self.verdict = verdict

    def judge(self, batch):
        batch.success = torch.full((len(batch),), self.verdict)
        return batch


def new_policy(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    policy = OpenVLAOFT(SMALL, STATS, "brighter").to(dtype)
    policy.bfloat16 = False
    return policy


def train(policy, world=None, config=CONFIG, **options):
    return train_wmpo(policy, world or Brightness(), STATES, config, chunks=2, temperature=1.0, **options)


def weights(policy): return torch.cat([p.detach().flatten() for p in policy.parameters()])


def test_seeds_differ_in_every_part():
    assert len({mix_seed(a, b, c) for a in range(3) for b in range(3) for c in range(3)}) == 27


def test_states_are_drawn_without_repetition_and_by_seed():
    chosen = [s.state_id for s in draw_states(STATES, 5, 1)]
    assert len(set(chosen)) == 5 and chosen == [s.state_id for s in draw_states(STATES, 5, 1)]
    assert chosen != [s.state_id for s in draw_states(STATES, 5, 2)]
    assert len(draw_states(STATES, 99, 0)) == len(STATES)


def collected(config=CONFIG, seed=0, world=None, temperature=1.0, **options):
    return gather(new_policy(), world or Brightness(), STATES, config, chunks=2, temperature=temperature, seed=seed, **options)


def test_gather_returns_whole_informative_groups_and_no_surplus():
    for seed in range(4):
        batch, numbers = collected(seed=seed)
        groups = batch.success.view(-1, CONFIG.group_size)
        assert groups.any(1).all() and not groups.all(1).any()
        assert len(groups) == numbers["groups"] <= CONFIG.groups
        assert (batch.state_id.view(-1, 4) == batch.state_id[::4, None]).all()
        assert batch.member.tolist() == list(range(4)) * len(groups)
        assert batch.frames.shape[1] == 3, "only the frames of decisions, and the last, are kept"
        assert numbers["kept_share"] == pytest.approx(len(groups) * 4 / numbers["trajectories"])


def test_later_draws_ask_only_for_what_is_missing():
    class Counting(Brightness):
        drawn = []

        def reset(self, states, streams):
            self.drawn.append(len(states) // CONFIG.group_size)
            return super().reset(states, streams)

    batch, numbers = collected(replace(CONFIG, max_draws=6, rollout_groups=99), world=Counting(0.16))
    assert Counting.drawn[0] == CONFIG.groups and len(Counting.drawn) > 1, "choose a seed with dropped groups"
    assert Counting.drawn == sorted(Counting.drawn, reverse=True)
    assert numbers["groups"] <= CONFIG.groups and sum(Counting.drawn) * CONFIG.group_size == numbers["trajectories"]


def test_draws_are_rounded_up_and_have_states_and_dice_of_their_own():
    class Recording(Always):
        def reset(self, states, streams):
            drawn.append(([state.state_id for state in states[::CONFIG.group_size]], [g.initial_seed() for g in streams.generators]))
            return super().reset(states, streams)

    drawn, config = [], replace(CONFIG, groups=7, draw_multiple=4, max_draws=3, rollout_groups=99)
    with pytest.raises(NothingToLearn): collected(config, world=Recording(False))
    assert [len(states) for states, _ in drawn] == [8, 8, 8] and len({tuple(states) for states, _ in drawn}) == 3
    assert len({seed for _, seeds in drawn for seed in seeds}) == 3 * 8 * CONFIG.group_size          # also where two draws share a state


def test_groups_are_kept_between_the_configured_shares_and_not_counted_as_tried_when_they_waited():
    batch, _ = collected(replace(CONFIG, accuracy_low=0.5, accuracy_high=0.5))
    assert batch.success.view(-1, 4).sum(1).unique().tolist() == [2]
    assert collected(replace(CONFIG, accuracy_low=0.0, accuracy_high=1.0))[1]["kept_share"] == 1
    more, numbers = collected(waiting=batch[:4], seed=1)
    assert torch.equal(more.tokens[:4], batch.tokens[:4]) and len(more) - 4 == pytest.approx(numbers["kept_share"] * numbers["trajectories"])


def test_scores_are_counted_by_tenths_where_the_world_gives_any():
    class Scored(Brightness):
        def judge(self, batch):
            batch = super().judge(batch)
            batch.score = torch.where(batch.success, 0.95, 0.15)
            return batch

    _, numbers = collected(world=Scored())
    won = round(numbers["success"] * numbers["trajectories"])
    assert numbers["score_histogram"] == [0, numbers["trajectories"] - won, *[0] * 7, won] and 0 < won < numbers["trajectories"]
    assert "score_histogram" not in collected()[1]


def test_gather_is_a_function_of_the_seed():
    (a, _), (b, _), (c, _) = collected(seed=7), collected(seed=7), collected(seed=8)
    assert torch.equal(a.tokens, b.tokens) and not torch.equal(a.tokens[:4], c.tokens[:4])


@pytest.mark.parametrize("verdict, words", [(True, "calls everything success"), (False, "calls everything failure")])
def test_a_world_that_always_says_the_same_is_refused(verdict, words, tmp_path):
    policy = new_policy()
    before = weights(policy)
    checkpointer = Checkpointer(tmp_path, every=10)
    with pytest.raises(NothingToLearn, match=words): train(policy, Always(verdict), checkpointer=checkpointer)
    assert issubclass(NothingToLearn, UserError)
    assert torch.equal(weights(policy), before), "nothing was learned from nothing"
    assert checkpointer.saved(), "the state reached is kept"


def test_forward_passes_cover_each_needed_chunk_once():
    mask = torch.zeros(5, 3, 56, dtype=torch.bool)
    mask[:, 0] = mask[2] = mask[4, 1, :7] = True
    passes = forward_passes(mask, replace(CONFIG, mini_batch=2, micro_batch=1))
    assert [len(step) for step in passes] == [1, 2, 1]
    assert all(len(part) <= 3 for step in passes for part in step)
    for i, step in enumerate(passes):
        assert all((part[:, 0] // 2 == i).all() for part in step), "an optimiser step sees only its own trajectories"
    assert torch.equal(torch.cat([part for step in passes for part in step]), mask.any(2).nonzero())


def test_recomputed_log_probs_are_those_of_the_rollout():
    batch, _ = collected()
    pairs = torch.ones(batch.tokens.shape[:2]).nonzero()
    log_probs, _ = token_statistics(new_policy().eval(), batch, pairs, 1.0)
    torch.testing.assert_close(log_probs.detach(), batch.log_probs.flatten(0, 1), atol=1e-4, rtol=0)


def one_update(config, batch, policy, stale=0, temperature=1.0, start=None):
    from accelerate import Accelerator
    accelerator = Accelerator()
    optimizer = accelerator.prepare(make_optimizer(policy.named_parameters(), config))
    numbers = update(policy, optimizer, batch, config, temperature=temperature, accelerator=accelerator, stale=stale, start=start)
    return numbers, torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def test_result_does_not_depend_on_the_size_of_the_passes():
    batch, _ = collected()
    reference, gradient = one_update(replace(CONFIG, mini_batch=16, micro_batch=16), batch, new_policy())
    for micro_batch in (1, 3):
        numbers, other = one_update(replace(CONFIG, mini_batch=16, micro_batch=micro_batch), batch, new_policy())
        torch.testing.assert_close(other, gradient, atol=1e-6, rtol=0)
        assert numbers == pytest.approx(reference | {"moved": numbers["moved"]}, abs=1e-6)        # that is of one pass


def test_a_mini_batch_has_a_gradient_of_its_own():
    batch, _ = collected()
    (numbers, last), (_, alone) = (one_update(replace(CONFIG, learning_rate=0.0, grad_clip=0.0), part, new_policy()) for part in (batch, batch[-8:]))
    assert len(batch) == 16 and numbers["optimiser_steps"] == 2
    torch.testing.assert_close(last, alone, atol=1e-6, rtol=0)


def test_trials_and_what_is_recomputed_of_them_have_the_temperature_that_was_asked_for():
    batch, _ = collected(temperature=0.5)
    numbers, _ = one_update(replace(CONFIG, learning_rate=0.0), batch, new_policy(), stale=len(batch), temperature=0.5, start=new_policy())
    assert [numbers[name] for name in ("approx_kl", "clip_fraction", "moved", "start_kl")] == pytest.approx([0.0] * 4, abs=1e-5)


def test_what_is_logged_is_a_mean_over_trials_of_means_over_the_actions_before_their_ends():
    batch, _ = collected()
    policy, start = new_policy(), new_policy(seed=1)
    numbers, _ = one_update(replace(CONFIG, learning_rate=0.0), batch, policy, start=start)
    pairs, taken = torch.ones(batch.tokens.shape[:2]).nonzero(), torch.arange(2 * 56) < 7 * batch.finish_step[:, None]
    (now, entropy), (then, _) = (token_statistics(p, batch, pairs, 1.0) for p in (policy, start))
    mean = lambda values: float(((values.detach().view(taken.shape) * taken).sum(1) / taken.sum(1)).mean())
    assert not taken.all() and mean(kl_to_start(now, then)) > 1e-3
    assert (numbers["entropy"], numbers["start_kl"]) == pytest.approx((mean(entropy), mean(kl_to_start(now, then))), rel=1e-4)


def test_first_step_is_on_policy_and_raises_the_successes():
    batch, _ = collected()
    policy = new_policy()
    numbers, _ = one_update(replace(CONFIG, mini_batch=16), batch, policy)
    assert numbers["clip_fraction"] == 0 and abs(numbers["approx_kl"]) < 1e-6 and abs(numbers["loss"]) < 1e-6
    pairs = torch.ones(batch.tokens.shape[:2]).nonzero()
    gain = (token_statistics(policy, batch, pairs, 1.0)[0].detach() - batch.log_probs.flatten(0, 1)).view(len(batch), -1).mean(1)
    assert gain[batch.success].mean() > gain[~batch.success].mean()


def test_how_far_an_update_moved_is_not_how_old_the_trials_were():
    batch, _ = collected()
    old = replace(batch, log_probs=batch.log_probs + 0.5)                     # as if made by a policy half a nat a token away
    still, much = (one_update(replace(CONFIG, mini_batch=16, learning_rate=rate), old, new_policy(), stale=len(old))[0] for rate in (0.0, 1e-3))
    assert abs(still["approx_kl"]) > 0.4 and abs(still["moved"]) < 1e-6 < abs(much["moved"])


@pytest.mark.parametrize("low, high, clips", [(0.1, 0.5, False), (0.5, 0.1, True)])
def test_an_update_clips_where_it_is_told_to(low, high, clips):
    "Trials made by a policy to which everything was less likely, by a factor of 1.28: only the upper bound can bind, and for the winners."
    batch, _ = collected()
    old = replace(batch, log_probs=batch.log_probs - 0.25)
    numbers, _ = one_update(replace(CONFIG, mini_batch=16, learning_rate=0.0, clip_low=low, clip_high=high), old, new_policy(), stale=len(old))
    assert numbers["clip_fraction"] == pytest.approx(float(batch.success.float().mean()) if clips else 0.0, abs=1e-5)


def test_gradients_are_clipped_to_the_configured_norm():
    batch, _ = collected()
    numbers, gradient = one_update(replace(CONFIG, mini_batch=16, grad_clip=1e-3), batch, new_policy())
    assert numbers["grad_norm"] > 1e-2 and float(gradient.norm()) == pytest.approx(1e-3, rel=1e-3)


def test_the_distance_from_the_start_is_its_kl_divergence():
    "On average over what the acting policy does."
    now, start = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    assert float((now * kl_to_start(now.log(), start.log())).sum()) == pytest.approx(float((now * (now / start).log()).sum()))


def test_the_start_policy_does_not_move_along():
    rows = []
    train(new_policy(), config=replace(CONFIG, iterations=3, start_kl=True), log=lambda i, **numbers: rows.append(numbers["start_kl"]))
    assert abs(rows[0]) < 1e-6 and 1e-5 < rows[1] < rows[2]


def test_each_iteration_throws_other_dice():
    "Nothing is learned in between, and every state is tried each time."
    class Recording(Brightness):
        def step(self, actions):
            acts.append(actions)
            return super().step(actions)
    acts, ends, config = [], [], replace(CONFIG, iterations=2, learning_rate=0.0, groups=len(STATES), max_draws=1, rollout_groups=len(STATES), validate_every=0)
    train(new_policy(), Recording(), config, log=lambda *_, **numbers: ends.append(len(acts)))
    first, second = (torch.cat(part).flatten(1).sum(1).sort().values for part in (acts[:ends[0]], acts[ends[0]:]))
    assert first.shape == second.shape and not torch.equal(first, second)


def test_groups_that_waited_come_first_and_with_the_probabilities_they_were_made_with(monkeypatch):
    updates = []
    def spy(policy, optimizer, batch, config, stale=0, **options):
        updates.append((batch, stale))
        return update(policy, optimizer, batch, config, stale=stale, **options)
    monkeypatch.setattr("wmpo_nb.wmpo.update", spy)
    gathered = []
    def gather_and_keep(*arguments, **options):
        gathered.append(gather(*arguments, **options))
        return gathered[-1]
    monkeypatch.setattr("wmpo_nb.wmpo.gather", gather_and_keep)
    config = replace(CONFIG, iterations=3, groups=2, draw_multiple=8, validate_every=0)
    train(new_policy(), config=config)
    used = config.groups * config.group_size
    for (found, _), (batch, _), (following, stale) in zip(gathered, updates, updates[1:]):
        assert torch.equal(found.tokens[:used], batch.tokens) and len(found) > used
        waited = min(len(found) - used, used)
        assert stale == len(found) - used and torch.equal(following.tokens[:waited], found.tokens[used:][:waited])
        assert torch.equal(following.log_probs[:waited], found.log_probs[used:][:waited])
    assert updates[0][1] == 0


def test_the_loop_asks_a_world_for_three_things_only():
    class Spy:
        def __init__(self): self._world, self.asked = Brightness(), set()

        def __getattr__(self, name):
            self.asked.add(name)
            return getattr(self._world, name)

    spy = Spy()
    train(new_policy(), spy, replace(CONFIG, iterations=1))
    assert spy.asked == {"reset", "step", "judge"}


def test_success_improves():
    history = []
    train(new_policy(), config=replace(CONFIG, iterations=8, groups=6, learning_rate=2e-3), log=lambda i, **numbers: history.append(numbers))
    assert {"success", "kept_share", "approx_kl", "clip_fraction", "entropy", "grad_norm", "frames_per_second"} <= set(history[0])
    start, end = (sum(h["success"] for h in part) / 3 for part in (history[:3], history[-3:]))
    assert end > start + 0.15


def train_and_stop(after, folder, **options):
    "Train, and be interrupted when `after` iterations are saved."
    def log(iteration, **numbers):
        if iteration == after: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train(new_policy(), checkpointer=Checkpointer(folder, 1), log=log, **options)


def test_resume_gives_the_same_bits(tmp_path):
    unbroken = weights(train(new_policy()))
    train_and_stop(2, tmp_path)
    torch.manual_seed(99)
    resumed = weights(train(new_policy(seed=5), checkpointer=Checkpointer(tmp_path, 1)))
    assert torch.equal(unbroken, resumed)
    assert not torch.equal(unbroken, weights(train(new_policy(), seed=1)))


def test_the_policy_that_did_best_when_greedy_is_kept(tmp_path):
    "One trial from each state at temperature 0, after every iteration; what is kept did no worse in any of them."
    config, latest, validations = replace(CONFIG, validate_every=1), [], []
    policy = new_policy()
    def log(iteration, validation, **numbers):
        latest.append(weights(policy))
        validations.append(validation)
    train(policy, config=config, log=log)
    kept = max(range(4), key=lambda i: (validations[i], i))     # the mean of one iteration's weights is these weights
    assert torch.equal(weights(policy), latest[kept]) and len(set(validations)) > 1
    assert validate(policy, Brightness(), STATES, config, 2)["validation"] == max(validations)
    assert {*validations} <= {0.0, 1.0}, "greedy trials from pictures all alike end alike"
    train_and_stop(2, tmp_path, config=config)
    assert torch.equal(weights(policy), weights(train(new_policy(seed=5), config=config, checkpointer=Checkpointer(tmp_path, 1))))


def test_the_mean_of_the_last_iterations_is_tried_and_practice_does_not_notice(tmp_path):
    def practise(every, stop=None, policy=None, folder=None):
        rows, policy = [], policy or new_policy()
        def log(iteration, **numbers):
            if iteration == stop: raise KeyboardInterrupt
            rows.append((weights(policy), numbers.get("validation")))
        train(policy, config=replace(CONFIG, validate_every=every), checkpointer=Checkpointer(folder, 1) if folder else None, log=log)
        return policy, rows
    (policy, rows), (_, alone) = practise(2), practise(0)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(rows, alone))
    means = [(rows[i][0] + rows[i + 1][0]) / 2 for i in (0, 2)]
    kept = means[int(rows[3][1] >= rows[1][1])]
    assert torch.allclose(weights(policy), kept, atol=1e-6) and rows[0][1] is rows[2][1] is None
    with pytest.raises(KeyboardInterrupt): practise(2, stop=3, folder=tmp_path)   # stopped between two trials
    assert torch.equal(weights(policy), weights(practise(2, policy=new_policy(seed=5), folder=tmp_path)[0]))


@pytest.mark.parametrize("every", [2, 9])
def test_what_was_learned_before_an_early_end_is_not_thrown_away(every):
    "The world calls everything success from the fourth iteration on: the mean since the last validation is tried like any other."
    policy, world, latest = new_policy(), Brightness(), []
    judge = world.judge
    def log(iteration, **numbers):
        latest.append(weights(policy))
        if iteration == 2: world.judge = Always(True).judge
    with pytest.raises(NothingToLearn) as found: train(policy, world, replace(CONFIG, iterations=6, validate_every=every), log=log)
    assert judge is not world.judge and len(latest) == 3
    torch.testing.assert_close(weights(policy), latest[2] if every == 2 else torch.stack(latest).mean(0), atol=1e-6, rtol=0)
    assert found.value.numbers["validation"] == 1.0


def test_without_validation_the_last_policy_is_kept():
    latest, policy = [], new_policy()
    train(policy, config=replace(CONFIG, validate_every=0), log=lambda iteration, **numbers: latest.append((weights(policy), "validation" in numbers)))
    assert torch.equal(weights(policy), latest[-1][0]) and not any(said for _, said in latest)


def test_trials_that_only_validate_are_counted():
    def counts(validate_every):
        said = []
        train(new_policy(), config=replace(CONFIG, validate_every=validate_every),
              log=lambda iteration, **numbers: said.append((numbers["trajectories"], numbers["frames"])))
        return torch.tensor(said)
    more = counts(2) - counts(0)
    assert more[:, 0].tolist() == [len(STATES), len(STATES), 0, len(STATES)]           # the first: what practice begins with
    assert (more[[0, 1, 3], 1] > 0).all() and not more[2, 1]


@pytest.mark.parametrize("means, kept", [(0.4, "start"), (0.6, "a mean")])
def test_the_policy_that_practice_begins_with_is_the_one_to_beat(monkeypatch, means, kept):
    "Its trial is logged; it is what comes back if no mean does as well."
    policy, said, asked = new_policy(), [], iter([0.5, means, means])
    monkeypatch.setattr("wmpo_nb.wmpo.validate", lambda *_: {"validation": next(asked), "frames": 1, "trajectories": 1})
    begun = weights(policy)
    train(policy, config=replace(CONFIG, validate_every=2), log=lambda iteration, **numbers: said.append(numbers.get("start_validation")))
    assert said == [0.5, None, None, None]
    assert torch.equal(weights(policy), begun) == (kept == "start")


@pytest.mark.parametrize("every", [3, 5])
def test_the_iterations_left_at_the_end_are_asked_as_well(monkeypatch, every):
    "Four iterations: three and one, or four that never fill a mean of five."
    latest, policy, asked = [], new_policy(), iter([0.1, 0.2, 0.3])
    monkeypatch.setattr("wmpo_nb.wmpo.validate", lambda *_: {"validation": next(asked), "frames": 1, "trajectories": 1})
    train(policy, config=replace(CONFIG, validate_every=every), log=lambda iteration, **numbers: latest.append((weights(policy), numbers.get("validation"))))
    rest = [row for row, _ in latest[every if every == 3 else 0:]]
    assert len(latest) == 4 and latest[-1][1] is not None
    assert torch.allclose(weights(policy), torch.stack(rest).mean(0), atol=1e-6)


def test_run_records_every_iteration_once_and_counts_steps(tmp_path):
    def session(iterations, resume):
        run = Run(tmp_path / "run", Preset(), "test", resume=resume)
        train(new_policy(), config=replace(CONFIG, iterations=iterations), run=run,
              checkpointer=Checkpointer(tmp_path / "checkpoints", 1))
        return run

    session(2, False)
    run = session(3, True)
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries] == [0, 1, 2] and all(e["stage"] == "grpo" for e in entries)
    assert run.ledger.optimiser_steps == sum(e["optimiser_steps"] for e in entries)


def test_a_number_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path):
    policy = new_policy()
    checkpointer = Checkpointer(tmp_path, 1)
    train(policy, config=replace(CONFIG, iterations=1), checkpointer=checkpointer)
    good, original, calls = weights(policy), policy.log_probs_and_entropy, []

    def poisoned(*arguments):
        log_probs, entropy = original(*arguments)
        calls.append(1)
        return log_probs * float("nan"), entropy

    policy.log_probs_and_entropy = poisoned
    with pytest.raises(RuntimeError, match=r"not finite at step 1. Last checkpoint: .*step_000001"):
        train(policy, config=replace(CONFIG, iterations=2), checkpointer=Checkpointer(tmp_path, 1))
    assert calls and torch.equal(weights(policy), good)


def test_an_update_that_runs_away_is_noticed_after_its_last_step(tmp_path):
    "With one mini-batch nothing is measured between the step and the next iteration."
    for rate, moved in ((0.3, r"\d"), (1e30, "nan")):
        config = replace(CONFIG, mini_batch=64, learning_rate=rate, grad_clip=1e9)
        with pytest.raises(RuntimeError, match=f"the update moved the policy by {moved}.* nats a token at step"):
            train(new_policy(), config=config, checkpointer=Checkpointer(tmp_path / moved[-1], 1))
    numbers = []
    train(new_policy(), config=replace(CONFIG, mini_batch=64), log=lambda iteration, **kwargs: numbers.append(kwargs))
    assert all(abs(n["approx_kl"]) < 1e-6 and 1e-6 < abs(n["moved"]) < 0.1 for n in numbers)


def test_sigterm_is_heeded_between_two_chunks(tmp_path):
    "A block of many long dreams takes minutes, and a cluster does not wait that long."
    class Interrupted(Brightness):
        steps = 0
        def step(self, actions):
            self.steps += 1
            if self.steps == 1: os.kill(os.getpid(), signal.SIGTERM)
            return super().step(actions)

    world = Interrupted()
    with heed_sigterm(), pytest.raises(Stopped): train(new_policy(), world, replace(CONFIG, validate_every=0), checkpointer=Checkpointer(tmp_path, every=10))
    assert world.steps == 1 and Checkpointer(tmp_path, every=10).saved()[-1].name == "step_000000"


def test_sigterm_in_a_validation_loses_no_iteration(tmp_path):
    "It waits for the end of the validation; then the iteration that was validated is saved."
    class Interrupted(Brightness):
        validated = 0
        def reset(self, states, streams):
            self.validated += len({state.state_id for state in states}) > 1               # in practice, siblings in blocks of one group
            if self.validated == 4 and not told_to_stop(): os.kill(os.getpid(), signal.SIGTERM)        # three blocks were of the start
            return super().reset(states, streams)

    config = replace(CONFIG, validate_every=2, rollout_groups=1)
    with heed_sigterm(), pytest.raises(Stopped): train(new_policy(), Interrupted(), config, checkpointer=Checkpointer(tmp_path, every=10))
    assert Checkpointer(tmp_path, every=10).saved()[-1].name == "step_000002"
    resumed = train(new_policy(seed=5), config=config, checkpointer=Checkpointer(tmp_path, every=10))
    assert torch.equal(weights(resumed), weights(train(new_policy(), config=config)))


def test_command_answers_a_wrong_path_with_one_line(capsys, tmp_path):
    assert main(["--policy", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def arguments(folder):
    "A policy in `folder`, and the words with which `wmpo-train` takes it."
    new_policy().save_pretrained(folder / "policy")
    sizes = {"image_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_layers": 2, "num_heads": 2,
             "vision_dims": "[16]", "vision_depths": "[3]", "vision_heads": "[2]", "bins": 256}
    overrides = [word for name, value in sizes.items() for word in (f"--policy.{name}", str(value))]
    return ["--policy", str(folder / "policy"), "--output", str(folder / "out"), "--task.instruction", "brighter", *overrides]


@pytest.mark.parametrize("iterations", [0, 2])
def test_a_policy_that_has_learned_all_there_is_is_written(capsys, monkeypatch, tmp_path, iterations):
    "Nothing to learn at once is an error; after some iterations practice ends early, with a policy, again on `--resume`."
    class Easier(Brightness):
        def judge(self, batch):
            batch = super().judge(batch)
            if len(list((tmp_path / "out/checkpoints").glob("step_*"))) >= iterations: batch.success[:] = True
            return batch

    monkeypatch.setattr("wmpo_nb.wmpo._dream", lambda *_: (Easier(), STATES))
    parts = [word for name in ("world-model", "vae", "reward", "data") for word in (f"--{name}", str(tmp_path / "policy"))]      # asked for
    words = [*arguments(tmp_path), *parts, "--task.horizon", "16", "--grpo.validate_every", "0", "--keep", "9"]
    assert main(words) == main([*words, "--resume"]) == (0 if iterations else 2)
    out, error = capsys.readouterr()
    assert ("practice ends early: " in out, "calls everything success" in out + error) == (bool(iterations), True)
    assert (tmp_path / "out/policy").exists() == bool(iterations)
    # trials without a lesson are spent too: both draws of the last iteration
    spent = json.loads((tmp_path / "out/ledger.json").read_text())["imagined_frames"] if iterations else 0
    logged = sum(entry["frames"] for entry in read_metrics(tmp_path / "out"))
    assert not iterations or json.loads((tmp_path / "out/ledger.json").read_text())["real_initial_frames"] == len(STATES)
    assert not iterations or spent - logged == 2 * 8 * 8 * 16
    if iterations: assert not torch.equal(weights(OpenVLAOFT.from_pretrained(tmp_path / "out/policy")), weights(new_policy()))


def test_practice_in_the_simulator_begins_at_collection_states_and_pays_with_real_trials(monkeypatch, tmp_path):
    asked = []
    def practise(policy, world, states, config, *, run, log, checkpointer, **options):
        asked.append(([state.state_id for state in states], config, options))
        log(0, frames=48, trajectories=3)
    monkeypatch.setattr("wmpo_nb.wmpo.train_wmpo", practise)
    monkeypatch.setattr("wmpo_nb.simulator.Simulator", lambda task: Brightness())
    words = ["--world", "simulator", "--collect.trajectories", "5", "--collect.temperature", "0.9", "--grpo.groups", "3", "--seed", "7", "--task.horizon", "16"]
    assert main([*arguments(tmp_path), *words]) == 0
    [(states, config, options)] = asked
    assert states == seeds_for("collection", 5, 7) and options == {"chunks": 2, "temperature": 0.9, "seed": 7}
    assert config == load_preset("tiny_lift", {"grpo.groups": "3"}).grpo
    ledger = json.loads((tmp_path / "out/ledger.json").read_text())
    assert [ledger[name] for name in ("simulator_steps", "real_trajectories", "imagined_frames", "real_initial_frames")] == [48, 3, 0, 0]


def test_command_says_which_part_of_the_dream_is_missing(capsys, tmp_path):
    assert main([*arguments(tmp_path), "--world-model", "w.safetensors"]) == 2
    assert "needs --vae" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_practice_cannot_do_is_said_at_once(capsys, tmp_path):
    words = arguments(tmp_path)
    assert main([*words, "--world", "simulator", "--collect.temperature", "0"]) == 2
    assert "must be above 0" in capsys.readouterr().err
    assert main([*words[:3], str(tmp_path), *words[4:], "--world", "simulator"]) == 2         # would write over the policy it starts from
    assert "where the result will be written" in capsys.readouterr().err and (tmp_path / "policy/model.safetensors").exists()
    assert not (tmp_path / "out").exists()


def test_starts_of_the_same_number_are_told_apart(tmp_path):
    "Released numbers have 8 bits: two starts of one number would be dreamt alike."
    batch = rollout(new_policy(), Brightness(), STATES[:3], chunks=1)
    write_shard(tmp_path / "a.tar", batch)
    starts = dream_starts(tmp_path)
    assert [state.state_id for state in starts] == [0, 1, 2] and all(torch.equal(state.frame, frame) for state, frame in zip(starts, batch.frames[:, 0]))
    batch.state_id[:] = 7
    write_shard(tmp_path / "a.tar", batch)
    assert len({state.state_id for state in dream_starts(tmp_path)}) == 3


def test_pictures_of_another_size_are_refused_before_anything_runs(capsys, tmp_path):
    write_shard(tmp_path / "data/a.tar", rollout(new_policy(), Brightness(), STATES[:3], chunks=1))
    parts = ["--world-model", "w", "--vae", "v", "--reward", "r", "--data", str(tmp_path / "data")]
    assert main([*arguments(tmp_path), *parts]) == 2
    assert "pictures of (16, 16, 3), and tiny_lift 64 x 64" in capsys.readouterr().err and not (tmp_path / "out").exists()
