"Robot videos in LeRobot's format: real parquet, real mp4, two miniature data sets that agree on nothing, and real processes."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from helpers import refusal

from wmpo_nb import oxe
from wmpo_nb.alignment import main
from wmpo_nb.oxe import (OXE_MIXTURE, RELEASED, Conventions, Mixture, RobotVideos, RobotWindows, Shuffle, Source, WindowStream, compute_stats,
                         find_action_stats, find_sources, latent_sampler, normalize_actions, thin_out, write_dataset, write_video)
from wmpo_nb.presets import UserError, load_preset
from wmpo_nb.run import read_metrics
from wmpo_nb.weights import load_weights
from wmpo_nb.trajectory import ActionStats, load_stats

ROOT = Path(__file__).parent.parent
VAE = ROOT / "wmpo_nb/weights/lift/vae.safetensors"
TINY = load_preset("tiny_lift")
LENGTHS = {"left": (20, 9, 33, 26), "right": (40, 25, 31)}


def clock(steps, size, unit=0.01, closed=0.0, opened=1.0):
    "An episode that tells the time: frame t is 5 t bright, and action t is t `unit`s along the first number; the gripper closes half-way."
    frames = np.broadcast_to((5 * np.arange(steps, dtype=np.uint8))[:, None, None, None], (steps, *size, 3))
    actions = np.zeros((steps, 7), np.float32)
    actions[:, 0], actions[:, 6] = unit * np.arange(steps), np.where(np.arange(steps) > steps // 2, closed, opened)
    return frames, actions


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "left: 10 Hz, 64 x 48, metres, 1 opens, one file an episode. right: 20 Hz, 80 x 96, unit steps, -1 opens, one file for all, AV1."
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "left", [clock(n, (48, 64)) for n in LENGTHS["left"]], 10)
    write_dataset(folder / "right", [clock(n, (96, 80), 1.0, 1.0, -1.0) for n in LENGTHS["right"]], 20, camera="front", version="v3.0",
                  codec="libsvtav1")
    entries = [{"path": "left"}, {"path": "right", "weight": 2.0, "camera": "front", "gripper_closed": 1, "gripper_open": -1}]
    (folder / "mixture.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def sources(data):
    return find_sources([str(data / "mixture.json")])


@pytest.fixture(scope="module")
def mixture(sources):
    return Mixture(sources, TINY)


def times(frames):
    "The time that frames uint8 [..., H, W, 3] of a clock show."
    return np.rint(np.asarray(frames).mean((-3, -2, -1)) / 5).astype(int)


# --- files ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("d", [0, 1])
def test_every_frame_and_action_is_where_it_belongs(sources, d):
    videos = RobotVideos(sources[d])
    assert (videos.length == LENGTHS[sources[d].name]).all() and videos.fps == (10, 20)[d]
    for e, n in enumerate(videos.length):
        assert (times(videos.frames(e, range(n), 32)) == np.arange(n)).all()
        assert np.allclose(videos.actions(e)[:, 0], np.arange(n) * (0.01, 1.0)[d])
        assert times(videos.frames(e, [n - 1, 0, 3, 3], 16)).tolist() == [n - 1, 0, 3, 3]


def test_pictures_are_the_videos(tmp_path):
    "A picture with edges and colours survives writing, decoding and a change of size."
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, :, 0], picture[32:, :32, 1], picture[16:48, 16:48, 2] = 200, 180, 220
    write_dataset(tmp_path / "viola", [(np.stack([np.roll(picture, 8 * t, 1) for t in range(12)]), clock(12, (64, 64))[1])], 10)
    read = RobotVideos(Source(str(tmp_path / "viola"))).frames(0, [0, 1], 32)
    for t in (0, 1):
        small = np.roll(picture, 8 * t, 1).reshape(32, 2, 32, 2, 3).mean((1, 3))
        assert np.abs(read[t].astype(float) - small).mean() < 8


def test_encoding_leaves_the_process_as_it_was(tmp_path):
    "As root, AV1's encoder would leave it a real-time one, and others without a processor."
    before = os.sched_getscheduler(0)
    write_video(tmp_path / "a.mp4", clock(4, (64, 64))[0], 10, "libsvtav1")
    assert os.sched_getscheduler(0) == before == os.SCHED_OTHER


def test_a_data_set_that_others_wrote(tmp_path):
    """Version 3.0 by hand: two files of tables and two of videos, cut at different episodes, numbers that do not begin at 0, lists of any
    length for actions, more columns, a second camera, and episodes in two files of meta/."""
    lengths, camera = [12, 15, 11], "observation.images.top"
    (tmp_path / "meta/episodes/chunk-000").mkdir(parents=True)
    (tmp_path / "data/chunk-000").mkdir(parents=True)
    parts = [clock(n, (32, 32)) for n in lengths]
    features = {camera: {"dtype": "video"}, "observation.images.wrist": {"dtype": "video"}, "action": {"dtype": "float32", "shape": [7]}}
    info = {"codebase_version": "v3.0", "fps": 10, "features": features, "data_path": oxe._LAYOUTS["v3.0"][0], "video_path": oxe._LAYOUTS["v3.0"][1]}
    (tmp_path / "meta/info.json").write_text(json.dumps(info))
    for file, chosen in enumerate(([0], [1, 2])):
        rows = [(7 + e, float(t), a.tolist()) for e in chosen for t, a in enumerate(parts[e][1])]
        table = pa.table({"observation.state": [[t, t] for _, t, _ in rows], "action": pa.array([a for *_, a in rows], pa.list_(pa.float32())),
                          "episode_index": [e for e, *_ in rows]})
        parquet.write_table(table, tmp_path / f"data/chunk-000/file-{file:03d}.parquet", row_group_size=5)
    for file, chosen in enumerate(([0, 1], [2])):
        path = tmp_path / f"videos/{camera}/chunk-001/file-{file:03d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, np.concatenate([parts[e][0] for e in chosen]), 10)
    for e, (table, video, start) in enumerate([(0, 0, 0.0), (1, 0, 1.2), (1, 1, 0.0)]):
        row = {"episode_index": [7 + e], "tasks": [["pour"]], "length": [lengths[e]], "data/chunk_index": [0], "data/file_index": [table],
               f"videos/{camera}/chunk_index": [1], f"videos/{camera}/file_index": [video], f"videos/{camera}/from_timestamp": [start]}
        parquet.write_table(pa.table(row), tmp_path / f"meta/episodes/chunk-000/file-{e:03d}.parquet")
    with pytest.raises(UserError, match="which camera.*top, wrist"): RobotVideos(Source(str(tmp_path)))
    videos = RobotVideos(Source(str(tmp_path), camera="top"))
    for e, n in enumerate(lengths):
        assert (times(videos.frames(e, range(n), 16)) == np.arange(n)).all() and (videos.actions(e) == parts[e][1]).all()


def test_episodes_are_looked_for_in_their_chunks(data, tmp_path):
    "Version 2 with three episodes a folder."
    folder = Path(shutil.copytree(data / "left", tmp_path / "left"))
    edit(folder / "meta/info.json", chunks_size=3)
    for path in [*folder.rglob("episode_000003.*")]:
        moved = folder / path.relative_to(folder).as_posix().replace("chunk-000", "chunk-001")
        moved.parent.mkdir(parents=True)
        path.rename(moved)
    videos = RobotVideos(Source(str(folder)))
    for e, n in enumerate(LENGTHS["left"]): assert (times(videos.frames(e, range(n), 16)) == np.arange(n)).all() and len(videos.actions(e)) == n


# --- windows -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("d, conventions, stride, late", [
    (0, Conventions(), 1, 0), (1, Conventions(), 2, 0), (1, Conventions(resample=False), 1, 0),
    (0, Conventions(pairing="taken"), 1, 1), (1, Conventions(pairing="taken"), 2, 2), (1, RELEASED, 1, 1)])
def test_each_frame_stands_beside_the_action_that_leads_to_it(sources, d, conventions, stride, late):
    part = RobotWindows(sources[d], TINY, conventions)
    unit, q01, q99 = (0.01, 1.0)[d], part.stats.q01[0], part.stats.q99[0]
    assert part.stride == stride
    for e, n in enumerate(part.videos.length):
        count = max(0, n - 8 * stride - max(1, late) + 1)
        assert part.counts[e] == count
        for s in sorted({0, 1, 2, 3, int(count) // 2, int(count) - 1} & set(range(int(count)))):
            frames, actions = part.window(e, s)
            shown = times(frames)
            assert frames.shape == (12, 64, 64, 3) and actions.shape == (8, TINY.stdit.action_dim)
            assert shown.tolist() == [max(0, s + stride * j) for j in range(-3, 9)]
            assert shown[-1] < n and len(set(shown[3:])) == 9                     # generated frames are real, none is repeated
            # the actions between a frame and the one before it; "taken": those after it
            between = [np.mean(np.arange(t - stride, t) + late) * unit for t in shown[4:]]
            expected = (2 * (torch.tensor(between) - q01) / (q99 - q01) - 1).clamp(-1, 1)
            if stride == 1: assert torch.allclose(actions[:, 0].double(), expected, atol=1e-5)
            else: assert torch.allclose(actions[:, 0].double(), expected, atol=0.05)     # clipped before the mean


def test_no_other_pairing_would_pass(sources):
    "With the pairs of the released code every action is one step further: the proof above can fail."
    ours, theirs = (RobotWindows(sources[0], TINY, Conventions(pairing=p)).window(2, 10)[1][:, 0] for p in ("leading", "taken"))
    assert torch.allclose(ours[1:], theirs[:-1]) and not torch.allclose(ours, theirs)


def test_grippers_speak_one_language(sources):
    for d in (0, 1):
        for conventions, opened, closed in ((Conventions(), -1, 1), (RELEASED, 0, 1)):
            if conventions.gripper == "open": opened, closed = 1, 0
            part = RobotWindows(sources[d], TINY, conventions)
            frames, actions = part.window(0, 0)
            assert set(actions[:, 6].tolist()) <= {opened, closed} and actions[0, 6] == opened
            last = int(part.counts[0]) - 1
            assert part.window(0, last)[1][-1, 6] == closed


def test_a_thinned_action_is_the_mean_move_and_the_grippers_last_word():
    actions = torch.tensor([[0.0] * 6 + [-1], [1.0] * 6 + [1], [0.5] * 6 + [1], [0.5] * 6 + [-1]])
    assert torch.equal(thin_out(actions, 2), torch.tensor([[0.5] * 6 + [1], [0.5] * 6 + [-1]]))
    assert torch.equal(thin_out(actions, 1), actions)


def test_actions_are_clipped_and_what_never_moves_is_zero():
    stats = ActionStats(torch.tensor([-1.0, 0.0, 0.3] + [0.0] * 4).double(), torch.tensor([1.0, 2.0, 0.3] + [1.0] * 4).double(), torch.ones(7).bool())
    actions = np.array([[-9, 0, 0.3, 0, 0.5, 1, 0.5], [0.5, 9, 0.3, 0, 0.5, 1, 7]], np.float32)
    found = normalize_actions(actions, stats, Source("x"))
    assert torch.allclose(found, torch.tensor([[-1, -1, 0, -1, 0, 1, 0], [0.5, 1, 0, -1, 0, 1, -1]]))


def test_statistics_come_from_the_file_that_is_given(data, sources, tmp_path, capsys):
    own = find_action_stats(RobotVideos(sources[0]).files, "left")
    given = tmp_path / "dataset_statistics.json"
    given.write_text(json.dumps({"left_converted_externally_to_rlds": {"action": {"q01": [-3.0] * 7, "q99": [3.0] * 7}}, "right": {}}))
    assert find_action_stats(RobotVideos(sources[0]).files, "left", given).q99.tolist() == [3.0] * 7
    with pytest.raises(UserError, match="cannot read"): find_action_stats(RobotVideos(sources[0]).files, "left", tmp_path / "nothing.json")
    made = tmp_path / "made.json"
    assert oxe.main(["--data", str(data / "left"), str(tmp_path / "nowhere"), "--output", str(made)]) == 2      # what was done before it stays
    assert oxe.main(["--data", str(data / "right"), "--output", str(made)]) == 0           # added, not replaced
    assert torch.allclose(load_stats(made, "left").q99[:6], own.q99[:6], atol=1e-6) and load_stats(made, "right").q99[0] > 30


def test_statistics_of_a_few_episodes_are_spread_over_the_data_set(sources):
    videos = RobotVideos(sources[0])
    expected = ActionStats.from_actions(torch.from_numpy(np.concatenate([videos.actions(e) for e in (0, 3)])))
    assert torch.equal(compute_stats(videos, 2).q99, expected.q99)


# --- the stream ----------------------------------------------------------------------------------------------------

def addresses(stream, count): return torch.stack([stream._draw() for _ in range(count)])


def test_weights_come_out(sources):
    for weights in ((1.0, 1.0), (3.0, 1.0), (0.1, 2.0)):
        mixture = Mixture([replace(s, weight=w) for s, w in zip(sources, weights)], TINY)
        steps = np.array([sum(LENGTHS["left"]), sum(LENGTHS["right"])])
        expected = (steps * weights)[1] / (steps * weights).sum()
        n = 20_000
        found = addresses(WindowStream(mixture, 1000, seed=1), n // 1000)[..., 0].double().mean().item()
        assert abs(found - expected) < 4 * (expected * (1 - expected) / n) ** 0.5


@pytest.mark.parametrize("size", [1, 20, 10_000])
def test_a_pass_has_every_window_once_and_the_next_another_order(size):
    counts = np.array([5, 0, 12, 1, 7])
    shuffle, random = Shuffle(counts, size, (0, 0)), np.random.default_rng(0)
    passes = [[shuffle.draw(u) for u in random.random(25)] for _ in range(3)]
    everything = {(e, s) for e, n in enumerate(counts) for s in range(n)}
    for one in passes: assert len(one) == len(set(one)) and set(one) == everything
    assert passes[0] != passes[1] != passes[2]


def test_episodes_have_another_order_in_each_pass():
    "One window each, always the one that has been held longest."
    shuffle = Shuffle(np.ones(20, int), 1, (0, 0))
    passes = [[shuffle.draw(0.0)[0] for _ in range(20)] for _ in range(3)]
    assert all(sorted(one) == list(range(20)) for one in passes) and passes[0] != passes[1] != passes[2]


def test_processes_share_a_batch_without_overlap(mixture):
    whole = WindowStream(mixture, 7, seed=3)
    shares = [WindowStream(mixture, 7, seed=3, process=(rank, 3)) for rank in range(3)]
    assert [i for share in shares for i in share.rows] == list(range(7))
    for _ in range(3):
        (frames, actions, _), parts = whole.next(), [share.next() for share in shares]
        assert torch.equal(frames, torch.cat([p[0] for p in parts])) and torch.equal(actions, torch.cat([p[1] for p in parts]))
    with pytest.raises(UserError, match="cannot be shared by 8"): WindowStream(mixture, 7, seed=3, process=(0, 8))


def test_the_number_of_workers_changes_nothing(mixture):
    streams = [WindowStream(mixture, 5, seed=4, workers=w, ahead=a) for w, a in ((1, 0), (4, 3))]
    for _ in range(4):
        one, other = (stream.next() for stream in streams)
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("after, shuffle", [(0, 2**18), (1, 2**18), (6, 2**18), (6, 10), (25, 30)])
def test_a_resumed_stream_is_the_same_stream(mixture, tmp_path, after, shuffle):
    "To the last bit, from a state that went through a file, in the middle of a pass and across its end, with other workers."
    unbroken = WindowStream(mixture, 4, seed=5, shuffle=shuffle)
    for _ in range(after): unbroken.next()
    torch.save(unbroken.state_dict(), tmp_path / "state.pt")
    expected = [unbroken.next() for _ in range(3)]
    resumed = WindowStream(mixture, 4, seed=5, shuffle=shuffle, workers=1, ahead=1)
    resumed.next()                                                            # what was begun must be forgotten
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for frames, actions, _ in expected:
        found = resumed.next()
        assert torch.equal(found[0], frames) and torch.equal(found[1], actions)


def test_a_stream_does_not_resume_as_another(sources, mixture):
    state = WindowStream(mixture, 4, seed=5).state_dict()
    for other in (WindowStream(mixture, 4, seed=6), WindowStream(mixture, 5, seed=5), WindowStream(Mixture(sources[:1], TINY), 4, seed=5),
                  WindowStream(Mixture(sources, TINY, RELEASED), 4, seed=5)):
        with pytest.raises(ValueError, match="changed"): other.load_state_dict(state)


def test_latents_are_those_of_the_windows(mixture):
    from wmpo_nb.vae import load_vae
    vae = load_vae(VAE)
    frames, actions, rows = WindowStream(mixture, 4, seed=0, process=(1, 2)).next()
    latents, actions_n = latent_sampler(WindowStream(mixture, 4, seed=0, process=(1, 2)), vae)(None, 4)
    assert list(rows) == [2, 3] and torch.equal(actions_n[2:], actions) and not latents[:2].any() and not actions_n[:2].any()
    with torch.no_grad(): assert torch.allclose(latents[2:], vae.encode(frames), atol=0.15)          # bf16 where there is hardware for it


def test_the_mixture_is_the_one_of_the_card():
    "Names and weights of the table in the code are those of the table on the card."
    text, weights = (ROOT / "data_cards/oxe_mixture.md").read_text(), {}
    for weight, names in re.findall(r"^\| (\d|below 1) \| (.+) \|$", text, re.M):
        for name in names.split(", "):
            name, _, own = name.replace(" (fractal)", "").partition(" ")
            weights[name] = float(own or weight)
    short = {name.removesuffix("_dataset"): weight for name, (weight, _) in OXE_MIXTURE.items()}
    other_names = {"RT-1": "fractal20220817_data", "dlr_edan": "dlr_edan_shared_control", "iamlab_cmu": "iamlab_cmu_pickup_insert",
                   "berkeley_fanuc": "berkeley_fanuc_manipulation", "nyu_franka_play": "nyu_franka_play"}
    assert {other_names.get(name, name): weight for name, weight in weights.items()} == short and len(short) == 25


# --- faults --------------------------------------------------------------------------------------------------------

def edit(path, **changes):
    record = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (record | changes).items() if value is not None}))


def shorten_table(folder):
    path = folder / "data/chunk-000/episode_000002.parquet"
    parquet.write_table(parquet.read_table(path).slice(0, 30), path)


VIDEO = "videos/chunk-000/observation.images.image/episode_000002.mp4"
FAULTS = {
    "no info": (lambda f: (f / "meta/info.json").unlink(), "is no LeRobot data set: meta/info.json is missing"),
    "version": (lambda f: edit(f / "meta/info.json", codebase_version="v1.6"), "version v1.6; 2.0, 2.1 and 3.0 can be read"),
    "layout": (lambda f: edit(f / "meta/info.json", codebase_version="v3.0"), "incomplete: meta/episodes/.* is missing"),
    "info": (lambda f: (f / "meta/info.json").write_text("{"), "info.json is damaged"),
    "no videos": (lambda f: edit(f / "meta/info.json", video_path=None), "says nothing of 'video_path'"),
    "pattern": (lambda f: edit(f / "meta/info.json", data_path="data/{shard}.parquet"), "cannot read the pattern 'data/{shard}.parquet'"),
    "episodes": (lambda f: (f / "meta/episodes.jsonl").write_text('{"length": 3}\n'), "episodes.jsonl is damaged"),
    "statistics": (lambda f: edit(f / "meta/stats.json", action={"mean": [0] * 7}), "no action statistics for viola: .*python -m wmpo_nb.oxe"),
    "numbers": (lambda f: edit(f / "meta/stats.json", action={"q01": [0] * 8, "q99": [1] * 8}), "actions of 8 numbers, not 7"),
    "no video": (lambda f: (f / VIDEO).unlink(), "incomplete: videos/.*episode_000002.mp4 is missing"),
    "broken video": (lambda f: (f / VIDEO).write_bytes((f / VIDEO).read_bytes()[:1500]), "episode_000002.mp4 is broken .*: fetch it again"),
    "empty video": (lambda f: (f / VIDEO).write_bytes(b""), "episode_000002.mp4 is broken"),
    "short video": (lambda f: write_video(f / VIDEO, clock(30, (48, 64))[0], 10), "episode 2 has 33 actions, but its video has 30 frames"),
    "very short video": (lambda f: write_video(f / VIDEO, clock(5, (48, 64))[0], 10), "has no frame at 0.50 s"),
    "short table": (shorten_table, "episode 2 has 30 actions and 33 frames"),
    "broken table": (lambda f: (f / "data/chunk-000/episode_000002.parquet").write_bytes(b"PAR1"), "is damaged or no LeRobot table"),
    "no actions": (lambda f: parquet.write_table(pa.table({"episode_index": [2]}), f / "data/chunk-000/episode_000002.parquet"), "it has no column 'action'"),
    "ragged actions": (lambda f: parquet.write_table(pa.table({"episode_index": [2, 2], "action": [[1.0], [1.0, 2.0]]}),
                                                     f / "data/chunk-000/episode_000002.parquet"), "is damaged or no LeRobot table"),
    "too short": (lambda f: (f / "meta/episodes.jsonl").write_text('{"episode_index": 1, "length": 8}\n'), "no episode is long enough"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_in_one_line_before_any_work(data, tmp_path, capsys, fault):
    change, message = FAULTS[fault]
    shutil.copytree(data / "left", tmp_path / "viola")
    edit(tmp_path / "viola/meta/info.json", features={"observation.images.agentview_rgb": {"dtype": "video"}})
    # the files keep the camera's first name, so that the path says it, too
    edit(tmp_path / "viola/meta/info.json", video_path=oxe._LAYOUTS["v2.1"][1].replace("{video_key}", "observation.images.image"))
    if fault == "no videos": edit(tmp_path / "viola/meta/info.json", video_path=None)
    else: change(tmp_path / "viola")
    line = refusal(main, capsys, "--pretrain", "oxe", "--data", str(tmp_path / "viola"), "--vae", str(VAE), "--output", str(tmp_path / "run"))
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, message", [
    (["--data", "nowhere"], "no such folder: nowhere"), (["--data", "nowhere.json"], "no such file: nowhere.json"),
    (["--data", "{data}/left"], "'left' is not in the OXE mixture: name it in a .json file"),
    (["--data", "{data}/wrist.json"], "no video of a camera 'wrist'; it has front"), (["--data", "{data}/typo.json"], "no list of sources"),
    (["--data", "{data}/stuck.json"], "a gripper that opens and closes"), (["--data", "{data}/videos_of_nobody"], "is no LeRobot data set"),
    (["--data", "{data}/mixture.json", "--align", "x"], "choose"), (["--data", "{data}/mixture.json", "--workers", "0"], "--workers must be"),
    (["--data", "{data}/mixture.json", "--stats", "nothing.json"], "cannot read action statistics nothing.json"),
    (["--data", "{data}/mixture.json", "--pretraining.batch_size", "4", "--conventions", "mine"], None)])
def test_wrong_arguments(data, tmp_path, capsys, arguments, message):
    (data / "wrist.json").write_text(json.dumps([{"path": "right", "camera": "wrist"}]))
    (data / "typo.json").write_text(json.dumps([{"path": "right", "cam": "wrist"}]))
    (data / "stuck.json").write_text(json.dumps([{"path": "right", "gripper_open": 0}]))
    (data / "videos_of_nobody").mkdir(exist_ok=True)
    line = ["--pretrain", "oxe", "--vae", str(VAE), "--output", str(tmp_path / "run"), *(a.format(data=data) for a in arguments)]
    if message is None:
        with pytest.raises(SystemExit): main(line)
    else: assert message in refusal(main, capsys, *line)
    assert not (tmp_path / "run").exists()


def test_the_other_use_of_the_command_still_asks_for_statistics(capsys):
    assert "--stats is needed" in refusal(main, capsys, "--data", "x", "--vae", "y")
    assert "one folder" in refusal(main, capsys, "--data", "x", "z", "--vae", "y", "--stats", "s")
    assert "--pretrain oxe" in refusal(main, capsys, "--data", "x", "--vae", "y", "--stats", "s", "--open-sora", "o")


# --- real processes ------------------------------------------------------------------------------------------------

SMALL = ["--stdit.depth", "1", "--stdit.hidden_size", "48", "--pretraining.steps", "10", "--pretraining.batch_size", "4", "--pretraining.log_every", "1",
         "--pretraining.warmup_steps", "2", "--pretraining.decay_steps", "4", "--pretraining.checkpoint_every", "2"]
# accelerate reads ACCELERATE_USE_CPU where it launches two processes
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WMPO_PRECISION": "fp32", "ACCELERATE_USE_CPU": "true"}


def start(data, output, *arguments, launch=()):
    command = [sys.executable, "-m", *launch, "wmpo_nb.alignment", "--pretrain", "oxe", "--data", str(data / "mixture.json"), "--vae", str(VAE),
               "--output", str(output), *SMALL, *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process) -> str:
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-3000:]
    return out


def losses(folder): return [(entry["step"], entry["loss"]) for entry in read_metrics(folder)]


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    return folder, finish(start(data, folder))


def test_the_command_trains_the_tiny_world_model(unbroken):
    folder, out = unbroken
    shares = dict(reversed(line.split()) for line in out.splitlines() if "%" in line)
    steps = {name: sum(n) * (1, 2)[name == "right"] for name, n in LENGTHS.items()}
    assert shares == {name: f"{n / sum(steps.values()):.1%}" for name, n in steps.items()}
    state, config = load_weights(folder / "world_model.safetensors")
    assert config["stdit"]["depth"] == 1 and all(value.isfinite().all() for value in state.values() if value.is_floating_point())
    assert [step for step, _ in losses(folder)] == list(range(10))


def test_kill_minus_nine_in_the_middle_of_a_pass_changes_nothing(data, unbroken, tmp_path):
    process, checkpoint = start(data, tmp_path / "killed"), tmp_path / "killed/checkpoints/step_000004"
    while not checkpoint.exists() and process.poll() is None: time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed/world_model.safetensors").exists()
    finish(start(data, tmp_path / "killed", "--resume", "--workers", "1"))
    assert (tmp_path / "killed/world_model.safetensors").read_bytes() == (unbroken[0] / "world_model.safetensors").read_bytes()
    assert losses(tmp_path / "killed") == losses(unbroken[0])


def test_two_processes_learn_the_same(data, tmp_path):
    steps = ["--pretraining.steps", "3", "--pretraining.optimizer", "adamw"]
    finish(start(data, tmp_path / "one", *steps))
    command = start(data, tmp_path / "two", *steps, launch=("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                                                            "--main_process_port", "0", "-m"))
    finish(command)
    assert losses(tmp_path / "two")[0][1] == pytest.approx(losses(tmp_path / "one")[0][1], abs=1e-5)
    one, two = (load_weights(tmp_path / name / "world_model.safetensors")[0] for name in ("one", "two"))
    for key, value in one.items(): torch.testing.assert_close(two[key], value, atol=1e-5, rtol=0, msg=key)


def test_a_run_is_not_resumed_with_other_data(data, unbroken, tmp_path):
    shutil.copytree(unbroken[0], tmp_path / "run")
    process = start(data, tmp_path / "run", "--resume", "--conventions", "released")
    _, err = process.communicate()
    assert process.returncode == 2 and "does not fit 'stream' (--data, --conventions or the preset's rate have changed)" in err.splitlines()[-1]


def test_a_video_that_breaks_in_the_middle_of_training(data, tmp_path):
    "One line that names the file, and after the file is mended --resume goes on."
    shutil.copytree(data, tmp_path / "data")
    video = tmp_path / "data/left/videos/chunk-000/observation.images.image/episode_000000.mp4"
    whole = video.read_bytes()
    video.write_bytes(whole[:1000])                                     # not the longest episode, which is looked at first
    process = start(tmp_path / "data", tmp_path / "run", "--pretraining.checkpoint_every", "1")
    _, err = process.communicate()
    assert process.returncode == 2 and re.search(r"episode_000000.mp4 is broken .*: fetch it again$", err.splitlines()[-1])
    video.write_bytes(whole)
    finish(start(tmp_path / "data", tmp_path / "run", "--pretraining.checkpoint_every", "1", "--resume"))


# --- the hub -------------------------------------------------------------------------------------------------------

class Hub(BaseHTTPRequestHandler):
    "The part of the hub's HTTP interface that data sets need; `files` and `log` are the server's."
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass
    def do_HEAD(self): self.do_GET()

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items(): self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET": self.wfile.write(body)

    def do_GET(self):
        path, hub = unquote(urlsplit(self.path).path), self.server
        if path.startswith("/api/datasets/lab/viola_lerobot/revision/"):
            siblings = [{"rfilename": name} for name in hub.files]
            return self.answer(200, json.dumps({"id": "lab/viola_lerobot", "sha": "c" * 40, "siblings": siblings}).encode())
        if path.startswith("/api/datasets/lab/viola_lerobot/tree/"):
            entries = [{"type": "file", "path": name, "size": len(data), "oid": "1"} for name, data in hub.files.items()]
            return self.answer(200, json.dumps(entries).encode())
        name = path.partition(f"/resolve/{'c' * 40}/")[2]
        if name not in hub.files: return self.answer(404, b"{}", X_Error_Code="EntryNotFound" if name else "RepoNotFound")
        if self.command == "GET": hub.log.append(name)
        self.answer(200, hub.files[name], ETag=f'"{abs(hash(hub.files[name])):x}"', X_Repo_Commit="c" * 40)


READ_FROM_HUB = """
import json, sys
from dataclasses import replace
from wmpo_nb.oxe import Mixture, WindowStream, find_sources
from wmpo_nb.presets import UserError, load_preset
sources = [replace(source, camera="image") for source in find_sources(["lab/viola_lerobot"])]
mixture = Mixture(sources, load_preset("tiny_lift"))
print(json.dumps([sources[0].name, sources[0].weight, mixture.window(0, 3, 2)[1][:, 0].tolist()]))
try: Mixture([replace(sources[0], path="lab/nothing_lerobot")], load_preset("tiny_lift"))
except UserError as error: print(error)
"""


def test_data_sets_of_the_hub_are_fetched_file_by_file(data, sources, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {path.relative_to(data / "left").as_posix(): path.read_bytes() for path in (data / "left").rglob("*") if path.is_file()}
    server.log = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kept = {name: value for name, value in ENVIRONMENT.items() if not name.lower().endswith("_proxy") and not name.startswith("HF_")}
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    found = subprocess.run([sys.executable, "-c", READ_FROM_HUB], env=kept | hub, capture_output=True, text=True)
    server.shutdown()
    assert found.returncode == 0, found.stderr[-3000:]
    (name, weight, actions), complaint = json.loads(found.stdout.splitlines()[0]), found.stdout.splitlines()[1]
    assert (name, weight) == ("viola", 2.0) and "lab/nothing_lerobot is neither a folder here nor to be had from the hub" in complaint
    assert actions == RobotWindows(sources[0], TINY, Conventions()).window(3, 2)[1][:, 0].tolist()
    videos = [name for name in server.log if name.endswith(".mp4")]
    assert sorted(videos) == ["videos/chunk-000/observation.images.image/episode_000002.mp4",      # the longest, looked at first
                              "videos/chunk-000/observation.images.image/episode_000003.mp4"]       # the one that was asked for
