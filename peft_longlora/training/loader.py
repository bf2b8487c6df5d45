"""YAML as people write it: what YAML 1.1 makes of `010`, `1:30`, `no` and dates stays text until a type is known."""

from __future__ import annotations

from typing import Any

import yaml

INT, FLOAT, BOOL, DATE = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "timestamp"))


class Loader(yaml.SafeLoader):
    """Refuses a key that stands twice. `values.convert` reads words as the numbers and booleans that keys need."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """The mapping of a node."""
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise yaml.MarkedYAMLError(problem=f"{name} stands twice", problem_mark=node.value[place][0].start_mark)
        return super().construct_mapping(node, deep)

    def resolve(self, kind: type, value: Any, implicit: tuple[bool, bool]) -> str:
        """The tag of a node: text for what only YAML 1.1 reads as something else."""
        tag = super().resolve(kind, value, implicit)
        if kind is not yaml.ScalarNode or not implicit[0]:
            return tag
        digits = value.lstrip("+-")
        is_odd = (
            tag == DATE
            or (tag in (INT, FLOAT) and ":" in value)  # to base 60
            or (tag == INT and len(digits) > 1 and digits[0] == "0" and digits[1] not in "xXbB")  # to base 8
            or (tag == BOOL and value.lower() not in ("true", "false"))
        )
        return self.DEFAULT_SCALAR_TAG if is_odd else tag
