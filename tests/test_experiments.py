"Cells: started in order, never twice, failures named; worlds disturbed where they should be; grasps judged by what the fingers did."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import refusal
from wmpo_nb.demo import Parts, weight_digests
from wmpo_nb.evaluation import evaluate
from wmpo_nb.experiments import (ABLATIONS, EXPERIMENTS, KINDS, BranchedDream, Cell, Job, artefact, branch_points, cell_words, cells_of, changed_fields,
                                 check_alike, collate, displaced, disturb, failed_grasps, is_finished, check_kept, job_name, main, matching_demo, only, open_lock, plan, result_of, run_jobs,
                                 same_preset, spared, vary, watch_trial)
from wmpo_nb.from_scratch import shipped_weights
from wmpo_nb.grpo import keep_groups
from wmpo_nb.presets import PRESETS, UserError, load_preset, override, seeds_for
from wmpo_nb.results import PAGES
from wmpo_nb.simulator import Simulator
from wmpo_nb.trajectory import InitialState, Streams, TrajectoryBatch
from wmpo_nb.weights import read_json, write_json
from wmpo_nb.world_model import action_inputs

PRESET = load_preset("tiny_lift")
LIFT = shipped_weights(PRESET)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_process_is_told_its_preset(name):
    preset = override(override(load_preset(name), "grpo.learning_rate", "1e-7"), "collect.trajectories", "16")
    words = changed_fields(preset)
    assert load_preset(name, {k[2:]: v for k, v in zip(words[::2], words[1::2])}) == preset


@pytest.mark.parametrize("experiment", sorted(EXPERIMENTS))
def test_plans_are_complete_and_without_duplicates(experiment):
    jobs = plan(experiment, PRESET, [128, 512], [0, 1])
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names) and {need for job in jobs for need in job.needs} <= set(names)
    assert all(job.kind in KINDS for job in jobs) and experiment in PAGES
    assert sum(job.name.startswith(f"{experiment}/") for job in jobs) >= 4
    # one base cell a seed serves both budgets, and says nothing about either
    base = [job for job in jobs if job.kind == "base"]
    assert experiment == "noise" or len(base) == 2 and {job.preset.collect.trajectories for job in base} == {128}


def test_some_cells_come_with_what_they_need(capsys, tmp_path):
    jobs = plan("agreement", PRESET, [128], [0, 1])
    assert only(jobs, ["agreement"]) == jobs                           # needs all of Table 1
    some = only(plan("disruptions", PRESET, [128], [0]), ["base-p*", "wmpo-none"])
    assert [job.name.split("/")[-1] for job in some if job.kind == "disruption"] == ["base-position", "wmpo-none"]
    assert {need for job in some for need in job.needs} <= {job.name for job in some}
    assert [job.kind for job in only(plan("table1", PRESET, [128], [0]), ["dpo"])] == ["trajectories", "dpo"]
    said = message(capsys, "table1", "--only", "ppo", "--output", str(tmp_path / "runs"))
    assert "ppo" in said and "dpo" in said and not (tmp_path / "runs").exists()


def test_variants_change_what_they_say():
    assert vary(PRESET, ABLATIONS["flow steps"]["30"])[0].world_model.flow_steps == 30
    for variants in (ABLATIONS["group size"],):                       # as many trajectories per iteration, cut otherwise
        for changes in variants.values():
            changed = vary(PRESET, changes)[0].grpo
            every = torch.arange(changed.group_size) < torch.arange(changed.group_size + 1)[:, None]       # from no success to nothing else
            assert keep_groups(every, changed.accuracy_low, changed.accuracy_high).tolist() == [False] + [True] * (changed.group_size - 1) + [False]
            assert changed.groups * changed.group_size == PRESET.grpo.groups * PRESET.grpo.group_size
    same, options = vary(PRESET, ABLATIONS["temperature"]["1.6"])
    assert same == PRESET and options == {"temperature": 1.6}          # the P trajectories stay what they are
    assert vary(PRESET, ABLATIONS["other noise"]["2"]) == (PRESET, {"noise": 2})
    off = vary(PRESET, ABLATIONS["dynamic sampling"]["off"])[0].grpo
    assert (off.accuracy_low, off.accuracy_high) == (0.0, 1.0)


def writer(root, delay=0.0):
    "A job that writes its cell and config, and fails if it is called so."
    def start(job):
        cell, config = Path(root, job.name, "cell.json"), Path(root, job.name, "config.json")
        code = (f"import json, sys, time\nfrom pathlib import Path\ntime.sleep({delay})\n"
                f"if {job.kind == 'fails'}: sys.exit('no luck today')\n"
                f"Path({str(config)!r}).write_text(json.dumps({{'preset': {job.preset.to_dict()!r}}}))\n"
                f"Path({str(cell)!r}).write_text(json.dumps({{'at': time.time()}}))")
        return [sys.executable, "-S", "-c", code]
    return start


def test_jobs_run_in_order_once_and_failures_are_named(tmp_path, capsys):
    jobs = [Job("late", "x", PRESET, 0, {}, ("early",)), Job("early", "x", PRESET, 0), Job("bad", "fails", PRESET, 0),
            Job("victim", "x", PRESET, 0, {}, ("bad",)), Job("grandchild", "x", PRESET, 0, {}, ("victim",))]
    assert run_jobs(tmp_path, jobs, writer(tmp_path), 2) == ["bad", "victim", "grandchild"]
    at = {name: read_json(tmp_path / name / "cell.json")["at"] for name in ("early", "late")}
    assert at["early"] < at["late"] and not (tmp_path / "victim/cell.json").exists()
    assert "FAILED   bad: no luck today" in capsys.readouterr().out
    healed = [job._replace(kind="x") for job in jobs]
    assert run_jobs(tmp_path, healed, writer(tmp_path), 2) == []
    assert {name: read_json(tmp_path / name / "cell.json")["at"] for name in at} == at           # not computed again


def test_a_cell_of_other_settings_is_refused(tmp_path):
    job = Job("one", "x", PRESET, 0)
    assert not is_finished(tmp_path, job)
    run_jobs(tmp_path, [job], writer(tmp_path), 1)
    assert is_finished(tmp_path, job)
    with pytest.raises(UserError, match="other settings"):
        is_finished(tmp_path, job._replace(preset=override(PRESET, "grpo.iterations", "3")))
    three = Job("lifelong", "lifelong", PRESET, 0, {"rounds": 3})              # what only its options say counts as well
    Cell(three, tmp_path, LIFT, tmp_path / "cache").run.close()
    write_json(tmp_path / "lifelong/cell.json", {})
    assert is_finished(tmp_path, three, LIFT)
    with pytest.raises(UserError, match="other settings"): is_finished(tmp_path, three._replace(options={"rounds": 4}), LIFT)


def test_a_cell_from_other_weights_is_refused(tmp_path):
    weights, jobs = tmp_path / "weights", [Job("dream", "wmpo", PRESET, 0), Job("real", "grpo", PRESET, 0), Job("old", "wmpo", PRESET, 0)]
    for name in ("world_model.safetensors", "policy_lift/model.safetensors"):
        (weights / name).parent.mkdir(parents=True, exist_ok=True)
        (weights / name).write_bytes(b"first")
    for job in jobs:
        write_json(tmp_path / job.name / "cell.json", {})
        if job.name != "old": Cell(job, tmp_path, weights, tmp_path / "cache").run.close()
    assert is_finished(tmp_path, jobs[0], weights) and is_finished(tmp_path, jobs[1], weights)
    with pytest.raises(UserError, match="does not say"): is_finished(tmp_path, jobs[2], weights)           # nobody noted which
    (weights / "world_model.safetensors").write_bytes(b"second")
    assert is_finished(tmp_path, jobs[1], weights)                                                         # it never dreamt
    with pytest.raises(UserError, match="other weights"): run_jobs(tmp_path, jobs[:2], None, 1, weights)
    (weights / "policy_lift/model.safetensors").write_bytes(b"second")
    with pytest.raises(UserError, match="other weights"): is_finished(tmp_path, jobs[1], weights)


def test_cells_of_different_weights_or_settings_share_no_page(tmp_path):
    def add(seed, experiment="table1", weights="aaaa", **fields):
        name = job_name(experiment, PRESET, seed, "wmpo")
        preset = override(PRESET, *next(iter(fields.items()))) if fields else PRESET
        write_json(tmp_path / name / "cell.json", {"experiment": experiment, "seed": seed})
        write_json(tmp_path / name / "config.json", {"preset": preset.to_dict()})
        write_json(tmp_path / name / "weights.json", {"world_model.safetensors": weights})
        return tmp_path / name / "cell.json"
    add(0), add(1, "ablations", **{"grpo.groups": "4"}), add(2, **{"collect.trajectories": "512"})
    check_alike(tmp_path, "ablations")                                         # what is varied may vary
    for wrong, complaint in ((dict(weights="bbbb"), "the weights world_model"), ({"grpo.iterations": "2"}, "--grpo.iterations")):
        cell = add(3, **wrong)
        for experiment in ("table1", "ablations"):
            with pytest.raises(UserError, match=complaint): collate(tmp_path, experiment, tmp_path / "results")
        cell.unlink()
    check_alike(tmp_path, "table1")


def test_another_judge_does_not_make_the_baselines_old(tmp_path):
    strict = override(PRESET, "reward_training.threshold_beta", "0.25")
    assert strict != PRESET
    for method in ("base", "grpo", "wmpo"):
        name = job_name("table1", PRESET, 0, method)
        write_json(tmp_path / name / "cell.json", {"experiment": "table1", "preset": "tiny_lift", "P": 128, "seed": 0, "method": method})
        write_json(tmp_path / name / "config.json", {"preset": PRESET.to_dict()})
        write_json(tmp_path / name / "weights.json", {"policy_lift/model.safetensors": "aaaa"})
    jobs = {job.kind: job for job in plan("table1", strict, [128], [0])}
    assert is_finished(tmp_path, jobs["base"]) and is_finished(tmp_path, jobs["grpo"])
    with pytest.raises(UserError, match="other settings"): is_finished(tmp_path, jobs["wmpo"])
    with pytest.raises(UserError, match="other settings"): is_finished(tmp_path, jobs["grpo"]._replace(preset=override(PRESET, "grpo.groups", "2")))
    (tmp_path / jobs["wmpo"].name / "cell.json").unlink()
    # a page of baselines says nothing of dreams, so a cell that dreams in any way may join it
    made_with = check_alike(tmp_path, "table1")["tiny_lift"]
    assert "--grpo.groups" in made_with and not any(name.startswith(("--reward_training.", "--stdit.")) for name in made_with)
    write_json(tmp_path / "table1.json", {"experiment": "table1", "commands": [], "made_with": {"tiny_lift": made_with}, "cells": [
        {"cell": jobs["grpo"].name, "preset": "tiny_lift", "P": 128, "seed": 0, "method": "grpo", "ledger": {}, "outcome": {"states": [0, 1], "success": "1", "mean_steps": 9.0}}]})
    write_json(tmp_path / "new" / jobs["wmpo"].name / "cell.json", {})
    write_json(tmp_path / "new" / jobs["wmpo"].name / "config.json", {"preset": strict.to_dict()})
    assert check_alike(tmp_path / "new", "table1", tmp_path / "table1.json")["tiny_lift"]["--reward_training.threshold_beta"] == 0.25


def test_a_result_file_is_extended_and_never_overwritten(tmp_path, capsys):
    def add(root, method, seed, weights="aaaa", **more):
        folder = tmp_path / root / job_name("table1", PRESET, seed, method)
        found = {"experiment": "table1", "preset": "tiny_lift", "P": None if method == "base" else 128, "seed": seed, "method": method, "ledger": {}}
        write_json(folder / "cell.json", found | {"outcome": {"states": [0, 3], "success": "0011", "mean_steps": 9.0}} | more)
        write_json(folder / "config.json", {"preset": PRESET.to_dict()})
        write_json(folder / "weights.json", {"policy_lift/model.safetensors": weights})
        write_json(tmp_path / root / "table1/commands.json", [f"wmpo-experiment table1 --seeds {seed}"])
    def cells(): return {(c["method"], c["seed"]): c["outcome"]["success"] for c in read_json(file)["cells"]}
    results, file = tmp_path / "results", tmp_path / "results/table1.json"
    add("here", "base", 0), add("here", "dpo", 0)
    collate(tmp_path / "here", "table1", results)
    before = file.read_bytes()
    # another machine, another seed: refused before any work, unless told to keep what is there
    add("there", "base", 1), add("there", "dpo", 1, outcome={"states": [0, 3], "success": "1111", "mean_steps": 9.0})
    jobs = plan("table1", PRESET, [128], [1])
    with pytest.raises(UserError, match="2 cells .* such as table1/tiny_lift/P0/seed0/base"): check_kept(file, tmp_path / "there", jobs)
    check_kept(file, tmp_path / "here", jobs), check_kept(file, tmp_path / "there", plan("table1", PRESET, [128], [0, 1]))
    with pytest.raises(UserError, match="--extend"): collate(tmp_path / "there", "table1", results)       # nor at the end, hours later
    said = message(capsys, "table1", "--seeds", "1", "--output", str(tmp_path / "there"), "--results", str(results))
    assert "2 cells" in said and "--extend" in said and file.read_bytes() == before
    collate(tmp_path / "there", "table1", results, extend=True)
    assert cells() == {("base", 0): "0011", ("dpo", 0): "0011", ("base", 1): "0011", ("dpo", 1): "1111"}
    assert len(read_json(file)["commands"]) == 2 and "Seeds: 0, 1" in (results / "table1.md").read_text()
    add("there", "dpo", 1)                                                     # a cell that was made again replaces the older one
    collate(tmp_path / "there", "table1", results, extend=True)
    assert cells()[("dpo", 1)] == "0011" and len(cells()) == 4
    # other weights, other settings, or nobody knows: not on this page
    extended = file.read_bytes()
    add("else", "base", 2, weights="bbbb")
    with pytest.raises(UserError, match="table1.json and .* differ in the weights policy_lift"): collate(tmp_path / "else", "table1", results, extend=True)
    add("else", "base", 2)
    write_json(tmp_path / "else" / job_name("table1", PRESET, 2, "base") / "config.json", {"preset": override(PRESET, "grpo.groups", "2").to_dict()})
    with pytest.raises(UserError, match="--grpo.groups"): collate(tmp_path / "else", "table1", results, extend=True)
    assert file.read_bytes() == extended
    write_json(file, read_json(file) | {"made_with": {}})
    with pytest.raises(UserError, match="does not say"): collate(tmp_path / "there", "table1", results, extend=True)


def test_settings_newer_than_a_result_file_were_at_their_defaults(tmp_path, capsys):
    "A file from before a field existed takes cells with its default and no others, and says so before anything is started."
    results, old = tmp_path / "results", {f"--{stage}.{name}": value for stage, fields in PRESET.to_dict().items() if isinstance(fields, dict)
                                          for name, value in fields.items() if stage in ("grpo", "reward_training")}
    del old["--reward_training.threshold_beta"]
    cell = {"cell": job_name("table1", PRESET, 0, "base"), "preset": "tiny_lift", "P": None, "seed": 0, "method": "base", "ledger": {}, "outcome": {"states": [0, 1], "success": "01", "mean_steps": 9.0}}
    weights = {f"the weights {name}": digest for name, digest in weight_digests(LIFT, PRESET).items()}
    write_json(results / "table1.json", {"experiment": "table1", "commands": [], "cells": [cell], "made_with": {"tiny_lift": weights | old}})
    def add(**changes):
        name, preset = job_name("table1", PRESET, 1, "wmpo"), load_preset("tiny_lift", changes)
        write_json(tmp_path / "runs" / name / "cell.json", cell | {"cell": name, "seed": 1, "P": 128, "method": "wmpo"})
        write_json(tmp_path / "runs" / name / "config.json", {"preset": preset.to_dict()})
        write_json(tmp_path / "runs" / name / "weights.json", weight_digests(LIFT, PRESET))
    add(**{"reward_training.threshold_beta": "0.5"})
    with pytest.raises(UserError, match="--reward_training.threshold_beta"): collate(tmp_path / "runs", "table1", results, extend=True)
    add()
    collate(tmp_path / "runs", "table1", results, extend=True)
    assert read_json(results / "table1.json")["made_with"]["tiny_lift"]["--reward_training.threshold_beta"] == 1.0
    for changes in (("--reward_training.threshold_beta", "0.5"), ("--grpo.iterations", "3")):
        said = message(capsys, "table1", "--seeds", "2", "--extend", "--output", str(tmp_path / "other"), "--results", str(results), *changes)
        assert changes[0] in said and "differ" in said and not (tmp_path / "other").exists()


def test_a_variant_is_compared_with_table_1_without_making_it_again(tmp_path):
    root, results, preset = tmp_path / "runs", tmp_path / "results", override(PRESET, "collect.trajectories", "512")
    outcome = {"states": [0, 3], "success": "0011", "mean_steps": 9.0}
    cell = lambda method, P: {"cell": f"table1/tiny_lift/P{P or 0}/seed0/{method}", "preset": "tiny_lift", "P": P, "seed": 0, "method": method,
                              "outcome": outcome, "ledger": {}}
    weights = {f"the weights {name}": digest for name, digest in weight_digests(LIFT, PRESET).items()}
    def record(**made_with):
        known = {"experiment": "table1", "commands": [], "cells": [cell("base", None), cell("wmpo", 512), cell("wmpo", 128), cell("dpo", 512)]}
        write_json(results / "table1.json", known | {"made_with": {"tiny_lift": weights | made_with}})
    names = lambda experiment="ablations", *patterns: [job.name.split("/")[-1] for job in spared(only(plan(experiment, preset, [512], [0]), patterns or ["*"]), results, preset, LIFT)]
    assert {"base", "wmpo"} <= set(names())                                    # no results yet
    record(**{"--grpo.groups": PRESET.grpo.groups})
    assert names("ablations", "judge-strict") == ["trajectories", "judge-strict"]
    assert "wmpo" in names("flow-steps") and "wmpo" in names("table1")         # its dream is looked into; it is itself asked for
    for other in ({"--grpo.groups": 3}, {"the weights reward.safetensors": "other"}):
        record(**other)
        assert {"base", "wmpo"} <= set(names())
    record(**{"--grpo.groups": PRESET.grpo.groups})
    name = job_name("ablations", preset, 0, "judge-strict")
    found = {"experiment": "ablations", "preset": "tiny_lift", "P": 512, "seed": 0, "ablation": "judge", "variant": "strict", "outcome": outcome, "ledger": {}}
    write_json(root / name / "cell.json", found)
    write_json(root / name / "weights.json", weight_digests(LIFT, PRESET))
    collate(root, "ablations", results, extend=True)
    written = read_json(results / "ablations.json")
    assert [c["cell"] for c in written["cells"]] == [name, "table1/tiny_lift/P0/seed0/base", "table1/tiny_lift/P512/seed0/wmpo"]
    assert written["made_with"]["tiny_lift"]["--grpo.groups"] == PRESET.grpo.groups
    assert "judge strict against WMPO as it is" in (results / "ablations.md").read_text()
    before = written["cells"]
    collate(root, "ablations", results, extend=True)
    assert read_json(results / "ablations.json")["cells"] == before


def test_a_cell_is_filled_by_one_process_at_a_time(tmp_path):
    held = open_lock(tmp_path / "cell")
    code = f"from pathlib import Path; from wmpo_nb.experiments import open_lock; open_lock(Path(r'{tmp_path}/cell')); print('mine', flush=True)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert "another process" in other.stdout.readline() and other.poll() is None
    held.close()
    assert other.stdout.readline() == "mine\n" and other.wait(60) == 0


def test_a_cell_that_another_command_filled_meanwhile_is_not_done_again(tmp_path):
    jobs, runs = [Job("first", "x", PRESET, 0), Job("second", "x", PRESET, 0)], []
    def start(job):
        runs.append(job.name)
        (tmp_path / "second").mkdir()
        subprocess.run(writer(tmp_path)(jobs[1]), check=True)                  # somebody else, while ours is at the first
        return writer(tmp_path)(job)
    assert run_jobs(tmp_path, jobs, start, 1) == [] and runs == ["first"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_ends_the_processes(tmp_path, how):
    code = (f"from wmpo_nb.experiments import Job, run_jobs\nimport sys\nfrom wmpo_nb.presets import load_preset\n"
            f"job = Job('slow', 'x', load_preset('tiny_lift'), 0)\n"
            f"start = lambda job: [sys.executable, '-S', '-c', 'import os, time; open(r\"{tmp_path}/pid\", \"w\").write(str(os.getpid())); time.sleep(600)']\n"
            f"from wmpo_nb.run import heed_sigterm\nwith heed_sigterm(): run_jobs(r'{tmp_path}', [job], start, 1)")
    # a shell in the background hands SIGINT down as ignored
    parent = subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + code],
                              stderr=subprocess.DEVNULL)
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()): time.sleep(0.05)
    child = int((tmp_path / "pid").read_text())
    parent.send_signal(how)
    parent.wait(60)
    with pytest.raises(ProcessLookupError): os.kill(child, 0)


def test_presets_are_recognised_though_fields_are_added():
    recorded = PRESET.to_dict()
    del recorded["grpo"]["clip_low"]                                  # as if an older version had not known it
    assert all(same_preset(load_preset(name).to_dict(), load_preset(name)) for name in PRESETS)
    assert same_preset(recorded, PRESET) and not same_preset(recorded, override(PRESET, "grpo.clip_low", "0.1"))
    assert same_preset(recorded, override(PRESET, "grpo.iterations", "1"), ("task", "evaluation"))
    longer = override(PRESET, "pretraining.steps", "7")               # made the weights that a cell is given, and is nothing to the cell
    assert same_preset(recorded, longer) and not same_preset(recorded, longer, ("pretraining",))


def test_a_demo_in_another_world_model_is_not_taken_for_this_one(tmp_path):
    parts = Parts(LIFT, PRESET)
    began, states = weight_digests(LIFT, PRESET), [InitialState(seed, None) for seed in seeds_for("selection", 2)]
    found = evaluate(parts.base, Simulator(PRESET.task, 0, every_frame=False), states, chunks=PRESET.task.chunks)
    assert set(began) == {"vae.safetensors", "world_model.safetensors", "reward.safetensors", "policy_lift/model.safetensors"}
    for name, weights in (("same", began), ("other", began | {"world_model.safetensors": "0" * 16}), ("unknown", None)):
        write_json(tmp_path / name / "config.json", {"seed": 0, "preset": PRESET.to_dict()})
        write_json(tmp_path / name / "evaluations.json", {"base policy": found.to_dict()})
        write_json(tmp_path / name / "record.json", {})
        if weights: write_json(tmp_path / name / "weights.json", weights)
    found = {name: matching_demo(Cell(Job(name, "wmpo", PRESET, 0), tmp_path / "cells", LIFT, tmp_path / "cache", (tmp_path / name,)))
             for name in ("same", "other", "unknown")}
    assert found == {"same": tmp_path / "same", "other": None, "unknown": None}


def test_adopted_cells_point_elsewhere_and_results_do_not_say_where(tmp_path):
    name = job_name("table1", PRESET, 0, "wmpo")
    found = {"experiment": "table1", "preset": "tiny_lift", "P": 128, "seed": 0, "method": "wmpo", "reused": "/somewhere/private/demo"}
    write_json(tmp_path / name / "cell.json", found)
    assert artefact(tmp_path / name, "policy") == Path("/somewhere/private/demo/policy")
    assert result_of(tmp_path, "table1")["cells"][0]["reused"] == "demo"
    for P, method, experiment in ((None, "base", "table1"), (512, "wmpo", "table1"), (128, None, "ablations")):
        found = {"experiment": experiment, "preset": "tiny_lift", "P": P, "seed": 0, "method": method}
        write_json(tmp_path / experiment / f"tiny_lift/P{P or 0}/seed0/{method}/cell.json", found)
    beside = [(c["method"], c["P"]) for c in result_of(tmp_path, "ablations")["cells"]]
    assert sorted(beside, key=str) == [("base", None), ("wmpo", 128), (None, 128)]               # not the budget that nobody varied
    write_json(tmp_path / "lifelong/tiny_lift/P128/seed0/rounds/cell.json", {"seed": 0, "records": [{"round": 0}, {"round": 1}]})
    assert [c["round"] for c in cells_of(tmp_path, "lifelong")] == [0, 1]


def message(capsys, *arguments): return refusal(main, capsys, *arguments)


def test_bad_input_is_answered_before_work(capsys, tmp_path):
    out = ("--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results"))
    assert "different" in message(capsys, "table1", "--seeds", "1", "1", *out)
    assert "--jobs" in message(capsys, "table1", "--jobs", "0", *out)
    assert "not a finished run" in message(capsys, "table1", "--demo", str(tmp_path), *out)
    assert "nowhere" in message(capsys, "noise", "--weights", "nowhere", *out)
    assert not (tmp_path / "runs").exists()


def test_grasps_fail_by_what_the_fingers_did():
    def found(held, gap, **options): return failed_grasps(np.array(held, bool), np.array(gap), **options)
    wide, shut, grip = 0.08, 0.001, 0.04
    assert found([0] * 5, [wide, shut, shut, wide, shut]) == [1, 4]           # twice, not three times
    assert found([0, 1, 1, 1], [wide, grip, grip, grip]) == []
    assert found([0, 1, 1, 0, 0], [wide, grip, grip, grip, grip]) == [4]      # held, and lost
    assert found([0, 1, 1, 0, 0], [wide, grip, grip, grip, grip], drops=False) == []
    assert found([0, 1, 0, 1, 1], [wide, grip, grip, grip, grip]) == []       # a sensor's flicker is no loss


def test_branches_begin_where_the_trial_was(monkeypatch):
    frames = torch.arange(2 * 17, dtype=torch.uint8).view(2, 17, 1, 1, 1).expand(-1, -1, 4, 4, 3)
    length, none = torch.tensor([16, 8]), torch.zeros(2, 2, 0)
    batch = TrajectoryBatch(frames, torch.zeros(2, 16, 7), none, none, torch.zeros(2, dtype=torch.bool), length, length, torch.tensor([70, 71]),
                            torch.zeros(2, dtype=torch.long))
    batch.actions[:] = torch.arange(16.0)[:, None]
    states, contexts, acted = branch_points(batch)
    assert [len(acted[s.state_id]) for s in states] == [0, 8, 0] and torch.equal(acted[70008], batch.actions[0, :8])
    assert [s.state_id for s in states] == [70000, 70008, 71000]              # the second trial was over after eight steps
    assert [int(s.frame[0, 0, 0]) for s in states] == [0, 8, 17]
    assert contexts[70008][:, 0, 0, 0].tolist() == [5, 6, 7, 8] and contexts[71000][:, 0, 0, 0].tolist() == [17] * 4


@pytest.fixture(scope="module")
def environment():
    yield Simulator(PRESET.task, 0).environment


def test_disruptions_change_the_picture_and_nothing_else(environment):
    seed, pictures, poses = seeds_for("selection", 1)[0], [], []
    for disruption in ("none", "background", "texture"):
        disturb(environment, disruption)
        environment.reset(seed)
        pictures.append(environment.frame().astype(int)), poses.append(environment.snapshot().state)
    table, cube = (np.abs(b - a).max(2) > 8 for a, b in zip(pictures, pictures[1:]))
    assert table.mean() > 0.3 and 0.003 < cube.mean() < 0.2                   # most of the picture; a few pixels
    assert np.array_equal(poses[0], poses[1]) and np.array_equal(poses[0], poses[2])


def test_displaced_objects_start_outside(environment):
    inner = PRESET.task.placement / 2
    chosen = displaced(environment, seeds_for("selection", 40), 3, inner)
    for seed in chosen:
        environment.reset(seed)
        assert np.abs(environment.pose("cube")[0][:2]).max() > inner
    assert chosen == displaced(environment, seeds_for("selection", 40), 3, inner)
    with pytest.raises(UserError, match="only 0 of 2"): displaced(environment, seeds_for("selection", 2), 1, 1.0)


def test_watching_sees_the_expert_hold_the_cube_and_a_hand_in_the_air_fail(environment):
    from wmpo_nb.simulator import Style, script_trial
    seed = seeds_for("selection", 1)[0]
    trial = script_trial(environment, seed, Style())
    assert trial["success"]
    held, gap = watch_trial(environment, seed, trial["actions"][:trial["finish_step"]])
    assert held[-1] and held.sum() > 2 and failed_grasps(held, gap) == [] and 0.02 < gap[-1] < 0.06
    in_the_air = np.tile(np.array([0, 0, 0, 0, 0, 0, 1.0], np.float32), (12, 1))
    held, gap = watch_trial(environment, seed, in_the_air)
    assert not held.any() and gap[-1] < 0.01 and len(failed_grasps(held, gap)) == 1


def test_a_branched_dream_starts_from_real_context():
    parts = Parts(LIFT, PRESET)
    torch.manual_seed(0)
    film = torch.randint(0, 256, (1, 4, 64, 64, 3), dtype=torch.uint8)
    dream = BranchedDream(parts.world_model(), parts.vae, parts.classifier(), parts.stats, {5: film[0], 6: film[0]}, {5: torch.rand(16, 7), 6: torch.zeros(0, 7)})
    states = [InitialState(5, film[0, -1]), InitialState(6, film[0, -1])]
    assert torch.equal(dream.reset(states, Streams(0, [5, 6], [0, 0]))[0], film[0, -1])
    with torch.no_grad(): assert torch.allclose(dream.context[:1], parts.vae.encode(film).float(), atol=0.05)
    dream.acted = torch.rand(2, 8, 7)                                          # as if they had acted once
    told, history = dream.told(torch.tensor([0, 1]), 8), PRESET.world_model.action_history
    whole = torch.cat([dream.known[5], dream.acted[0]])[None]
    assert torch.equal(told[0], action_inputs(parts.stats.normalize(whole), history)[0, 16:])
    assert torch.equal(told[1], action_inputs(parts.stats.normalize(dream.acted[1:]), history)[0])
    assert (8 * told[:, :, -1]).round().tolist() == [[*range(17, 25)], [*range(1, 9)]]      # steps since the beginning of the trial


# eight short trials, one step of everything
TINY = ["--budgets", "8", "--seeds", "0", "--grpo.group_size", "4", "--grpo.groups", "1", "--grpo.max_draws", "1",
        "--grpo.accuracy_low", "0", "--grpo.accuracy_high", "1", "--alignment.steps", "1", "--grpo.iterations", "1", "--evaluation.states", "2",
        "--evaluation.held_out", "2", "--world_model.flow_steps", "1", "--sft.demonstrations", "2", "--sft.steps", "2"]


def experiment(folder, *words):
    "The command in a process of its own, on one root."
    start = [sys.executable, "-c", "from wmpo_nb.experiments import main; raise SystemExit(main())"]
    places = ["--output", str(folder / "runs"), "--results", str(folder / "results"), "--cache", str(folder / "cache"), "--jobs", "2"]
    done = subprocess.run([*start, *words, *TINY, *places], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    "A folder with all cells of Table 1, made by real processes."
    folder = tmp_path_factory.mktemp("miniature")
    experiment(folder, "table1")
    return folder


def test_the_command_in_miniature(miniature):
    "From the command line to the page; then the same command with nothing left to do."
    record = json.loads((miniature / "results/table1.json").read_text())
    by_method = {c["method"]: c for c in record["cells"]}
    assert set(by_method) == {"base", "grpo", "dpo", "wmpo"} and len(record["cells"]) == 4
    assert by_method["grpo"]["ledger"]["real_trajectories"] == 8 and by_method["grpo"]["ledger"]["both_variants"] == 16
    assert by_method["wmpo"]["ledger"]["imagined_frames"] > 0 and len(by_method["wmpo"]["learning"]) == 1
    assert all(len(c["outcome"]["success"]) == 2 and c["outcome"]["states"] == by_method["base"]["outcome"]["states"] for c in record["cells"])
    assert str(miniature) not in json.dumps(record) and "wmpo-experiment table1" in record["commands"][0]
    assert record["made_with"]["tiny_lift"]["--grpo.group_size"] == 4
    assert "GRPO, online" in (miniature / "results/table1.md").read_text()
    times = {p: p.stat().st_mtime for p in miniature.glob("runs/table1/**/cell.json")}
    assert sum(line.startswith("done") for line in experiment(miniature, "table1", "--plan")) == len(times) == 5
    experiment(miniature, "table1")
    assert {p: p.stat().st_mtime for p in times} == times


def test_every_other_kind_of_cell_in_miniature(miniature):
    "Each fills its cell from those of Table 1, and its page can be written."
    fields = {k[2:]: v for k, v in zip(TINY[::2], TINY[1::2]) if "." in k}
    preset = load_preset("tiny_lift", fields | {"collect.trajectories": "8"})
    places = SimpleNamespace(output=miniature / "runs", weights=LIFT, cache=miniature / "cache", demo=None, keep=2, log_with=())
    for name, cells in (("noise", ["noise0"]), ("disruptions", ["base-position"]), ("recoveries", ["watch-base"]), ("agreement", ["agreement"]),
                        ("alignment", ["truth-*"]), ("ablations", ["horizon-2_chunks"]), ("lifelong", ["rounds", "imitation1"])):
        for job in only(plan(name, preset, [8], [0]), cells):                  # in this process: eleven more would take their time to start
            if not is_finished(places.output, job, LIFT): assert main(cell_words(job, places)[3:]) == 0
        assert collate(places.output, name, miniature / "results").exists()
    found = {name: [c for c in read_json(miniature / f"results/{name}.json")["cells"] if c["experiment"] == name] for name in EXPERIMENTS if name not in ("table1", "flow-steps")}
    length = PRESET.task.horizon + 1
    assert [len(found["noise"][0][curve]) for curve in ("psnr", "ssim")] == [length, length] and found["noise"][0]["start"] == 50
    assert found["disruptions"][0]["disruption"] == "position" and len(found["disruptions"][0]["outcome"]["success"]) == 2
    assert found["recoveries"][0]["counts"]["trials"] == 2
    assert [p["name"] for p in found["agreement"][0]["policies"]] == ["base policy", "after WMPO", "after GRPO", "after DPO"]
    assert all(sum(map(sum, p["confusion"])) == 2 for p in found["agreement"][0]["policies"])
    assert {c["setting"] for c in found["alignment"]} == {"aligned", "not aligned"} and all(sum(map(sum, c["confusion"])) == 2 for c in found["alignment"])
    assert all(len(c["verdicts"]) == len(c["how"]) == 2 and sum(not how for how in c["how"]) == c["real"][0] for c in found["alignment"])
    assert found["ablations"][0]["variant"] == "2 chunks" and len(found["ablations"][0]["outcome"]["success"]) == 2
    rounds = {(c["method"], c["round"]): c for c in found["lifelong"]}
    assert set(rounds) == {("wmpo", 0), ("wmpo", 1), ("wmpo", 2), ("wmpo", 3), ("imitation", 1)}
    assert [rounds["wmpo", n]["ledger"]["real_trajectories"] for n in (2, 3)] == [8, 8]
    assert all(len(c["outcome"]["success"]) == 2 for c in found["lifelong"])
