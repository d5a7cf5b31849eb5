"The estimate: against what real steps allocate, against arithmetic, and what it says when a run cannot fit."
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from wmpo_nb import estimate as module
from wmpo_nb.alignment import make_world_model
from wmpo_nb.estimate import (
    DEVICES, GIB, USABLE, Device, Setup, Step, configured_setup, estimate, in_words, launched_setup, main, on_meta, parameters, remedy,
    rollout_buffers, step_of, this_device, training_memory)
from wmpo_nb.policy import OpenVLAOFT, action_ids
from wmpo_nb.presets import UserError, load_preset, override

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from checkpointing import policy_case, world_model_case

TINY = load_preset("tiny_lift")
CPU = Setup(this_device() if not torch.cuda.is_available() else Device("cpu", 16 * GIB, 1e11),
            bf16=torch.cpu._is_avx512_bf16_supported())

# One real training step of each stage, after a first one that makes the optimiser's state. Two measures: the bytes PyTorch's allocator hands
# out and takes back (its profiler's account: exact, and free of what libraries take), and for the largest step also the
# growth of the process as Linux sees it, which is what kills a job. MALLOC_MMAP_THRESHOLD_ makes freed memory go back at once.
MEASURE = """
import json, sys
import torch
from torch.profiler import ProfilerActivity, profile
from accelerate import Accelerator
from wmpo_nb.alignment import make_world_model
from wmpo_nb.policy import OpenVLAOFT, action_ids
from wmpo_nb.presets import load_preset
from wmpo_nb.reward import SuccessClassifier, block_named, hardest
from wmpo_nb.training import EMA, fast_precision, make_optimizer, train_step
from wmpo_nb.sft import imitation_loss, smoothed_targets
from wmpo_nb.trajectory import ActionStats
from wmpo_nb.vae import VAE, disturbed_terms, draw_disturbance

torch.set_num_threads(1)
torch.manual_seed(0)
preset, accelerator, generator = load_preset("tiny_lift"), Accelerator(cpu=True), torch.Generator().manual_seed(0)
frames = lambda n: torch.zeros(n, 64, 64, 3, dtype=torch.uint8)

def flow(model):
    with fast_precision("cpu"): return model(torch.randn(config.batch_size, 4, 12, 16, 16), torch.rand(config.batch_size, 8, preset.stdit.action_dim), generator)

def clone(model):
    actions = action_ids(preset.policy)
    with model.autocast(): logits = model(*model.inputs(frames(config.batch_size)))[..., actions]
    return imitation_loss(logits, torch.full((config.batch_size, 56), actions.start), smoothed_targets(preset.policy.bins, 3.0), actions.start)

def classify(model):
    half = config.batch_size // 2
    with fast_precision("cpu"):
        pixels = torch.randn(half * (1 + config.mining), 8, 3, 64, 64)
        logits = model(pixels[hardest(model, pixels, half)])
    return torch.nn.functional.cross_entropy(logits, torch.zeros(2 * half, dtype=torch.long))

def reconstruct(model):
    pictures = frames(config.batch_size)
    return disturbed_terms(model, pictures, *draw_disturbance(model, pictures, config, generator), config)["loss"]

stats = ActionStats.from_actions(torch.rand(50, 7))
stages = {
    "alignment": (lambda: make_world_model(preset), flow, torch.nn.Module.named_parameters),
    "sft": (lambda: OpenVLAOFT(preset.policy, stats, "lift"), clone, torch.nn.Module.named_parameters),
    "reward_training": (lambda: SuccessClassifier(preset.reward), classify, block_named),
    "vae_training": (lambda: VAE(preset.vae), reconstruct, torch.nn.Module.named_parameters)}

def status(key): return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def tensors(x):
    if isinstance(x, torch.Tensor): return [x]
    return [t for v in (x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()) for t in tensors(v)]

# the batch is one part, and the losses above draw their own
def step(model, loss, optimizer, number): train_step(accelerator, lambda _: {"loss": loss(model)}, (torch.zeros(1),), model, optimizer, number, config)

measured = {}
for stage, (make, loss, named) in stages.items():
    config = getattr(preset, stage)
    make()                                         # imports what it needs
    before = status("VmRSS")
    model = make().train()
    optimizer, ema = make_optimizer(named(model), config), EMA(model, config.ema)
    step(model, loss, optimizer, 0)
    grown = status("VmHWM") - before               # means something for the first, the largest, only
    optimizer.zero_grad()                          # as the next step will do, after its forward pass
    lasting = sum(t.nbytes for t in [*model.parameters(), *tensors(optimizer.state_dict()), *tensors(ema.average)])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step(model, loss, optimizer, 1)
    now = peak = 0
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    measured[stage] = {"allocated": lasting + peak, "resident": grown}
print(json.dumps(measured))
"""


@pytest.fixture(scope="module")
def measured():
    environment = dict(os.environ, OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="65536")
    done = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------- against reality
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("stage", ["sft", "alignment", "reward_training", "vae_training"])
def test_memory_of_a_real_training_step_is_within_a_quarter(measured, stage):
    found, expected = measured[stage], estimate(TINY, stage, CPU).total
    print(stage, expected / 2**20, {k: v / 2**20 for k, v in found.items()})
    assert abs(expected / found["allocated"] - 1) < 0.25, (expected, found)
    # libraries take some tens of MB of their own: only beside a step of several hundred does the process show the step
    if stage == "alignment": assert abs(expected / found["resident"] - 1) < 0.25, (expected, found)


def peak_allocated(function):
    "Most bytes allocated at once during `function()`, by the profiler's account."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof: function()
    now = peak = 0
    for event in sorted((e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_a_real_policy_update_is_within_a_quarter(checkpointing):
    from accelerate import Accelerator
    from wmpo_nb.training import checkpoint_blocks, make_optimizer
    from wmpo_nb.trajectory import ActionStats, TrajectoryBatch
    from wmpo_nb.wmpo import update
    policy = OpenVLAOFT(TINY.policy, ActionStats.from_actions(torch.rand(50, 7)), "lift")
    config, n, chunks = replace(TINY.grpo, mini_batch=8, micro_batch=8), 8, TINY.task.chunks
    tokens = torch.full((n, chunks, 56), action_ids(policy.config).start)
    steps = torch.full((n,), 8 * chunks)
    batch = TrajectoryBatch(torch.zeros(n, chunks + 1, 64, 64, 3, dtype=torch.uint8), torch.zeros(n, 8 * chunks, 7), tokens, tokens.float(),
                            torch.arange(n) % 2 == 0, steps, steps, torch.arange(n), torch.arange(n))
    optimizer = make_optimizer(checkpoint_blocks(policy, checkpointing).named_parameters(), config)
    step = partial(update, policy, optimizer, batch, config, temperature=1.6, accelerator=Accelerator(cpu=True))
    step()                                         # makes the optimiser's state
    optimizer.zero_grad()
    lasting = sum(p.nbytes for p in policy.parameters()) + sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    expected = sum(training_memory(step_of(TINY, "grpo", bf16=CPU.bf16, gpu=False, checkpointing=checkpointing), CPU).values())
    measured = lasting + peak_allocated(step)
    print(expected / 2**20, measured / 2**20)
    assert abs(expected / measured - 1) < 0.25, (expected, measured)


@pytest.mark.parametrize("stage, checkpointing", [("grpo", False), ("grpo", True), ("alignment", False), ("alignment", True)])
def test_memory_beside_the_weights_is_within_a_quarter(stage, checkpointing):
    "Activations and casts alone, which is what checkpointing is about, in networks twice as deep: forward and backward, gradients there already."
    from wmpo_nb.training import checkpoint_blocks, fast_precision
    deep = load_preset("tiny_lift", {"policy.num_layers": "8", "policy.vision_depths": "[8]", "stdit.depth": "8", "alignment.batch_size": "8",
                                     "grpo.micro_batch": "4"})
    torch.manual_seed(0)
    network, loss = (policy_case if stage == "grpo" else world_model_case)(replace(deep, pretraining=deep.alignment))
    checkpoint_blocks(network.train(), checkpointing)
    def compute():
        with fast_precision("cpu"): value = loss()
        value.backward()
    compute()                                      # makes the gradients
    step = step_of(deep, stage, bf16=CPU.bf16, gpu=False, checkpointing=checkpointing)
    expected, measured = max(step.curve)[0] + step.casts, peak_allocated(compute)
    print(expected / 2**20, measured / 2**20)
    assert abs(expected / measured - 1) < 0.25, (expected, measured)


def test_memory_of_real_imagination_is_within_a_quarter():
    world_model = make_world_model(TINY).eval()
    context, actions, noise = torch.zeros(16, 4, 4, 16, 16), torch.zeros(16, 8, TINY.stdit.action_dim), torch.zeros(16, 4, 8, 16, 16)
    def imagine():
        with torch.autocast("cpu", torch.bfloat16, enabled=CPU.bf16): world_model.imagine(context, actions, noise)
    _, expected, flops = module._world_model_call(TINY, 16, bf16=CPU.bf16, gpu=False)
    assert abs(expected / peak_allocated(imagine) - 1) < 0.25
    with FlopCounterMode(display=False) as count: imagine()
    assert abs(flops / count.get_total_flops() - 1) < 0.01


def test_rollout_buffers_hold_the_frames():
    from wmpo_nb.trajectory import TrajectoryBatch
    fields = TrajectoryBatch.__dataclass_fields__
    assert "frames" in fields
    frames = torch.empty(8, TINY.task.horizon + 1, 64, 64, 3, dtype=torch.uint8)
    decided_on = torch.empty(64, TINY.task.chunks + 1, 64, 64, 3, dtype=torch.uint8)
    assert rollout_buffers(TINY, 8, 64) == 3 * frames.nbytes + decided_on.nbytes


# ------------------------------------------------------------------------------- against arithmetic
def test_parameters_at_real_size_are_the_released_ones():
    "Reference, section 13: 7.54 billion and 1.213 billion."
    paper = load_preset("coffee_128")
    assert round(parameters(on_meta(lambda: OpenVLAOFT(paper.policy, None, ""))) / 1e9, 2) == 7.54
    assert round(parameters(on_meta(lambda: make_world_model(paper))) / 1e9, 3) == 1.213
    assert parameters(on_meta(lambda: make_world_model(TINY))) == parameters(make_world_model(TINY))


def test_work_at_real_size_is_the_reference_s():
    "5.6 TFLOP for one window forward, and twice that backward."
    paper = override(load_preset("coffee_128"), "alignment.batch_size", "1")
    step = step_of(paper, "alignment", bf16=True, gpu=True)
    assert abs(step.flops / (3 * 5.6e12) - 1) < 0.05
    recomputed = step_of(paper, "alignment", bf16=True, gpu=True, checkpointing=True)
    assert abs(recomputed.flops / (4 * 5.6e12) - 1) < 0.05
    assert max(recomputed.curve)[0] < 0.8 * max(step.curve)[0]


STEP = Step(weights=4000, casts=2000, gradients=4000, optimiser=8000, average=4000, curve=((900, 0), (100, 4000)), flops=1, unit=100)


@pytest.mark.parametrize("sharding, expected", [
    ("none", {"weights": 4000, "optimiser": 8000, "average": 4000, "copies": 2000 + 4000, "gradients": 4000, "activations": 100}),
    ("fsdp", {"weights": 1000, "optimiser": 2000, "average": 1000, "copies": 3200, "gradients": 1000, "activations": 100}),
    ("zero2", {"weights": 1000, "optimiser": 2000, "average": 1000, "copies": 4000 + 400 + 2000, "gradients": 1000, "activations": 100})])
def test_sharding(sharding, expected):
    "A thousand parameters on four processes. Which moment is the peak depends on who holds the gradients."
    assert training_memory(STEP, Setup(DEVICES["h100"], 4, sharding)) == expected


def test_one_process_has_nothing_to_divide():
    one = [training_memory(STEP, Setup(DEVICES["h100"], 1, sharding)) for sharding in ("none", "zero2", "fsdp")]
    assert one[0] == one[1] == one[2]


def test_more_of_everything_needs_more():
    small = estimate(override(TINY, "alignment.batch_size", "4"), "alignment", CPU)
    large = estimate(override(TINY, "alignment.batch_size", "8"), "alignment", CPU)
    assert 1.8 < large.memory["activations"] / small.memory["activations"] < 2.2
    assert large.flops == pytest.approx(2 * small.flops, rel=0.01)
    assert large.hours(0.2) == pytest.approx(2 * large.hours(0.4))


def test_passes_save_activations_and_cost_nothing_else():
    whole, passes = (estimate(TINY, "alignment", replace(CPU, passes=n)) for n in (1, 4))
    assert passes.memory["activations"] == pytest.approx(whole.memory["activations"] / 4, rel=0.1)
    assert passes.flops == pytest.approx(whole.flops, rel=0.01) and passes.memory["weights"] == whole.memory["weights"]
    quarter = override(TINY, "alignment.batch_size", str(TINY.alignment.batch_size // 4))
    assert passes.memory["gradients"] > estimate(quarter, "alignment", CPU).memory["gradients"]      # those of the passes before


def test_groups_act_in_blocks():
    "Practice tries `rollout_groups` groups at once, however many an iteration has: more of them take longer and no more memory but for frames."
    few, many = (estimate(override(TINY, "grpo.groups", n), "grpo", replace(CPU, device=DEVICES["h100"])) for n in ("8", "32"))
    assert many.total == few.total and many.host > few.host
    assert many.flops > 3 * few.flops


def test_greedy_trials_between_iterations_are_counted():
    "From all 128 starts every five iterations: 25.6 trials an iteration beside the 64 it learns from."
    work = {every: estimate(override(TINY, "grpo.validate_every", every), "grpo", CPU).flops for every in ("0", "5", "10")}
    assert work["5"] - work["0"] == pytest.approx(2 * (work["10"] - work["0"]))
    assert 0 < work["5"] - work["0"] < 25.6 / 64 * work["0"]


def test_frozen_parameters_cost_nothing_to_train():
    "What low-rank adapters rely on."
    def half():
        network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        network[0].requires_grad_(False)
        return network
    how = dict(bf16=False, gpu=False)
    whole = module.training_step(on_meta(lambda: nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))), lambda m: m(torch.zeros(2, 64)).sum(),
                                 TINY.grpo, **how)
    part = module.training_step(on_meta(half), lambda m: m(torch.zeros(2, 64)).sum(), TINY.grpo, **how)
    assert part.weights == whole.weights and part.gradients == whole.gradients / 2
    assert part.optimiser == pytest.approx(whole.optimiser / 2, rel=0.01)


def test_adapters_and_checkpointing_are_counted():
    whole = estimate(TINY, "sft", CPU)
    assert estimate(override(TINY, "sft.ema", "0"), "sft", CPU).memory["average"] == 0 < whole.memory["average"]
    adapted = estimate(override(TINY, "sft.lora_rank", "4"), "sft", CPU)
    # (gradients are 0 here: at the moment of most memory, when the backward pass begins, there are none yet)
    for part in ("optimiser", "average"): assert adapted.memory[part] < 0.3 * whole.memory[part]
    assert whole.memory["weights"] < adapted.memory["weights"] < 1.3 * whole.memory["weights"]
    frugal = estimate(override(TINY, "sft.activation_checkpointing", "true"), "sft", CPU)
    assert frugal.memory["activations"] < 0.8 * whole.memory["activations"] and frugal.flops > 1.1 * whole.flops
    assert frugal.setup.checkpointing and frugal.flops == estimate(TINY, "sft", replace(CPU, checkpointing=True)).flops


@pytest.mark.parametrize("stage, able", [("sft", True), ("alignment", True), ("vae_training", False)])
def test_only_what_a_stage_can_do_is_proposed(stage, able):
    near, far = module._setups(replace(CPU, processes=2), stage, (4,))
    assert any(s.checkpointing for s in near) == any(s.checkpointing for s in far) == able
    assert any(s.sharding == "fsdp" for s in near) == (stage != "vae_training")


# ------------------------------------------------------------------------------- saying no
def test_refuses_and_the_named_setting_fits(monkeypatch, capsys):
    need = estimate(TINY, "alignment", replace(CPU, bf16=True)).total
    tight = Device("cpu", need, 1e11)
    monkeypatch.setattr(module, "this_device", lambda: tight)
    assert main(["--stage", "alignment"]) == 2
    said = capsys.readouterr()
    assert "alignment needs" in said.err and "It fits with: " in said.err and "MiB per process" in said.out
    changes, setup = remedy(TINY, "alignment", Setup(tight))
    changed = TINY
    for field, value in changes.items(): changed = override(changed, field, value)
    assert estimate(changed, "alignment", setup).fits and in_words(changes, Setup(tight), setup)


def test_says_so_when_nothing_helps():
    crumb = Setup(Device("cpu", 2**20, 1e11))
    assert remedy(override(TINY, "sft.batch_size", "2"), "sft", crumb) is None


RECIPES = Path(__file__).parent.parent / "docs/recipes"
STAGE_OF = {"wmpo-sft": "sft", "wmpo-train-world-model": "alignment", "wmpo_nb.alignment": "alignment", "wmpo-train-reward": "reward_training",
            "wmpo_nb.wmpo": "grpo"}


def recipe_commands(page: str) -> list[list[str]]:
    "The training commands of a recipe, as words."
    blocks = re.findall(r"```\n(.*?)```", (RECIPES / page).read_text(), re.S)
    words = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines() if "--preset" in line]
    return [w for w in words if set(w) & set(STAGE_OF)]


@pytest.mark.parametrize("page, stages", [("checkpoints.md", ["alignment", "alignment", "reward_training", "grpo"]), ("mimicgen.md", ["sft"])])
def test_the_recipes_for_released_networks_fit_on_their_gpus(page, stages):
    "Each training command on GPUs of 80 GB, as many as its launch configuration says, or one."
    found = []
    for words in recipe_commands(page):
        option = lambda name, default: words[words.index(name) + 1] if name in words else default
        stage = next(STAGE_OF[w] for w in words if w in STAGE_OF)
        setup, config = Setup(DEVICES["h100"]), option("--config_file", None)
        if config: setup = configured_setup(RECIPES.parents[1] / config, DEVICES["h100"])
        setup = replace(setup, passes=int(option("--accumulate", "1")), checkpointing=f"--{stage}.activation_checkpointing" in words)
        found.append(stage)
        assert estimate(load_preset(option("--preset", None)), stage, setup).fits, words
    assert found == stages


def test_pretraining_on_the_mixture_fits_as_the_cluster_recipe_launches_it():
    text = (RECIPES / "cluster.md").read_text()
    words = next(block for block in re.findall(r"```bash\n(.*?)```", text, re.S) if "--pretrain oxe" in block).split()
    option = lambda name: words[words.index(name) + 1]
    setup = replace(configured_setup(RECIPES.parents[1] / option("--config_file"), DEVICES["h100"]), passes=int(option("--accumulate")))
    preset = load_preset(option("--preset"))
    within_a_quarter = lambda found: found.total * 1.25 <= USABLE * setup.device.memory
    assert within_a_quarter(estimate(preset, "pretraining", setup)) and not within_a_quarter(estimate(preset, "pretraining", replace(setup, passes=1)))


# ------------------------------------------------------------------------------- the commands
def test_dry_run_of_a_training_command(tmp_path):
    "Without the files the run itself would need, and without leaving a trace."
    code = "from wmpo_nb.sft import main; raise SystemExit(main())"
    done = subprocess.run([sys.executable, "-c", code, "--dry-run", "--sft.batch_size", "4", "--accumulate", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sft" in done.stdout and "hours" in done.stdout and "in 2 passes" in done.stdout and not list(tmp_path.iterdir())
    wrong = subprocess.run([sys.executable, "-c", code, "--dry-run", "--accumulate", "0"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2 and "--accumulate must be at least 1" in wrong.stderr


@pytest.mark.parametrize("precision, said", [("fp32", "float32 compute"), ("bf16", "bfloat16 compute")])
def test_dry_run_heeds_the_precision(precision, said, capsys):
    from wmpo_nb.sft import main as clone
    with pytest.raises(SystemExit): clone(["--dry-run", "--precision", precision])
    assert said in capsys.readouterr().out


def test_practice_that_measures_its_distance_holds_one_more_policy():
    plain, measured = (estimate(override(TINY, "grpo.start_kl", text), "grpo", CPU) for text in ("false", "true"))
    assert measured.memory["other networks"] - plain.memory["other networks"] == pytest.approx(plain.memory["weights"], rel=0.01)
    assert measured.flops > plain.flops
    adapters = override(TINY, "grpo.lora_rank", "4")                     # the policy without them is at hand
    one, other = (estimate(override(adapters, "grpo.start_kl", text), "grpo", CPU).memory for text in ("false", "true"))
    assert one["other networks"] == other["other networks"]


@pytest.mark.parametrize("words, stage", [([], "reward_pretraining"), (["--start", "a.safetensors"], "reward_training")])
def test_dry_run_of_the_judge(words, stage, capsys):
    from wmpo_nb.reward import main as train_reward
    with pytest.raises(SystemExit): train_reward(["--dry-run", "--reward_training.steps", "5", *words])
    assert re.search(rf"\b{stage}\b", capsys.readouterr().out)


def test_setup_of_a_launch():
    assert launched_setup({}) == launched_setup({"WORLD_SIZE": "1"})
    fsdp = launched_setup({"WORLD_SIZE": "8", "ACCELERATE_USE_FSDP": "true"})
    assert (fsdp.processes, fsdp.sharding) == (8, "fsdp")
    assert launched_setup({"ACCELERATE_USE_FSDP": "true", "FSDP_RESHARD_AFTER_FORWARD": "false"}).sharding == "zero2"


def test_setup_of_accelerate_s_configuration(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_processes: 16\nmixed_precision: bf16\n"
                    "use_cpu: false\nfsdp_config:\n  fsdp_version: 2\n")
    setup = configured_setup(path, DEVICES["h100"])
    assert (setup.processes, setup.sharding) == (16, "fsdp")
    path.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: bf16\nuse_cpu: false\n")
    assert (configured_setup(path, DEVICES["h100"]).processes, configured_setup(path, DEVICES["h100"]).sharding) == (2, "none")
    assert configured_setup(Path(__file__).parent.parent / "configs/accelerate/zero2_8.yaml", DEVICES["h100"]).sharding == "zero2"
    path.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_processes: 2\nmixed_precision: 'no'\nuse_cpu: false\n"
                    "deepspeed_config:\n  zero_stage: 3\n")
    with pytest.raises(UserError, match="zero2_8"): configured_setup(path, DEVICES["h100"])
    with pytest.raises(UserError, match="cannot read"): configured_setup(tmp_path / "none.yaml", DEVICES["h100"])


@pytest.mark.parametrize("argument, said", [("--processes=0", "--processes"), ("--accumulate=0", "--accumulate"), ("--utilisation=2", "--utilisation"), ("--sft.batchsize=3", "batch_size")])
def test_wrong_arguments_are_one_line(capsys, argument, said):
    assert main([argument]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
