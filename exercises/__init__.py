"""A method's file with the bodies of its equations removed, and the project's tests for yours.

An equation is what a method's own file marks as one: a docstring with a line that ends in Eq. (n),
of a function, or of a class, whose forward and backward it then is. exercises/<method>.toml has a
section for each: a hint, and words in the names of its tests, of tests/test_<method>.py.
"""

import ast
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import runs

MARK = re.compile(r"(Eqs?\. [(\d), -]+)$", re.M)


@dataclass
class Equation:
    """name: of its function or class; label: such as "Eq. (4)"; functions: qualified names."""
    name: str
    label: str
    functions: list[str]
    tests: list[str]
    hint: str


def functions(tree: ast.Module) -> dict:
    """{qualified name: (the list that holds it, its place there)} of functions and methods."""
    owners = [("", tree)] + [(f"{node.name}.", node) for node in tree.body
                             if isinstance(node, ast.ClassDef)]
    return {prefix + node.name: (owner.body, i) for prefix, owner in owners
            for i, node in enumerate(owner.body) if isinstance(node, ast.FunctionDef)}


def equations(module) -> list[Equation]:
    """Those of a method's module, in the order of its file. Raises ValueError where exercises/ has
    nothing about the method, or about one of them."""
    path = runs.ROOT / f"exercises/{module.__name__}.toml"
    if not path.is_file():
        raise ValueError(f"exercises/{path.name} is missing: expected a section with tests and a "
                         "hint for each equation of the method")
    about = tomllib.loads(path.read_text(encoding="utf-8"))
    tree = ast.parse(source_of(module))
    methods = functions(tree)
    nodes = {name: body[i] for name, (body, i) in methods.items()}
    nodes |= {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found = []
    for name, node in sorted(nodes.items(), key=lambda each: each[1].lineno):
        if mark := MARK.search(ast.get_docstring(node) or ""):
            parts = [name, f"{name}.forward", f"{name}.backward"]
            if name not in about:
                raise ValueError(f"exercises/{path.name} lacks [{name}], {mark[1]}: expected its "
                                 "tests and a hint")
            own = [part for part in parts if part in methods]
            found.append(Equation(name, mark[1], own, **about[name]))
    return found


def source_of(module) -> str:
    return Path(module.__file__).read_text(encoding="utf-8")


def chosen(every: list[Equation], names: list[str]) -> list[Equation]:
    """Those of these names; all where there is no name. Raises ValueError for others."""
    known = [equation.name for equation in every]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"only={unknown}: expected of {', '.join(known)}")
    return [equation for equation in every if not names or equation.name in names]


def opened(source: str, of: list[Equation]) -> str:
    """The file without the bodies of these equations; signatures and docstrings stay."""
    lines, places = source.splitlines(), functions(ast.parse(source))
    labels = {name: equation.label for equation in of for name in equation.functions}
    for name in sorted(labels, key=lambda name: -places[name][0][places[name][1]].lineno):
        body, i = places[name]
        statements = body[i].body[ast.get_docstring(body[i]) is not None:]
        first, last = statements[0].lineno - 1, body[i].end_lineno
        while not lines[first - 1] or lines[first - 1].lstrip().startswith("#"):
            first -= 1                                     # such a comment tells what comes
        indent = " " * statements[0].col_offset
        lines[first:last] = [f'{indent}raise NotImplementedError("{labels[name]}")']
    return "\n".join(lines) + "\n"


def with_ours(theirs: str, source: str, others: list[Equation]) -> ast.Module:
    """Their file, but these equations as `source` has them."""
    tree = ast.parse(theirs)
    there, here = functions(tree), functions(ast.parse(source))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for name in [name for equation in others for name in equation.functions]:
        body, i = here[name]
        if name in there:
            own, j = there[name]
            own[j] = body[i]
        else:                                              # they have taken it out
            classes.get(name.split(".")[0], tree).body.append(body[i])
    return tree
