"""Models of the Hub: the commit that is read, the token, links to where the bytes are, and what cannot be read."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from formats.errors import UserError
from formats.location import open_folder
from tests.conftest import SECRET
from tests.locations import BIG, HURRIED, opened
from tests.servers import HubServer, WebServer


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    far = WebServer()
    server = HubServer("org/tiny", far)
    server.secret = SECRET
    server.files.update(files)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with far.running(), server.running():
        yield server


def test_the_commit_is_fixed_when_the_folder_opens(hub: HubServer) -> None:
    with opened("hf://org/tiny") as folder:
        first, hub.commit = hub.commit, "beef" + "0" * 36
        with pytest.raises(UserError, match=r"cannot read .* \(HTTP 404\)"):
            folder.get("config.json")
        assert f"/resolve/{first}/" in hub.log[-1][1]


def test_a_mirror_that_serves_another_file_is_found_out(hub: HubServer) -> None:
    with opened("hf://org/tiny") as folder:
        hub.files[BIG] = os.urandom(300_000)
        with pytest.raises(UserError, match=f"`{BIG}` changed while it was being read"):
            folder.get(BIG)


def test_the_token_goes_to_the_hub_alone_and_its_links_are_kept_secret(hub: HubServer, files: dict[str, bytes]) -> None:
    with opened("hf://org/tiny") as folder:
        assert folder.get(BIG) == files[BIG]
        assert all("Authorization" not in headers for _, _, headers in hub.elsewhere.log)
        hub.elsewhere.secret = "no longer good"
        with pytest.raises(UserError, match="HTTP 401") as caught:
            folder.get(BIG)
        assert "Signature" not in str(caught.value)


def test_a_link_that_expired_is_asked_for_again(hub: HubServer, files: dict[str, bytes]) -> None:
    with opened("hf://org/tiny") as folder:
        assert folder.get(BIG) == files[BIG]
        hub.elsewhere.secret = hub.signature = "X-Signature=the-next-one"
        assert folder.get(BIG) == files[BIG]


@pytest.mark.parametrize(
    ("url", "pattern"),
    [
        ("hf://org/gone", r"cannot read `hf://org/gone`: not found .*\n\nhint: .*`hf auth login`"),
        ("hf://org/tiny@gone", "cannot read `hf://org/tiny@gone`"),
        ("hf://only-a-name", "not a model on the Hub"),
    ],
)
def test_what_cannot_be_read_is_refused(url: str, pattern: str, hub: HubServer) -> None:
    with pytest.raises(UserError, match=pattern):
        open_folder(url, policy=HURRIED)


def test_a_gated_model_says_how_to_log_in(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong-" + SECRET)
    with pytest.raises(UserError, match=r"wants credentials \(HTTP 401\)\n\nhint: .*`hf auth login`") as caught:
        open_folder("hf://org/tiny", policy=HURRIED)
    assert SECRET not in str(caught.value)
