"""Runs in a bucket: real client, real HTTP, Google's emulator in place of Google."""

from __future__ import annotations

import io
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat import bucket as bucket_module
from nanochat.bucket import bucket_name, fetch, files_of, open_bucket, upload
from nanochat.common import UserError
from scripts import fetch_run, upload_to_gcs

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    "base_checkpoints/d2/model_000008.pt": b"b" * 100_000,
    "mid_checkpoints/d2/model_000006.pt": b"mid",
    "chatsft_checkpoints/d2/model_000006.pt": b"sft",
    "chatrl_checkpoints/d2/model_000003.pt": b"rl",
    "chatrl_checkpoints/d2/meta_000003.json": b"{}",
    "tokenizer/tokenizer.json": b"tok",
    "report/report.md": b"# r",
    "runs/r1/rl/metrics.jsonl": b'{"step": 1}\n',
    "runs/r1/logs/chat_rl.log": b"log",
    "aqua/train.jsonl": b"{}\n",
}
NOT_SENT = {
    "runs/other/rl/metrics.jsonl": b"another run's",
    "base_data/shard_00000.parquet": b"PAR1",
    "chatrl_checkpoints/d2/model_000009.pt.unfinished": b"half",
    "runs/r1/.previous/rl/metrics.jsonl": b"old",
}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "base"
    for name, content in (FILES | NOT_SENT).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (tmp_path / "secret").write_text("secret")
    (folder / "report" / "link").symlink_to(tmp_path / "secret")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    for name in ("GCS_BUCKET", "RUN", "WANDB_RUN", "LAMBDA_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket in the emulator."""
    pytest.importorskip("google.cloud.storage")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="b")
    server.start()
    port = server._api._httpd.server_port if hasattr(server._api, "_httpd") else server._api.server_port
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    yield open_bucket("gs://b")
    server.stop()


def names(bucket: Any) -> list[str]:
    return [blob.name for blob in bucket.list_blobs()]


def test_everything_of_the_run_and_nothing_else(base: Path) -> None:
    assert {file.name for file in files_of(base, "r1", exclude_data=False)} == set(FILES)
    without = {file.name for file in files_of(base, "r1", exclude_data=True)}
    assert without == {name for name in FILES if not name.startswith("aqua/")}


def test_up_and_down_again(base: Path, bucket: Any, tmp_path: Path) -> None:
    files = files_of(base, "r1", exclude_data=False)
    assert upload(bucket, "r1", files) == (len(FILES), 0)
    assert upload(bucket, "r1", files) == (0, len(FILES)), "what is there is not sent again"
    (base / "report" / "report.md").write_bytes(b"# s")
    assert upload(bucket, "r1", files) == (1, len(FILES) - 1), "the same size, another content"
    home = tmp_path / "home"
    assert fetch(bucket, "r1", home) == (len(FILES), 0)
    for name, content in (FILES | {"report/report.md": b"# s"}).items():
        assert (home / name).read_bytes() == content
    (home / "tokenizer" / "tokenizer.json").write_bytes(b"xxx")
    assert fetch(bucket, "r1", home) == (1, len(FILES) - 1)
    assert fetch(bucket, "r1", tmp_path / "part", prefixes=("report",)) == (1, 0)


def test_the_manifest_comes_last_and_without_it_there_is_no_run(
    base: Path, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    make = type(bucket).blob
    monkeypatch.setattr(
        type(bucket), "blob", lambda self, name, **k: sent.append(name) or make(self, name, **k)
    )
    files = files_of(base, "r1", exclude_data=False)
    broken = [*files, bucket_module.RunFile("runs/r1/gone", base / "report" / "report.md")]
    crc = bucket_module.crc32c

    def failing(path: Path) -> str:
        if len(sent) == 4:
            raise UserError("the cable")
        return crc(path)

    monkeypatch.setattr(bucket_module, "crc32c", failing)
    with pytest.raises(UserError, match="the cable"):
        upload(bucket, "r1", broken)
    monkeypatch.setattr(bucket_module, "crc32c", crc)
    with pytest.raises(UserError, match="never ended"):
        fetch(bucket, "r1", tmp_path / "home")
    assert upload(bucket, "r1", files) == (len(FILES) - 4, 4), "goes on where it was cut off"
    assert sent[-1] == "runs/r1/manifest.json"


def test_what_was_altered_in_the_bucket_is_refused(base: Path, bucket: Any, tmp_path: Path) -> None:
    upload(bucket, "r1", files_of(base, "r1", exclude_data=False))
    bucket.blob("runs/r1/chatrl_checkpoints/d2/model_000003.pt").upload_from_string(b"RL")
    with pytest.raises(UserError, match="is not what was uploaded"):
        fetch(bucket, "r1", tmp_path / "home")
    assert not list((tmp_path / "home").rglob("*model_000003.pt*"))


def test_a_manifest_cannot_write_outside(base: Path, bucket: Any, tmp_path: Path) -> None:
    record = {"format": bucket_module.FORMAT, "files": {"../x": {"bytes": 1, "sha256": "0"}}}
    bucket.blob("runs/r2/manifest.json").upload_from_string(json.dumps(record))
    with pytest.raises(UserError, match="outside the run"):
        fetch(bucket, "r2", tmp_path / "home")


@pytest.mark.parametrize(
    "record",
    [[], {"files": {}}, {"format": bucket_module.FORMAT}, {"format": bucket_module.FORMAT, "files": {"x": {"bytes": 1}}},
     {"format": bucket_module.FORMAT, "files": {"": {"bytes": 1, "sha256": "0"}}}],
    ids=["no record", "no format", "no files", "no hash", "no name"],
)  # fmt: skip
def test_a_damaged_manifest_is_one_line(bucket: Any, tmp_path: Path, record: Any) -> None:
    bucket.blob("runs/r2/manifest.json").upload_from_string(json.dumps(record))
    with pytest.raises(UserError, match="the manifest of run r2"):
        fetch(bucket, "r2", tmp_path / "home")


def test_the_commands(base: Path, bucket: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    upload_to_gcs.main(upload_to_gcs.Config(bucket="gs://b", run_name="r1", exclude_data=True, yes=True))
    assert "run r1 is whole in gs://b: 9 files sent, 0 were there already" in capsys.readouterr().out
    fetch_run.main(fetch_run.Config(bucket="gs://b", run_name="r1", to=str(tmp_path / "home")))
    assert "9 files fetched" in capsys.readouterr().out
    with pytest.raises(UserError, match="run nope is not in gs://b"):
        fetch_run.main(fetch_run.Config(bucket="gs://b", run_name="nope"))


def test_the_shell_command_uploads_for_real_and_ends_the_machine_through_the_api(
    base: Path, bucket: Any
) -> None:
    """As it runs on a rented machine: real client and HTTP on both sides, the emulator and a fake Lambda behind them."""
    from cloud_fakes import KEY, FakeLambda, FastClock

    account = FakeLambda(clock=FastClock(), seconds_between=0.0)
    with account.served() as url:
        from nanochat.cloud import Order
        from nanochat.lambda_cloud import LambdaCloud

        order = Order("gpu_1x_a10", "us-east-1", "x", ssh_key_name="laptop")
        machine = LambdaCloud(KEY, base_url=url).launch(order)
        env = {
            **os.environ,
            "LAMBDA_API_KEY": KEY,
            "LAMBDA_API_BASE": url,
            "GCS_BUCKET": "b",
            "NO_INSTALL": "1",
        }
        words = ["--run-name", "r1", "--exclude-data", "--yes", "--auto-terminate", machine]
        done = subprocess.run(
            ["bash", "scripts/upload_to_gcs.sh", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"run r1 is whole in gs://b: {len(FILES) - 1} files sent" in done.stdout
        assert "is terminated, nothing more is paid for it" in done.stderr
        assert account.running == [] and KEY not in done.stdout + done.stderr
    assert "runs/r1/manifest.json" in names(bucket)


def test_a_dry_run_needs_neither_network_nor_package(base: Path, tmp_path: Path) -> None:
    (tmp_path / "hide" / "google").mkdir(parents=True)
    (tmp_path / "hide" / "google" / "__init__.py").write_text("raise ImportError('hidden')\n")
    env = {
        **os.environ,
        "NANOCHAT_BASE_DIR": str(base),
        "PYTHONPATH": str(tmp_path / "hide"),
        "STORAGE_EMULATOR_HOST": "",
    }
    command = [
        "bash",
        "scripts/upload_to_gcs.sh",
        "--bucket",
        "gs://b",
        "--run-name",
        "r1",
        "--dry-run",
        "--exclude-data",
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "chatrl_checkpoints/d2/model_000003.pt" in done.stdout and "nothing was sent" in done.stdout
    assert "aqua" not in done.stdout


def test_mistakes_cost_one_line(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = upload_to_gcs.Config
    for wrong, words in (
        (config(), "--bucket is missing"),
        (config(bucket="b"), "write gs://NAME"),
        (config(bucket="gs://b", run_name="r1"), "add --yes"),
        (config(bucket="gs://b", auto_terminate="i-1", yes=True), "needs LAMBDA_API_KEY"),
        (config(bucket="gs://b", run_name="../x", dry_run=True), "has only letters"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO())
        with pytest.raises(UserError, match=words):
            upload_to_gcs.main(wrong)
    with pytest.raises(UserError, match="without a folder"):
        bucket_name("gs://b/folder")
