"A run survives what happens to machines: kill -9, full disks, half-written files, wrong arguments."
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from wmpo_nb.presets import UserError, load_preset
from wmpo_nb.run import Checkpointer, Ledger, Run, Stopped, command, open_run, parse_preset, preset_parser, read_metrics

SETTINGS = (Path(__file__).parent.parent / "settings.ini").read_text()
TRAIN = """
import random, sys
import numpy as np, torch
from torch import nn
from accelerate import Accelerator
from wmpo_nb.presets import WorldModelTrainConfig, load_preset
from wmpo_nb.run import Checkpointer, Run
from wmpo_nb.training import EMA, make_optimizer, train_step
from wmpo_nb.weights import save_weights

output, resume = sys.argv[1], "--resume" in sys.argv
config = WorldModelTrainConfig(steps=60, warmup_steps=5, decay_steps=20, ema=0.9)
run = Run(output, load_preset("tiny_lift"), "test", seed=0, resume=resume)
torch.manual_seed(0); np.random.seed(0); random.seed(0)
model = nn.ModuleDict({"embed": nn.Linear(4, 8), "blocks": nn.ModuleList([nn.Linear(8, 8)]), "head": nn.Linear(8, 1)})
generator, accelerator = torch.Generator().manual_seed(0), Accelerator(cpu=True)
optimizer, ema = make_optimizer(model.named_parameters(), config), EMA(model, config.ema)
model, optimizer = accelerator.prepare(model, optimizer)
checkpointer = Checkpointer(run.folder / "checkpoints", every=10).register(
    model=model, optimizer=optimizer, ema=ema, generator=generator, ledger=run.ledger)
start = checkpointer.restore()
run.rewind("tiny", start)
with run.stage("tiny"):
    for step in range(start, config.steps):
        noise = random.random() + np.random.rand() + torch.rand(())          # the three global generators
        x = torch.randn(16, 4, generator=generator)
        def loss_of(x):
            hidden = torch.relu(model["blocks"][0](model["embed"](x)))
            return {"loss": (model["head"](hidden) - x.sum(1, keepdim=True) - 0.01 * noise).square().mean()}
        numbers = train_step(accelerator, loss_of, (x,), model, optimizer, step, config, checkpointer)
        ema.update(model)
        run.ledger.add(optimiser_steps=1)
        run.log("tiny", step, loss=numbers["loss"])
        checkpointer.maybe_save(step + 1)
        print(step, flush=True)
ema.copy_to(model)
save_weights(run.folder / "weights.safetensors", model, config=config)
"""


@pytest.mark.parametrize("module, words, ignored", [
    ("sft", "--data d --stats s", "--stats"), ("wmpo", "--world simulator --policy p --vae v", "--vae"), ("demo", "--from-scratch --weights w", "--weights"),
    ("alignment", "--data d --vae v --stats s --workers 3", "--workers"), ("baselines", "grpo --beta 0.2", "--beta"), ("baselines", "dpo --variant small", "--variant")])
def test_an_option_that_would_be_ignored_is_refused(module, words, ignored, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    assert import_module(f"wmpo_nb.{module}").main([*words.split(), "--output", str(tmp_path / "run")]) == 2
    assert f"{ignored} would be ignored" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("module, words, why", [
    ("evaluation", "--policy p --accumulate 2", "nothing is learnt"), ("collect", "--dry-run", "nothing is learnt"),
    ("wmpo", "--policy p --accumulate 2", "--grpo.micro_batch"), ("baselines", "dpo --accumulate 2", "--grpo.micro_batch"),
    ("baselines", "grpo --dry-run", "wmpo-estimate"), ("experiments", "table1 --dry-run", "--plan"), ("mimicgen", "states --precision bf16", "no network")])
def test_an_option_that_a_command_does_not_have_is_answered_with_the_reason(module, words, why, tmp_path, capsys):
    main = import_module(f"wmpo_nb.{module}").main
    assert main([*words.split(), "--output", str(tmp_path / "run")]) == 2
    assert why in capsys.readouterr().err and not (tmp_path / "run").exists()
    with pytest.raises(SystemExit): main(["--help"])
    absent = next(word for word in words.split() if word in ("--accumulate", "--dry-run", "--precision"))
    assert f"  {absent} " not in capsys.readouterr().out


def start(output, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", TRAIN, str(output), *arguments], stdout=subprocess.PIPE, text=True,
                            env=environment)


def without_seconds(folder):
    ledger = json.loads((folder / "ledger.json").read_text())
    assert list(ledger.pop("seconds")) == ["tiny"]
    return ledger


def test_kill_minus_nine_changes_nothing(tmp_path):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert start(unbroken).communicate() and (unbroken / "weights.safetensors").exists()
    process = start(killed)
    for line in process.stdout:
        if int(line) >= 33: break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "weights.safetensors").exists()
    steps = [int(line) for line in start(killed, "--resume").communicate()[0].split()]
    assert steps[0] >= 30 and steps[0] % 10 == 0 and steps[-1] == 59    # went on from a checkpoint
    assert (killed / "weights.safetensors").read_bytes() == (unbroken / "weights.safetensors").read_bytes()
    assert read_metrics(killed) == read_metrics(unbroken)
    assert without_seconds(killed) == without_seconds(unbroken)


def test_checkpoints_are_complete_or_absent(tmp_path):
    layer = nn.Linear(2, 2)
    checkpointer = Checkpointer(tmp_path, every=5, keep=2).register(layer=layer)
    checkpointer.extra = {"threshold": 0.25}
    assert checkpointer.restore() == 0
    for step in range(1, 21): checkpointer.maybe_save(step)
    assert [path.name for path in checkpointer.saved()] == ["step_000015", "step_000020"]
    (tmp_path / "step_000025.tmp").mkdir()                       # killed while writing
    (tmp_path / "step_000020/state.pt").write_bytes(b"damaged")  # and a disk that lies
    fresh = Checkpointer(tmp_path, every=5).register(layer=nn.Linear(2, 2))
    assert fresh.restore() == 15 and fresh.extra == {"threshold": 0.25}
    assert torch.equal(fresh.objects["layer"].weight, layer.weight)
    fresh.save(25)
    assert not list(tmp_path.glob("*.tmp"))


def test_the_newest_checkpoint_is_the_one_with_most_steps(tmp_path):
    checkpointer = Checkpointer(tmp_path, every=1, keep=2).register(layer=nn.Linear(2, 2))
    for step in (998_000, 999_000, 1_000_000, 1_001_000): checkpointer.save(step)
    assert [path.name for path in checkpointer.saved()] == ["step_1000000", "step_1001000"] and checkpointer.restore() == 1_001_000


def test_a_checkpoint_of_something_else_is_the_users_error(tmp_path):
    Checkpointer(tmp_path, every=1).register(layer=nn.Linear(2, 2)).save(1)
    with pytest.raises(UserError, match="does not fit 'layer'"):
        Checkpointer(tmp_path, every=1).register(layer=nn.Linear(2, 3)).restore()
    with pytest.raises(UserError, match="delete it"): Checkpointer(tmp_path, every=1).register(other=nn.Linear(2, 2)).restore()


def test_ledger_counts_lost_work_once_and_stages_add_up():
    ledger = Ledger()
    with ledger.clock("outer"):
        ledger.add(imagined_frames=8)
        with ledger.clock("inner"): pass
    state = ledger.state_dict()
    ledger.add(imagined_frames=100)
    ledger.load_state_dict(state)
    assert ledger.imagined_frames == 8 and set(ledger.seconds) == {"outer", "inner"}


def test_run_folder_defends_itself(tmp_path, monkeypatch):
    preset = load_preset("tiny_lift")
    run = Run(tmp_path / "run", preset, "wmpo-sft")
    with run.stage("a"): run.ledger.add(real_trajectories=3)
    run.done("a")
    run.log("a", 0, loss=float("nan"))
    assert read_metrics(run.folder) == [{"stage": "a", "step": 0, "loss": None}]
    with pytest.raises(UserError, match="--resume"): Run(tmp_path / "run", preset, "wmpo-sft")
    other = load_preset("tiny_lift", {"grpo.group_size": "4"})
    with pytest.raises(UserError, match="preset.grpo.group_size was 8 and is now 4"):
        Run(tmp_path / "run", other, "wmpo-sft", resume=True)
    again = Run(tmp_path / "run", preset, "wmpo-sft", resume=True)
    assert again.is_done("a") and again.ledger.real_trajectories == 3
    monkeypatch.setattr("wmpo_nb.run.make_trackers", lambda *_: pytest.fail("a run that is refused has started a tracker"))
    with pytest.raises(UserError, match="grpo.group_size"): Run(tmp_path / "run", other, "wmpo-sft", resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"): Run(tmp_path / "file/run", preset, "wmpo-sft")


def test_a_run_goes_on_with_the_weights_it_began_with(tmp_path):
    run, began = Run(tmp_path / "run", load_preset("tiny_lift"), "wmpo-demo"), {"vae": "5e1f", "world_model": "00aa"}
    run.start_from(began)
    run.start_from(began)
    with pytest.raises(UserError, match=r"other files \(world_model\)"): run.start_from(began | {"world_model": "00ab"})
    with pytest.raises(UserError, match=r"other files \(reward\)"): run.start_from(began | {"reward": "77"})
    assert json.loads((tmp_path / "run/weights.json").read_text()) == began


def test_a_command_goes_on_with_the_files_it_began_with(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(3 * 2**20) + name.encode())
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/model.safetensors").write_bytes((tmp_path / "a/model.safetensors").read_bytes())
    def start(*words):
        parser = preset_parser("wmpo-x", "", "")
        for name in ("--policy", "--world-model"): parser.add_argument(name)
        args, preset = parse_preset(parser, ["--output", str(tmp_path / "run"), *words])
        open_run(args, preset, "wmpo-x", ("policy", "world_model")).close()
    start("--policy", str(tmp_path / "a"))
    start("--policy", str(tmp_path / "copy"), "--resume")                       # elsewhere, and the same
    with pytest.raises(UserError, match=r"other files \(--policy\)"): start("--policy", str(tmp_path / "b"), "--resume")
    with pytest.raises(UserError, match=r"other files \(--world-model\)"):
        start("--policy", str(tmp_path / "a"), "--world-model", str(tmp_path / "b"), "--resume")


def test_a_run_older_than_a_field_of_its_preset_goes_on(tmp_path):
    preset = load_preset("coffee_128")
    Run(tmp_path, preset, "wmpo-train").close()
    config = json.loads((tmp_path / "config.json").read_text())
    assert preset.grpo.validate_every != load_preset("tiny_lift").grpo.validate_every
    del config["preset"]["grpo"]["validate_every"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    Run(tmp_path, preset, "wmpo-train", resume=True).close()


def test_an_interrupted_stage_is_not_booked(tmp_path):
    run = Run(tmp_path, load_preset("tiny_lift"), "wmpo-collect")
    with pytest.raises(KeyboardInterrupt), run.stage("collect"):
        run.ledger.add(real_trajectories=3)
        raise KeyboardInterrupt
    assert Run(tmp_path, run.preset, "wmpo-collect", resume=True).ledger.real_trajectories == 0


def test_a_stage_that_is_told_to_stop_has_cost_its_time(tmp_path):
    run = Run(tmp_path, load_preset("tiny_lift"), "wmpo-sft")
    with pytest.raises(Stopped), run.stage("sft"):
        time.sleep(0.2)
        raise Stopped("told to")
    again = Run(tmp_path, run.preset, "wmpo-sft", resume=True)
    assert again.ledger.seconds["sft"] >= 0.2
    with again.stage("sft"): time.sleep(0.2)
    assert Run(tmp_path, run.preset, "wmpo-sft", resume=True).ledger.seconds["sft"] >= 0.4


@pytest.mark.parametrize("arguments, message", [
    (["--sed", "3"], "Did you mean '--seed'"), (["--grpo.groupsize", "3"], "Did you mean 'grpo.group_size'"),
    (["--grpo.group_size"], "needs a value"), (["--grpo.group_size", "some"], "grpo.group_size"),
    (["stray"], "unknown argument 'stray'"), (["--preset", "tiny"], "unknown preset")])
def test_a_typo_is_answered_before_any_work(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)): parse_preset(preset_parser("wmpo-x", "", ""), arguments)


def test_overrides_reach_the_preset():
    args, preset = parse_preset(preset_parser("wmpo-x", "", ""), [
        "--grpo.clip_low=0.1", "--policy.center_crop", "1", "--stdit.text_weights", "true", "--resume"])
    assert args.resume and (preset.grpo.clip_low, preset.policy.center_crop, preset.stdit.text_weights) == (0.1, 1.0, True)


def test_a_field_may_stand_before_what_the_command_is_about():
    parser = preset_parser("wmpo-x", "", "")
    parser.add_argument("method", choices=("grpo", "dpo"))
    args, preset = parse_preset(parser, ["--grpo.groups", "4", "grpo", "--seed", "2"])
    assert (args.method, args.seed, preset.grpo.groups) == ("grpo", 2, 4)


def test_what_a_command_hands_on_ends_with_it(monkeypatch):
    monkeypatch.setenv("WMPO_PRECISION", "bf16")
    @command("wmpo-x")
    def main(argv=None):
        parse_preset(preset_parser("wmpo-x", "", ""), argv)
        assert (os.environ["WMPO_PRECISION"], os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"]) == ("fp32", "4")
    assert main(["--precision", "fp32", "--accumulate", "4"]) == 0
    assert os.environ["WMPO_PRECISION"] == "bf16" and "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in os.environ


def test_each_command_can_be_launched_as_a_module():
    "As `accelerate launch -m wmpo_nb.X` does."
    for name, module in (entry.strip().split("=") for entry in SETTINGS.splitlines() if re.match(r" +wmpo-.*:main$", entry)):
        source = (Path(__file__).parent.parent / module.removesuffix(":main").replace(".", "/")).with_suffix(".py").read_text()
        assert f'@command("{name}")\ndef main(' in source and source.rstrip().endswith('if __name__ == "__main__" and "__file__" in globals(): sys.exit(main())'), name
    done = subprocess.run([sys.executable, "-m", "wmpo_nb.report", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: wmpo-report " in done.stdout, done.stderr[-500:]


@pytest.mark.parametrize("module, words, ignored", [
    ("reward", "--data d --reward_pretraining.steps 3 --start s", "reward_pretraining.steps"), ("reward", "--data d --reward_training.steps 3", "reward_training.steps"),
    ("alignment", "--data d --vae v --stats s --alignment.steps 3", "alignment.steps"),
    ("alignment", "--data d --vae v --stats s --align w --pretraining.steps 3", "pretraining.steps"), ("demo", "--reward.threshold 0.5", "reward.threshold")])
def test_a_field_that_would_be_ignored_is_refused(module, words, ignored, tmp_path, capsys):
    assert import_module(f"wmpo_nb.{module}").main([*words.split(), "--output", str(tmp_path / "run")]) == 2
    assert f"--{ignored} would be ignored" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("error, code, message", [
    (UserError("do this"), 2, "do this"), (OSError(28, "No space left on device", "f"), 2, "No space left on device: f"),
    (KeyboardInterrupt(), 130, "--resume")])
def test_command_answers_in_one_line(error, code, message, capsys):
    @command("wmpo-x")
    def main(argv=None): raise error
    assert main([]) == code
    printed = capsys.readouterr().err
    assert printed.startswith("wmpo-x: ") and message in printed and printed.count("\n") == 1


def test_command_keeps_the_traceback_of_a_bug():
    @command("wmpo-x")
    def main(argv=None): return 1 / 0
    with pytest.raises(ZeroDivisionError): main([])


def test_what_a_run_costs_may_change_when_it_is_resumed(tmp_path):
    Run(tmp_path, load_preset("tiny_lift"), "test")
    cheaper = load_preset("tiny_lift", {"grpo.activation_checkpointing": "true", "grpo.micro_batch": "1", "grpo.videos_every": "7"})
    assert cheaper != load_preset("tiny_lift")
    Run(tmp_path, cheaper, "test", resume=True)
    assert json.loads((tmp_path / "config.json").read_text())["preset"]["grpo"]["videos_every"] == 7


def test_a_run_with_a_field_that_its_preset_has_no_more_goes_on(tmp_path):
    Run(tmp_path, load_preset("tiny_lift"), "test")
    config = json.loads((tmp_path / "config.json").read_text())
    config["preset"]["task"]["fog"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    Run(tmp_path, load_preset("tiny_lift"), "test", resume=True)


def test_a_good_checkpoint_outlives_a_damaged_one_of_a_later_step(tmp_path):
    layer = nn.Linear(2, 2)
    checkpointer = Checkpointer(tmp_path, every=1, keep=1).register(layer=layer)
    checkpointer.save(600)
    (tmp_path / "step_000600/state.pt").write_bytes(b"damaged")
    checkpointer.save(500)
    assert [path.name for path in checkpointer.saved()] == ["step_000500"] and checkpointer.restore() == 500


def test_a_folder_that_is_taken_is_said_before_anything_is_read(tmp_path):
    Run(tmp_path, load_preset("tiny_lift"), "test")
    parser, words = preset_parser("wmpo-test", "", ""), ["--output", str(tmp_path)]
    with pytest.raises(UserError, match="already holds a run: add --resume"): parse_preset(parser, words)
    parse_preset(parser, [*words, "--resume"])
