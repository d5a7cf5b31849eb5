"""API pages from the source: signatures, fields and docstrings as they are written. Nothing is imported.

Methods added with `@patch` are listed under their class. A dataclass is a table of its fields, with the comment beside each."""
import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# what Markdown would take for markup, outside of `code`
SPECIAL = re.compile(r"([*_\[\]<>$|\\{}~^])")


@dataclass
class Entry:
    "A function or a class of a module."
    node: ast.AST
    methods: list = field(default_factory=list)


def markdown(docstring: str) -> str:
    "A docstring as Markdown: what is in `backticks` is code, everything else is plain text."
    parts = re.split(r"(`[^`]+`)", docstring)
    return "".join(part if i % 2 else SPECIAL.sub(r"\\\1", part) for i, part in enumerate(parts))


def is_patch(node) -> str | None:
    "The class that a function is added to by `@patch`, if it is."
    decorators = {ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list}
    return ast.unparse(node.args.args[0].annotation) if "patch" in decorators else None


def public(node) -> bool:
    return not node.name.startswith("_")


def entries(tree: ast.Module) -> dict[str, Entry]:
    "Public functions and classes by name, in the order of the source."
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            inside = [part for part in node.body if isinstance(part, ast.FunctionDef) and public(part)]
            found.setdefault(node.name, Entry(node)).methods += inside
        elif isinstance(node, ast.FunctionDef) and (owner := is_patch(node)):
            if owner in found and public(node): found[owner].methods.append(node)
        elif isinstance(node, ast.FunctionDef) and public(node): found[node.name] = Entry(node)
    return {name: entry for name, entry in found.items() if public(entry.node)}


def arguments(node: ast.FunctionDef, skip: int = 0) -> str:
    "The signature as written, without annotations of the first `skip` arguments, which are left out."
    args = ast.parse(ast.unparse(node)).body[0].args
    args.args = args.args[skip:]
    args.defaults = args.defaults[-len(args.args):] if args.args else []
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(args)}){returns}"


def is_dataclass(node) -> bool:
    return isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list)


def field_table(node: ast.ClassDef, lines: list[str]) -> str:
    "Fields of a dataclass with default and comment, as a table."
    rows = []
    for part in node.body:
        if not isinstance(part, ast.AnnAssign): continue
        comment = re.search(r"\s{2,}# (.+)$", lines[part.end_lineno - 1])
        default = f"`{ast.unparse(part.value)}`" if part.value else ""
        cells = f"`{part.target.id}`", f"`{ast.unparse(part.annotation)}`", default
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + f" | {markdown(comment[1]) if comment else ''} |")
    return "\n".join(["| field | type | default | |", "|---|---|---|---|", *rows]) if rows else ""


def directive(kind: str, name: str, signature: str, body: str, fence: str = "```") -> str:
    return f"{fence}{{py:{kind}}} {name}{signature}\n\n{body}\n{fence}\n"


def constructor(node: ast.ClassDef) -> str:
    "What a class is called with."
    inits = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
    return arguments(inits[0], 1) if inits and not is_dataclass(node) else ""


def method(node: ast.FunctionDef, fence: str) -> str:
    decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
    if "property" in decorators or "as_prop=True" in decorators:
        return directive("property", node.name, "", markdown(ast.get_docstring(node) or ""), fence)
    skip = 0 if "staticmethod" in decorators else 1
    return directive("method", node.name, arguments(node, skip), markdown(ast.get_docstring(node) or ""), fence)


def section(entry: Entry, lines: list[str]) -> str:
    "One function or class."
    node, doc = entry.node, markdown(ast.get_docstring(entry.node) or "")
    if isinstance(node, ast.FunctionDef): return directive("function", node.name, arguments(node), doc)
    table = field_table(node, lines) if is_dataclass(node) else ""
    methods = [method(part, "```") for part in entry.methods if ast.get_docstring(part)]
    return directive("class", node.name, constructor(node), "\n\n".join(filter(None, [doc, table, *methods])), "````")


def notebook_of(source: str) -> str:
    "Path of the notebook that a module was exported from."
    return re.search(r"File to edit: \.\./(\S+\.ipynb)", source)[1]


def page(path: Path) -> str:
    source = path.read_text(encoding="utf-8")
    notebook, lines = notebook_of(source), source.splitlines()
    blocks = [section(entry, lines) for entry in entries(ast.parse(source)).values()]
    head = f"# `wmpo_nb.{path.stem}`\n\nMade and explained in [{Path(notebook).stem}](../{notebook}).\n\n"
    return head + f"```{{py:module}} wmpo_nb.{path.stem}\n```\n\n" + "\n".join(blocks)


def write_pages(folder: Path):
    "A page for each module, and their list in the order of the notebooks."
    folder.mkdir(parents=True, exist_ok=True)
    modules = [path for path in (ROOT / "wmpo_nb").glob("*.py") if not path.name.startswith("_")]
    modules.sort(key=lambda path: notebook_of(path.read_text(encoding="utf-8")))
    for path in modules: (folder / f"{path.stem}.md").write_text(page(path), encoding="utf-8")
    names = "\n".join(path.stem for path in modules)
    text = "Every public name of the package, with shapes, dtypes, units, errors and sources. A module imports only from modules above it in this list."
    (folder / "index.md").write_text(f"# API\n\n{text}\n\n```{{toctree}}\n:maxdepth: 1\n{names}\n```\n", encoding="utf-8")
