"""The dashboards as data: every promised one is there, and W&B's own classes take them."""

from __future__ import annotations

import json

import pytest

from nanochat.common import UserError
from nanochat.dashboards import DASHBOARDS
from nanochat.metrics import METRICS, describe
from scripts.wandb_workspace import Config, main, plan, workspace


def test_every_curve_of_a_dashboard_is_described() -> None:
    names = {
        name
        for panels in DASHBOARDS.values()
        for panel in panels
        if panel.kind in ("line", "histogram")
        for name in panel.metrics
    }
    assert [name for name in names if not describe(name)] == []
    assert all(metric.healthy.endswith(".") for metric in METRICS.values())
    assert describe("attn/entropy_layer/7") == METRICS["attn/entropy_layer/*"].healthy
    assert describe("nothing/such") == ""


def test_a_dry_run_prints_the_five_dashboards_and_needs_no_account(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_ENTITY", "WANDB_PROJECT", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    main(Config(dry_run=True))
    found = json.loads(capsys.readouterr().out)
    names = [section["name"] for section in found["sections"]]
    assert names == ["KL Telemetry", "Answer Confidence", "Letters", "Attention", "Rollouts"]
    first = found["sections"][0]["panels"][0]
    assert first["healthy"]["rl/kl_letter_mean"] == describe("rl/kl_letter_mean")
    with pytest.raises(UserError, match="--entity is missing"):
        main(Config())


@pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")  # of the package itself, on import
def test_the_package_takes_every_panel() -> None:
    pytest.importorskip("wandb_workspaces", reason="needs the extra workspace")
    made = workspace(plan(Config(entity="me")))
    assert [len(section.panels) for section in made.sections] == [len(p) for p in DASHBOARDS.values()]
