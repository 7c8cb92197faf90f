"""
Hyperbolic's GPU marketplace. Experimental: there is no published contract, and two generations of it are visible.

    v1    POST /v1/marketplace, /v1/marketplace/instances/create, .../terminate; records nested under "instance"
    v2    GET /v2/marketplace/virtual-machine-options, POST .../virtual-machine-rentals, .../terminate; flat records

Field names are what Hyperbolic's own CLI and MCP server read in 2025; nobody has confirmed them since, so parsing takes a
field wherever it may stand and every number that decides about money is checked to be one. Prices are cents, of a GPU and hour
in v1. SSH keys belong to the account, machines carry no tag (a new one is told by not having been there before), and the
address comes as an ssh command with a port of its own.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any, Literal

from nanochat.cloud import ACTIVE, FAILED, GONE, STARTING, Instance, Offer, Order
from nanochat.cloud_http import (
    PATIENCE,
    REAL_CLOCK,
    Client,
    Clock,
    CloudError,
    Missing,
    NoCapacity,
    Patience,
    Refused,
    Reply,
    Transport,
    Unavailable,
    requests_transport,
)
from nanochat.common import UserError

API_BASE = "https://api.hyperbolic.xyz"
Version = Literal["v1", "v2"]
VM = "/v2/marketplace/virtual-machine-rentals"
STATUSES = {
    ACTIVE: {"online", "running", "active", "ready", "node_ready"},
    FAILED: {"failed", "error", "unhealthy", "unavailable"},
    GONE: {"terminated", "terminating", "deleted", "stopped", "ended"},
}


class Hyperbolic:
    """The provider of cloud.py. An offer's type is `cluster/node` in v1 and `vm-N`, for N GPUs, in v2."""

    name = "hyperbolic"
    tags = False

    def __init__(
        self,
        key: str,
        *,
        num_gpus: int = 1,
        version: Version = "v1",
        base_url: str = API_BASE,
        transport: Transport = requests_transport,
        clock: Clock = REAL_CLOCK,
        patience: Patience = PATIENCE,
    ) -> None:
        if num_gpus < 1:
            raise UserError(f"--gpu-count={num_gpus}: a machine has at least one GPU")
        self.num_gpus, self.version = num_gpus, version
        self._client = Client(
            base_url, key, classify=classify, transport=transport, clock=clock, patience=patience
        )

    @classmethod
    def from_environment(
        cls, *, num_gpus: int, version: Version, env: Mapping[str, str] = os.environ
    ) -> Hyperbolic:
        """With HYPERBOLIC_API_KEY, at HYPERBOLIC_API_BASE where that is set."""
        key = env.get("HYPERBOLIC_API_KEY") or ""
        if not key:
            raise UserError(
                "HYPERBOLIC_API_KEY is not set; make a key at https://app.hyperbolic.ai, put it into .env"
            )
        base = env.get("HYPERBOLIC_API_BASE") or API_BASE
        return cls(key, num_gpus=num_gpus, version=version, base_url=base)

    def offers(self) -> list[Offer]:
        """Machines that have `num_gpus` free, at the price of so many."""
        if self.version == "v2":
            options = _records(self._client.call("GET", "/v2/marketplace/virtual-machine-options"))
            return [_option(o) for o in options if _int(o, "gpuCount") == self.num_gpus]
        nodes = _records(self._client.call("POST", "/v1/marketplace", {"filters": {}}))
        return [offer for node in nodes if (offer := _node(_flat(node), self.num_gpus)) is not None]

    def launch(self, order: Order) -> str:
        """Rent; '' where the answer names no machine, which the caller then looks for."""
        if self.version == "v2":
            answer = self._client.call("POST", VM, {"gpuCount": self.num_gpus}, once=True)
        else:
            cluster, _, node = order.instance_type.partition("/")
            body = {"cluster_name": cluster, "node_name": node, "gpu_count": self.num_gpus}
            answer = self._client.call("POST", "/v1/marketplace/instances/create", body, once=True)
        record = _flat(answer if isinstance(answer, dict) else {})
        instance_id = _text(record, "id", "instance_id", "instanceId", "rentalId", "instance_name")
        if not instance_id:
            raise Unavailable("Hyperbolic accepted and named no machine", "no-id")
        return instance_id

    def instances(self) -> list[Instance]:
        """Every machine of the account."""
        path = VM if self.version == "v2" else "/v1/marketplace/instances"
        return [_instance(record) for record in _records(self._client.call("GET", path))]

    def status(self, instance_id: str) -> Instance:
        """One machine; there is no way to ask for one alone. Raises Missing for an unknown id."""
        found = [i for i in self.instances() if instance_id in (i.id, i.name)]
        if not found:
            raise Missing(f"Hyperbolic: there is no machine {instance_id}", "404")
        return found[0]

    def terminate(self, instance_id: str) -> None:
        """End it, and the bill."""
        if self.version == "v2":
            number = int(instance_id) if instance_id.isdigit() else instance_id
            self._client.call("POST", f"{VM}/terminate", {"rentalId": number})
        else:
            self._client.call("POST", "/v1/marketplace/instances/terminate", {"id": instance_id})

    def balance_cents(self) -> int | None:
        """The account's credits in cents; None where the API does not say."""
        try:
            answer = self._client.call("GET", "/billing/get_current_balance")
        except Missing:
            return None
        return _int(answer, "credits") if isinstance(answer, dict) and "credits" in answer else None


def classify(reply: Reply) -> CloudError:
    """The error that an answer is; only the status is relied on, since no codes are published."""
    record = reply.json()
    record = record if isinstance(record, dict) else {}
    message = str(record.get("message") or record.get("detail") or record.get("error") or reply.text[:120])
    text = f"Hyperbolic: {message} ({reply.status})"
    if reply.status in (401, 403):
        return Refused(f"{text}; check HYPERBOLIC_API_KEY", str(reply.status))
    if reply.status >= 500:
        return Unavailable(text, str(reply.status))
    if reply.status == 404:
        return Missing(f"{text}; is it the other --api-version?", "404")
    if reply.status == 409 or "available" in message.lower() or "capacity" in message.lower():
        return NoCapacity(text, str(reply.status))
    return Refused(text, str(reply.status))


def _records(answer: Any) -> list[dict[str, Any]]:
    """The list in an answer: itself, or under one of the names it has had."""
    if isinstance(answer, dict):
        answer = next(
            (
                answer[k]
                for k in ("instances", "rentals", "data", "options")
                if isinstance(answer.get(k), list)
            ),
            None,
        )
    if not isinstance(answer, list):
        raise CloudError(
            "Hyperbolic's answer has no list of machines; try the other --api-version (v1 or v2)"
        )
    return [record for record in answer if isinstance(record, dict)]


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with what stands under "instance" and "meta" beside the rest; the outer word wins, ids apart."""
    inner, meta = (
        dict(part) if isinstance(part := record.get(name), dict) else {} for name in ("instance", "meta")
    )
    return {**meta, **inner, **{k: v for k, v in record.items() if k not in ("instance", "meta")}}


def _text(record: Mapping[str, Any], *names: str) -> str:
    return next((str(record[n]) for n in names if record.get(n) not in (None, "")), "")


def _int(record: Mapping[str, Any], *names: str) -> int:
    """A whole number that money depends on. Raises CloudError where there is none."""
    for name in names:
        value = record.get(name)
        if isinstance(value, bool) or value is None:
            continue
        try:
            return round(float(value))
        except (TypeError, ValueError):
            break
    raise CloudError(f"Hyperbolic's record has no number {' or '.join(names)}; its contract has changed")


def _price(record: Mapping[str, Any]) -> int:
    """Cents of one GPU and hour."""
    pricing = record.get("pricing")
    price = pricing.get("price") if isinstance(pricing, dict) else None
    if isinstance(price, dict):
        return _int(price, "amount")
    return _int(record, "costPerHour", "price_cents_per_hour")


def _node(record: Mapping[str, Any], num_gpus: int) -> Offer | None:
    """A node of v1 as an offer of `num_gpus` of its GPUs; None for one that is not ready or has too few free."""
    total, reserved = _int(record, "gpus_total", "total_gpus"), _int({"r": 0, **record}, "gpus_reserved", "r")
    status = _text(record, "status").lower()
    if record.get("reserved") is True or total - reserved < num_gpus or status not in STATUSES[ACTIVE]:
        return None
    hardware = record.get("hardware") if isinstance(record.get("hardware"), dict) else {}
    gpus = (hardware or {}).get("gpus") or [{}]
    where = record.get("location") if isinstance(record.get("location"), dict) else {}
    model = _text(gpus[0], "model", "name") or "GPU"
    return Offer(
        instance_type=f"{_text(record, 'cluster_name')}/{_text(record, 'id', 'node_name')}",
        description=f"{num_gpus}x {model} of {_text(record, 'supplier_id') or 'a supplier'}",
        num_gpus=num_gpus,
        price_cents_per_hour=_price(record) * num_gpus,
        regions=(_text(where or {}, "region") or "anywhere",),
    )


def _option(record: Mapping[str, Any]) -> Offer:
    """A size of v2's virtual machines; `costPerHour` is of the whole machine, in cents."""
    count = _int(record, "gpuCount")
    return Offer(
        f"vm-{count}",
        f"{count}x {_text(record, 'gpuModel', 'gpuType') or 'H100'}",
        count,
        _int(record, "costPerHour"),
        ("anywhere",),
    )


def _instance(outer: Mapping[str, Any]) -> Instance:
    record = _flat(outer)
    # v1 nests the node's own id; the rental's stands outside.
    instance_id = _text(outer, "id", "rentalId", "instance_id") or _text(record, "id", "rentalId")
    word = _text(record, "status").lower()
    user, address, port = ssh_address(_text(record, "sshCommand", "ssh_command"), _text(record, "public_ip"))
    return Instance(
        id=instance_id,
        name=_text(record, "instance_name", "name"),
        status=next((ours for ours, theirs in STATUSES.items() if word in theirs), STARTING),
        provider_status=word or "unknown",
        address=address,
        port=port,
        user=user,
        region="anywhere",
        instance_type=_text(record, "cluster_name", "gpuModel") or "machine",
    )


def ssh_address(command: str, address: str = "") -> tuple[str, str, int]:
    """(user, host, port) of an ssh command such as `ssh ubuntu@host -p 31424`; nothing of it is ever run."""
    user, port = "ubuntu", 22
    try:
        words = shlex.split(command)
    except ValueError:
        words = []
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else ""
        if word in ("-p", "-l") and following:
            port, user = (
                (int(following), user)
                if word == "-p" and following.isdigit()
                else (port, user if word == "-p" else following)
            )
        elif word.startswith("-p") and word[2:].isdigit():
            port = int(word[2:])
        elif "@" in word:
            user, _, address = word.rpartition("@")
    safe = all(
        part and not part.startswith("-") and all(c.isalnum() or c in "._:-" for c in part)
        for part in (user, address)
    )
    return (user, address, port) if safe else ("ubuntu", "", 22)
