"Properties of the policy and of behaviour cloning, on networks small enough for a second each."
from dataclasses import replace

import pytest
import torch

from wmpo_nb.from_scratch import shipped_weights
from wmpo_nb.policy import (OpenVLAOFT, action_ids, detokenize_actions, encode_prompt, load_policy, policy_images, sample_tokens,
                            tokenize_actions)
from wmpo_nb.presets import PolicyConfig, SFTConfig, UserError, load_preset
from wmpo_nb.run import Checkpointer
from wmpo_nb.sft import (demonstration_windows, imitation_loss, main, policy_actions, shift_images, smoothed_targets,
                         train_sft)
from wmpo_nb.trajectory import ActionStats, Streams, TrajectoryBatch, read_shards, write_shard

torch.set_num_threads(1)       # networks this small lose more by waiting for a second thread than they gain

CONFIG = PolicyConfig(image_size=32, vision_dims=(24, 16), vision_depths=(2, 2), vision_heads=(2, 2),
                      vision_styles=("dinov2", "siglip"), hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2)
STATS = ActionStats(torch.full((7,), -0.5).double(), torch.full((7,), 0.5).double(), torch.arange(7) < 6)
IDS = action_ids(CONFIG)


@pytest.fixture
def policy():
    torch.manual_seed(0)
    policy = OpenVLAOFT(CONFIG, STATS, "lift").eval()
    policy.bfloat16 = False
    return policy


def some_frames(count, seed=0):
    return torch.randint(0, 256, (count, 32, 32, 3), generator=torch.Generator().manual_seed(seed)).byte()


def test_a_policy_saved_with_other_bins_is_refused(policy, tmp_path):
    "Neither bins nor the crop change a shape: decoded with others, every action would be wrong without a word."
    policy.save_pretrained(tmp_path)
    fits = replace(load_preset("tiny_lift"), policy=CONFIG)
    assert load_policy(tmp_path, fits).config == CONFIG
    for name, other in (("bins", 32), ("center_crop", 0.9)):
        with pytest.raises(UserError, match=f"add --policy.{name} {getattr(CONFIG, name)}$"):
            load_policy(tmp_path, replace(fits, policy=replace(CONFIG, **{name: other})))


# --- tokens ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", [CONFIG, load_preset("coffee_128").policy], ids=["tiny", "paper"])
def test_every_id_survives_the_round_trip(config):
    ids = torch.arange(action_ids(config).start, action_ids(config).stop)
    back = tokenize_actions(detokenize_actions(ids[:, None].expand(-1, 7), config), config)
    expected = ids.clone()
    expected[0] = ids[1]                               # 256 ids, 255 bin centres: the two smallest actions share one
    assert torch.equal(back, expected[:, None].expand(-1, 7))


def test_larger_id_is_smaller_action():
    ids = torch.arange(IDS.start, IDS.stop)
    values = detokenize_actions(ids[:, None].expand(-1, 7), CONFIG)[..., 0].flatten()
    assert (values.diff() <= 0).all() and values[0] > 0.99 and values[-1] < -0.99


def test_paper_ids():
    config = load_preset("coffee_128").policy
    assert action_ids(config) == slice(31744, 32000)
    assert tokenize_actions(torch.full((1, 7), -1.0), config).tolist() == [31999] * 7
    assert tokenize_actions(torch.full((1, 7), 9.0), config).tolist() == [31744] * 7, "clipped"


def test_tokens_are_step_major():
    actions = torch.linspace(-0.9, 0.9, 56).view(8, 7)
    tokens = tokenize_actions(actions, CONFIG)
    assert (tokens.diff() < 0).all(), "growing actions in flat order are falling ids in flat order"
    torch.testing.assert_close(detokenize_actions(tokens, CONFIG).float(), actions, atol=1 / 255, rtol=0)


def test_prompt_bytes_never_meet_action_ids():
    assert max(encode_prompt(CONFIG, "é 🤖 水 \U0010ffff")) < IDS.start
    with pytest.raises(UserError, match="tokenizer"): encode_prompt(load_preset("coffee_128").policy, "coffee")


# --- the sequence ------------------------------------------------------------------------------------------------

def arguments_of(policy, frames):
    return policy.inputs(policy_images(frames, policy.config))


@torch.no_grad()
def test_every_position_sees_every_other(policy):
    sequence, _, _ = policy.embed(*arguments_of(policy, some_frames(1)))
    before = policy.language_model.model(sequence)
    for position in (0, 5, 20, sequence.shape[1] - 1):     # BOS, a patch, the last prompt token, stop
        changed = sequence.clone()
        changed[:, position] += 1
        moved = (policy.language_model.model(changed) - before).abs().amax(-1)
        assert (moved > 1e-7).all(), f"a change at {position} must reach all positions, earlier ones too"


@torch.no_grad()
def test_placeholders_are_nothing(policy, monkeypatch):
    arguments = arguments_of(policy, some_frames(2))
    sequence, _, length = policy.embed(*arguments)
    assert (sequence[:, 16 + length[0]:16 + length[0] + 56] == 0).all()
    before = policy(*arguments)
    monkeypatch.setattr("wmpo_nb.policy.PLACEHOLDER", 77)
    assert torch.equal(policy(*arguments), before)
    policy.language_model.model.embed_tokens.weight[77] += 1
    assert torch.equal(policy(*arguments), before)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(policy, side):
    pixels, ids, mask = arguments_of(policy, some_frames(2))
    alone = policy(pixels, ids, mask)
    extra = torch.tensor([[17, 3, 99], [5, 5, 5]])
    order = [extra, ids] if side == "left" else [ids, extra]
    masks = [torch.zeros_like(extra), mask] if side == "left" else [mask, torch.zeros_like(extra)]
    padded = policy(pixels, torch.cat(order, 1), torch.cat(masks, 1))
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


# --- acting ------------------------------------------------------------------------------------------------------

def test_company_does_not_change_a_sample(policy):
    frames = some_frames(5)
    together = policy.act(frames, Streams(3, range(5), [0, 1, 0, 1, 0]), 1.6)
    alone = policy.act(frames[3:4], Streams(3, [3], [1]), 1.6)
    assert torch.equal(alone.tokens[0], together.tokens[3])
    torch.testing.assert_close(alone.actions[0], together.actions[3])
    other = policy.act(frames[3:4], Streams(3, [3], [0]), 1.6)
    assert not torch.equal(alone.tokens, other.tokens), "another member of the group tries something else"


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_old_log_probs_equal_recomputed_ones(policy, temperature, bfloat16):
    policy.bfloat16 = bfloat16
    frames = some_frames(6)
    chunk = policy.act(frames, Streams(0, range(6), [0] * 6), temperature)
    policy.train()                                     # there is nothing in it that behaves otherwise
    again = policy.log_probs(frames, chunk.tokens, temperature)
    torch.testing.assert_close(again.detach(), chunk.log_probs, atol=1e-6, rtol=0)
    assert again.requires_grad and not chunk.log_probs.requires_grad


@torch.no_grad()
def test_log_probs_are_normalised(policy):
    frames = some_frames(1).expand(256, -1, -1, -1)
    tokens = torch.arange(IDS.start, IDS.stop)[:, None].expand(-1, 56)
    for temperature in (0.5, 1.0, 1.6):
        log_probs, entropy = policy.log_probs_and_entropy(frames, tokens, temperature)
        torch.testing.assert_close(log_probs.exp().sum(0), torch.ones(56), atol=1e-4, rtol=0)
        torch.testing.assert_close(-(log_probs.exp() * log_probs).sum(0), entropy[0], atol=1e-3, rtol=0)


def test_samples_follow_the_softmax():
    logits = torch.randn(1, 4, 256, generator=torch.Generator().manual_seed(0)) * 2
    uniform = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(1))
    drawn = sample_tokens(logits.expand(20_000, -1, -1), uniform, 1.6, CONFIG) - IDS.start
    frequency = torch.stack([torch.bincount(d, minlength=256) for d in drawn.T]) / 20_000
    assert (frequency - (logits[0] / 1.6).softmax(-1)).abs().max() < 0.01


def test_extremes_of_the_uniform_number_stay_in_range():
    logits = torch.full((1, 2, 256), -1000.0)
    logits[..., 10:20] = 0.0
    low, high = sample_tokens(logits, torch.tensor([[0.0, 1 - 2 ** -24]]), 1.0, CONFIG)[0] - IDS.start
    assert (low, high) == (10, 19)


def test_greedy_needs_no_randomness(policy):
    frames = some_frames(3)
    chunk = policy.act(frames, None, 0)
    assert torch.equal(chunk.tokens, policy.action_logits(frames).argmax(-1) + IDS.start)
    expected = STATS.unnormalize(detokenize_actions(chunk.tokens, CONFIG))
    assert torch.equal(chunk.actions, expected) and chunk.actions.dtype == torch.float32
    assert chunk.actions[..., :6].abs().max() <= 0.5 and chunk.actions.shape == (3, 8, 7)


def test_saved_policy_acts_the_same(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    restored = OpenVLAOFT.from_pretrained(tmp_path)
    restored.bfloat16 = False
    assert restored.config == CONFIG and restored.instruction == "lift"
    assert all(p.requires_grad for p in restored.parameters())
    a, b = (p.act(some_frames(2), Streams(0, [0, 1], [0, 0]), 1.0) for p in (policy, restored))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.actions, b.actions)


def test_another_instruction_is_another_prompt(policy):
    images, spoken = some_frames(1), []
    for instruction in ("lift", "put it down", "lift"):
        policy.instruction = instruction
        spoken.append(policy.inputs(images)[1][0].tolist())
    assert spoken[0] == spoken[2] != spoken[1] and {byte + 3 for byte in b"put it down"} <= {*spoken[1]}


def test_folders_that_hold_no_policy(policy, tmp_path):
    with pytest.raises(UserError, match="config.json"): OpenVLAOFT.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"policy": {"fog": 1}, "instruction": "lift"}')
    with pytest.raises(UserError, match="not of this version.*fog"): OpenVLAOFT.from_pretrained(tmp_path)
    policy.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not fit OpenVLAOFT"):
        OpenVLAOFT.from_pretrained(tmp_path, replace(CONFIG, hidden_size=64), "lift")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:999])
    with pytest.raises(UserError, match="truncated"): OpenVLAOFT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["OpenVLAForActionPrediction"]}')
    with pytest.raises(UserError, match="preset"): OpenVLAOFT.from_pretrained(tmp_path)


# --- behaviour cloning -------------------------------------------------------------------------------------------

def demonstrations(count=3, steps=16, length=(16, 12, 9)):
    g = torch.Generator().manual_seed(0)
    zeros = torch.zeros(count).long()
    return TrajectoryBatch(
        frames=torch.randint(0, 256, (count, steps + 1, 32, 32, 3), generator=g).byte(),
        actions=torch.rand(count, steps, 7, generator=g) - 0.5, tokens=torch.zeros(count, 2, 56).long(),
        log_probs=torch.zeros(count, 2, 56), success=torch.ones(count).bool(), finish_step=torch.tensor(length),
        length=torch.tensor(length), state_id=zeros, member=zeros)


def test_windows_end_with_the_trajectory():
    batch = demonstrations()
    frames, chunks = demonstration_windows(batch, STATS)
    assert len(frames) == len(chunks) == (16 - 7) + (12 - 7) + (9 - 7)
    assert torch.equal(frames[9], batch.frames[1, 0]) and torch.equal(frames[13], batch.frames[1, 4])
    torch.testing.assert_close(chunks[13], policy_actions(batch.actions[1, 4:12], STATS))


def test_windows_that_repeat_the_last_action():
    batch = demonstrations()
    frames, chunks = demonstration_windows(batch, STATS, pad_end=True)
    assert len(frames) == 16 + 12 + 9
    last = policy_actions(batch.actions[2, 8], STATS)
    assert torch.equal(frames[-1], batch.frames[2, 8]) and torch.equal(chunks[-1], last.expand(8, 7))


def test_labels_replace_what_was_executed():
    batch = demonstrations()
    labels = torch.rand(3, 16, 7) - 0.5
    frames, chunks = demonstration_windows(batch, STATS, labels=labels)
    assert torch.equal(frames, demonstration_windows(batch, STATS)[0])
    assert torch.equal(chunks[0], policy_actions(labels[0, :8], STATS))


def test_policy_actions_undo_unnormalise():
    actions = torch.rand(50, 7) - 0.5
    torch.testing.assert_close(STATS.unnormalize(policy_actions(actions, STATS)), actions, atol=1e-6, rtol=0)
    assert policy_actions(torch.full((7,), 9.0), STATS).eq(1).all()


def test_smoothed_targets():
    targets = smoothed_targets(256, 3.0)
    torch.testing.assert_close(targets.sum(1), torch.ones(256))
    assert torch.equal(targets.argmax(1), torch.arange(256))
    spread = (targets[128] * (torch.arange(256) - 128.0) ** 2).sum().sqrt()
    assert abs(spread - 3) < 0.01
    assert torch.equal(smoothed_targets(256, 0), torch.eye(256))


def test_plain_targets_are_ordinary_cross_entropy():
    logits, tokens = torch.randn(2, 56, 256), torch.randint(IDS.start, IDS.stop, (2, 56))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten() - IDS.start)
    torch.testing.assert_close(imitation_loss(logits, tokens, smoothed_targets(256, 0), IDS.start), expected)


def test_shifted_images_are_translations():
    images = some_frames(64)
    shifted = shift_images(images, 2, torch.Generator().manual_seed(0))
    inner = shifted[:, 4:-4, 4:-4]
    found = torch.zeros(5, 5, 64).int()
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            found[dy, dx] = (images[:, 4 + dy:28 + dy, 4 + dx:28 + dx] == inner).flatten(1).all(1)
    assert (found.sum((0, 1)) == 1).all() and not torch.equal(shifted, images)
    assert (found.sum(2) > 0).sum() > 15, "both directions are drawn, each for itself"
    assert shift_images(images, 0, None) is images


SHORT = SFTConfig(steps=6, batch_size=4, warmup_steps=2, decay_steps=3, log_every=1, checkpoint_every=2)


def cloned(tmp_path, steps, seed=0):
    torch.manual_seed(1)
    policy = OpenVLAOFT(CONFIG, STATS, "lift")
    frames, chunks = demonstration_windows(demonstrations(), STATS)
    losses = {}
    checkpointer = Checkpointer(tmp_path, SHORT.checkpoint_every)
    stop = steps if steps < SHORT.steps else None
    def log(step, **numbers):
        losses[step] = numbers["loss"]
        if step == stop: raise KeyboardInterrupt
    try: train_sft(policy, frames, chunks, SHORT, seed=seed, checkpointer=checkpointer, log=log)
    except KeyboardInterrupt: pass
    return policy.state_dict(), losses


def test_resume_equals_unbroken(tmp_path):
    whole, losses = cloned(tmp_path / "whole", SHORT.steps)
    cloned(tmp_path / "broken", 5)                     # interrupted after the checkpoint of step 4
    resumed, rest = cloned(tmp_path / "broken", SHORT.steps)
    assert sorted(rest) == [4, 5] and all(rest[s] == losses[s] for s in rest)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_same_seed_same_policy(tmp_path):
    (a, _), (b, _), (c, _) = (cloned(tmp_path / str(i), SHORT.steps, seed) for i, seed in enumerate((0, 0, 1)))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_training_shifts_its_images():
    def trained(shift):
        torch.manual_seed(1)
        policy, windows = OpenVLAOFT(CONFIG, STATS, "lift"), demonstration_windows(demonstrations(), STATS)
        return train_sft(policy, *windows, replace(SHORT, image_shift=shift)).state_dict()
    still, again, moved = trained(0), trained(0), trained(4)
    assert all(torch.equal(still[name], again[name]) for name in still) and any(not torch.equal(still[name], moved[name]) for name in still)


def test_eight_observations_are_learnt_by_heart():
    torch.manual_seed(0)
    policy = OpenVLAOFT(CONFIG, STATS, "lift")
    frames, chunks = some_frames(8), torch.rand(8, 8, 7) * 2 - 1
    config = SFTConfig(steps=250, batch_size=8, learning_rate=4e-3, warmup_steps=20, decay_steps=60, label_sigma=0.0,
                       image_shift=0, ema=0.9, checkpoint_every=0)
    train_sft(policy, frames, chunks, config, seed=0)
    learnt = policy.act(frames, None, 0).tokens == tokenize_actions(chunks, CONFIG)
    assert learnt.float().mean() > 0.95


SMALL = ["--policy.image_size", "32", "--policy.vision_dims", "[24]", "--policy.vision_heads", "[2]", "--policy.vision_depths",
         "[2]", "--policy.hidden_size", "32", "--policy.num_heads", "2", "--sft.steps", "2", "--sft.batch_size", "2"]


def test_the_command_clones_what_was_meant_and_measures_what_was_done(tmp_path, monkeypatch):
    "A noisy hand's intentions are learnt, and what stands in the table after the end of a trial is no action."
    batch, given = demonstrations(), []
    batch.intended = batch.actions / 2
    for actions, length in zip(batch.actions, batch.length): actions[length:] = 9
    write_shard(tmp_path / "data/a.tar", batch)
    monkeypatch.setattr("wmpo_nb.sft.train_sft", lambda *arguments, **_: given.extend(arguments))
    assert main(["--data", str(tmp_path / "data"), "--output", str(tmp_path / "run"), *SMALL]) == 0
    policy, _, chunks, _ = given
    assert torch.equal(chunks, demonstration_windows(batch, policy.stats, labels=batch.intended)[1])
    executed = torch.cat([actions[:length] for actions, length in zip(batch.actions, batch.length)])
    assert torch.equal(policy.stats.q99, ActionStats.from_actions(executed).q99) and (policy.stats.q99 <= 1).all()


def test_command(tmp_path, capsys):
    write_shard(tmp_path / "data" / "shard_00000.tar", demonstrations())
    arguments = ["--preset", "tiny_lift", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "run"), *SMALL]
    assert main(arguments) == 0
    assert OpenVLAOFT.from_pretrained(tmp_path / "run" / "policy").instruction == "lift"
    assert main(arguments) == 2 and "--resume" in capsys.readouterr().err
    again = [*arguments, "--output", str(tmp_path / "again"), "--sft.learning_rate", "0", "--start"]
    assert main([*again, str(tmp_path / "nowhere")]) == 2 and not (tmp_path / "again").exists()
    assert main([*again, str(tmp_path / "run/policy")]) == 0
    trained, more = (OpenVLAOFT.from_pretrained(tmp_path / name / "policy").state_dict() for name in ("run", "again"))
    assert torch.allclose(trained["projector.fc1.weight"], more["projector.fc1.weight"], atol=1e-6)      # it went on from there
    assert main(["--data", str(tmp_path / "none"), "--output", str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists(), "bad data is found before anything is written"


def test_a_policy_of_another_task_is_refused():
    with pytest.raises(UserError, match="was taught 'lift', and the instruction of tiny_stack is 'stack'"):
        load_policy(shipped_weights(load_preset("tiny_lift")) / "policy_lift", load_preset("tiny_stack"))
    assert load_policy(shipped_weights(load_preset("tiny_lift")) / "policy_lift", load_preset("tiny_stack", {"task.instruction": "lift"})).instruction == "lift"


def test_cloning_from_files_is_cloning_from_memory(tmp_path):
    write_shard(tmp_path / "0.tar", demonstrations())
    stored, kept = (demonstration_windows(read_shards(tmp_path, stored=stored), STATS, pad_end=True) for stored in (True, False))
    assert not isinstance(stored[0], torch.Tensor) and torch.equal(stored[0][torch.arange(len(stored[0]))], kept[0]) and torch.equal(stored[1], kept[1])
    def trained(frames, chunks):
        torch.manual_seed(1)
        return train_sft(OpenVLAOFT(CONFIG, STATS, "lift"), frames, chunks, SHORT).state_dict()
    files, memory = trained(*stored), trained(*kept)
    assert all(torch.equal(files[name], memory[name]) for name in memory)


def test_statistics_other_than_the_policys_own_are_refused(tmp_path):
    "They would be written into every policy that is trained from it."
    folder, preset = shipped_weights(load_preset("tiny_lift")) / "policy_lift", load_preset("tiny_lift")
    own = (folder / "dataset_statistics.json").read_text()
    for name, text in (("same.json", own), ("other.json", own.replace("0.", "1."))): (tmp_path / name).write_text(text)
    assert torch.equal(load_policy(folder, preset, tmp_path / "same.json").stats.q99, load_policy(folder, preset).stats.q99)
    with pytest.raises(UserError, match="of its own, which differs"): load_policy(folder, preset, tmp_path / "other.json")
