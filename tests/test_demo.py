"The command a newcomer types: faults before work, and the whole loop once, interrupted and resumed."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from helpers import refusal
from wmpo_nb import demo
from wmpo_nb.demo import TRAINED, Parts, iterations_of, main, practice_log, practise, share, weight_digests
from wmpo_nb.from_scratch import shipped_weights
from wmpo_nb.policy import add_adapters
from wmpo_nb.presets import GRPOConfig, load_preset
from wmpo_nb.run import Run

TINY = ["--fast", "--workers", "2", "--collect.trajectories", "24", "--collect.rounds", "2", "--alignment.steps", "3", "--reward_training.steps", "3",
        "--grpo.iterations", "2", "--grpo.groups", "2", "--grpo.group_size", "4", "--grpo.max_draws", "2", "--evaluation.states", "4",
        "--world_model.flow_steps", "2", "--grpo.accuracy_low", "0", "--grpo.accuracy_high", "1"]


LIFT = shipped_weights(load_preset("tiny_lift"))


def message(capsys, *arguments): return refusal(main, capsys, *arguments)


def test_unknown_preset_field_and_value(capsys, tmp_path):
    out = ("--output", str(tmp_path / "run"))
    assert "Did you mean 'tiny_lift'" in message(capsys, "--preset", "tiny_lfit", *out)
    assert "Did you mean 'grpo.group_size'" in message(capsys, "--grpo.groupsize", "4", *out)
    assert "grpo.group_size" in message(capsys, "--grpo.group_size", "many", *out)
    assert "grpo.micro_batch must be at least 1, not 0" in message(capsys, "--grpo.micro_batch", "0", *out)
    assert "--seed is 0 to 99" in message(capsys, "--seed", "-1", *out)
    for name in ("coffee_128", "tiny_stack_free"): assert "tiny_lift and tiny_stack" in message(capsys, "--preset", name, *out)
    assert not (tmp_path / "run").exists()


def test_missing_truncated_and_wrong_weights(capsys, tmp_path):
    out = ("--output", str(tmp_path / "run"))
    assert "nowhere" in message(capsys, "--weights", str(tmp_path / "nowhere"), *out)
    shutil.copytree(LIFT, tmp_path / "weights")
    path = tmp_path / "weights/world_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    assert "world_model.safetensors" in message(capsys, "--weights", str(tmp_path / "weights"), *out)
    shutil.copy(LIFT / "vae.safetensors", tmp_path / "weights/reward.safetensors")
    shutil.copy(LIFT / "world_model.safetensors", path)
    assert "reward.safetensors" in message(capsys, "--weights", str(tmp_path / "weights"), *out)
    assert not (tmp_path / "run").exists()


def test_unwritable_output(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in message(capsys, "--output", str(tmp_path / "file" / "run"))


def test_the_estimate_of_fast_is_of_fast(capsys):
    with pytest.raises(SystemExit): demo.main(["--fast", "--dry-run", "--grpo.iterations", "7"])
    iterations = {line.split()[0]: line.split()[-2] for line in capsys.readouterr().out.splitlines() if line.strip().startswith(("alignment", "grpo"))}
    assert iterations == {"alignment": str(demo.FAST["alignment.steps"]), "grpo": "7"}


def test_rounds_and_repeats_practise_with_dice_of_their_own(tmp_path, monkeypatch):
    thrown = []
    monkeypatch.setattr(demo, "train_wmpo", lambda *_, seed, **__: thrown.append(seed))
    monkeypatch.setattr(demo, "stage_checkpoints", lambda *_: None)
    for i, options in enumerate(({}, {"number": 1}, {"noise": 1}, {"noise": 2}, {"number": 1, "noise": 1})):
        run = Run(tmp_path / str(i), load_preset("tiny_lift"), "test", 7)
        practise(run, SimpleNamespace(save_pretrained=lambda path: None), None, [], **options)
        run.close()
    assert thrown[0] == 7 and len(set(thrown)) == 5


def test_adapters_are_merged_between_rounds(tmp_path, monkeypatch):
    "What the next round begins with must not depend on whether the run was interrupted between the two."
    def learn(policy, *_, **__):
        add_adapters(policy, 2)
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad: torch.nn.init.normal_(parameter, std=0.1)
    preset, parts = load_preset("tiny_lift", {"grpo.lora_rank": "2"}), Parts(LIFT, load_preset("tiny_lift"))
    monkeypatch.setattr(demo, "train_wmpo", learn)
    run = Run(tmp_path, preset, "test", 0)
    unbroken = practise(run, parts.policy(), None, [])
    resumed = practise(run, parts.policy(), None, [])
    before, after, base = (policy.state_dict() for policy in (unbroken, resumed, parts.base))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert any(not torch.equal(before[key], base[key]) for key in base)
    run.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "The same tiny run twice: unbroken, and killed in the middle and resumed."
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-c", "from wmpo_nb.demo import main; raise SystemExit(main())", *TINY, "--cache", str(folder / "cache")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--output", str(folder / "whole")], check=True, env=env)
    broken = subprocess.Popen([*command, "--output", str(folder / "broken")], env=env, start_new_session=True)
    while broken.poll() is None and not practice_log(folder / "broken"): time.sleep(0.05)
    if broken.poll() is None: os.killpg(broken.pid, signal.SIGKILL)
    broken.wait()
    done = subprocess.run([*command, "--output", str(folder / "broken"), "--resume"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_resumed_equals_unbroken(runs):
    folder, _ = runs
    for name in ("policy/model.safetensors", "round1/policy/model.safetensors", "world_model.safetensors", "reward.safetensors", "evaluations.json"):
        assert (folder / "whole" / name).read_bytes() == (folder / "broken" / name).read_bytes(), name


def test_record_and_report(runs):
    folder, printed = runs
    record = json.loads((folder / "whole/record.json").read_text())
    assert record["fast"] and record["ledger"]["real_trajectories"] == 24 and record["ledger"]["imagined_frames"] > 0
    assert record["ledger"]["real_initial_frames"] == 24 and [(e["round"], e["step"]) for e in record["learning"]] == [(1, 0), (2, 1)]
    assert TRAINED in record["agreement"]
    assert {"collect", "align", "reward", "grpo", "evaluate"} <= set(record["ledger"]["seconds"])
    assert [len(e["success"]) for e in record["evaluations"].values()] == [4, 4]
    page = (folder / "whole/report.html").read_text()
    assert "95 % interval" in page and "<script" not in page and "after alignment" in page
    assert "after WMPO" in printed and "report.html" in printed
    assert json.loads((folder / "broken/weights.json").read_text()) == weight_digests(LIFT, load_preset("tiny_lift"))


def test_a_run_does_not_go_on_with_other_weights(runs, capsys):
    shutil.copytree(LIFT, runs[0] / "weights")
    shutil.copy(runs[0] / "whole/world_model.safetensors", runs[0] / "weights")
    arguments = (*TINY, "--weights", str(runs[0] / "weights"), "--output", str(runs[0] / "whole"), "--resume")
    assert "other files (world_model.safetensors)" in message(capsys, *arguments)


def test_test_states_are_new(runs):
    "No state that was examined was collected, and the range says so."
    folder, _ = runs
    record = json.loads((folder / "whole/record.json").read_text())
    tested = {s for e in record["evaluations"].values() for s in e["state_id"]}
    collected = {int(p.name.split("_")[0]) + i for p in (folder / "cache").glob("*/*.tar") for i in range(int(p.stem.split("_")[1]))}
    assert tested and collected and not tested & collected


def test_each_round_is_told_of_its_own_trajectories(runs):
    "Disjoint halves of P, the second one tried by the policy of the first round; each round's ledger says what it used."
    first, last = ({p.stem for p in sorted((runs[0] / "whole" / place).rglob("*.json"))} for place in ("round1", "."))
    assert "ledger" in first & last
    ledgers = [json.loads((runs[0] / "whole" / place / "ledger.json").read_text()) for place in ("round1", ".")]
    assert [ledger["real_trajectories"] for ledger in ledgers] == [12, 24]
    shards = sorted(path.name for path in (runs[0] / "cache").rglob("30*.tar"))
    assert shards == ["3000000_12.tar", "3000012_12.tar"]
    assert [share(7, 3, i) for i in range(3)] == [2, 2, 3]


def test_rounds_practise_whole_means_if_there_are_enough():
    def shares(iterations, every, rounds): return [iterations_of(GRPOConfig(iterations=iterations, validate_every=every), rounds, i) for i in range(rounds)]
    assert shares(40, 5, 1) == [40] and shares(40, 5, 2) == [20, 20] and shares(40, 5, 3) == [10, 15, 15]     # not 13, 13, 14: three of each for nothing
    assert shares(43, 5, 3) == [10, 15, 18] and shares(40, 0, 3) == [13, 13, 14] and shares(2, 5, 2) == [1, 1] and shares(2, 5, 1) == [2]


def test_rounds_need_something_to_do(capsys, tmp_path):
    assert "collect.rounds must be at least 1" in message(capsys, "--collect.rounds", "0", "--output", str(tmp_path / "run"))
    assert "must be above 0" in message(capsys, "--collect.temperature", "0", "--output", str(tmp_path / "run"))
    assert "no scripted trials of stack_free" in message(capsys, "--from-scratch", "--pretrain_data.tasks", '["lift", "stack_free"]', "--output", str(tmp_path / "run"))
    assert "collect.rounds is 3" in message(capsys, "--collect.rounds", "3", "--grpo.iterations", "2", "--output", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
