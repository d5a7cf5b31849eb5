"Properties of the GRPO functions, with numbers worked out by hand."
import math

import pytest
import torch

from wmpo_nb.grpo import (action_mask, advantages, keep_groups, policy_loss, success_rewards, token_losses,
                          token_weights, weighted_policy_loss)


def test_advantages_of_one_success_in_four():
    # mean 1/4, centred (3/4, -1/4, -1/4, -1/4), unbiased variance (9/16 + 3/16) / 3 = 1/4, deviation 1/2
    a = advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4)
    torch.testing.assert_close(a, torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-5, rtol=0)


def test_advantages_of_the_papers_algorithm_one():
    # population variance 3/16
    a = advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, unbiased=False, epsilon=0.0)
    torch.testing.assert_close(a, torch.tensor([0.75, -0.25, -0.25, -0.25]) / math.sqrt(3 / 16))


@pytest.mark.parametrize("unbiased, epsilon", [(True, 1e-6), (False, 0.0)])
@pytest.mark.parametrize("reward", [0.0, 1.0, 5.0, 0.1])
def test_equal_siblings_have_no_advantage(reward, unbiased, epsilon):
    # 0.1 has no exact float32: its group mean must not leave a rounding error divided by a tiny deviation
    a = advantages(torch.full((16,), reward), 8, unbiased, epsilon)
    assert torch.isfinite(a).all() and a.abs().max() < 0.1


def test_groups_do_not_mix_and_scale_cancels():
    rewards = success_rewards(torch.tensor([1, 0, 0, 0, 1, 1, 1, 0]).bool())
    both = advantages(rewards, 4)
    torch.testing.assert_close(both, torch.cat([advantages(rewards[:4], 4), advantages(rewards[4:], 4)]))
    torch.testing.assert_close(advantages(success_rewards(rewards.bool(), 5.0), 4), both, atol=1e-4, rtol=0)
    torch.testing.assert_close(both.view(2, 4).sum(1), torch.zeros(2), atol=1e-6, rtol=0)


def test_a_single_member_keeps_its_reward():
    torch.testing.assert_close(advantages(torch.tensor([5.0, 0.0, 5.0]), 1), torch.tensor([5.0, 0.0, 5.0]),
                               atol=1e-4, rtol=0)


def test_incomplete_groups_are_refused():
    with pytest.raises(ValueError, match="groups of 4"): advantages(torch.zeros(6), 4)


def test_filter_drops_only_groups_that_all_agree():
    success = torch.arange(8) < torch.arange(9)[:, None]
    assert keep_groups(success).tolist() == [False] + [True] * 7 + [False]
    assert keep_groups(success, 0.25, 0.75).tolist() == [False] * 2 + [True] * 5 + [False] * 2, "bounds are inclusive"


def test_mask_follows_finish_step_in_flat_order():
    assert action_mask(torch.tensor([107]), 32).sum() == 749       # first possible success upstream: clip end 108
    mask = action_mask(torch.tensor([0, 1, 9, 24, 99]), 3)
    assert mask.shape == (5, 3, 56)
    assert mask.sum((1, 2)).tolist() == [0, 7, 63, 168, 168]
    for row, finish in zip(mask.flatten(1), [0, 1, 9, 24, 24]):
        assert row[:finish * 7].all() and not row[finish * 7:].any()


def test_other_chunk_shapes():
    assert action_mask(torch.tensor([3]), 2, chunk=4, dim=2).flatten().tolist() == [True] * 6 + [False] * 10


def test_clip_is_asymmetric():
    ratio = torch.tensor([0.5, 0.79, 0.9, 1.27, 1.5])
    gain, clipped = token_losses(ratio.log(), torch.zeros(5), torch.tensor(1.0), 0.2, 0.28)
    torch.testing.assert_close(gain, -torch.tensor([0.5, 0.79, 0.9, 1.27, 1.28]))
    assert clipped.tolist() == [False, False, False, False, True]
    cost, clipped = token_losses(ratio.log(), torch.zeros(5), torch.tensor(-1.0), 0.2, 0.28)
    torch.testing.assert_close(cost, torch.tensor([0.8, 0.8, 0.9, 1.27, 1.5]))
    assert clipped.tolist() == [True, True, False, False, False]


def example(seed=0, trajectories=6, n_chunks=3):
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(trajectories, n_chunks, 56, generator=generator, dtype=torch.float64) - 5
    new = old + 0.3 * torch.randn(old.shape, generator=generator, dtype=torch.float64)
    a = torch.randn(trajectories, generator=generator, dtype=torch.float64)
    mask = action_mask(torch.randint(0, 8 * n_chunks + 1, (trajectories,), generator=generator), n_chunks)
    mask[0] = False                                                # a trajectory without any valid token
    return old, new, a, mask


def test_loss_is_mean_over_trajectories_of_masked_means():
    old, new, a, mask = example()
    expected = []
    for i in range(len(a)):
        losses = []
        for o, n in zip(old[i][mask[i]], new[i][mask[i]]):
            ratio = math.exp(n - o)
            losses.append(max(-a[i] * ratio, -a[i] * min(max(ratio, 0.8), 1.28)))
        expected.append(sum(losses) / len(losses) if losses else 0.0)
    loss, _ = policy_loss(new, old, a, mask)
    assert float(loss) == pytest.approx(float(sum(expected) / len(a)), abs=1e-6)


def test_any_cut_into_slices_gives_the_same_gradient_and_statistics():
    old, new, a, mask = example()
    whole = new.clone().requires_grad_()
    loss, stats = policy_loss(whole, old, a, mask)
    loss.backward()
    parts, weights, total, kl = new.clone().requires_grad_(), token_weights(mask), 0.0, 0.0
    for rows in torch.randperm(6).split(4):
        for chunks in torch.arange(3).split(2):
            index = (rows[:, None], chunks)
            part, part_stats = weighted_policy_loss(parts[index], old[index], a[rows], weights[index])
            part.backward()
            total, kl = total + part.detach(), kl + part_stats["approx_kl"]
    torch.testing.assert_close(total, loss.detach())
    torch.testing.assert_close(kl, stats["approx_kl"])
    torch.testing.assert_close(parts.grad, whole.grad)
    assert (whole.grad[~mask] == 0).all()


def test_nothing_valid_is_zero_not_nan():
    old, new, a, mask = example()
    loss, stats = policy_loss(new, old, a, torch.zeros_like(mask))
    assert float(loss) == 0 and all(float(v) == 0 for v in stats.values())
