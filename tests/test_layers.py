"""Who may import whom: the layers of the package, imports for type checkers included."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

grimp = pytest.importorskip("grimp", reason="reads the imports: pip install 'railwire[dev]'")

# Top to bottom. Packages of one line do not import each other; what is named by nobody is the engine API.
LAYERS = [
    ["cli"],
    ["demo", "bench"],
    ["doctor", "serve", "integrations"],
    ["runner"],
    ["kvcache", "weights", "moe"],
]
KVCACHE = ["router", "shells", "protocol", "geometry"]
NO_SHELL = {"threading", "time", "asyncio", "concurrent", "socket", "railwire._native"}


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """What each module of the package imports. The native module, which grimp does not see, is its own."""
    graph = grimp.build_graph("railwire", include_external_packages=True, cache_dir=None)
    found: dict[str, set[str]] = {}
    for module in graph.modules:
        if module != "railwire" and not module.startswith("railwire."):
            continue
        found[module] = set(graph.find_modules_directly_imported_by(module))
        if "railwire" in found[module]:
            lines = [
                detail["line_contents"] for detail in graph.get_import_details(importer=module, imported="railwire")
            ]
            if any("_native" in line for line in lines):
                found[module].add("railwire._native")
            if not [line for line in lines if "_native" not in line and "__version__" not in line]:
                found[module].discard("railwire")
    return found


def part(module: str) -> str:
    """``kvcache`` of ``railwire.kvcache.sender``."""
    return module.split(".")[1] if "." in module else ""


def circles(imports: dict[str, set[str]]) -> Iterator[list[str]]:
    """Strongly connected components of more than one module (Tarjan)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> Iterator[list[str]]:
        number[module] = low[module] = len(number)
        stack.append(module)
        for other in sorted(imports[module] & imports.keys()):
            if other not in number:
                yield from visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], number[other])
        if low[module] == number[module]:
            circle = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(circle) > 1:
                yield circle

    for module in sorted(imports):
        if module not in number:
            yield from visit(module)


def test_no_circles(imports: dict[str, set[str]]) -> None:
    assert list(circles(imports)) == []


def test_nothing_imports_upwards(imports: dict[str, set[str]]) -> None:
    height = {name: len(LAYERS) - level for level, names in enumerate(LAYERS) for name in names}
    wrong = [
        f"{module} imports {other}"
        for module, others in imports.items()
        for other in others
        if part(module) != part(other)
        and other.startswith("railwire.")
        and height.get(part(other), 0) >= height.get(part(module), 0)
        and height.get(part(other), 0) > 0
    ]
    assert wrong == []


def test_nobody_imports_the_package_itself(imports: dict[str, set[str]]) -> None:
    """The module that is meant is imported; ``railwire`` itself is for users."""
    assert [module for module, others in imports.items() if "railwire" in others] == []


def test_kinds_of_kvcache(imports: dict[str, set[str]]) -> None:
    """Geometry below protocol below shells; the first two have no locks, clocks, engines or threads."""

    def kind(module: str) -> int:
        name = module.removeprefix("railwire.kvcache.").split(".")[0]
        return KVCACHE.index(name) if name in KVCACHE else KVCACHE.index("shells")

    mine = {
        module: others
        for module, others in imports.items()
        if module.startswith("railwire.kvcache.") and module != "railwire.kvcache"
    }
    wrong = [
        f"{module} imports {other}"
        for module, others in mine.items()
        for other in others
        if other.startswith("railwire.kvcache.") and kind(other) < kind(module)
    ]
    assert wrong == []
    pure = {module: others for module, others in mine.items() if kind(module) > KVCACHE.index("shells")}
    below = {"railwire.errors", "railwire.wire", "railwire.peer", "railwire.splitmix"}
    for module, others in pure.items():
        ours = {other for other in others if other.startswith("railwire.") and part(other) != "kvcache"}
        assert ours <= below and not others & NO_SHELL, module
    assert len(pure) > 10
