"""YAML as configurations are written: safe, and every key once."""

from __future__ import annotations

from typing import Any

import yaml


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping that names a key twice, of which YAML would drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, str | int | float | bool) and key in lines:
                raise yaml.YAMLError(
                    f"{key!r} stands in line {lines[key]} and again in line {line}; make one of "
                    "them"
                )
            if isinstance(key, str | int | float | bool):
                lines[key] = line
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """What a YAML document holds.

    Raises:
        yaml.YAMLError: malformed, nested too deep, or a key twice in one mapping.
    """
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except RecursionError:
        raise yaml.YAMLError("nested too deep") from None
