"""A Lambda Cloud that enforces its published contract, time that passes by itself, and the other side of an SSH connection.

FakeLambda is a WSGI app over a little state. Where ../shared has Lambda's OpenAPI file, openapi-core checks every request
and every documented answer against it; the rules that the file has only in prose (one SSH key, one launch in twelve seconds,
user-data of at most 1 MB, no field named quantity) are checked by hand, everywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from werkzeug.serving import make_server
from werkzeug.test import Client as WerkzeugClient
from werkzeug.wrappers import Request as WerkzeugRequest
from werkzeug.wrappers import Response

from nanochat import cloud_http
from nanochat.cloud_http import NoAnswer, NotSent, Reply

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT.parent / "shared" / "reference" / "lambda_openapi.json"
KEY = "secret_test-key_0123456789abcdef"


class VirtualClock:
    """Sleeping takes no time and moves the clock."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, [0.0]

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


class FastClock:
    """Real time, twenty times faster: for the account that processes started with `fast_python` talk to."""

    def monotonic(self) -> float:
        return time.monotonic() * 20


# A sleep takes a twentieth of its time and moves the clock by all of it. What the machine takes for anything else counts as it
# is, so a crowded one does not use up a launcher's patience twenty times faster.
FAST = """
import runpy, subprocess, sys, time, requests
monotonic, sleep, skipped = time.monotonic, time.sleep, [0.0]
def nap(seconds):
    sleep(seconds / 20)
    skipped[0] += seconds * 19 / 20
time.monotonic, time.sleep = lambda: monotonic() + skipped[0], nap
sys.argv = sys.argv[1:]
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def fast_python(program: str, *words: str) -> list[str]:
    """The command that runs a script or module whose sleeps take a twentieth of their time."""
    return [sys.executable, "-c", FAST, program, *words]


@cache
def openapi(url: str) -> Any:
    """Lambda's contract as served at `url`, or None where the file or openapi-core is missing."""
    if not SPEC.is_file():
        return None
    try:
        from openapi_core import OpenAPI
    except ImportError:
        return None
    spec = json.loads(SPEC.read_text())
    spec["servers"] = [{"url": url}]
    return OpenAPI.from_dict(spec)


def machine_type(name: str, gpus: int, cents: int, description: str) -> dict[str, Any]:
    specs = {"vcpus": 26 * gpus, "memory_gib": 200 * gpus, "storage_gib": 1000, "gpus": gpus}
    return {
        "name": name, "description": description, "gpu_description": description.split(" ", 1)[1],
        "price_cents_per_hour": cents, "specs": specs,
    }  # fmt: skip


TYPES = {
    kind["name"]: kind
    for kind in (
        machine_type("gpu_1x_a10", 1, 75, "1x A10 (24 GB PCIe)"),
        machine_type("gpu_8x_h100_sxm5", 8, 2392, "8x H100 (80 GB SXM5)"),
    )
}


@dataclass
class FakeLambda:
    """The account. Change `capacity`, `faults` and the rest to make it misbehave."""

    clock: Any = field(default_factory=VirtualClock)
    url: str = "http://127.0.0.1:9/"
    keys: tuple[str, ...] = ("laptop",)
    capacity: dict[str, list[str]] = field(
        default_factory=lambda: {n: ["us-east-1", "us-west-1"] for n in TYPES}
    )
    faults: dict[str, list[Any]] = field(default_factory=dict)
    """'METHOD path' -> what comes instead, first first: (status, code), "after" or "before" (no answer), "refused" """
    polls_until_active: int = 2
    end_status: str = "active"
    address: str = "127.0.0.1"
    instances: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    launch_times: list[float] = field(default_factory=list)
    request_times: list[float] = field(default_factory=list)
    seconds_between: float = 1.0
    list_lag: int = 0
    """listings in which a new machine does not appear yet"""
    prices: dict[str, int] = field(default_factory=dict)
    """cents that differ from those of TYPES"""
    before_listing: Callable[[int], None] = lambda count: None
    """called with 1, 2, ... before the account answers what can be rented"""
    num_listings: int = 0
    lost_launches: int = 0
    """so many launches happen and are not answered, over a real connection"""

    # ---- what a test asks

    @property
    def running(self) -> list[str]:
        return [
            i for i, entry in self.instances.items() if entry["status"] not in ("terminating", "terminated")
        ]

    def calls(self, method: str, path: str) -> list[Any]:
        return [body for m, p, body in self.requests if (m, p) == (method, path)]

    @property
    def launches(self) -> list[Any]:
        return self.calls("POST", "/api/v1/instance-operations/launch")

    # ---- the service

    def __call__(self, environ: Any, start_response: Any) -> Any:
        request = WerkzeugRequest(environ)
        response = self.respond(request)
        checked = openapi(self.url)
        if checked is not None and response.status_code not in (429, 500, 502, 503):
            from openapi_core.contrib.werkzeug import WerkzeugOpenAPIRequest, WerkzeugOpenAPIResponse

            checked.validate_response(WerkzeugOpenAPIRequest(request), WerkzeugOpenAPIResponse(response))
        if self.lost_launches and request.path.endswith("/launch"):
            self.lost_launches -= 1
            environ["werkzeug.socket"].shutdown(2)
            raise ConnectionError
        return response(environ, start_response)

    def respond(self, request: WerkzeugRequest) -> Response:
        body = request.get_json(silent=True)
        self.requests.append((request.method, request.path, body))
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return error(401, "global/invalid-api-key")
        if self._too_fast(self.request_times, self.seconds_between):
            return error(429, "global/rate-limited")
        fault = self._fault(request)
        if isinstance(fault, tuple):
            return error(*fault)
        checked = openapi(self.url)
        if checked is not None:
            from openapi_core.contrib.werkzeug import WerkzeugOpenAPIRequest

            checked.validate_request(
                WerkzeugOpenAPIRequest(request)
            )  # raises: a breach of contract fails the test
        return self.route(request.method, request.path.removeprefix("/api/v1"), body)

    def _fault(self, request: WerkzeugRequest) -> Any:
        queue = self.faults.get(f"{request.method} {request.path.removeprefix('/api/v1')}") or []
        return queue.pop(0) if queue and isinstance(queue[0], tuple) else None

    def _too_fast(self, times: list[float], seconds: float) -> bool:
        now = self.clock.monotonic()
        fast = bool(times) and now - times[-1] < seconds
        if not fast:
            times.append(now)
        return fast

    def route(self, method: str, path: str, body: Any) -> Response:
        if (method, path) == ("GET", "/instance-types"):
            self.num_listings += 1
            self.before_listing(self.num_listings)
            return data(
                {
                    n: {"instance_type": self._type(n), "regions_with_capacity_available": self._regions(n)}
                    for n in TYPES
                }
            )
        if (method, path) == ("GET", "/ssh-keys"):
            return data(
                [{"id": name, "name": name, "public_key": "ssh-ed25519 AAAA x"} for name in self.keys]
            )
        if (method, path) == ("POST", "/instance-operations/launch"):
            return self.launch(body)
        if (method, path) == ("GET", "/instances"):
            for entry in self.instances.values():
                entry["hidden"] -= 1
            return data(
                [
                    public(e)
                    for e in self.instances.values()
                    if e["status"] != "terminated" and e["hidden"] < 0
                ]
            )
        if method == "GET" and path.startswith("/instances/"):
            return self.poll(path.rsplit("/", 1)[1])
        if (method, path) == ("POST", "/instance-operations/terminate"):
            return self.terminate(body["instance_ids"])
        return error(404, "global/object-does-not-exist")

    def _type(self, name: str) -> dict[str, Any]:
        return {
            **TYPES[name],
            "price_cents_per_hour": self.prices.get(name, TYPES[name]["price_cents_per_hour"]),
        }

    def _regions(self, name: str) -> list[dict[str, str]]:
        return [{"name": r, "description": r} for r in self.capacity.get(name, [])]

    def launch(self, body: Any) -> Response:
        if self._too_fast(self.launch_times, 12.0):
            return error(429, "global/rate-limited")
        assert "quantity" not in body, "1.8.3 knows no quantity"
        if len(body["ssh_key_names"]) != 1 or len(body.get("user_data", "").encode()) > 1_000_000:
            return error(400, "global/invalid-parameters")
        if body["instance_type_name"] not in TYPES or body["ssh_key_names"][0] not in self.keys:
            return error(404, "global/object-does-not-exist")
        if body["region_name"] not in self.capacity.get(body["instance_type_name"], []):
            return error(400, "instance-operations/launch/insufficient-capacity")
        instance_id = uuid.uuid4().hex
        available = {"available": True}
        self.instances[instance_id] = {
            "id": instance_id, "name": body.get("name", ""), "status": "booting", "polls": 0, "hidden": self.list_lag,
            "ssh_key_names": body["ssh_key_names"], "file_system_names": [], "tags": body.get("tags", []),
            "region": {"name": body["region_name"], "description": "x"},
            "instance_type": self._type(body["instance_type_name"]), "jupyter_token": "jupyter-secret",
            "actions": dict.fromkeys(("migrate", "rebuild", "restart", "cold_reboot", "terminate"), available),
        }  # fmt: skip
        return data({"instance_ids": [instance_id]})

    def poll(self, instance_id: str) -> Response:
        entry = self.instances.get(instance_id)
        if entry is None:
            return error(404, "global/object-does-not-exist")
        entry["polls"] += 1
        if entry["status"] == "booting" and entry["polls"] >= self.polls_until_active:
            entry["status"] = self.end_status
            if self.end_status == "active":
                entry["ip"] = self.address
        return data(public(entry))

    def terminate(self, ids: list[str]) -> Response:
        if any(i not in self.instances for i in ids):
            return error(404, "global/object-does-not-exist")
        for i in ids:
            self.instances[i]["status"] = "terminating"
        return data({"terminated_instances": [public(self.instances[i]) for i in ids]})

    # ---- ways in

    def transport(self, request: cloud_http.Request) -> Reply:
        """In place of the network, without one; `faults` of the kind "before", "after" and "refused" happen here."""
        path = request.url.removeprefix(self.url.rstrip("/"))
        queue = self.faults.get(f"{request.method} {path.removeprefix('/api/v1')}") or []
        kind = queue.pop(0) if queue and isinstance(queue[0], str) else ""
        if kind == "refused":
            raise NotSent("ConnectionError")
        if kind == "before":
            raise NoAnswer("ReadTimeout")
        reply = WerkzeugClient(self).open(
            path, method=request.method, headers=dict(request.headers), json=request.body, base_url=self.url
        )
        if kind == "after":
            raise NoAnswer("ReadTimeout")
        return Reply(reply.status_code, reply.text, dict(reply.headers))

    @contextmanager
    def served(self) -> Iterator[str]:
        """The account behind a real address on this machine."""
        server = make_server("127.0.0.1", 0, self)
        self.url = f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self.url.rstrip("/")
        finally:
            server.shutdown()
            thread.join()


def public(entry: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if k not in ("polls", "hidden")}


def data(value: Any) -> Response:
    return Response(json.dumps({"data": value}), content_type="application/json")


def error(status: int, code: str) -> Response:
    """An answer of the contract's shape; some codes have a fixed message there."""
    record = {"code": code, "message": MESSAGES.get(code, "no"), "suggestion": "try something else"}
    return Response(json.dumps({"error": record}), status=status, content_type="application/json")


MESSAGES: dict[str, str] = {}

# ---- the other side of ssh

SSH = r"""#!/usr/bin/env bash
# ssh for tests: records argv and standard input, "connects" to a home folder on this machine.
set -u
printf '%s\0' "$@" >>"$FAKE_LOG/argv"; printf '\n' >>"$FAKE_LOG/argv"
known=""
for word in "$@"; do case "$word" in UserKnownHostsFile=*) known=${word#*=} ;; esac; done
if [ -s "$FAKE_LOG/ssh_fails" ]; then
  read -r left <"$FAKE_LOG/ssh_fails"
  if [ "$left" -gt 0 ]; then echo $((left - 1)) >"$FAKE_LOG/ssh_fails"; echo "Connection refused" >&2; exit 255; fi
fi
key=$(cat "$FAKE_LOG/host_key" 2>/dev/null || echo "fake ssh-ed25519 AAAA")
if [ -s "$known" ]; then
  [ "$(cat "$known")" = "$key" ] || { echo "Host key verification failed." >&2; exit 255; }
else
  case "$*" in *StrictHostKeyChecking=yes*) echo "Host key verification failed." >&2; exit 255 ;; esac
  mkdir -p "$(dirname "$known")"; printf '%s\n' "$key" >"$known"
fi
# The words after the host are the command.
while [ $# -gt 0 ]; do case "$1" in -o | -i | -p | -l) shift 2 ;; -*) shift ;; *) break ;; esac; done
shift
cd "$FAKE_HOME"
export HOME="$FAKE_HOME" TMUX_TMPDIR="$FAKE_HOME"
unset LAMBDA_API_KEY HYPERBOLIC_API_KEY WANDB_API_KEY NANOCHAT_BASE_DIR TMUX
case "$*" in
  *rsync\ --server*)
    [ -e "$FAKE_LOG/count" ] || exec bash -c "$*"  # rsync wants both ends of the pipe
    bash -c "$*" | python3 "$FAKE_LOG/count"
    exit "${PIPESTATUS[0]}"
    ;;
esac
tee -a "$FAKE_LOG/stdin" | bash -c "$*"
exit "${PIPESTATUS[1]}"
"""
COUNT = """# What rsync sends, counted into `received`; the cable breaks, once, after the number of bytes in `cut`.
import os, pathlib
log = pathlib.Path(os.environ["FAKE_LOG"])
os.set_blocking(1, True)  # rsync's end of it is not
left = int((log / "cut").read_text()) if (log / "cut").exists() else 1 << 60
(log / "cut").unlink(missing_ok=True)
passed = 0
while passed < left and (block := os.read(0, min(65536, left - passed))):
    os.write(1, block)
    passed += len(block)
with (log / "received").open("a") as file:
    file.write(f"{passed}\\n")
"""
TMUX = r"""#!/usr/bin/env bash
# tmux for tests: new-session -d -s NAME COMMAND and has-session -t =NAME.
case "$1" in
  new-session) setsid bash -c 'echo $$ >"$HOME/.session-'"$4"'"; '"$5" >/dev/null 2>&1 </dev/null & ;;
  has-session) pid=$(cat "$HOME/.session-${3#=}" 2>/dev/null) && kill -0 "$pid" 2>/dev/null ;;
  *) exit 2 ;;
esac
"""
NVIDIA = "#!/bin/sh\necho 'NVIDIA A10'\n"
# A driver that waits for ~/go ends after the third look at it, so that it is seen alive and waited for however slow all is.
NVIDIA_GOES = """#!/bin/sh
echo look >>"$HOME/looks"
[ "$(wc -l <"$HOME/looks")" -lt 3 ] || : >"$HOME/go"
echo 'NVIDIA A10'
"""


@dataclass(frozen=True)
class OtherSide:
    """A home folder that plays the rented machine, and what was said to it."""

    home: Path
    log: Path
    bin: Path

    @property
    def argv(self) -> str:
        return (self.log / "argv").read_text() if (self.log / "argv").exists() else ""

    @property
    def stdin(self) -> str:
        return (self.log / "stdin").read_text() if (self.log / "stdin").exists() else ""

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "FAKE_HOME": str(self.home),
            "FAKE_LOG": str(self.log),
        }

    @property
    def checkout(self) -> Path:
        return self.home / "nanochatAquaRat"

    def switch_off(self) -> None:
        """What runs in a session ends with the machine; a run that has said its last word may not be gone yet."""
        for session in self.home.glob(".session-*"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(session.read_text()), signal.SIGKILL)
            session.unlink()


def other_side(folder: Path, *, gpu: bool = True) -> OtherSide:
    """ssh, tmux and nvidia-smi for PATH, and the home they lead to."""
    side = OtherSide(folder / "home", folder / "log", folder / "bin")
    for path in (side.home, side.log, side.bin):
        path.mkdir(parents=True)
    tools = {"ssh": SSH, "tmux": TMUX, "nvidia-smi": NVIDIA_GOES if gpu else "#!/bin/sh\nexit 9\n"}
    for name, text in tools.items():
        tool = side.bin / name
        tool.write_text(text)
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return side


def repository(folder: Path, driver: str) -> str:
    """A git repository with a run script; its address."""
    import subprocess

    folder.mkdir(parents=True)
    (folder / "run_aquarat_small.sh").write_text(driver)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    for words in (["init", "--quiet", "-b", "main"], ["add", "."], ["commit", "--quiet", "-m", "x"]):
        subprocess.run([*git, *words], cwd=folder, check=True)
    return f"file://{folder}"
