"The doctor: a healthy kit passes, every sick one is found out, nothing crashes, and every failure names its cure."
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from wmpo_nb import doctor
from wmpo_nb.doctor import (
    CHECKS, REFERENCE, Check, Finding, Kit, compare, diagnose, examine, first_success, load_reference, main, nearest_view,
    parse_pins, record_reference, save_reference, tested_versions, try_backend)
from wmpo_nb.presets import TaskConfig, UserError, load_preset
from wmpo_nb.trajectory import ActionChunk

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-c", "from wmpo_nb.doctor import main; raise SystemExit(main())"]


@pytest.fixture(scope="module")
def kit(): return Kit()


def sick(kit, **changes):
    "A kit with the simulator of `kit`, and its reference changed."
    other = Kit()
    other.environment, other.reference = kit.environment, kit.reference._replace(**changes)
    return other


def is_failure(found):
    assert found.status == "FAIL" and found.text and found.cure and "Traceback" not in found.text
    return True


# ------------------------------------------------------------------------------- the whole command
def test_command_finds_this_machine_fit():
    "Really: three OpenGL probes, the simulator, the shipped reference and policy."
    done = subprocess.run([*COMMAND, "--quick"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for check in CHECKS: assert f"  {check.name:<16}" in done.stdout
    assert "the kit can run" in done.stdout and "FAIL" not in done.stdout and "Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) < 40                         # one screen


def test_command_says_no_without_drawing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "try_backend", lambda name: "no driver")
    monkeypatch.setattr(sys, "platform", "linux")
    assert main(["--quick"]) == 1
    out = capsys.readouterr().out
    assert "apt-get install" in out and out.count("needs drawing") == 5 and "the kit cannot run: 1 failed" in out


def test_help_shows_examples():
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--quick" in done.stdout and "wmpo-doctor --policy" in done.stdout


# ------------------------------------------------------------------------------- nothing crashes
@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("first\nsecond"), SystemExit(3), OSError(28, "No space left"), UserError("u")])
def test_a_crash_is_a_finding(error):
    def find(kit): raise error
    assert is_failure(examine(Check("c", find, "the cure"), None))


def test_every_check_has_a_cure_and_needs_earlier_ones():
    for i, check in enumerate(CHECKS):
        assert check.cure and check.find.__doc__ and set(check.needs) <= {earlier.name for earlier in CHECKS[:i]}


def test_a_failure_skips_what_depends_on_it_and_nothing_else():
    checks = (Check("a", lambda kit: 1 / 0, "x"), Check("b", lambda kit: 1 / 0, "x", ("a",)), Check("c", lambda kit: Finding("ok", ""), "x"),
              Check("d", lambda kit: 1 / 0, "x", slow=True))
    lines = []
    found = diagnose(None, checks, quick=True, show=lines.append)
    assert [f.status for f in found.values()] == ["FAIL", "skipped", "ok", "skipped"] and len(lines) == 4


def test_a_kit_without_anything_still_gets_a_diagnosis(tmp_path):
    "No policy, no reference: failures with cures, no exception."
    kit = Kit(tmp_path, tmp_path, tmp_path / "none.npz")
    checks = [c._replace(needs=()) for c in CHECKS if c.name in ("policy", "first frame", "gripper", "replay states", "replay actions")]
    found = diagnose(kit, checks, show=lambda text: None)
    assert len(found) == 5 and all(is_failure(f) for f in found.values())


# ------------------------------------------------------------------------------- versions
def test_versions_come_from_the_constraints():
    pins = parse_pins((ROOT / "constraints.txt").read_text().splitlines())
    tested = tested_versions(ROOT / "constraints.txt")
    assert {"torch", "mujoco", "robosuite", "numpy", "huggingface-hub"} <= set(tested) and "jupyterlab" not in tested
    assert all(pins[name] == version for name, version in tested.items())


def test_an_installed_package_knows_them_too(tmp_path, monkeypatch):
    "The metadata that setup.py would put into a wheel carries the same pins, as the extra 'tested'."
    for name in ("setup.py", "settings.ini", "constraints.txt", "pyproject.toml", "README.md", "LICENSE", "wmpo_nb/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    code = "from setuptools.build_meta import prepare_metadata_for_build_wheel as m; m('meta')"
    (tmp_path / "meta").mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    made = metadata.Distribution.at(next((tmp_path / "meta").glob("*.dist-info")))
    monkeypatch.setattr(metadata, "requires", lambda name: made.requires)
    assert tested_versions(tmp_path / "nowhere.txt") == tested_versions(ROOT / "constraints.txt") != {}


@pytest.mark.parametrize("name, version, status", [("mujoco", "3.9.0", "FAIL"), ("torch", "missing", "FAIL"), ("pillow", "11.0.0", "warning")])
def test_other_versions(monkeypatch, name, version, status):
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda n: version if n == name else real(n))
    found = doctor.check_versions(None)
    assert found.status == status and version in found.text and f"{name}==" in found.cure


# ------------------------------------------------------------------------------- machine
def test_a_backend_that_does_not_exist():
    assert "nonsense" in try_backend("nonsense")


def test_a_chosen_backend_that_does_not_work(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glx")
    monkeypatch.setattr(doctor, "try_backend", lambda name: "" if name == "egl" else "no window")
    found = doctor.check_drawing(None)
    assert is_failure(found) and found.cure == "export MUJOCO_GL=egl"


@pytest.mark.parametrize("envs, status", [(False, "warning"), (True, "ok")])
def test_the_placeholder_is_recognised(tmp_path, monkeypatch, envs, status):
    (tmp_path / "mimicgen" / ("envs" if envs else "")).mkdir(parents=True)
    (tmp_path / "mimicgen/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor.check_mimicgen(None)
    assert found.status == status and (status == "ok" or "pip uninstall mimicgen" in found.cure)


def test_disk(tmp_path, monkeypatch):
    assert doctor.check_disk(Kit(output=tmp_path / "not/yet/there")).status == "ok"
    monkeypatch.setattr(doctor, "DISK_NEEDED", 1e30)
    assert is_failure(doctor.check_disk(Kit(output=tmp_path)))


# ------------------------------------------------------------------------------- policy
@pytest.fixture
def policy_folder(kit, tmp_path):
    shutil.copytree(kit.folder, tmp_path / "policy")
    return tmp_path / "policy"


def rewrite(path, change):
    record = json.loads(path.read_text())
    path.write_text(json.dumps(change(record)))


@pytest.mark.parametrize("change, said", [
    (lambda r: {"another_task": r["lift"]}, "another_task"),
    (lambda r: {"lift": {"action": r["lift"]["action"] | {"q01": [0.0] * 6, "q99": [1.0] * 6}}}, "seven"),
    (lambda r: {"lift": {"action": r["lift"]["action"] | {"mask": [True] * 7}}}, "gripper")])
def test_wrong_statistics(policy_folder, change, said):
    rewrite(policy_folder / "dataset_statistics.json", change)
    found = examine(next(c for c in CHECKS if c.name == "policy"), Kit(policy_folder))
    assert is_failure(found) and said in found.text + found.cure


def test_damaged_weights(policy_folder):
    path = policy_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert is_failure(examine(next(c for c in CHECKS if c.name == "policy"), Kit(policy_folder)))


def test_a_policy_of_the_released_layout_is_no_failure(policy_folder):
    rewrite(policy_folder / "config.json", lambda record: {name: value for name, value in record.items() if name not in ("policy", "instruction")})
    found = {name: examine(next(c for c in CHECKS if c.name == name), Kit(policy_folder)) for name in ("policy", "base success")}
    assert found["policy"].status == "ok" and found["base success"].status == "skipped"
    assert all("not loaded here" in finding.text for finding in found.values())


class Idle:
    "A policy that does nothing."
    instruction = "lift"
    def eval(self): return self
    def act(self, frames, streams, temperature):
        none = torch.zeros(len(frames), 0)
        return ActionChunk(none.long(), none, torch.zeros(len(frames), 8, 7))


def test_a_policy_that_never_succeeds(kit, monkeypatch):
    assert first_success(Idle(), replace(kit.task, horizon=16, image_size=16), 2) is None
    monkeypatch.setattr(doctor, "first_success", lambda policy, task, count: None)
    dead = Kit()
    dead.policy = Idle()
    assert is_failure(doctor.check_base_success(dead))


# ------------------------------------------------------------------------------- the known demonstration
def test_reference_belongs_to_the_current_task():
    assert load_reference(REFERENCE).task == load_preset(doctor.PRESET).task, "run wmpo-doctor --make-reference"
    assert REFERENCE.stat().st_size < 200_000


def test_a_healthy_simulator_passes(kit):
    for check in (doctor.check_first_frame, doctor.check_gripper, doctor.check_replay_states, doctor.check_replay_actions):
        found = check(kit)
        assert found.status == "ok", found


def test_pictures_turned_swapped_or_of_another_scene_are_found_out(kit):
    frames = kit.reference.frames
    for name, view in doctor.VIEWS.items():
        assert nearest_view(view(frames[0]), frames[0]) == name
        if name == "upright": continue
        found = doctor.check_first_frame(sick(kit, frames=view(frames[0])[None]))
        assert is_failure(found) and name in found.text
    little = np.clip(frames[0].astype(int) + np.random.default_rng(0).integers(-2, 3, frames[0].shape), 0, 255).astype(np.uint8)
    assert compare(little, frames[0]).status == "warning" and "renderer" in compare(little, frames[0]).text
    assert is_failure(compare(frames[-1], frames[0]))


def test_other_physics_is_found_out_by_actions_only(kit):
    model, before = kit.environment.model, kit.environment.model.opt.gravity.copy()
    try:
        model.opt.gravity[:] = 0, 0, -30
        assert doctor.check_replay_actions(kit).status != "ok"
        assert doctor.check_replay_states(kit).status == "ok"
    finally: model.opt.gravity[:] = before


def test_a_gripper_of_the_wrong_sign(kit):
    class Turned:
        def __init__(self, env): self.env = env
        def __getattr__(self, name): return getattr(self.env, name)
        def step(self, action): self.env.step(np.asarray(action) * [1, 1, 1, 1, 1, 1, -1])
    turned = sick(kit)
    turned.environment = Turned(kit.environment)
    assert is_failure(doctor.check_gripper(turned)) and is_failure(doctor.check_replay_actions(turned))


def test_an_old_reference_is_mentioned(kit):
    other = sick(kit)
    other.task = replace(kit.task, horizon=999)
    assert doctor.check_first_frame(other).status == "warning"


def test_reference_file_round_trip_and_damage(tmp_path):
    made = record_reference(TaskConfig(image_size=16, supersample=1), 1_000_003)
    path = tmp_path / "r.npz"
    save_reference(path, made)
    assert os.listdir(tmp_path) == ["r.npz"]
    again = load_reference(path)
    assert again.task == made.task and again.versions == made.versions and np.array_equal(again.frames, made.frames)
    assert all(np.array_equal(a.state, b.state) and a.timestep == b.timestep for a, b in zip(again.snapshots, made.snapshots))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="reference"): load_reference(path)
