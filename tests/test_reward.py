"The judge's promises: the earliest clip decides, nothing after the end counts, F1 and threshold as by hand, exact resume."
import json
import os
from dataclasses import replace

import pytest
import torch
from wmpo_nb.presets import RewardConfig, RewardTrainConfig, UserError, load_preset
from wmpo_nb.reward import (
    SuccessClassifier, augment, calibrate, clip_ends, clip_pools, clip_terms, clips_at, decide, f1_score, hardest, load_pretrained, load_reward, main, mined_clips,
    preprocess, sample_clips, save_reward, select_threshold, split_trajectories, start_of, train_reward, trajectory_scores)
from wmpo_nb.run import Checkpointer, read_metrics
from wmpo_nb.weights import save_tensors
from wmpo_nb.trajectory import TrajectoryBatch, write_shard

SMALL = RewardConfig(image_size=16, patch_size=8, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32)
TRAINING = RewardTrainConfig(steps=6, batch_size=16, warmup_steps=2, decay_steps=2, checkpoint_every=3, log_every=1)


def trials(count=8, steps=24, size=16):
    "Every other trial succeeds at step 14: from then on the frames are bright. The others stay dark. All are a little noisy."
    frames = torch.randint(0, 40, (count, steps + 1, size, size, 3), generator=torch.Generator().manual_seed(0))
    success = torch.arange(count) % 2 == 0
    frames[success, 14:] += 180
    finish = torch.where(success, 14, steps)
    return TrajectoryBatch(
        frames.to(torch.uint8), torch.zeros(count, steps, 7), torch.zeros(count, steps // 8, 56, dtype=torch.long),
        torch.zeros(count, steps // 8, 56), success, finish, torch.where(success, 16, steps), torch.arange(count), torch.zeros(count).long())


def small_classifier(seed=0, **changes):
    torch.manual_seed(seed)
    return SuccessClassifier(replace(SMALL, **changes)).eval()


class BrightnessClassifier(SuccessClassifier):
    "A judge one can compute in the head: logit 1 is high where the last frame of the clip is bright."
    def forward(self, pixel_values):
        bright = pixel_values[:, -1].mean((1, 2, 3))
        return torch.stack([torch.zeros_like(bright), 20 * bright], 1)


def brightness_classifier(**changes):
    return BrightnessClassifier(replace(SMALL, **changes)).eval()


def videos(bright_frames, total=17):
    "Dark videos uint8 [B, total, 16, 16, 3] with the given frames white."
    frames = torch.zeros(len(bright_frames), total, 16, 16, 3, dtype=torch.uint8)
    for video, chosen in zip(frames, bright_frames): video[chosen] = 255
    return frames


def test_the_earliest_clip_decides_and_its_last_frame_is_the_finish_step():
    success, finish = brightness_classifier().judge(videos([[12, 13, 14], [9], []]))
    assert success.tolist() == [True, True, False]
    assert finish.tolist() == [12, 9, 16]
    assert finish.dtype == torch.int64 and success.dtype == torch.bool


def test_frames_after_length_cannot_cause_a_success():
    frames, length = videos([[12], [12], [12]]), torch.tensor([11, 12, 16])
    success, finish = brightness_classifier().judge(frames, length)
    assert success.tolist() == [False, True, True]
    assert finish.tolist() == [11, 12, 12]
    frames[0, 12:] = torch.randint(0, 256, frames[0, 12:].shape, dtype=torch.uint8)
    assert not brightness_classifier().judge(frames[:1], length[:1])[0]


def test_no_verdict_before_the_first_clip_end():
    frames = videos([[3, 9, 13]])
    for first_clip_end, expected in ((8, 9), (10, 9), (11, 13), (14, 13)):
        assert brightness_classifier(first_clip_end=first_clip_end).judge(frames)[1].tolist() == [expected]
    assert not brightness_classifier(first_clip_end=15).judge(frames)[0]
    assert not brightness_classifier(first_clip_end=100).judge(frames)[0]        # no clip at all


def test_judging_chunk_by_chunk_gives_the_same_verdict():
    classifier, frames = brightness_classifier(), videos([[12], [9, 12], [15], []])
    finish = torch.zeros(4, dtype=torch.long)
    for total in (9, 17):
        success, step = classifier.judge(frames[:, :total], first_end=total - 8 + 1)
        finish = torch.where((finish == 0) & success, step, finish)
    whole = classifier.judge(frames)
    assert torch.equal(finish > 0, whole[0]) and torch.equal(finish[whole[0]], whole[1][whole[0]])


def test_a_stride_leaves_clips_out():
    assert clip_ends(17, replace(SMALL, clip_stride=4)).tolist() == [8, 12, 16]
    assert clip_ends(17, replace(SMALL, clip_stride=4), first_end=10).tolist() == [12, 16]
    assert clip_ends(7, SMALL).tolist() == []
    assert brightness_classifier(clip_stride=4).judge(videos([[9], [11]]))[0].tolist() == [False, True]


def test_the_very_last_frame_counts_unless_upstream_is_copied():
    frames = videos([[16]])
    assert brightness_classifier().judge(frames)[0] and brightness_classifier().judge(frames)[1] == 16
    success, finish = brightness_classifier(last_clip_counts=False).judge(frames)
    assert not success and finish == 16


def test_a_score_at_the_threshold_is_a_success():
    scores, ends, length = torch.tensor([[0.2, 0.5, 0.9]]), torch.tensor([8, 9, 10]), torch.tensor([9])
    for threshold, expected in ((0.5, 8), (0.51, 9), (0.1, 7)):
        assert decide(scores, ends, length, replace(SMALL, threshold=threshold))[1].tolist() == [expected]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_micro_batches_do_not_change_scores(batch_size):
    classifier, batch = small_classifier(), trials(4)
    ends = clip_ends(25, classifier.config)
    scores = trajectory_scores(classifier, batch.frames, batch.length, ends, batch_size)
    assert torch.allclose(scores, trajectory_scores(classifier, batch.frames, batch.length, ends), atol=1e-2)     # bfloat16
    assert (scores[ends[None] - 1 > batch.length[:, None]] == 0).all()


def test_scoring_leaves_the_mode_alone():
    classifier = small_classifier().train()
    classifier.score_clips(trials(1).frames[:, :8])
    assert classifier.training


def test_preprocess_keeps_the_middle():
    clips = torch.zeros(1, 8, 16, 32, 3, dtype=torch.uint8)
    clips[..., 8:24, :] = 255
    assert torch.equal(preprocess(clips, SMALL), torch.ones(1, 8, 3, 16, 16))
    assert preprocess(clips, replace(SMALL, image_size=8, image_mean=(0.25,) * 3, image_std=(0.25,) * 3)).max() == 3


def test_pools():
    batch = trials(2)                                       # one success at 14 that ran to 16, one failure of 24
    pools = clip_pools(batch, RewardTrainConfig(margin=3, hard_steps=2))
    last = {kind: (pairs[:, 1] - 1).tolist() for kind, pairs in pools.items()}
    assert last["positive"] == [14, 15, 16]
    assert last["hard"] == [9, 10] and last["early"] == [7, 8]            # 11, 12 and 13 are nobody's
    assert last["failure"] == list(range(7, 25))
    assert (pools["failure"][:, 0] == 1).all() and (pools["positive"][:, 0] == 0).all()


def test_a_clip_ends_where_its_pair_says():
    frames = torch.arange(20, dtype=torch.uint8).reshape(1, 20, 1, 1, 1).expand(2, -1, -1, -1, 3)
    assert clips_at(frames, torch.tensor([[1, 12]]))[0, :, 0, 0, 0].tolist() == list(range(4, 12))


def test_batches_hold_what_was_asked_for_and_labels_are_right():
    batch = trials()
    pools = clip_pools(batch, TRAINING)
    clips, labels = sample_clips(batch, pools, 16, 48, torch.Generator().manual_seed(0))
    assert len(clips) == 64 and labels[:16].all() and not labels[16:].any()
    assert torch.equal(clips[:, -1].float().mean((1, 2, 3)) > 100, labels.bool())
    pools["failure"] = pools["failure"][:0]                # nothing but successes
    assert sample_clips(batch, pools, 16, 16, torch.Generator().manual_seed(0))[1].float().mean() == 0.5


def test_half_of_the_negatives_are_failures():
    "One trajectory for each kind, all of its frames of one colour."
    batch = trials(4, size=2)
    batch.frames[:] = torch.arange(4)[:, None, None, None, None]
    pools = {kind: torch.tensor([[b, 8]]) for b, kind in enumerate(("positive", "failure", "hard", "early"))}
    clips, _ = sample_clips(batch, pools, 0, 4096, torch.Generator().manual_seed(0))
    found = clips[:, 0, 0, 0, 0].int().bincount(minlength=4) / 4096
    torch.testing.assert_close(found, torch.tensor([0, 0.5, 0.25, 0.25]), atol=0.03, rtol=0)


def test_mining_keeps_the_positives_and_the_most_success_like_negatives():
    clips = torch.zeros(8, 8, 16, 16, 3, dtype=torch.uint8)
    clips[4], clips[7] = 200, 100
    pixels = preprocess(clips, SMALL)
    assert hardest(brightness_classifier(), pixels, 2).tolist() == [0, 1, 4, 7]
    assert hardest(brightness_classifier(), pixels, 4).tolist() == list(range(8))
    logits = torch.tensor([[0.0, 1.0], [5.0, 2.0], [-3.0, 0.0], [0.0, -1.0]])            # how much more like a success than like a failure
    assert hardest(lambda pixels: logits, pixels[:6], 2).tolist() == [0, 1, 4, 2]


def test_augmentation_moves_a_clip_as_one():
    clips = torch.randint(60, 200, (6, 1, 16, 16, 3), dtype=torch.uint8).expand(-1, 8, -1, -1, -1)
    still = replace(TRAINING, image_shift=0, jitter=0.0, pixel_noise=0.0)
    assert torch.equal(augment(clips, still, torch.Generator()), clips)
    moved = augment(clips, replace(still, image_shift=2, jitter=0.1), torch.Generator().manual_seed(1))
    assert moved.shape == clips.shape and moved.dtype == torch.uint8
    assert (moved == moved[:, :1]).all() and not torch.equal(moved, clips)


def test_f1_by_hand():
    predicted, truth = torch.tensor([1, 1, 1, 0, 0]).bool(), torch.tensor([1, 1, 0, 1, 0]).bool()
    assert f1_score(predicted, truth) == pytest.approx({"f1": 2 / 3, "precision": 2 / 3, "recall": 2 / 3})
    assert f1_score(torch.zeros(3).bool(), torch.zeros(3).bool()) == {"f1": 0, "precision": 0, "recall": 0}


def test_threshold_by_hand():
    peaks, truth = torch.tensor([0.95, 0.81, 0.64, 0.3, 0.2]), torch.tensor([1, 1, 0, 1, 0]).bool()
    # (.2, .3]: 3 hits 1 false alarm = 6/7; (.64, .81]: 2 hits 1 miss = 4/5
    threshold, scores = select_threshold(peaks, truth)
    assert 0.2 < threshold <= 0.3 and scores["f1"] == pytest.approx(6 / 7)
    # F-0.5: 5/4 * 3 / (4 + 3/4) = 0.79 against 5/4 * 2 / (2 + 3/4) = 0.91: the false alarm costs more
    threshold, scores = select_threshold(peaks, truth, beta=0.5)
    assert 0.64 < threshold <= 0.81 and scores["precision"] == 1 and scores["recall"] == pytest.approx(2 / 3)
    threshold, scores = select_threshold(torch.tensor([0.9, 0.8, 0.2, 0.1]), torch.tensor([1, 1, 0, 0]).bool())
    assert threshold == pytest.approx(0.5, abs=0.021) and scores["f1"] == 1          # the middle of (.2, .8]


def test_calibration_is_about_trajectories():
    batch = trials()
    batch.frames[1, 20] = 255                               # one failure flashes: a clip-level score would hardly notice
    classifier = brightness_classifier()
    report = calibrate(classifier, batch)
    assert report["precision"] == pytest.approx(4 / 5) and report["recall"] == 1 and report["finish_error"] == 0
    assert classifier.config.threshold == report["threshold"]


def test_a_success_that_was_over_before_the_first_judged_clip_is_nothing_the_judge_missed():
    batch = trials()
    early = batch.success.nonzero()[:2, 0]
    batch.length[early] = batch.finish_step[early] = 9
    classifier = brightness_classifier(first_clip_end=16)
    assert calibrate(classifier, batch)["recall"] == 1 and batch.success.sum() > 2


@pytest.mark.parametrize("length, recall", [(14, 1), (15, 3 / 4)])
def test_a_success_that_ends_with_the_first_judged_clip_can_be_missed(length, recall):
    "Frame 15 is the last of the first clip; one of four successes cannot be seen."
    batch = trials()
    batch.frames[0], batch.length[0], batch.finish_step[0] = 0, length, length
    assert calibrate(brightness_classifier(first_clip_end=16), batch)["recall"] == recall


def test_too_early_does_not_make_up_for_too_late():
    batch = trials(4)
    batch.finish_step[::2] = torch.tensor([13, 15])         # the judge says 14 of both
    assert calibrate(brightness_classifier(), batch)["finish_error"] == 1


def test_a_strict_judge_gives_up_a_success_for_a_false_one():
    "One success shows so faintly that a failure shows more: F1 counts both, F-0.5 neither."
    def fitted(beta):
        batch = trials()
        batch.frames[0, 14:], batch.frames[1, 20] = 124, 130
        return train_reward(brightness_classifier(), batch, replace(TRAINING, steps=0, threshold_beta=beta)).metrics
    assert [fitted(1.0)[name] for name in ("precision", "recall")] == [4 / 5, 1]
    assert [fitted(0.5)[name] for name in ("precision", "recall")] == [1, 3 / 4]


def test_split_is_by_trajectory():
    training, held_out = split_trajectories(torch.ones(20).bool(), 0.25, torch.Generator().manual_seed(0))
    assert len(held_out) == 5 and sorted(training.tolist() + held_out.tolist()) == list(range(20))


def test_the_threshold_is_set_on_trajectories_that_were_not_trained_on(monkeypatch):
    batch, used = trials(), []
    monkeypatch.setattr("wmpo_nb.reward._fit", lambda classifier, part, *_: used.append(part.state_id.tolist()))
    monkeypatch.setattr("wmpo_nb.reward.calibrate", lambda classifier, part, *_: used.append(part.state_id.tolist()) or {})
    train_reward(small_classifier(), batch, TRAINING)
    assert len(used) == 2 and all(used) and sorted(used[0] + used[1]) == batch.state_id.tolist()


def test_training_learns_to_tell():
    batch, config = trials(16), replace(TRAINING, steps=60, learning_rate=5e-3, decay_steps=10, ema=0.9)
    classifier = train_reward(small_classifier(), batch, config)
    assert classifier.metrics["f1"] == 1 and classifier.metrics["finish_error"] <= 3
    success, finish = classifier.judge(batch.frames, batch.length)
    assert torch.equal(success, batch.success)
    assert not classifier.training


def test_a_resumed_training_equals_an_unbroken_one(tmp_path):
    batch, logs = trials(), [{}, {}]
    whole = train_reward(small_classifier(), batch, TRAINING, seed=5, log=lambda step, **n: logs[0].update({step: n}))

    class Stop(Exception): pass

    def stop_at_four(step, **numbers):
        if step == 4: raise Stop
    with pytest.raises(Stop):
        train_reward(small_classifier(), batch, TRAINING, seed=5, checkpointer=Checkpointer(tmp_path, 3), log=stop_at_four)
    resumed = train_reward(small_classifier(seed=9), batch, TRAINING, seed=5, checkpointer=Checkpointer(tmp_path, 3),
                           log=lambda step, **n: logs[1].update({step: n}))
    assert sorted(logs[1]) == [3, 4, 5, 6] and all(logs[0][step] == logs[1][step] for step in (3, 4, 5))
    assert resumed.config == whole.config and resumed.metrics == pytest.approx(whole.metrics, nan_ok=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


def test_data_without_both_outcomes_are_refused_before_training():
    batch = trials()
    with pytest.raises(UserError, match="no successful"): train_reward(small_classifier(), batch[~batch.success], TRAINING)
    batch.finish_step[:] = 3
    with pytest.raises(UserError, match="no failure"): train_reward(small_classifier(), batch[batch.success], TRAINING)


def test_saved_and_loaded(tmp_path):
    classifier, clips = small_classifier(threshold=0.37), trials(2).frames[:, :8]
    classifier.metrics = {"f1": 0.9}
    save_reward(tmp_path / "reward.safetensors", classifier)
    loaded = load_reward(tmp_path / "reward.safetensors")
    assert loaded.config == classifier.config and torch.equal(loaded.score_clips(clips), classifier.score_clips(clips))
    (tmp_path / "bad.pth").write_bytes(b"short")
    for name in ("absent.safetensors", "bad.pth", "absent.pth"):
        with pytest.raises(UserError): load_reward(tmp_path / name, SMALL)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    "(folder, network) of a VideoMAE with its decoder, as transformers saves it: 16 frames, and a last normalisation, as its authors' have."
    from transformers import VideoMAEConfig, VideoMAEForPreTraining
    torch.manual_seed(3)
    network = VideoMAEForPreTraining(VideoMAEConfig(
        image_size=16, patch_size=8, num_frames=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=1, decoder_intermediate_size=8, use_mean_pooling=False))
    for parameter in network.parameters(): torch.nn.init.normal_(parameter)        # biases too, which begin at 0
    folder = tmp_path_factory.mktemp("videomae")
    network.save_pretrained(folder)
    return folder, network


@pytest.mark.parametrize("pooling", [True, False])
@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_a_pretrained_encoder_is_taken_whole_and_the_head_is_fresh(pretrained, name, pooling):
    folder, network = pretrained
    config = replace(SMALL, use_mean_pooling=pooling)
    torch.manual_seed(0)
    classifier = start_of(folder / name, replace(load_preset("tiny_lift", {"reward_training.steps": "2"}), reward=config))
    saved, fresh = network.videomae.state_dict(), small_classifier(use_mean_pooling=pooling)
    if pooling: saved = {key: value for key, value in saved.items() if not key.startswith("layernorm.")}
    assert classifier.config == config and classifier.videomae.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[key]) for key, value in classifier.videomae.state_dict().items())
    head = lambda model: {key: value for key, value in model.state_dict().items() if not key.startswith("videomae.")}
    assert len(head(classifier)) == (4 if pooling else 2)
    assert all(torch.equal(value, head(fresh)[key]) for key, value in head(classifier).items())
    if pooling: assert (classifier.fc_norm.weight == 1).all() and (classifier.fc_norm.bias == 0).all()


def test_a_pretrained_encoder_computes_what_transformers_makes_of_it(pretrained):
    "The released code's call: `from_pretrained` with 8 frames and two labels."
    from transformers import VideoMAEForVideoClassification
    theirs = VideoMAEForVideoClassification.from_pretrained(pretrained[0], num_frames=8, num_labels=2, use_mean_pooling=True).eval()
    ours, pixels = load_pretrained(pretrained[0], SMALL), torch.randn(2, 8, 3, 16, 16)
    with torch.no_grad(): found, expected = (model.videomae(pixels).last_hidden_state for model in (ours, theirs))
    assert torch.allclose(found, expected, atol=1e-5) and expected.std() > 0.1


def test_a_pretrained_network_that_does_not_fit_is_refused_in_one_line(pretrained, tmp_path):
    folder, network = pretrained
    for change, said in (({"hidden_size": 32}, "in the file and"), ({"num_layers": 2}, "is missing"), ({"num_layers": 0}, "not in the network"),
                         ({"num_heads": 4}, "2 attention heads")):
        with pytest.raises(UserError, match=said) as refusal: load_pretrained(folder, replace(SMALL, **change))
        assert len(str(refusal.value).splitlines()) == 1
    with pytest.raises(UserError): load_reward(folder, SMALL)                # without a trained head it is no judge
    decoder = {key: value for key, value in network.state_dict().items() if not key.startswith("videomae.")}
    save_tensors(tmp_path / "decoder/model.safetensors", decoder)
    with pytest.raises(UserError, match="is missing"): load_pretrained(tmp_path / "decoder", SMALL)
    (tmp_path / "decoder/config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"): load_pretrained(tmp_path / "decoder", SMALL)
    with pytest.raises(UserError, match="not found|no files"): start_of(tmp_path / "none", load_preset("tiny_lift"))


class Attack:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def test_a_pickled_network_is_read_and_never_run(pretrained, tmp_path):
    (tmp_path / "safe").mkdir()
    torch.save(pretrained[1].state_dict(), tmp_path / "safe/pytorch_model.bin")
    loaded, expected = load_pretrained(tmp_path / "safe", SMALL), load_pretrained(pretrained[0], SMALL)
    assert all(torch.equal(value, expected.videomae.state_dict()[key]) for key, value in loaded.videomae.state_dict().items())
    (tmp_path / "bad").mkdir()
    torch.save({"a": Attack(tmp_path / "executed")}, tmp_path / "bad/pytorch_model.bin")
    with pytest.raises(UserError, match="more than tensors"): load_pretrained(tmp_path / "bad", SMALL)
    assert not (tmp_path / "executed").exists()


def test_the_command_starts_from_a_pretrained_network(pretrained, tmp_path, capsys):
    write_shard(tmp_path / "data/a.tar", trials(size=16))
    shape = json.loads((pretrained[0] / "config.json").read_text())
    argv = ["--data", str(tmp_path / "data"), "--start", str(pretrained[0]), "--output", str(tmp_path / "run"), "--reward_training.steps", "2",
            "--reward.num_layers", str(shape["num_hidden_layers"]), "--reward.num_heads", str(shape["num_attention_heads"])]
    argv += [f"--reward.{name}={shape[name]}" for name in ("image_size", "patch_size", "hidden_size", "intermediate_size")]
    assert main(argv) == 0 and "f1" in capsys.readouterr().out
    near, encoder = load_reward(tmp_path / "run/reward.safetensors").videomae, pretrained[1].videomae     # two steps do not go far
    distance = lambda other: (other.encoder.layer[0].output.dense.weight - encoder.encoder.layer[0].output.dense.weight).abs().mean()
    assert distance(near) < 0.05 < 0.5 < distance(small_classifier().videomae)
    assert main([*argv, "--reward_training.steps", "0", "--output", str(tmp_path / "c")]) == 2          # the tiny presets' default
    assert "no head that tells success" in capsys.readouterr().err and not (tmp_path / "c").exists()
    assert main([*argv[:-1], "--reward.intermediate_size=64", "--output", str(tmp_path / "b")]) == 2
    assert "in the file and" in capsys.readouterr().err


def test_command(tmp_path, capsys):
    write_shard(tmp_path / "data/a.tar", trials(size=16))
    argv = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "run"), "--reward.image_size", "16",
            "--reward.patch_size", "8", "--reward.num_layers", "1", "--reward_pretraining.steps", "2"]
    assert main(argv) == 0 and "f1" in capsys.readouterr().out
    assert load_reward(tmp_path / "run/reward.safetensors").config.num_layers == 1
    assert read_metrics(tmp_path / "run")[-1]["step"] == 2                         # without --start as many as in pre-training
    assert main(argv) == 2 and "--resume" in capsys.readouterr().err
    assert main(["--data", str(tmp_path / "data"), "--output", str(tmp_path / "b"), "--vae", str(tmp_path / "no.safetensors")]) == 2


def test_the_command_shows_the_judge_what_the_vae_makes_of_the_frames(tmp_path, monkeypatch):
    from test_vae import small_vae
    from wmpo_nb.vae import reconstruct_batch, save_vae
    batch, vae, seen, vae_file = trials(), small_vae(), [], tmp_path / "vae.safetensors"
    write_shard(tmp_path / "data/a.tar", batch)
    save_vae(vae_file, vae)
    def train(classifier, shown, *arguments, **options):
        seen.append(shown.frames[:])
        return train_reward(classifier, shown, *arguments, **options)
    monkeypatch.setattr("wmpo_nb.reward.train_reward", train)
    assert main(["--data", str(tmp_path / "data"), "--output", str(tmp_path / "run"), "--vae", str(vae_file), "--reward.image_size", "16",
                 "--reward.patch_size", "8", "--reward.num_layers", "1", "--reward_pretraining.steps", "1"]) == 0
    assert torch.equal(seen[0], reconstruct_batch(vae, batch).frames) and not torch.equal(seen[0], batch.frames)


@pytest.mark.parametrize("successes", [0, 1, 2, 10])
def test_a_threshold_is_never_set_without_a_success_if_there_are_two(successes):
    success = torch.arange(20) < successes
    for seed in range(40):
        training, held_out = split_trajectories(success, 0.1, torch.Generator().manual_seed(seed))
        assert len(held_out) == 2 and sorted(training.tolist() + held_out.tolist()) == list(range(20))
        assert successes < 2 or success[held_out].any() and success[training].any()


def test_the_rule_can_be_set_and_the_network_cannot(tmp_path):
    path, preset = tmp_path / "reward.safetensors", load_preset("tiny_lift")
    classifier = SuccessClassifier(replace(preset.reward, threshold=0.82))
    save_reward(path, classifier)
    assert load_reward(path, preset=preset).config == classifier.config
    told = load_preset("tiny_lift", {"reward.threshold": "0.9", "reward.last_clip_counts": "false"})
    assert load_reward(path, preset=told).config == replace(classifier.config, threshold=0.9, last_clip_counts=False)
    usual = load_preset("tiny_lift", {"reward.threshold": "0.5"})                   # the preset's own value, and somebody asked for it
    assert load_reward(path, preset=usual).config.threshold == 0.5
    with pytest.raises(UserError, match="without --reward.num_layers 3"): load_reward(path, preset=load_preset("tiny_lift", {"reward.num_layers": "3"}))


def test_without_mining_each_process_prepares_its_own_clips():
    batch, classifier, config = trials(), small_classifier(), replace(TRAINING, mining=1, jitter=0.1)
    pools = clip_pools(batch, config, classifier.config.clip_length)
    clips, labels = mined_clips(classifier, batch, pools, config, torch.Generator().manual_seed(0))
    assert clips.dtype == torch.uint8 and len(clips) == len(labels) == config.batch_size // 2 * 2
    plain, _ = sample_clips(batch, pools, len(clips) // 2, len(clips) // 2, generator := torch.Generator().manual_seed(0))
    assert torch.equal(clips, augment(plain, config, generator)) and not torch.equal(clips, plain)
    whole, pixels = clip_terms(classifier, clips, labels)["loss"], clip_terms(classifier, preprocess(clips, classifier.config), labels)["loss"]
    parts = [clip_terms(classifier, clips[i:i + 1], labels[i:i + 1])["loss"] for i in range(len(clips))]
    torch.testing.assert_close(whole, pixels), torch.testing.assert_close(whole, torch.stack(parts).mean())


def test_trials_too_short_for_a_clip_are_refused_before_training():
    batch = trials(steps=8)
    with pytest.raises(UserError, match="have 9 frames, and the first clip ends after 12"):
        train_reward(small_classifier(first_clip_end=12), batch, TRAINING)
