"""The rooms of the package: imports go down the floors only, and nowhere in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = ["autoregister", "system", "blocks", "data", "training", "trainer"]
FLOORS += ["trainers dataset_conversion commands", "cli"]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}


def imports(file):
    """The modules of this package that a file imports, without the package's name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "nnunet_ssl":
            inside = node.module.partition(".")[2]
            for alias in node.names:
                longer = f"{inside}.{alias.name}".strip(".")
                yield longer if Path(ROOT, "nnunet_ssl", *longer.split(".")).with_suffix(".py").is_file() else inside
        elif isinstance(node, ast.Import):
            yield from (n.name.partition(".")[2] for n in node.names if n.name.startswith("nnunet_ssl."))


def test_imports_go_down_the_floors_and_not_in_a_circle():
    graph = {}
    for folder, package in (("nnunet_ssl", ""), ("trainers", "trainers"), ("dataset_conversion", "dataset_conversion")):
        for file in (ROOT / folder).rglob("*.py"):
            name = ".".join(filter(None, (package, *file.relative_to(ROOT / folder).with_suffix("").parts)))
            graph[name.removesuffix(".__init__")] = set(imports(file))
    up = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if (room := name.partition(".")[0]) != (under := other.partition(".")[0]) and FLOOR[under] >= FLOOR[room]
    ]
    assert up == []
    TopologicalSorter(graph).prepare()  # raises CycleError
    # every worker of a loader would spend seconds on torch's compiler, which networks need
    needed, todo = set(), {"data.loading"}
    while todo - needed:
        needed |= todo
        todo = set().union(*(graph.get(name, ()) for name in needed))
    assert "blocks.networks" not in needed
    assert {"blocks.losses", "data.loading"} <= graph["trainer"] | graph["trainers.nnUNetTrainerM3HL"]
