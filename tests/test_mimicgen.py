"""MimicGen's tasks. What needs MimicGen itself is skipped where it is not installed; disruptions, files and refusals need only XML."""
import json
import pickle
from dataclasses import replace
from xml.etree import ElementTree

import h5py
import numpy as np
import pytest
import torch

from wmpo_nb.mimicgen import (
    DISRUPTIONS, ENVIRONMENTS, NUT, MimicGenEnvironment, check_demonstrations, disrupt, draw_states, installed, least_turns, main, read_demonstrations)
from wmpo_nb.presets import UserError, load_preset, seeds_for
from wmpo_nb.simulator import MIMICGEN, Simulator, Style, script_trial
from wmpo_nb.trajectory import InitialState, load_initial_states, read_shards, save_states

needs_mimicgen = pytest.mark.skipif(not installed(), reason=f"needs MimicGen (non-commercial): pip install --no-deps {MIMICGEN}")
SCENE = """<mujoco><asset><material name="table_mat"/><material name="table_ceramic"/>
<material name="base_redwood_mat" specular="0.4"/><material name="piece_1_redwood_mat" specular="0.4"/></asset><worldbody>
<geom name="table_visual" material="table_ceramic"/><geom name="base_0" rgba="1 0 0 1"/><geom name="base_0_vis" rgba="1 0 0 1"/>
<body name="peg1" pos="0.23 0.1 0.85"/><body name="peg2" pos="0.23 -0.1 0.85"/></worldbody></mujoco>"""


def changes(kind, seed=0):
    "The attributes that a disruption changes in `SCENE`."
    old, new = (list(ElementTree.fromstring(text).iter()) for text in (SCENE, disrupt(SCENE, kind, np.random.default_rng(seed))))
    return {(a.get("name"), key): value for a, b in zip(old, new, strict=True) for key, value in b.attrib.items() if a.get(key) != value}


def test_disruptions_change_what_they_say_and_nothing_else():
    positions = [changes("position", seed) for seed in range(50)]
    ys = [float(change["peg1", "pos"].split()[1]) for change in positions]
    assert all(set(change) == {("peg1", "pos")} for change in positions) and 0.06 <= min(ys) < 0.065 and 0.095 < max(ys) <= 0.10
    assert changes("background") == {("table_visual", "material"): "table_mat"}
    assert changes("texture") == {("base_redwood_mat", "rgba"): "0.3 0.8 0.3 1", ("base_redwood_mat", "specular"): "0.1",
                                  ("base_redwood_mat", "shininess"): "0.05", ("base_0", "rgba"): "0 0 0 0"}


def test_a_disruption_of_another_task_is_refused():
    for kind in DISRUPTIONS:
        with pytest.raises(UserError, match="another task"): disrupt("<mujoco/>", kind, np.random.default_rng(0))
    with pytest.raises(UserError, match="Known: position"): disrupt(SCENE, "colour", None)


def write_demonstrations(path, demonstrations, name="Square_D0"):
    "A file in robomimic's layout of (scene, states, actions)."
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": name, "type": 1, "env_kwargs": {}})
        for i, (scene, states, actions) in enumerate(demonstrations):
            demo = data.create_group(f"demo_{i}")
            demo.attrs["model_file"] = scene
            demo["states"], demo["actions"] = states, actions


def test_demonstrations_are_read_in_order(tmp_path):
    write_demonstrations(tmp_path / "d.hdf5", [(f"<s{i}/>", np.full((3, 5), i), np.zeros((3, 7))) for i in range(11)])
    read = list(read_demonstrations(tmp_path / "d.hdf5"))
    assert [int(states[0, 0]) for _, states, _ in read] == list(range(11)) and read[10][0] == "<s10/>"
    assert read[0][1].dtype == np.float64 and read[0][2].dtype == np.float32


def test_files_that_are_not_demonstrations(tmp_path):
    (tmp_path / "text.hdf5").write_text("no")
    with h5py.File(tmp_path / "other.hdf5", "w") as file: file["x"] = np.zeros(3)
    for name in ("text.hdf5", "other.hdf5", "missing.hdf5"):
        with pytest.raises(UserError, match="robomimic's layout"): list(read_demonstrations(tmp_path / name))
        with pytest.raises(UserError, match="robomimic's layout"): check_demonstrations(tmp_path / name, load_preset("square_128").task)
    write_demonstrations(tmp_path / "coffee.hdf5", [], "Coffee_D0")
    with pytest.raises(UserError, match="of Coffee_D0, not of square"): check_demonstrations(tmp_path / "coffee.hdf5", load_preset("square_128").task)
    check_demonstrations(tmp_path / "coffee.hdf5", load_preset("coffee_128").task)


def test_the_command_converts_the_authors_states(tmp_path, capsys):
    (tmp_path / "s.pkl").write_bytes(pickle.dumps([{"states": np.arange(3.0) + i, "model": f"<m{i}/>"} for i in range(2)]))
    assert main(["convert", "--source", str(tmp_path / "s.pkl"), "--output", str(tmp_path / "out")]) == 0
    states = load_initial_states(tmp_path / "out/states.npz")
    assert [(s.state_id, s.simulator_state[0], s.model_xml) for s in states] == [(0, 0.0, "<m0/>"), (1, 1.0, "<m1/>")]


@pytest.mark.parametrize("argv, complaint", [
    (["render"], "--source"), (["states"], "tiny_lift|lift is no task"), (["states", "--preset", "square_128", "--disrupt", "light"], "Known"),
    (["states", "--preset", "square_128", "--disrupt", "texture"], "three_piece_assembly, not square"),
    (["convert", "--source", "s.pkl", "--disrupt", "position"], "use it with 'states'"), (["convert", "--source", "s.pkl", "--count", "1"], "all states"),
    (["states", "--preset", "square_128", "--count", "0"], "starts at 1")])
def test_wrong_words_are_answered_in_one_line(argv, complaint, capsys, tmp_path):
    import re
    assert main([*argv, "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1 and re.search(complaint, err) and not (tmp_path / "out").exists()


def test_demonstrations_are_not_drawn_over_others(capsys, tmp_path):
    (tmp_path / "demo_00007.tar").write_bytes(b"of another task, perhaps")
    assert main(["render", "--preset", "square_128", "--source", "square_d0.hdf5", "--output", str(tmp_path)]) == 2
    assert "already holds demonstrations" in capsys.readouterr().err and (tmp_path / "demo_00007.tar").exists()


@pytest.mark.parametrize("joint", [-1.0, 0.8])
def test_turns_lead_to_the_grasp_and_to_the_target_within_the_joints_reach(joint):
    for hand, part, target in np.random.default_rng(0).uniform(-np.pi, np.pi, (500, 3)):
        first, second, fingers, yaw = least_turns(hand, part, target, joint, NUT)
        assert fingers in NUT.fingers and yaw in NUT.yaws
        assert np.isclose(np.exp(1j * (hand + first)), np.exp(1j * (part + fingers)))
        assert np.isclose(np.exp(1j * (part + second)), np.exp(1j * (target + yaw)))
        assert abs(joint - first) < 2.7 and abs(joint - first - second) < 2.7


def test_the_hand_takes_the_part_from_the_nearer_side():
    "The nut may be taken from two sides, both within reach, and fits as it lies."
    first, second, fingers, _ = least_turns(-1.0, 0.0, -np.pi, 0.0, NUT)
    assert np.allclose((first, second, fingers), (1 - np.pi / 2, 0, -np.pi / 2))


def test_states_are_drawn_of_the_test_seeds(tmp_path, monkeypatch, capsys):
    drawn = []
    def draw(task, seeds, change):
        drawn.append(seeds)
        return np.zeros((len(seeds), 4)), ["<m/>"] * len(seeds)
    monkeypatch.setattr("wmpo_nb.mimicgen.draw_states", draw)
    argv = ["states", "--preset", "square_128", "--output", str(tmp_path)]
    assert main([*argv, "--count", "3", "--seed", "2"]) == 0 and "3 states in" in capsys.readouterr().out
    assert main(argv) == 0
    assert drawn == [seeds_for("test", 3, 2), seeds_for("test", load_preset("square_128").evaluation.states)]


@pytest.mark.skipif(installed(), reason="MimicGen is installed")
def test_without_mimicgen_the_install_line_is_given():
    with pytest.raises(UserError, match="needs NVlabs' MimicGen: pip install"): Simulator(load_preset("square_128").task, 0)


# --- with MimicGen -------------------------------------------------------------------------------------------------

def small(name, size=64): return replace(load_preset(f"{name}_128").task, image_size=size)


@pytest.fixture(scope="module")
def square():
    env = MimicGenEnvironment(small("square"))
    yield env
    env.close()


@needs_mimicgen
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_tasks_begin_alike_and_from_states(name, tmp_path):
    "A seed, and the state and scene written for it, begin the same trial; another seed another one."
    task = small(name, 32)
    save_states(tmp_path / "s.npz", *draw_states(task, [5, 6]))
    env, objects = MimicGenEnvironment(task), []
    for state in load_initial_states(tmp_path / "s.npz"):
        env.reset_to(state.simulator_state, state.model_xml)
        objects.append(env.data.qpos[9:].copy())           # after the arm's seven joints and the two fingers
        assert not env.success() and env.frame().std() > 20
    env.reset(5)
    # the arm may lean a little: a state does not say which posture its controller prefers
    assert np.allclose(env.data.qpos[9:], objects[0], atol=2e-3) and not np.allclose(objects[1], objects[0], atol=2e-3)
    with pytest.raises(UserError, match="numbers does not fit"): env.reset_to(np.zeros(4))
    env.close()


@needs_mimicgen
def test_frames_are_robosuites_own(square):
    from robosuite.utils.binding_utils import MjRenderContextOffscreen
    square.reset(3)
    ours = square.frame()
    context = MjRenderContextOffscreen(square.env.sim, device_id=-1)
    context.vopt.geomgroup[0] = 0
    theirs = square.env.sim.render(64, 64, camera_name="agentview")[::-1]
    square._attach()                                        # robosuite's context changed the current one
    assert ours.std() > 20 and np.array_equal(ours, theirs)


@needs_mimicgen
def test_snapshots_replay(square):
    rng = np.random.default_rng(0)
    first, second = rng.uniform(-1, 1, (2, 6, 7))
    square.reset(1)
    for action in first: square.step(action)
    middle = square.snapshot()
    for action in second: square.step(action)
    end = square.snapshot().snapshot.state
    square.reset(2)
    square.restore(middle)
    for action in second: square.step(action)
    assert np.array_equal(square.snapshot().snapshot.state, end)


@needs_mimicgen
def test_the_moved_peg_is_where_the_nut_must_go(square):
    states, scenes = draw_states(small("square", 32), [1], lambda scene, rng: disrupt(scene, "position", rng))
    square.reset_to(states[0], scenes[0])
    assert 0.06 <= square.data.xpos[square.env.peg1_body_id][1] < 0.0999
    square.reset(1)
    assert abs(square.data.xpos[square.env.peg1_body_id][1] - 0.1) < 1e-9


@needs_mimicgen
def test_demonstrations_are_drawn_as_they_happened(square, tmp_path):
    "A trial recorded as robomimic does, drawn again from its states by the command, shows what was seen."
    rng = np.random.default_rng(0)
    square.place(4)
    scene, states, actions, frames = square.env.sim.model.get_xml(), [], [], []
    for _ in range(12):
        states.append(square.env.sim.get_state().flatten())
        frames.append(square.frame())
        actions.append(rng.uniform(-1, 1, 7))
        square.step(actions[-1])
    write_demonstrations(tmp_path / "d.hdf5", [(scene, states, actions), (scene, np.repeat(states, 20, 0), np.repeat(actions, 20, 0))])
    argv = ["render", "--preset", "square_128", "--task.image_size", "64", "--source", str(tmp_path / "d.hdf5"), "--output", str(tmp_path / "out")]
    assert main(argv) == 0
    batch = read_shards(tmp_path / "out")
    assert len(batch) == 1 and int(batch.length) == 12 and batch.frames.shape[1] == 185       # the second is too long
    assert np.array_equal(batch.frames[0, :12].numpy(), np.stack(frames)) and np.allclose(batch.actions[0, :12], actions)
    before = next((tmp_path / "out").glob("*.tar")).stat().st_mtime_ns
    assert main([*argv, "--resume"]) == 0 and next((tmp_path / "out").glob("*.tar")).stat().st_mtime_ns == before       # kept
    write_demonstrations(tmp_path / "e.hdf5", [(scene, states, actions[:-1])])
    with pytest.raises(UserError, match="12 states and 11 actions"): list(read_demonstrations(tmp_path / "e.hdf5"))


@needs_mimicgen
def test_the_simulator_is_a_world_of_states(tmp_path):
    states, scenes = draw_states(small("square", 32), [1, 2])
    starts = [InitialState(i, None, state, scene) for i, (state, scene) in enumerate(zip(states, scenes))]
    with Simulator(small("square", 32), 0, every_frame=False) as world:
        first = world.reset(starts)
        frames = world.step(torch.zeros(2, 8, 7))
    assert first.shape == (2, 32, 32, 3) and frames.shape == (2, 1, 32, 32, 3) and not torch.equal(first[0], first[1])


@needs_mimicgen
@pytest.mark.parametrize("name", ["square", "coffee"])
def test_experts_steer_the_part_and_not_the_hand(name):
    "Each grasp misses its place by millimetres and degrees, and the nut still comes down around the peg, the pod into its holder, within the paper's horizon."
    env, style = MimicGenEnvironment(small(name, 16)), Style(displacement=0.004, turn=0.05)
    trials = [script_trial(env, seed, style) for seed in seeds_for("held_out", 4)]
    env.close()
    assert sum(trial["success"] for trial in trials) >= 3


@needs_mimicgen
@pytest.mark.parametrize("kind", ["background", "texture"])
def test_disruptions_are_seen_and_change_no_physics(kind):
    name = DISRUPTIONS[kind][0]
    task, frames, states = replace(small(name), idle_steps=1), [], []
    (state,), (scene,) = draw_states(task, [1])
    env = MimicGenEnvironment(task)
    for look in (scene, disrupt(scene, kind, np.random.default_rng(0))):
        env.reset_to(state, look)
        frames.append(env.frame().astype(int))
        states.append(env.data.qpos.copy())
    env.close()
    assert np.array_equal(*states) and (np.abs(frames[0] - frames[1]).max(-1) > 10).mean() > 0.02


@needs_mimicgen
def test_the_towers_expert_stacks_three_here_too():
    env = MimicGenEnvironment(small("stack_three", 16))
    assert script_trial(env, 1, Style())["success"]
    env.close()
