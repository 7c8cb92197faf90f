"""Waiting for a machine to come free, in virtual time: it ends, it takes only what was asked for, and it keeps the price."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
from cloud_fakes import KEY, FakeLambda

from nanochat.cloud import Instance, Order, terminate_surely
from nanochat.cloud_http import CloudError, NoCapacity
from nanochat.common import UserError
from nanochat.config import parse
from nanochat.lambda_cloud import LambdaCloud
from nanochat.launch_flags import check
from nanochat.launcher import CAPACITY_SECONDS, Launcher
from scripts.launch_lambda_training import Config, places

NAME = "gpu_1x_a10"


@pytest.fixture
def fake() -> Iterator[FakeLambda]:
    account = FakeLambda()
    account.capacity[NAME] = []
    yield account
    assert account.running == [], "a machine was left running"


def launcher(fake: FakeLambda, *words: str) -> Launcher:
    config = parse(Config, [f"--instance-type={NAME}", "--skip-wait", *words])
    check(config)
    provider = LambdaCloud(KEY, base_url=fake.url, transport=fake.transport, clock=fake.clock)
    return Launcher(provider, config, clock=fake.clock)


def launch(fake: FakeLambda, *words: str) -> Instance:
    """Launch as the command does; the machine, which the test gives back."""
    there = launcher(fake, *words)
    assert isinstance(there.config, Config)
    made = there.launch(Order(NAME, "", "test", ssh_key_name="laptop"), partial(places, there.config))
    assert isinstance(made, Instance)
    terminate_surely(there.provider, made.id, clock=fake.clock)
    return made


def free_from(fake: FakeLambda, listing: int, *regions: str) -> Callable[[int], None]:
    """Nothing is free before that listing."""

    def before(count: int) -> None:
        fake.capacity[NAME] = list(regions) if count >= listing else []

    return before


def test_without_the_flag_one_look_is_all(fake: FakeLambda) -> None:
    with pytest.raises(NoCapacity, match="no region has one free; try later, or --wait-for-capacity"):
        launch(fake)
    assert fake.num_listings == 1 and fake.launches == []


def test_it_asks_every_minute_until_there_is_one(
    fake: FakeLambda, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.before_listing, began = free_from(fake, 5, "us-west-1"), fake.clock.monotonic()
    assert launch(fake, "--wait-for-capacity").region == "us-west-1"
    assert fake.num_listings == 5 and len(fake.launches) == 1
    assert fake.clock.slept.count(CAPACITY_SECONDS) == 4
    assert fake.clock.monotonic() - began < 5 * CAPACITY_SECONDS
    assert capsys.readouterr().err.count("asking again in 60 s (Ctrl-C ends this, nothing is rented)") == 4


def test_the_wait_has_an_end(fake: FakeLambda) -> None:
    began = fake.clock.monotonic()
    with pytest.raises(NoCapacity, match="waited for --capacity-hours=0.5, nothing was rented"):
        launch(fake, "--wait-for-capacity", "--capacity-hours=0.5")
    assert fake.launches == []
    assert 1800 - 2 * CAPACITY_SECONDS < fake.clock.monotonic() - began <= 1800, (
        "nearly all of it, and no more"
    )


@pytest.mark.parametrize("hours", ["0", "-1"])
def test_a_wait_of_nothing_is_a_mistake(fake: FakeLambda, hours: str) -> None:
    with pytest.raises(UserError, match="--capacity-hours=-?[01] must be above 0"):
        launcher(fake, "--wait-for-capacity", f"--capacity-hours={hours}")


def test_the_price_holds_while_it_waits(fake: FakeLambda) -> None:
    def dearer(count: int) -> None:
        fake.prices[NAME] = 75 if count < 3 else 90
        fake.capacity[NAME] = [] if count < 3 else ["us-east-1"]

    fake.before_listing = dearer
    with pytest.raises(UserError, match=r"costs \$0.90 an hour, more than --max-price=0.8"):
        launch(fake, "--wait-for-capacity", "--max-price=0.80")
    assert fake.num_listings == 3 and fake.launches == []


def test_another_region_than_the_wanted_one_is_not_taken(fake: FakeLambda) -> None:
    def elsewhere_first(count: int) -> None:
        fake.capacity[NAME] = ["us-east-1"] if count < 4 else ["us-east-1", "asia-south-1"]

    fake.before_listing = elsewhere_first
    assert launch(fake, "--wait-for-capacity", "--region=asia-south-1").region == "asia-south-1"
    assert [body["region_name"] for body in fake.launches] == ["asia-south-1"] and fake.num_listings == 4


def test_one_that_somebody_else_was_faster_to_take_is_waited_for_again(fake: FakeLambda) -> None:
    fake.before_listing = free_from(fake, 2, "us-east-1")
    lost = (400, "instance-operations/launch/insufficient-capacity")
    fake.faults["POST /instance-operations/launch"] = [lost, lost]
    assert launch(fake, "--wait-for-capacity").region == "us-east-1"
    assert fake.num_listings == 4 and len(fake.launches) == 3


def test_what_no_waiting_cures_ends_it_at_once(fake: FakeLambda) -> None:
    fake.faults["GET /instance-types"] = [(403, "global/account-inactive")]
    with pytest.raises(CloudError, match="not active"):
        launch(fake, "--wait-for-capacity")
    assert fake.clock.slept.count(CAPACITY_SECONDS) == 0
    fake.before_listing = free_from(fake, 1, "us-east-1")
    fake.faults["POST /instance-operations/launch"] = [(400, "global/quota-exceeded")] * 9
    with pytest.raises(CloudError, match="quota"):
        launch(fake, "--wait-for-capacity")
    assert len(fake.launches) == 1


def test_ctrl_c_while_waiting_leaves_nothing(fake: FakeLambda, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fake.clock, "sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        launch(fake, "--wait-for-capacity")
    assert fake.launches == []


def test_a_machine_that_turns_out_dearer_is_given_back(
    fake: FakeLambda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The price is read before the launch; what the machine itself says counts."""
    fake.capacity[NAME] = ["us-east-1"]
    monkeypatch.setattr("nanochat.launcher.need", lambda tool: None)
    provider = LambdaCloud(KEY, base_url=fake.url, transport=fake.transport, clock=fake.clock)
    config = Config(instance_type=NAME, max_price=0.8)

    def choose_then_dearer(offers: list) -> list:  # type: ignore[type-arg]
        fake.prices[NAME] = 90
        return places(config, offers)

    with pytest.raises(CloudError, match=r"costs \$0.90 an hour, more than --max-price=0.8"):
        Launcher(provider, config, clock=fake.clock).launch(
            Order(NAME, "", "test", ssh_key_name="laptop"), choose_then_dearer
        )
    assert len(fake.launches) == 1
