"The front page: every notebook and every command is on its map, and its table tells the truth about missing results."
import json
import re
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INDEX = ROOT / "nbs/index.ipynb"
CELLS = json.loads(INDEX.read_text())["cells"]
MARKDOWN = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")


@pytest.fixture(scope="module")
def result_table():
    "The function of the index that writes the table of results."
    names = {"json": json}
    for cell in CELLS:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.search("def result_|from wmpo_nb", source): exec(source, names)
    return names["result_table"]


def test_the_map_has_every_notebook_and_its_module():
    for notebook in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        module = re.search(r"default_exp (\w+)", notebook.read_text())
        row = f"[{notebook.stem}]({notebook.name}) | " + (f"`{module[1]}`" if module else "-")
        assert row in MARKDOWN, row


def test_every_command_is_listed():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    commands = re.findall(r"^(wmpo-[\w-]+)=", settings["DEFAULT"]["console_scripts"], re.M)
    assert commands and sorted(re.findall(r"^\| `(wmpo-[\w-]+)` \|", MARKDOWN, re.M)) == sorted(commands)


def test_the_index_makes_no_module():
    assert not re.search(r"#\|\s*(default_exp|export)", "".join("".join(cell["source"]) for cell in CELLS))


def test_picture_is_there_and_small():
    assert 0 < (ROOT / "nbs/images/loop.png").stat().st_size < 200_000


def test_table_of_results(result_table, tmp_path):
    path = tmp_path / "table1.json"
    assert "No result" in result_table(path) and "%" not in result_table(path)
    def cell(method, seed, success, P=128):
        outcome = {"states": [100 * seed, 100 * seed + 3], "success": success, "mean_steps": 9.0}
        return {"preset": "tiny_lift", "method": method, "seed": seed, "P": None if method == "base" else P, "outcome": outcome}
    cells = [cell("base", seed, "0010") for seed in (1, 2, 3)] + [cell("wmpo", seed, "0111") for seed in (1, 2, 3)] + [cell("dpo", 1, "1000", 512), cell("wmpo", 1, "0111", 512)]
    path.write_text(json.dumps({"cells": cells}))
    three, one = [line.split(" | ") for line in result_table(path).splitlines()[2:]]
    assert three[:6] == ["| Lift", "128", "25.0 (9 to 53)", "**75.0 (47 to 91)**", "-", "-"]
    assert three[6:] == ["+50.0 (50 to 50)", "-", "3 |"]                            # over trainings, and all of them gained as much
    assert one[1:3] + one[4:6] == ["512", "25.0 (5 to 70)", "-", "25.0 (5 to 70)"] and all("*" in text for text in one[6:8]) and one[8] == "1 |"


def test_table_shown_is_the_recorded_one(result_table):
    shown = [output["data"]["text/markdown"] for cell in CELLS if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert ["".join(text) for text in shown] == [result_table(ROOT / "results/table1.json")], "run nbs/index.ipynb again"
