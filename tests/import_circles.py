"""A contract for import-linter (`make check`): no file imports itself by way of others, imports inside functions counted.

import-linter's own `acyclic_siblings` compares folders, which may import one another's files without a circle, and it does not
see a circle between a file and the `__init__.py` of its folder.
"""

from typing import Any

import grimp
import networkx
from importlinter import Contract, ContractCheck, output


class NoImportCircles(Contract):
    """Broken by every set of files that import one another in a circle."""

    type_name = "no_import_circles"

    def check(self, graph: grimp.ImportGraph, verbose: bool) -> ContractCheck:
        """Find the circles."""
        imports: Any = networkx.DiGraph()
        imports.add_edges_from(
            (file, used) for file in graph.modules for used in graph.find_modules_directly_imported_by(file)
        )
        components: Any = networkx.strongly_connected_components(imports)
        circles = sorted(sorted(component) for component in components if len(component) > 1)
        return ContractCheck(kept=not circles, metadata={"circles": circles})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Name the files of each circle."""
        for circle in check.metadata["circles"]:
            output.print_error(f"These files import one another in a circle: {', '.join(circle)}.")
