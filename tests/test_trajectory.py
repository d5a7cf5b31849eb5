"Windows, statistics, streams, shards and the rollout loop."
import io
import json
import os
import resource
import tarfile
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from wmpo_nb.presets import SEED_RANGES, UserError, seeds_for
from wmpo_nb.trajectory import (
    ActionStats, InitialState, StoredFrames, Streams, TrajectoryBatch, half_successes, load_stats, read_shards, save_stats, window_frames, window_starts, write_shard)


def a_batch(count=3, steps=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    chunks = steps // 8
    return TrajectoryBatch(
        torch.randint(0, 256, (count, steps + 1, 8, 8, 3), generator=g, dtype=torch.uint8), torch.randn(count, steps, 7, generator=g),
        torch.randint(256, 512, (count, chunks, 56), generator=g), torch.randn(count, chunks, 56, generator=g),
        torch.tensor([True, False, True][:count]), torch.tensor([11, 16, 5][:count]), torch.tensor([16, 16, 8][:count]),
        torch.tensor([300, 70_000, 2][:count]), torch.zeros(count, dtype=torch.long))


def test_generated_frame_follows_the_paired_action():
    frames, starts = window_frames(torch.arange(20)), torch.arange(20)
    for j in range(8):
        # frame i+1 is what action i led to
        assert torch.equal(frames[:, 4 + j] - 1, starts + j)


def test_context_repeats_frame_zero_before_the_beginning():
    assert window_frames(torch.tensor([1]))[0, :4].tolist() == [0, 0, 0, 1]


def test_windows_stay_within_what_was_executed():
    pairs = window_starts(torch.tensor([16, 8, 7]))
    assert pairs[:, 0].bincount(minlength=3).tolist() == [9, 1, 0]
    assert (pairs[:, 1] + 8 <= torch.tensor([16, 8, 7])[pairs[:, 0]]).all()


def test_gripper_passes_through_the_policy_and_is_identity_for_the_world_model():
    actions = torch.randn(500, 7)
    actions[:, 6] = actions[:, 6].sign()
    stats = ActionStats.from_actions(actions)
    assert torch.allclose(stats.normalize(actions)[:, 6], actions[:, 6])
    assert torch.equal(stats.unnormalize(torch.full((7,), 0.25))[6], torch.tensor(0.25))


def test_statistics_file_round_trip(tmp_path):
    stats = ActionStats.from_actions(torch.randn(100, 7))
    save_stats(tmp_path / "s.json", stats, "lift")
    again = load_stats(tmp_path / "s.json", "lift")
    assert torch.equal(again.q01, stats.q01) and torch.equal(again.mask, stats.mask)
    with pytest.raises(UserError, match="it holds: lift"): load_stats(tmp_path / "s.json", "lfit")
    with pytest.raises(UserError, match="cannot read"): load_stats(tmp_path / "none.json")


def test_a_stream_does_not_depend_on_its_company():
    crowd = Streams(5, [1, 2, 3], [0, 1, 0]).uniform((9,))
    assert torch.equal(Streams(5, [2], [1]).uniform((9,))[0], crowd[1])
    assert not torch.equal(Streams(6, [2], [1]).uniform((9,))[0], crowd[1])
    assert not torch.equal(Streams(5, [2], [0]).uniform((9,))[0], crowd[1])


def test_shards_keep_everything(tmp_path):
    batch = a_batch()
    write_shard(tmp_path / "a.tar", batch)
    for back in (read_shards(tmp_path), read_shards(tmp_path / "a.tar")):
        for f in fields(TrajectoryBatch): assert torch.equal(getattr(back, f.name), getattr(batch, f.name)), f.name


def test_frames_that_stay_on_disk_are_those_in_memory(tmp_path):
    batch = a_batch()
    write_shard(tmp_path / "a.tar", batch[:2])
    write_shard(tmp_path / "b.tar", batch[2:])
    back = read_shards(tmp_path, stored=True)
    assert isinstance(back.frames, StoredFrames) and back.frames.shape == tuple(batch.frames.shape) and len(back) == 3
    rows, times, none = torch.tensor([[2], [0]]), torch.tensor([[1, 4, 4], [0, 2, 3]]), torch.zeros(3, dtype=torch.bool)
    for index in ((slice(None), torch.tensor([0, 4])), (slice(1, 3), times), (torch.tensor([2, 0]), slice(1, 4)), (slice(None), slice(2)), (-1, -1), (none, 0)):
        assert torch.equal(back.frames[index], batch.frames[index]), index
    for index in (0, slice(1, 3), torch.tensor([2, 2, 0]), torch.tensor([True, False, True]), none, (slice(None), 0), (rows, times), (rows[:, 0], times[:, 1])):
        found, wanted = back.frames[index], batch.frames[index]
        assert torch.equal(found, wanted) and found.dtype == torch.uint8, index
    for chosen in (slice(1, None), torch.tensor([2, 0]), torch.tensor([False, True, False]), none):
        part, wanted = back[chosen], batch[chosen]
        assert isinstance(part.frames, StoredFrames) and len(part) == len(wanted) and torch.equal(part.frames[:], wanted.frames)
        assert all(torch.equal(getattr(part, f.name), getattr(wanted, f.name)) for f in fields(TrajectoryBatch) if f.name != "frames")
    back.frames[0].zero_()                                            # what was read is the reader's own
    assert torch.equal(back.frames[0], batch.frames[0])


def test_many_trajectories_on_disk_need_few_open_files(tmp_path):
    "Each mapping keeps a file open, and there are a thousand trajectories and more."
    batch = a_batch()
    many = batch[torch.arange(200) % len(batch)]
    write_shard(tmp_path / "a.tar", many)
    stored, (soft, hard) = read_shards(tmp_path, stored=True).frames, resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 80, hard))
    try: firsts, all_of_them = stored[:, 0], stored[:]
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert torch.equal(firsts, many.frames[:, 0]) and torch.equal(all_of_them, many.frames)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("other", ["smaller", "shorter"])
def test_trajectories_must_be_of_one_size(tmp_path, stored, other):
    whole = a_batch()
    write_shard(tmp_path / "a.tar", whole)
    if other == "smaller": write_shard(tmp_path / "b.tar", replace(whole, frames=whole.frames[:, :, :2]))
    else: write_shard(tmp_path / "b.tar", replace(whole, frames=whole.frames[:, :-8], actions=whole.actions[:, :-8], intended=whole.intended[:, :-8],
                                                  tokens=whole.tokens[:, :-1], log_probs=whole.log_probs[:, :-1]))
    with pytest.raises(UserError, match="different sizes.* in .*a.tar, .* in .*b.tar"): read_shards(tmp_path, stored=stored)


def test_what_nobody_reads_in_a_released_shard_is_skipped(tmp_path):
    write_shard(tmp_path / "a.tar", a_batch()[:1])
    with tarfile.open(tmp_path / "a.tar") as archive: key = archive.getnames()[0].partition(".")[0]
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        pixels = tarfile.TarInfo(f"{key}.pixel_values.npy")
        pixels.size = 1000
        archive.addfile(pixels, io.BytesIO(bytes(1000)))                         # not even an array
    assert torch.equal(read_shards(tmp_path).frames, a_batch()[:1].frames)


@pytest.mark.parametrize("content", ["{}", "[]", '{"action": 3}', '{"a": {}}', '{"a": {"action": {"q01": [0, 1]}}}', '{"a": {"action": {"q01": "x", "q99": "y"}}}', "no json"])
def test_statistics_of_another_kind_are_refused(tmp_path, content):
    (tmp_path / "stats.json").write_text(content)
    with pytest.raises(UserError, match="stats.json"): load_stats(tmp_path / "stats.json")


def test_statistics_need_no_name(tmp_path):
    "Some files hold one entry, and not by name."
    (tmp_path / "stats.json").write_text(json.dumps({"action": {"q01": [-1.0] * 7, "q99": [2.0] * 7}, "proprio": {}}))
    for key in (None, "coffee_d0_300_demos"):
        stats = load_stats(tmp_path / "stats.json", key)
        assert stats.q99.tolist() == [2.0] * 7 and stats.mask.tolist() == [True] * 6 + [False]


def test_stored_frames_have_the_size_they_say(tmp_path):
    "Else the bytes of the next member would be looked at as pictures."
    path = tmp_path / "a.tar"
    write_shard(path, a_batch()[:1])
    data = path.read_bytes()
    start = data.index(b"'shape': (")
    header = data[start:data.index(b"}", start)]
    first = header.split(b"(")[1].split(b",")[0]
    path.write_bytes(data.replace(header, header.replace(b"(" + first, b"(" + b"9" * len(first)), 1))
    with pytest.raises(UserError, match="damaged"): read_shards(tmp_path, stored=True)


def test_stored_frames_must_be_pictures(tmp_path):
    write_shard(tmp_path / "a.tar", a_batch())
    write_shard(tmp_path / "b.tar", replace(a_batch(), frames=a_batch().frames.float()))
    with pytest.raises(UserError, match="b.tar is damaged .*no pictures"): read_shards(tmp_path, stored=True)


def test_tokens_that_are_no_words_survive_a_shard(tmp_path):
    "A flow policy keeps a path of floats where others keep ids; actions need not be seven numbers."
    batch = a_batch()
    batch = TrajectoryBatch(**vars(batch) | {"tokens": torch.randn(3, 2, 5, 16), "actions": torch.randn(3, 16, 2), "intended": None})
    write_shard(tmp_path / "a.tar", batch)
    found = read_shards(tmp_path)
    assert torch.equal(found.tokens, batch.tokens) and found.tokens.dtype == torch.float32
    assert torch.equal(found.actions, batch.actions)


def test_upstream_shards_are_read(tmp_path):
    "The members of the released code's tars: no length, no log-probabilities, a state id of one byte."
    folder = tmp_path / "members"
    folder.mkdir()
    np.save(folder / "000000000.video.npy", np.zeros((17, 4, 4, 3), np.uint8))
    np.save(folder / "000000000.action.npy", np.ones((16, 7), np.float32))
    np.save(folder / "000000000.state_id.npy", np.uint8(9))
    (folder / "000000000.meta.json").write_text(json.dumps({"complete": True, "finish_step": 12, "unique_id": "x"}))
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for path in sorted(folder.iterdir()): archive.add(path, path.name)
    batch = read_shards(tmp_path / "shard.tar")
    assert (batch.success.item(), batch.finish_step.item(), batch.length.item(), batch.state_id.item()) == (True, 12, 12, 9)


@pytest.mark.parametrize("cut", [100, 3000, 9000])
def test_truncated_shard_is_refused_by_name(tmp_path, cut):
    write_shard(tmp_path / "a.tar", a_batch())
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:cut])
    with pytest.raises(UserError, match="a.tar is damaged"): read_shards(tmp_path)


def test_no_shards_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="wmpo-collect"): read_shards(tmp_path)


def test_pickled_member_is_not_executed(tmp_path):
    np.save(tmp_path / "000000000.video.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with tarfile.open(tmp_path / "shard.tar", "w") as archive: archive.add(tmp_path / "000000000.video.npy", "000000000.video.npy")
    with pytest.raises(UserError, match="damaged"): read_shards(tmp_path / "shard.tar")


def test_every_use_has_seeds_of_its_own():
    uses = list(SEED_RANGES)
    owned = {use: {s for run in (0, 1, 99) for s in seeds_for(use, 500, run)} for use in uses}
    for i, a in enumerate(uses):
        assert owned[a] <= set(SEED_RANGES[a])
        for b in uses[i + 1:]: assert not owned[a] & owned[b] and not set(SEED_RANGES[a]) & set(SEED_RANGES[b])
    with pytest.raises(UserError): seeds_for("test", 10_001)


def test_initial_state_needs_only_a_frame():
    assert InitialState(3, torch.zeros(2, 2, 3)).simulator_state is None


def test_stored_batches_joined_are_stored(tmp_path):
    whole = a_batch()
    for i in range(3): write_shard(tmp_path / f"{i}.tar", whole[i:i + 1])
    stored = [read_shards(tmp_path / f"{i}.tar", stored=True) for i in range(3)]
    joined, mixed = TrajectoryBatch.cat(stored), TrajectoryBatch.cat([stored[0], read_shards(tmp_path / "1.tar")])
    assert isinstance(joined.frames, StoredFrames) and torch.equal(joined.frames[:], whole.frames) and torch.equal(joined.actions, whole.actions)
    assert torch.equal(mixed.frames, whole.frames[:2])


@pytest.mark.parametrize("won, count, wins", [([1, 1, 1, 1], 4, 4), ([1, 1, 1, 0], 4, 3), ([0, 1, 1, 1, 0, 0], 4, 2), ([0, 0, 0, 0], 2, 0), ([1, 0], 4, 1)])
def test_half_of_what_is_shown_are_successes(won, count, wins):
    success = torch.tensor(won) > 0
    chosen = half_successes(success, count)
    assert len(chosen) == len(set(chosen.tolist())) == min(count, len(won)) and int(success[chosen].sum()) == wins
