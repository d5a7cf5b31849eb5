"""Build the documentation site: `make docs`, or `python docs/build.py [--no-play]`, writes docs/_build/html.

The notebooks are not run: their stored outputs are the pictures of the site. Everything is staged in docs/_build/source,
which mirrors the repository, so that a relative link is right in the repository and on the site. Then Sphinx builds, warnings
being errors. The pages ask for nothing from outside: MathJax and onnxruntime-web are copied from the npm registry's packages,
of pinned versions and checksums, which stay in `runs/vendor` for the next build.
"""
import argparse
import configparser
import io
import json
import os
import re
import shutil
import sys
import tarfile
from contextlib import redirect_stdout
from importlib import import_module
from posixpath import dirname, normpath, relpath
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "docs/_build"
SOURCE, HTML = BUILD / "source", BUILD / "html"
VENDOR = ROOT / "runs/vendor"
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "docs"))

import api  # noqa: E402
import colab  # noqa: E402
from wmpo_nb.play import NpmPackage, export_page, fetch_package  # noqa: E402

# the target of [text](target), ![text](target), src="target" and href="target", unless an address, a heading or a MyST target
LINK = re.compile(r'(\]\(|src="|href=")(?![a-z]+:|#)([^)#"\s]+)')
# pages that stand for a file or a folder of the repository
ALIASES = {"README.md": "index.ipynb", "nbs/index.ipynb": "index.ipynb", "nbs": "index.ipynb", "data_cards": "docs/cards.md",
           "results": "docs/results.md", "benchmarks": "docs/results.md", "docs/recipes": "docs/recipes/index.md"}
MADE = {"play.html"}                       # what the build adds after Sphinx
MATHJAX = NpmPackage("mathjax", "3.2.2", "sha512-Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw==")
MATHJAX_FILES = re.compile(r"package/es5/(tex-mml-chtml\.js|output/chtml/fonts/woff-v2/.+\.woff)$")
HIDDEN = re.compile(r"^#\|\s*(hide|default_exp\b.*)\s*$", re.M)


def staged_target(target: str, page: str, staged: str) -> str:
    "A link `target` of the repository's file `page`, as a link from its staged place. Other files it names are staged, too."
    wanted = normpath(f"{dirname(page)}/{target}".lstrip("/")).rstrip("/")
    if wanted in MADE: return relpath(wanted, dirname(staged) or ".")
    found = ALIASES.get(wanted, wanted)
    module = re.fullmatch(r"wmpo_nb/(\w+)\.py", found)
    if module: found = f"api/{module[1]}.md"
    elif found == wanted:
        if not (ROOT / found).exists(): raise SystemExit(f"{page} links to {target}, which is not there")
        # a folder has no page: the front page is at least a place to go on from
        if (ROOT / found).is_dir(): found = "index.ipynb"
        elif not (SOURCE / found).exists() and not found.endswith((".md", ".ipynb")): copy(found)
    return relpath(found, dirname(staged) or ".")


def with_links(text: str, page: str, staged: str) -> str:
    "Markdown of the repository's file `page` with its links as they are from its staged place. Code blocks are left alone."
    parts = re.split(r"(^```.*?^```|`[^`\n]+`)", text, flags=re.M | re.S)
    for i in range(0, len(parts), 2):
        parts[i] = LINK.sub(lambda match: match[1] + staged_target(match[2], page, staged), parts[i])
    return "".join(parts)


def copy(path: str):
    "A file of the repository, as it is, to the same place of the stage."
    (SOURCE / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / path, SOURCE / path)


def only_imports(source: str) -> bool:
    "Whether a cell does nothing but import."
    code = re.sub(r"\([^)]*\)", "", source)
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith("#")]
    return bool(lines) and all(re.match(r"(from|import)\s", line) for line in lines)


def notebook_cell(cell: dict, page: str, staged: str) -> dict | None:
    "A cell as the site shows it: directives gone, imports and solutions folded; None when `#| hide` or nothing is left."
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown": return {**cell, "source": with_links(source, page, staged)}
    if cell["cell_type"] != "code" or HIDDEN.search(source): return None
    tags = ["remove-input"] if re.search(r"^#\|\s*echo:\s*false", source, re.M) else []
    metadata = {"tags": tags}
    if only_imports(source):
        tags.append("hide-input")
        metadata["mystnb"] = {"code_prompt_show": "Imports"}
    if cell["metadata"].get("jupyter", {}).get("source_hidden"):       # a solution, also folded in JupyterLab
        tags.append("hide-cell")
        metadata["mystnb"] = {"code_prompt_show": source.splitlines()[0].lstrip("# ").replace("`", "")}
    shown = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")
    return {**cell, "source": shown, "metadata": metadata} if shown else None


def without_repeats(cells: list[dict]) -> list[dict]:
    "Neighbouring cells of nothing but imports become one."
    kept = []
    for cell in cells:
        same = kept and all(c["metadata"].get("tags") == ["hide-input"] and not c["outputs"] for c in (kept[-1], cell))
        if same: kept[-1] = {**kept[-1], "source": f"{kept[-1]['source']}\n\n{cell['source']}"}
        else: kept.append(cell)
    return kept


def numbered(cells: list[dict], number: str) -> list[dict]:
    "The first heading with the notebook's number, by which the text calls it."
    return [{**cells[0], "source": re.sub(r"^# ", f"# {number} ", cells[0]["source"])}, *cells[1:]]


def with_alt_texts(cells: list[dict]) -> list[dict]:
    "A picture is described by the sentence that leads to it: the last one of the text before its cell."
    said = ""
    for cell in cells:
        if cell["cell_type"] == "markdown":
            plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", re.sub(r"[`*$#|]", "", "".join(cell["source"]))).strip().splitlines()
            said = re.split(r"(?<=[.:!?])\s+", plain[-1])[-1].rstrip(":") if plain else said
        elif said and any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            cell["metadata"].setdefault("mystnb", {})["image"] = {"alt": said[:250]}
    return cells


def stage_notebook(page: str, staged: str, last: str = ""):
    "A notebook with its outputs; `last` becomes one more Markdown cell."
    notebook = json.loads((ROOT / page).read_text(encoding="utf-8"))
    cells = without_repeats([cell for cell in (notebook_cell(cell, page, staged) for cell in notebook["cells"]) if cell])
    if page != "nbs/index.ipynb": cells = numbered(cells, Path(page).name[:2])
    link = colab.badge(Path(page).stem, colab.repository()) if page != "nbs/index.ipynb" else ""
    if link: cells.insert(1, {"cell_type": "markdown", "metadata": {}, "source": link, "id": "colab"})
    if last: cells.append({"cell_type": "markdown", "metadata": {}, "source": last, "id": "toctree"})
    notebook["cells"] = with_alt_texts(cells)
    for output in (o for cell in notebook["cells"] for o in cell.get("outputs", [])):
        if "text/markdown" in output.get("data", {}):
            output["data"]["text/markdown"] = with_links("".join(output["data"]["text/markdown"]), page, staged)
    (SOURCE / staged).parent.mkdir(parents=True, exist_ok=True)
    (SOURCE / staged).write_text(json.dumps(notebook), encoding="utf-8")


def commands_page() -> str:
    "What each command says under --help."
    settings, parts = configparser.ConfigParser(), []
    settings.read(ROOT / "settings.ini")
    for line in settings["DEFAULT"]["console_scripts"].strip().splitlines():
        name, module = line.strip().removesuffix(":main").split("=")
        said = io.StringIO()
        with redirect_stdout(said):
            try: import_module(module).main(["--help"])
            except SystemExit: pass
        parts.append(f"## {name}\n\nMade in [`{module}`](../api/{module.split('.')[1]}.md).\n\n```text\n{said.getvalue().strip()}\n```\n")
    return ("# Commands\n\nWhat each says under `--help`. They are in `.venv/bin`; those that train run on several processes as "
            "`accelerate launch -m MODULE` ([recipe](recipes/cluster.md)).\n\n" + "\n".join(parts))


def without_header(text: str) -> str:
    "A card's text with its YAML header as a folded block at the end of the page."
    header = re.match(r"---\n(.*?)\n---\n", text, re.S)
    if not header: return text
    block = f"\n\n<details><summary>Header that the Hugging Face hub reads</summary>\n\n```yaml\n{header[1]}\n```\n\n</details>\n"
    return text[header.end():].lstrip() + block


def stage_markdown(page: str):
    "A Markdown file at the same place of the stage."
    text = without_header((ROOT / page).read_text(encoding="utf-8"))
    (SOURCE / page).parent.mkdir(parents=True, exist_ok=True)
    (SOURCE / page).write_text(with_links(text, page, page), encoding="utf-8")


def contents() -> str:
    "The tables of contents for the front page; a page in docs/ that they do not name is listed where they say `others`."
    text = (ROOT / "docs/contents.txt").read_text(encoding="utf-8")
    others = [f"docs/{path.stem}" for path in sorted((ROOT / "docs").glob("*.md")) if f"docs/{path.stem}\n" not in text]
    return text.replace("others\n", "".join(f"{name}\n" for name in others))


def stage():
    "Everything Sphinx reads, afresh."
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    for name in ("conf.py", "_static"):
        target = SOURCE / name
        shutil.copytree(ROOT / "docs" / name, target) if name == "_static" else shutil.copyfile(ROOT / "docs" / name, target)
    stage_notebook("nbs/index.ipynb", "index.ipynb", contents())
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")): stage_notebook(f"nbs/{path.name}", f"nbs/{path.name}")
    for folder in ("results", "benchmarks", "data_cards", "docs", "docs/recipes"):
        for path in sorted((ROOT / folder).glob("*.md")): stage_markdown(f"{folder}/{path.name}")
    api.write_pages(SOURCE / "api")
    (SOURCE / "docs/commands.md").write_text(commands_page(), encoding="utf-8")


def vendor_mathjax(folder: Path):
    "The one script and the fonts that show mathematics, from the package of the npm registry."
    with tarfile.open(fetch_package(MATHJAX, VENDOR)) as archive:
        for member in archive:
            if not MATHJAX_FILES.match(member.name): continue
            target = folder / member.name.removeprefix("package/es5/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.extractfile(member).read())


def build(play: bool = True) -> int:
    "Stage, fetch, build; the exit status of Sphinx."
    from sphinx.cmd.build import main as sphinx
    stage()
    vendor_mathjax(SOURCE / "_static/mathjax")
    shutil.rmtree(HTML, ignore_errors=True)
    status = sphinx(["-W", "--keep-going", "-q", "-b", "html", "-d", str(BUILD / "doctrees"), str(SOURCE), str(HTML)])
    if play and not status: export_page(HTML / "play.html", cache=VENDOR)
    return status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-play", action="store_true", help="leave out the play page, which asks the simulator and the networks")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    status = build(not arguments.no_play)
    if not status: print(f"the site is at {HTML.relative_to(ROOT)}/index.html")
    sys.exit(status)
