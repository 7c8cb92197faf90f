"""
Rent a Lambda machine, start the main job on it, prove that it runs, bring everything home, give it back.

    python -m scripts.launch_lambda_training --plan --instance-type=gpu_8x_h100_sxm5
    python -m scripts.launch_lambda_training --ssh-key-name=KEY --region=auto --max-price=30 \\
        --auto-start --inject-env=WANDB_API_KEY --terminate-when-done
    python -m scripts.launch_lambda_training --status | --logs | --fetch | --terminate

The last four mean the only machine there is, or take an id or a name. LAMBDA_API_KEY comes from the environment or .env.
Keys go over SSH into a file that only the run can read, never into user-data, argv or a log. Whatever goes wrong before
the run's first log lines terminates what was launched; `shutdown` on the machine would not, Lambda goes on billing.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from nanochat.cloud import Offer, Order, find_offer, regions_to_try
from nanochat.common import UserError
from nanochat.config import cli
from nanochat.lambda_cloud import LambdaCloud
from nanochat.launch_flags import LaunchConfig, check, most_cents, read_dotenv, with_any
from nanochat.launched import after_launch, launch_and_watch
from nanochat.launcher import Launcher
from nanochat.remote_job import environment
from scripts.plan_rented import describe_plan
from scripts.presets import GPUS

COMMAND = "python -m scripts.launch_lambda_training"
USER_DATA = """#cloud-config
package_update: true
packages: [git, tmux, curl, rsync]
"""


@dataclass(frozen=True)
class Config(LaunchConfig):
    """Launch a training run on Lambda Cloud."""

    ssh_key_name: str = ""
    """SSH key of the Lambda account; by default the only one there is"""
    instance_type: str = "gpu_1x_a10"
    """kind of machine; python launch_lambda.py --list-types shows them"""
    region: str = "auto"
    """such as us-east-1; auto: the first that has one free"""
    image_id: str = ""
    """machine image; by default Lambda's newest Lambda Stack"""
    image_family: str = ""
    """family of the machine image, in place of its id"""
    no_user_data: bool = False
    """no cloud-init: the tools are installed over SSH"""
    print_user_data: bool = False
    """print the cloud-init text, which holds no secret, and stop"""


def order_of(config: Config, key_name: str) -> Order:
    """What the flags ask for."""
    if config.image_id and config.image_family:
        raise UserError("--image-id and --image-family both name the image; leave one out")
    return Order(
        instance_type=config.instance_type,
        region=config.region,
        name=config.name,
        ssh_key_name=key_name,
        user_data="" if config.no_user_data else USER_DATA,
        image_id=config.image_id,
        image_family=config.image_family,
    )


def places(config: Config, offers: Sequence[Offer]) -> list[tuple[Offer, str]]:
    """The wanted type in every region that has one and is allowed. Raises as find_offer and regions_to_try do."""
    offer = find_offer(offers, config.instance_type, max_cents_per_hour=most_cents(config))
    return [(offer, region) for region in regions_to_try(offer, config.region)]


def choose_key(wanted: str, there: list[str]) -> str:
    """The account's SSH key of that name, or its only one: Lambda takes exactly one. Raises UserError otherwise."""
    if wanted in there:
        return wanted
    if not wanted and len(there) == 1:
        return there[0]
    listed = ", ".join(there) or "none; add one at https://cloud.lambda.ai/ssh-keys"
    raise UserError(f"--ssh-key-name={wanted}: the account has {listed}; name one of them")


def listed_offer(instance_type: str) -> Offer:
    """An offer at the list price of presets.py, for a plan without a key."""
    match = re.fullmatch(r"gpu_(\d+)x_([a-z0-9]+)(_\w+)?", instance_type)
    words = "" if match is None else f"{match[2]} {'80' if '80gb' in instance_type else ''}".upper()
    known = next((g for g in GPUS if match and re.search(g.pattern, words)), None)
    if match is None or known is None:
        raise UserError(
            f"--instance-type={instance_type}: without LAMBDA_API_KEY only types like gpu_8x_h100 can be planned"
        )
    count = int(match[1])
    return Offer(
        instance_type, f"{count}x {known.name}", count, round(100 * known.dollars_per_hour * count), ()
    )


def show_plan(config: Config) -> None:
    """Print the plan: today's price with a key, the list price without one."""
    variables = environment(config.env, config.inject_env, os.environ)
    if os.environ.get("LAMBDA_API_KEY"):
        offers = LambdaCloud.from_environment().offers()
        offer = find_offer(offers, config.instance_type, max_cents_per_hour=most_cents(config))
    else:
        offer = listed_offer(config.instance_type)
        print("LAMBDA_API_KEY is not set: the price is the list price of scripts/presets.py")
    where = config.region if config.region != "auto" else ", ".join(offer.regions) or "no region now"
    print(describe_plan(offer, where, variables, config.run_script))


def main(config: Config, command: str = COMMAND) -> int:
    """Do what the flags say; the exit code."""
    check(config)
    if config.print_user_data:
        print(USER_DATA, end="")
        return 0
    if config.plan:
        show_plan(config)
        return 0
    provider = LambdaCloud.from_environment()
    launcher = Launcher(provider, config)
    status = after_launch(launcher, command)
    if status is not None:
        return status
    order = order_of(config, choose_key(config.ssh_key_name, provider.ssh_key_names()))
    return launch_and_watch(launcher, order, partial(places, config), command)


if __name__ == "__main__":
    read_dotenv()
    sys.exit(main(cli(Config, with_any(sys.argv[1:]))))
