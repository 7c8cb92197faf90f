"""
Rent GPUs on Hyperbolic's marketplace and start the main job on them. Experimental: its API has no published contract.

    python -m scripts.launch_hyperbolic_training --list --gpu-count=8
    python -m scripts.launch_hyperbolic_training --gpu-count=8 --max-price=20 --auto-start --inject-env=WANDB_API_KEY
    python -m scripts.launch_hyperbolic_training --status | --logs | --fetch | --terminate

HYPERBOLIC_API_KEY comes from the environment or .env; the SSH key is the one set on the account's page. Everything else, and
every guarantee, is that of scripts/launch_lambda_training: what fails before the run's first log lines is terminated.
Where the API answers strangely, try --api-version=v2, or rent by hand as README.md describes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from nanochat.cloud import Offer, Order
from nanochat.cloud_http import NoCapacity, dollars
from nanochat.common import UserError
from nanochat.config import cli
from nanochat.hyperbolic import Hyperbolic, Version
from nanochat.launch_flags import LaunchConfig, check, most_cents, read_dotenv, with_any
from nanochat.launched import after_launch, launch_and_watch
from nanochat.launcher import Launcher
from nanochat.remote_job import environment
from scripts.plan_rented import describe_plan

COMMAND = "python -m scripts.launch_hyperbolic_training"


@dataclass(frozen=True)
class Config(LaunchConfig):
    """Launch a training run on Hyperbolic (experimental)."""

    gpu_count: int = 1
    """GPUs of the machine"""
    region: str = ""
    """only machines there, such as us-west; by default anywhere"""
    supplier: str = ""
    """only machines of this supplier"""
    gpu: str = ""
    """only this model, such as H100"""
    list: bool = False
    """show what can be rented, cheapest first, and the account's credits"""
    api_version: Version = "v1"
    """generation of the API: v1 (marketplace) or v2 (virtual machines)"""


def matching(offers: Sequence[Offer], config: Config) -> list[Offer]:
    """What the flags allow, cheapest first."""
    most = most_cents(config)
    region = "" if config.region in ("auto", "any") else config.region.lower()
    found = [
        offer
        for offer in offers
        if region in offer.regions[0].lower()
        and (not config.supplier or config.supplier.lower() in offer.description.lower())
        and (not config.gpu or config.gpu.lower() in offer.description.lower())
        and (most is None or offer.price_cents_per_hour <= most)
    ]
    return sorted(found, key=lambda offer: (offer.price_cents_per_hour, offer.instance_type))


def places(config: Config, credits: int | None, offers: Sequence[Offer]) -> list[tuple[Offer, str]]:
    """
    What the flags allow and the credits pay an hour of, cheapest first.

    Raises NoCapacity where nothing matches now, UserError where the credits are too few.
    """
    found = matching(offers, config)
    if not found:
        raise NoCapacity(
            "Hyperbolic: no machine matches --gpu-count, --region, --supplier, --gpu and --max-price; see --list, or wait "
            "with --wait-for-capacity"
        )
    if credits is not None and credits < found[0].price_cents_per_hour:
        raise UserError(
            f"the account has {dollars(credits)}, less than an hour of {dollars(found[0].price_cents_per_hour)}; add credits"
        )
    return [(o, o.regions[0]) for o in found if credits is None or o.price_cents_per_hour <= credits]


def in_words(credits: int | None) -> str:
    return "not known" if credits is None else dollars(credits)


def show(offers: list[Offer], credits: int | None) -> None:
    """A table, and the credits."""
    for offer in offers:
        price = dollars(offer.price_cents_per_hour)
        print(f"{price:>10} an hour  {offer.description:40} {offer.regions[0]:16} {offer.instance_type}")
    print(f"{len(offers)} offers; credits: {in_words(credits)}")


def main(config: Config) -> int:
    """Do what the flags say; the exit code."""
    check(config)
    provider = Hyperbolic.from_environment(num_gpus=config.gpu_count, version=config.api_version)
    launcher = Launcher(provider, config)
    status = after_launch(launcher, COMMAND)
    if status is not None:
        return status
    credits = provider.balance_cents()
    if config.list:
        show(matching(provider.offers(), config), credits)
        return 0
    if config.plan:
        offer, region = places(config, None, provider.offers())[0]
        variables = environment(config.env, config.inject_env, os.environ)
        print(
            f"{describe_plan(offer, region, variables, config.run_script)}\ncredits     {in_words(credits)}"
        )
        return 0
    order = Order("", "", config.name, num_gpus=config.gpu_count)
    return launch_and_watch(launcher, order, partial(places, config, credits), COMMAND)


if __name__ == "__main__":
    read_dotenv()
    sys.exit(main(cli(Config, with_any(sys.argv[1:]))))
