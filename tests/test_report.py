"The report: self-contained, escaped, true to its numbers, and rebuilt from the record alone."
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from wmpo_nb.evaluation import Evaluation
from wmpo_nb.presets import UserError, load_preset
from wmpo_nb.report import (caveats, in_words, line_chart, load_record, main, nice_ticks, page, pooled, results_markdown, save_record,
                            summary, write_report, write_results)

VOID = {"meta", "img", "br", "line", "polyline"}
EVIL = '<script src="http://evil.example/x.js">alert("1")</script>'


class Reader(HTMLParser):
    "Text, attributes and whether every element is closed."
    def __init__(self):
        super().__init__()
        self.open, self.text, self.attributes, self.tags = [], "", [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in VOID: self.open.append(tag)

    def handle_startendtag(self, tag, attributes): self.attributes += attributes

    def handle_endtag(self, tag): assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data): self.text += data


def read(text):
    reader = Reader()
    reader.feed(text)
    assert not reader.open, "unclosed elements"
    return reader


def outcomes(successes, n=40): return {"state_id": list(range(n)), "success": [i < successes for i in range(n)], "finish_step": [30] * n}


def film(length, level): return np.stack([np.full((16, 16, 3), level + 8 * t, np.uint8) for t in range(length)])


@pytest.fixture
def record():
    return {
        "title": "A run", "preset": "tiny_lift", "command": "wmpo-demo --output x", "seed": 3,
        "evaluations": {"base policy": outcomes(10), "WMPO": outcomes(25)},
        "learning": [{"success": 0.3, "kept_share": 0.7, "approx_kl": 0.01}, {"success": 0.5, "kept_share": 0.6, "approx_kl": None}],
        "reward": {"f1": 0.9125, "threshold": 0.37, "confusion": [[20, 1], [2, 17]], "trajectories": 40},
        "agreement": {"before": {"confusion": [[5, 5], [1, 9]], "psnr": [100, 20.5, None]},
                      "after": {"confusion": [[8, 2], [1, 9]], "psnr": [100, 27.5, 26.0]}},
        "clips": [{"caption": "state 12", "real": film(9, 90), "dream": film(9, 120), "real_success": True, "dream_success": False}],
        "ledger": {"real_trajectories": 128, "imagined_frames": 123456, "seconds": {"align": 12.5}},
        "config": {"grpo": {"group_size": 8}}, "versions": {"torch": "2.13"}, "caveats": ["Mind the gap."]}


def test_page_holds_the_numbers(record):
    text = read(page(record)).text
    for expected in ("A run", "25.0 %", "62.5 %", "25/40", "10/40", "+37.5 points", "0.912", "0.37", "123,456", "12.5 s",
                     "state 12", "real (success), dreamt (failure)", "wmpo-demo --output x", "2.13", "Mind the gap.",
                     "20.0 %", "group_size"):
        assert expected in text, expected


def test_nothing_is_fetched_and_nothing_runs(record):
    reader = read(page(record))
    links = [value for key, value in reader.attributes if key in ("src", "href", "srcset", "data", "action", "poster")]
    assert links and all(link.startswith("data:image/") for link in links)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & reader.tags
    assert not re.search(r"url\(|@import|https?://", page(record))
    assert "default-src 'none'" in dict(reader.attributes)["content"]
    assert not any(key.startswith("on") for key, _ in reader.attributes)


def test_text_from_outside_is_escaped(record):
    evil = record | {
        "title": EVIL, "preset": EVIL, "command": EVIL, "versions": {EVIL: EVIL}, "config": {EVIL: EVIL}, "caveats": [EVIL],
        "evaluations": {EVIL: outcomes(3), EVIL + "2": outcomes(4)},
        "agreement": {EVIL: record["agreement"]["before"]}, "ledger": {"seconds": {EVIL: 1.0}},
        "clips": [record["clips"][0] | {"caption": EVIL}]}
    reader = read(page(evil))
    assert "script" not in reader.tags and "alert" in reader.text
    assert all(value.startswith("data:") for key, value in reader.attributes if key == "src")


@pytest.mark.parametrize("missing", ["evaluations", "learning", "reward", "agreement", "clips", "ledger", "config", "versions",
                                     "title", "caveats", "preset"])
def test_each_part_may_be_missing(record, missing):
    del record[missing]
    read(page(record))


def test_an_empty_record_is_a_page():
    assert "WMPO report" in read(page({})).text


def test_films_are_real_images(record):
    import base64
    import io

    from PIL import Image
    links = [value for key, value in read(page(record)).attributes if key == "src"]
    images = {}
    for link in links:
        images[link[:15]] = Image.open(io.BytesIO(base64.b64decode(link.split(",")[1])))
    assert images["data:image/webp"].n_frames == 9
    assert images["data:image/webp"].size == (34, 16)              # real | gap | dream
    strip = np.asarray(images["data:image/png;"])
    assert strip.shape[0] == 34 and (strip[0, 0] == 90).all() and (strip[-1, 0] == 120).all(), "real above dream"


def test_words_match_the_test():
    base, better = (Evaluation.from_dict(outcomes(k)) for k in (10, 25))
    assert "15 were solved only afterwards and 0 only before" in in_words(base, better)
    assert "evidence" in in_words(base, better) and "1 time in 16,384" in in_words(base, better)
    assert "1 time in a million" in in_words(base, Evaluation.from_dict(outcomes(40)))
    assert "luck" in in_words(base, Evaluation.from_dict(outcomes(12)))
    assert "no difference" in in_words(base, base)
    assert "evidence that it did harm" in in_words(better, base) and "harm" not in in_words(base, better)


def test_the_page_names_its_own_weaknesses(record):
    assert any("seed" in c for c in caveats(record)) and any("20.0 %" in c for c in caveats(record))
    assert not any("zero" in c or "--fast" in c for c in caveats(record))
    record["fast"], record["evaluations"]["WMPO"] = True, outcomes(11)
    assert any("--fast" in c for c in caveats(record)) and any("zero" in c for c in caveats(record))
    assert all(c in read(page(record)).text for c in caveats(record))
    record["evaluations"]["WMPO"] = outcomes(1)
    assert any("worse than the one" in c for c in caveats(record)) and not any("zero" in c for c in caveats(record))


def test_other_starts_are_no_pairs(record):
    record["evaluations"]["WMPO"]["state_id"][0] = 99
    for made in (page, caveats):
        with pytest.raises(UserError, match="'WMPO' was not tried on the same starts"): made(record)


@pytest.mark.parametrize("low, high", [(0, 1), (0, 100), (3, 3.4), (-5, 12), (0, 1e-4), (0.9999, 1.0)])
def test_ticks_are_few_and_inside(low, high):
    ticks = nice_ticks(low, high)
    assert 1 <= len(ticks) <= 8 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_charts_survive_odd_series():
    assert line_chart({"a": []}, "t", "x") == "" == line_chart({"a": [None, float("nan")]}, "t", "x")
    for values in ([1.0], [2.0, 2.0], [None, 3.0, None], [float("inf"), 1.0]):
        chart = line_chart({"a": values}, "t", "x")
        read(chart)
        assert "nan" not in chart and "inf" not in chart


def test_record_survives_the_disk_and_the_command_rebuilds_the_page(record, tmp_path, capsys):
    save_record(tmp_path, record)
    assert page(load_record(tmp_path)) == page(record)
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text() == page(record)


def test_a_damaged_record_is_one_line(record, tmp_path, capsys):
    save_record(tmp_path, record)
    (tmp_path / "clips.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="no readable record"): load_record(tmp_path)
    assert main([str(tmp_path)]) == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_failed_write_leaves_the_old_report(record, tmp_path, monkeypatch):
    path = write_report(tmp_path / "report.html", record)
    before = path.read_text()
    with pytest.raises(KeyError): write_report(path, record | {"agreement": {"broken": {}}})
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.fixture
def seeds(record):
    "Two finished runs, of seed 3 and of seed 4."
    judged = {"f1": 0.9125, "precision": 0.9, "recall": 0.8, "trajectories": 40}
    worlds = {"after": {"confusion": [[8, 2], [1, 9]], "psnr": [], "balanced_accuracy": 0.85, "false_success_rate": 0.2,
                        "closed_loop": 0.5, "real": 0.25}}
    record |= {"reward": judged | {"after": judged | {"f1": 0.75}}, "agreement": worlds}
    moved = {name: trials | {"state_id": [1000 + i for i in range(40)]} for name, trials in record["evaluations"].items()}
    return [record, record | {"seed": 4, "evaluations": moved | {"WMPO": outcomes(10) | {"state_id": [1000 + i for i in range(40)]}}}]


def test_seeds_are_pooled(seeds):
    numbers = pooled(seeds)
    assert numbers["base"]["successes"] == 20 and numbers["wmpo"]["successes"] == 35 and numbers["base"]["n"] == 80
    assert numbers["difference"][0] == pytest.approx(15 / 80, abs=1e-4) and numbers["mcnemar_p"] == pytest.approx(2 / 2**15)
    assert [run["seed"] for run in numbers["runs"]] == [3, 4] and numbers["runs"][1]["difference"][0] == 0
    assert "fewer than three trainings" in results_markdown(numbers)
    third = results_markdown(numbers | {"runs": [run | {"difference": [gain, 0, 1]} for run, gain in zip(numbers["runs"] * 2, (0.3, 0.4, 0.2))]})
    assert "the mean gain is +30.0 points (Student's 95 % interval +5.2 to +54.8)" in third


def test_sampled_trials_are_reported_beside_the_exam(seeds, tmp_path):
    assert "sampled" not in pooled(seeds)
    for record in seeds: record["sampled"] = {"base policy": outcomes(8, 20), "WMPO": outcomes(12, 20)}
    numbers = pooled(seeds)
    assert (numbers["sampled"]["base"]["successes"], numbers["sampled"]["wmpo"]["n"]) == (16, 40)
    assert numbers["runs"][0]["sampled"]["difference"][0] == 0.2 and numbers["sampled"]["mcnemar_p"] == 2 * 0.5**8
    write_results(tmp_path / "r", seeds)
    assert "| all | 40.0 % (16/40;" in (tmp_path / "r.md").read_text() and "sampled as in practice" in read(page(seeds[0])).text


def test_it_says_which_policy_the_dream_chose(seeds, tmp_path):
    assert "policy kept" not in read(page(seeds[0])).text
    history = [{"success": 0.1 * i, "kept_share": 0.5} | ({"validation": v} if v is not None else {})
               for i, v in enumerate([None, 0.25, None, 0.5, None, 0.5, None, 0.375])]
    chosen = seeds[0] | {"learning": history}
    text = read(page(chosen)).text
    assert "The policy kept is the one of 6 iterations" in text and "50.0 %" in text and "greedy" in text
    rounds = [numbers | {"round": 1 + i // 6, "step": i} for i, numbers in enumerate(history)]      # the dream of round 1 is not asked any more
    assert "8 iterations: greedy it succeeded most often in the last dream, 37.5 %" in read(page(chosen | {"learning": rounds})).text
    rounds[6]["start_validation"] = 0.45
    assert "kept is the one practice began with: greedy it succeeded in 45.0 %" in read(page(chosen | {"learning": rounds})).text
    assert summary(chosen)["validations"] == [[2, 0.25], [4, 0.5], [6, 0.5], [8, 0.375]]
    write_results(tmp_path / "r", [chosen])
    assert "- seed 3: 25 (2), 50 (4), 50 (6), 38 (8)" in (tmp_path / "r.md").read_text()


@pytest.mark.parametrize("field, value, word", [("seed", 3, "same seed"), ("preset", "tiny_stack", "different presets"), ("fast", True, "--fast"),
                                                ("config", {"collect": {"trajectories": 512}}, "different settings"), ("weights", {"vae": "5e1f"}, "different weights")])
def test_runs_that_do_not_belong_together(seeds, field, value, word):
    with pytest.raises(UserError, match=word): pooled([seeds[0], seeds[1] | {field: value}])


def test_runs_of_before_and_after_a_field_was_added_belong_together(seeds):
    config = load_preset("tiny_lift").to_dict()
    older = config | {"grpo": {name: value for name, value in config["grpo"].items() if name != "clip_low"}}
    assert pooled([seeds[0] | {"config": older}, seeds[1] | {"config": config}])["base"]["n"] == 80
    other = config | {"grpo": config["grpo"] | {"clip_low": 0.1}}
    with pytest.raises(UserError, match="different settings"): pooled([seeds[0] | {"config": older}, seeds[1] | {"config": other}])


def test_results_keep_what_was_written_by_hand(seeds, tmp_path):
    write_results(tmp_path / "tiny_lift", seeds[:1])
    page = tmp_path / "tiny_lift.md"
    page.write_text(page.read_text() + "\n## What was tried\n\nA lot.\n")
    write_results(tmp_path / "tiny_lift", seeds)
    text = page.read_text()
    assert text.endswith("\n\n## What was tried\n\nA lot.\n") and text.count("What was tried") == 1
    assert "| 3 | 25.0 % (10/40;" in text and "| all | 25.0 % (20/80;" in text and "| 4 | after WMPO, 40 | 0.750 |" in text
    assert json.loads((tmp_path / "tiny_lift.json").read_text()) == pooled(seeds)
