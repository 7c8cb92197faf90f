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

import sys
from dataclasses import dataclass

from nanochat.cloud import Offer, Order
from nanochat.cloud_http import NoCapacity, cents, dollars
from nanochat.common import UserError
from nanochat.config import cli
from nanochat.hyperbolic import Hyperbolic, Version
from nanochat.launcher import LaunchConfig, Launcher, after_launch, check, launch_and_watch, with_any

COMMAND = "python -m scripts.launch_hyperbolic_training"


@dataclass(frozen=True)
class Config(LaunchConfig):
    """Launch a training run on Hyperbolic (experimental)."""

    gpu_count: int = 1
    """GPUs of the machine"""
    region: str = ""
    """only machines there; by default anywhere"""
    supplier: str = ""
    """only machines of this supplier"""
    gpu: str = ""
    """only this model, such as H100"""
    list: bool = False
    """show what can be rented, cheapest first, and the account's credits"""
    api_version: Version = "v1"
    """generation of the API: v1 (marketplace) or v2 (virtual machines)"""


def matching(offers: list[Offer], config: Config) -> list[Offer]:
    """What the flags allow, cheapest first."""
    most = None if config.max_price is None else cents(config.max_price, "--max-price")
    found = [
        offer
        for offer in offers
        if (not config.region or config.region.lower() in offer.regions[0].lower())
        and (not config.supplier or config.supplier.lower() in offer.description.lower())
        and (not config.gpu or config.gpu.lower() in offer.description.lower())
        and (most is None or offer.price_cents_per_hour <= most)
    ]
    return sorted(found, key=lambda offer: (offer.price_cents_per_hour, offer.instance_type))


def show(offers: list[Offer], provider: Hyperbolic) -> None:
    """A table, and the credits where the account has any to show."""
    for offer in offers:
        print(
            f"{dollars(offer.price_cents_per_hour):>10} an hour  {offer.description:40} {offer.regions[0]:16} {offer.instance_type}"
        )
    print(f"{len(offers)} offers; credits: {dollars(provider.balance_cents())}")


def main(config: Config) -> int:
    """Do what the flags say; the exit code."""
    check(config)
    provider = Hyperbolic.from_environment(num_gpus=config.gpu_count, version=config.api_version)
    launcher = Launcher(provider, config)
    status = after_launch(launcher, COMMAND)
    if status is not None:
        return status
    offers = matching(provider.offers(), config)
    if config.list:
        show(offers, provider)
        return 0
    if not offers:
        raise NoCapacity(
            "Hyperbolic: no machine matches --gpu-count, --region, --supplier, --gpu and --max-price; see --list"
        )
    cheapest = offers[0]
    credits = provider.balance_cents()
    if config.plan:
        print(f"would rent {cheapest.description}, {cheapest.instance_type}, {dollars(cheapest.price_cents_per_hour)} an hour; credits {dollars(credits)}")  # fmt: skip
        return 0
    if credits < cheapest.price_cents_per_hour:
        raise UserError(
            f"the account has {dollars(credits)}, less than an hour of {dollars(cheapest.price_cents_per_hour)}; add credits"
        )
    order = Order(cheapest.instance_type, cheapest.regions[0], config.name, num_gpus=config.gpu_count)
    return launch_and_watch(launcher, order, "auto", COMMAND)


def read_dotenv() -> None:
    """Take .env of the working directory into the environment; what is there already wins."""
    try:
        from dotenv import load_dotenv
    except ImportError:  # a laptop without the packages: the environment alone
        return
    load_dotenv(".env")


if __name__ == "__main__":
    read_dotenv()
    sys.exit(main(cli(Config, with_any(sys.argv[1:]))))
