"Many processes, signals and faults: the same result, or a clear answer and nothing lost."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cluster_work
import pytest
import soak
import torch
from accelerate.commands.config.config_args import load_config_from_file
from torch import nn

from wmpo_nb.policy import OpenVLAOFT
from wmpo_nb.from_scratch import shipped_weights
from wmpo_nb.presets import UserError, WorldModelTrainConfig, load_preset
from wmpo_nb.processes import prepare, start_processes
from wmpo_nb.run import Checkpointer, Run, Stopped, heed_sigterm, parse_preset, preset_parser, read_metrics
from wmpo_nb.training import Diverged, check_finite, make_optimizer, train_step
from wmpo_nb.trajectory import read_shards

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "WMPO_PRECISION": "fp32", "PYTHONPATH": str(ROOT)}


def accelerate(*arguments, **environment):
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=1500)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    "What one process has found and what each of two has, and the folder of the two."
    alone, two = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("two")
    run = accelerate("--multi_gpu", "--num_processes", 2, "--main_process_port", 0, cluster_work.__file__, two, ACCELERATE_USE_CPU="true")
    assert run.returncode == 0, run.stderr[-3000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WMPO_PRECISION", "fp32")
        torch.set_num_threads(1)
        return cluster_work.work(alone), [torch.load(two / f"found_{rank}.pt", weights_only=True) for rank in (0, 1)], two


def test_two_processes_dream_the_same_to_the_last_bit(found):
    alone, two, _ = found
    assert alone["processes"] == 1 and [each["processes"] for each in two] == [2, 2]
    assert len(alone["batch"]["tokens"]) > cluster_work.GRPO.groups * cluster_work.GRPO.group_size, "choose a seed with surplus"
    for each in two:
        assert each["success"] == alone["success"]
        for name, value in alone["batch"].items(): assert torch.equal(value.nan_to_num(), each["batch"][name].nan_to_num()), name


@pytest.mark.parametrize("stage", ["policy", "online", "dpo", "sft", "vae", "world_model", "reward"])
def test_two_processes_learn_the_same(found, stage):
    alone, two, _ = found
    assert torch.equal(two[0][stage], two[1][stage]), "the processes have drifted apart"
    torch.testing.assert_close(two[0][stage], alone[stage], atol=1e-5, rtol=0)


def test_two_processes_share_what_passes_the_vae(found):
    alone, two, folder = found
    assert torch.equal(two[0]["seen"], alone["seen"]) and torch.equal(two[1]["seen"], alone["seen"])
    assert len(list((folder / "seen").iterdir())) == len(alone["seen"])


def test_two_processes_spend_the_same_budget(found):
    "Trials that a process repeats to keep in step with the other are not counted twice."
    alone, two, _ = found
    assert len(alone["spent"]) > 1 and 56 < alone["spent"][-1][0] <= 60
    assert all(each["spent"] == alone["spent"] for each in two)


def test_two_processes_examine_the_same(found):
    alone, two, _ = found
    assert all(torch.equal(each["evaluation"], alone["evaluation"]) for each in two)


def test_surplus_groups_wait_and_are_used(found):
    history = found[0]["history"]
    assert history[0]["surplus"] > 0
    for before, after in zip(history, history[1:]):
        tried = after["trajectories"] - len(cluster_work.test_wmpo.STATES) * ("validation" in after)
        drawn = tried / cluster_work.GRPO.group_size * (after["kept_share"] if tried else 0)
        assert after["groups"] == pytest.approx(before["surplus"] + drawn)
        assert after["optimiser_steps"] == history[0]["optimiser_steps"], "as many trajectories as ever, wherever they come from"


def test_a_checkpoint_of_two_processes_is_resumed_by_one(found):
    alone, _, folder = found
    assert torch.load(folder / "part/step_000002/state.pt", weights_only=True)["objects"]["waiting"], "choose a seed with surplus"
    torch.testing.assert_close(cluster_work.practise(folder / "part", 3), alone["policy"], atol=1e-5, rtol=0)


def test_processes_go_back_to_the_same_checkpoint(found):
    alone, both, _ = found
    assert alone["restored"] == 2 and [one["restored"] for one in both] == [1, 1]


def test_a_launch_that_fell_apart_is_noticed():
    run = accelerate("--cpu", "--num_processes", 2, "-m", "wmpo_nb.evaluation", "--policy", "nowhere")
    assert "started only this one" in run.stderr and "ACCELERATE_USE_CPU=true" in run.stderr
    assert "no policy" in run.stderr or "nowhere" in run.stderr, "the module runs as a script"
    assert "Traceback" not in run.stderr.split("nowhere")[0]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_launch_configurations(path):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    config = load_config_from_file(str(path))
    known = {action.dest for action in launch_command_parser()._actions}
    unknown = {*config.fsdp_config} - known
    assert not unknown, f"accelerate launch knows no {unknown}"
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "wmpo_nb.wmpo"])
    _validate_launch_command(arguments)
    expected = {"one_gpu": 1, "cpu_2": 2, "fsdp2_cpu_2": 2, "four_nodes_ddp": 32, "fsdp2_32": 32}.get(path.stem, 8)
    assert arguments.num_processes == expected and arguments.use_fsdp == path.stem.startswith(("fsdp2", "zero2"))


@pytest.mark.parametrize("variables, said", [
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "FSDP2 only"), ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP2 only"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "activation_checkpointing true")])
def test_launches_that_cannot_be_served_are_refused(variables, said, monkeypatch):
    for name, value in variables.items(): monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said): start_processes()


def test_commands_that_keep_whole_weights_refuse_sharding(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="wmpo-x keeps whole weights.*ddp_8.yaml"): parse_preset(preset_parser("wmpo-x", "", ""), [])
    parse_preset(preset_parser("wmpo-x", "", ""), [], can_shard=True)


# --- one process ---------------------------------------------------------------------------------------------------

def descend(config, accumulate, monkeypatch):
    "A few steps on a linear model, each batch in `accumulate` passes."
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(accumulate))
    torch.manual_seed(0)
    model, generator, accelerator = nn.Linear(4, 1), torch.Generator().manual_seed(0), start_processes()
    assert accelerator.gradient_accumulation_steps == accumulate
    model, optimizer = prepare(accelerator, model, make_optimizer(model.named_parameters(), config))
    loss_of = lambda x, y: {"loss": (model(x) - y).square().mean(), "error": (model(x) - y).abs().mean()}
    for step in range(config.steps):
        x = torch.randn(10, 4, generator=generator)
        terms = train_step(accelerator, loss_of, (x, x.sum(1, keepdim=True)), model, optimizer, step, config)
    return terms, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_passes_change_the_memory_and_not_the_result(monkeypatch):
    config = WorldModelTrainConfig(steps=5, warmup_steps=0, decay_steps=0, optimizer="adamw", learning_rate=0.01)
    whole, weights = descend(config, 1, monkeypatch)
    parts, others = descend(config, 3, monkeypatch)       # 10 into 3 does not go: parts of 3, 3 and 4
    torch.testing.assert_close(others, weights, atol=1e-6, rtol=0)
    assert parts == pytest.approx(whole, rel=1e-4) and set(whole) == {"loss", "error", "grad_norm"}
    with pytest.raises(UserError, match="make the batch larger"): descend(config, 11, monkeypatch)
    descend(config, 1, monkeypatch)                       # accelerate remembers: leave it as it was


def test_options_of_a_large_machine_are_checked(monkeypatch):
    parser = preset_parser("wmpo-x", "", "")
    for word in ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "WMPO_PRECISION"): monkeypatch.setenv(word, "")
    args, _ = parse_preset(parser, ["--accumulate", "4", "--precision", "bf16", "--keep", "5", "--log-with", "wandb", "trackio"])
    assert args.keep == 5 and args.log_with == ["wandb", "trackio"]
    assert (os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"], os.environ["WMPO_PRECISION"]) == ("4", "bf16")
    for words in (["--accumulate", "0"], ["--keep", "0"]):
        with pytest.raises(UserError, match="at least 1"): parse_preset(parser, words)
    with pytest.raises(UserError, match="--keep is not for this command: no"): parse_preset(preset_parser("wmpo-x", "", "", without={"--keep": "no"}), ["--keep", "2"])


def test_an_exploding_loss_names_the_last_good_checkpoint(tmp_path):
    checkpointer = Checkpointer(tmp_path, every=1).register(layer=nn.Linear(1, 1))
    for step in range(30):
        check_finite(1.0 + 0.1 * (step % 3), step, checkpointer)
        checkpointer.maybe_save(step + 1)
    check_finite(50.0, 30, checkpointer)                  # a bad batch happens
    with pytest.raises(Diverged, match=r"explodes: 1e\+03 at step 31.*step_000030"): check_finite(1000.0, 31, checkpointer)
    with pytest.raises(Diverged, match="nan at step 31.*step_000030"): check_finite(float("nan"), 31, checkpointer)
    again = Checkpointer(tmp_path, every=1).register(layer=nn.Linear(1, 1))
    again.restore()
    with pytest.raises(Diverged, match="explodes"): check_finite(1000.0, 31, again)


def test_a_hard_example_among_easy_ones_is_no_explosion(tmp_path):
    "A classifier that has become good still meets a clip it does not know."
    checkpointer = Checkpointer(tmp_path, every=1).register(layer=nn.Linear(1, 1))
    for step in range(400): check_finite(0.69 * 0.98 ** step, step, checkpointer)
    check_finite(0.21, 400, checkpointer)
    with pytest.raises(Diverged, match="explodes"): check_finite(0.71, 401, checkpointer)                # worse than it began


def test_a_full_disk_leaves_the_last_checkpoint_and_names_it(tmp_path):
    "The limit on the size of a file is as real as a full disk: writes beyond it fail."
    program = f"""
import resource, signal, torch
from torch import nn
from wmpo_nb.run import Checkpointer, command
@command("test")
def main(argv=None):
    checkpointer = Checkpointer({str(tmp_path)!r}, every=1).register(layer=nn.Linear(400, 400))
    checkpointer.save(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    checkpointer.save(2)
raise SystemExit(main([]))
"""
    run = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 2 and len(run.stderr.strip().splitlines()) == 1, run.stderr
    assert "step_000001" in run.stderr and "MB free" in run.stderr and "--resume" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"], "half a checkpoint is left"
    assert Checkpointer(tmp_path, every=1).register(layer=nn.Linear(400, 400)).restore() == 1


def test_a_deleted_output_folder_is_said_so(tmp_path):
    run = Run(tmp_path / "run", load_preset("tiny_lift"), "test")
    checkpointer = run.checkpointer(1).register(layer=nn.Linear(1, 1))
    run.log("a", 0, loss=1.0)
    checkpointer.save(1)
    (tmp_path / "run").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="was deleted"): run.log("a", 1, loss=1.0)
    with pytest.raises(UserError, match="was deleted"): checkpointer.save(2)
    assert not (tmp_path / "run").exists()


def test_metrics_of_a_resumed_run_have_no_entry_twice(tmp_path):
    def session(steps, resume):
        run = Run(tmp_path, load_preset("tiny_lift"), "test", resume=resume)
        for step in steps: run.log("a", step, loss=1 / (1 + step), scores=[1, 0, 3])
        run.close()

    session(range(0, 50, 10), False)
    session(range(30, 60, 10), True)         # the checkpoint was that of step 25
    entries = read_metrics(tmp_path)
    assert [e["step"] for e in entries] == [0, 10, 20, 30, 40, 50] and entries[-1]["scores"] == [1, 0, 3]


def test_a_tracker_that_is_not_installed_is_the_users_error(tmp_path):
    from accelerate.utils import is_wandb_available
    if is_wandb_available(): pytest.skip("wandb is installed here")
    with pytest.raises(UserError, match="--log-with wandb"): Run(tmp_path / "run", load_preset("tiny_lift"), "test", log_with=["wandb"])
    assert not (tmp_path / "run").exists()


def test_sigterm_is_heeded_only_where_it_is_asked_for():
    before = signal.getsignal(signal.SIGTERM)
    with heed_sigterm():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_saves_and_stops_the_loop(tmp_path):
    checkpointer = Checkpointer(tmp_path, every=100).register(layer=nn.Linear(1, 1))
    with heed_sigterm(), pytest.raises(Stopped, match="step_000008.*--resume"):
        for step in range(20):
            if step == 7: os.kill(os.getpid(), signal.SIGTERM)
            checkpointer.maybe_save(step + 1)
    assert [path.name for path in checkpointer.saved()] == ["step_000008"]
    checkpointer.maybe_save(9)               # the request has been answered


# --- the soak script, once ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    soak.make_parts(folder)
    return folder


def test_practice_killed_and_resumed_ends_with_the_same_weights(parts, tmp_path):
    "wmpo-train itself, in a dream of random networks, with groups that wait in the checkpoint."
    assert soak.soak("grpo", parts, tmp_path, kills=1) >= 1
    entries = read_metrics(tmp_path / "unbroken")
    kept = [OpenVLAOFT.from_pretrained(path).language_model.lm_head.weight for path in sorted((tmp_path / "unbroken/policies").iterdir())]
    assert len(kept) == len(entries) // 3 and not torch.equal(kept[0], kept[1])
    assert any(entry["surplus"] for entry in entries), "nothing ever waited: choose other parts"
    wanted = {"success", "kept_share", "approx_kl", "start_kl", "clip_fraction", "entropy", "grad_norm", "frames_per_second", "memory_mb",
              "total_imagined_frames"}
    assert wanted <= set(entries[-1]) and entries[0]["start_kl"] == pytest.approx(0, abs=1e-6) and entries[-1]["start_kl"] > 0
    assert entries[-1]["total_imagined_frames"] == sum(entry["frames"] for entry in entries)
    # every fifth iteration is filmed, if it dreamt anything: it may live on groups that waited
    filmed = [f"grpo_{entry['step']:06d}.gif" for entry in entries if entry["step"] % 5 == 0 and entry["trajectories"]]
    assert filmed[0] == "grpo_000000.gif" and [path.name for path in sorted((tmp_path / "unbroken/videos").iterdir())] == filmed
    # every fifth also tries the greedy policy from each start, as do the last, and the first beforehand; those trials are not in the histogram
    greedy, asked = len(read_shards(parts / "data")), [entry["step"] for entry in entries if "validation" in entry]
    assert asked == [step for step in range(len(entries)) if step % 5 == 4 or step + 1 == len(entries)]
    sampled = [(entry, entry["trajectories"] - greedy * (("validation" in entry) + ("start_validation" in entry))) for entry in entries]
    assert all(sum(entry["score_histogram"]) == count for entry, count in sampled if count)


def test_sigterm_ends_a_command_with_zero_and_resume_goes_on(parts, tmp_path):
    words = soak.command("sft", parts, tmp_path / "run")
    assert soak.end_early(words, tmp_path / "run", 0.0, signal.SIGTERM, "metrics.jsonl") == 0, "over before the signal, or not heeded"
    assert not (tmp_path / "run/policy/model.safetensors").exists()
    step = max(int(path.name.split("_")[1]) for path in (tmp_path / "run/checkpoints").glob("step_*"))
    soak.finish([*words, "--resume"])
    assert (tmp_path / "run/policy/model.safetensors").exists() and 0 < step < soak.STAGES["sft"]["sft.steps"]
    steps = [entry["step"] for entry in read_metrics(tmp_path / "run")]
    assert steps == sorted(set(steps)), "an entry twice"


def test_sigterm_to_the_simulators_too_is_no_crash(tmp_path):
    "As Slurm, `timeout` and many shells send it: to the whole group, so that the workers are gone before the command looks."
    words = [sys.executable, "-c", "from wmpo_nb.collect import main; raise SystemExit(main())", "--policy", str(shipped_weights(load_preset("tiny_lift")) / "policy_lift"), "--workers", "2",
             "--collect.trajectories", "96", "--output", str(tmp_path / "run")]
    process = subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not list((tmp_path / "run").glob("data/*/*.tar")): time.sleep(0.05)
    assert process.poll() is None, "over before the signal"
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0 and "told to stop" in said and "Traceback" not in said, said[-2000:]
