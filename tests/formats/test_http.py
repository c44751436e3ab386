"""What lies under all remote folders: TLS, proxies, redirects, tokens. Servers and certificates are made here."""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from formats.errors import UserError
from formats.location import open_folder
from formats.remote.gcs import Access
from formats.remote.http import Client
from formats.remote.retry import RetryableError, RetryPolicy
from tests.conftest import SECRET
from tests.servers import HOST, Cutter, Fault, Handler, Server, WebServer

HURRIED = RetryPolicy(attempts=3, first=0.002, longest=0.01, silence=60)


@pytest.fixture(scope="session")
def key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def _pem(key: rsa.RSAPrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


@pytest.fixture(scope="session")
def certificate(key: rsa.RSAPrivateKey, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for loopback that nobody signed but itself, with its key, in one file."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(_pem(key) + made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def secure(certificate: Path) -> Iterator[WebServer]:
    server = WebServer()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.files["m/config.json"] = b"{}"
    with server.running():
        yield server


def read(url: str) -> bytes:
    folder = open_folder(url, policy=HURRIED)
    try:
        return folder.get("config.json")
    finally:
        folder.close()


def test_https_is_read(secure: WebServer, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert read(f"https://{HOST}:{secure.port}/m") == b"{}"


def test_a_certificate_that_does_not_hold_is_final(secure: WebServer) -> None:
    with pytest.raises(UserError, match=rf"certificate verification failed for `{HOST}`: it is signed by itself"):
        read(f"https://user:{SECRET}@{HOST}:{secure.port}/m")


class Tunnel(Cutter):
    """A proxy that is asked to CONNECT."""

    asked = b""

    def _pump(self, source: socket.socket, target: socket.socket, cuts: bool) -> None:
        if not cuts:
            with suppress(OSError):
                while b"\r\n\r\n" not in self.asked:
                    self.asked += source.recv(1 << 16)
                source.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        super()._pump(source, target, cuts)


def test_https_goes_through_a_proxy(secure: WebServer, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tunnel = Tunnel(secure.port)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("https_proxy", f"http://me:pass@{HOST}:{tunnel.port}")
    with tunnel.running():
        assert read(f"https://user:{SECRET}@{HOST}:{secure.port}/m") == b"{}"
    assert re.match(rb"CONNECT 127\.0\.0\.1:\d+ HTTP/1\.[01]\r\n", tunnel.asked)
    assert b"Proxy-Authorization: Basic bWU6cGFzcw==" in tunnel.asked
    assert SECRET.encode() not in tunnel.asked


class Circle(Server):
    """Sends everybody to the same place again."""

    def answer(self, handler: Handler) -> None:
        handler.answer(302, headers={"Location": "/again"})


def test_a_url_with_blanks_is_quoted() -> None:
    server = WebServer()
    server.files["my model+1/config.json"] = b"{}"
    with server.running():
        assert read(f"{server.url}/my model+1") == read(f"{server.url}/my%20model+1/") == b"{}"


def test_redirects_in_circles_end() -> None:
    server = Circle()
    with server.running(), pytest.raises(UserError, match="redirects in circles"):
        read(server.url)


def test_a_redirect_out_of_the_web_is_refused() -> None:
    server = Circle()
    server.answer = lambda handler: handler.answer(302, headers={"Location": "file:///etc/passwd"})  # type: ignore[method-assign]
    with server.running(), pytest.raises(UserError, match="not a URL of a web server"):
        read(server.url)


def test_a_connection_that_the_server_left_is_replaced_at_once() -> None:
    server = WebServer()
    server.files["config.json"] = b"{}"
    server.faults += [Fault(body_ends_after=2)] * 3  # which is all of it; then it leaves without a word
    with server.running():
        client = Client(silence=60)
        for _ in range(4):
            with client.request("GET", f"{server.url}/config.json", {}) as answer:
                assert answer.body() == b"{}"
        client.close()


def test_nobody_at_the_door_is_worth_another_attempt() -> None:
    with socket.create_server((HOST, 0)) as unused:
        port = unused.getsockname()[1]
    client = Client(silence=1)
    with pytest.raises(RetryableError, match="connection refused"), client.request("GET", f"http://{HOST}:{port}/", {}):
        pass


class TokenServer(Server):
    """Gives tokens to service accounts."""

    status = 200

    def answer(self, handler: Handler) -> None:
        handler.answer(
            self.status, json.dumps({"access_token": "given", "expires_in": 3600}).encode(), {"Content-Type": "application/json"}
        )


@contextmanager
def _service_account(key: rsa.RSAPrivateKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TokenServer]:
    server = TokenServer()
    account = {"type": "service_account", "client_email": "me@example", "private_key": _pem(key).decode(), "private_key_id": "1"}
    path = tmp_path / "account.json"
    path.write_text(json.dumps({**account, "token_uri": f"{server.url}/token", "project_id": "p"}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    with server.running():
        yield server


def test_googles_credentials_become_a_token_once(key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _service_account(key, tmp_path, monkeypatch) as server:
        access = Access()
        headers = [access.headers("https://storage.googleapis.com/x") for _ in range(3)]
        assert [header["authorization"] for header in headers] == ["Bearer given"] * 3
        assert len(server.log) == 1
        access.close()


def test_googles_refusal_says_how_to_log_in(key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _service_account(key, tmp_path, monkeypatch) as server:
        server.status = 401
        access = Access()
        with pytest.raises(UserError, match=r"does not accept the credentials\n\nhint: .*gcloud auth"):
            access.headers("https://storage.googleapis.com/x")
        access.close()


def test_threads_share_connections_without_mixing_answers() -> None:
    server = WebServer()
    server.files.update({str(number): str(number).encode() * 1000 for number in range(8)})
    client = Client(silence=60)
    wrong: list[str] = []

    def ask(name: str) -> None:
        for _ in range(20):
            with client.request("GET", f"{server.url}/{name}", {}) as answer:
                if answer.body() != server.files[name]:
                    wrong.append(name)

    with server.running():
        threads = [threading.Thread(target=ask, args=(name,)) for name in server.files]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        client.close()
    assert not wrong
