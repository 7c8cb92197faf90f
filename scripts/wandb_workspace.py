"""
Build the Weights & Biases dashboards of a run: KL Telemetry, Answer Confidence, Letters, Attention, Rollouts.

    python -m scripts.wandb_workspace --entity ME --project nanochat-aquarat
    python -m scripts.wandb_workspace --dry-run          prints sections and panels as JSON; needs no account, no package

The dashboards are data: nanochat/dashboards.py; nanochat/metrics.py has a sentence on what a healthy curve looks like.
Saving needs the package wandb-workspaces (`uv sync --inexact --extra workspace`) and a key.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from nanochat.common import UserError
from nanochat.config import cli
from nanochat.dashboards import DASHBOARDS, Panel
from nanochat.metrics import describe
from nanochat.tracking import DEFAULT_PROJECT

STEP = "rl/step"


@dataclass(frozen=True)
class Config:
    """Build the Weights & Biases dashboards."""

    entity: str = ""
    """user or team; by default WANDB_ENTITY"""
    project: str = ""
    """by default WANDB_PROJECT or nanochat-aquarat"""
    name: str = "AQuA-RAT RL"
    """name of the workspace"""
    dry_run: bool = False
    """print the sections and panels as JSON and save nothing"""


def plan(config: Config) -> dict[str, Any]:
    """The workspace as plain data."""
    return {
        "entity": config.entity or os.environ.get("WANDB_ENTITY") or "",
        "project": config.project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
        "name": config.name,
        "sections": [
            {"name": name, "panels": [panel_plan(panel) for panel in panels]}
            for name, panels in DASHBOARDS.items()
        ],
    }


def panel_plan(panel: Panel) -> dict[str, Any]:
    """One panel as plain data, with its sentences."""
    sentences = {name: describe(name) for name in panel.metrics if describe(name)}
    return {"title": panel.title, "kind": panel.kind, "metrics": list(panel.metrics), "healthy": sentences}


def workspace(wanted: dict[str, Any]) -> Any:
    """The workspace as an object of wandb-workspaces."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise UserError(
            "wandb-workspaces is missing; install it with: uv sync --inexact --extra workspace"
        ) from None
    sections = [
        workspaces.Section(
            name=section["name"],
            is_open=True,
            panels=[panel_object(reports, panel) for panel in section["panels"]],
        )
        for section in wanted["sections"]
    ]
    return workspaces.Workspace(
        entity=wanted["entity"], project=wanted["project"], name=wanted["name"], sections=sections
    )


def panel_object(reports: Any, panel: dict[str, Any]) -> Any:
    """A chart, or a browser for tables, histograms and pictures."""
    exact = [name for name in panel["metrics"] if "*" not in name]
    if panel["kind"] != "line":
        return reports.MediaBrowser(title=panel["title"], media_keys=panel["metrics"])
    if len(exact) == len(panel["metrics"]):
        return reports.LinePlot(title=panel["title"], x=STEP, y=exact)
    # Layers and options have no fixed number: W&B takes a regular expression for them.
    pattern = "|".join(f"^{name.replace('*', '.*')}$" for name in panel["metrics"])
    return reports.LinePlot(title=panel["title"], x=STEP, metric_regex=pattern)


def main(config: Config) -> None:
    """Print the plan, or save the workspace and print its address."""
    wanted = plan(config)
    if config.dry_run:
        print(json.dumps(wanted, indent=1, ensure_ascii=False))
        return
    if not wanted["entity"]:
        raise UserError(
            "--entity is missing; give --entity=NAME or set WANDB_ENTITY (or look first with --dry-run)"
        )
    wished = workspace(wanted)
    try:
        saved = wished.save()
    except Exception as error:  # whatever the account, the key or the network says: one line of it
        raise UserError(f"the workspace cannot be saved: {' '.join(str(error).split())[:300]}") from error
    print(f"workspace: {saved.url}")


if __name__ == "__main__":
    main(cli(Config))
