"""Copies of the notebooks for Colab: `python docs/colab.py FOLDER`. Each begins with a cell that installs the kit there.

The repository is `github = OWNER/NAME` in settings.ini, or what GitHub's own machines say it is (`GITHUB_REPOSITORY`). The workflow
docs.yml pushes FOLDER as the branch `colab`, from which Colab opens a notebook by its address; the site's pages link there.
"""
import json
import os
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BRANCH = "colab"


def repository() -> str:
    "OWNER/NAME on GitHub, or nothing as long as the project has no such home."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"]["github"].strip() or os.environ.get("GITHUB_REPOSITORY", "")


def badge(stem: str, github: str) -> str:
    "Markdown of the link that opens the notebook `stem` in Colab; empty without a repository. Text, not a picture from elsewhere."
    return f"[Open in Colab](https://colab.research.google.com/github/{github}/blob/{BRANCH}/{stem}.ipynb)" if github else ""


def install_cell(github: str) -> dict:
    "The first cell: the kit beside the notebook, its packages, and what draws without a screen."
    place = f"/content/{github.split('/')[1]}"
    lines = ["# Colab: installs the kit, which takes a minute or two. Elsewhere, leave this cell out.",
             f"!git clone -q --depth 1 https://github.com/{github} {place}",
             "!apt-get -qq install -y libosmesa6 libegl1 > /dev/null",
             f"!pip install -q -e {place}",
             f"%cd {place}/nbs",
             f"import sys; sys.path.insert(0, '{place}')"]
    return {"cell_type": "code", "id": "colab", "metadata": {}, "execution_count": None, "outputs": [], "source": "\n".join(lines)}


def write(folder: Path, github: str) -> list[Path]:
    "Every numbered notebook with the install cell in front and without outputs."
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code": cell["outputs"], cell["execution_count"] = [], None
        notebook["cells"].insert(0, install_cell(github))
        written.append(folder / path.name)
        written[-1].write_text(json.dumps(notebook, indent=1), encoding="utf-8")
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit("usage: python docs/colab.py FOLDER")
    if not repository(): sys.exit("settings.ini does not say where the project is published: github = OWNER/NAME")
    print(f"{len(write(Path(sys.argv[1]), repository()))} notebooks in {sys.argv[1]}")
