"""What the package promises as a whole: its names, its files, its dependencies, and which room may import which."""

from __future__ import annotations

import ast
import graphlib
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from itertools import chain
from pathlib import Path

import pytest

import agsel

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
BELOW = {
    "agsel.errors",
    "agsel.place",
    "agsel.adapters",
    "agsel.upstream",
    "agsel.blocks",
    "agsel.compilation",
    "agsel.elements",
    "agsel.policies",
    "agsel.recomputation",
    "agsel.zero",
}
TRAINERS = {"accelerate", "datasets", "deepspeed", "numpy", "torch", "transformers", "trl"}
ALL_BELOW = BELOW | {
    "agsel",
    "agsel.data",
    "agsel.replacing",
    "agsel.shipped",
    "agsel.written_yaml",
    "agsel.monitor",
    "agsel.planning",
    "agsel.runs",
    "tqdm",
    "yaml",
    *TRAINERS,
}
FLOORS = {
    "agsel/place.py": set(),
    "agsel/prerequisites.py": {"agsel.place"},
    "agsel/commands.py": {"agsel.prerequisites"},
    "agsel/errors.py": set(),
    "agsel/replacing.py": set(),
    "agsel/shipped.py": set(),
    "agsel/written_yaml.py": {"agsel.errors", "yaml"},
    "agsel/upstream.py": {"agsel.errors"},
    "agsel/blocks.py": {"agsel.errors", "torch"},
    "agsel/recomputation.py": {"torch"},
    "agsel/low_rank.py": {"torch", "peft"},
    "agsel/adapters.py": {"agsel.errors", "agsel.low_rank", "agsel.upstream", "torch", "peft"},
    "agsel/modes.py": {"torch", "transformers"},
    "agsel/policies": {"agsel.errors", "numpy"},
    "agsel/elements": {
        "agsel.errors",
        "agsel.replacing",
        "agsel.blocks",
        "agsel.modes",
        "deepspeed",
        "safetensors",
        "torch",
    },
    "agsel/data": {"agsel.errors", "datasets", "pyarrow", "transformers", "trl"},
    "agsel/compilation.py": {"agsel.blocks", "torch"},
    "agsel/zero": {
        "agsel.errors",
        "agsel.place",
        "agsel.upstream",
        "agsel.adapters",
        "agsel.blocks",
        "agsel.elements",
        "agsel.modes",
        "agsel.policies",
        "agsel.recomputation",
        "deepspeed",
        "psutil",
        "torch",
    },
    "agsel/__init__.py": BELOW | {"agsel.prerequisites"},
    "agsel/monitor": {"torch", "tensorboard", "matplotlib", "numpy", "tqdm"},
    "agsel/planning": BELOW | {"torch", "transformers", "peft"},
    "agsel/runs": {*BELOW, "agsel.replacing", "agsel.monitor", "agsel.planning", "mpi4py", "psutil", "yaml", *TRAINERS},
    "agsel/report": {
        "agsel.errors",
        "agsel.monitor",
        "agsel.replacing",
        "agsel.runs",
        "jinja2",
        "matplotlib",
        "numpy",
        "yaml",
    },
    "agsel/evaluation": {
        "agsel.data",
        "agsel.elements",
        "agsel.errors",
        "agsel.replacing",
        "agsel.zero",
        "datasets",
        "deepspeed",
        "lm_eval",
        "math_verify",
        "peft",
        "psutil",
        "torch",
        "transformers",
    },
    "agsel/training": ALL_BELOW
    | {"agsel.evaluation"}
    | {"huggingface_hub", "peft", "psutil", "pyarrow", "pydantic", "safetensors"},
    "agsel/evaluate.py": ALL_BELOW | {"agsel.evaluation"},
    "agsel/train.py": ALL_BELOW | {"agsel.report", "agsel.training"},
}
"""From the ground up: what each room may import besides the standard library and itself."""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_by(path: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports, wherever in it; `from agsel import blocks` is `agsel.blocks`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                place = ROOT / inner.replace(".", "/")
                yield inner if place.is_dir() or place.with_suffix(".py").is_file() else str(node.module)


def is_inside(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def is_standard(module: str) -> bool:
    return module.split(".")[0] in sys.stdlib_module_names


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_public_name_is_there_once_and_in_order() -> None:
    assert all(hasattr(agsel, name) for name in agsel.__all__)
    assert sorted(set(agsel.__all__)) == agsel.__all__


@pytest.mark.parametrize("package", [agsel, agsel.policies, agsel.zero], ids=lambda package: package.__name__)
def test_all_is_what_is_imported(package: object) -> None:
    """Nothing is public by accident, and nothing that is meant to be is forgotten."""
    tree = ast.parse(Path(str(package.__file__)).read_text())  # type: ignore[attr-defined]
    names = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    names += [
        node.target.id for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    assert sorted(package.__all__) == sorted(names)  # type: ignore[attr-defined]


def test_every_public_name_is_documented() -> None:
    assert [name for name in agsel.__all__ if not getattr(agsel, name).__doc__] == []


def test_versions_agree() -> None:
    assert agsel.__version__ == PROJECT["version"]


def test_the_package_is_typed() -> None:
    """`package-data` ships the marker that tells type checkers to use the annotations."""
    assert (ROOT / "agsel" / "py.typed").is_file()


def room_of(path: Path) -> str:
    """The room that a file of the package belongs to."""
    return next(room for room in FLOORS if relative(path) == room or relative(path).startswith(f"{room}/"))


@pytest.mark.parametrize("path", sources("agsel"), ids=relative)
def test_dependencies_point_downward(path: Path) -> None:
    room = room_of(path)
    own = room.removesuffix(".py").replace("/", ".")
    allowed = FLOORS[room] | ({own} if room != "agsel/__init__.py" else set())
    modules = [module for module in imported_by(path) if not is_standard(module)]
    assert [module for module in modules if not is_inside(module, allowed)] == []


def test_no_floor_stands_on_one_above_it() -> None:
    """What a room may import of agsel was listed before it; so there is no cycle between rooms."""
    seen: set[str] = set()
    for room, allowed in FLOORS.items():
        own = {module for module in allowed if is_inside(module, {"agsel"})}
        assert own <= seen, room
        seen.add(room.removesuffix("/__init__.py").removesuffix(".py").replace("/", "."))


@pytest.mark.parametrize("room", [room for room in FLOORS if (ROOT / room).is_dir()])
def test_the_modules_of_a_room_import_each_other_one_way(room: str) -> None:
    names = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in sources(room)}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    order = graphlib.TopologicalSorter(
        {name: {module for module in imported_by(path) if module in names} for name, path in names.items()}
    )
    assert len(list(order.static_order())) == len(names), "a cycle raises CycleError"


def test_no_two_files_share_a_name() -> None:
    """But for those of packages, and what is the same thing: a command in launch/ and the module that it starts."""
    paths = [path for path in sources("agsel", "tools", "tests") if path.name not in ("__init__.py", "__main__.py")]
    names = Counter(path.name for path in paths if not relative(path).startswith("tests/gpu/"))
    assert [name for name, count in names.items() if count > 1] == []


def private_names_of_deepspeed(path: Path) -> Iterator[str]:
    """Names with an underscore that a file imports from DeepSpeed, or takes from what it has imported from there."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imported = [
        alias
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if is_inside(getattr(node, "module", alias.name), {"deepspeed"})
    ]
    yield from (alias.name for alias in imported if is_private(alias.name))
    known = {(alias.asname or alias.name).split(".")[0] for alias in imported}
    for node in nodes:
        if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value).split(".")[0] in known:
            yield node.attr


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


@pytest.mark.parametrize("path", sources("agsel", "launch", "tools", "tests"), ids=relative)
def test_only_the_zero_room_knows_the_inside_of_deepspeed(path: Path) -> None:
    """Tests may build on classes that the zero room builds on; private names are for that room alone."""
    if relative(path).startswith("agsel/zero/"):
        return
    inside = [module for module in imported_by(path) if is_inside(module, {"deepspeed.runtime"})]
    assert not inside or relative(path).startswith("tests/zero/")
    assert list(private_names_of_deepspeed(path)) == []


def test_the_zero_room_does_know_it(tmp_path: Path) -> None:
    """The test above finds something where there is something to find."""
    modules = [module for path in sources("agsel/zero") for module in imported_by(path)]
    assert any(is_inside(module, {"deepspeed.runtime"}) for module in modules)
    names = [name for path in sources("agsel/zero") for name in private_names_of_deepspeed(path)]
    assert "_get_data_parallel_group" in names
    other = tmp_path / "other.py"
    other.write_text(
        "import deepspeed.utils\nfrom deepspeed.utils.groups import _clone_world_group as clone\n"
        "deepspeed.utils.groups._get_sequence_parallel_group(deepspeed.__version__)\n"
    )
    assert list(private_names_of_deepspeed(other)) == ["_clone_world_group", "_get_sequence_parallel_group"]


def distribution(requirement: str) -> str:
    """`deepspeed` of `deepspeed>=0.19.8,<0.20`, normalised."""
    name = requirement.split(";")[0]
    for separator in "[<>=!~ ":
        name = name.split(separator)[0]
    return name.lower().replace("_", "-")


def test_what_is_imported_is_declared() -> None:
    """By the project, or by transformers, which it needs anyway."""
    declared = {distribution(requirement) for requirement in REQUIREMENTS}
    declared |= {
        distribution(requirement) for requirement in requires("transformers") or () if "extra ==" not in requirement
    }
    providers = packages_distributions()
    undeclared = {
        f"{relative(path)}: {module}"
        for path in sources("agsel", "launch", "tools")
        for module in imported_by(path)
        if not is_standard(module) and not is_inside(module, {"agsel", "launch", "tools"})
        if not declared
        & {distribution(provider) for provider in providers.get(module.split(".")[0], [module.split(".")[0]])}
    }
    assert undeclared == set()


def test_requirements_have_a_lower_bound() -> None:
    """Stubs of types have no versions that matter; everything else says what it was tested with."""
    tested = [requirement for requirement in REQUIREMENTS if not requirement.startswith(("types-", "agsel["))]
    assert [requirement for requirement in tested if ">=" not in requirement] == []
