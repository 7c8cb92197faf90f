"""The commands as a user runs them, on a checkpoint of the talking model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from typing import Any

import pytest
import torch

from nanochat.checkpoint_manager import save
from nanochat.common import UserError, World
from scripts.chat_web import Config, bind
from tests.talking import talking_model


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose base dir has the talking model as an rl checkpoint."""
    home = tmp_path_factory.mktemp("home")
    model, tokenizer = talking_model()
    tokenizer.save(home / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(home))
        save("rl", "d2", 150, model=model, meta={}, world=World(0, 0, 1, torch.device("cpu"), torch.float32))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NANOCHAT_", "AQUA_"))}
    return kept | {"NANOCHAT_BASE_DIR": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(env: dict[str, str], *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], env=env, capture_output=True, text=True, timeout=600, **more
    )


def test_a_question_from_a_pipe_has_its_answer_on_stdout_and_its_bars_beside_it(env: dict[str, str]) -> None:
    question = "Pens cost 3 each. What do 4 cost? A) 7 B) 10 C) 12 D) 14 E) 43"
    done = run(env, "scripts.chat_cli", "-i", "rl", "-p", "-", "--aqua", "--temperature=0", input=question)
    assert done.stdout == "One costs 3.\n4 * 3 = 12.\nAnswer: C\n", done.stderr
    assert "answer C" in done.stderr and "█" in done.stderr


def test_the_server_answers_writes_nothing_down_and_ends_on_ctrl_c(env: dict[str, str]) -> None:
    words = [sys.executable, "-m", "scripts.chat_web", "-i", "rl", "--port=0"]
    server = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    written = ""
    try:
        while "nothing of a conversation" not in written and server.poll() is None:
            written += server.stdout.readline()
        url = next(word for word in written.split() if word.startswith("http://127.0.0.1:"))
        body = {"messages": [{"role": "user", "content": "xylophone"}], "max_tokens": 4}
        asked = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=300) as reply:
            assert json.load(reply)["model"] == "nanochat-rl-d2"
        with urllib.request.urlopen(f"{url}/gallery", timeout=300) as reply:
            assert len(json.load(reply)["questions"]) == 24
    finally:
        server.send_signal(signal.SIGINT)
        rest, _ = server.communicate(timeout=300)
    assert "xylophone" not in written + rest and "Traceback" not in rest, rest
    assert server.returncode == 0


def test_a_public_interface_without_a_key_is_refused_before_anything_is_loaded(env: dict[str, str]) -> None:
    done = run(env, "scripts.chat_web", "-i", "rl", "--host=0.0.0.0")
    assert done.returncode != 0
    assert done.stderr.startswith("error: --host=0.0.0.0 lets others in and NANOCHAT_API_KEY is not set")


def test_a_port_that_is_taken_is_one_line() -> None:
    taken = bind("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}"):
        bind("127.0.0.1", port)
    taken.close()


@pytest.mark.parametrize("wrong", [{"temperature": 3.0}, {"port": 70_000}, {"max_batch": 0}, {"top_k": -1}])
def test_wrong_numbers_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}="):
        Config(**wrong)
