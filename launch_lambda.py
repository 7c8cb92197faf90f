#!/usr/bin/env python3
"""
The simple Lambda launcher: rent a machine and start the main job on it.

    python launch_lambda.py --list-types
    python launch_lambda.py --instance-type=gpu_8x_h100_sxm5 --region=us-east-1
    python launch_lambda.py --terminate             the only machine there is, or --terminate=ID

The same code as `python -m scripts.launch_lambda_training`, with `--auto-start` on and WANDB_API_KEY handed over where it
is set; --no-deploy rents and proves the machine, and starts nothing. All flags of the other launcher work here too.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass

from nanochat.cloud_http import dollars
from nanochat.config import cli
from nanochat.lambda_cloud import LambdaCloud
from nanochat.launch_flags import read_dotenv, with_any
from scripts import launch_lambda_training as training

COMMAND = "python launch_lambda.py"


@dataclass(frozen=True)
class Config(training.Config):
    """Rent a Lambda machine and start the main job on it."""

    list_types: bool = False
    """show kinds of machines, prices and where one is free"""
    no_deploy: bool = False
    """rent only: start nothing"""


def list_types() -> None:
    """A table of offers, cheapest first, those that can be had before the others."""
    offers = LambdaCloud.from_environment().offers()
    print(f"{'instance type':28}{'GPUs':>5}{'an hour':>10}  free in")
    for offer in sorted(offers, key=lambda o: (not o.regions, o.price_cents_per_hour)):
        where = ", ".join(offer.regions) or "-"
        print(
            f"{offer.instance_type:28}{offer.num_gpus:>5}{dollars(offer.price_cents_per_hour):>10}  {where}"
        )


def main(config: Config) -> int:
    """List, or do what the launcher does, deploying by default."""
    if config.list_types:
        list_types()
        return 0
    injected = config.inject_env
    if not injected and os.environ.get("WANDB_API_KEY"):
        injected = ("WANDB_API_KEY",)
    deploys = not (config.no_deploy or config.skip_wait)
    config = dataclasses.replace(config, auto_start=config.auto_start or deploys, inject_env=injected)
    return training.main(config, COMMAND)


if __name__ == "__main__":
    read_dotenv()
    sys.exit(main(cli(Config, with_any(sys.argv[1:]))))
