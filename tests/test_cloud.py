"""Renting exactly once and giving back always, against a Lambda that enforces its contract, in virtual time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from cloud_fakes import KEY, FakeLambda

from nanochat.cloud import (
    Order,
    end_twins,
    find_offer,
    launch_exactly_once,
    regions_to_try,
    rented,
    terminate_surely,
    wait_until_active,
)
from nanochat.cloud_http import (
    Ambiguous,
    Client,
    CloudError,
    Missing,
    NoCapacity,
    Refused,
    Unavailable,
    cents,
    dollars,
)
from nanochat.common import UserError
from nanochat.lambda_cloud import LambdaCloud

LAUNCH = "POST /instance-operations/launch"
ORDER = Order("gpu_1x_a10", "us-east-1", "test", ssh_key_name="laptop")


@pytest.fixture
def fake() -> Iterator[FakeLambda]:
    """An account that must be empty of machines when the test ends."""
    account = FakeLambda()
    yield account
    assert account.running == [], "a machine was left running"


def provider(fake: FakeLambda, key: str = KEY) -> LambdaCloud:
    return LambdaCloud(key, base_url=fake.url, transport=fake.transport, clock=fake.clock)


def order() -> Order:
    return Order("gpu_1x_a10", "us-east-1", "test", ssh_key_name="laptop")


def wait(lambda_cloud: LambdaCloud, instance: Any, fake: FakeLambda, seconds: float = 600) -> Any:
    return wait_until_active(
        lambda_cloud, instance, max_wait_seconds=seconds, poll_seconds=10, clock=fake.clock
    )


# ---- offers and money


def test_offers_are_in_integer_cents_with_the_regions_that_have_one(fake: FakeLambda) -> None:
    fake.capacity["gpu_8x_h100_sxm5"] = []
    offers = {offer.instance_type: offer for offer in provider(fake).offers()}
    assert offers["gpu_1x_a10"].price_cents_per_hour == 75
    assert offers["gpu_1x_a10"].regions == ("us-east-1", "us-west-1")
    assert offers["gpu_8x_h100_sxm5"].num_gpus == 8 and offers["gpu_8x_h100_sxm5"].regions == ()


def test_dollars_and_cents() -> None:
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="not negative"):
            cents(wrong, "--max-price")
    assert dollars(149) == "$1.49" and dollars(2392) == "$23.92" and dollars(250_000) == "$2,500.00"
    assert cents(4.5, "--max-price") == 450 and cents(0.29, "--max-price") == 29
    with pytest.raises(UserError, match="--max-price=-1"):
        cents(-1, "--max-price")


def test_a_dearer_or_unknown_type_is_refused_before_anything_is_launched(fake: FakeLambda) -> None:
    offers = provider(fake).offers()
    with pytest.raises(UserError, match=r"costs \$23.92 an hour, more than --max-price=23"):
        find_offer(offers, "gpu_8x_h100_sxm5", max_cents_per_hour=2300)
    with pytest.raises(UserError, match="gpu_1x_a10, gpu_8x_h100_sxm5"):
        find_offer(offers, "gpu_9x", max_cents_per_hour=None)
    assert find_offer(offers, "gpu_1x_a10", max_cents_per_hour=75).price_cents_per_hour == 75


def test_regions(fake: FakeLambda) -> None:
    (offer, _) = provider(fake).offers()
    assert regions_to_try(offer, "auto") == ("us-east-1", "us-west-1")
    assert regions_to_try(offer, "us-west-1") == ("us-west-1",)
    with pytest.raises(NoCapacity, match="try --region=auto"):
        regions_to_try(offer, "asia-south-1")


# ---- the client


def test_what_may_pass_is_repeated_with_growing_waits(fake: FakeLambda) -> None:
    fake.faults["GET /instances"] = [(429, "x"), (500, "global/internal-error"), (503, "provider/internal-unavailable"), "refused", "after"]  # fmt: skip
    assert provider(fake).instances() == []
    waits = [s for s in fake.clock.slept if s > 1.1]
    assert waits == [10.0, 4.0, 8.0, 16.0, 32.0], "what the server asks for (429), then doubling"


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (401, "global/invalid-api-key"),
        (403, "global/account-inactive"),
        (403, "global/invalid-address"),
        (400, "global/invalid-parameters"),
        (400, "global/quota-exceeded"),
    ],
)
def test_key_account_and_parameters_are_never_tried_twice(fake: FakeLambda, status: int, code: str) -> None:
    fake.faults[LAUNCH] = [(status, code)] * 9
    with pytest.raises(Refused, match=code):
        launch_exactly_once(provider(fake), order(), clock=fake.clock)
    assert len(fake.launches) == 1


def test_a_wrong_key_is_told_with_its_cure_and_never_shown(fake: FakeLambda) -> None:
    with pytest.raises(Refused, match="make a key at") as caught:
        provider(fake, "secret_wrong-key").instances()
    assert "secret_wrong-key" not in str(caught.value) and len(fake.requests) == 1


def test_the_key_leaves_only_over_https() -> None:
    for url in ("http://cloud.lambda.ai", "ftp://x"):
        with pytest.raises(UserError, match="https"):
            Client(url, KEY, classify=lambda _: CloudError("x"))


def test_the_client_keeps_the_providers_pace(fake: FakeLambda) -> None:
    there = provider(fake)
    for _ in range(5):
        there.instances()
    gaps = [b - a for a, b in zip(fake.request_times, fake.request_times[1:], strict=False)]
    assert len(fake.requests) == 5 and min(gaps) >= 1.0
    for _ in range(2):
        terminate_surely(there, there.launch(order()), clock=fake.clock)
    assert fake.launch_times[1] - fake.launch_times[0] >= 12


# ---- exactly once


def test_a_launch_sends_one_key_our_tag_and_no_quantity(fake: FakeLambda) -> None:
    there, wanted = provider(fake), order()
    instance = launch_exactly_once(there, wanted, clock=fake.clock)
    (body,) = fake.launches
    assert body["ssh_key_names"] == ["laptop"] and "quantity" not in body
    assert body["tags"] == [{"key": "nanochat-launch", "value": wanted.tag}]
    terminate_surely(there, instance.id, clock=fake.clock)


@pytest.mark.parametrize("lag", [0, 3])
def test_a_launch_that_got_no_answer_but_happened_is_found_by_its_tag(fake: FakeLambda, lag: int) -> None:
    fake.faults[LAUNCH], fake.list_lag = ["after"], lag
    there, wanted = provider(fake), order()
    instance = launch_exactly_once(there, wanted, clock=fake.clock)
    assert len(fake.launches) == 1 and fake.running == [instance.id] and instance.tag == wanted.tag
    terminate_surely(there, instance.id, clock=fake.clock)


def test_a_launch_that_got_no_answer_and_did_not_happen_is_tried_again(fake: FakeLambda) -> None:
    fake.faults[LAUNCH] = ["before", (503, "provider/internal-unavailable")]
    there = provider(fake)
    instance = launch_exactly_once(there, order(), clock=fake.clock)
    assert fake.running == [instance.id]
    kinds = [(method, path.rsplit("/", 1)[1]) for method, path, _ in fake.requests]
    launches = [index for index, kind in enumerate(kinds) if kind == ("POST", "launch")]
    for first, second in zip(launches, launches[1:], strict=False):
        assert ("GET", "instances") in kinds[first:second], "nobody looked before the second launch"
    terminate_surely(there, instance.id, clock=fake.clock)


def test_no_capacity_is_not_taken_for_an_accident(fake: FakeLambda) -> None:
    fake.capacity["gpu_1x_a10"] = []
    with pytest.raises(NoCapacity):
        launch_exactly_once(provider(fake), order(), clock=fake.clock)
    assert len(fake.launches) == 1


def test_somebody_elses_machines_are_not_touched(fake: FakeLambda) -> None:
    there = provider(fake)
    theirs = there.launch(order())
    with pytest.raises(RuntimeError), rented(there, order(), clock=fake.clock):
        raise RuntimeError("ours fails")
    assert fake.running == [theirs]
    terminate_surely(there, theirs, clock=fake.clock)


# ---- waiting and giving back


def test_waiting_ends_when_the_machine_has_an_address(fake: FakeLambda) -> None:
    fake.polls_until_active, there = 4, provider(fake)
    instance = wait(there, launch_exactly_once(there, order(), clock=fake.clock), fake)
    assert instance.status == "active" and instance.address == "127.0.0.1"
    assert "jupyter-secret" not in repr(instance), "records are read field by field"
    terminate_surely(there, instance.id, clock=fake.clock)


@pytest.mark.parametrize("ending", ["unhealthy", "terminated", "terminating", "preempted"])
def test_a_machine_that_fails_ends_the_wait_and_is_given_back(fake: FakeLambda, ending: str) -> None:
    fake.end_status, there = ending, provider(fake)
    with pytest.raises(CloudError, match=ending), rented(there, order(), clock=fake.clock) as instance:
        wait(there, instance, fake)
    assert fake.calls("POST", "/api/v1/instance-operations/terminate")


def test_a_machine_that_never_boots_is_given_back_in_time(fake: FakeLambda) -> None:
    fake.polls_until_active, there = 10**9, provider(fake)
    began = fake.clock.monotonic()
    with pytest.raises(CloudError, match="--max-wait-minutes"), rented(there, order(), clock=fake.clock) as instance:  # fmt: skip
        wait(there, instance, fake, seconds=300)
    assert fake.clock.monotonic() - began < 400


def test_one_bad_poll_does_not_end_the_wait(fake: FakeLambda) -> None:
    there = provider(fake)
    with pytest.raises(KeyboardInterrupt), rented(there, order(), clock=fake.clock) as instance:
        fake.faults[f"GET /instances/{instance.id}"] = [(500, "global/internal-error")] * 8
        assert wait(there, instance, fake).status == "active"
        raise KeyboardInterrupt


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, RuntimeError, UserError])
def test_whatever_happens_inside_gives_the_machine_back(
    fake: FakeLambda, failure: type[BaseException]
) -> None:
    with pytest.raises(failure), rented(provider(fake), order(), clock=fake.clock):
        assert len(fake.running) == 1
        raise failure("x")


def test_keep_keeps_and_says_so(fake: FakeLambda, capsys: pytest.CaptureFixture[str]) -> None:
    there = provider(fake)
    with pytest.raises(RuntimeError), rented(there, order(), keep=True, clock=fake.clock) as instance:
        raise RuntimeError
    assert fake.running == [instance.id] and "--keep" in capsys.readouterr().err
    terminate_surely(there, instance.id, clock=fake.clock)


def test_termination_is_repeated_until_it_is_true(fake: FakeLambda) -> None:
    fake.faults["POST /instance-operations/terminate"] = [
        "before",
        (500, "global/internal-error"),
        (429, "x"),
    ]
    there = provider(fake)
    terminate_surely(there, there.launch(order()), clock=fake.clock)


def test_a_termination_that_fails_for_good_is_shouted(fake: FakeLambda) -> None:
    there = provider(fake)
    instance_id = there.launch(order())
    fake.faults["POST /instance-operations/terminate"] = [(500, "global/internal-error")] * 99
    with pytest.raises(CloudError, match="COULD NOT BE TERMINATED AND COSTS MONEY"):
        terminate_surely(there, instance_id, clock=fake.clock)
    fake.faults.clear()
    terminate_surely(there, instance_id, clock=fake.clock)


def test_a_launch_that_dies_undecided_leaves_nothing(fake: FakeLambda) -> None:
    """Every launch is accepted without an answer, and listings lag so far that none is seen while it matters."""
    fake.faults[LAUNCH], fake.list_lag = ["after"] * 9, 19
    with pytest.raises(Ambiguous), rented(provider(fake), order(), clock=fake.clock):
        raise AssertionError("never reached")
    assert len(fake.instances) == 3


def test_a_launch_that_is_found_late_leaves_no_twin_behind_either(fake: FakeLambda) -> None:
    fake.faults[LAUNCH], fake.list_lag = ["after"] * 9, 12
    with pytest.raises(RuntimeError), rented(provider(fake), order(), clock=fake.clock):
        raise RuntimeError
    assert len(fake.instances) == 3


def test_a_launch_that_is_found_is_given_back_without_waiting_for_others(fake: FakeLambda) -> None:
    fake.faults[LAUNCH] = ["after"]
    with pytest.raises(RuntimeError), rented(provider(fake), order(), clock=fake.clock):
        began = fake.clock.monotonic()
        raise RuntimeError
    assert len(fake.instances) == 1 and fake.clock.monotonic() - began < 30


def test_twins_of_a_launch_that_was_repeated_are_ended(fake: FakeLambda) -> None:
    fake.faults[LAUNCH], fake.list_lag = ["after"], 8
    there = provider(fake)
    instance = launch_exactly_once(there, order(), clock=fake.clock)
    assert len(fake.running) == 2
    fake.list_lag = 0
    for _ in range(8):
        there.instances()
    end_twins(there, instance, clock=fake.clock)
    assert fake.running == [instance.id]
    terminate_surely(there, instance.id, clock=fake.clock)


def test_unknown_machines_are_missing(fake: FakeLambda) -> None:
    with pytest.raises(Missing):
        provider(fake).status("nobody")
    terminate_surely(provider(fake), "nobody", clock=fake.clock)


def test_a_provider_that_stays_away_is_unavailable(fake: FakeLambda) -> None:
    fake.faults["GET /instance-types"] = ["refused"] * 99
    with pytest.raises(Unavailable, match="check the network"):
        provider(fake).offers()


@pytest.mark.parametrize("lag", [0, 3])
def test_an_interrupt_while_the_launch_is_on_its_way_leaves_nothing(fake: FakeLambda, lag: int) -> None:
    def interrupted(request: Any) -> Any:
        reply = fake.transport(request)
        if request.url.endswith("/launch"):
            raise KeyboardInterrupt
        return reply

    fake.list_lag, there = lag, LambdaCloud(KEY, base_url=fake.url, transport=interrupted, clock=fake.clock)
    with pytest.raises(KeyboardInterrupt), rented(there, order(), clock=fake.clock):
        pytest.fail("the launch did not return")
    assert len(fake.instances) == 1 and fake.running == []


def test_answers_that_are_not_as_documented_are_one_line_and_leave_nothing(fake: FakeLambda) -> None:
    broken: set[str] = set()

    def transport(request: Any) -> Any:
        reply = fake.transport(request)
        path = request.url.rpartition("/")[2]
        return replace(reply, text='{"data": [{}]}') if path in broken else reply

    there = LambdaCloud(KEY, base_url=fake.url, transport=transport, clock=fake.clock)
    for path, ask in (
        ("instance-types", there.offers),
        ("ssh-keys", there.ssh_key_names),
        ("instances", there.instances),
    ):
        broken = {path}
        with pytest.raises(CloudError, match="not as its contract has it"):
            ask()
    broken = {"launch"}
    with pytest.raises(RuntimeError), rented(there, order(), clock=fake.clock) as instance:
        assert instance.id in fake.running and len(fake.launches) == 1, "found by its tag, not launched again"
        broken = {"instances"}
        raise RuntimeError
