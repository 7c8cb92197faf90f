"""
Lambda Cloud, as its OpenAPI file 1.8.3 has it: on-demand machines by type and region, billed until they are terminated.

What the file says only in prose is kept here too: exactly one SSH key, one request a second, one launch in twelve
seconds, user-data of at most 1 MB. A VM cannot be stopped or paused; `shutdown` inside it does not end the bill.
An instance's record holds its Jupyter token, so records are read field by field and never printed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nanochat.cloud import ACTIVE, FAILED, GONE, STARTING, TAG_KEY, Instance, Offer, Order
from nanochat.cloud_http import (
    PATIENCE,
    REAL_CLOCK,
    Ambiguous,
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

API_BASE = "https://cloud.lambda.ai"
SECONDS_BETWEEN, SECONDS_BETWEEN_LAUNCHES = 1.05, 12.5
LONGEST_USER_DATA = 1_000_000
STATUSES = {
    "booting": STARTING,
    "active": ACTIVE,
    "unhealthy": FAILED,
    "preempted": FAILED,
    "terminating": GONE,  # the request to end it was accepted
    "terminated": GONE,
}
CURES = {
    "global/invalid-api-key": "make a key at https://cloud.lambda.ai/api-keys and set LAMBDA_API_KEY",
    "global/account-inactive": "the account is not active; look at its page",
    "global/invalid-address": "the billing address is missing; enter it on the account's page",
    "global/quota-exceeded": "the account's quota is used up; terminate something or ask for more",
}


class LambdaCloud:
    """The provider of cloud.py."""

    name = "lambda"
    tags = True

    def __init__(
        self,
        key: str,
        *,
        base_url: str = API_BASE,
        transport: Transport = requests_transport,
        clock: Clock = REAL_CLOCK,
        patience: Patience = PATIENCE,
    ) -> None:
        self.clock = clock
        self._last_launch = float("-inf")
        self._client = Client(
            base_url,
            key,
            classify=classify,
            transport=transport,
            clock=clock,
            patience=patience,
            seconds_between=SECONDS_BETWEEN,
        )

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> LambdaCloud:
        """With LAMBDA_API_KEY, at LAMBDA_API_BASE where that is set."""
        key = env.get("LAMBDA_API_KEY") or ""
        if not key:
            raise UserError(
                "LAMBDA_API_KEY is not set; make a key at https://cloud.lambda.ai/api-keys, put it into .env"
            )
        return cls(key, base_url=env.get("LAMBDA_API_BASE") or API_BASE)

    def offers(self) -> list[Offer]:
        """Every instance type with its price and the regions that have one free."""
        types = self._get("/instance-types")
        with _as_documented():
            return [_offer(entry) for _, entry in sorted(types.items())]

    def ssh_key_names(self) -> list[str]:
        """The SSH keys that the account knows."""
        keys = self._get("/ssh-keys")
        with _as_documented():
            return [str(key["name"]) for key in keys]

    def launch(self, order: Order) -> str:
        """One machine, one key, one request."""
        if not order.ssh_key_name:
            raise UserError("--ssh-key-name is missing; Lambda wants exactly one of the account's SSH keys")
        if len(order.user_data.encode()) > LONGEST_USER_DATA:
            raise UserError("the user-data is larger than the 1 MB that Lambda takes; use --no-user-data")
        body: dict[str, Any] = {
            "region_name": order.region,
            "instance_type_name": order.instance_type,
            "ssh_key_names": [order.ssh_key_name],
            "name": order.name[:64],
            "tags": [{"key": TAG_KEY, "value": order.tag}],
        }
        if order.user_data:
            body["user_data"] = order.user_data
        if order.image_id or order.image_family:
            body["image"] = {"id": order.image_id} if order.image_id else {"family": order.image_family}
        self._keep_launch_pace()
        answer = self._client.call("POST", "/api/v1/instance-operations/launch", body, once=True)
        try:
            return str(answer["data"]["instance_ids"][0])
        except (KeyError, TypeError, IndexError):
            raise Ambiguous("Lambda accepted the launch and named no machine", "no-id") from None

    def instances(self) -> list[Instance]:
        """Every machine of the account."""
        entries = self._get("/instances")
        with _as_documented():
            return [_instance(entry) for entry in entries]

    def status(self, instance_id: str) -> Instance:
        """One machine. Raises Missing for an unknown id."""
        entry = self._get(f"/instances/{instance_id}")
        with _as_documented():
            return _instance(entry)

    def terminate(self, instance_id: str) -> None:
        """End it, and the bill."""
        path = "/api/v1/instance-operations/terminate"
        self._client.call("POST", path, {"instance_ids": [instance_id]})

    def _keep_launch_pace(self) -> None:
        wait = self._last_launch + SECONDS_BETWEEN_LAUNCHES - self.clock.monotonic()
        if wait > 0:
            self.clock.sleep(wait)
        self._last_launch = self.clock.monotonic()

    def _get(self, path: str) -> Any:
        return self._data(self._client.call("GET", f"/api/v1{path}"))

    @staticmethod
    def _data(answer: Any) -> Any:
        if not isinstance(answer, dict) or "data" not in answer:
            raise CloudError("Lambda's answer has no 'data'; is LAMBDA_API_BASE right?")
        return answer["data"]


@contextmanager
def _as_documented() -> Iterator[None]:
    """Turn a record that lacks something into a CloudError: whoever gives a machine back must be able to go on."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CloudError(
            f"Lambda's answer is not as its contract has it ({type(error).__name__}: {error}); update this program, or "
            "look at https://cloud.lambda.ai/instances"
        ) from None


def classify(reply: Reply) -> CloudError:
    """The error that an answer is, by its code; the message is for people only."""
    record = reply.json()
    error = record.get("error") if isinstance(record, dict) else None
    error = error if isinstance(error, dict) else {}
    code = str(error.get("code") or reply.status)
    message = str(error.get("message") or reply.text[:120])
    text = f"Lambda: {message} ({code}); {CURES.get(code) or error.get('suggestion') or 'see the message'}"
    if code == "instance-operations/launch/insufficient-capacity":
        return NoCapacity(text, code)
    if code.startswith("provider/") or reply.status >= 500:
        return Unavailable(text, code)
    if reply.status == 404 or code == "global/object-does-not-exist":
        return Missing(text, code)
    return Refused(text, code)


def _offer(entry: Mapping[str, Any]) -> Offer:
    kind = entry["instance_type"]
    return Offer(
        instance_type=str(kind["name"]),
        description=str(kind["description"]),
        num_gpus=int(kind["specs"]["gpus"]),
        price_cents_per_hour=int(kind["price_cents_per_hour"]),
        regions=tuple(str(region["name"]) for region in entry["regions_with_capacity_available"]),
    )


def _instance(entry: Mapping[str, Any]) -> Instance:
    tags = {tag["key"]: tag["value"] for tag in entry.get("tags") or ()}
    status = str(entry["status"])
    return Instance(
        id=str(entry["id"]),
        name=str(entry.get("name") or ""),
        status=STATUSES.get(status, STARTING),
        provider_status=status,
        address=str(entry.get("ip") or ""),
        region=str(entry["region"]["name"]),
        instance_type=str(entry["instance_type"]["name"]),
        price_cents_per_hour=int(entry["instance_type"]["price_cents_per_hour"]),
        tag=str(tags.get(TAG_KEY, "")),
    )
