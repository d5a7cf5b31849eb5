"The success classifier against numbers computed by the published implementation and the transformers version it used."
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from wmpo_nb.presets import RewardConfig, RewardTrainConfig, load_preset
from wmpo_nb.reward import SuccessClassifier, clip_ends, clip_pools, decide, load_reward, preprocess, score_clips
from wmpo_nb.trajectory import TrajectoryBatch

GOLDENS = Path(os.environ.get("WMPO_GOLDENS", Path(__file__).parent / "goldens"))


def golden(name):
    return json.loads((GOLDENS / f"{name}.json").read_text()), load_file(GOLDENS / f"{name}.safetensors")


VIDEOMAE, WEIGHTS = golden("videomae_classifier_tiny")
PREPROCESS, IMAGES = golden("videomae_preprocess")
DECISION, VERDICTS = golden("success_decision")
WINDOWS, CLIPS = golden("success_classifier_windows")


def golden_classifier(variant):
    config = VIDEOMAE["config"]
    classifier = SuccessClassifier(RewardConfig(
        clip_length=config["num_frames"], image_size=config["image_size"], patch_size=config["patch_size"],
        hidden_size=config["hidden_size"], num_layers=config["num_hidden_layers"], num_heads=config["num_attention_heads"],
        intermediate_size=config["intermediate_size"], use_mean_pooling=variant == "meanpool"))
    prefix = f"{variant}.state_dict."
    weights = {key.removeprefix(prefix): value for key, value in WEIGHTS.items() if key.startswith(prefix)}
    classifier.load_state_dict(weights, strict=True)
    return classifier.eval(), weights


def close(value, reference):
    assert value.shape == reference.shape
    assert (value - reference).abs().max() <= 1e-4 * max(1.0, reference.abs().max().item())


@pytest.mark.parametrize("variant", VIDEOMAE["variants"])
def test_logits_and_probability(variant):
    classifier, _ = golden_classifier(variant)
    with torch.no_grad():
        pixels = WEIGHTS[f"{variant}.in.pixel_values"]
        logits = classifier(pixels)
        close(classifier.videomae(pixels).last_hidden_state, WEIGHTS[f"{variant}.mid.last_hidden"])
    close(logits, WEIGHTS[f"{variant}.out.logits"])
    close(logits[:, 1].sigmoid(), WEIGHTS[f"{variant}.out.sigmoid"][:, 1])


@pytest.mark.parametrize("variant", VIDEOMAE["variants"])
def test_state_dict_is_written_as_it_was_read(variant):
    classifier, weights = golden_classifier(variant)
    own = classifier.state_dict()
    assert own.keys() == weights.keys()
    assert all(torch.equal(own[key], value) for key, value in weights.items())


@pytest.mark.parametrize("variant", VIDEOMAE["variants"])
def test_released_pth_chooses_the_pooling_by_its_keys(variant, tmp_path):
    classifier, weights = golden_classifier(variant)
    torch.save({"rm_model_state_dict": {f"module.{key}": value for key, value in weights.items()}}, tmp_path / "videomae.pth")
    wrong = RewardConfig(**{**vars(classifier.config), "use_mean_pooling": variant != "meanpool"})
    loaded = load_reward(tmp_path / "videomae.pth", wrong)
    assert loaded.config.use_mean_pooling == (variant == "meanpool")
    with torch.no_grad(): close(loaded(WEIGHTS[f"{variant}.in.pixel_values"]), WEIGHTS[f"{variant}.out.logits"])


@pytest.mark.parametrize("variant,pooled", [("cls", False), ("meanpool", True)])
def test_keys_and_shapes_of_the_real_size(variant, pooled):
    record = json.loads((GOLDENS / f"shapes_videomae_base_{variant}.json").read_text())
    assert record["use_mean_pooling"] == pooled
    config = RewardConfig(**{**vars(load_preset("coffee_128").reward), "use_mean_pooling": pooled})
    with torch.device("meta"): classifier = SuccessClassifier(config)
    assert {key: list(value.shape) for key, value in classifier.state_dict().items()} == record["shapes"]


@pytest.mark.parametrize("processor", [name for name in PREPROCESS["processors"] if f"{name}.square" in IMAGES])
@pytest.mark.parametrize("image", ["square", "nonsquare"])
def test_preprocess(processor, image):
    settings = PREPROCESS["processors"][processor]
    config = RewardConfig(image_size=settings["size"]["shortest_edge"], image_mean=tuple(settings["image_mean"]),
                          image_std=tuple(settings["image_std"]))
    pixels, reference = preprocess(IMAGES[f"in.{image}_u8"][None], config), IMAGES[f"{processor}.{image}"]
    assert pixels.shape == reference.shape
    assert (pixels - reference).abs().max() <= 2e-2          # one grey level of the uint8 resize, at ImageNet's deviation
    assert (pixels - reference).abs().mean() <= 1e-3


def upstream_config(threshold):
    "Upstream's rule: clips may end from frame min_steps + window on, and not count when they end in the very last frame."
    return RewardConfig(clip_length=DECISION["window"], clip_stride=DECISION["stride"], threshold=threshold,
                        first_clip_end=DECISION["min_steps"] + DECISION["window"], last_clip_counts=False)


@pytest.mark.parametrize("case", DECISION["cases"], ids=lambda case: case["tag"])
def test_verdict(case):
    tag, config = case["tag"], upstream_config(case["threshold"])
    probabilities, ends = VERDICTS[f"{tag}.probs"], clip_ends(case["total_frames"], config)
    assert len(ends) == case["clips_per_video"]
    length = torch.full((len(probabilities),), case["total_frames"] - 1)
    success, finish_step = decide(probabilities, ends, length, config)
    assert success.long().tolist() == VERDICTS[f"{tag}.complete"].tolist()
    assert finish_step.tolist() == VERDICTS[f"{tag}.finish_step"].tolist()


def test_which_frames_are_scored():
    for key in (key for key in VERDICTS if key.endswith("frame_ids")):
        frames = VERDICTS[key]
        ends = clip_ends(int(frames.max()) + 1, upstream_config(0.5))
        assert torch.equal(ends[:, None] + torch.arange(-DECISION["window"], 0), frames)


@pytest.mark.parametrize("case", [case for case in WINDOWS["cases"] if case["mode"] == "train"], ids=lambda case: str(case["id"]))
def test_training_windows_of_upstream_are_among_ours(case):
    "Upstream's last clip of a success ends one frame before the success shows: with no margin it is our last negative's successor."
    frames, labels = CLIPS[f"c{case['id']}.frames"], CLIPS[f"c{case['id']}.labels"]
    finish, window = case["finish_step"], frames.shape[1]
    batch = TrajectoryBatch(torch.zeros(1, finish + 1, 1, 1, 3, dtype=torch.uint8), *[torch.zeros(1, finish, 7)] * 3,
                            success=torch.tensor([case["complete"]]), state_id=torch.zeros(1), member=torch.zeros(1),
                            **{name: torch.tensor([finish]) for name in ("finish_step", "length")})
    pools = clip_pools(batch, RewardTrainConfig(margin=1), window)
    ours = {(int(end), int(kind == "positive")) for kind, pairs in pools.items() for end in pairs[:, 1]}
    for clip, label in zip(frames, labels.tolist()):
        end = int(clip[-1]) + 1
        assert ((end + 1 if label else end), label) in ours


def test_scores_are_sigmoids_of_the_success_logit():
    classifier, _ = golden_classifier("cls")
    clips = torch.randint(0, 256, (5, 8, 40, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): expected = classifier(preprocess(clips, classifier.config))[:, 1].sigmoid()
    assert (score_clips(classifier, clips, batch_size=2) - expected).abs().max() < 2e-2      # bfloat16
