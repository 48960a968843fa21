"""The code that an export carries: the modules that a class needs, written as one file of its own name.

diffusers copies one file of a component to its cache and imports it there (trust_remote_code=True); so one file holds
everything, and its name has a digest of its content: two exports of different commits can be open in one process.
"""

import ast
import hashlib
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.core.files import read_json, write_atomic, write_json

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("data", "vae", "denoiser", "pipelines")
LEFT_OUT = ("vae.kernels",)  # Triton's, for a GPU; torch's own operations give the same numbers


def _file(module: str) -> Path:
    """The file of a module of this project, or of a class that a plugin has added."""
    own = ROOT / (module.replace(".", "/") + ".py")
    return own if module.partition(".")[0] in PACKAGES else Path(sys.modules[module].__file__)


def _own(node: ast.AST) -> dict[str, tuple[str, str]]:
    """What an import takes from this project: name here -> (module, name there, "" for the module itself)."""
    if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] not in PACKAGES:
        return {}
    found = {}
    for alias in node.names:
        whole = f"{node.module}.{alias.name}"
        place = (whole, "") if _file(whole).is_file() else (node.module, alias.name)
        found[alias.asname or alias.name] = place
    return found


def _first(node: ast.stmt) -> int:
    """The first line of a statement, with its decorators."""
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])


def _tree(module: str, cls: str) -> ast.Module:
    """A module of this project; of a plugin's only what its class needs, and the names it takes from elsewhere."""
    tree = ast.parse(_file(module).read_text())
    if module.partition(".")[0] in PACKAGES:
        return tree
    # From the class on: what its code names, what that code names, until nothing new is named.
    wanted, size, kept = {cls}, 0, []
    while size < len(wanted):
        size, kept = len(wanted), []
        for node in tree.body:
            if wanted & {*_defined(node), *_imported(node)}:
                kept.append(node)
                if not _imported(node):
                    wanted |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return ast.Module(kept, [])


def _imported(node: ast.stmt) -> list[str]:
    if not isinstance(node, (ast.Import, ast.ImportFrom)):
        return []
    return [alias.asname or alias.name.partition(".")[0] for alias in node.names]


def _needed(module: str, cls: str, found: dict[str, ast.Module]) -> dict[str, ast.Module]:
    """The module and all that it needs, those that others need first."""
    tree = _tree(module, cls)
    for node in tree.body:
        for needed, _ in _own(node).values():
            if needed not in found:
                _needed(needed, "", found)
    found[module] = tree
    return found


def _names(tree: ast.Module) -> Iterator[str]:
    """The names that a module defines itself."""
    for node in tree.body:
        yield from _defined(node)


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    yield name.id


def source(module: str, cls: str = "") -> str:
    """One file with the code of a module of this project, or of the class of a plugin's, and of all that it needs.

    Raises ValueError where two of them define the same name.
    """
    # All modules together; two names that are equal would hide one another.
    trees, owner = _needed(module, cls, {}), {}
    for part, tree in trees.items():
        for name in _names(tree):
            if owner.setdefault(name, part) != part:
                raise ValueError(
                    f"{part}: {name} is defined in {owner[name]} too; one file cannot hold both: rename one"
                )
    parts = [_section(part, tree, trees) for part, tree in trees.items()]
    head = f'"""{module} of OmniLatte and what it needs, made by pipelines.export; Apache-2.0."""\n'
    return head + "\nfrom types import SimpleNamespace\n" + "".join(parts)


def _section(module: str, tree: ast.Module, trees: dict[str, ast.Module]) -> str:
    """A module's own text, without its docstring and what is not needed, its imports replaced by names of this file."""
    # What goes: the docstring and unneeded statements. edits: first line -> (last line, new text)
    whole, lines = ast.parse(text := _file(module).read_text()), text.splitlines()
    edits, wanted = {}, {node.lineno for node in tree.body}
    for node in whole.body:
        if node.lineno not in wanted or (node is whole.body[0] and ast.get_docstring(whole) is not None):
            edits[_first(node)] = (node.end_lineno, "")
    # Imports of this project: the names stand in the same file now, modules become namespaces of them.
    for node in ast.walk(tree):
        if not (own := _own(node)):
            continue
        new = []
        for name, (place, there) in own.items():
            if place in LEFT_OUT or place not in trees:
                new.append(f'raise ImportError("{place} is not part of an export")')
            elif not there:
                members = ", ".join(f"{n}={n}" for n in dict.fromkeys(_names(trees[place])))
                new.append(f"{name} = SimpleNamespace({members})")
            elif name != there:
                new.append(f"{name} = {there}")
        edits[node.lineno] = (node.end_lineno, textwrap.indent("\n".join(new), " " * node.col_offset))
    # All other lines as they are
    kept, number = [f"\n\n# ==== {module.replace('.', '/')}.py {'=' * 60}"], 1
    while number <= len(lines):
        last, text = edits.get(number, (number, lines[number - 1]))
        kept += [text] if text or number not in edits else []
        number = last + 1
    return "\n".join(kept) + "\n"


def _write(folder: Path, cls: type, module: str) -> str:
    """Write the file of a class beside its weights; returns the file's name without .py."""
    text = source(module, cls.__name__)
    name = f"omnilatte_{module.rpartition('.')[2]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    write_atomic(folder / f"{name}.py", text)
    config = folder / "config.json"
    if config.is_file():
        write_json(config, read_json(config) | {"auto_map": {"AutoModel": f"{name}.{cls.__name__}"}})
    return name


def add_code(folder: Path, model: Any, kind: str) -> None:
    """Put the code beside the weights of a saved VAE or pipeline, and name it in their configs."""
    if kind == "vae":
        if needs_code(model):
            _write(folder, type(model), type(model).__module__)
        return
    # Each part beside its weights, and the pipeline's own class
    index = read_json(folder / "model_index.json")
    for part in ("vae", "transformer"):
        cls = type(getattr(model, part))
        index[part] = [_write(folder / part, cls, cls.__module__), cls.__name__]
    module = "pipelines.generation"
    index["_class_name"] = [_write(folder, type(model), module), type(model).__name__]
    # A list would be taken for a component when diffusers downloads the folder.
    names = index.get("class_names") or []
    index["class_names"] = dict(zip(map(str, range(len(names))), names, strict=True))
    write_json(folder / "model_index.json", index)


def needs_code(vae: Any) -> bool:
    """False for a VAE that is saved as a class of diffusers (vae/adapter.py)."""
    return type(vae).__module__ != "vae.adapter"
