"Every shipped weight file and every data set has a card that the Hugging Face hub's own classes read, and that is true."
import math
import re
import socket
import struct
import tarfile
from json import loads
from pathlib import Path

import pytest
import torch
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

from wmpo_nb.presets import SEED_RANGES
from wmpo_nb.trajectory import TrajectoryBatch, write_shard

ROOT = Path(__file__).parent.parent
CARDS = ROOT / "data_cards"
MODELS = ("policy_lift", "vae", "world_model", "reward", "stack_networks")
DATASETS = ("lift_demonstrations", "pretraining_trials", "collected_trajectories")
# read but not shipped: other people's work, with the faults that the reference names
READ_MODELS = {"wmpo_checkpoints": ("O1", "O7", "O8", "O14"), "sdxl_vae": ("O6", "O21"), "videomae_base": ("O7", "O8"), "openvla_7b": ("O5", "O9")}
READ_DATASETS = {"mimicgen_demonstrations": (), "wmpo_rollouts": ("O12", "O13", "O14"), "oxe_mixture": ("O3",)}
WEIGHTS = sorted((ROOT / "wmpo_nb/weights").rglob("*.safetensors"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_): raise AssertionError("a card was looked up on the network")
    monkeypatch.setattr(socket.socket, "connect", refuse)


def header(path: Path) -> dict:
    "The safetensors header: dtype, shape and offsets of each tensor."
    with path.open("rb") as file:
        size, = struct.unpack("<Q", file.read(8))
        return loads(file.read(size))


def parameters(path: Path) -> int:
    "Numbers that are learnt, so without the steps that those kept as bytes are worth."
    learnt = {name: tensor for name, tensor in header(path).items() if name != "__metadata__" and not name.endswith(".step")}
    return sum(math.prod(tensor["shape"]) for tensor in learnt.values())


def seeds(text: str) -> list[int]:
    "Every number written in groups of three digits, 1 000 000 or larger."
    return [int(number.replace(" ", "")) for number in re.findall(r"\b\d{1,3} \d{3} \d{3}\b", text)]


def test_there_is_a_card_for_each():
    assert {path.stem for path in CARDS.glob("*.md")} == {*MODELS, *DATASETS, *READ_MODELS, *READ_DATASETS}


@pytest.mark.parametrize("name", MODELS)
def test_model_cards(name):
    card = ModelCard.load(CARDS / f"{name}.md")
    assert isinstance(card.data, ModelCardData)
    assert card.data.license == "apache-2.0" and card.data.library_name == "wmpo_nb" and card.data.pipeline_tag
    for promise in ("**Command:**", "**Metrics:**", "**Parameters:**", "## Architecture", "## Data", "## Limits"):
        assert promise in card.text, promise


@pytest.mark.parametrize("name", DATASETS)
def test_dataset_cards(name):
    card = DatasetCard.load(CARDS / f"{name}.md")
    assert isinstance(card.data, DatasetCardData)
    assert card.data.license == "apache-2.0" and card.data.task_categories == ["robotics"] and card.data.pretty_name
    for promise in ("**Command:**", "## Schema", "## Limits"): assert promise in card.text, promise


@pytest.mark.parametrize("name, faults", {**READ_MODELS, **READ_DATASETS}.items())
def test_cards_of_what_is_only_read(name, faults):
    kind = ModelCard if name in READ_MODELS else DatasetCard
    card = kind.load(CARDS / f"{name}.md")
    assert isinstance(card.data, ModelCardData if kind is ModelCard else DatasetCardData)
    assert card.data.license and (card.data.license != "other" or card.data.to_dict()["license_name"])
    promises = ("**Source:**", "**Read by:**", "**Size:**", "## How made", "## Known faults", "## Licence")
    promises += ("## Files", "| dtype |") if kind is ModelCard and name != "wmpo_checkpoints" else ("## Files",) if kind is ModelCard else ("**Splits:**", "| member | dtype | shape |")
    for promise in promises: assert promise in card.text, promise
    assert "ontained" in card.text and "not-included" in card.data.tags
    for fault in faults: assert f"**{fault}:**" in card.text, fault


@pytest.mark.parametrize("name", [*MODELS, *DATASETS, *READ_MODELS, *READ_DATASETS])
def test_header_survives_the_hubs_round_trip(name, tmp_path):
    kind = ModelCard if name in MODELS or name in READ_MODELS else DatasetCard
    card = kind.load(CARDS / f"{name}.md")
    card.save(tmp_path / "README.md")
    assert kind.load(tmp_path / "README.md").data.to_dict() == card.data.to_dict()


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_weights_are_described(path):
    described = [card for card in CARDS.glob("*.md") if f"`{path.relative_to(ROOT)}`" in card.read_text()]
    assert len(described) == 1, f"one card must name {path.relative_to(ROOT)}, not {len(described)}"
    _, _, behind = described[0].read_text().partition(f"`{path.relative_to(ROOT)}`")
    claimed = int(re.search(r"\*\*Parameters:\*\* ([\d,]+)", behind)[1].replace(",", ""))
    assert claimed == parameters(path)


@pytest.mark.parametrize("name", [*MODELS, *DATASETS, *READ_MODELS, *READ_DATASETS])
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (CARDS / f"{name}.md").read_text()):
        assert (CARDS / target).exists(), target


@pytest.mark.parametrize("name", DATASETS)
def test_schema_is_what_the_shards_hold(name, tmp_path):
    one, steps = torch.ones(1, dtype=torch.long), 8
    batch = TrajectoryBatch(torch.zeros(1, steps + 1, 64, 64, 3, dtype=torch.uint8), torch.zeros(1, steps, 7),
                            torch.zeros(1, 1, 56, dtype=torch.long), torch.zeros(1, 1, 56), one.bool(), one, one, one, one)
    write_shard(tmp_path / "shard.tar", batch)
    with tarfile.open(tmp_path / "shard.tar") as archive:
        written = {info.name.split(".", 1)[1] for info in archive}
        meta = loads(archive.extractfile("000000000.meta.json").read())
    text = (CARDS / f"{name}.md").read_text()
    assert set(re.findall(r"^\| `([\w.]+)` \|", text, re.M)) == written
    assert all(f"`{key}`" in text for key in meta)


def test_seeds_are_from_the_ranges_that_the_cards_name():
    allowed = {"lift_demonstrations": "demonstrations", "pretraining_trials": "pretraining"}
    for name, use in allowed.items():
        assert all(seed in SEED_RANGES[use] for seed in seeds((CARDS / f"{name}.md").read_text())), name
    collected = seeds((CARDS / "collected_trajectories.md").read_text())
    assert all(seed in SEED_RANGES["collection"] or seed in SEED_RANGES["held_out"] for seed in collected)
