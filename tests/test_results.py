"Tables from outcomes: pairs are pairs, seeds are pooled only where both sides have them, and what is not significant is said."
import base64
import json
import math
from pathlib import Path

import pytest
import torch

from wmpo_nb.evaluation import (Evaluation, calibration, chunk_psnr, departures, spearman, ssim, ssim_by_frame, verdict_flips, wilson)
from wmpo_nb.presets import UserError
from wmpo_nb.results import (_calibration_points, _in_order, PAPER_TABLE1, best_baseline, checkpoint_correlation, compare, disruptions_figure, disruptions_markdown, gained_comparisons,
                             gained_groups, gained_markdown, holm, lifelong_comparisons, lifelong_figure, noise_figure, noise_markdown, outcome, page_markdown, paper_table1,
                             pooled_rate, read_result, recoveries_markdown, relative_steps, seeds_lines, select, table1_comparisons, table1_rows, truth_figure, truth_markdown, truth_row,
                             variants_text, verdicts, without_covered, write_pages)
from wmpo_nb.trajectory import TrajectoryBatch


def cell(method, success, seed=0, P=128, steps=20.0, start=0, **more):
    found = {"states": [start, start + len(success) - 1], "success": success, "mean_steps": steps}
    return {"experiment": "table1", "preset": "tiny_lift", "P": None if method == "base" else P, "seed": seed, "method": method,
            "outcome": found, "ledger": {"real_trajectories": 0 if method == "base" else P, "imagined_frames": 7}} | more


CELLS = [cell("base", "1100" * 16, s) for s in (0, 1)] + [cell("grpo", "1110" * 16, s) for s in (0, 1)] \
    + [cell("dpo", "1100" * 16, s) for s in (0, 1)] + [cell("wmpo", "1111" * 16, 0, steps=18.0)]


def test_outcome_keeps_order_and_length():
    found = outcome(Evaluation(torch.arange(3) + 7, torch.tensor([True, False, True]), torch.tensor([10, 32, 13])))
    assert found == {"states": [7, 9], "success": "101", "mean_steps": 11.5}
    assert outcome(Evaluation(torch.arange(2), torch.zeros(2, dtype=torch.bool), torch.ones(2)))["mean_steps"] is None


def test_only_common_seeds_are_compared():
    found = compare(select(CELLS, method="base"), select(CELLS, method="wmpo"))
    assert found["seeds"] == [0] and found["n"] == 64
    assert found["difference"][0] == pytest.approx(0.5) and found["p"] == pytest.approx(2 ** -31)
    assert compare({}, select(CELLS, method="wmpo")) is None


def test_other_states_are_no_pairs():
    with pytest.raises(UserError, match="not tried on the same states"):
        compare(select(CELLS, method="base"), {0: cell("wmpo", "1111" * 16, start=5)})


def test_a_seed_may_count_once():
    with pytest.raises(UserError, match="same seed"): select([*CELLS, cell("wmpo", "0000")], method="wmpo")


def test_pooling_lengths_and_the_best_baseline():
    assert pooled_rate(select(CELLS, method="grpo")) == (96, 128)
    assert best_baseline(CELLS, "tiny_lift", 128) == "grpo" and best_baseline(CELLS, "tiny_stack", 128) is None
    assert relative_steps(select(CELLS, method="base"), select(CELLS, method="wmpo")) == pytest.approx(90.0)
    rows = {row[0]: row for row in table1_rows(CELLS, "tiny_lift", 128)}
    assert list(rows) == ["base policy", "GRPO, online (best baseline)", "DPO", "WMPO"]
    assert rows["WMPO"][1].startswith("100.0 % (64/64") and "+25.0" in rows["WMPO"][4] and rows["WMPO"][5] == "90.0 %"
    assert rows["base policy"][6] == "0" and rows["WMPO"][6] == "128"


def test_the_best_baseline_has_the_best_rate_and_costs_are_those_of_one_seed():
    def costs(seed): return {"real_trajectories": 128, "imagined_frames": 1000 * seed, "seconds": {"collect": 900, "evaluate": 900, "agreement": 900, "grpo": 360 + 240 * seed, "selection": 60}}
    cells = CELLS[:4] + [cell("dpo", "1111" * 16)] + [cell("wmpo", "1110" * 16, seed, ledger=costs(seed)) for seed in (0, 1)]
    rows = {row[0]: row for row in table1_rows(cells, "tiny_lift", 128)}
    assert "DPO (best baseline)" in rows and rows["WMPO"][4].startswith("-25.0 (")          # one seed of DPO, two of GRPO: fewer successes in all
    assert rows["WMPO"][6:] == ["128", "500", "9"]


def test_what_was_chosen_is_said():
    cells = [*CELLS[:3], cell("dpo", "1" * 8, 1, variants={"0.01": {}, "chosen": "0.01"}), cell("dpo", "1" * 8, 0, variants={"0.03": {}, "chosen": "0.03"})]
    assert variants_text(cells, "tiny_lift", 128) == "Chosen on selection states: DPO: 0.03, 0.01 (of 0.03, 0.01)."
    assert variants_text(CELLS, "tiny_lift", 128) == ""


def test_figures_do_not_pool_what_differs():
    "Presets and budgets have axes, or curves, of their own."
    both = lambda cells: cells + [c | {"preset": "tiny_stack"} for c in cells] + [c | {"P": 512} for c in cells]
    disrupted = [cell(m, "1100", 0) | {"P": 128, "disruption": d} for m in ("base", "wmpo") for d in ("none", "position")]
    rounds = [cell("wmpo", "1100", 0) | {"P": 128, "round": r} for r in (0, 1)]
    curves = [{"preset": "tiny_lift", "P": 128, "seed": 0, "noise": n, "psnr": [None, 20.0], "ssim": [None, 0.9], "chunk": 1} for n in (0, 50)]
    titles = lambda figure: [ax.get_title() for ax in figure.axes]
    assert [len(titles(make(both(cells)))) for make, cells in ((disruptions_figure, disrupted), (lifelong_figure, rounds), (noise_figure, curves))] == [3, 3, 6]
    assert titles(disruptions_figure(both(disrupted))) == ["tiny_lift, P = 128", "tiny_lift, P = 512", "tiny_stack, P = 128"]


def test_what_is_not_significant_is_said():
    lines = verdicts(table1_comparisons(CELLS))
    assert any("DPO against base |" in line and line.endswith("| not significant |") for line in lines)
    assert any("WMPO against base |" in line and line.endswith("| higher for these policies; one training only |") for line in lines)
    def gains(*points):
        sides = [{seed: cell("wmpo", "1" * (100 + gain) + "0" * (100 - gain), seed) for seed, gain in enumerate(row)} for row in (len(points) * [0], points)]
        return verdicts({"x": compare(*sides)})[2].split(" | ")
    # every one of these is beyond doubt for the policies as trained (McNemar); only the first for the method
    assert gains(31, 40, 26)[-1] == "higher, **significant** |" and gains(31, 40, 26)[3] == "+7.4 to +25.0"       # 15.5, 20 and 13 points; 4.303 * 3.55 / sqrt(3) = 8.8
    assert "these policies; **over trainings not" in gains(50, 5, 30)[-1] and gains(-30, -31, -29)[-1] == "lower, **significant** |"
    assert gains(30, 31)[-1] == "higher for these policies; two trainings only |" and gains(30, 31)[3] == "" and "one training" in gains(30)[-1]
    # 0.04 alone would pass, with three others it does not (Holm)
    assert holm({"a": 0.04}) == {"a"} and holm({"a": 0.04, "b": 0.5}) == set()


def test_holm_relaxes_step_by_step_and_stops_at_the_first_failure():
    assert holm({"c": 0.03, "a": 0.001, "d": 0.6, "b": 0.015}) == {"a", "b"}          # limits: 0.0125, 0.0167, 0.025, 0.05
    assert holm({"a": 0.02, "b": 0.021, "c": 0.04}) == set()


def test_every_comparison_has_its_own_two_sides_and_is_the_later_minus_the_earlier():
    def won(method, k, **more): return cell(method, "1" * k + "0" * (16 - k)) | more
    def gains(comparisons): return [round(16 * found["difference"][0]) for found in comparisons.values()]
    cells = [won("base", 2)] + [won(m, k, P=P) for P, counts in ((128, (4, 5, 9)), (512, (7, 11, 16))) for m, k in zip(("grpo", "dpo", "wmpo"), counts)]
    assert gains(table1_comparisons(cells)) == [2, 3, 7, 5, 4, 5, 9, 14, 9, 5, 3, 6, 7]
    assert gains(gained_comparisons([*cells, won(None, 12, ablation="temperature", variant="1.6")])) == [10, 3]
    rounds = [won("wmpo", k, round=r) for r, k in enumerate((2, 5, 11))] + [won("imitation", k, round=r + 1) for r, k in enumerate((4, 6))]
    assert gains(lifelong_comparisons(rounds)) == [3, 1, 6, 5]
    disrupted = disruptions_markdown([won(m, k, P=128, disruption=d) for m, counts in (("base", (12, 2)), ("wmpo", (14, 8))) for d, k in zip(("none", "position"), counts)])
    assert "none: WMPO against base | +12.5 (" in disrupted and "position: WMPO against base | +37.5 (" in disrupted and "policy against base" not in disrupted


def test_the_papers_numbers_are_shares_of_128():
    "Every entry of Table 1 is k/128 rounded to a tenth, but one (DPO, ThreePieceAssembly, P = 1280), as the field study found."
    off = [(key, r) for key, rates in PAPER_TABLE1.items() for r in rates if abs(round(r * 1.28) / 1.28 - r) > 0.051]
    assert off == [(("dpo", 1280), 26.7)]
    assert "61.7 (53 to 70)" in paper_table1()


def truth(seed, confusion, real, dreamt):
    return {"preset": "tiny_lift", "P": 128, "seed": seed, "setting": "aligned", "confusion": confusion, "real": real, "dreamt": dreamt,
            "psnr": [100.0, 20.0], "flips": {"differ": 1, "n": 8, "share": 0.125, "interval": [0, 1]}}


def test_truth_is_pooled_over_counts():
    row = truth_row({0: truth(0, [[3, 1], [0, 4]], [4, 8], [5, 8]), 1: truth(1, [[1, 3], [2, 2]], [4, 8], [7, 8])})
    assert row[0] == "62.5 %" and row[1].startswith("50.0 % (4/8") and row[2].startswith("25.0 % (2/8")
    assert row[3].startswith("75.0 % (12/16") and row[5].startswith("12.5 % (2/16")


def test_dreams_are_compared_on_the_failures_they_were_shown():
    "Two seeds, one of four failures each is a success in the aligned dream, three in the other."
    how = ["", "lost it", "lost it", "never closed", "never closed"]
    def cell(seed, setting, verdicts): return truth(seed, [[3, 1], [0, 1]], [1, 5], [2, 5]) | {"setting": setting, "verdicts": verdicts, "how": how}
    cells = [cell(s, *c) for s in (0, 1) for c in (("aligned", "11000"), ("not aligned", "11110"))]
    text = truth_markdown(cells)
    assert "| lost it | 50.0 % (2/4" in text and "| never closed | 0.0 % (0/4" in text
    assert "All of them, not aligned against aligned, paired: +50.0 (" in text and ", p = 0.12" in text and "over trainings" not in text
    assert "the trial" not in truth_markdown([{k: v for k, v in c.items() if k != "how"} for c in cells])


def test_recoveries_are_shares_of_failed_grasps():
    counts = {"trials": 100, "success": 60, "failed_grasp": 50, "recovered": 20}
    text = recoveries_markdown([{"preset": "tiny_lift", "P": 128, "seed": 0, "method": "base", "counts": counts, "film": None}])
    assert "40.0 % (20/50" in text and "33.3 % (20/60" in text and "50.0 % (50/100" in text
    assert "over trainings" not in text


def test_recoveries_are_compared_over_trainings():
    def watched(seed, method, failed, recovered):
        counts = {"trials": 100, "success": 60, "failed_grasp": failed, "recovered": recovered}
        return {"preset": "tiny_lift", "P": 128, "seed": seed, "method": method, "counts": counts, "film": None}
    cells = [watched(s, *c) for s in (0, 1, 2) for c in (("base", 50 + s, 5), ("wmpo", 20 + s, 2 + 3 * s))]
    text = recoveries_markdown(cells)
    assert "trials with a failed grasp: -30.0 points (-30.0 to -30.0), **significant**" in text
    assert "succeeded in the end: +13.6 points" in text and "not significant" in text
    assert "over trainings" not in recoveries_markdown(cells[:4])


def test_checkpoints_are_ranked_within_each_run():
    def run(seed, dreamt, real):
        policies = [{"name": str(i), "dreamt": [d, 10], "real": [r, 10]} for i, (d, r) in enumerate(zip(dreamt, real))]
        return {"preset": "tiny_lift", "P": 128, "seed": seed, "policies": policies}
    found = checkpoint_correlation([run(0, [1, 2, 3, 4, 5], [2, 3, 4, 5, 6]), run(1, [5, 6, 7, 8, 9], [5, 4, 3, 2, 1])])
    assert [v[1] for v in found.values()] == [pytest.approx(1.0), pytest.approx(-1.0)]
    n, rho, low, high = found["tiny_lift, P = 128, seed 0"]
    assert n == 5 and low < 0.5 and high < 1          # five points in perfect order are not certainty


def test_pages_are_made_again_to_the_byte(tmp_path):
    record = {"experiment": "table1", "commands": ["wmpo-experiment table1"], "cells": CELLS}
    png = base64.b64encode(b"not really a picture").decode()
    film = {"preset": "tiny_lift", "P": 128, "seed": 0, "method": "wmpo", "film": f"data:image/png;base64,{png}",
            "counts": {"trials": 4, "success": 2, "failed_grasp": 1, "recovered": 1}}
    (tmp_path / "table1.json").write_text(json.dumps(record))
    (tmp_path / "recoveries.json").write_text(json.dumps({"experiment": "recoveries", "commands": [], "cells": [film]}))
    (tmp_path / "tiny_lift.json").write_text(json.dumps({"preset": "tiny_lift"}))
    first = {p: p.read_bytes() for page in write_pages(tmp_path) for p in (page, *tmp_path.glob("figures/*"))}
    assert {p.name for p in first} == {"table1.md", "recoveries.md", "table1.png", "recovery_tiny_lift_128_wmpo_0.png"}
    for path in first: path.unlink()
    write_pages(tmp_path)
    assert {p: p.read_bytes() for p in first} == first
    assert (tmp_path / "figures/recovery_tiny_lift_128_wmpo_0.png").read_bytes() == b"not really a picture"
    text = (tmp_path / "table1.md").read_text()
    assert "`wmpo-experiment table1`" in text and "Seeds: 0, 1." in text and "Fewer than three seeds" in text
    assert "Newcombe" in text and "Newcombe" not in (tmp_path / "recoveries.md").read_text()          # which compares nothing
    assert text.index("WMPO against base") < text.index("The paper's own Table 1")


def test_a_part_with_fewer_seeds_says_so_and_is_compared_with_their_base():
    many = CELLS + [cell("wmpo", "1111" * 16, seed) for seed in (1, 2)] + [cell("base", "0000" * 16, 2)] + [cell("wmpo", "1111" * 16, 1, P=512)]
    line, warning = seeds_lines(many)
    assert line == "Seeds: tiny_lift, P = 128: 0, 1, 2; tiny_lift, P = 512: 1."
    assert "tiny_lift, P = 128 (GRPO, online and DPO) and tiny_lift, P = 512 says" in warning           # WMPO has three seeds in the first part
    assert len(seeds_lines([cell("wmpo", "1111", seed) for seed in range(3)])) == 1
    variants = [cell(None, "1111", seed, ablation="temperature", variant=v) for v, seeds in (("0.4", (0, 1, 2)), ("1.6", (0,))) for seed in seeds]
    assert "(temperature 1.6)" in seeds_lines(variants)[1]                  # the other one has three
    assert seeds_lines(CELLS[:1])[0].startswith("Seeds: 0.")                # only the base policy yet
    small = {row[0]: row for row in table1_rows(many, "tiny_lift", 512)}
    assert "(32/64" in small["base policy"][1] and small["base policy"][2] == "1: 50.0"


def test_commands_that_a_wider_one_covers_are_not_listed():
    made = "wmpo-experiment table1"
    lines = [f"{made} --seeds 7", f"{made} --budgets 128 --seeds 6 7 --output a", f"{made} --budgets 512 --seeds 6", f"{made} --budgets 512 --seeds 6 --only dpo",
             f"{made} --budgets 512 --seeds 6 8 --only dpo", f"{made} --budgets 128 --seeds 7 6 --results b", f"{made} --preset tiny_stack --seeds 7",
             f"{made} --seeds 7 --grpo.groups 4"]
    assert without_covered(lines) == [lines[i] for i in (2, 4, 5, 6, 7)]


def test_a_damaged_result_is_named(tmp_path):
    (tmp_path / "noise.json").write_text("{")
    with pytest.raises(UserError, match="noise.json"): read_result(tmp_path / "noise.json")


def test_a_variant_is_seen_against_the_base_of_its_own_seeds():
    cells = CELLS[:2] + [cell("base", "0" * 64, 2)] + [cell(None, "1" * 64, 0, ablation="temperature", variant="1.6")]
    groups = gained_groups(cells, "tiny_lift", 128)
    assert {name: [*group] for name, group in groups.items()} == {"base policy": [0], "WMPO as it is": [], "temperature: 1.6": [0]}
    assert "| temperature: 1.6 | 100.0 % (64/64; 94.3 to 100.0) | 0: 100.0 | +50.0" in gained_markdown(cells)


def test_ssim_against_its_definition_and_its_limits():
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8)
    assert ssim(frames, frames).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    flat, light = (torch.full((1, 12, 12, 3), level, dtype=torch.uint8) for level in (100, 130))
    assert float(ssim(flat, light)) == pytest.approx((2 * 100 * 130 + 6.5025) / (100 ** 2 + 130 ** 2 + 6.5025), abs=1e-4)
    assert abs(float(ssim(frames[:1], frames[1:]))) < 0.1                  # unrelated noise
    # a window of constant weights over one 11 x 11 frame, by hand with the Gaussian weights
    one, two = frames[:1, :11, :11, :1].expand(-1, -1, -1, 3), frames[1:, :11, :11, :1].expand(-1, -1, -1, 3)
    w = torch.outer(*[torch.exp(-((torch.arange(11) - 5.0) ** 2) / 4.5)] * 2)
    w, x, y = w / w.sum(), one[0, :, :, 0].float(), two[0, :, :, 0].float()
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, c = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
    wanted = (2 * mx * my + 6.5025) * (2 * c + 58.5225) / ((mx ** 2 + my ** 2 + 6.5025) * (vx + vy + 58.5225))
    assert float(ssim(one, two)) == pytest.approx(float(wanted), abs=1e-3)


def films(levels, length):
    "Flat grey films: `levels` [B][T+1]."
    frames = torch.tensor(levels, dtype=torch.uint8)[:, :, None, None, None].expand(-1, -1, 16, 16, 3)
    B, T = len(levels), len(levels[0]) - 1
    return TrajectoryBatch(frames, torch.zeros(B, T, 7), torch.zeros(B, T // 8, 0), torch.zeros(B, T // 8, 0), torch.zeros(B, dtype=torch.bool),
                           torch.tensor(length), torch.tensor(length), torch.arange(B), torch.zeros(B, dtype=torch.long))


def test_departure_is_measured_against_a_stranger():
    real = films([[100] * 17, [140] * 17], [16, 16])
    # the first dream stays 10 grey levels off, the second leaves in its second chunk, by more than the strangers' 40
    dreamt = films([[100] + [110] * 16, [140] + [130] * 8 + [60] * 8], [16, 16])
    found = departures(real, dreamt)
    assert found["departed"] == [0, 1] and found["stayed"] == 1
    assert found["stranger"] == pytest.approx([20 * math.log10(255 / 40)] * 2, abs=1e-3)
    assert float(chunk_psnr(real.frames, dreamt.frames)[0, 0]) == pytest.approx(20 * math.log10(25.5), abs=1e-3)
    assert found["error_map"][0] == [[10.0] * 8] * 8 and found["error_map"][1] == [[45.0] * 8] * 8
    # a chunk that was never executed does not count
    assert departures(films([[100] * 17, [140] * 17], [16, 8]), dreamt)["departed"] == [0, 0]
    assert departures(real, films(dreamt.frames[..., 0, 0, 0].tolist(), [16, 8]))["departed"] == [0, 0]
    assert ssim_by_frame(real.frames, real.frames, real.length).tolist() == pytest.approx([1.0] * 17, abs=1e-5)


def test_calibration_counts_and_gaps():
    found = calibration(torch.tensor([0.0, 0.1, 0.5, 0.95, 1.0]), torch.tensor([False, True, True, True, True]))
    assert [b["n"] for b in found["bins"]] == [2, 0, 1, 0, 2] and [b["successes"] for b in found["bins"]] == [1, 0, 1, 0, 2]
    assert found["ece"] == pytest.approx((abs(0.1 - 1) + abs(0.5 - 1) + abs(1.95 - 2)) / 5)
    assert found["brier"] == pytest.approx((0 + 0.81 + 0.25 + 0.0025 + 0) / 5)


@pytest.mark.parametrize("x, y, rho", [([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.8207826816681233), ([1, 1, 2, 2], [1, 2, 3, 4], 0.8944271909999159)])
def test_spearman_with_ties(x, y, rho):
    found, low, high = spearman(torch.tensor(x), torch.tensor(y))
    assert found == pytest.approx(rho) and -1 <= low < found < high <= 1
    if len(x) == 5: assert (low, high) == pytest.approx(tuple(math.tanh(math.atanh(rho) + d * 1.96 * math.sqrt((1 + rho ** 2 / 2) / 2)) for d in (-1, 1)))
    assert spearman(torch.tensor(y), torch.tensor(x))[0] == pytest.approx(rho)


def test_spearman_of_nothing_knows_nothing():
    assert spearman([1, 1, 1], [1, 2, 3])[1:] == (-1.0, 1.0) and math.isnan(spearman([1, 1, 1], [1, 2, 3])[0])
    assert spearman([1, 2, 3], [1, 2, 3]) == (1.0, -1.0, 1.0)


def test_flips_are_counted_with_an_interval():
    found = verdict_flips(torch.tensor([True, False, True, True]), torch.tensor([True, True, True, False]))
    assert (found["differ"], found["n"], found["share"]) == (2, 4, 0.5)
    assert found["interval"] == [round(x, 4) for x in wilson(2, 4)]


def test_only_what_was_executed_by_a_trial_and_its_stranger_counts():
    "The third of three trials ended after its first chunk; its dream goes astray after that. It is the stranger of the first."
    real, dreamt = films([[100] * 17, [140] * 17, [200] * 17], [16, 16, 8]), films([[100] * 17, [140] * 17, [200] * 9 + [0] * 8], [16, 16, 16])
    found = departures(real, dreamt)
    assert found["departed"] == [0, 0] and found["stranger"] == pytest.approx([20 * math.log10(255 / off) for off in (60, 40)], abs=1e-3)
    assert ssim_by_frame(real.frames, dreamt.frames, real.length).tolist() == pytest.approx([1.0] * 17, abs=1e-5)


def test_curves_are_means_of_their_own_setting_at_the_ends_of_chunks():
    cells = [truth(s, [[1, 0], [0, 1]], [1, 2], [1, 2]) | {"setting": name, "psnr": [100.0, level]} for s, name, level in ((0, "a", 20.0), (1, "a", 30.0), (0, "b", 10.0))]
    assert [list(line.get_ydata()) for line in truth_figure(cells).axes[0].lines] == [[25.0], [10.0]]
    curves = [{"preset": "tiny_lift", "P": 128, "seed": s, "noise": 50, "chunk": 2, "steps": 9, "start": 0, "ssim": [1, 0.9, 0.8, 0.7, 0.6], "psnr": [None, 1.0, 20.0 + 4 * s, 3.0, end]}
              for s, end in ((0, 30.0), (1, None))]
    assert "| 50 of 1000 | 22.0 dB, 0.800 | 30.0 dB, 0.600 | 2 |" in noise_markdown(curves)
    bins = [[{"n": n, "confidence": c, "successes": k}] + [{"n": 0, "confidence": None, "successes": 0}] * 4 for n, c, k in ((1, 0.1, 0), (3, 0.2, 1))]
    assert _calibration_points([{"policies": [{"calibration": {"bins": b}} for b in bins]}]) == [(pytest.approx(0.7 / 4), 1, 4)]


def test_the_pages_are_those_of_the_recorded_results():
    folder = Path(__file__).parent.parent / "results"
    records = {path.with_suffix(".md"): read_result(path) for path in sorted(folder.glob("*.json"))}
    assert any(records.values())
    for page, record in records.items():
        if record: assert page.read_text() == page_markdown(record), "run wmpo-experiment pages"


def test_variants_are_listed_as_people_count():
    assert _in_order(["10 flow steps", "2 flow steps", "1 flow steps", "2 flow steps"]) == ["1 flow steps", "2 flow steps", "10 flow steps"]
    assert _in_order([("group size", "16"), ("group size", "4"), ("alignment", "off")]) == [("alignment", "off"), ("group size", "4"), ("group size", "16")]


def test_rounds_are_compared_with_the_one_before_and_with_imitation():
    cells = [c for c in json.loads((Path(__file__).parent.parent / "results/lifelong.json").read_text())["cells"] if c["round"] < 3]
    found = lifelong_comparisons(cells)
    assert [name.split("WMPO after ")[1] for name in found] == ["round 1 against round 0", "round 1 against imitation", "round 2 against round 1",
                                                                "round 2 against imitation"]
    count = lambda method, number: sum(map(int, next(c for c in cells if (c["method"], c["round"]) == (method, number))["outcome"]["success"]))
    assert list(found.values())[3]["difference"][0] == pytest.approx((count("wmpo", 2) - count("imitation", 2)) / 512)
