"""
What every launcher does, whoever the provider is: rent, start, prove that it runs, follow, fetch, give back.

    launch(...)     everything that can be wrong is looked at before a cent is spent; whatever goes wrong between
                    the launch and the first log lines of the run terminates the machine
    watch(...)      waits for the marker of the end, brings the files home, and only then terminates

Losing the results of a day is worse than an hour's rent: when the files cannot be brought home, `watch` says so loudly
and leaves the machine. torch is not needed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanochat import remote_job
from nanochat.checkpoints import STAGES, RefusedCheckpoint, checkpoints
from nanochat.cloud import (
    FAILED,
    GONE,
    Instance,
    Offer,
    Order,
    Provider,
    end_twins,
    find_offer,
    regions_to_try,
    rented,
    say,
    terminate_surely,
    wait_until_active,
)
from nanochat.cloud_http import (
    PATIENCE,
    REAL_CLOCK,
    Clock,
    CloudError,
    Missing,
    NoCapacity,
    Patience,
    cents,
    dollars,
)
from nanochat.common import UserError, base_dir
from nanochat.remote import Remote, SshError, fetch, follow, need, reach, remembered, wait_for_ssh
from nanochat.remote_job import Job

REPOSITORY = "https://github.com/HarleyCoops/nanochatAquaRat.git"
DIRECTORY = "nanochatAquaRat"
ANY = "any"
WITHOUT_VALUE = ("--status", "--logs", "--fetch", "--terminate", "--attach")
CAPACITY_SECONDS = 60.0
START_SECONDS = 180.0

USER_DATA = """#cloud-config
package_update: true
packages: [git, tmux, curl, rsync]
"""


@dataclass(frozen=True)
class LaunchConfig:
    """The flags that all launchers share."""

    max_price: float | None = None
    """most dollars an hour for the whole machine; nothing dearer is launched"""
    wait_for_capacity: bool = False
    """where none is free, ask again every minute until one is; costs nothing"""
    plan: bool = False
    """say what would be rented, for how long and how many dollars, and rent nothing"""
    auto_start: bool = False
    """start the run script after boot and prove that it runs"""
    inject_env: tuple[str, ...] = ()
    """name of a variable whose value goes over SSH into .env (mode 600); may be repeated, or names with commas"""
    env: tuple[str, ...] = ()
    """NAME=VALUE for the run, nothing secret; may be repeated"""
    repo_url: str = ""
    """what to run; by default this checkout's origin"""
    branch: str = ""
    """branch or tag; by default the repository's own"""
    run_script: str = "run_aquarat_small.sh"
    """the driver"""
    tmux_session: str = "nanochat"
    """name of the tmux session"""
    name: str = "nanochat-aquarat"
    """name of the machine, for people"""
    identity_file: str = ""
    """private key for SSH; by default what ssh itself would take"""
    max_wait_minutes: float = 20.0
    """longest wait for boot and SSH each; then the machine is terminated"""
    poll_seconds: float = 15.0
    """between looks while waiting"""
    skip_wait: bool = False
    """return as soon as the launch is accepted; the machine runs on, unproven"""
    keep: bool = False
    """never terminate by ourselves, also after a failure"""
    terminate_when_done: bool = False
    """stay, wait for the end of the run, fetch, then terminate"""
    max_hours: float | None = None
    """with --terminate-when-done: end it after so many hours, done or not"""
    status: str = ""
    """list the machines, or one by id or name, and how its run does"""
    logs: str = ""
    """follow the log of a machine: id or name, where there are several"""
    fetch: str = ""
    """bring reports and checkpoints home: id or name; goes on where it broke"""
    fetch_to: str = ""
    """folder for --fetch; by default fetched/NAME in the base dir"""
    fetch_optimizer: bool = False
    """fetch optimizer states too, to go on with training at home"""
    terminate: str = ""
    """terminate a machine: id or name"""
    attach: str = ""
    """with --terminate-when-done: a machine that was launched before"""


def with_any(argv: Sequence[str]) -> list[str]:
    """`--status` and the like may stand without a value: the only machine there is."""
    words = list(argv)
    for index, word in enumerate(words):
        alone = index + 1 == len(words) or words[index + 1].startswith("-")
        if word in WITHOUT_VALUE and alone:
            words[index] = f"{word}={ANY}"
    return words


def check(config: LaunchConfig) -> None:
    """Raise UserError for flags that contradict one another."""
    if config.skip_wait and (config.auto_start or config.terminate_when_done):
        raise UserError(
            "--skip-wait returns before there is anything to start on; leave it out, or --auto-start"
        )
    if config.terminate_when_done and not (config.auto_start or config.attach):
        raise UserError("--terminate-when-done waits for the end of a run; add --auto-start, or --attach ID")
    if config.terminate_when_done and config.keep:
        raise UserError("--terminate-when-done and --keep contradict each other; leave one out")
    if config.max_wait_minutes <= 0 or config.poll_seconds <= 0:
        raise UserError("--max-wait-minutes and --poll-seconds must be above 0")


def job_of(config: LaunchConfig) -> Job:
    """What is to run on the machine."""
    url = config.repo_url or origin() or REPOSITORY
    return Job(url, config.branch, config.run_script, config.tmux_session, DIRECTORY)


def origin() -> str:
    """This checkout's origin as an address that needs no key, or ''."""
    try:
        done = subprocess.run(
            ["git", "remote", "get-url", "origin"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    url = done.stdout.strip()
    if url.startswith("git@"):
        host, _, path = url.removeprefix("git@").partition(":")
        url = f"https://{host}/{path}"
    return url if url.startswith("https://") and "@" not in url else ""


# ---- launching -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Launcher:
    """One provider, the flags, and time."""

    provider: Provider
    config: LaunchConfig
    clock: Clock = REAL_CLOCK
    patience: Patience = PATIENCE

    def places(self, instance_type: str, region: str) -> Iterator[tuple[Offer, str]]:
        """Offers and regions to try, the account's limits kept; asks again for ever with --wait-for-capacity."""
        config = self.config
        most = None if config.max_price is None else cents(config.max_price, "--max-price")
        while True:
            offer = find_offer(self.provider.offers(), instance_type, max_cents_per_hour=most)
            try:
                for place in regions_to_try(offer, region):
                    yield offer, place
                raise NoCapacity(f"{instance_type}: every region with one free lost it meanwhile; try again")
            except NoCapacity as error:
                if not config.wait_for_capacity:
                    raise
                say(
                    f"{error}; asking again in {CAPACITY_SECONDS:.0f} s (Ctrl-C ends this, nothing is rented)"
                )
            self.clock.sleep(CAPACITY_SECONDS)

    def launch(self, order: Order, region: str) -> Remote | Instance:
        """Rent the first machine that can be had and, with --auto-start, start the run on it."""
        config = self.config
        job, variables = job_of(config), remote_job.environment(config.env, config.inject_env, os.environ)
        remote_job.dotenv(
            variables
        )  # a value that cannot be written must be found out before anything is rented
        if not config.skip_wait:
            need("ssh")
        for offer, place in self.places(order.instance_type, region):
            say(f"renting {offer.description} in {place} for {dollars(offer.price_cents_per_hour)} an hour")
            here = replace(
                order, region=place, num_gpus=offer.num_gpus, price_cents_per_hour=offer.price_cents_per_hour
            )
            try:
                with (
                    ending_signals(),
                    rented(
                        self.provider, here, keep=config.keep, clock=self.clock, patience=self.patience
                    ) as instance,
                ):
                    return instance if config.skip_wait else self.bring_up(instance, job, variables)
            except NoCapacity as error:
                say(f"{error}; trying the next")
        raise AssertionError("unreachable: places() raises at its end")

    def bring_up(self, instance: Instance, job: Job, variables: Mapping[str, str]) -> Remote:
        """From launched to proven: active, reachable, prepared, started."""
        config, seconds = self.config, self.config.max_wait_minutes * 60
        active = wait_until_active(
            self.provider,
            instance,
            max_wait_seconds=seconds,
            poll_seconds=config.poll_seconds,
            clock=self.clock,
        )
        end_twins(self.provider, active, clock=self.clock)
        remote = reach(
            active, self.provider.name,
            identity_file=config.identity_file, directory=job.directory, session=job.session,
        )  # fmt: skip
        wait_for_ssh(remote, max_wait_seconds=seconds, poll_seconds=config.poll_seconds, clock=self.clock)
        say(f"ssh works; its host key is pinned in {remote.known_hosts}")
        if config.auto_start:
            commit = remote_job.prepare(remote, job)
            say(f"checked out {job.repo_url} at {commit[:12]}")
            if variables:
                remote_job.hand_over(remote, job, variables)
                say(f"wrote .env (mode 600) with {', '.join(sorted(variables))}")
            base = variables.get("NANOCHAT_BASE_DIR") or remote_job.DEFAULT_BASE
            remote_job.start(remote, job, instance.tag or instance.id, base)
            say(self.prove(remote))
        return remote

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
                return (
                    f"tmux, driver and {sign.gpu} are alive; the log begins:\n{remote_job.last_lines(remote)}"
                )
            if self.clock.monotonic() >= deadline:
                alive = ", ".join(
                    f"{n} {'yes' if v else 'NO'}" for n, v in (("tmux", sign.tmux), ("driver", sign.driver))
                )
                raise SshError(
                    f"no sign of the run after {START_SECONDS:.0f} s: {alive}, {sign.num_lines} log lines"
                )
            self.clock.sleep(min(self.config.poll_seconds, 5.0))

    # ---- afterwards ------------------------------------------------------------------------------------------------

    def find(self, word: str) -> Instance:
        """The machine of that id or name; for ANY the only one that was launched from here. Raises UserError."""
        ours = {remote.instance_id for remote in remembered(self.provider.name)}
        there = [i for i in self.provider.instances() if i.running]
        if word == ANY:
            found = [i for i in there if i.tag or i.id in ours]
        else:
            found = [i for i in there if word in (i.id, i.name)]
        if len(found) == 1:
            return found[0]
        listed = "".join(f"\n    {i}" for i in (found or there)) or " there is none"
        what = (
            "several machines; name one by its id"
            if found
            else f"no machine {'of ours' if word == ANY else word}"
        )
        raise UserError(f"{self.provider.name}: {what}:{listed}")

    def remote(self, instance: Instance) -> Remote:
        """How to reach a machine, also one that was launched elsewhere."""
        for remote in remembered(self.provider.name):
            if remote.instance_id == instance.id and remote.address == instance.address:
                return remote
        if not instance.address:
            raise UserError(f"{instance.id} is {instance.provider_status} and has no address yet; wait")
        config = self.config
        return reach(
            instance, self.provider.name,
            identity_file=config.identity_file, directory=DIRECTORY, session=config.tmux_session,
        )  # fmt: skip

    def show_status(self, word: str) -> None:
        """Print the machines, what they cost, and how their runs do."""
        there = self.provider.instances() if word == ANY else [self.find(word)]
        for instance in there:
            print(instance)
            if instance.running and instance.address:
                try:
                    sign = remote_job.look(self.remote(instance))
                except CloudError as error:
                    print(f"    {error}")
                    continue
                state = "running" if sign.status is None else f"ended with exit code {sign.status}"
                print(
                    f"    run {state}; tmux {sign.tmux}, driver {sign.driver}, GPU {sign.gpu or 'none'}, {sign.num_lines} log lines"
                )
        cost = sum(i.price_cents_per_hour for i in there if i.running)
        print(f"{sum(i.running for i in there)} running, {dollars(cost)} an hour together")

    def follow(self, word: str) -> int:
        """Follow the log until the run ends or Ctrl-C."""
        remote = self.remote(self.find(word))
        return follow(remote, remote_job.follow_script(remote))

    def fetch(self, remote: Remote) -> Path:
        """Bring reports and checkpoints home, and look whether they are whole."""
        config = self.config
        target = (
            Path(config.fetch_to).expanduser() if config.fetch_to else base_dir() / "fetched" / remote.name
        )
        folders = ["report", "runs", "tokenizer", *STAGES.values()]
        rules = [] if config.fetch_optimizer else ["- optim_*"]
        rules += ["- *.unfinished", *(f"+ /{folder}/***" for folder in folders), "- *"]
        fetch(remote, remote_job.base_of(remote), target, patterns=rules, clock=self.clock)
        log = ["+ /training.log", "+ /report.md", "- *"]
        fetch(remote, remote.directory, target / "checkout", patterns=log, clock=self.clock)
        say(f"fetched to {target}: {describe_fetched(target)}")
        return target

    def terminate(self, word: str) -> None:
        """Terminate one machine and see that it is true."""
        terminate_surely(self.provider, self.find(word).id, clock=self.clock, patience=self.patience)

    def watch(self, remote: Remote) -> int:
        """Wait for the end of the run, fetch, terminate; the run's exit code, 1 where it is not known."""
        deadline = (
            None if self.config.max_hours is None else self.clock.monotonic() + self.config.max_hours * 3600
        )
        status = self._wait_for_end(remote, deadline)
        try:
            self.fetch(remote)
        except CloudError as error:
            raise CloudError(
                f"{error}\n{remote.instance_id} IS LEFT RUNNING AND COSTS MONEY, because its results are only there; "
                f"run --fetch={remote.instance_id}, then --terminate={remote.instance_id}"
            ) from None
        terminate_surely(self.provider, remote.instance_id, clock=self.clock, patience=self.patience)
        return 1 if status is None else status

    def _wait_for_end(self, remote: Remote, deadline: float | None) -> int | None:
        """The exit code, or None when time is up or the session has vanished."""
        wait, lost = max(self.config.poll_seconds, 1.0), 0
        while deadline is None or self.clock.monotonic() < deadline:
            try:
                sign = remote_job.look(remote)
                lost = 0 if sign.alive or sign.ended else lost + 1
                if sign.ended:
                    say(f"the run has ended with exit code {sign.status}")
                    return sign.status
                if lost >= 2:
                    say("the run is gone without an exit code")
                    return None
            except SshError as error:
                say(f"{error}; asking again")
                self._must_exist(remote)
            self.clock.sleep(wait)
        say(f"--max-hours={self.config.max_hours:g} are over")
        return None

    def _must_exist(self, remote: Remote) -> None:
        try:
            status = self.provider.status(remote.instance_id).status
        except Missing:
            status = GONE
        except CloudError:
            return  # the provider cannot be asked now, which says nothing of the machine
        if status in (GONE, FAILED):
            raise CloudError(f"{remote.instance_id} is {status}; look at the provider's page")


def describe_fetched(folder: Path) -> str:
    """The checkpoints in a fetched base directory, each proven whole."""
    found = []
    for stage, name in STAGES.items():
        for tag in sorted((folder / name).glob("*")):
            for checkpoint in checkpoints(tag):
                try:
                    checkpoint.verify()
                    found.append(f"{stage} {tag.name} step {checkpoint.step} whole")
                except RefusedCheckpoint as error:
                    found.append(f"NOT WHOLE: {error}")
    return "; ".join(found) or "no checkpoints"


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


# ---- the commands --------------------------------------------------------------------------------------------------


def after_launch(launcher: Launcher, command: str) -> int | None:
    """--status, --logs, --fetch, --terminate and --attach in this order; None where none of them was given."""
    config, status = launcher.config, None
    if config.status:
        launcher.show_status(config.status)
        status = 0
    if config.logs:
        status = launcher.follow(config.logs)
    if config.fetch:
        launcher.fetch(launcher.remote(launcher.find(config.fetch)))
        status = 0
    if config.attach:
        status = watch(launcher, launcher.remote(launcher.find(config.attach)), command)
    if config.terminate:
        launcher.terminate(config.terminate)
        status = 0
    return status


def launch_and_watch(launcher: Launcher, order: Order, region: str, command: str) -> int:
    """Launch, say how to go on, and with --terminate-when-done see it through."""
    made = launcher.launch(order, region)
    if isinstance(made, Instance):
        print(f"{made}\nnot waited for (--skip-wait); it costs money until: {command} --terminate={made.id}")
        return 0
    print(
        f"machine    {made.instance_id}\n"
        f"ssh        {made.command()}\n"
        f"log        {command} --logs={made.instance_id}\n"
        f"bring home {command} --fetch={made.instance_id}\n"
        f"end it     {command} --terminate={made.instance_id}"
    )
    if not launcher.config.terminate_when_done:
        print("It costs money until it is terminated.")
        return 0
    return watch(launcher, made, command)


def watch(launcher: Launcher, remote: Remote, command: str) -> int:
    """Launcher.watch, with a word on Ctrl-C: the run goes on and so does the bill."""
    try:
        return launcher.watch(remote)
    except KeyboardInterrupt:
        say(
            f"\nno longer watching; the run goes on and costs money. To go on watching:\n"
            f"    {command} --attach={remote.instance_id} --terminate-when-done"
        )
        return 130


Planner = Callable[[Offer, Mapping[str, str], str], str]
