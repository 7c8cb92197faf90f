"""Hyperbolic in both generations, as far as anybody has written them down: cents, nested records, and nothing left running."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
from hyperbolic_fakes import KEY, FakeHyperbolic, node

from nanochat.cloud import Instance, Order, launch_exactly_once, rented, terminate_surely, wait_until_active
from nanochat.cloud_http import CloudError, NoCapacity, Refused, Reply
from nanochat.common import UserError
from nanochat.hyperbolic import Hyperbolic, Version, ssh_address
from nanochat.launcher import Launcher
from scripts.launch_hyperbolic_training import Config, matching, places


@pytest.fixture
def fake() -> Iterator[FakeHyperbolic]:
    account = FakeHyperbolic()
    yield account
    assert account.running == [], "a machine was left running"


def provider(fake: FakeHyperbolic, version: Version = "v1", num_gpus: int = 1) -> Hyperbolic:
    return Hyperbolic(KEY, num_gpus=num_gpus, version=version, transport=fake.transport, clock=fake.clock)


ORDER = Order("cluster/n2", "us-west", "test")


def test_prices_are_cents_per_gpu_and_unready_nodes_are_no_offers(fake: FakeHyperbolic) -> None:
    one = {o.instance_type: o.price_cents_per_hour for o in provider(fake).offers()}
    assert one == {"cluster/n1": 149, "cluster/n2": 99}
    (eight,) = provider(fake, num_gpus=8).offers()
    assert eight.price_cents_per_hour == 8 * 149 and eight.description == "8x NVIDIA-H100 of acme"
    (vm,) = provider(fake, "v2", 8).offers()
    assert vm.price_cents_per_hour == 1592 and provider(fake).balance_cents() == 2500


def test_max_price_is_in_dollars(fake: FakeHyperbolic) -> None:
    offers = provider(fake).offers()
    assert [o.instance_type for o in matching(offers, Config(max_price=4.5))] == ["cluster/n2", "cluster/n1"]
    assert matching(offers, Config(max_price=0.98)) == [] and matching(offers, Config(supplier="other")) == []
    assert len(matching(offers, Config(region="us-west", gpu="h100", max_price=1.49))) == 2


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("name_it", [False, True])
def test_rent_wait_and_give_back(fake: FakeHyperbolic, version: Version, name_it: bool) -> None:
    fake.name_it, there = name_it, provider(fake, version)
    with pytest.raises(KeyboardInterrupt), rented(there, ORDER, clock=fake.clock) as instance:
        active = wait_until_active(there, instance, max_wait_seconds=300, poll_seconds=5, clock=fake.clock)
        port = 31424 if version == "v1" else 22
        assert (active.user, active.address, active.port) == ("ubuntu", "ip.example", port)
        raise KeyboardInterrupt
    assert len(fake.rentals) == 1, "an answer that names no machine is not a reason to rent another"


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_lost_answer_is_resolved_by_what_is_new(fake: FakeHyperbolic, version: Version) -> None:
    fake.lose_answer, there = True, provider(fake, version)
    fake.rentals["77"] = {"status": "online"}
    instance = launch_exactly_once(there, ORDER, clock=fake.clock)
    assert len(fake.rentals) == 2 and instance.id != "77"
    for instance_id in (instance.id, "77"):
        terminate_surely(there, instance_id, clock=fake.clock)


def test_a_machine_that_fails_is_given_back(fake: FakeHyperbolic) -> None:
    fake.status_at_end, there = "failed", provider(fake)
    with pytest.raises(CloudError, match="failed"), rented(there, ORDER, clock=fake.clock) as instance:
        wait_until_active(there, instance, max_wait_seconds=300, poll_seconds=5, clock=fake.clock)


@pytest.mark.parametrize("name_it", [False, True])
def test_what_others_rent_meanwhile_is_not_given_back(fake: FakeHyperbolic, name_it: bool) -> None:
    """Machines here carry no tag, so a stranger's new one looks like ours."""
    fake.name_it, there = name_it, provider(fake)
    with pytest.raises(KeyboardInterrupt), rented(there, ORDER, clock=fake.clock):
        fake.rentals["77"] = {"status": "online"}
        raise KeyboardInterrupt
    assert fake.running == ["77"]
    terminate_surely(there, "77", clock=fake.clock)


def test_a_changed_contract_is_an_error_and_never_a_price_of_nothing(fake: FakeHyperbolic) -> None:
    del fake.nodes[0]["pricing"]
    with pytest.raises(CloudError, match="contract has changed"):
        provider(fake).offers()
    fake.nodes = None  # type: ignore[assignment]
    with pytest.raises(CloudError, match="--api-version"):
        provider(fake).offers()


def test_credits_that_the_api_does_not_say_are_not_known(fake: FakeHyperbolic) -> None:
    fake.credits = None
    assert provider(fake).balance_cents() is None


def waiting(fake: FakeHyperbolic, **flags: float | bool | str) -> Instance:
    """Launch in virtual time as the command does, and give the machine back."""
    config = Config(wait_for_capacity=True, skip_wait=True, **flags)  # type: ignore[arg-type]
    there = provider(fake)
    made = Launcher(there, config, clock=fake.clock).launch(
        Order("", "", "test"), partial(places, config, 2500)
    )
    assert isinstance(made, Instance)
    terminate_surely(there, made.id, clock=fake.clock)
    return made


def test_it_waits_for_a_machine_within_the_price(fake: FakeHyperbolic) -> None:
    def cheaper(count: int) -> None:
        fake.nodes = [node("dear", 400)] if count < 4 else [node("dear", 400), node("cheap", 120)]

    fake.before_listing = cheaper
    waiting(fake, max_price=1.5)
    assert fake.creates[0]["node_name"] == "cheap" and fake.num_listings == 4
    fake.before_listing = lambda count: None
    fake.nodes = [node("dear", 400)]
    with pytest.raises(NoCapacity, match="--capacity-hours=0.1"):
        waiting(fake, max_price=1.5, capacity_hours=0.1)
    assert len(fake.rentals) == 1


def test_where_the_cheapest_was_taken_the_next_one_is_tried(fake: FakeHyperbolic) -> None:
    fake.taken = {"n2"}
    waiting(fake)
    assert [body["node_name"] for body in fake.creates] == ["n2", "n1"]


def test_what_the_credits_do_not_pay_an_hour_of_is_not_rented(fake: FakeHyperbolic) -> None:
    offers = provider(fake).offers()
    assert [offer.instance_type for offer, _ in places(Config(), 120, offers)] == ["cluster/n2"]
    with pytest.raises(UserError, match=r"the account has \$0.50, less than an hour of \$0.99"):
        places(Config(), 50, offers)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("ssh ubuntu@host.example -p 31424", ("ubuntu", "host.example", 31424)),
        ("ssh -p31424 root@1.2.3.4", ("root", "1.2.3.4", 31424)),
        ("ssh me@-oProxyCommand=evil", ("ubuntu", "", 22)),
        ("ssh 'me@host;rm -rf'", ("ubuntu", "", 22)),
        ("", ("ubuntu", "", 22)),
        ("ssh 'unclosed", ("ubuntu", "", 22)),
    ],
)
def test_ssh_commands_are_read_and_never_run(command: str, expected: tuple[str, str, int]) -> None:
    assert ssh_address(command) == expected


def test_errors_by_status() -> None:
    from nanochat.hyperbolic import classify

    assert isinstance(classify(Reply(401, "{}")), Refused)
    assert isinstance(classify(Reply(400, '{"message": "node not available"}')), NoCapacity)
