"""
Where a number comes from: commit, command, versions, machine. Every run carries it, so that two runs can be told apart.

Secrets never do. A name is secret when one of its words is KEY, TOKEN, SECRET, PASSWORD or the like: whole words, because
`max_new_tokens` and `tokenizer` must stay. The value of every such environment variable is also cut out of all text.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "numpy", "tiktoken", "rustbpe", "pyarrow", "datasets", "wandb")
SECRET_WORDS = {"key", "apikey", "token", "secret", "password", "passwd", "credentials"}
REDACTED = "<redacted>"


def provenance() -> dict[str, Any]:
    """The code, command, versions and machine of this process."""
    commit = _git("rev-parse", "HEAD")
    return {
        "command": redacted(list(sys.orig_argv)),
        "commit": commit,
        "dirty": bool(_git("status", "--porcelain")) if commit else None,
        "versions": {"python": platform.python_version(), **_versions()},
        "system": system(),
    }


def system() -> dict[str, Any]:
    """Platform, CPU, memory and the GPUs that torch sees."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "platform": platform.platform(terse=True),
        "cpu": _cpu_name(),
        "num_cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "gpus": _gpus(),
    }


def is_secret(name: str) -> bool:
    """True for names such as WANDB_API_KEY, hf-token, apiKey; not for max_new_tokens."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return not SECRET_WORDS.isdisjoint(re.split(r"[^a-z]+", words))


def redacted(value: Any, *, environment: Mapping[str, str] = os.environ) -> Any:
    """`value` (mappings, sequences, text) without secrets: neither under a secret name nor anywhere in its text."""
    hidden = [text for name, text in environment.items() if is_secret(name) and len(text) >= 8]
    return _redact(value, hidden)


def _redact(value: Any, hidden: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {k: REDACTED if v and is_secret(str(k)) else _redact(v, hidden) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return _redact_words([_redact(item, hidden) for item in value])
    if isinstance(value, str):
        for text in hidden:
            value = value.replace(text, REDACTED)
    return value


def _redact_words(words: list[Any]) -> list[Any]:
    """Command-line words with the values of secret flags cut out: `--api-key=X` and `--api-key X`."""
    result: list[Any] = []
    hide_next = False
    for word in words:
        flag, equals, _ = word.partition("=") if isinstance(word, str) else ("", "", "")
        secret = flag.startswith("-") and is_secret(flag)
        result.append(REDACTED if hide_next else f"{flag}={REDACTED}" if secret and equals else word)
        hide_next = secret and not equals
    return result


def _git(*words: str) -> str | None:
    """What git says of the source tree, or None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpus() -> list[str]:
    """Names of the GPUs, when this process has imported torch; a laptop that has not need not do so for this."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
