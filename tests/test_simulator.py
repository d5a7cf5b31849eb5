"The real simulator: exact replay, determinism, experts, and the protocol."
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from wmpo_nb.mimicgen import installed
from wmpo_nb.presets import TaskConfig, UserError, load_preset
from wmpo_nb.run import Stopped, heed_sigterm
from wmpo_nb.simulator import (
    TASKS, Environment, Simulator, Style, _plan, choose_gl, collect_scripted, initial_states, script_trial, scripted_styles)
from wmpo_nb.trajectory import InitialState, read_shards

TASK = TaskConfig(image_size=32)


@pytest.fixture(scope="module")
def env(): return Environment(TASK)


def run(env, actions):
    for action in actions: env.step(action)
    return env.snapshot()


def same(a, b): return all(np.array_equal(np.concatenate([np.ravel(x) for x in (p if isinstance(p, tuple) else (p,))]),
                                          np.concatenate([np.ravel(x) for x in (q if isinstance(q, tuple) else (q,))])) for p, q in zip(a, b))


@pytest.mark.parametrize("noise, alike", [(0.0, True), (0.02, False)])
def test_start_noise_moves_the_arm(noise, alike):
    env, poses = Environment(replace(TASK, start_noise=noise)), []
    for seed in (1, 2):
        env.reset(seed)
        poses.append(env.data.qpos[env.robot._ref_joint_pos_indexes].copy())
    assert np.array_equal(*poses) == alike


def test_the_shadow_shows_how_near_the_unseen_hand_is():
    "The hand is above the picture at the start: only its shadow, which is darker than the table, tells where it is."
    dark = {}
    for shadows in (False, True):
        view = dict(camera_position=(0.46, 0.24, 1.25), camera_target=(0, 0, 0.885), camera_fovy=32.0, second_camera=())
        env = Environment(replace(TASK, shadows=shadows, draw_arm=False, **view))
        env.reset(1)
        frame = env.frame().astype(int)
        red = frame[..., 0] > frame[..., 1:].max(-1) + 25
        dark[shadows] = int(((frame.max(-1) < 150) & ~red)[TASK.image_size // 3:].sum())
        env.close()
    assert dark[False] < 3 < 10 < dark[True]


def test_the_arm_above_the_hand_is_drawn_on_request():
    frames = []
    for draw_arm in (False, True):
        env = Environment(replace(TASK, draw_arm=draw_arm))
        for _ in range(14): env.step([0, 0, -0.6, 0, 0, 0, -1])
        frames.append(env.frame().astype(int))
        env.close()
    assert (abs(frames[0] - frames[1]).max(-1) > 30).sum() > 20


def test_a_second_camera_sees_what_the_first_cannot():
    "Seen from the front, the cube's column in the upper half tells its y; seen from the side, in the lower half, its x."
    env = Environment(replace(TASK, image_size=64, camera_position=(0.6, 0, 0.95), camera_target=(0, 0, 0.865), camera_fovy=15.0,
                              second_camera=((0, 0.6, 0.95), (0, 0, 0.865), 15.0), draw_arm=False))
    places, columns = [], []
    for seed in range(8):
        env.reset(seed)
        frame = env.frame().astype(int)
        red = frame[..., 0] > frame[..., 1:].max(-1) + 40
        places.append(env.pose("cube")[0][:2])
        columns.append([red[half].nonzero()[1].mean() for half in (slice(0, 32), slice(32, 64))])
    env.close()
    (x, y), (upper, lower) = np.array(places).T, np.array(columns).T
    assert np.corrcoef(upper, y)[0, 1] > 0.97 and np.corrcoef(lower, x)[0, 1] < -0.97
    assert abs(np.corrcoef(upper, x)[0, 1]) < 0.9 and frame.shape == (64, 64, 3)


def test_slips_flip_the_gripper_only(env):
    steady, slipping = script_trial(env, 23, Style()), script_trial(env, 23, Style(slips=0.5))
    first = slice(0, 8)
    assert (steady["actions"][first, 6] == -1).all()
    assert {-1.0, 1.0} == set(slipping["actions"][first, 6].tolist())
    assert np.array_equal(slipping["intended"][first, 6], steady["intended"][first, 6])


def test_snapshot_replays_exactly_through_contact(env):
    "Until the gripper holds the cube, from a snapshot in the middle, after the environment has been elsewhere."
    env.reset(11)
    trial = script_trial(env, 11, Style(noise=0.1))
    env.reset(11)
    actions = trial["actions"][:trial["length"]]
    half = len(actions) // 2
    middle = run(env, actions[:half])
    end, picture = run(env, actions[half:]), env.frame()
    env.reset(12)
    env.restore(middle)
    assert same(run(env, actions[half:]), end)
    assert np.array_equal(env.frame(), picture)
    assert np.array_equal(picture, trial["frames"][trial["length"]])


def test_same_seed_same_world_other_seed_another(env):
    env.reset(5)
    first = env.frame()
    env.reset(6)
    assert not np.array_equal(env.frame(), first)
    env.reset(5)
    assert np.array_equal(env.frame(), first)


def test_expert_succeeds_and_doing_nothing_does_not(env):
    assert all(script_trial(env, seed, Style())["success"] for seed in range(20, 25))
    env.reset(20)
    run(env, np.zeros((20, 7)))
    assert not env.success()


def test_stack_expert_succeeds():
    env = Environment(load_preset("tiny_stack", {"task.image_size": "32"}).task)
    assert sum(script_trial(env, seed, Style())["success"] for seed in range(3)) >= 2


def test_finish_step_is_the_first_success(env):
    trial = script_trial(env, 21, Style())
    env.reset(21)
    states = [(env.step(a), env.success())[1] for a in trial["actions"][:trial["length"]]]
    assert states.index(True) + 1 == trial["finish_step"] and trial["length"] % 8 == 0 and trial["length"] - trial["finish_step"] < 8


def test_workers_do_not_change_results():
    "Two processes and none: the same frames and verdicts, whoever continues which trial."
    states = [InitialState(s, None) for s in (31, 32, 33)]
    actions = torch.rand(3, 2, 8, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = []
    for workers in (0, 2):
        with Simulator(TASK, workers) as simulator:
            frames = [simulator.reset(states)] + [simulator.step(actions[:, k]) for k in range(2)]
            seen.append((frames, simulator.executed.clone()))
    for a, b in zip(seen[0][0], seen[1][0]): assert torch.equal(a, b)
    assert seen[0][1].tolist() == [16, 16, 16]


_WAITING = """
import sys, time
from wmpo_nb.presets import load_preset
from wmpo_nb.simulator import Simulator, initial_states
if __name__ == "__main__":
    simulator = Simulator(load_preset("tiny_lift").task, 2)
    assert len(initial_states(simulator, [1, 2])) == 2
    print("ready", flush=True)
    time.sleep(600)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path):
    "kill -9 leaves nobody behind: the pipe that the workers have inherited is closed by the last of them."
    script = tmp_path / "waiting.py"
    script.write_text(_WAITING)
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    assert process.communicate(timeout=60)[0] == ""


def test_without_every_frame_the_last_of_each_chunk_is_drawn():
    states, actions = [InitialState(31, None)], torch.rand(1, 8, 7, generator=torch.Generator().manual_seed(1))
    with Simulator(TASK, 0) as full, Simulator(TASK, 0, every_frame=False) as quick:
        full.reset(states)
        frames = full.step(actions)
        quick.reset(states)
        assert torch.equal(quick.step(actions)[:, 0], frames[:, -1])


def test_two_simulators_in_one_process_are_two_worlds():
    tasks, states = (TASK, load_preset("tiny_stack").task), [InitialState(31, None)]
    alone = [Simulator(task, 0).reset(states) for task in tasks]
    lift, stack = (Simulator(task, 0) for task in tasks)
    assert torch.equal(lift.reset(states), alone[0]) and torch.equal(stack.reset(states), alone[1]) and not torch.equal(*alone)
    actions = torch.rand(1, 8, 7, generator=torch.Generator().manual_seed(1))
    frames = lift.step(actions)
    del stack
    lift.reset(states)
    assert torch.equal(lift.step(actions), frames)


def test_steps_are_counted():
    before = Simulator.steps
    with Simulator(TASK, 0) as simulator:
        simulator.reset([InitialState(1, None), InitialState(2, None)])
        simulator.step(torch.zeros(2, 8, 7))
    assert Simulator.steps - before == 16


def test_initial_states_show_what_reset_shows():
    with Simulator(TASK, 0) as simulator:
        states = initial_states(simulator, [41, 42])
        assert torch.equal(torch.stack([s.frame for s in states]), simulator.reset(states))


def test_interrupted_collection_goes_on_where_it_stopped(tmp_path):
    with Simulator(TaskConfig(image_size=16, horizon=8), 0) as simulator:
        collect_scripted(simulator, tmp_path / "whole", "near_miss", range(4), shard=2)
        collect_scripted(simulator, tmp_path / "parts", "near_miss", range(4), shard=2)
        kept = (tmp_path / "parts/near_miss_00000_0_2.tar").stat().st_mtime_ns
        (tmp_path / "parts/near_miss_00001_2_2.tar").unlink()
        steps = collect_scripted(simulator, tmp_path / "parts", "near_miss", range(4), shard=2)
    whole, parts = read_shards(tmp_path / "whole"), read_shards(tmp_path / "parts")
    assert torch.equal(whole.frames, parts.frames) and torch.equal(whole.intended, parts.intended)
    assert (tmp_path / "parts/near_miss_00000_0_2.tar").stat().st_mtime_ns == kept
    assert steps == int(parts.length.sum()) == 4 * 8                              # what an interrupted call took is counted too


def test_scripted_trials_of_other_seeds_are_not_taken_for_these(tmp_path):
    with Simulator(TaskConfig(image_size=16, horizon=8), 0) as simulator:
        for seeds in (range(3), range(10, 12), range(4)): collect_scripted(simulator, tmp_path / f"{seeds.start}", "play", seeds, shard=3)
        collect_scripted(simulator, tmp_path / "0", "play", range(10, 12), shard=3)
    assert sorted(read_shards(tmp_path / "0").state_id.tolist()) == [0, 1, 2, 3, 10, 11] and read_shards(tmp_path / "10").state_id.tolist() == [10, 11]



def test_noise_is_executed_but_not_intended(env):
    trial = script_trial(env, 22, Style(noise=0.2))
    moved = np.abs(trial["actions"] - trial["intended"])[:trial["length"]]
    assert moved[:, :6].max() > 0.05 and moved[:, 6].max() == 0
    assert [s.noise for s in scripted_styles("expert", 3, 7)] == [s.noise for s in scripted_styles("expert", 5, 7)][:3]


def test_unknown_task_and_missing_library_are_one_clear_line(monkeypatch):
    with pytest.raises(UserError, match="known: lift, stack"): Environment(TaskConfig(name="juggle"))
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    with pytest.raises(UserError, match="apt-get install"): choose_gl()


def test_a_process_that_has_drawn_ends_in_silence():
    "At exit a renderer is freed before the library it is freed with."
    code = (f"import threading; from wmpo_nb.presets import TaskConfig; from wmpo_nb.simulator import Environment\n"
            f"threading.kept = Environment({TASK!r}); threading.kept.frame()")              # a module that goes late
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_importing_touches_no_simulator():
    code = "import sys, wmpo_nb.simulator; sys.exit('mujoco' in sys.modules or 'robosuite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_placeholder_called_mimicgen_is_recognised(tmp_path, monkeypatch):
    "A package of that name without `envs` is the index's placeholder; without any package the install line is given."
    with pytest.raises(UserError, match="needs NVlabs' MimicGen: pip install"): Environment(TaskConfig(name="coffee"))
    (tmp_path / "mimicgen").mkdir()
    (tmp_path / "mimicgen/__init__.py").write_text("class Client: pass")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="unrelated placeholder"): Environment(TaskConfig(name="coffee"))
    (tmp_path / "mimicgen/envs").mkdir()
    with pytest.raises(UserError, match="make_environment"): Environment(TaskConfig(name="coffee"))


@pytest.mark.parametrize("name", ["stack_free", "stack_three_free"])
def test_towers_are_built_in_order(name):
    "The expert's tower stands; each cube is higher than the one below, and nothing counts while the hand still holds one."
    task = replace(load_preset(f"tiny_{name}").task, image_size=16, shadows=False)
    env = Environment(task)
    trial = script_trial(env, 1, Style())
    heights = [env.data.xpos[env.bodies[cube]][2] for cube in ("cubeB", *env.spec.objects[:1], *env.spec.objects[2:])]
    assert trial["success"] and heights == sorted(heights) and env.success()
    assert heights[-1] > 0.86 + 0.04 * (len(heights) - 2)
    env.env.sim.data.set_joint_qpos(env.env.cubes[-1].joints[0], np.array([0.2, 0.2, heights[-1], 1, 0, 0, 0]))
    env.env.sim.forward()
    assert not env.success()                                # as high as before, and on nothing


def test_a_tower_trial_replays_from_a_state():
    "The same vector, and not the seed, decides where the cubes are."
    env = Environment(replace(load_preset("tiny_stack_three_free").task, image_size=16, idle_steps=0))
    env.place(3)
    state = env.env.sim.get_state().flatten()
    env.reset(4)
    env.reset_to(state)
    assert np.array_equal(env.env.sim.get_state().flatten()[1:], state[1:])


def test_a_scripted_trial_errs_separately_at_each_object():
    "Who grasps badly need not place badly: one displacement for each body, the same whenever the hand goes there."
    steps = _plan(SimpleNamespace(spec=TASKS["stack"]), Style(displacement=0.03, turn=0.3), np.random.default_rng(0))
    errors = {(body, *np.round(offset[:2], 9), turn) for body, offset, turn, *_ in steps}
    assert sorted(body for body, *_ in errors) == ["cubeA", "cubeB"]


def test_sigterm_while_the_policy_thinks_is_no_crash():
    "The workers of the group are gone before the simulator is asked again."
    with Simulator(load_preset("tiny_lift").task, 1) as simulator, heed_sigterm():
        simulator.reset([InitialState(1_000_000, None)])
        worker = next(iter(simulator.pool._processes.values()))
        worker.kill(), worker.join(), os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(Stopped, match="told to stop"): simulator.step(torch.zeros(1, 8, 7))


def test_sigterm_while_scripted_trials_are_made(tmp_path):
    with Simulator(TaskConfig(image_size=16, horizon=8), 0) as simulator, heed_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="trials so far are kept"): collect_scripted(simulator, tmp_path, "play", range(2), shard=1)
        collect_scripted(simulator, tmp_path, "play", range(2), shard=1)
    assert len(list(tmp_path.glob("*.tar"))) == 2


def test_a_task_that_does_not_exist_is_refused_before_a_worker_starts():
    with pytest.raises(UserError, match="no task 'lfit'; known: lift, stack"): Simulator(TaskConfig(name="lfit"), 2)


def test_no_scripted_trials_are_none(tmp_path):
    assert collect_scripted(None, tmp_path / "none", "play", []) == 0 and not (tmp_path / "none").exists()


@pytest.mark.skipif(installed(), reason="MimicGen is installed")
def test_a_task_that_needs_mimicgen_is_refused_before_a_worker_starts():
    with pytest.raises(UserError, match="MimicGen"): Simulator(load_preset("coffee_128").task, 2)
