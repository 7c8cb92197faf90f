"""Hyperbolic in both generations, as far as anybody has written them down: cents, nested records, and nothing left running."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from cloud_fakes import VirtualClock

from nanochat.cloud import Order, launch_exactly_once, rented, terminate_surely, wait_until_active
from nanochat.cloud_http import CloudError, NoAnswer, NoCapacity, Refused, Reply, Request
from nanochat.hyperbolic import Hyperbolic, Version, ssh_address
from scripts.launch_hyperbolic_training import Config, matching


def node(name: str, cents: int, *, total: int = 8, reserved: int = 0, status: str = "node_ready", supplier: str = "acme") -> dict[str, Any]:  # fmt: skip
    return {
        "id": name, "cluster_name": "cluster", "status": status, "gpus_total": total, "gpus_reserved": reserved,
        "pricing": {"price": {"amount": cents, "period": "hourly"}}, "supplier_id": supplier,
        "hardware": {"gpus": [{"model": "NVIDIA-H100", "ram": 81559}]}, "location": {"region": "us-west"},
    }  # fmt: skip


@dataclass
class FakeHyperbolic:
    """Both generations. `lose_answer`: the next create happens and is not answered. `name_it`: create names an id."""

    clock: VirtualClock = field(default_factory=VirtualClock)
    rentals: dict[str, dict[str, Any]] = field(default_factory=dict)
    nodes: list[dict[str, Any]] = field(default_factory=lambda: [node("n1", 149), node("n2", 99, total=1), node("n3", 50, status="node_down")])  # fmt: skip
    lose_answer: bool = False
    name_it: bool = False
    status_at_end: str = "online"
    polls: int = 0

    @property
    def running(self) -> list[str]:
        return [i for i, r in self.rentals.items() if r["status"] != "terminated"]

    def transport(self, request: Request) -> Reply:
        import json

        assert request.headers["Authorization"] == "Bearer key"
        path = request.url.removeprefix("https://api.hyperbolic.xyz")
        status, value = self.answer(request.method, path, request.body)
        if self.lose_answer and (
            path.endswith("/create") or (request.method == "POST" and path.endswith("rentals"))
        ):
            self.lose_answer = False
            raise NoAnswer("ReadTimeout")
        return Reply(status, json.dumps(value))

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if (method, path) == ("POST", "/v1/marketplace"):
            return 200, {"instances": self.nodes}
        if (method, path) == ("GET", "/v2/marketplace/virtual-machine-options"):
            return 200, [{"gpuCount": 1, "costPerHour": 199}, {"gpuCount": 8, "costPerHour": 1592}]
        if path == "/billing/get_current_balance":
            return 200, {"credits": 2500}
        if method == "POST" and path.endswith(("/create", "virtual-machine-rentals")):
            self.rentals[str(len(self.rentals) + 1)] = {"status": "starting", "v": 2 if "v2" in path else 1}
            return 200, {"status": "success", **({"id": str(len(self.rentals))} if self.name_it else {})}
        if method == "POST" and path.endswith("/terminate"):
            wanted = str(body.get("id") or body.get("rentalId"))
            if wanted not in self.rentals:
                return 404, {"message": "not found"}
            self.rentals[wanted]["status"] = "terminated"
            return 200, {"status": "success"}
        if method == "GET":
            return 200, self.listing("v2" in path)
        return 400, {"message": "bad"}

    def listing(self, flat: bool) -> Any:
        self.polls += 1
        for rental in self.rentals.values():
            if rental["status"] == "starting" and self.polls > 4:
                rental["status"] = self.status_at_end
        if flat:
            return [
                {
                    "id": int(i),
                    "status": r["status"],
                    "meta": {"ssh_command": "ssh ubuntu@1.2.3.4", "public_ip": "1.2.3.4"},
                }
                for i, r in self.rentals.items()
            ]
        return {"instances": [
            {"id": i, "instance": {"id": "node", "status": r["status"]}, "sshCommand": "ssh ubuntu@ip.example -p 31424"}
            for i, r in self.rentals.items()
        ]}  # fmt: skip


@pytest.fixture
def fake() -> Iterator[FakeHyperbolic]:
    account = FakeHyperbolic()
    yield account
    assert account.running == [], "a machine was left running"


def provider(fake: FakeHyperbolic, version: Version = "v1", num_gpus: int = 1) -> Hyperbolic:
    return Hyperbolic("key", num_gpus=num_gpus, version=version, transport=fake.transport, clock=fake.clock)


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
        assert (active.user, active.address, active.port) == (("ubuntu", "ip.example", 31424) if version == "v1" else ("ubuntu", "1.2.3.4", 22))  # fmt: skip
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


def test_a_changed_contract_is_an_error_and_never_a_price_of_nothing(fake: FakeHyperbolic) -> None:
    del fake.nodes[0]["pricing"]
    with pytest.raises(CloudError, match="contract has changed"):
        provider(fake).offers()
    fake.nodes = {"surprise": 1}  # type: ignore[assignment]
    with pytest.raises(CloudError, match="--api-version"):
        provider(fake).offers()


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
