"""Who may import whom: data flows one way, and nothing goes round in circles.

Read from the source, so that imports inside functions and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# From the bottom to the top. A name stands for a module or for a package with all it holds, but for
# what stands elsewhere by its longer name; "es2fast" is the package's own __init__. A module may
# import from lower lines and from its own name, not from its neighbours on the line.
LAYERS = (
    ("errors", "progress", "transfer", "yaml_text"),
    ("config", "endpoint"),
    ("run.files",),
    ("run.folder",),
    ("ops", "data", "distributed"),
    ("modeling",),
    ("run",),
    ("judges",),
    ("probing",),
    ("attacks",),
    ("report",),
    ("training", "evaluation"),
    ("train", "environment", "planning", "reference"),
    ("demo", "harden"),
    ("tune",),
    ("cli",),
    ("es2fast",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules(root: Path) -> dict[str, Path]:
    """Python files by dotted name; those of tests/ also without "tests.", as pytest sees them."""
    found = {}
    for folder in ("es2fast", "bench", "tests"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join(parts)] = path
            if parts[0] == "tests" and len(parts) > 1:
                found.setdefault(".".join(parts[1:]), path)
    return found


def graph(root: Path) -> dict[str, set[str]]:
    """Module -> the modules it imports, all as paths below ``root``; outsiders are left out."""
    known = modules(root)

    def resolve(name: str) -> Path | None:
        while name and name not in known:
            name = name.rpartition(".")[0]  # the last part is something in the module
        return known.get(name)

    edges: dict[str, set[str]] = {}
    for path in known.values():
        names = imports(path.read_text(), path.relative_to(root))
        targets = {target for name in names if (target := resolve(name)) not in (None, path)}
        edges[str(path.relative_to(root))] = {str(t.relative_to(root)) for t in targets if t}
    return edges


def imports(text: str, path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of one circle in importing order, first again last; empty when there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def place(path: str) -> str | None:
    """The name in LAYERS that a file of the package belongs to."""
    parts = Path(path).with_suffix("").parts[1:]
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    if not parts:
        return "es2fast"
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in RANK), None)


def package(edges: dict[str, set[str]]) -> list[str]:
    return [path for path in edges if path.startswith("es2fast/")]


def test_every_module_of_the_package_has_a_place() -> None:
    assert len(RANK) == sum(map(len, LAYERS)), "a name stands twice in LAYERS"
    places = {path: place(path) for path in package(graph(ROOT))}
    missing = [path for path, name in places.items() if name is None]
    assert not missing, f"not in LAYERS: {missing}"
    assert set(RANK) == set(places.values()), "LAYERS names something that does not exist"


def test_no_import_goes_up() -> None:
    edges, wrong = graph(ROOT), []
    for path in package(edges):
        here = place(path)
        for target in sorted(edges[path]):
            there = place(target) if target.startswith("es2fast/") else None
            low = here in RANK and there in RANK and RANK[there] < RANK[here]
            if not (low or here == there):
                wrong.append(f"{path} imports {target}")
    assert not wrong, "\n".join(["imports against the order of LAYERS:", *wrong])


def test_no_module_imports_itself_in_a_circle() -> None:
    found = circle(graph(ROOT))
    assert not found, " imports ".join(found)


def test_hidden_imports_are_seen(tmp_path: Path) -> None:
    files = {
        "es2fast/__init__.py": "",
        "es2fast/a.py": "def later():\n    from es2fast import b\n",
        "es2fast/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import tests.c\n",
        "tests/c.py": "from d import helper\n",
        "tests/d.py": "from es2fast.a import later\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    edges = graph(tmp_path)
    assert edges["es2fast/a.py"] == {"es2fast/b.py"}
    found = circle(edges)
    assert found[0] == found[-1]
    order = ["es2fast/a.py", "es2fast/b.py", "tests/c.py", "tests/d.py"]
    start = order.index(found[0])
    assert found[:-1] == order[start:] + order[:start]
    assert circle({"x": {"y"}, "y": set()}) == []
