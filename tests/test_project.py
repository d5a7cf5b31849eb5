"The project's own promises: notebooks and modules agree, arrows point down, imports are light, what ships is small."
import ast
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path
from statistics import median

import pytest
from huggingface_hub import RepoCard
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGE, NOTEBOOKS = ROOT / "wmpo_nb", sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted(path for path in PACKAGE.glob("*.py") if path.name not in ("__init__.py", "_modidx.py"))
WEIGHTS = sorted((PACKAGE / "weights").rglob("*.safetensors"))
CARDS = sorted((ROOT / "data_cards").glob("*.md"))
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini")
HEAVY = ("robosuite", "mujoco", "diffusers", "transformers", "tensorboard", "accelerate", "av", "pyarrow", "peft")


def setting(name: str) -> list[str]:
    return SETTINGS["DEFAULT"][name].split("\n")[1:]


def code_cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def room_numbers() -> dict[str, int]:
    "Number of the notebook that each module comes from."
    exported = {}
    for notebook in NOTEBOOKS:
        for name in re.findall(r"^#\|\s*default_exp (\w+)", "\n".join(code_cells(notebook)), re.M):
            exported[name] = int(notebook.name.split("_")[0])
    return exported


def imports(module: Path) -> tuple[set[str], set[str]]:
    "(rooms, other packages) that a module imports anywhere in its code."
    rooms, others = set(), set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level: rooms |= {node.module or alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom): others.add(node.module)
        elif isinstance(node, ast.Import): others |= {alias.name for alias in node.names}
    rooms |= {name.split(".")[1] for name in others if name.startswith("wmpo_nb.")}
    return rooms, {name.split(".")[0] for name in others} - {"wmpo_nb"}


def test_notebooks_and_modules_agree(tmp_path):
    for name in ("nbs", "wmpo_nb"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("weights", "__pycache__", ".ipynb*"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for tool in ("nbdev-export", "nbdev-clean"):
        subprocess.run([Path(sys.executable).parent / tool], cwd=tmp_path, check=True)
    remade = sorted(tmp_path.glob("wmpo_nb/*.py")) + sorted(tmp_path.glob("nbs/*.ipynb"))
    different = [str(path.relative_to(tmp_path)) for path in remade
                 if not (ROOT / path.relative_to(tmp_path)).exists()
                 or path.read_text() != (ROOT / path.relative_to(tmp_path)).read_text()]
    assert not different, f"run `make export`: {different}"


def test_every_module_has_a_notebook():
    stale = {module.stem for module in MODULES} - set(room_numbers())
    assert not stale, f"left over from a renamed notebook: {stale}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_arrows_point_down(module):
    numbers = room_numbers()
    upward = {room for room in imports(module)[0] if numbers[room] >= numbers[module.stem]}
    assert not upward, f"{module.stem} imports from rooms above it: {upward}"


@pytest.mark.parametrize("name", ["grpo", "flow", "trajectory"])
def test_pure_rooms_import_no_model(name):
    assert imports(PACKAGE / f"{name}.py")[0] <= {"presets", "weights", "trajectory"}


def test_importing_is_light():
    names = [f"wmpo_nb.{module.stem}" for module in MODULES]
    code = (f"import importlib, sys, torch\nfor name in {names}:\n    importlib.import_module(name)\n"
            f"    heavy = [m for m in {HEAVY} if m in sys.modules]\n    assert not heavy, (name, heavy)\n"
            "    assert not torch.cuda.is_initialized(), name")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_command_has_a_main():
    for script in setting("console_scripts"):
        module, function = script.split("=")[1].split(":")
        defined = {node.name for node in ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text()).body
                   if isinstance(node, ast.FunctionDef)}
        assert function in defined, script


def test_every_import_is_a_requirement():
    declared = {canonicalize_name(Requirement(line).name) for line in setting("requirements") + setting("oxe_requirements")}
    distributions = packages_distributions()
    for module in MODULES:
        for package in imports(module)[1] - set(sys.stdlib_module_names):
            assert set(map(canonicalize_name, distributions.get(package, [package]))) & declared, f"{module.stem} imports {package}"


def test_constraints_are_what_the_settings_admit():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()
                  if line and not line.startswith("#"))
    for line in setting("requirements") + setting("dev_requirements") + setting("oxe_requirements") + setting("docs_requirements"):
        requirement = Requirement(line)
        assert requirement.specifier.contains(pinned[requirement.name]), line


def test_readme_is_the_index():
    made = subprocess.run([sys.executable, ROOT / "readme.py"], capture_output=True, text=True, check=True).stdout
    assert (ROOT / "README.md").read_text() == made, "run `make readme`"
    for target in re.findall(r'(?:\]\(|src="|href=")(?!https?:|mailto:|#)([^)#"\s]+)', made):
        assert (ROOT / target).exists(), f"README.md links to {target}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_stay_readable(notebook):
    assert notebook.stat().st_size < 1.5e6
    long = [cell.splitlines()[:3] for cell in code_cells(notebook) if len(cell.splitlines()) > 25]
    assert not long, f"cells over 25 lines begin with {long}"


def lines_of_code(cell: str) -> int:
    return sum(bool(line.strip()) and not line.startswith("#|") for line in cell.splitlines())


def asserts(cell: str) -> bool:
    "Whether a cell tests something: by `assert` or by one of fastcore's `test_...`."
    return any(isinstance(node, ast.Assert) or isinstance(node, ast.Call) and getattr(node.func, "id", "").startswith("test_")
               for node in ast.walk(ast.parse(cell)))


def solution_faults(cells: list[dict]) -> list[str]:
    "What is wrong with the solutions among the cells that follow the exercises."
    solutions = [cell for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"]).startswith("# Solution")]
    sources = ["".join(cell["source"]) for cell in solutions]
    numbers = [re.match(r"# Solution (\d): \S", source) for source in sources]
    faults = []
    if [number and number[1] for number in numbers] != ["1", "2", "3"]:
        faults.append("after the exercises there are not three cells that begin with `# Solution 1: ...`, 2 and 3")
    faults += [f"no assertion in `{source.splitlines()[0]}`" for source in sources if not asserts(source)]
    faults += [f'`{source.splitlines()[0]}` is not folded: its metadata is not {{"jupyter": {{"source_hidden": true}}}}'
               for cell, source in zip(solutions, sources) if not cell["metadata"].get("jupyter", {}).get("source_hidden")]
    return faults


def teaching_faults(notebook: Path) -> list[str]:
    """What a notebook lacks of the form all of them have.

    The first cell says what one has at the end; a section is called "Break it"; cells that are not exported are short; the end is
    "What to try" with three exercises, then a solution of each: one cell, folded, that begins with `# Solution 1: what it shows`
    and asserts something. In the Markdown of jupytext such a cell is opened by ```python jupyter={"source_hidden": true}, and the
    header has to say `cell_metadata_filter: jupyter,-all`."""
    cells = json.loads(notebook.read_text())["cells"]
    text = ["".join(cell["source"]) for cell in cells]
    prose = [source if cell["cell_type"] == "markdown" else "" for cell, source in zip(cells, text)]
    faults = []
    if "At the end of this notebook" not in prose[0]: faults.append("the first cell does not say what one has at the end")
    if not re.search(r"^##+ Break it", "\n".join(prose), re.M): faults.append('no section is called "Break it"')
    shown = [lines_of_code(cell) for cell in code_cells(notebook) if not re.search(r"^#\|\s*(export|default_exp|hide)", cell, re.M)]
    if median(shown) >= 5: faults.append(f"half of the cells that are not exported have {median(shown)} lines or more")
    last = next((i for i, source in enumerate(prose) if re.search(r"^## What to try$", source, re.M)), None)
    if last is None: return faults + ['there is no "What to try"']
    if re.findall(r"^(\d)\. ", prose[last], re.M) != ["1", "2", "3"]: faults.append('"What to try" has not three exercises')
    return faults + solution_faults(cells[last + 1:])


@pytest.mark.parametrize("notebook", [path for path in NOTEBOOKS if path.stem != "index"], ids=lambda path: path.stem)
def test_notebooks_teach(notebook):
    faults = teaching_faults(notebook)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("path", [*MODULES, *NOTEBOOKS], ids=lambda path: path.name)
def test_nothing_names_the_machine_it_was_made_on(path):
    assert not re.findall(r"[\"' ]/(?:root|work|home)/[\w./-]*", path.read_text())


def test_shipped_weights_are_small_and_have_a_card():
    assert sum(path.stat().st_size for path in WEIGHTS) <= 16e6
    described = "\n".join(card.read_text() for card in CARDS)
    missing = [path.name for path in WEIGHTS if path.name not in described]
    assert not missing, f"no card in data_cards/ names {missing}"


def test_the_reference_tensors_are_small():
    assert sum(path.stat().st_size for path in (ROOT / "tests/goldens").iterdir()) <= 8e6


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_cards_can_be_read_by_the_hub(card):
    card = RepoCard.load(card)
    assert card.data.to_dict().get("license") and card.text.strip()
