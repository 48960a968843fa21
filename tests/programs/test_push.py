"""The way of an exported folder to a hub, which is a false one here: no test reaches for the network."""

from pathlib import Path
from typing import ClassVar

import pytest

from pipelines.export import main
from vae import ODVAE


@pytest.fixture
def run(trained_vae):
    return trained_vae.parent


class Hub:
    """Stands in for huggingface_hub.HfApi."""

    calls: ClassVar[list] = []
    error: ClassVar[Exception | None] = None

    def create_repo(self, repo, **options):
        self.calls.append(("create", repo, options))
        return f"hub/{repo}"

    def upload_folder(self, **options):
        if self.error:
            raise self.error
        files = sorted(p.name for p in Path(options["folder_path"]).iterdir())
        self.calls.append(("upload", options["repo_id"], files))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr("pipelines.results.shared.HfApi", Hub)
    return Hub


def test_a_push_creates_a_private_repository_and_uploads_the_folder(run, hub, tmp_path, capsys):
    main([str(run), "--out", str(tmp_path / "share"), "--push", "me/odvae"])
    (what, repo, options), (then, _, files) = hub.calls
    assert (what, repo, options) == ("create", "me/odvae", {"exist_ok": True, "private": True})
    assert then == "upload"
    assert {"README.md", "config.json", "diffusion_pytorch_model.safetensors"} <= set(files)
    assert (
        'AutoModel.from_pretrained("me/odvae", trust_remote_code=True)'
        in (tmp_path / "share" / "README.md").read_text()
    )
    assert "pushed to hub/me/odvae" in capsys.readouterr().out
    main([str(run), "--out", str(tmp_path / "share"), "--push", "me/odvae", "--public"])
    assert hub.calls[2][2]["private"] is False


def test_what_goes_wrong_at_the_hub_is_one_line_and_the_folder_stays(run, hub, tmp_path, monkeypatch):
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

    for error in (
        LocalTokenNotFoundError("no token"),
        ConnectionError("offline"),
        HTTPError("down\nand out"),
    ):
        monkeypatch.setattr(hub, "error", error)
        with pytest.raises(OSError, match=r"(?s)--push me/odvae: .*same command tries again"):
            main([str(run), "--out", str(tmp_path / "share"), "--push", "me/odvae"])
        assert ODVAE.from_pretrained(tmp_path / "share")
    with pytest.raises(ValueError, match="Repo id"):
        main([str(run), "--out", str(tmp_path / "other"), "--push", "a/b/c"])
    with pytest.raises(ValueError, match="--public: only with --push"):
        main([str(run), "--out", str(tmp_path / "other"), "--public"])
    assert not (tmp_path / "other").exists()
