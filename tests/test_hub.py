"""wmpo-download against a server on this machine that speaks the hub's HTTP API, and the loaders on what it fetched.

The server holds a miniature of the released tree, with tiny random weights, and misbehaves on request."""
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from wmpo_nb.hub import (REPOSITORY, Released, RemoteFile, convert_states, load_first_frames, load_opensora, load_policy,
                         load_released_world_model, load_states, load_stdit, make_plan, read_data_pickle, save_policy, select)
from wmpo_nb.alignment import load_world_model, save_world_model
from wmpo_nb.hub import Listing
from wmpo_nb.policy import OpenVLAOFT, save_trained, stats_entry
from wmpo_nb.presets import PolicyConfig, RewardConfig, STDiTConfig, UserError, VAEConfig, load_preset
from wmpo_nb.reward import SuccessClassifier, load_pth, load_reward, save_pth
from wmpo_nb.weights import load_tensors, save_tensors
from wmpo_nb.stdit import STDiT
from wmpo_nb.trajectory import ActionStats, Streams, load_stats, save_stats
from wmpo_nb.vae import VAE, load_diffusers, load_vae, save_diffusers

PRESET = replace(
    load_preset("coffee_128"),
    stdit=STDiTConfig(depth=1, hidden_size=16, num_heads=2, in_channels=4, patch_size=(1, 2, 2), text_weights=True, caption_channels=8,
                      model_max_length=6, bf16_positions=True),
    policy=PolicyConfig(image_size=16, patch_size=8, vision_dims=(16, 24), vision_depths=(2, 2), vision_heads=(2, 2),
                        vision_styles=("dinov2", "siglip"), hidden_size=8, intermediate_size=16, num_layers=1, num_heads=2,
                        vocab_size=32064, prompt="In: What action should the robot take to {instruction}?\nOut:",
                        tokenizer="pretrained"),
    reward=RewardConfig(image_size=16, patch_size=8, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32),
    vae=VAEConfig(block_out_channels=(8, 8), scaling_factor=0.13025))
TRAP = 'import pathlib\npathlib.Path("executed").touch()\nraise SystemExit("executed")\n'
TASKS = ("coffee", "square", "stack_three", "three_piece_assembly")


# --- the miniature release -----------------------------------------------------------------------------------------

def write_policy(folder, weights):
    "A HF folder as the fork of transformers writes it, whose JSON files ask for Python of the repository to be run."
    save_tensors(folder, weights, shard_bytes=1_000_000)
    automatic = {"auto_map": {"AutoConfig": "modeling_prismatic.Config", "AutoProcessor": "processing_prismatic.Processor",
                              "AutoTokenizer": ["modeling_prismatic.Tokenizer", None]}}
    (folder / "config.json").write_text(json.dumps(
        {"model_type": "openvla", "architectures": ["OpenVLAForActionPrediction"], "transformers_version": "4.40.1"} | automatic))
    words = "<s> In: What action should the robot take to coffee ? Out: ▁ : In".split()
    tokenizer = Tokenizer(models.WordLevel({word: 1 + i for i, word in enumerate(words)} | {"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "unk_token": "<unk>",
        "processor_class": "PrismaticProcessor", "auto_map": {"AutoProcessor": "processing_prismatic.PrismaticProcessor"}}))
    for name in ("modeling_prismatic.py", "processing_prismatic.py"): (folder / name).write_text(TRAP)


def write_statistics(path, *tasks):
    q = {"q01": [-0.5] * 6 + [-1.0], "q99": [0.5] * 6 + [1.0], "mask": [True] * 6 + [False]}
    path.write_text(json.dumps({f"{task}_d0_300_demos": {"action": q, "num_trajectories": 300} for task in tasks}))


def write_world_models(folder):
    stdit = STDiT(PRESET.stdit)
    for parameter in stdit.parameters(): torch.nn.init.normal_(parameter, std=0.1)
    weights = stdit.state_dict()
    plain = {key: value for key, value in weights.items() if not key.startswith("action_embedder.")}
    save_tensors(folder / "OpenSora-STDiT-v3/model.safetensors", plain)
    run = folder / "OpenX_pretrained/epoch0-global_step1190000"
    half = {key: value.bfloat16() for key, value in weights.items()}
    save_tensors(run / "model", half, shard_bytes=20_000)
    save_tensors(run / "ema.pt", weights | {"pos_embed.table": torch.zeros(2)})
    (run / "optimizer").mkdir()
    (run / "optimizer/state.bin").write_bytes(b"optimizer" * 1000)
    (run / "running_states.json").write_text('{"global_step": 1190000}')
    for task in ("coffee", "square"):
        save_tensors(folder / task / "P_128", half, shard_bytes=20_000)
        save_tensors(folder / task / "P_1280/model.safetensors", half)
        for budget in ("P_128", "P_1280"): (folder / task / budget / "inference_cfg.py").write_text(TRAP)
    save_diffusers(folder / "vae", VAE(PRESET.vae))


def write_release(root):
    "The released tree (reference 12) in small: the same paths and formats."
    torch.manual_seed(0)
    checkpoints = root / "checkpoint_files"
    write_world_models(checkpoints / "world_models")
    policy = OpenVLAOFT(PRESET.policy, ActionStats(*torch.ones(3, 7)), "coffee").state_dict()
    for task in ("coffee", "square"):
        write_policy(checkpoints / "SFT_models" / task, policy)
        write_policy(checkpoints / "WMPO_models" / task / "P_128", {key: -value for key, value in policy.items()})
        write_statistics(checkpoints / "SFT_models" / task / "dataset_statistics.json", task)
    (checkpoints / "reward_models").mkdir()
    reward = SuccessClassifier(PRESET.reward)
    for task in TASKS: save_pth(checkpoints / f"reward_models/videomae_{task}.pth", reward)
    online = {"rm_model_state_dict": {f"module.{key}": value for key, value in reward.state_dict().items()}}
    torch.save(online, checkpoints / "reward_models/videomae_square.pth")
    for name in ("modeling_prismatic.py", "processing_prismatic.py"): (checkpoints / name).write_text(TRAP)
    for number in range(3):
        path = root / f"data_files/first_images/coffee/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(path)
    for name in ("statistics/coffee.json", "rollouts/coffee_1280_demos_dpo/000000.tar", "rollouts/coffee_128/000000.tar",
                 "rollouts/square_128/000000.tar"):
        (root / "data_files" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "data_files" / name).write_bytes(name.encode())


# --- the server ----------------------------------------------------------------------------------------------------

def is_large(path): return not path.endswith((".json", ".py"))


def digest(path, data):
    return hashlib.sha256(data).hexdigest() if is_large(path) else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(ThreadingHTTPServer):
    "Commits of the repository, what was asked of it, and what is to go wrong (by file name, for the next requests)."
    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Answer)
        self.commits, self.main, self.files = {"a" * 40: files}, "a" * 40, files
        self.reset()

    def reset(self):
        self.log, self.token = [], None
        self.flipped, self.cut, self.gone, self.sizes = {}, {}, set(), {}
        self.blocked, self.reached, self.proceed = None, threading.Event(), threading.Event()

    def fetched(self):
        "Names of the files whose content was sent."
        return [path for method, path, _, _ in self.log if method == "GET" and not path.startswith("/api")]


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass
    def do_HEAD(self): self.do_GET()

    def do_GET(self):
        url, hub = urlsplit(self.path), self.server
        path = unquote(url.path)
        api, resolve = f"/api/models/{REPOSITORY}/", f"/{REPOSITORY}/resolve/"
        hub.log.append((self.command, path.rpartition("/cdn/")[2] if "/cdn/" in path else path, self.headers.get("Range"),
                        self.headers.get("Authorization")))
        if path.startswith("/cdn/"): return self.content(path.removeprefix("/cdn/"))
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer(401, b'{"error": "Invalid username or password."}')
        if path.startswith(api + "revision/"): return self.revision(path.removeprefix(api + "revision/"))
        if path.startswith(api + "tree/"): return self.tree(path.removeprefix(api + "tree/"), parse_qs(url.query))
        if path.startswith(resolve): return self.resolve(*path.removeprefix(resolve).split("/", 1))
        self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def answer(self, code, body, headers={}):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items(): self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET": self.wfile.write(body)

    def revision(self, name):
        commit = {"main": self.server.main}.get(name, name)
        if commit not in self.server.commits: return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        self.answer(200, json.dumps({"id": REPOSITORY, "sha": commit, "siblings": []}).encode())

    def tree(self, commit, query):
        "Pages of ten, as the hub has pages of a thousand."
        start, files = int(query.get("cursor", ["0"])[0]), self.server.commits[commit]
        entries = []
        for path, data in sorted(files.items())[start:start + 10]:
            size = self.server.sizes.get(Path(path).name, len(data))
            entry = {"type": "file", "path": path, "size": size, "oid": hashlib.sha1(data).hexdigest()}
            if is_large(path): entry["lfs"] = {"oid": digest(path, data), "size": size, "pointerSize": 130}
            else: entry["oid"] = digest(path, data)
            entries.append(entry)
        more = f"http://{self.headers['Host']}/api/models/{REPOSITORY}/tree/{commit}?recursive=True&cursor={start + 10}"
        self.answer(200, json.dumps(entries).encode(), {"Link": f'<{more}>; rel="next"'} if start + 10 < len(files) else {})

    def resolve(self, commit, path):
        data = self.server.commits.get(commit, {}).get(path)
        if data is None or Path(path).name in self.server.gone:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest(path, data)}"'}
        if not is_large(path): return self.answer(200, data, headers)
        # large files live elsewhere: another host, to which no token may be sent
        headers |= {"X-Linked-Etag": f'"{digest(path, data)}"', "X-Linked-Size": len(data)}
        self.answer(302, b"", headers | {"Location": f"http://localhost:{self.server.server_port}/cdn/{commit}/{path}"})

    def content(self, path):
        hub, name = self.server, Path(path).name
        commit, _, path = path.partition("/")
        data = hub.commits[commit][path]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if hub.flipped.get(name, 0):
            hub.flipped[name] -= 1
            data = bytes([data[0] ^ 1]) + data[1:]
        self.send_response(206 if start else 200)
        if start: self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD": return
        half = len(data) // 2
        if name == hub.blocked:
            self.wfile.write(data[start:half])
            self.wfile.flush()
            hub.reached.set()
            hub.proceed.wait(30)
            self.close_connection = True
        elif hub.cut.pop(name, False):
            self.wfile.write(data[start:half])
            self.close_connection = True
        else: self.wfile.write(data[start:])


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("release")
    write_release(root)
    server = Hub({path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(autouse=True)
def clean_hub(hub):
    "No test sees what another one let go wrong; nor do the fixtures that a later test sets up first."
    hub.log.clear()
    yield
    hub.reset()


# --- the command, in processes of its own --------------------------------------------------------------------------

LOOP = """
import contextlib, io, json, os, sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1000               # a connection is continued from the last whole piece: 10 MB, here 1 kB
from wmpo_nb.hub import main
for line in sys.stdin:
    argv, token = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if token: os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: code = main(argv)
        except SystemExit as stop: code = stop.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
ONCE = "import sys; from wmpo_nb.hub import main; sys.exit(main(sys.argv[1:]))"


def environment(endpoint, home, **more):
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy") and not name.startswith("HF_")}
    return kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                   "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"} | more


class Command:
    "A process that runs `wmpo-download` as often as it is asked to: (exit code, stdout, stderr)."
    def __init__(self, endpoint, home, **more):
        self.process = subprocess.Popen([sys.executable, "-c", LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, env=environment(endpoint, home, **more), cwd=home)

    def __call__(self, cache, *options, task="coffee", token=None):
        argv = ["--task", task, "--cache", str(cache), *options]
        self.process.stdin.write(json.dumps([argv, token]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def download(hub, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    (home / "token").write_text("a token on the disk, which is nobody's business")
    command = Command(f"http://127.0.0.1:{hub.server_port}", home)
    yield command
    command.close()


@pytest.fixture(scope="module")
def cache(download, tmp_path_factory):
    "Everything of coffee at P = 128, fetched once."
    folder = tmp_path_factory.mktemp("cache")
    code, out, err = download(folder, "--parts", "sft,wmpo,world_model,reward,vae,data,pretrained")
    assert code == 0, err
    return folder


@pytest.fixture(scope="module")
def released(cache): return Released(cache / "models--fangqi--WMPO/snapshots" / ("a" * 40), "coffee")


def content(root): return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def one_line(answer, *parts):
    "The command failed as a user's mistake does: exit code 2 and one line that says all of `parts`."
    code, _, err = answer
    assert code == 2 and len(err.strip().splitlines()) == 1, answer
    for part in parts: assert part in err


def test_fetches_what_was_asked_for_and_nothing_else(hub, download, tmp_path):
    code, out, err = download(tmp_path, "--parts", "reward,vae")
    root = tmp_path / "models--fangqi--WMPO/snapshots" / hub.main
    wanted = {path for path in hub.files if path.startswith("checkpoint_files/world_models/vae/") or path.endswith("videomae_coffee.pth")}
    assert code == 0 and content(root) == {path: hub.files[path] for path in wanted}
    assert {path.rpartition(hub.main + "/")[2] for path in hub.fetched()} == wanted
    assert re.search(r"^total +3 ", out, re.M) and "3 files verified" in out


def test_all_parts_of_one_task_and_budget(hub, released):
    fetched = content(released.root)
    assert all(hub.files[path] == data for path, data in fetched.items())
    for path in hub.files:
        unwanted = "square" in path or "1280" in path or "/optimizer/" in path or "OpenSora" in path or "videomae_s" in path \
            or "videomae_t" in path or path.startswith(("checkpoint_files/modeling", "checkpoint_files/processing"))
        assert (path in fetched) != unwanted, path
    assert released.wmpo.is_dir() and released.stats.is_file() and released.first_images.is_dir()


def test_sizes_are_shown_before_anything_is_fetched(hub, download, tmp_path):
    code, out, _ = download(tmp_path, "--parts", "reward,world_model", "--dry-run")
    size = sum(len(data) for path, data in hub.files.items() if path.endswith("videomae_coffee.pth"))
    assert code == 0 and not hub.fetched() and f"{size / 1000:.1f} kB" in out
    assert not list(tmp_path.rglob("snapshots"))


def test_a_second_command_fetches_and_changes_nothing(hub, download, cache, released):
    stamps = {path: path.stat().st_mtime_ns for path in released.root.rglob("*")}
    code, out, _ = download(cache, "--parts", "sft,reward")
    assert code == 0 and not hub.log and re.search(r"^total .* 0 B$", out, re.M)
    assert stamps == {path: path.stat().st_mtime_ns for path in released.root.rglob("*")}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=lambda how: how.name)
def test_interrupted_and_resumed(hub, download, tmp_path, how):
    hub.blocked = "diffusion_pytorch_model.safetensors"
    argv = [sys.executable, "-c", ONCE, "--task", "coffee", "--parts", "reward,vae", "--cache", str(tmp_path / "cache")]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)          # a background job is born deaf to it
    process = subprocess.Popen(argv, env=environment(f"http://127.0.0.1:{hub.server_port}", tmp_path), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed)
    root = tmp_path / "cache/models--fangqi--WMPO/snapshots" / hub.main
    assert hub.reached.wait(30)
    process.send_signal(how)
    out, err = process.communicate()                       # at once: the server is still silent
    hub.proceed.set()
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), err
    assert len(content(root)) == 2                         # and half a file is not mistaken for one
    hub.reset()
    code, out, err = download(tmp_path / "cache", "--parts", "reward,vae")
    assert code == 0 and [Path(path).name for path in hub.fetched() if "/resolve/" not in path] == ["diffusion_pytorch_model.safetensors"]
    fetched = content(root)
    assert len(fetched) == 3 and fetched.items() <= hub.files.items()


def test_a_broken_connection_goes_on_at_its_byte(hub, download, tmp_path):
    hub.cut["videomae_coffee.pth"] = True
    code, _, err = download(tmp_path, "--parts", "reward")
    size = len(hub.files["checkpoint_files/reward_models/videomae_coffee.pth"])
    assert code == 0, err
    assert [r for _, _, r, _ in hub.log if r] == [f"bytes={size // 2 // 1000 * 1000}-"]


def test_damaged_on_the_way(hub, download, tmp_path):
    hub.flipped["videomae_coffee.pth"] = 1
    assert download(tmp_path, "--parts", "reward")[0] == 0
    assert list(content(tmp_path / "models--fangqi--WMPO/snapshots").values()) == [hub.files["checkpoint_files/reward_models/videomae_coffee.pth"]]
    hub.flipped["videomae_coffee.pth"] = 9
    one_line(download(tmp_path / "again", "--parts", "reward"), "videomae_coffee.pth", "damaged twice")
    assert not content(tmp_path / "again/models--fangqi--WMPO/snapshots")


@pytest.mark.parametrize("name", ["videomae_coffee.pth", "config.json"])
def test_damaged_on_the_disk(hub, download, tmp_path, name):
    "Large files are known by their sha256, small ones by git's sha1."
    part = {"videomae_coffee.pth": "reward", "config.json": "vae"}[name]
    assert download(tmp_path, "--parts", part)[0] == 0
    path = next((tmp_path / "models--fangqi--WMPO/snapshots").rglob(name))
    good = path.read_bytes()
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    hub.reset()
    one_line(download(tmp_path, "--parts", part, "--offline"), name, "is damaged")
    assert not hub.log
    assert download(tmp_path, "--parts", part)[0] == 0 and path.read_bytes() == good
    assert {Path(path).name for path in hub.fetched()} == {name}         # and only this one was fetched again


def test_a_file_that_is_gone(hub, download, tmp_path):
    hub.gone.add("videomae_coffee.pth")
    one_line(download(tmp_path, "--parts", "reward"), "gone", "--revision")


def test_a_part_that_was_never_there(hub, download, tmp_path):
    one_line(download(tmp_path, "--parts", "sft", task="stack_three"), "SFT_models/stack_three", "--parts")
    assert not hub.fetched()


def test_no_space(hub, download, tmp_path):
    hub.sizes["videomae_coffee.pth"] = 10**18
    one_line(download(tmp_path, "--parts", "reward"), "1000000.0 TB to fetch", "--cache")
    assert not hub.fetched()


def test_offline(hub, download, cache, released, tmp_path):
    code, out, _ = download(cache, "--parts", "world_model", "--offline")
    assert code == 0 and str(released.root) in out and not hub.log
    one_line(download(tmp_path, "--parts", "reward", "--offline"), "run once without --offline")
    copy = shutil.copytree(cache, tmp_path / "copy", symlinks=True)
    next((copy / "models--fangqi--WMPO/snapshots").rglob("videomae_coffee.pth")).unlink()
    one_line(download(copy, "--parts", "reward", "--offline"), "videomae_coffee.pth")
    assert not hub.log


def test_no_network(cache, tmp_path):
    "What is in the cache needs no connection; what is not is answered with what to do."
    command = Command("http://127.0.0.1:9", tmp_path)
    try:
        assert command(cache, "--parts", "reward,vae")[0] == 0
        one_line(command(tmp_path / "empty", "--parts", "reward"), "127.0.0.1:9", "connection")
    finally: command.close()


def test_token_from_the_environment_only(hub, download, tmp_path):
    hub.token = "hf_secret"
    one_line(download(tmp_path, "--parts", "reward"), "HF_TOKEN")
    assert not any(authorization for *_, authorization in hub.log)       # not the one on the disk either
    assert download(tmp_path, "--parts", "reward", token="hf_secret")[0] == 0
    elsewhere = [a for method, path, _, a in hub.log if path.startswith(hub.main)]
    assert elsewhere and not any(elsewhere)                              # nor to the host of the large files
    assert not any(b"hf_secret" in data for data in content(tmp_path).values())


def test_the_revision_is_pinned(hub, download, tmp_path):
    old, new, vae = hub.main, "b" * 40, "checkpoint_files/world_models/vae/config.json"
    hub.commits[new] = hub.files | {vae: hub.files[vae] + b"\n"}
    assert download(tmp_path, "--parts", "reward")[0] == 0
    try:
        hub.main = new
        assert download(tmp_path, "--parts", "vae")[0] == 0              # main has moved, we have not
        snapshots = tmp_path / "models--fangqi--WMPO/snapshots"
        assert [path.name for path in snapshots.iterdir()] == [old] and (snapshots / old / vae).read_bytes() == hub.files[vae]
        assert download(tmp_path, "--parts", "vae", "--revision", "main")[0] == 0
        assert (snapshots / new / vae).read_bytes() == hub.commits[new][vae]
        one_line(download(tmp_path, "--parts", "vae", "--revision", "v9"), "no revision 'v9'")
    finally: hub.main = old


def test_wrong_words(hub, download, tmp_path):
    one_line(download(tmp_path, task="cofee"), "Did you mean 'coffee'")
    one_line(download(tmp_path, "--parts", "sft,rewards"), "Did you mean 'reward'")
    one_line(download(tmp_path, "--budget", "64"), "unknown budget '64'")
    assert not hub.log


def test_the_other_budget_and_the_optimiser_stay():
    paths = ["data_files/rollouts/coffee_128/0.tar", "data_files/rollouts/coffee_1280/0.tar", "data_files/first_images/coffee/1280.png",
             "checkpoint_files/world_models/coffee/P_1280/epoch0-global_step128/model/a.safetensors",
             "checkpoint_files/world_models/coffee/P_1280/epoch0-global_step128/optimizer/a.bin"]
    files = [RemoteFile(path, 1, "0" * 40) for path in paths]
    assert {f.path for f in select(files, "data", "coffee", 128)} == {paths[0], paths[2]}
    assert {f.path for f in select(files, "data", "coffee", 1280)} == {paths[1], paths[2]}
    assert [f.path for f in select(files, "world_model", "coffee", 1280)] == [paths[3]]


def test_a_shared_file_is_counted_once(hub):
    files = [RemoteFile(path, len(data), digest(path, data)) for path, data in hub.files.items()]
    plan = make_plan(Listing("a" * 40, files), "coffee", ["sft", "wmpo"], 128)
    assert sum(f.path.endswith("dataset_statistics.json") for part in plan.values() for f in part) == 1


# --- the loaders, on what was fetched ------------------------------------------------------------------------------

def same(one, other):
    return one.keys() == other.keys() and all(one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one)


def file_tensors(path): return {key: value for key, value in load_tensors(path).items() if not key.startswith("pos_embed")}


@pytest.mark.parametrize("form", ["shards", "training", "ema", "single"])
def test_stdit(released, hub, tmp_path, form):
    training = released.checkpoints / "world_models/OpenX_pretrained"
    path = {"shards": released.world_model, "training": training, "ema": training / "epoch0-global_step1190000/ema.pt",
            "single": tmp_path / "one.safetensors"}[form]
    if form == "single": path.write_bytes(hub.files["checkpoint_files/world_models/coffee/P_1280/model.safetensors"])
    stdit = load_stdit(path, PRESET.stdit)
    stored = file_tensors(training / "epoch0-global_step1190000/model" if form == "training" else path)
    assert same(stdit.state_dict(), stored)
    back = tmp_path / {"shards": "back", "training": "back/model", "ema": "back.pt", "single": "back.safetensors"}[form]
    save_tensors(back, stdit.state_dict(), shard_bytes=20_000)
    assert same(file_tensors(back), stored)
    if form == "single": assert back.read_bytes() == path.read_bytes()
    assert stdit.rope.freqs.requires_grad is False and not stdit.training


def test_released_world_model_dreams(released):
    world_model = load_released_world_model(released.world_model, PRESET, torch.float32)
    latents = torch.randn(1, 4, 12, 4, 4)
    dream = world_model.imagine(latents[:, :, :4], torch.zeros(1, 8, 7), latents[:, :, 4:], steps=2)
    assert dream.shape == (1, 4, 8, 4, 4) and dream.isfinite().all()


def test_stdit_follows_the_unused_text_weights(released, tmp_path):
    stored = file_tensors(released.world_model)
    bare = {key: value for key, value in stored.items() if not re.search("cross_attn|fps_embedder|y_embedder", key)}
    save_tensors(tmp_path / "bare.safetensors", bare)
    assert same(load_stdit(tmp_path / "bare.safetensors", PRESET.stdit).state_dict(), bare)
    longer = replace(PRESET.stdit, model_max_length=300)
    assert same(load_stdit(released.world_model, longer).state_dict(), stored)


def test_stdit_refusals(released, hub, tmp_path):
    with pytest.raises(UserError, match=r"in the file and .* in the network"):
        load_stdit(released.world_model, replace(PRESET.stdit, hidden_size=32))
    plain = tmp_path / "plain.safetensors"
    plain.write_bytes(hub.files["checkpoint_files/world_models/OpenSora-STDiT-v3/model.safetensors"])
    with pytest.raises(UserError, match="action_embedder.* is missing"): load_stdit(plain, PRESET.stdit)
    started = load_opensora(plain, PRESET.stdit).state_dict()
    assert all(torch.equal(started[key], value) for key, value in load_tensors(plain).items())
    broken = shutil.copytree(released.world_model, tmp_path / "broken")
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{shard.name} is truncated"): load_stdit(broken, PRESET.stdit)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"): load_stdit(broken, PRESET.stdit)
    with pytest.raises(UserError, match="not found"): load_stdit(tmp_path / "nowhere", PRESET.stdit)


def test_policy_loads_and_acts_without_running_its_python(released, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = load_policy(released.sft, PRESET)
    assert same(policy.state_dict(), file_tensors(released.sft))
    frames = torch.zeros(1, 256, 256, 3, dtype=torch.uint8)
    chunk = policy.act(frames, Streams(0, [0], [0]), 1.0)
    _, prompt = policy._prompt
    assert prompt[0] == 1 and prompt[-1] == 29871 and len(prompt) > 9
    assert chunk.actions.shape == (1, 8, 7) and chunk.actions[..., :6].abs().max() <= 0.5
    assert not Path("executed").exists() and not any("prismatic" in name for name in sys.modules)


def test_policy_saved_back(released, tmp_path):
    policy = load_policy(released.wmpo, PRESET, stats=released.stats)
    save_policy(tmp_path / "back", policy, like=released.wmpo, shard_bytes=1_000_000)
    written, original = content(tmp_path / "back"), content(released.wmpo)
    assert {name for name in original if not name.endswith(".py")} == set(written)
    for name, data in written.items():
        if name.endswith(".safetensors"): assert data == original[name]
    assert same(load_policy(tmp_path / "back", PRESET, stats=released.stats, dtype=None).state_dict(), policy.state_dict())


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename_keys(folder):
    weights = {f"model.{key}": value for key, value in load_tensors(folder).items()}
    for path in folder.glob("*.safetensors*"): path.unlink()
    save_tensors(folder, weights)


@pytest.mark.parametrize("change, complaint", [
    (lambda f: (f / "action_head--150000_checkpoint.pt").touch(), "L1 head.*Use a discrete policy"),
    (lambda f: (f / "noisy_action_projector--1_checkpoint.pt").touch(), "diffuses its actions"),
    (lambda f: (f / "proprio_projector--1_checkpoint.pt").touch(), "robot's joints"),
    (lambda f: save_tensors(f / "extra.safetensors", {"x": torch.zeros(1)}) or rename_index(f), "L1 head"),
    (lambda f: change_config(f, transformers_version="4.57.1"), "transformers 4.57.1.*moojink/transformers-openvla-oft"),
    (lambda f: change_config(f, transformers_version="4.4.0"), "transformers 4.4.0"),
    (rename_keys, "other key names"),
    (lambda f: change_config(f, model_type="llava"), "'llava' policy"),
    (lambda f: write_statistics(f / "dataset_statistics.json", "square", "stack_three"), "coffee_d0_300_demos.*square_d0_300_demos"),
    (lambda f: save_stats(f / "dataset_statistics.json", load_stats(f / "dataset_statistics.json"), "bridge_orig"), "coffee_d0_300_demos.*bridge_orig"),
    (lambda f: (f / "dataset_statistics.json").unlink(), "no dataset_statistics.json.*started from"),
    (lambda f: next(f.glob("model-00002*")).unlink(), "model-00002.*is missing"),
    (lambda f: (f / "model.safetensors.index.json").unlink(), "no index"),
], ids=["l1", "diffusion", "proprio", "l1-keys", "transformers", "4.4", "keys", "llava", "unnorm-key", "other-robot", "no-stats", "shard", "index"])
def test_policies_that_are_refused(released, tmp_path, change, complaint):
    folder = shutil.copytree(released.sft, tmp_path / "policy")
    change(folder)
    with pytest.raises(UserError, match=complaint): load_policy(folder, PRESET)


def rename_index(folder):
    "An action head among the weights themselves."
    (folder / "extra.safetensors").unlink()
    save_tensors(folder / "head.safetensors", {"action_head.model.fc1.weight": torch.zeros(1)})
    path = folder / "model.safetensors.index.json"
    record = json.loads(path.read_text())
    record["weight_map"]["action_head.model.fc1.weight"] = "head.safetensors"
    path.write_text(json.dumps(record))


def test_policy_of_another_size(released):
    wrong = replace(PRESET, policy=replace(PRESET.policy, intermediate_size=24))
    with pytest.raises(UserError, match="gate_proj.* in the file and .* in the network"): load_policy(released.sft, wrong)


def test_one_loader_of_each_kind_takes_what_was_released(released, tmp_path):
    "What the commands call: sizes come from the preset, everything else from the file; our own files need no preset."
    epoch = released.checkpoints / "world_models/OpenX_pretrained/epoch0-global_step1190000"
    shards, average = (load_world_model(path, preset=PRESET) for path in (released.world_model, epoch / "ema.pt"))
    assert shards.config == PRESET.world_model and not shards.training
    assert next(shards.parameters()).dtype == torch.bfloat16 and next(average.parameters()).dtype == torch.float32
    again = load_world_model(epoch.parent, preset=PRESET, dtype=torch.float32)
    assert same(again.state_dict(), load_world_model(epoch, preset=PRESET, dtype=torch.float32).state_dict())
    save_world_model(tmp_path / "ours.safetensors", again)
    assert same(load_world_model(tmp_path / "ours.safetensors").state_dict(), again.state_dict())
    for field in ("context_frames", "chunk_size", "image_size"):                 # no tensor has a shape that would tell
        other = replace(PRESET.world_model, **{field: getattr(PRESET.world_model, field) * 2})
        with pytest.raises(UserError, match=f"was trained with world_model.{field}"): load_world_model(tmp_path / "ours.safetensors", other)
    assert load_world_model(tmp_path / "ours.safetensors", replace(PRESET.world_model, flow_steps=7)).config.flow_steps == 7
    with pytest.raises(UserError, match="name its --preset"): load_world_model(released.world_model)
    with pytest.raises(UserError, match="in the file and"): load_world_model(epoch, preset=replace(PRESET, stdit=replace(PRESET.stdit, hidden_size=32)))
    assert load_vae(released.vae).config == PRESET.vae
    assert load_reward(released.reward, preset=PRESET).config.threshold == PRESET.reward.threshold


def test_a_trained_policy_keeps_its_format(released, tmp_path):
    "Written over an older one, with borrowed statistics, it is a released policy again."
    policy = load_policy(released.wmpo, PRESET, stats=released.stats)
    for _ in range(2): save_trained(tmp_path / "policy", policy, released.wmpo, released.stats)
    back = load_policy(tmp_path / "policy", PRESET)
    assert same(back.state_dict(), policy.state_dict()) and torch.equal(back.stats.q99, policy.stats.q99)
    assert not list((tmp_path / "policy").glob("*.py")) and (tmp_path / "policy/dataset_statistics.json").read_bytes() == released.stats.read_bytes()


def test_the_entry_of_the_statistics(released, tmp_path):
    "Released files name the task; ours have one entry under the preset's instruction; statistics of anything else are asked for the task, and refused."
    square, tiny = load_preset("square_1280_paper"), load_preset("tiny_lift")
    write_statistics(tmp_path / "two.json", "coffee", "square")
    assert stats_entry(tmp_path / "two.json", square) == "square_d0_300_demos" and stats_entry(released.stats, tiny) is None
    (tmp_path / "ours.json").write_text(json.dumps({square.task.instruction: {}}))
    (tmp_path / "other.json").write_text('{"lift": {}}')
    assert stats_entry(tmp_path / "other.json", square) == "square_d0_300_demos"
    assert stats_entry(tmp_path / "ours.json", square) is None and stats_entry(tmp_path / "none.json", square) is None


def test_reward_in_both_layouts(released, hub, tmp_path):
    online = tmp_path / "online.pth"
    online.write_bytes(hub.files["checkpoint_files/reward_models/videomae_square.pth"])
    plain = load_reward(released.reward, PRESET.reward)
    assert same(plain.state_dict(), load_pth(released.reward))
    assert same(load_reward(online, PRESET.reward).state_dict(), plain.state_dict())
    save_pth(tmp_path / "back.pth", plain)
    assert same(torch.load(tmp_path / "back.pth", weights_only=True), torch.load(released.reward, weights_only=True))


def test_reward_refusals(released, tmp_path):
    with pytest.raises(UserError, match="configuration of a preset"): load_reward(released.reward)
    with pytest.raises(UserError, match="in the file and"): load_reward(released.reward, replace(PRESET.reward, hidden_size=32))
    torch.save({"a": Attack(tmp_path / "executed")}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="more than tensors"): load_reward(tmp_path / "bad.pth", PRESET.reward)
    assert not (tmp_path / "executed").exists()


def test_vae(released, tmp_path):
    vae = load_diffusers(released.vae)
    assert vae.config == PRESET.vae
    save_diffusers(tmp_path / "back", vae)
    assert content(tmp_path / "back") == content(released.vae)
    weights = load_tensors(released.vae)
    save_tensors(tmp_path / "back/diffusion_pytorch_model.safetensors", {key: weights[key] for key in list(weights)[1:]})
    with pytest.raises(UserError, match=f"see '{list(weights)[0]}'"): load_diffusers(tmp_path / "back")
    with pytest.raises(UserError, match="config.json is missing"): load_diffusers("stabilityai/sdxl-vae")


def test_first_frames(released):
    states = load_first_frames(released.first_images)
    assert [(s.state_id, int(s.frame[0, 0, 0])) for s in states] == [(0, 0), (1, 1), (2, 2)] and states[0].frame.dtype == torch.uint8


# --- pickles of states ---------------------------------------------------------------------------------------------

class Attack:
    "A pickle of this creates the file `marker` when an ordinary reader opens it."
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_states_are_converted_once(tmp_path, protocol):
    states = [{"states": np.random.default_rng(i).normal(size=7), "model": f"<mujoco model='é{i}'/>", "seed": np.int64(i)} for i in range(4)]
    (tmp_path / "coffee_d0_states.pkl").write_bytes(pickle.dumps(states, protocol))
    convert_states(tmp_path / "coffee_d0_states.pkl", tmp_path / "coffee.npz")
    vectors, scenes = load_states(tmp_path / "coffee.npz")
    assert vectors.dtype == np.float64 and vectors.tobytes() == b"".join(s["states"].tobytes() for s in states)
    assert scenes == [s["model"] for s in states]


@pytest.mark.parametrize("array", [np.arange(6, dtype=np.float32).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)),
                                   np.arange(3, dtype=">f8"), np.array([True, False]), np.zeros((0, 2)), np.array(1.5)],
                         ids=["2d", "fortran", "big-endian", "bool", "empty", "scalar"])
def test_arrays_survive(tmp_path, array):
    for protocol in (2, 4, 5):
        (tmp_path / "array.pkl").write_bytes(pickle.dumps({"x": array}, protocol))
        read = read_data_pickle(tmp_path / "array.pkl")["x"]
        assert read.shape == array.shape and read.dtype == array.dtype and np.array_equal(read, array)


def old_numpy(data): return data.replace(b"numpy._core", b"numpy.core")


def test_pickles_of_numpy_1(tmp_path):
    (tmp_path / "old.pkl").write_bytes(old_numpy(pickle.dumps([np.arange(3.0)], 2)))
    assert np.array_equal(read_data_pickle(tmp_path / "old.pkl")[0], np.arange(3.0))


def itself():
    loop = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize("value", [
    {1, 2}, b"bytes", 1j, None, (1, 2), OrderedDict(a=1), io.StringIO("x"), Path("x"), print, Streams, np.array(["text"]),
    np.array([{}], dtype=object), np.array(["2026-01-01"], dtype="M8[D]"), np.zeros(2, dtype=[("a", "f8")]), np.zeros, itself()], ids=lambda value: type(value).__name__)
def test_anything_but_data_is_refused(tmp_path, value):
    try: data = pickle.dumps([value])
    except TypeError: pytest.skip("cannot be pickled at all")
    (tmp_path / "bad.pkl").write_bytes(data)
    with pytest.raises(UserError, match="refused"): read_data_pickle(tmp_path / "bad.pkl")


def test_attacks_and_damage(tmp_path):
    path, marker = tmp_path / "bad.pkl", tmp_path / "executed"
    good = pickle.dumps([{"states": np.arange(3.0), "model": "<mujoco/>"}])
    by_hand = [b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.", b"cbuiltins\neval\n(S'1'\ntR.",
               b"cnumpy.core.multiarray\n_reconstruct\n(cos\nsystem\n(I0\ntS'b'\ntR.", b"cnumpy\nload\n(S'x'\ntR.", b"Pname\n.",
               b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR."]
    for data in (pickle.dumps(Attack(marker)), pickle.dumps({"x": np.array([Attack(marker)], dtype=object)}), *by_hand,
                 good[:-20], b"", b"not a pickle", good.replace(b"f8", b"O8")):
        path.write_bytes(data)
        with pytest.raises(UserError): convert_states(path, tmp_path / "out.npz")
    for records in ([{"states": np.arange(3.0)}], {"states": 1}, [], [{"states": np.arange(3.0), "model": 5}],
                    [{"states": np.arange(n), "model": ""} for n in (2, 3)]):
        path.write_bytes(pickle.dumps(records))
        with pytest.raises(UserError, match="no list of states"): convert_states(path, tmp_path / "out.npz")
    assert not marker.exists() and not (tmp_path / "out.npz").exists()


def test_every_downloaded_file_is_as_it_came(hub, released):
    "After everything above: no loader writes into the cache."
    assert content(released.root).items() <= hub.files.items()
    assert not list(released.root.rglob("__pycache__"))
