"""What the house looks like, in numbers: `python tests/house.py [CHECKOUT]` counts a checkout (default: this one).

A function's decision points: `if`, `for`, `while`, `except`, a conditional expression, each further operand of `and`
and `or`, and each `if` of a comprehension; those of functions inside it too. A place that asks for a guarantee is a
line that has a condition with a name of `GUARANTEES` in it, in the federation but outside its channels.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("fedray", "jobs", "tune_spaces", "k8s")
WIDTH, DECISIONS = 120, 6
_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.match_case)
#: What only a guarantee has: a condition on one of these asks which guarantee holds.
GUARANTEES = {"by_client", "guard", "opened", "private", "privacy", "secure", "secure_aggregation"}
#: Where it must not be asked, and where it belongs.
ASKED_OF, ANSWERED_IN = "fedray/federation/", "fedray/federation/channels/"


def functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Every function with its dotted name."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            name = f"{prefix}{child.name}" if named else prefix
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield child, name
            yield from walk(child, f"{name}." if named else prefix)

    yield from walk(tree, "")


def decisions(function: ast.AST) -> int:
    """Decision points of a function."""
    total = 0
    for node in ast.walk(function):
        total += isinstance(node, _BRANCHES)
        total += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
        total += len(node.ifs) if isinstance(node, ast.comprehension) else 0
    return total


def lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From `def` to the last line."""
    return function.end_lineno - function.lineno + 1


def imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Modules that a module imports when it is itself imported: not inside functions, not for type checkers alone."""

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                yield child.module
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            yield from walk(child)

    return (name for name in walk(tree) if name.split(".")[0] == package)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other (strongly connected components of more than one)."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(start: str, edges: dict[str, set[str]], into: list[str]) -> None:
        stack = [(start, iter(sorted(edges[start])))]
        seen.add(start)
        while stack:
            node, rest = stack[-1]
            following = next((n for n in rest if n not in seen), None)
            if following is None:
                stack.pop()
                into.append(node)
            else:
                seen.add(following)
                stack.append((following, iter(sorted(edges[following]))))

    for node in sorted(graph):
        if node not in seen:
            visit(node, graph, order)
    backwards: dict[str, set[str]] = {node: set() for node in graph}
    for node, targets in graph.items():
        for target in targets:
            backwards[target].add(node)
    seen.clear()
    groups = []
    for node in reversed(order):
        if node not in seen:
            group: list[str] = []
            visit(node, backwards, group)
            groups.append(sorted(group))
    return [group for group in groups if len(group) > 1]


def conditions(tree: ast.Module) -> Iterator[ast.expr]:
    """Every expression that something depends on."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
            yield node.test
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, ast.BoolOp):
            yield from node.values
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node.operand


def asks(tree: ast.Module) -> set[int]:
    """Lines with a condition that mentions one of `GUARANTEES`."""
    return {
        node.lineno
        for condition in conditions(tree)
        for node in ast.walk(condition)
        if getattr(node, "attr", getattr(node, "id", None)) in GUARANTEES
    }


def measure(root: Path) -> dict:
    """The numbers of the checkout at `root`."""
    files = sorted(file for folder in FOLDERS for file in (root / folder).rglob("*.py"))
    texts = {file.relative_to(root): file.read_text() for file in files}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    found = [
        (decisions(f), lines(f), f"{name}:{label}") for name, tree in trees.items() for f, label in functions(tree)
    ]
    modules = {".".join(name.with_suffix("").parts).removesuffix(".__init__"): tree for name, tree in trees.items()}
    graph = {m: {i for i in imports(tree, "fedray") if i in modules and i != m} for m, tree in modules.items()}
    over = sorted((f for f in found if f[0] > DECISIONS), reverse=True)
    rounds = [f for name in ("round.py:run_round", "Coordinator.run_round") for f in found if f[2].endswith(name)]
    round_ = next(iter(rounds), (0, 0, ""))
    asked = {
        str(name): len(asks(tree))
        for name, tree in trees.items()
        if str(name).startswith(ASKED_OF) and not str(name).startswith(ANSWERED_IN)
    }
    return {
        "files": len(files),
        "lines": sum(text.count("\n") for text in texts.values()),
        "lines over 120": sum(len(line) > WIDTH for text in texts.values() for line in text.splitlines()),
        "functions": len(found),
        f"functions over {DECISIONS} decision points": len(over),
        "share of them": round(len(over) / len(found), 4),
        "most decision points": over[0][::2] if over else None,
        "longest function": max((n, name) for _, n, name in found),
        "longest file": max((text.count("\n"), str(name)) for name, text in texts.items()),
        "run_round": {"where": round_[2], "lines": round_[1], "decision points": round_[0]},
        "import circles": circles(graph),
        "places that ask for a guarantee": {name: n for name, n in asked.items() if n},
    }


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    print(json.dumps(measure(root), indent=2))
