"The play page's parts: ONNX files that equal PyTorch, a runtime that is checked, a GIF that fits, errors in one line."
import base64
import io
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from helpers import refusal
from wmpo_nb import play
from wmpo_nb.demo import Parts, weight_digests
from wmpo_nb.from_scratch import shipped_weights
from wmpo_nb.flow import euler_timesteps
from wmpo_nb.presets import TaskConfig, UserError, load_preset
from wmpo_nb.trajectory import TrajectoryBatch


@pytest.fixture(scope="module")
def parts():
    return Parts(shipped_weights(load_preset("tiny_lift")), load_preset("tiny_lift"))


@pytest.fixture(scope="module")
def exported(parts):
    "{name: (module, inputs, session)} of the three networks."
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra docs")
    torch.manual_seed(0)
    found = play.networks(parts, parts.world_model(), parts.classifier())
    return {name: (module, inputs, onnxruntime.InferenceSession(play.to_onnx(module, inputs), providers=["CPUExecutionProvider"]))
            for name, (module, inputs) in found.items()}


def run(session, inputs) -> torch.Tensor:
    return torch.from_numpy(session.run(["out"], {name: x.numpy() for name, x in inputs.items()})[0])


@pytest.mark.parametrize("name", ["flow", "decoder", "classifier"])
def test_onnx_equals_pytorch(exported, name):
    module, inputs, session = exported[name]
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        fresh = {key: x if key == "timestep" else torch.randn(x.shape, generator=generator) * x.std() + x.mean() for key, x in inputs.items()}
        with torch.no_grad(): want = module(**fresh)
        scale = 255 if name == "decoder" else 1
        assert (run(session, fresh) - want).abs().max() / scale < 1e-4


def test_a_chunk_through_onnx_is_the_world_models(exported, parts):
    _, inputs, session = exported["flow"]
    world_model, x = parts.world_model(), inputs["noisy"]
    times = euler_timesteps(world_model.config.flow_steps, world_model.config.timestep_shift)
    for now, following in zip(times[:-1], times[1:]):
        x = x + run(session, {**inputs, "noisy": x, "timestep": now[None]}) * ((now - following) / 1000)
    want = world_model.imagine(inputs["context"], inputs["actions"], inputs["noisy"])
    assert (x - want).abs().max() < 1e-4
    other = world_model.imagine(inputs["context"], -inputs["actions"], inputs["noisy"])
    assert (want - other).abs().max() > 1e-2, "actions make no difference: the comparison above says nothing"


def test_the_judge_is_the_classifiers_own(exported, parts):
    clip = torch.randint(0, 256, (1, 8, 64, 64, 3), dtype=torch.uint8)
    want = torch.sigmoid(parts.classifier()(play_preprocess(clip, parts)))[0, 1]
    assert (run(exported["classifier"][2], {"clip": clip.float()})[0] - want).abs() < 1e-4


def play_preprocess(clip, parts):
    from wmpo_nb.reward import preprocess
    return preprocess(clip, parts.classifier().config)


def test_a_runtime_with_another_checksum_is_refused(tmp_path, monkeypatch):
    package = play.NpmPackage("somewhere", "1.0.0", "sha512-AAAA")
    (tmp_path / "somewhere-1.0.0.tgz").write_bytes(b"not it")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs npm"): play.fetch_package(package, tmp_path)
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho wrong > somewhere-1.0.0.tgz\n")
    npm.chmod(0o755)
    with pytest.raises(UserError, match="another checksum"): play.fetch_package(package, tmp_path)
    npm.write_text("#!/bin/sh\necho 'npm error 404 no such package' >&2\nexit 1\n")
    with pytest.raises(UserError, match="404 no such package"): play.fetch_package(package, tmp_path)
    assert (tmp_path / "somewhere-1.0.0.tgz").read_bytes() == b"not it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["npm", "somewhere-1.0.0.tgz"], "something was left behind"


@pytest.fixture
def trials():
    "Two noisy trials of 16 steps, of which the second ends after 8."
    frames = torch.randint(0, 256, (2, 17, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one, length = torch.ones(2, dtype=torch.long), torch.tensor([16, 8])
    return TrajectoryBatch(frames, torch.zeros(2, 16, 7), torch.zeros(2, 2, 56, dtype=torch.long), torch.zeros(2, 2, 56),
                           torch.tensor([True, False]), length, length, one, one)


def test_gif_shows_both_worlds(trials, tmp_path):
    path = play.save_gif(tmp_path / "a.gif", trials, trials, scale=1)
    gif = Image.open(path)
    assert gif.size == (2 * 64 + 2, 64) and gif.n_frames == 17 + 9
    assert gif.info["loop"] == 0


def test_gif_is_never_too_large_for_a_readme(trials, tmp_path):
    with pytest.raises(UserError, match="MB"): play.save_gif(tmp_path / "a.gif", trials, trials, scale=10)
    assert not list(tmp_path.iterdir())


def test_page_is_filled_and_its_spec_is_read_back(parts, trials):
    classifier, world_model = parts.classifier(), parts.world_model()
    spec = play.page_spec(parts, world_model, classifier, trials)
    files = {name: b"onnx" for name in ("flow", "decoder", "classifier")}
    text = play.page(spec, files, {"__ORT__": "run()", "__MJS__": play.packed(b"m"), "__WASM__": play.packed(b"w")})
    kept = json.loads(text.split('<script id="spec" type="application/json">')[1].split("</script>")[0])
    assert kept == json.loads(json.dumps(spec))
    assert [len(start["actions"]) for start in kept["starts"]] == [16, 8]
    film = Image.open(io.BytesIO(base64.b64decode(kept["starts"][1]["film"].split(",")[1])))
    assert film.size == (9 * 64, 64)
    assert not [mark for mark in ("__SPEC__", "__FLOW__", "__DECODER__", "__CLASSIFIER__", "__ORT__", "__MJS__", "__WASM__") if mark in text]


def test_arrows_point_where_the_camera_looks():
    task = TaskConfig(camera_position=(0.0, 1.0, 1.2), camera_target=(0.0, 0.0, 0.8))       # from the side, looking towards -y
    found = play.directions(task)
    assert found["away"] == [0, -play.REACH, 0] and found["right"] == [-play.REACH, 0, 0] and found["up"][2] == play.REACH


def test_errors_are_one_line(tmp_path):
    done = subprocess.run([sys.executable, "-c", "from wmpo_nb.play import main; raise SystemExit(main())", "--preset", "coffee_128",
                           "--output", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "too large for a browser" in done.stderr
    with pytest.raises(UserError, match="wmpo-play"): play.show_page(tmp_path / "play.html")


def test_a_run_of_another_task_or_other_weights_is_refused(tmp_path, capsys):
    digests = weight_digests(shipped_weights(load_preset("tiny_lift")), load_preset("tiny_lift"))
    for name, weights, complaint in (("tiny_stack", digests, "--preset"), ("tiny_lift", digests | {"vae.safetensors": "0"}, "--weights"),
                                     ("tiny_lift", digests, "world_model.safetensors")):                    # ours, and not finished
        (tmp_path / "config.json").write_text(json.dumps({"preset": {"name": name}}))
        (tmp_path / "weights.json").write_text(json.dumps(weights))
        assert complaint in refusal(play.main, capsys, "--run", str(tmp_path), "--output", str(tmp_path / "page"))
