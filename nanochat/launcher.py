"""
From nothing to a run that is proven alive: find a place, rent, boot, start, look. Whoever the provider is.

Everything that can be wrong is looked at before a cent is spent, and whatever goes wrong between the launch and the first
log lines of the run terminates the machine. What is asked for stands in launch_flags.py, what becomes of the machine
afterwards in launched.py. torch is not needed.
"""

from __future__ import annotations

import os
import signal
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanochat import remote_job
from nanochat.cloud import Instance, Offer, Order, Provider, end_twins, rented, say, wait_until_active
from nanochat.cloud_http import PATIENCE, REAL_CLOCK, Clock, CloudError, NoCapacity, Patience, dollars
from nanochat.launch_flags import LaunchConfig, job_of, most_cents
from nanochat.remote import Remote, SshError, need, reach, wait_for_ssh
from nanochat.remote_job import Job

CAPACITY_SECONDS = 60.0
START_SECONDS = 180.0

Choose = Callable[[Sequence[Offer]], Sequence[tuple[Offer, str]]]
"""From what is offered now to the offers and regions to try, in this order. Raises NoCapacity where nothing is free now, and
UserError for what no waiting can cure; keeps the user's limits."""


@dataclass(frozen=True, slots=True)
class Launcher:
    """One provider, the flags, and time."""

    provider: Provider
    config: LaunchConfig
    clock: Clock = REAL_CLOCK
    patience: Patience = PATIENCE

    def places(self, choose: Choose) -> Iterator[tuple[Offer, str]]:
        """Offers and regions to try; with --wait-for-capacity asked for anew until --capacity-hours are over."""
        deadline = self.clock.monotonic() + self.config.capacity_hours * 3600
        while True:
            try:
                yield from choose(self.provider.offers())
                raise NoCapacity("every machine that was free was lost meanwhile; try again")
            except NoCapacity as error:
                if not self.config.wait_for_capacity:
                    raise
                if self.clock.monotonic() + CAPACITY_SECONDS > deadline:
                    raise NoCapacity(
                        f"{error}; waited for --capacity-hours={self.config.capacity_hours:g}, nothing was rented"
                    ) from None
                say(
                    f"{error}; asking again in {CAPACITY_SECONDS:.0f} s (Ctrl-C ends this, nothing is rented)"
                )
            self.clock.sleep(CAPACITY_SECONDS)

    def launch(self, order: Order, choose: Choose) -> Remote | Instance:
        """Rent the first machine that can be had and, with --auto-start, start the run on it."""
        config = self.config
        job, variables = job_of(config), remote_job.environment(config.env, config.inject_env, os.environ)
        # A value that cannot be written must be found out before anything is rented.
        remote_job.dotenv(variables)
        if not config.skip_wait:
            need("ssh")
        for offer, place in self.places(choose):
            say(f"renting {offer.description} in {place} for {dollars(offer.price_cents_per_hour)} an hour")
            here = replace(
                order, instance_type=offer.instance_type, region=place,
                num_gpus=offer.num_gpus, price_cents_per_hour=offer.price_cents_per_hour,
            )  # fmt: skip
            keeping: dict[str, Any] = {"keep": config.keep, "clock": self.clock, "patience": self.patience}
            try:
                with ending_signals(), rented(self.provider, here, **keeping) as instance:
                    return instance if config.skip_wait else self.bring_up(instance, job, variables)
            except NoCapacity as error:
                say(f"{error}; trying the next")
        raise AssertionError("unreachable: places() raises at its end")

    def bring_up(self, instance: Instance, job: Job, variables: Mapping[str, str]) -> Remote:
        """From launched to proven: active, reachable, prepared, started."""
        config, seconds = self.config, self.config.max_wait_minutes * 60
        waiting: dict[str, Any] = {"poll_seconds": config.poll_seconds, "clock": self.clock}
        active = wait_until_active(self.provider, instance, max_wait_seconds=seconds, **waiting)
        self.check_price(active)
        end_twins(self.provider, active, clock=self.clock)
        remote = reach(
            active, self.provider.name,
            identity_file=config.identity_file, directory=job.directory, session=job.session,
        )  # fmt: skip
        wait_for_ssh(remote, max_wait_seconds=seconds, **waiting)
        say(f"ssh works; its host key is pinned in {remote.known_hosts}")
        if config.auto_start:
            self.start(remote, job, variables, instance.tag or instance.id)
        return remote

    def check_price(self, instance: Instance) -> None:
        """Raise CloudError for a machine that turns out dearer than --max-price; which gives it back."""
        most, price = most_cents(self.config), instance.price_cents_per_hour
        if most is not None and price > most:
            raise CloudError(
                f"{instance.id} costs {dollars(price)} an hour, more than --max-price={most / 100:g}"
            )

    def start(self, remote: Remote, job: Job, variables: Mapping[str, str], launch: str) -> None:
        """Check the repository out, hand .env over, start the driver, and prove that it runs."""
        commit = remote_job.prepare(remote, job)
        say(f"checked out {job.repo_url} at {commit[:12]}")
        if variables:
            remote_job.hand_over(remote, job, variables)
            say(f"wrote .env (mode 600) with {', '.join(sorted(variables))}")
        remote_job.start(remote, job, launch, variables.get("NANOCHAT_BASE_DIR") or remote_job.DEFAULT_BASE)
        say(self.prove(remote))

    def prove(self, remote: Remote) -> str:
        """Wait until tmux, driver and GPU are alive and the log has lines; those lines. Raises SshError otherwise."""
        deadline = self.clock.monotonic() + START_SECONDS
        while True:
            sign = remote_job.look(remote)
            if sign.ended and sign.status != 0:
                lines = remote_job.last_lines(remote)
                raise SshError(f"the run ended at once with exit code {sign.status}; its log:\n{lines}")
            if not sign.gpu:
                raise SshError("nvidia-smi sees no GPU on the machine; it is of no use, try another region")
            if (sign.alive or sign.ended) and sign.num_lines:
                lines = remote_job.last_lines(remote)
                return f"tmux, driver and {sign.gpu} are alive; the log begins:\n{lines}"
            if self.clock.monotonic() >= deadline:
                alive = ", ".join(
                    f"{n} {'yes' if v else 'NO'}" for n, v in (("tmux", sign.tmux), ("driver", sign.driver))
                )
                raise SshError(
                    f"no sign of the run after {START_SECONDS:.0f} s: {alive}, {sign.num_lines} log lines"
                )
            self.clock.sleep(min(self.config.poll_seconds, 5.0))


class ending_signals:
    """Inside, SIGTERM and SIGHUP raise SystemExit, so that a machine is given back; put back at the end."""

    def __enter__(self) -> None:
        def end(number: int, frame: types.FrameType | None) -> None:
            raise SystemExit(128 + number)

        self._before: dict[int, Any] = {}
        for number in (signal.SIGTERM, signal.SIGHUP):
            try:
                self._before[number] = signal.signal(number, end)
            except ValueError:  # not in the main thread, where signals are not ours
                return

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
