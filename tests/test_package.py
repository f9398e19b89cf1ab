from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cli_support import OPTIONAL
from repository import ROOT

import cai_graph

NEVER = ["torch", "transformers", "trl", "fastapi"]
"""What no part of the runtime loads, whatever is used of it."""
PROVIDERS = [
    "anthropic",
    "apsw",
    "gguf",
    "langchain",
    "numpy",
    "openai",
    "safetensors",
    "sklearn",
    "xllamacpp",
]
"""What is loaded where it is used: models, the log's file, the probe."""
HEAVY = [*NEVER, *PROVIDERS, "httpx", "langchain_core", "langgraph", "pydantic"]
"""What `import cai_graph` itself must not load."""


def python(code: str, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_after(code: str) -> set[str]:
    printed = python(f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")
    return set(json.loads(printed.splitlines()[-1]))


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import cai_graph").isdisjoint(HEAVY)


def test_building_datasets_loads_no_model_code() -> None:
    assert "langchain_core" not in loaded_after("import trainers.dataset")


def test_without_the_extras_only_what_is_imported_late_needs_them() -> None:
    printed = python(
        f"""
        import importlib, pkgutil, sys

        sys.modules.update(dict.fromkeys({OPTIONAL!r}))
        for package in ("cai_graph", "trainers"):
            path = importlib.import_module(package).__path__
            for _, name, _ in pkgutil.walk_packages(path, package + "."):
                try:
                    if not name.endswith("__main__"):
                        importlib.import_module(name)
                except ImportError:
                    print(name)
        """
    )

    assert set(printed.split()) == {
        "cai_graph.log.postgres",
        "cai_graph.log.postgres_session",
        "cai_graph.middleware",
        *(f"trainers.ppo.{name}" for name in ("formulas", "loop", "models", "state", "ways")),
    }


def test_the_whole_main_job_loads_neither_torch_nor_a_server_nor_a_provider() -> None:
    loaded = loaded_after(
        """
from cai_graph import *
model = ScriptedModel(replies=["hello", "?", "?"])
constitutional(model, log=None, on_unreadable="open").invoke("hi")
"""
    )

    assert loaded.isdisjoint([*NEVER, *PROVIDERS])


def test_all_is_what_can_be_imported() -> None:
    assert cai_graph.__all__ == sorted(cai_graph.__all__)
    for name in cai_graph.__all__:
        assert getattr(cai_graph, name) is not None
    starred: dict[str, Any] = {}
    exec("from cai_graph import *", starred)
    assert set(starred) - {"__builtins__"} == set(cai_graph.__all__)
    assert set(cai_graph.__all__) <= set(dir(cai_graph))


def test_a_type_checker_sees_the_same_names() -> None:
    source = Path(cai_graph.__file__).read_text(encoding="utf-8")

    declared = {line.rpartition(" as ")[2] for line in source.splitlines() if line.startswith("    from cai")}
    assert declared == set(cai_graph._HOME)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'constitutionel'"):
        _ = cai_graph.constitutionel


def test_where_processes_cannot_fork_the_import_says_which_systems_can() -> None:
    said = python(
        """
        import os

        del os.register_at_fork  # which Windows has not
        try:
            from cai_graph import constitutional
        except ImportError as error:
            print(error)
        """
    )
    assert said == "cai_graph needs a POSIX system: Linux or macOS; on Windows it runs in WSL\n"


def test_what_hinders_a_lazy_import_is_said() -> None:
    said = python(
        """
        import sys, types

        sys.modules["cai_graph.chain"] = types.ModuleType("chain")
        try:
            from cai_graph import constitutional
        except ImportError as error:
            print(error)
        """
    )
    assert said == (
        "constitutional cannot be imported from cai_graph: module 'chain' has no attribute 'constitutional'\n"
    )


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(cai_graph.__file__).parent / "py.typed").exists()


def test_the_licence_and_what_it_asks_to_be_named_go_into_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    assert set(project["license-files"]) == {"LICENSE", "NOTICE"}
    assert all((ROOT / name).is_file() for name in project["license-files"])


def test_imports_run_against_the_flow_of_data() -> None:
    """The contracts of pyproject.toml, by import-linter."""
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


def modules_in(package: Path) -> set[str]:
    return {
        path.stem if path.is_file() else path.name
        for path in package.iterdir()
        if not path.name.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").exists())
    }


def test_every_module_stands_in_the_import_contracts() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layered = [one for one in config["tool"]["importlinter"]["contracts"] if one["type"] == "layers"]
    assert len(layered) > 1

    for contract in layered:
        package = contract.get("containers", ["cai_graph"])[0]
        named = {
            name.strip().removeprefix("cai_graph.")
            for layer in contract["layers"]
            for name in layer.split("|")
        }
        assert modules_in(ROOT / package.replace(".", "/")) == named - {"trainers"}, package


def names_listed(tree: ast.Module) -> set[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value)) if isinstance(node.value, ast.List) else None
    return None


def names_defined(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {ast.unparse(target) for target in targets}
    return found


def names_taken(tree: ast.Module, trees: Mapping[str, ast.Module]) -> Iterator[tuple[str, str]]:
    """What a module imports from another, or reads as an attribute of one: that module, and the name."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                yield node.module, alias.name
                if (module := f"{node.module}.{alias.name}") in trees:
                    known[alias.asname or alias.name] = module
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            module = known[node.value.id]
            if node.attr in names_defined(trees[module]):  # else a variable has the module's name
                yield module, node.attr


def test_what_one_module_takes_from_another_stands_in_its_all() -> None:
    """Modules of commands have no `__all__`, and the package's own, which is computed, has tests above."""
    trees = {}
    for package in ("cai_graph", "trainers"):
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    listed = {name: names for name, tree in trees.items() if (names := names_listed(tree)) is not None}
    assert listed

    taken = {
        (module, attribute, name)
        for name, tree in trees.items()
        for module, attribute in names_taken(tree, trees)
        if module in listed and attribute not in listed[module] and f"{module}.{attribute}" not in trees
    }
    assert taken == set()


def test_no_model_is_loaded_with_code_or_a_pickle_of_its_folder() -> None:
    loaded = 0
    for path in (path for package in ("cai_graph", "trainers") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith(".from_pretrained"):
                continue
            loader, given = ast.unparse(node.func), {one.arg: ast.unparse(one.value) for one in node.keywords}
            if loader.startswith("PeftModel"):  # an adapter that was written a moment ago
                continue
            loaded += 1
            assert given.get("trust_remote_code") == "False", f"{path}: {loader}"
            if "Tokenizer" not in loader and "gguf_file" not in given:
                assert given.get("use_safetensors") == "True", f"{path}: {loader}"
    assert loaded >= 10


def test_every_benchmark_can_be_imported() -> None:
    script = (
        "import importlib\n"
        "from benchmarks.__main__ import ALL\n"
        "for name in ALL: importlib.import_module(f'benchmarks.{name}')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
