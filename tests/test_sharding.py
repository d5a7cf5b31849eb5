"One copy of the policy spread over two processes (FSDP2 on the CPU): the same results, and nobody ever holds it whole."

import shutil

import cluster_work
import pytest
import sharding_work
import soak
import torch
from test_cluster import ROOT, accelerate
from torch.distributed.checkpoint import FileSystemReader

from wmpo_nb.alignment import load_world_model
from wmpo_nb.policy import OpenVLAOFT
from wmpo_nb.presets import UserError


def launch(folder, task, processes=2, *options):
    "The `task` of `sharding_work.py` on `folder`, in so many processes that share one copy of the weights."
    run = accelerate("--config_file", ROOT / "configs/accelerate/fsdp2_cpu_2.yaml", "--main_process_port", 0, "--num_processes", processes,
                     *options, sharding_work.__file__, folder, task, ACCELERATE_USE_CPU="true")
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    "What one process with whole weights has found and what each of two with half of them, and the folder of the two."
    alone, two = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("two")
    launch(two, "work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WMPO_PRECISION", "fp32")
        history = []
        whole = {"policy": cluster_work.practise(alone / "whole", 3, history), "sft": cluster_work.weights(sharding_work.clone(alone / "sft", 4)),
                 "online": cluster_work.spend(alone / "online"), "dpo": cluster_work.prefer(alone / "dpo"),
                 "adapters": cluster_work.practise(alone / "adapters", 2, **sharding_work.FRUGAL), "history": history,
                 "world_model": cluster_work.dream(decay_steps=0), "exam": cluster_work.examine()}
    return whole, [torch.load(two / f"found_{rank}.pt", weights_only=True) for rank in (0, 1)], two


def test_each_process_holds_half(found):
    for each in found[1]:
        held, total = each["held"]
        assert each["processes"] == 2 and 0.4 * total < held < 0.6 * total


def test_weights_are_gathered_twice_or_once(found, tmp_path):
    "ZeRO-2 keeps the blocks whole between the two passes. What is learnt does not depend on it, to the last bit."
    launch(tmp_path, "between", 2, "--fsdp_reshard_after_forward", "false")
    for rank, twice in enumerate(found[1]):
        once = torch.load(tmp_path / f"found_{rank}.pt", weights_only=True)
        (dropped, total), (kept, _) = twice["between"], once["between"]
        # what lies outside the blocks stays whole in both cases, and the last vision block is never computed
        assert dropped < 0.8 * total and kept > 0.95 * total
        assert torch.equal(once["policy"], twice["policy"])


@pytest.mark.parametrize("stage", ["policy", "online", "dpo", "sft", "adapters", "world_model"])
def test_sharded_processes_learn_the_same(found, stage):
    alone, two, _ = found
    assert torch.equal(two[0][stage], two[1][stage])
    torch.testing.assert_close(two[0][stage], alone[stage], atol=1e-5, rtol=0)
    assert two[0]["history"][0]["grad_norm"] == pytest.approx(alone["history"][0]["grad_norm"], rel=1e-4), "clipped by the norm of all slices"


def test_a_sharded_run_is_resumed_to_the_same_bits(found):
    for each in found[1]:
        assert torch.equal(each["policy"], each["resumed"])
        for stage in ("online", "dpo", "sft", "world_model"): assert torch.equal(each[stage], each[f"{stage}_resumed"]), stage


def test_checkpoints_hold_slices_and_no_whole(found):
    folder = found[2]
    for name in ("whole", "sft", "online", "dpo", "world_model"):
        newest = sorted((folder / name).glob("step_*"))[-1]
        slices = sorted((newest / "shards").glob("*.distcp"))
        assert len(slices) == 2 and min(path.stat().st_size for path in slices) > 0.8 * max(path.stat().st_size for path in slices)
        assert not {"policy", "world_model", "ema", "optimizer"} & torch.load(newest / "state.pt", weights_only=True)["objects"].keys()
        assert len(list((folder / name).glob("step_*"))) == 2 and not list((folder / name).glob("*.tmp")), "pruned, and complete"
    adapters = FileSystemReader(sorted((folder / "adapters").glob("step_*"))[-1] / "shards").read_metadata().state_dict_metadata
    kept = [key for key in adapters if key.startswith(("policy.", "optimizer.state."))]
    assert kept and all(".lora_" in key for key in kept), "more than the adapters"


def test_what_is_saved_is_whole(found):
    _, two, folder = found
    assert torch.equal(cluster_work.weights(load_world_model(folder / "world_model.safetensors")), two[0]["world_model"])
    policy = OpenVLAOFT.from_pretrained(folder / "policy")
    assert torch.equal(cluster_work.weights(policy), two[0]["sft"])


def test_a_sharded_checkpoint_is_not_taken_for_a_whole_one(found):
    with pytest.raises(UserError, match="written with sharding.*as it was launched"): cluster_work.practise(found[2] / "whole", 3)


def test_processes_with_unequally_many_batches_examine_a_shared_policy(found):
    for each in found[1]: assert torch.equal(each["exam"], found[0]["exam"])


def test_a_damaged_slice_is_skipped_or_refused(found, tmp_path):
    for name, count in (("last", 1), ("all", 2)):
        shutil.copytree(found[2] / "sft", tmp_path / name)
        for checkpoint in sorted((tmp_path / name).glob("step_*"))[-count:]:
            cut = sorted((checkpoint / "shards").glob("*.distcp"))[0]
            cut.write_bytes(cut.read_bytes()[:cut.stat().st_size // 2])
    launch(tmp_path, "damaged")
    for rank, whole in enumerate(found[1]):
        each = torch.load(tmp_path / f"found_{rank}.pt", weights_only=True)
        assert torch.equal(each["skipped"], whole["sft"]) and "no checkpoint in" in each["refused"]


def test_three_processes_go_on_with_the_slices_of_two(found, tmp_path):
    _, two, folder = found
    launch(folder, "resume", processes=3)
    longer = cluster_work.practise(tmp_path, 4)
    for rank in range(3):
        each = torch.load(folder / f"found_{rank}.pt", weights_only=True)
        assert torch.equal(each["read"], two[0]["policy"])
        torch.testing.assert_close(each["longer"], longer, atol=2e-5, rtol=0)


def test_the_command_shards_and_writes_the_same_policy(tmp_path, monkeypatch):
    "wmpo-train in a dream of random networks, from the files to the saved policy."
    monkeypatch.setenv("WMPO_PRECISION", "fp32")
    soak.make_parts(tmp_path)
    alone, two = ([*soak.command("grpo", tmp_path, tmp_path / name), "--grpo.iterations", "2"] for name in ("alone", "two"))
    soak.finish(alone)
    run = accelerate("--config_file", ROOT / "configs/accelerate/fsdp2_cpu_2.yaml", "--main_process_port", 0, *two[1:], ACCELERATE_USE_CPU="true")
    assert run.returncode == 0, run.stderr[-3000:]
    policies = [OpenVLAOFT.from_pretrained(tmp_path / name / "policy") for name in ("alone", "two")]
    torch.testing.assert_close(*map(cluster_work.weights, policies), atol=1e-5, rtol=0)
    assert (tmp_path / "two/videos/grpo_000000.gif").exists() and len(list((tmp_path / "two/checkpoints").glob("step_*/shards/*.distcp"))) == 4


def test_muon_is_refused(found):
    assert all("use adamw" in each["muon"] for each in found[1])
