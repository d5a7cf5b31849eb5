"Print README.md, made from nbs/index.ipynb. `make readme` writes it, and a test checks that it is up to date."
import json
import re
from posixpath import normpath
from pathlib import Path

NOTEBOOKS = "nbs"
# the target of [text](target), of ![text](target) and of <img src="target">, unless it is an address or a heading
LINK = re.compile(r'(\]\(|src="|href=")(?!https?:|mailto:|#)([^)"\s]+)')


def from_root(markdown: str) -> str:
    "Links relative to the notebooks' folder, made relative to the root."
    return LINK.sub(lambda match: match[1] + normpath(f"{NOTEBOOKS}/{match[2]}"), markdown)


def output_text(output: dict) -> str:
    "An output as Markdown: its own, else its text in a block. Pictures are linked from Markdown cells, not drawn."
    data = output.get("data", {})
    if "text/markdown" in data: return from_root("".join(data["text/markdown"]))
    text = "".join(output.get("text", data.get("text/plain", ""))).strip()
    return f"```\n{text}\n```" if text else ""


def cell_text(cell: dict) -> list[str]:
    "A cell as blocks of Markdown. `#| hide` leaves it out, `#| echo: false` leaves its code out."
    source = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown": return [from_root(source)]
    if cell["cell_type"] == "raw" or re.search(r"^#\|\s*hide\s*$", source, re.M): return []
    shown = [] if re.search(r"^#\|\s*echo:\s*false", source, re.M) else [f"```python\n{source}\n```"]
    return shown + [output_text(output) for output in cell["outputs"]]


if __name__ == "__main__":
    notebook = json.loads((Path(__file__).parent / NOTEBOOKS / "index.ipynb").read_text(encoding="utf-8"))
    blocks = ["<!-- Made from nbs/index.ipynb by `make readme`. Edit the notebook. -->"]
    for cell in notebook["cells"]: blocks += cell_text(cell)
    print("\n\n".join(block for block in blocks if block))
