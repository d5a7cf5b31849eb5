"The published implementation's numbers. Any golden set of the same format passes: $WMPO_GOLDENS, else tests/goldens."
import json
import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wmpo_nb.grpo import action_mask, advantages, keep_groups, policy_loss, success_rewards, weighted_policy_loss, token_weights

FOLDER = Path(os.environ.get("WMPO_GOLDENS") or Path(__file__).parent / "goldens")
DESCRIPTION = json.loads((FOLDER / "grpo.json").read_text())


@pytest.fixture(scope="module")
def golden(): return load_file(FOLDER / "grpo.safetensors")


def close(actual, expected, tolerance=1e-5):
    expected = torch.as_tensor(expected).to(actual.dtype)
    torch.testing.assert_close(actual, expected, atol=tolerance * max(1.0, float(expected.abs().max())), rtol=0)


def by_group(names, rewards, **options):
    "Advantages when siblings are not side by side and groups differ in size."
    members = defaultdict(list)
    for i, name in enumerate(names): members[name].append(i)
    out = torch.empty_like(rewards)
    for index in members.values(): out[index] = advantages(rewards[index], len(index), **options)
    return out


@pytest.mark.parametrize("name", DESCRIPTION.get("cases", {}))
def test_rewards_and_advantages(golden, name):
    case = DESCRIPTION["cases"][name]
    success, finish = golden[f"{name}.complete"].bool(), golden[f"{name}.finish_step"]
    scores = golden[f"{name}.token_level_scores"]
    mask = action_mask(finish, case["traj_chunks"], dim=7, chunk=scores.shape[1] // case["traj_chunks"] // 7).flatten(1)
    rewards = success_rewards(success, case["reward_coef"])
    close(rewards, scores.sum(1))
    assert float(success.float().mean()) == pytest.approx(case["metrics"]["verifier"], abs=1e-6)
    assert float(rewards.mean()) == pytest.approx(case["metrics"]["reward_all"], abs=1e-5)
    if case.get("kl_coef"):                # upstream can also subtract a per-token KL; WMPO's coefficient is 0
        divergence = (golden[f"{name}.old_log_probs"] - golden[f"{name}.ref_log_prob"]) * mask
        close(scores - case["kl_coef"] * divergence, golden[f"{name}.token_level_rewards"])
        rewards = rewards - case["kl_coef"] * divergence.sum(1)
    expected = golden[f"{name}.advantages"]
    close(by_group(case["groups"], rewards)[:, None] * mask, expected)
    assert (mask | (expected == 0)).all()


def test_advantages_of_unequal_groups(golden):
    a = by_group(DESCRIPTION["advraw_groups"], golden["advraw.rewards"].sum(1))
    close(a[:, None] * golden["advraw.mask"], golden["advraw.out"])


POLICY_LOSS_CASES = sorted({key.split(".")[1] for key in DESCRIPTION.get("tensors", {}) if key.startswith("pl.")})


@pytest.mark.parametrize("name", POLICY_LOSS_CASES)
def test_clipped_loss(golden, name):
    # upstream averages over all tokens of one call, and calls it with one trajectory: so these rows are one trajectory
    old, new, adv, mask = (golden[f"pl.{name}.{k}"].flatten()[None] for k in ("old", "new", "adv", "mask"))
    clip = DESCRIPTION["clip"]
    loss, stats = policy_loss(new, old, adv, mask, clip["clip_ratio_low"], clip["clip_ratio_high"])
    close(loss, golden[f"pl.{name}.pg_loss"])
    close(stats["clip_fraction"], golden[f"pl.{name}.clipfrac"])
    close(stats["approx_kl"], golden[f"pl.{name}.ppo_kl"])


@pytest.mark.parametrize("case", DESCRIPTION.get("filter", []), ids=lambda c: f"n{c['n_samples']}")
def test_filter(golden, case):
    key = f"filter.n{case['n_samples']}"
    success = golden[f"{key}.acc"].view(-1, case["n_samples"]).bool()
    rows = torch.arange(success.numel()).view(success.shape)[keep_groups(success, case["lower"], case["upper"])]
    assert torch.equal(rows.flatten(), golden[f"{key}.kept_rows"])
    kept = golden[f"{key}.after_truncate_to_2_groups"]
    assert torch.equal(rows[:2].flatten(), kept), "surplus groups: upstream keeps the first ones"


def logits_to_log_probs(logits, responses, temperature):
    "Restricted to the 256 action ids: the last 320 to the last 64 columns, ids 31744 to 31999."
    log_probs = (logits[..., -320:-64] / temperature).log_softmax(-1)
    return log_probs.gather(-1, (responses.flatten(0, 1) - 31744)[..., None])[..., 0].view(responses.shape)


@pytest.mark.parametrize("name", [k for k in DESCRIPTION if k.startswith("up_")])
def test_full_update(golden, name):
    case, clip = DESCRIPTION[name], DESCRIPTION["clip"]
    responses, finish = golden["up.responses"], golden["up.finish_step"]
    old, adv = (golden[f"up.{k}"].view(responses.shape) for k in ("old_log_probs", "advantages"))
    mask = action_mask(finish, responses.shape[1])
    expected = golden[f"up.{name[3:]}.grad_logits_cols"]
    size, slices = case["ppo_mini_batch_size"], case["traj_mini_batch_size"]
    losses = []
    for step, rows in enumerate(torch.arange(len(finish)).split(size)):
        logits = golden["up.logits"].clone().requires_grad_()
        log_probs = logits_to_log_probs(logits, responses, case["temperature"])
        weights = token_weights(mask[rows])
        for w, row in zip(weights, rows):                           # one trajectory and a few chunks at a time
            parts = [weighted_policy_loss(log_probs[row, c][None], old[row, c][None], adv[row, c][None], w[c][None],
                                          clip["clip_ratio_low"], clip["clip_ratio_high"])
                     for c in torch.arange(responses.shape[1]).split(slices)]
            loss = sum(p for p, _ in parts)
            loss.backward(retain_graph=True)
            losses.append((size * loss.detach(), *(size * sum(s[k] for _, s in parts) for k in ("clip_fraction", "approx_kl"))))
        shown = expected.shape[1]
        torch.testing.assert_close(logits.grad[:shown], expected[step], atol=1e-8, rtol=1e-4)
        assert float(logits.grad.norm()) == pytest.approx(case["grad_l2_all_rows"][step], rel=1e-4)
        assert float(logits.grad.norm()) == pytest.approx(case["metrics"]["actor/grad_norm"][step], rel=1e-4)
    for column, metric in enumerate(("pg_loss", "pg_clipfrac", "ppo_kl")):
        close(torch.stack([row[column] for row in losses]), case["metrics"][f"actor/{metric}"])
