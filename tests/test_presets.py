"The paper's presets: two sources, what they disagree in, and the page that says so."
from pathlib import Path

import pytest

from wmpo_nb.presets import (
    OTHER_DIFFERENCES, PAPER_TASKS, PAPER_VALUES, PRESETS, UserError, completed, differences, differences_page, load_preset, override)

PAGE = Path(__file__).parent.parent / "docs/differences.md"
RELEASED = [f"{task}_{budget}" for task in PAPER_TASKS for budget in (128, 1280)]


def test_the_page_is_what_the_presets_say():
    command = 'python -c "from wmpo_nb.presets import differences_page as page; print(page(), end=str())" > docs/differences.md'
    assert PAGE.read_text() == differences_page(), command


def test_the_page_would_show_a_new_disagreement(monkeypatch):
    monkeypatch.setitem(PAPER_VALUES, "grpo.learning_rate", 1e-6)
    assert "| `grpo.learning_rate` | 1e-06 | 5e-06 |" in differences_page() and "grpo.learning_rate" not in PAGE.read_text()


@pytest.mark.parametrize("name", RELEASED)
def test_sources_differ_where_the_paper_says_so_and_nowhere_else(name):
    released, paper = load_preset(name), load_preset(f"{name}_paper")
    assert (released.source, paper.source) == ("released", "paper") and paper.name == f"{name}_paper"
    assert {key: values[0] for key, values in differences(paper, released).items()} == PAPER_VALUES
    for key, (value, _) in differences(paper, released).items(): released = override(released, key, value)
    assert not differences(paper, released)


def test_values_of_the_tables():
    "Reference 1.1, 1.2 and 5, by hand."
    p, t = load_preset("square_1280"), load_preset("square_1280_paper")
    assert (p.task.horizon, p.task.chunks, p.reward.threshold, p.collect.trajectories) == (184, 23, 0.96, 1280)
    assert (p.collect.temperature, p.grpo.group_size, p.grpo.groups, p.grpo.mini_batch, p.grpo.learning_rate) == (1.6, 8, 64, 128, 5e-6)
    assert (p.grpo.clip_low, p.grpo.clip_high, p.grpo.accuracy_low, p.grpo.accuracy_high, p.grpo.iterations) == (0.2, 0.28, 0.1, 0.9, 100)
    assert (p.world_model.flow_steps, p.world_model.context_noise, t.world_model.context_noise, p.stdit.context_timestep) == (30, 15, 50, 15)
    assert (p.alignment.ema, t.alignment.ema, p.alignment.grad_clip, t.alignment.grad_clip) == (0.99, 0.9999, 1.0, 0.1)
    assert (p.pretraining.steps, t.pretraining.steps, t.alignment.steps) == (1_190_000, 12_000_000, 3_000_000)
    assert (p.alignment.learning_rate, p.alignment.batch_size, p.alignment.warmup_steps, p.alignment.weight_decay) == (1e-4, 128, 1000, 0)
    r = p.reward_training
    assert (r.learning_rate, r.weight_decay, r.ema, r.mining, r.image_shift, r.jitter, r.pixel_noise) == (1e-4, 1e-4, 0, 1, 0, 0, 0)


def test_a_field_newer_than_a_record_was_as_it_was_then():
    old = load_preset("tiny_stack").to_dict()
    del old["reward_training"]["threshold_beta"], old["task"]["turn"]
    old["task"]["gone"] = 1
    found = completed(old)
    assert found["reward_training"]["threshold_beta"] == 1.0 and found["task"]["turn"] == load_preset("tiny_stack").task.turn
    assert "gone" not in found["task"] and found["sft"] == old["sft"]
    for name in PRESETS: assert completed(load_preset(name).to_dict()) == load_preset(name).to_dict()


def test_tiny_presets_are_nobodys_but_ours():
    assert {load_preset(name).source for name in PRESETS if name.startswith("tiny")} == {"ours"}
    with pytest.raises(UserError, match="Did you mean 'coffee_128_paper'"): load_preset("coffee_128_papr")


def test_every_row_has_four_cells():
    assert all(len(row) == 4 and not any("|" in cell for cell in row) for row in OTHER_DIFFERENCES)


@pytest.mark.parametrize("key, value", [("grpo.mini_batch", "0"), ("grpo.rollout_groups", "0"), ("grpo.draw_multiple", "0"), ("world_model.flow_steps", "0"),
                                        ("sft.log_every", "0"), ("grpo.iterations", "-1"), ("grpo.learning_rate", "-0.1"), ("collect.temperature", "-1")])
def test_numbers_that_no_run_can_have_are_refused(key, value):
    with pytest.raises(UserError, match=f"{key} must be at least [01], not {value}"): load_preset("tiny_lift", {key: value})


def test_every_preset_would_accept_its_own_numbers():
    for name in PRESETS:
        preset = load_preset(name)
        for stage, config in preset.to_dict().items():
            for field, value in config.items() if isinstance(config, dict) else ():
                assert override(preset, f"{stage}.{field}", getattr(getattr(preset, stage), field)) == preset, (name, stage, field, value)


@pytest.mark.parametrize("overrides, message", [
    ({"task.chunk_size": "4"}, "4 actions for the task, 8 for the world model"),
    ({"task.horizon": "30"}, "30 is not a whole number of chunks of 8"),
    ({"grpo.learning_rate": "NaN"}, "finite"), ({"sft.ema": "1.5"}, "at most 1"), ({"grpo.accuracy_low": "5"}, "at most 1"), ({"policy.center_crop": "3"}, "at most 1"),
    ({"policy.bins": "1000"}, "more than the 512 words"), ({"reward_training.batch_size": "1"}, "at least 2"),
    ({"reward_training.mining": "0"}, "at least 1"), ({"alignment.chunk_starts": "1.5"}, "at most 1"), ({"policy.center_crop": "0"}, "not 0"),
    ({"alignment.optimizer": "adam"}, "alignment.optimizer is adamw or muon, not 'adam'"),
    ({"reward.first_clip_end": "40"}, "first clip ends with frame 40 .* has 33 frames"),
])
def test_numbers_that_contradict_each_other_are_refused(overrides, message):
    with pytest.raises(UserError, match=message): load_preset("tiny_lift", overrides)
