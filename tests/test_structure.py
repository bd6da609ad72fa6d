"""Who may import whom: data flows one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import es2fast

ROOT = Path(es2fast.__file__).parent

FORBIDDEN = {
    "ops": ["modeling", "objective", "data", "engine", "attacks", "evaluation", "config", "cli"],
    "modeling": ["objective", "data", "engine", "attacks", "evaluation", "cli"],
    "data": ["modeling", "objective", "engine", "attacks", "evaluation", "cli"],
    "objective.py": ["data", "engine", "attacks", "evaluation", "cli"],
    "attacks": ["engine", "objective", "evaluation", "cli"],
    "evaluation": ["engine", "objective", "cli"],
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_flow_one_way(part: str) -> None:
    where = ROOT / part
    files = [where] if where.is_file() else sorted(where.rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            for other in FORBIDDEN[part]:
                bad = name == f"es2fast.{other}" or name.startswith(f"es2fast.{other}.")
                assert not bad, f"{path.relative_to(ROOT)} imports {name}"
