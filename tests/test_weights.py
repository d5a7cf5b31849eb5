"Files of weights: written whole or not at all, and what is wrong with one is said in a line."
import re

import pytest
import torch
from torch import nn

from wmpo_nb.presets import UserError, WorldModelTrainConfig
from wmpo_nb.weights import atomic_write, fingerprint, from_bytes, load_into, load_metrics, load_tensors, load_weights, save_weights


def test_atomic_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("ne")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as temporary: temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_weights_round_trip(tmp_path):
    layer = nn.Linear(3, 2)
    tied = {"a": layer.weight, "b": layer.weight, "count": torch.tensor(3)}
    path = tmp_path / "w.safetensors"
    save_weights(path, tied, config={"patch_size": (1, 2, 2)}, metrics={"f1": 0.5}, dtype=torch.bfloat16)
    state, config = load_weights(path)
    assert config == {"patch_size": (1, 2, 2)} and load_metrics(path) == {"f1": 0.5}
    assert state["a"].dtype == torch.bfloat16 and state["count"].dtype == torch.int64
    assert torch.equal(state["a"], state["b"]) and torch.equal(state["a"], layer.weight.detach().bfloat16())
    config = WorldModelTrainConfig(steps=7)
    save_weights(path, layer, config=config)
    assert WorldModelTrainConfig(**load_weights(path)[1]) == config


def test_bad_weights_are_the_users_error(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match="not found.*--from-scratch"): load_weights(path)
    save_weights(path, nn.Linear(300, 20), config={})
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100], whole[:5], b"", b"not safetensors at all"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="truncated"): load_weights(path)
        with pytest.raises(UserError, match="truncated"): load_metrics(path)
    path.write_bytes(whole)
    with pytest.raises(UserError, match=re.escape("'weight' is (20, 300) in the file and (20, 30) in the network")):
        load_into(nn.Linear(30, 20), path)
    with pytest.raises(UserError, match="'bias' is not in the network"): load_into(nn.Linear(300, 20, bias=False), path)
    with pytest.raises(UserError, match="'0.weight' is missing"): load_into(nn.Sequential(nn.Linear(300, 20)), path)
    load_into(nn.Linear(300, 20, bias=False), path, strict=False)


def test_only_trajectories_of_a_folder_of_them_count(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part/0.tar").write_bytes(b"trials")
    before = fingerprint(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("written by the run")
    assert fingerprint(tmp_path) == before
    (tmp_path / "1.tar").write_bytes(b"more")
    assert fingerprint(tmp_path) != before


def test_others_may_read_weights_as_any_new_file(tmp_path):
    (tmp_path / "any").touch()
    save_weights(tmp_path / "weights.safetensors", nn.Linear(2, 2), config={})
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_bytes(tmp_path):
    "A byte a number: at most half a step off in every row, and a row of zeros stays one."
    torch.manual_seed(0)
    state = {"matrix": torch.randn(6, 5) * torch.logspace(-6, 4, 6)[:, None], "kernel": torch.randn(4, 3, 2, 2), "bias": torch.randn(7),
             "zeros": torch.zeros(2, 3), "count": torch.arange(6).view(2, 3)}
    save_weights(tmp_path / "bytes.safetensors", state, config={}, dtype=torch.int8)
    read, _ = load_weights(tmp_path / "bytes.safetensors")
    assert read.keys() == state.keys()
    for key in ("bias", "zeros", "count"): assert torch.equal(read[key], state[key]) and read[key].dtype == state[key].dtype
    for key in ("matrix", "kernel"):
        rows, error = state[key].flatten(1), (read[key] - state[key]).flatten(1).abs()
        assert (error <= rows.abs().amax(1, keepdim=True) / 127 * 0.5001).all() and error.max() > 0


def test_bytes_are_a_quarter_of_the_file_and_load_into_a_network(tmp_path):
    layer, copy = nn.Linear(256, 256), nn.Linear(256, 256)
    for name, dtype in (("whole", None), ("bytes", torch.int8)): save_weights(tmp_path / name, layer, config={}, dtype=dtype)
    assert (tmp_path / "bytes").stat().st_size < 0.27 * (tmp_path / "whole").stat().st_size
    load_into(copy, tmp_path / "bytes")
    assert copy.weight.dtype == torch.float32 and torch.equal(copy.bias, layer.bias)
    assert (copy.weight - layer.weight).abs().max() <= layer.weight.abs().max() / 127 * 0.5001


def test_names_that_only_look_like_steps_stay():
    state = {"clock": torch.ones(2), "clock.step": torch.ones(3), "small": torch.ones(2, 2, dtype=torch.int8)}
    assert from_bytes(state).keys() == state.keys()


@pytest.mark.parametrize("content", ["no json", "{}", "[]"])
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="index.json is no index of weights"): load_tensors(tmp_path)
