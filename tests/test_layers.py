"""The house stands as DESIGN draws it: who may import whom, and what stays at the rim."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

LAYERS = [
    "common config schedule interruption locks",
    "tokenizer tokenizer_files conversation dataset shards tracking provenance run_files calculator statistics metrics dashboards",
    "architecture gpt head optim updates execution cloud_http cloud lambda_cloud hyperbolic remote remote_job",
    "checkpoint_manager checkpoint_writer checkpoints legacy dataloader curriculum packing engine decoder rows kv_cache sampling "
    "transcript jobs",
    "train rl policy_gradient shared_prefix letters attention accuracy evaluate core_eval",
    "stage supervised telemetry insight serving",
    "report_text figures",
    "run_record rl_gain",
    "guards listening api_schema answering streaming openai_routes web report launch_flags launcher launched publish export_hf bucket",
]
RIM = {  # package -> the only modules that may import it
    "wandb": {"tracking"},
    "requests": {"cloud_http", "dataset"},
    "fastapi": {"web", "openai_routes"},
    "starlette": {"web", "openai_routes", "streaming"},
    "pydantic": {"api_schema"},
    "treescope": {"attention"},
    "datasets": {"common"},
}
TORCH_FREE = {
    "common",
    "config",
    "schedule",
    "dataset",
    "tracking",
    "calculator",
    "statistics",
    "metrics",
    "dashboards",
    "report",
    "cloud",
    "cloud_http",
    "lambda_cloud",
    "hyperbolic",
    "remote",
    "remote_job",
    "launch_flags",
    "launcher",
    "launched",
    "checkpoints",
    "publish",
    "bucket",
}


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Dotted names that `path` imports; `top_level` leaves out those inside functions and TYPE_CHECKING blocks."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def test_tasks_import_no_torch_and_only_common_dataset_and_the_tool() -> None:
    for path in Path("tasks").glob("*.py"):
        assert "torch" not in roots(path), path
        assert "scripts" not in roots(path), path
        for name in imports(path):
            if name.startswith("nanochat."):
                assert name.split(".")[1] in {"common", "dataset", "calculator"}, f"{path} imports {name}"


def test_nanochat_imports_neither_tasks_nor_scripts() -> None:
    for path in Path("nanochat").glob("*.py"):
        assert not roots(path) & {"tasks", "scripts"}, path


SHARED_SCRIPTS = (
    "scripts.presets",
    "scripts.plan",
    "scripts.plan_rented",
)  # the plan is data too: launchers price it on other machines


def test_nothing_imports_scripts_but_the_shim() -> None:
    for folder in ("nanochat", "tasks", "scripts", "benchmarks"):
        for path in Path(folder).glob("*.py"):
            foreign = {name for name in imports(path) if name.startswith("scripts.")}
            if path.name != "sft_train.py":
                assert not {name for name in foreign if not name.startswith(SHARED_SCRIPTS)}, path


def test_no_module_imports_a_higher_layer() -> None:
    height = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
    for path in Path("nanochat").glob("*.py"):
        if path.stem == "__init__":
            continue
        assert path.stem in height, f"{path} has no layer: give it one in tests/test_layers.py"
        for name in imports(path):
            if name.startswith("nanochat."):
                other = name.split(".")[1]
                assert height[other] <= height[path.stem], f"{path} imports {name}, which is above it"


def test_packages_of_the_rim_stay_there() -> None:
    for path in [*Path("nanochat").glob("*.py"), *Path("tasks").glob("*.py")]:
        for package, allowed in RIM.items():
            if package in roots(path):
                assert path.stem in allowed, f"{path} imports {package}"


def test_modules_that_a_laptop_needs_import_no_torch_at_the_top() -> None:
    for path in Path("nanochat").glob("*.py"):
        if path.stem in TORCH_FREE:
            names = {name.split(".")[0] for name in imports(path, top_level=True)}
            assert "torch" not in names, path


def test_init_files_are_empty() -> None:
    for folder in ("nanochat", "tasks", "scripts"):
        assert (Path(folder) / "__init__.py").read_text() == ""
