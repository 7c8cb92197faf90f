"""Releases for the Hub: what is staged, what is never touched, and a push against a Hub on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small import tiny_tokenizer

from nanochat.common import UserError, World
from nanochat.publish import Staged, front_matter, link_targets, linked_files, matching_files, stage
from scripts import sync_hf_repo
from scripts.sync_hf_repo import Config

ROOT = Path(__file__).resolve().parent.parent
RESULTS = {
    "AQUA": {"accuracy": 0.3, "n": 254, "low": 0.247, "high": 0.359, "majority": 0.2717},
    "SYNTHETIC": {"accuracy": 0.685, "n": 1024, "low": 0.655, "high": 0.712, "majority": 0.207},
}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "repository"
    (root / "docs").mkdir(parents=True)
    for name in (
        "LICENSE",
        "a.md",
        "docs/x y.md",
        "docs/t.md",
        "pic.png",
        "h.png",
        "ref.md",
        ".env",
        "extra.txt",
    ):
        (root / name).write_text(name)
    (tmp_path / "secret.env").write_text("secret")
    (root / "link.md").symlink_to(tmp_path / "secret.env")
    (root / "README.md").write_text(
        '# R\n[a](a.md#part) [t](docs/t.md "T") [s](<docs/x y.md>) ![p](pic.png) <img alt=\'\' src="h.png">\n'
        "[out](../secret.env) [abs](/etc/passwd) [l](link.md) [e](.env) [gone](gone.md) [d](docs) [web](https://x/y.md)\n"
        "[![badge](pic.png)](LICENSE) [r][1] `[code](extra.txt)` [anchor](#x)\n\n[1]: ref.md\n\n```\n[c](extra.txt)\n```\n"
    )
    monkeypatch.setattr(sync_hf_repo, "ROOT", root)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return root


def save_checkpoint(tmp_path: Path, smear: int = 0) -> None:
    from nanochat import checkpoint_manager
    from nanochat.gpt import GPT, GPTConfig

    tokenizer = tiny_tokenizer()
    config = GPTConfig.for_depth(
        1, vocab_size=tokenizer.vocab_size, sequence_len=128, n_embd=32, n_head=2, smear=smear
    )
    tokenizer.save(tmp_path / "base" / "tokenizer")
    world = World(0, 0, 1, torch.device("cpu"), torch.float32)
    checkpoint_manager.save("rl", "d1", 3, model=GPT(config), meta={}, world=world)
    folder = tmp_path / "base" / "runs" / "aquarat-small" / "chat_eval_rl"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"results": RESULTS}))
    report = tmp_path / "base" / "report"
    (report / "report_figures").mkdir(parents=True)
    (report / "report.md").write_text("# Report of the run aquarat-small\n\n![](report_figures/rl.png)\n")
    (report / "report_figures" / "rl.png").write_bytes(b"png")


def test_links_of_every_form_are_found_and_none_leads_outside(repository: Path) -> None:
    files, left_out = linked_files(repository / "README.md", repository)
    assert {file.name for file in files} == {
        "a.md",
        "docs/t.md",
        "docs/x y.md",
        "pic.png",
        "h.png",
        "LICENSE",
        "ref.md",
    }
    text = "\n".join(left_out)
    for words in (
        "../secret.env leads outside",
        "link.md leads outside",
        ".env is private",
        "gone.md does not exist",
    ):
        assert words in text
    assert "/etc/passwd" in text
    assert "extra.txt" not in link_targets((repository / "README.md").read_text())


def test_only_what_was_staged_is_ever_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "release"
    stage([Staged("a.md", b"1"), Staged("sub/b.md", b"2")], folder)
    (folder / "model_001560.pt").write_text("mine")
    stage([Staged("a.md", b"3")], folder)
    assert (folder / "a.md").read_bytes() == b"3" and not (folder / "sub" / "b.md").exists()
    assert (folder / "model_001560.pt").read_text() == "mine"
    with pytest.raises(UserError, match="was not staged by this command"):
        stage([Staged("model_001560.pt", b"ours")], folder)
    with pytest.raises(UserError, match="outside"):
        stage([Staged("../x", b"")], folder)


def test_a_staged_file_that_somebody_changed_is_neither_overwritten_nor_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "release"
    stage([Staged("a.md", b"1"), Staged("b.md", b"2")], folder)
    (folder / "a.md").write_bytes(b"mine")
    for later in ([Staged("a.md", b"3")], [Staged("b.md", b"3")]):
        with pytest.raises(UserError, match=r"a\.md was changed since it was staged"):
            stage(later, folder)
        assert (folder / "a.md").read_bytes() == b"mine" and (folder / "b.md").read_bytes() == b"2"
    (folder / "a.md").write_bytes(b"4")
    stage([Staged("a.md", b"4")], folder)  # what it would have become anyhow
    assert [path.name for path in sorted(folder.iterdir())] == [".staged.json", "a.md"]


def test_nothing_outside_the_release_folder_is_written_or_deleted(tmp_path: Path) -> None:
    """Whatever the list of an earlier time says, and wherever a folder of the release leads."""
    folder, outside = tmp_path / "release", tmp_path / "outside"
    outside.mkdir()
    (outside / "b.md").write_text("mine")
    stage([Staged("a.md", b"1")], folder)
    mine = {
        name: sha256(b"1" if name == "a.md" else b"mine").hexdigest()
        for name in ("sub/b.md", "../outside/b.md", "a.md")
    }
    (folder / "sub").symlink_to(outside)
    with pytest.raises(UserError, match="outside"):
        stage([Staged("sub/new.md", b"2")], folder)
    (folder / ".staged.json").write_text(json.dumps({"files": mine}))
    stage([Staged("c.md", b"3")], folder)
    assert (outside / "b.md").read_text() == "mine" and not (folder / "a.md").exists()
    assert [path.name for path in outside.iterdir()] == ["b.md"]


def test_extra_follows_no_link_outside(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "s.txt").write_text("secret")
    (repository / "out").symlink_to(tmp_path / "elsewhere")
    (repository / "s.txt").symlink_to(tmp_path / "elsewhere" / "s.txt")
    names = {file.name for file in matching_files(("*.txt",), repository)}
    assert names == {"extra.txt"}
    for pattern in ("out/*.txt", "s.txt"):
        with pytest.raises(UserError, match="matches no file of the repository"):
            matching_files((pattern,), repository)


def test_extra_takes_no_key_and_nothing_of_git_along(repository: Path) -> None:
    for name in (".git/config", "docs/.env.local", ".env.template"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("secret")
    names = {file.name for file in matching_files(("**/*", ".*"), repository)}
    assert {".env.template", "docs/t.md", "extra.txt"} <= names
    assert not {".env", "docs/.env.local", ".git/config"} & names
    with pytest.raises(UserError, match="that may be published"):
        matching_files((".env",), repository)


def test_a_dry_run_writes_nothing_and_needs_no_network(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a dry run opened a connection"))
    monkeypatch.setattr(sync_hf_repo, "push", lambda *_: pytest.fail("pushed"))
    sync_hf_repo.main(Config(dry_run=True, extra=("*.txt",)))
    text = capsys.readouterr().out
    assert "extra.txt" in text and "docs/t.md" in text and not (repository / "hf_release").exists()


def test_a_missing_licence_is_an_error(repository: Path) -> None:
    (repository / "LICENSE").unlink()
    with pytest.raises(UserError, match="LICENSE is missing"):
        sync_hf_repo.main(Config(dry_run=True))


@pytest.mark.parametrize("pattern", ["../*", "/etc/*", "nothing*.x"])
def test_extra_patterns_stay_inside(repository: Path, pattern: str) -> None:
    with pytest.raises(UserError, match="--extra="):
        sync_hf_repo.main(Config(dry_run=True, extra=(pattern,)))


def test_a_checkpoint_goes_along_with_what_was_measured(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    save_checkpoint(tmp_path)
    sync_hf_repo.main(Config(checkpoint="rl", no_push=True))
    folder = repository / "hf_release"
    for name in ("model.safetensors", "config.json", "tokenizer.json", "nanochat_tokenizer/tokenizer.json", "report.md", "report_figures/rl.png", "LICENSE", "a.md"):  # fmt: skip
        assert (folder / name).is_file(), name
    assert not [path for path in folder.rglob("*") if path.suffix in (".pt", ".pkl")]
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "mit" and head["library_name"] == "transformers"
    (entry,) = head["model-index"][0]["results"]
    assert entry["metrics"][0]["value"] == 30.0 and entry["dataset"]["type"] == "deepmind/aqua_rat"
    assert "| AQUA | 254 | 30.0 % | 24.7 to 35.9 | 27.2 % |" in card and "| SYNTHETIC | 1,024 |" in card
    assert "step 3" in card and card.rstrip().endswith("```") and "# R" in card


def test_a_model_that_transformers_cannot_compute_is_published_as_it_is(
    repository: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    save_checkpoint(tmp_path, smear=2)
    sync_hf_repo.main(Config(checkpoint="rl", no_push=True, run_name="another"))
    folder = repository / "hf_release"
    assert "smear.weight" in load_file(folder / "model.safetensors")
    card = (folder / "README.md").read_text()
    assert "transformers can compute" in card and "none is claimed" in card and "model-index" not in card
    assert not (folder / "report.md").exists(), "it is the report of another run"


def test_accuracies_of_another_step_are_not_claimed(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path, smear=2)
    summary = tmp_path / "base" / "runs" / "aquarat-small" / "chat_eval_rl" / "summary.json"
    for step, claimed in ((3, True), (2, False)):
        summary.write_text(json.dumps({"results": RESULTS | {"step": step}}))
        sync_hf_repo.main(Config(checkpoint="rl", no_push=True))
        card = (repository / "hf_release" / "README.md").read_text()
        assert ("| AQUA | 254 | 30.0 %" in card, "none is claimed" in card) == (claimed, not claimed)
    assert "which are of step 2 and not of step 3" in capsys.readouterr().out


def test_without_results_nothing_is_claimed() -> None:
    assert "model-index" not in front_matter(model_name="a/b", results={}, exported=False)
    assert "model-index" not in front_matter(
        model_name="a/b", results={"AQUA": {"accuracy": 1.0}}, exported=False
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A Hub on this machine, as far as a push of small files goes: what was committed."""
    from huggingface_hub import constants
    from werkzeug.serving import make_server
    from werkzeug.wrappers import Request, Response

    commits: list[Any] = []

    @Request.application
    def app(request: Request) -> Response:
        body = request.get_data(as_text=True)

        def reply(value: Any, status: int = 200) -> Response:
            return Response(json.dumps(value), status=status, content_type="application/json")

        if request.headers.get("Authorization") != "Bearer hf_right":
            return reply({"error": "Unauthorized"}, 401)
        if request.path == "/api/repos/create":
            return reply({"url": f"{request.host_url}ME/NAME"})
        if request.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return reply({"files": files})
        if request.path.endswith("/commit/main"):
            commits.extend(json.loads(line) for line in body.splitlines())
            return reply(
                {"commitUrl": f"{request.host_url}ME/NAME/commit/1", "commitOid": "1", "success": True}
            )
        return reply({})

    server = make_server("127.0.0.1", 0, app)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", address, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield commits
    server.shutdown()


def test_a_push_sends_what_was_staged_and_deletes_nothing(repository: Path, hub: list[Any], capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    (repository / "hf_release").mkdir()
    (repository / "hf_release" / "private.bin").write_text("mine")
    sync_hf_repo.main(Config(repo_id="ME/NAME"))
    sent = [line["value"]["path"] for line in hub if line["key"] == "file"]
    assert set(sent) == {
        "README.md",
        "LICENSE",
        "a.md",
        "docs/t.md",
        "docs/x y.md",
        "pic.png",
        "h.png",
        "ref.md",
    }
    assert not [line for line in hub if "delete" in line["key"].lower()]
    assert "ME/NAME/commit/1" in capsys.readouterr().out


def test_a_push_without_the_right_token_costs_one_line(repository: Path, hub: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="HF_TOKEN") as caught:
        sync_hf_repo.main(Config(repo_id="ME/NAME"))
    assert "hf_wrong" not in str(caught.value) and hub == []


def test_our_own_readme_links_only_what_is_there() -> None:
    _, left_out = linked_files(ROOT / "README.md", ROOT)
    assert left_out == []
