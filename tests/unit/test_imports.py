"""Arrows of the architecture that import-linter cannot express (the others: [tool.importlinter], `make lint`)."""

from __future__ import annotations

import sys

import grimp


def test_policies_import_the_standard_library_and_pydantic_only() -> None:
    graph = grimp.build_graph("policies", include_external_packages=True)
    allowed = {"policies", "pydantic"} | sys.stdlib_module_names
    foreign = {
        f"{module} -> {imported}"
        for module in graph.modules
        if module.partition(".")[0] == "policies"
        for imported in graph.find_modules_directly_imported_by(module)
        if imported.partition(".")[0] not in allowed
    }
    assert not foreign
