"""The policy against reference data of the published implementation (tests/goldens, or the folder in WMPO_GOLDENS).

Configuration, inputs and outputs are read from the files, so any set of the same format can be used."""
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wmpo_nb.policy import (OpenVLAOFT, action_ids, center_crop, detokenize_actions, jpeg, lanczos_resize, sample_tokens,
                            token_log_probs, tokenize_actions)
from wmpo_nb.presets import PolicyConfig, load_preset
from wmpo_nb.trajectory import ActionStats

GOLDENS = Path(os.environ.get("WMPO_GOLDENS", Path(__file__).parent / "goldens"))


def golden(name):
    "(JSON record, tensors) of one golden; skipped where the folder does not hold it."
    if not (GOLDENS / f"{name}.json").exists(): pytest.skip(f"no golden {name} in {GOLDENS}")
    tensors = GOLDENS / f"{name}.safetensors"
    return json.loads((GOLDENS / f"{name}.json").read_text()), load_file(tensors) if tensors.exists() else {}


def close(actual, expected, tolerance=1e-4):
    "Maximum error relative to the largest reference value, never below 1."
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def stats_of(action):
    return ActionStats(*(torch.tensor(action[q], dtype=torch.float64) for q in ("q01", "q99")), torch.tensor(action["mask"]))


UPSTREAM = PolicyConfig(vocab_size=32064)              # only the vocabulary matters to tokens


# --- the network -------------------------------------------------------------------------------------------------

def config_of(record):
    "The configuration a golden's JSON describes."
    vision, llm = record["config"]["vision"], record["config"]["llm"]
    towers = [(vision[name], style) for name, style in (("dino", "dinov2"), ("siglip", "siglip")) if name in vision]
    assert llm["num_attention_heads"] == llm["num_key_value_heads"] and llm["rms_norm_eps"] == 1e-6
    return PolicyConfig(
        image_size=vision["image_size"], patch_size=int(re.search(r"patch (\d+)", vision["featurizer"])[1]),
        vision_dims=tuple(t["embed_dim"] for t, _ in towers), vision_depths=tuple(t["depth"] for t, _ in towers),
        vision_heads=tuple(t["heads"] for t, _ in towers), vision_styles=tuple(s for _, s in towers),
        hidden_size=llm["hidden_size"], intermediate_size=llm["intermediate_size"], num_layers=llm["num_hidden_layers"],
        num_heads=llm["num_attention_heads"], vocab_size=llm["vocab_size"],
        padded_vocab=llm["vocab_size"] - record["config"]["effective_vocab_size"])


@pytest.fixture(scope="module")
def tiny():
    record, tensors = golden("openvla_oft_policy_tiny")
    policy = OpenVLAOFT(config_of(record), stats_of(record["action_stats"]), "golden").eval()
    weights = {name.removeprefix("state_dict."): t for name, t in tensors.items() if name.startswith("state_dict.")}
    policy.load_state_dict(weights, strict=True)
    return record, tensors, policy


@torch.no_grad()
def test_every_key_is_upstreams(tiny):
    record, tensors, policy = tiny
    assert set(policy.state_dict()) == {n.removeprefix("state_dict.") for n in tensors if n.startswith("state_dict.")}
    first, last = record["config"]["action_token_ids"]
    assert (action_ids(policy.config).start, action_ids(policy.config).stop - 1) == (first, last)


@torch.no_grad()
def test_features_and_projection(tiny):
    _, tensors, policy = tiny
    pixels = tensors["in.pixel_values"]
    close(policy.vision_backbone.featurizer(pixels[:, :3]), tensors["mid.dino_features"])
    close(policy.vision_backbone.fused_featurizer(pixels[:, 3:]), tensors["mid.siglip_features"])
    features = policy.vision_backbone(pixels)
    close(features, tensors["mid.vision_features"])
    close(policy.projector(features), tensors["mid.projected"])


@torch.no_grad()
def test_training_forward(tiny):
    _, tensors, policy = tiny
    arguments = [tensors[f"in.{name}"] for name in ("pixel_values", "input_ids", "attention_mask")]
    sequence, mask, _ = policy.embed(*arguments)
    close(sequence, tensors["mid.forward.inputs_embeds"])
    assert mask.all()
    close(policy.language_model.model(sequence), tensors["mid.forward.last_hidden"])
    close(policy(*arguments), tensors["out.forward.logits"])


@torch.no_grad()
def test_a_causal_model_is_something_else(tiny):
    _, tensors, policy = tiny
    sequence, _, _ = policy.embed(*(tensors[f"in.{name}"] for name in ("pixel_values", "input_ids", "attention_mask")))
    length = sequence.shape[1]
    causal = policy.language_model.model(sequence, torch.ones(length, length).tril().bool())
    close(causal, tensors["contrast.WRONG_causal_last_hidden"])
    assert (causal - tensors["mid.forward.last_hidden"]).abs().max() > 0.1


@torch.no_grad()
def test_left_padded_prompts(tiny):
    _, tensors, policy = tiny
    sequence, mask, _ = policy.embed(tensors["in.pixel_values"], tensors["in.padded.input_ids"], tensors["in.padded.attention_mask"])
    assert torch.equal(mask.long(), tensors["mid.padded.multimodal_attention_mask"])
    close(sequence[mask], tensors["mid.padded.inputs_embeds"][mask])
    hidden = policy.language_model.model(sequence, mask[:, None, None])
    close(hidden[mask], tensors["mid.padded.last_hidden"][mask])


@torch.no_grad()
@pytest.mark.parametrize("case, prefix", [("equal", "in"), ("padded", "in.padded")])
def test_greedy_actions(tiny, case, prefix):
    _, tensors, policy = tiny
    logits = policy(tensors["in.pixel_values"], tensors[f"{prefix}.input_ids"], tensors[f"{prefix}.attention_mask"])
    tokens = sample_tokens(logits[..., action_ids(policy.config)], None, 0, policy.config)
    assert torch.equal(tokens, tensors[f"out.generate.{case}.response_ids"])
    normalized = detokenize_actions(tokens, policy.config)
    close(normalized.flatten(0, 1), tensors[f"out.generate.{case}.normalized_actions_f64"], 1e-12)
    close(policy.stats.unnormalize(normalized), tensors[f"out.generate.{case}.actions_f64"], 1e-6)


def test_paper_size_has_exactly_upstreams_keys_and_shapes():
    record, _ = golden("shapes_openvla_oft_7b")
    with torch.device("meta"):
        policy = OpenVLAOFT(load_preset("coffee_128").policy, None, "coffee")
    shapes = {name: list(t.shape) for name, t in policy.state_dict().items()}
    assert shapes == {name: list(shape) for name, shape in record["shapes"].items()}
    assert sum(p.numel() for p in policy.parameters()) == record["total_numel"]


# --- tokens and log-probabilities --------------------------------------------------------------------------------

def test_action_tokens():
    _, t = golden("actions_and_logprobs")
    assert torch.equal(tokenize_actions(t["tok.edge_actions_f64"][:, None], UPSTREAM), t["tok.edge_token_ids"])
    assert torch.equal(tokenize_actions(t["tok.random_actions_f64"], UPSTREAM), t["tok.random_token_ids"].flatten())
    ids = t["tok.decode_ids"]
    ids = torch.cat([ids, ids.new_zeros(-len(ids) % 7)])       # whole actions
    decoded = detokenize_actions(ids, UPSTREAM).flatten()[:len(t["tok.decode_ids"])]
    close(decoded, t["tok.decode_actions_f64"], 1e-12)


def test_unnormalisation():
    record, t = golden("actions_and_logprobs")
    for key, stats in record["norm_stats"].items():
        close(stats_of(stats["action"]).unnormalize(t["unnorm.in_f64"]), t[f"unnorm.{key}.out_f64"], 1e-6)


def test_greedy_looks_only_at_action_columns():
    _, t = golden("actions_and_logprobs")
    first_column = 31700                                       # of the stored slice, see the golden's note
    ids = action_ids(UPSTREAM)
    logits = t["greedy.logits_at_action_positions_cols31700_32063"][..., ids.start - first_column:ids.stop - first_column]
    tokens = sample_tokens(logits, None, 0, UPSTREAM)
    assert torch.equal(tokens, t["greedy.response_ids"])
    close(detokenize_actions(tokens, UPSTREAM).flatten(0, 1), t["greedy.normalized_actions_f64"], 1e-12)


def test_sampling_probabilities_and_the_actions_of_samples():
    _, t = golden("actions_and_logprobs")
    first_column = 31700
    ids = action_ids(UPSTREAM)
    logits = t["greedy.logits_at_action_positions_cols31700_32063"][..., ids.start - first_column:ids.stop - first_column]
    for name in [n for n in t if n.startswith("sample.") and n.endswith(".probs256")]:
        temperature, expected = float(re.search(r"T([\d.]+)\.", name)[1]), t[name]
        tokens = t[name.replace("probs256", "response_ids_cpu_seed20260")]
        log_probs, _ = token_log_probs(logits, tokens, temperature, UPSTREAM)
        stored = expected.shape[1]
        chosen = expected.gather(-1, (tokens[:, :stored] - ids.start)[..., None])[..., 0]
        close(log_probs[:, :stored].exp(), chosen, 1e-5)
        actions = t[name.replace("probs256", "normalized_actions_f64")]
        close(detokenize_actions(tokens, UPSTREAM).flatten(0, 1), actions, 1e-12)


def test_log_probs_and_entropy():
    record, t = golden("actions_and_logprobs")
    logits = t["lp.logits"][..., -320:-64]                     # the action columns, by the golden's rule
    chunks = record["logprob"]["traj_chunks"]
    logits = logits.unflatten(0, (-1, chunks))
    valid = torch.arange(t["lp.T1.0.log_probs"].shape[1]) < t["lp.finish_step"][:, None] * record["logprob"]["action_dim"]
    for name in [n for n in t if re.fullmatch(r"lp\.T[\d.]+\.log_probs", n)]:
        temperature = float(re.search(r"T([\d.]+)\.", name)[1])
        log_probs, entropy = token_log_probs(logits, t["lp.responses"], temperature, UPSTREAM)
        close(log_probs.flatten(1)[valid], t[name][valid], 1e-5)
        close(entropy.flatten(1)[valid], t[name.replace("log_probs", "entropy")][valid], 1e-5)
        assert (t[name][~valid] == record["logprob"]["log_prob_of_masked_steps"]).all()


def test_log_probs_of_the_update():
    _, t = golden("actions_and_logprobs")
    for name in [n for n in t if re.fullmatch(r"lp\.update_T[\d.]+\.traj\d+\.log_probs_nomask", n)]:
        temperature, row = float(re.search(r"T([\d.]+)\.", name)[1]), int(re.search(r"traj(\d+)", name)[1])
        chunks = t["lp.responses"].shape[1]
        logits = t["lp.logits"][row * chunks:(row + 1) * chunks, :, -320:-64]
        log_probs, entropy = token_log_probs(logits, t["lp.responses"][row], temperature, UPSTREAM)
        close(log_probs.flatten()[None], t[name], 1e-5)
        close(entropy.flatten()[None], t[name.replace("log_probs", "entropy")], 1e-5)


# --- images ------------------------------------------------------------------------------------------------------

def cases(tensors): return sorted({name.split(".")[1] for name in tensors if name.startswith("in.")})


def test_jpeg():
    _, t = golden("policy_image_preprocess")
    for case in cases(t):
        original, reference = t[f"in.{case}"].int(), t[f"mid.{case}.after_jpeg"].int()
        difference = (jpeg(t[f"in.{case}"][None])[0].int() - reference).abs().float().mean()
        # PIL's decoder transforms exactly, TensorFlow's fast and roughly: 1.2 grey levels on these noisy images,
        # where another quality or chroma sampling would give more than 2
        assert difference <= 1.5 and difference < 0.4 * (original - reference).abs().float().mean()


def test_resize_and_crop_from_the_same_jpeg():
    _, t = golden("policy_image_preprocess")
    for case in cases(t):
        resized = lanczos_resize(t[f"mid.{case}.after_jpeg"][None], t[f"out.{case}.resized224"].shape[0])
        assert (resized[0].int() - t[f"out.{case}.resized224"].int()).abs().max() <= 1
        cropped = center_crop(t[f"out.{case}.resized224"][None], t[f"out.{case}.center_cropped"].shape[0], 0.9)
        assert (cropped[0].int() - t[f"out.{case}.center_cropped"].int()).abs().max() <= 1
