"""
What the main job would take on a machine that can be rented, in hours and dollars, by the formulas of scripts/plan.py.

For the launchers' --plan. Nothing here speaks to a provider: it takes an offer and its price.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from nanochat.cloud import Offer
from nanochat.cloud_http import dollars
from nanochat.common import UserError
from scripts import plan
from scripts.presets import GPUS, Machine


def describe_plan(offer: Offer, where: str, variables: Mapping[str, str], run_script: str) -> str:
    """What the run would take on `offer`, by scripts/plan.py's formulas, in hours and dollars."""
    machine = machine_of(offer)
    knobs = dict(variables)
    if "lite" in run_script:
        knobs.setdefault("PRESET", "lite")
    settings = plan.resolve(knobs, machine)
    stages = plan.work(settings)
    seconds = plan.seconds(settings, stages, machine.gpu, int(settings["NPROC"]))
    cost = round(seconds / 3600 * offer.price_cents_per_hour)
    rows = [
        f"    {w.stage:6} {w.num_steps:>8,} steps {w.num_tokens:>16,} tokens {w.flops:.1e} FLOPs"
        for w in stages
    ]
    return "\n".join(
        [
            f"would rent  {offer.instance_type} ({offer.description}) in {where}",
            f"price       {dollars(offer.price_cents_per_hour)} an hour",
            f"would run   {run_script}, preset {settings['PRESET']}, {settings['NPROC']} processes, "
            f"{plan.num_params(plan.model(settings)):,} parameters",
            *rows,
            f"training    {seconds / 3600:.2f} hours, {dollars(cost)}",
            "Set-up, downloads and evaluation come on top; what is assumed stands in scripts/presets.py. Nothing was rented.",
        ]
    )


def machine_of(offer: Offer) -> Machine:
    """The machine as scripts/plan.py sees it. Raises UserError for a GPU that presets.py does not know."""
    known = next((g for g in GPUS if re.search(g.pattern, offer.description)), None)
    if known is None:
        raise UserError(
            f"--plan: no figures for {offer.description}; scripts/presets.py knows {', '.join(g.name for g in GPUS)}"
        )
    return Machine((offer.description,) * offer.num_gpus, known.memory_gib, 16 * offer.num_gpus)
