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
    from wmpo_nb.evaluation import over_trainings, wilson
    names = {"over_trainings": over_trainings, "wilson": wilson, "json": json}
    for cell in CELLS:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and "def result_" in source: exec(source, names)
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
    path = tmp_path / "tiny_lift.json"
    assert "No result" in result_table(path) and "%" not in result_table(path)
    path.write_text(json.dumps({"base": {"successes": 32, "n": 128}, "wmpo": {"successes": 64, "n": 128}, "mcnemar_p": 0.001}))
    assert "| base policy | 32 / 128 | 25.0 % | 18.3 to 33.2 % |" in result_table(path)
    assert "| after WMPO | 64 / 128 | 50.0 % |" in result_table(path) and "p = 0.001" in result_table(path)


def test_table_shown_is_the_recorded_one(result_table):
    shown = [output["data"]["text/markdown"] for cell in CELLS if cell["cell_type"] == "code" for output in cell["outputs"]]
    recorded = [result_table(ROOT / f"results/{name}.json") for name in ("tiny_lift", "tiny_stack")]
    assert ["".join(text) for text in shown] == recorded, "run nbs/index.ipynb again"
