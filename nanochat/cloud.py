"""
Rented machines: what can be rented, renting one exactly once, and giving it back whatever happens.

A provider is four methods (`Provider`); everything that guards money stands here, once for all of them:

    with rented(provider, order, keep=False) as instance:      an error, Ctrl-C or SIGTERM inside gives it back
        instance = wait_until_active(provider, instance, ...)

No provider has an idempotency key. So every order carries a tag that nobody else has, and when a launch gets no answer,
or an answer that may have come after the deed, the tag is looked for before anything is launched a second time.
Money is integer cents; hours of renting are never rounded down.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from nanochat.cloud_http import (
    PATIENCE,
    REAL_CLOCK,
    Ambiguous,
    Clock,
    CloudError,
    Missing,
    NoCapacity,
    Patience,
    Refused,
    Unavailable,
    dollars,
)
from nanochat.common import UserError

TAG_KEY = "nanochat-launch"
GONE = "gone"
FAILED = "failed"
ACTIVE = "active"
STARTING = "starting"
LAUNCHES = 3  # attempts whose outcome may be unknown


@dataclass(frozen=True, slots=True)
class Offer:
    """A kind of machine, its price, and where one is free now."""

    instance_type: str
    description: str
    num_gpus: int
    price_cents_per_hour: int
    """of the whole machine"""
    regions: tuple[str, ...]
    """with capacity, in the provider's order"""


@dataclass(frozen=True, slots=True)
class Order:
    """What to launch. `tag` is unique; `name` is for people."""

    instance_type: str
    region: str
    name: str
    ssh_key_name: str = ""
    num_gpus: int = 1
    user_data: str = ""
    image_id: str = ""
    image_family: str = ""
    price_cents_per_hour: int = 0
    tag: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass(frozen=True, slots=True)
class Instance:
    """A rented machine. It holds no secret and may be printed."""

    id: str
    name: str
    status: str
    """starting, active, failed or gone"""
    provider_status: str
    """the provider's own word"""
    address: str = ""
    port: int = 22
    user: str = "ubuntu"
    region: str = ""
    instance_type: str = ""
    price_cents_per_hour: int = 0
    tag: str = ""

    @property
    def running(self) -> bool:
        """True while it may cost money: everything but gone."""
        return self.status != GONE

    def __str__(self) -> str:
        where = f" at {self.address}" if self.address else ""
        price = f", {dollars(self.price_cents_per_hour)} an hour" if self.price_cents_per_hour else ""
        return f"{self.id} ({self.name or 'no name'}, {self.instance_type}, {self.region}{price}): {self.provider_status}{where}"


class Provider(Protocol):
    """Somebody who rents machines. Methods raise the errors of cloud_http.py."""

    name: str
    tags: bool
    """whether instances carry the order's tag; where they do not, a new one is told by not having been there before"""

    def offers(self) -> list[Offer]:
        """Every kind of machine, also those that nobody has free."""
        ...

    def launch(self, order: Order) -> str:
        """Launch one machine, never asking twice; its id."""
        ...

    def instances(self) -> list[Instance]:
        """Every machine of the account."""
        ...

    def status(self, instance_id: str) -> Instance:
        """One machine."""
        ...

    def terminate(self, instance_id: str) -> None:
        """Give a machine back; asking twice does no harm."""
        ...


def say(text: str) -> None:
    """A line for the person who watches; stdout is left to what was asked for."""
    print(text, file=sys.stderr, flush=True)


# ---- choosing ------------------------------------------------------------------------------------------------------


def find_offer(offers: Sequence[Offer], instance_type: str, *, max_cents_per_hour: int | None) -> Offer:
    """The offer of that type, whatever its capacity. Raises UserError for an unknown or too dear one."""
    found = next((offer for offer in offers if offer.instance_type == instance_type), None)
    if found is None:
        names = ", ".join(sorted(offer.instance_type for offer in offers)) or "none at all"
        raise UserError(f"--instance-type={instance_type} is not offered; there are {names}")
    if max_cents_per_hour is not None and found.price_cents_per_hour > max_cents_per_hour:
        raise UserError(
            f"--instance-type={instance_type} costs {dollars(found.price_cents_per_hour)} an hour, more than "
            f"--max-price={max_cents_per_hour / 100:g}; raise it or choose another type"
        )
    return found


def regions_to_try(offer: Offer, region: str) -> tuple[str, ...]:
    """The regions with capacity among those that the user allows. Raises NoCapacity where there is none."""
    if region == "auto":
        if not offer.regions:
            raise NoCapacity(
                f"{offer.instance_type}: no region has one free; try later, or --wait-for-capacity"
            )
        return offer.regions
    if region not in offer.regions:
        there = ", ".join(offer.regions) or "no region"
        raise NoCapacity(f"{offer.instance_type}: {region} has none free, {there} has; try --region=auto")
    return (region,)


# ---- launching exactly once ----------------------------------------------------------------------------------------


def launch_exactly_once(
    provider: Provider,
    order: Order,
    *,
    clock: Clock = REAL_CLOCK,
    patience: Patience = PATIENCE,
    looks: int = 6,
    before: set[str] | None = None,
    unanswered: list[str] | None = None,
) -> Instance:
    """
    Launch `order`, so that one machine runs when this returns and none when it raises.

    After a launch that may have happened the account is looked at `looks` times, since a list can lag behind;
    only when the machine is not there is a launch tried again. Refused and NoCapacity are the caller's to handle.
    `unanswered` collects the attempts of which nobody knows whether they may turn up later.
    """
    before = {instance.id for instance in provider.instances()} if before is None else before
    for attempt in range(1, LAUNCHES + 1):
        try:
            instance_id = provider.launch(order)
        except (Ambiguous, Unavailable) as error:
            say(f"{provider.name}: {error}; looking whether it was launched all the same")
            if unanswered is not None:
                unanswered.append(str(error))
            found = _look(provider, order, before, clock, patience, looks)
            if found is not None:
                say(f"{provider.name}: it was: {found}")
                if unanswered:
                    unanswered.pop()  # one attempt is explained, any others may still turn up
                return found
            if attempt == LAUNCHES:
                raise
            clock.sleep(patience.wait_seconds(attempt, getattr(error, "seconds", 0.0)))
        else:
            return Instance(
                instance_id, order.name, STARTING, "launched", region=order.region, tag=order.tag,
                instance_type=order.instance_type, price_cents_per_hour=order.price_cents_per_hour,
            )  # fmt: skip
    raise AssertionError("unreachable: the last attempt returns or raises")


def of_order(provider: Provider, order: Order, before: set[str]) -> list[Instance]:
    """The running machines that `order` made."""
    there = [i for i in provider.instances() if i.running]
    if provider.tags:
        return [i for i in there if i.tag == order.tag]
    return [i for i in there if i.id not in before]


def _look(
    provider: Provider, order: Order, before: set[str], clock: Clock, patience: Patience, looks: int
) -> Instance | None:
    for look in range(looks):
        if look:
            clock.sleep(patience.wait_seconds(look))
        found = of_order(provider, order, before)
        if len(found) > 1:
            names = ", ".join(i.id for i in found)
            raise CloudError(
                f"{provider.name}: cannot tell which of {names} is ours; look at the account's page"
            )
        if found:
            return found[0]
    return None


# ---- waiting -------------------------------------------------------------------------------------------------------


def wait_until_active(
    provider: Provider,
    instance: Instance,
    *,
    max_wait_seconds: float,
    poll_seconds: float,
    clock: Clock = REAL_CLOCK,
) -> Instance:
    """Poll until the machine is active and has an address. Raises CloudError when it fails or takes too long."""
    deadline, seen = clock.monotonic() + max_wait_seconds, ""
    while True:
        try:
            now = provider.status(instance.id)
        except Refused:
            raise
        except CloudError as error:  # also Missing: a new machine may not be listed yet
            say(f"{provider.name}: {error}; asking again")
            now = instance
        if now.provider_status != seen:
            say(f"{provider.name}: {now}")
            seen = now.provider_status
        if now.status == ACTIVE and now.address:
            return now
        if now.status in (FAILED, GONE):
            raise CloudError(
                f"{provider.name}: {instance.id} is {now.provider_status} and will not become active"
            )
        if clock.monotonic() >= deadline:
            raise CloudError(
                f"{provider.name}: {instance.id} is still {now.provider_status or 'not listed'} after "
                f"{max_wait_seconds / 60:g} minutes (--max-wait-minutes)"
            )
        clock.sleep(poll_seconds)


# ---- giving back ---------------------------------------------------------------------------------------------------


def terminate_surely(
    provider: Provider, instance_id: str, *, clock: Clock = REAL_CLOCK, patience: Patience = PATIENCE
) -> None:
    """Terminate and look whether it is true; raises CloudError, with what to do by hand, when it is not."""
    why = "it is still listed as running"
    for attempt in range(1, patience.attempts + 1):
        try:
            provider.terminate(instance_id)
            if not provider.status(instance_id).running:
                say(f"{provider.name}: {instance_id} is terminated, nothing more is paid for it")
                return
        except Missing:
            if instance_id not in {i.id for i in provider.instances() if i.running}:
                say(f"{provider.name}: {instance_id} does not exist (any more)")
                return
        except Refused as error:
            why = str(error)
            break
        except CloudError as error:
            why = str(error)
        if attempt < patience.attempts:
            clock.sleep(patience.wait_seconds(attempt))
    raise CloudError(
        f"{provider.name}: {instance_id} COULD NOT BE TERMINATED AND COSTS MONEY ({why}); "
        "terminate it on the provider's page now"
    )


@contextmanager
def rented(
    provider: Provider,
    order: Order,
    *,
    keep: bool = False,
    clock: Clock = REAL_CLOCK,
    patience: Patience = PATIENCE,
) -> Iterator[Instance]:
    """A launched machine, which is given back when the body raises anything at all, unless `keep`."""
    before = {instance.id for instance in provider.instances()}
    instance: Instance | None = None
    unanswered: list[str] = []
    try:
        instance = launch_exactly_once(
            provider, order, clock=clock, patience=patience, before=before, unanswered=unanswered
        )
        say(f"{provider.name}: launched {instance}")
        yield instance
    except BaseException as error:
        if keep and instance is not None:
            say(f"{provider.name}: --keep leaves {instance.id} running, and it costs money")
        elif instance is not None or not isinstance(error, (Refused, NoCapacity)):
            _give_back(provider, order, instance, before, clock, patience, len(unanswered))
        raise


def _give_back(
    provider: Provider,
    order: Order,
    instance: Instance | None,
    before: set[str],
    clock: Clock,
    patience: Patience,
    num_unanswered: int,
) -> None:
    """
    Terminate what the order made: the machine we know, and any that launches without an answer left behind.

    After such launches the account is looked at until as many machines have turned up, since a list can lag behind.
    """
    ended: set[str] = set()
    expected = num_unanswered + (instance is not None)
    # An interrupt may have come while the launch itself was on its way.
    looks = 3 * patience.attempts if num_unanswered else 1 if instance else patience.attempts
    if looks > 1:
        say(f"{provider.name}: looking for what a launch without an answer may have left behind")
    for look in range(looks):
        if look:
            clock.sleep(patience.wait_seconds(look))
        ids = {instance.id} if instance else set()
        try:
            # Without tags a machine that somebody else has just rented looks like ours: only where one is missing.
            if provider.tags or len(ids | ended) < max(expected, 1):
                ids |= {i.id for i in of_order(provider, order, before)}
        except CloudError as error:
            say(f"{provider.name}: {error}; look at the account's page for {order.name}")
        for instance_id in sorted(ids - ended):
            say(f"{provider.name}: giving {instance_id} back")
            try:
                terminate_surely(provider, instance_id, clock=clock, patience=patience)
            except (
                CloudError
            ) as error:  # the first error is the one to raise; this one must be read all the same
                say(f"error: {error}")
            ended.add(instance_id)
        if len(ended) >= max(expected, 1):
            return


def end_twins(provider: Provider, instance: Instance, *, clock: Clock = REAL_CLOCK) -> None:
    """Terminate other machines with this one's tag: launches without an answer that turned up late."""
    if provider.tags and instance.tag:
        for other in provider.instances():
            if other.running and other.tag == instance.tag and other.id != instance.id:
                say(f"{provider.name}: {other} was launched by an attempt that got no answer")
                terminate_surely(provider, other.id, clock=clock)
