"The copies for Colab begin with a cell that installs the kit, from the repository that settings.ini names, and nothing else changes."
import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import colab  # noqa: E402


def test_every_notebook_gets_one_first_cell(tmp_path):
    written = colab.write(tmp_path, "someone/kit")
    assert [path.name for path in written] == [path.name for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))]
    for path in written:
        made, source = (json.loads((folder / path.name).read_text())["cells"] for folder in (tmp_path, ROOT / "nbs"))
        nbformat.validate(nbformat.read(path, as_version=4))
        assert "git clone -q --depth 1 https://github.com/someone/kit /content/kit" in made[0]["source"]
        assert [cell["source"] for cell in made[1:]] == [cell["source"] for cell in source]
        assert not any(cell.get("outputs") for cell in made)


def test_links_follow_the_repository(monkeypatch):
    assert "/github/someone/kit/blob/colab/00_presets.ipynb)" in colab.badge("00_presets", "someone/kit")
    assert colab.badge("00_presets", "") == ""
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/fork")
    assert "/" in colab.repository()


@pytest.mark.skipif(bool(colab.repository()), reason="the project has a home")
def test_without_a_home_the_command_says_so(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "docs/colab.py", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 1 and "github = OWNER/NAME" in done.stderr and not (tmp_path / "out").exists()
