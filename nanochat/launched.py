"""
What becomes of a rented machine: find it again, see how it does, follow its log, bring its files home, end it.

    after_launch(...)      --status, --logs, --fetch, --attach, --terminate
    launch_and_watch(...)  launch, and with --terminate-when-done wait for the marker of the end, bring the files home, and
                           only then terminate

Losing the results of a day is worse than an hour's rent: when the files cannot be brought home, the machine is left running
and that is said loudly. torch is not needed.
"""

from __future__ import annotations

from pathlib import Path

from nanochat import remote_job
from nanochat.checkpoints import STAGES, RefusedCheckpoint, checkpoints
from nanochat.cloud import FAILED, GONE, Instance, Order, say, terminate_surely
from nanochat.cloud_http import CloudError, Missing, dollars
from nanochat.common import UserError, base_dir
from nanochat.launch_flags import ANY, DIRECTORY
from nanochat.launcher import Choose, Launcher, ending_signals
from nanochat.remote import Remote, SshError, fetch, follow, reach, remembered

LOST = 2  # looks without a sign of the run before it counts as gone


# ---- which machine -------------------------------------------------------------------------------------------------


def find(launcher: Launcher, word: str) -> Instance:
    """The machine of that id or name; for ANY the only one that was launched from here. Raises UserError."""
    provider = launcher.provider
    ours = {remote.instance_id for remote in remembered(provider.name)}
    there = [i for i in provider.instances() if i.running]
    if word == ANY:
        found = [i for i in there if i.tag or i.id in ours]
    else:
        found = [i for i in there if word in (i.id, i.name)]
    if len(found) == 1:
        return found[0]
    listed = "".join(f"\n    {i}" for i in (found or there)) or " there is none"
    none = f"no machine {'of ours' if word == ANY else word}"
    raise UserError(f"{provider.name}: {'several machines; name one by its id' if found else none}:{listed}")


def remote_of(launcher: Launcher, instance: Instance) -> Remote:
    """How to reach a machine, also one that was launched elsewhere."""
    provider, config = launcher.provider, launcher.config
    for remote in remembered(provider.name):
        if remote.instance_id == instance.id and remote.address == instance.address:
            return remote
    if not instance.address:
        raise UserError(f"{instance.id} is {instance.provider_status} and has no address yet; wait")
    return reach(
        instance, provider.name,
        identity_file=config.identity_file, directory=DIRECTORY, session=config.tmux_session,
    )  # fmt: skip


def show_status(launcher: Launcher, word: str) -> None:
    """Print the machines, what they cost, and how their runs do."""
    there = launcher.provider.instances() if word == ANY else [find(launcher, word)]
    for instance in there:
        print(instance)
        if instance.running and instance.address:
            print(f"    {_how_it_does(launcher, instance)}")
    running = [i for i in there if i.running]
    unknown = sum(not i.price_cents_per_hour for i in running)
    cost = dollars(sum(i.price_cents_per_hour for i in running))
    print(
        f"{len(running)} running, {cost} an hour together"
        + (f", and {unknown} whose price the provider does not say" if unknown else "")
    )


def _how_it_does(launcher: Launcher, instance: Instance) -> str:
    try:
        sign = remote_job.look(remote_of(launcher, instance))
    except CloudError as error:
        return str(error)
    state = "running" if sign.status is None else f"ended with exit code {sign.status}"
    gpu = sign.gpu or "none"
    return f"run {state}; tmux {sign.tmux}, driver {sign.driver}, GPU {gpu}, {sign.num_lines} log lines"


# ---- what comes home -----------------------------------------------------------------------------------------------


def bring_home(launcher: Launcher, remote: Remote) -> Path:
    """Bring reports and checkpoints home, and look whether they are whole; the folder."""
    config = launcher.config
    # A machine may have no name, or one that a folder cannot have.
    name = remote.name if remote_job.plain(remote.name) else remote.instance_id
    target = Path(config.fetch_to).expanduser() if config.fetch_to else base_dir() / "fetched" / name
    folders = ["report", "runs", "tokenizer", *STAGES.values()]
    rules = [] if config.fetch_optimizer else ["- optim_*"]
    rules += ["- *.unfinished", *(f"+ /{folder}/***" for folder in folders), "- *"]
    fetch(remote, remote_job.base_of(remote), target, patterns=rules, clock=launcher.clock)
    log = ["+ /training.log", "+ /report.md", "- *"]
    fetch(remote, remote.directory, target / "checkout", patterns=log, clock=launcher.clock)
    say(f"fetched to {target}: {describe_fetched(target)}")
    return target


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


def see_through(launcher: Launcher, remote: Remote) -> int:
    """Wait for the end of the run, fetch, terminate; the run's exit code, 1 where it is not known."""
    hours, clock = launcher.config.max_hours, launcher.clock
    deadline = None if hours is None else clock.monotonic() + hours * 3600
    status = _wait_for_end(launcher, remote, deadline)
    try:
        bring_home(launcher, remote)
    except CloudError as error:
        raise CloudError(
            f"{error}\n{remote.instance_id} IS LEFT RUNNING AND COSTS MONEY, because its results are only there; "
            f"run --fetch={remote.instance_id}, then --terminate={remote.instance_id}"
        ) from None
    terminate_surely(launcher.provider, remote.instance_id, clock=clock, patience=launcher.patience)
    return 1 if status is None else status


def _wait_for_end(launcher: Launcher, remote: Remote, deadline: float | None) -> int | None:
    """The exit code, or None when time is up or the session has vanished."""
    config, clock, lost = launcher.config, launcher.clock, 0
    while deadline is None or clock.monotonic() < deadline:
        try:
            sign = remote_job.look(remote)
            lost = 0 if sign.alive or sign.ended else lost + 1
            if sign.ended:
                say(f"the run has ended with exit code {sign.status}")
                return sign.status
            if lost >= LOST:
                say("the run is gone without an exit code")
                return None
        except SshError as error:
            say(f"{error}; asking again")
            _must_exist(launcher, remote)
        clock.sleep(max(config.poll_seconds, 1.0))
    say(f"--max-hours={config.max_hours:g} are over")
    return None


def _must_exist(launcher: Launcher, remote: Remote) -> None:
    try:
        status = launcher.provider.status(remote.instance_id).status
    except Missing:
        status = GONE
    except CloudError:
        return  # the provider cannot be asked now, which says nothing of the machine
    if status in (GONE, FAILED):
        raise CloudError(f"{remote.instance_id} is {status}; look at the provider's page")


# ---- the commands --------------------------------------------------------------------------------------------------


def after_launch(launcher: Launcher, command: str) -> int | None:
    """--status, --logs, --fetch, --attach and --terminate in this order; None where none of them was given."""
    config, status = launcher.config, None
    if config.status:
        show_status(launcher, config.status)
        status = 0
    if config.logs:
        remote = remote_of(launcher, find(launcher, config.logs))
        status = follow(remote, remote_job.follow_script(remote))
    if config.fetch:
        bring_home(launcher, remote_of(launcher, find(launcher, config.fetch)))
        status = 0
    if config.attach:
        status = watch(launcher, remote_of(launcher, find(launcher, config.attach)), command)
    if config.terminate:
        found = find(launcher, config.terminate)
        terminate_surely(launcher.provider, found.id, clock=launcher.clock, patience=launcher.patience)
        status = 0
    return status


def launch_and_watch(launcher: Launcher, order: Order, choose: Choose, command: str) -> int:
    """Launch, say how to go on, and with --terminate-when-done see it through."""
    made = launcher.launch(order, choose)
    if isinstance(made, Instance):
        print(f"{made}\nnot waited for (--skip-wait); it costs money until: {command} --terminate={made.id}")
        return 0
    told = (
        f"machine    {made.instance_id}\n"
        f"ssh        {made.command()}\n"
        f"log        {command} --logs={made.instance_id}\n"
        f"bring home {command} --fetch={made.instance_id}\n"
        f"end it     {command} --terminate={made.instance_id}"
    )
    if not launcher.config.terminate_when_done:
        print(f"{told}\nIt costs money until it is terminated.")
        return 0
    return watch(launcher, made, command, told)


def watch(launcher: Launcher, remote: Remote, command: str, told: str = "") -> int:
    """Print `told`, then see_through, with a word for whoever ends it early: the run goes on and so does the bill."""
    try:
        with ending_signals():
            if told:
                print(told, flush=True)
            return see_through(launcher, remote)
    except (KeyboardInterrupt, SystemExit) as ended:
        say(
            f"\nno longer watching; the run goes on and costs money. To go on watching:\n"
            f"    {command} --attach={remote.instance_id} --terminate-when-done"
        )
        return ended.code if isinstance(ended, SystemExit) and isinstance(ended.code, int) else 130
