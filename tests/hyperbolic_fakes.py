"""Hyperbolic in both generations, as far as anybody has written them down, as a function and behind a real address.

Bodies are checked against what Hyperbolic's own command line and SkyPilot's pull request sent: names and kinds of fields, a
node that exists, no more GPUs than it has free. Everything else that comes is refused.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cloud_fakes import VirtualClock
from werkzeug.serving import make_server
from werkzeug.wrappers import Request as WerkzeugRequest
from werkzeug.wrappers import Response

from nanochat.cloud_http import NoAnswer, Reply, Request

KEY = "hyperbolic-key-0123456789"
V2 = "/v2/marketplace/virtual-machine-rentals"


def node(name: str, cents: int, *, total: int = 8, reserved: int = 0, status: str = "node_ready", supplier: str = "acme") -> dict[str, Any]:  # fmt: skip
    """A node of the v1 marketplace."""
    return {
        "id": name, "cluster_name": "cluster", "status": status, "gpus_total": total, "gpus_reserved": reserved,
        "pricing": {"price": {"amount": cents, "period": "hourly"}}, "supplier_id": supplier,
        "hardware": {"gpus": [{"model": "NVIDIA-H100", "ram": 81559}]}, "location": {"region": "us-west"},
    }  # fmt: skip


@dataclass
class FakeHyperbolic:
    """The account. `lose_answer`: the next create happens and is not answered. `name_it`: create names an id."""

    clock: Any = field(default_factory=VirtualClock)
    url: str = ""
    rentals: dict[str, dict[str, Any]] = field(default_factory=dict)
    nodes: list[dict[str, Any]] = field(default_factory=lambda: [node("n1", 149), node("n2", 99, total=1), node("n3", 50, status="node_down")])  # fmt: skip
    taken: set[str] = field(default_factory=set)
    """nodes that are offered and gone when somebody wants them"""
    credits: int | None = 2500
    lose_answer: bool = False
    name_it: bool = False
    status_at_end: str = "online"
    address: str = "ip.example"
    polls: int = 0
    polls_until_online: int = 4
    num_listings: int = 0
    before_listing: Callable[[int], None] = lambda count: None
    """called with 1, 2, ... before the marketplace answers"""
    requests: list[tuple[str, str, Any]] = field(default_factory=list)

    @property
    def running(self) -> list[str]:
        return [i for i, r in self.rentals.items() if r["status"] != "terminated"]

    @property
    def creates(self) -> list[Any]:
        """Bodies of the requests to rent."""
        return [body for method, path, body in self.requests if is_create(method, path)]

    # ---- the service

    def answer(self, method: str, path: str, key: str, body: Any) -> tuple[int, Any]:
        """(status, value) of a request."""
        self.requests.append((method, path, body))
        if key != f"Bearer {KEY}":
            return 401, {"message": "invalid token"}
        if (method, path) == ("POST", "/v1/marketplace"):
            assert body == {"filters": {}}
            self._listing()
            return 200, {"instances": self.nodes}
        if (method, path) == ("GET", "/v2/marketplace/virtual-machine-options"):
            self._listing()
            return 200, [{"gpuCount": 1, "costPerHour": 199}, {"gpuCount": 8, "costPerHour": 1592}]
        if path == "/billing/get_current_balance":
            return (
                (404, {"message": "not found"}) if self.credits is None else (200, {"credits": self.credits})
            )
        if is_create(method, path):
            return self.create(path, body)
        if method == "POST" and path in ("/v1/marketplace/instances/terminate", f"{V2}/terminate"):
            return self.terminate(body["rentalId"] if path.startswith("/v2") else body["id"])
        if method == "GET" and path in ("/v1/marketplace/instances", V2):
            return 200, self.mine(flat=path == V2)
        return 404, {"message": "no such path"}

    def _listing(self) -> None:
        self.num_listings += 1
        self.before_listing(self.num_listings)

    def create(self, path: str, body: Any) -> tuple[int, Any]:
        if path == V2:
            assert set(body) == {"gpuCount"} and body["gpuCount"] in (1, 8), body
        else:
            assert (
                set(body) == {"cluster_name", "node_name", "gpu_count"} and type(body["gpu_count"]) is int
            ), body
            there = next((n for n in self.nodes if n["id"] == body["node_name"]), None)
            if there is None or there["status"] != "node_ready" or there["id"] in self.taken:
                return 400, {"message": "node not available"}
            assert there["gpus_total"] - there["gpus_reserved"] >= body["gpu_count"]
        number = str(len(self.rentals) + 1)
        self.rentals[number] = {"status": "starting", "since": self.polls}
        return 200, {"status": "success", **({"id": number} if self.name_it else {})}

    def terminate(self, wanted: Any) -> tuple[int, Any]:
        if str(wanted) not in self.rentals:
            return 404, {"message": "not found"}
        self.rentals[str(wanted)]["status"] = "terminated"
        return 200, {"status": "success"}

    def mine(self, *, flat: bool) -> Any:
        """The account's machines: v2 a bare list of flat records, v1 nested ones."""
        self.polls += 1
        for rental in self.rentals.values():
            if rental["status"] == "starting" and self.polls - rental["since"] > self.polls_until_online:
                rental["status"] = self.status_at_end
        if flat:
            meta = {"ssh_command": f"ssh ubuntu@{self.address}", "public_ip": self.address}
            return [{"id": int(i), "status": r["status"], "meta": meta} for i, r in self.rentals.items()]
        ssh = f"ssh ubuntu@{self.address} -p 31424"
        return {"instances": [
            {"id": i, "instance": {"id": "node", "status": r["status"]}, "sshCommand": ssh}
            for i, r in self.rentals.items()
        ]}  # fmt: skip

    # ---- ways in

    def transport(self, request: Request) -> Reply:
        """In place of the network."""
        path = request.url.removeprefix("https://api.hyperbolic.xyz")
        status, value = self.answer(request.method, path, request.headers["Authorization"], request.body)
        if self._loses(request.method, path):
            raise NoAnswer("ReadTimeout")
        return Reply(status, json.dumps(value))

    def _loses(self, method: str, path: str) -> bool:
        lost = self.lose_answer and is_create(method, path)
        self.lose_answer = self.lose_answer and not lost
        return lost

    def __call__(self, environ: Any, start_response: Any) -> Any:
        request = WerkzeugRequest(environ)
        body = request.get_json(silent=True)
        status, value = self.answer(
            request.method, request.path, request.headers.get("Authorization", ""), body
        )
        if self._loses(request.method, request.path):
            environ["werkzeug.socket"].shutdown(2)
            raise ConnectionError
        response = Response(json.dumps(value), status=status, content_type="application/json")
        return response(environ, start_response)

    @contextmanager
    def served(self) -> Iterator[str]:
        """The account behind a real address on this machine."""
        server = make_server("127.0.0.1", 0, self)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def is_create(method: str, path: str) -> bool:
    return (method, path) in (("POST", "/v1/marketplace/instances/create"), ("POST", V2))
