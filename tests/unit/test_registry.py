"""Images out of registries that behave, and out of such that do not."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flatmount.config import Config, Pull, Registry
from flatmount.errors import BadImage, FlatmountError, RegistryError, UnknownImage
from flatmount.image.model import DOCUMENT_BYTES, Platform
from flatmount.image.registry import RegistryImage, open_registry
from flatmount.image.registry_auth import Keychain
from flatmount.image.registry_fetch import Fetcher
from flatmount.image.registry_http import Patience
from flatmount.image.registry_reference import Reference
from tests.fake_registry import (
    ARCHITECTURE,
    INDEX,
    MANIFEST,
    FakeRegistry,
    basic,
    digest,
    error,
    half,
    redirect,
    serve,
    status,
    tampered,
)

HASTY = Patience(first_pause_s=0.001, longest_pause_s=0.01, idle_s=2.0, connect_s=2.0)
LAYERS = [os.urandom(300_000), b"two" * 50_000, b""]


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with serve() as running:
        running.put_image(LAYERS, "v1", "latest")
        yield running


@pytest.fixture
def other() -> Iterator[FakeRegistry]:
    with serve() as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("flatmount-")]


def config(*hosts: str, **registries: Any) -> Config:
    return Config(Pull(2), {host: Registry(plain_http=True) for host in hosts} | registries)


class Pulled:
    """An open image; its layers as bytes."""

    def __init__(self, registry: FakeRegistry, name: str = "team/app:v1", **more: Any) -> None:
        self.settings = more.pop("settings", None) or config(registry.host)
        self.name = f"{registry.host}/{name}"
        self.more = {"patience": HASTY, "keychain": Keychain({"HOME": "/nonexistent"}), **more}
        self.image: RegistryImage | None = None

    def __enter__(self) -> RegistryImage:
        self.image = open_registry(Reference.parse(self.name), self.settings, **self.more)
        return self.image

    def __exit__(self, *_: object) -> None:
        if self.image is not None:
            self.image.close()


def layer(image: RegistryImage, position: int) -> bytes:
    with image.open_layer(position) as file:
        data = b""
        while piece := file.read(10_000):
            data += piece
        return data


def is_whole(image: RegistryImage, *positions: int) -> bool:
    return all(digest(layer(image, at)) == image.manifest.layers[at].digest for at in positions or range(len(LAYERS)))


def refused(
    registry: FakeRegistry, kind: type[FlatmountError], said: str, name: str = "team/app:v1", **more: Any
) -> str:
    with pytest.raises(kind, match=said) as caught, Pulled(registry, name, **more):
        pass
    assert "\n" not in caught.value.line()
    return caught.value.line()


def unfetchable(registry: FakeRegistry, kind: type[FlatmountError], said: str, **more: Any) -> str:
    """The image opens, and its lowest layer cannot be had."""
    with Pulled(registry, **more) as image, pytest.raises(kind, match=said) as caught:
        layer(image, 0)
    return caught.value.line()


# What should work.


def test_an_image_by_tag(registry: FakeRegistry, tmp_path: Path) -> None:
    with Pulled(registry) as image:
        assert image.name == f"{registry.host}/team/app:v1"
        assert image.config.cmd == ("/bin/sh",)
        assert image.manifest.digest == digest(registry.manifests["v1"][1])
        assert not registry.asked("blobs/" + image.manifest.layers[0].digest)
        image.expect((0, 2), str(tmp_path))
        assert is_whole(image)
        states = sorted(image.fetched(), key=lambda state: state.position)
        assert [state.done_bytes for state in states] == [each.size for each in image.manifest.layers]
        assert not any(state.active for state in states)


def test_an_image_by_digest_whatever_its_tag_is_now(registry: FakeRegistry) -> None:
    wanted = digest(registry.manifests["v1"][1])
    registry.put_image([b"new"], "v1")
    with Pulled(registry, f"team/app:v1@{wanted}") as image:
        assert image.manifest.digest == wanted
    assert not registry.asked("manifests/v1")


def test_sha512(registry: FakeRegistry) -> None:
    raw = registry.manifests["v1"][1]
    wanted = "sha512:" + hashlib.sha512(raw).hexdigest()
    registry.manifests[wanted] = (MANIFEST, raw)
    registry.digest_header = wanted
    with Pulled(registry, f"team/app@{wanted}") as image:
        assert is_whole(image)
    other = "sha512:" + hashlib.sha512(b"").hexdigest()
    registry.manifests[other] = (MANIFEST, raw)
    refused(registry, BadImage, "something else", f"team/app@{other}")


def platformed(registry: FakeRegistry, *architectures: str) -> list[dict[str, Any]]:
    return [
        registry.put_image([name.encode()], architecture=name) | {"platform": {"os": "linux", "architecture": name}}
        for name in architectures
    ]


def test_an_index_for_several_platforms(registry: FakeRegistry) -> None:
    inner = {"schemaVersion": 2, "mediaType": INDEX, "manifests": platformed(registry, "s390x", ARCHITECTURE)}
    inner_descriptor = registry.put_manifest(inner, kind=INDEX)
    outer = {"schemaVersion": 2, "manifests": [inner_descriptor]}
    registry.put_manifest(outer, "many", kind=INDEX)
    with Pulled(registry, "app:many") as image:
        assert image.config.architecture == ARCHITECTURE
    with Pulled(registry, "app:many", platform=Platform("linux", "s390x")) as image:
        assert image.config.architecture == "s390x"


def test_layers_are_fetched_at_once_and_in_order(registry: FakeRegistry, tmp_path: Path) -> None:
    """Two connections for two threads, and the third layer only when one of them is free."""
    gate, arrived = threading.Event(), threading.Semaphore(0)

    def held(handler: Any, body: bytes | None) -> None:
        arrived.release()
        assert gate.wait(60)
        handler.answer(200, body or b"")

    with Pulled(registry) as image:
        registry.fault("/blobs/", held, held, held)
        image.expect((0, 1, 2), str(tmp_path))
        assert arrived.acquire(timeout=60)
        assert arrived.acquire(timeout=60)
        assert not arrived.acquire(timeout=0.1)
        assert {seen.path.rpartition("/")[2] for seen in registry.asked("/blobs/")[-2:]} == {
            image.manifest.layers[0].digest,
            image.manifest.layers[1].digest,
        }
        gate.set()
        assert is_whole(image)


def test_many_layers_wait_for_their_reader_in_bounded_number(
    registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("flatmount.image.registry_fetch._FETCHED_AHEAD", 3)
    layers = [b"%d" % number for number in range(12)]
    registry.put_image(layers, "many")
    with Pulled(registry, "app:many") as image:
        image.expect(range(12), str(tmp_path))
        deadline = time.monotonic() + 60
        while sum(state.done_bytes > 0 for state in image.fetched()) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert sum(state.done_bytes > 0 for state in image.fetched()) == 3
        # The last first: somebody who reads never waits for somebody who does not.
        assert is_whole(image, *reversed(range(12)))


# Broken connections.


def test_half_a_blob_is_gone_on_with(registry: FakeRegistry) -> None:
    with Pulled(registry) as image:
        wanted = image.manifest.layers[0]
        registry.fault(wanted.digest, half, half, half)
        assert is_whole(image, 0)
        ranges = [seen.headers.get("Range") for seen in registry.asked(wanted.digest)]
        half_way, three_quarters = wanted.size // 2, wanted.size // 2 + (wanted.size - wanted.size // 2) // 2
        assert ranges[:3] == [None, f"bytes={half_way}-", f"bytes={three_quarters}-"]
        assert len(ranges) == 4


def test_half_a_blob_from_a_registry_without_ranges(registry: FakeRegistry) -> None:
    registry.ranges = False
    with Pulled(registry) as image:
        registry.fault(image.manifest.layers[0].digest, half)
        assert is_whole(image, 0)


def test_half_a_blob_for_ever(registry: FakeRegistry) -> None:
    registry.fault("/blobs/.*", status(200, registry.blobs[config_of(registry)]), *[half] * 40)
    said = unfetchable(registry, RegistryError, r"\d+ of \d+ bytes of sha256:\w+ came")
    assert "try again" in said
    assert len(registry.asked("/blobs/")) == 1 + 1 + HASTY.retries


def config_of(registry: FakeRegistry) -> str:
    value: str = json.loads(registry.manifests["v1"][1])["config"]["digest"]
    return value


def test_a_connection_that_says_nothing(registry: FakeRegistry) -> None:
    woken = threading.Event()

    def silent(handler: Any, body: bytes | None) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body or b"")))
        handler.end_headers()
        handler.wfile.write((body or b"")[:1000])
        handler.wfile.flush()
        woken.wait(60)
        handler.close_connection = True

    patience = Patience(first_pause_s=0.001, idle_s=2)
    with Pulled(registry, patience=patience) as image:
        registry.fault(image.manifest.layers[0].digest, silent)
        assert is_whole(image, 0)
        woken.set()
        assert registry.asked(image.manifest.layers[0].digest)[-1].headers["Range"] == "bytes=1000-"


def test_another_range_than_was_asked_for(registry: FakeRegistry) -> None:
    with Pulled(registry) as image:
        name = image.manifest.layers[0].digest
        size = image.manifest.layers[0].size
        registry.fault(name, half, status(206, b"x" * 10, Content_Range=f"bytes {size - 10}-{size - 1}/{size}"))
        with pytest.raises(RegistryError, match="another range"):
            layer(image, 0)


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_a_busy_registry(registry: FakeRegistry, code: int) -> None:
    registry.fault("/manifests/", status(code, Retry_After="0"), status(code, b"<html>"))
    registry.fault("/blobs/", status(code))
    with Pulled(registry) as image:
        assert is_whole(image)


def test_a_registry_that_stays_busy(registry: FakeRegistry) -> None:
    registry.fault("/manifests/", *[status(503, error("TOOMANYREQUESTS", "later\x1b[31m\nplease"))] * 6)
    said = refused(registry, RegistryError, "answers 503")
    assert "later [31m please" in said
    assert len(registry.asked("/manifests/")) == HASTY.retries + 1


def test_retry_after_is_waited_for_within_bounds() -> None:
    patience = Patience()
    assert patience.pause_s(0, 7.0) == 7.0
    assert patience.pause_s(0, 86_400.0) == patience.longest_pause_s
    assert patience.pause_s(3) > patience.pause_s(0)


def test_giving_up_does_not_wait_for_a_silent_registry(registry: FakeRegistry, tmp_path: Path) -> None:
    woken, arrived = threading.Event(), threading.Event()

    def silent(handler: Any, body: bytes | None) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body or b"")))
        handler.end_headers()
        handler.wfile.flush()
        arrived.set()
        woken.wait(120)
        handler.close_connection = True

    with Pulled(registry, patience=Patience(idle_s=60)) as image:
        registry.fault(image.manifest.layers[0].digest, silent)
        image.expect((0, 1, 2), str(tmp_path))
        assert arrived.wait(60)
        started = time.monotonic()
    assert time.monotonic() - started < 30, "half of what it may be silent for"
    woken.set()


def test_whoever_waits_for_a_layer_learns_that_it_was_given_up(registry: FakeRegistry) -> None:
    woken = threading.Event()

    def silent(handler: Any, _: bytes | None) -> None:
        woken.wait(20)
        handler.close_connection = True

    image = Pulled(registry, patience=Patience(idle_s=5)).__enter__()
    registry.fault(image.manifest.layers[0].digest, silent)
    caught: list[BaseException] = []

    def read() -> None:
        try:
            layer(image, 0)
        except (FlatmountError, ValueError) as error:
            caught.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    while not registry.asked(image.manifest.layers[0].digest):
        time.sleep(0.01)
    threading.Timer(0.1, woken.set).start()
    image.close()
    reader.join(60)
    assert not reader.is_alive()


# Redirects.


def test_a_redirect_takes_no_credentials_to_another_host(
    registry: FakeRegistry, other: FakeRegistry, tmp_path: Path
) -> None:
    registry.let_in("me", "secret")
    with Pulled(registry, keychain=keys(tmp_path, registry.host, "me", "secret")) as image:
        wanted = image.manifest.layers[0].digest
        other.blobs[wanted] = registry.blobs[wanted]
        registry.fault(wanted, redirect(f"http://{other.host}/elsewhere/blobs/{wanted}?signature=x"))
        assert is_whole(image, 0)
    (seen,) = other.seen
    assert "Authorization" not in seen.headers
    assert registry.asked(wanted)[0].headers["Authorization"] == basic("me", "secret")


def test_a_challenge_behind_a_redirect_gets_no_credentials(
    registry: FakeRegistry, other: FakeRegistry, tmp_path: Path
) -> None:
    other.let_in("me", "secret")
    with Pulled(registry, keychain=keys(tmp_path, registry.host, "me", "secret")) as image:
        wanted = image.manifest.layers[0].digest
        registry.fault(wanted, *[redirect(f"http://{other.host}/x/blobs/{wanted}")] * 3)
        with pytest.raises(RegistryError, match="access denied"):
            layer(image, 0)
    assert other.seen
    assert not any("Authorization" in seen.headers for seen in other.seen)


def test_a_redirect_within_the_registry(registry: FakeRegistry) -> None:
    with Pulled(registry) as image:
        wanted = image.manifest.layers[0].digest
        registry.fault(wanted, redirect(f"/v2/moved/app/blobs/{wanted}", 302))
        assert is_whole(image, 0)


def test_redirects_without_end(registry: FakeRegistry) -> None:
    registry.fault("/manifests/", *[redirect("/v2/team/app/manifests/v1")] * 20)
    refused(registry, RegistryError, "redirects more than 5 times")


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://h/x", "http://user:pw@h/x", "http://[bad/"])
def test_a_redirect_to_what_is_no_http(registry: FakeRegistry, target: str) -> None:
    registry.fault("/manifests/", redirect(target))
    refused(registry, RegistryError, "address")


# Who may.


def keys(tmp_path: Path, host: str, user: str, password: str, **entry: str) -> Keychain:
    file = tmp_path / "auth.json"
    packed = basic(user, password).removeprefix("Basic ")
    file.write_text(json.dumps({"auths": {host: {"auth": packed, **entry}}}))
    return Keychain({"REGISTRY_AUTH_FILE": str(file)})


def test_basic_authentication(registry: FakeRegistry, tmp_path: Path) -> None:
    registry.let_in("me", "secret")
    with Pulled(registry, keychain=keys(tmp_path, registry.host, "me", "secret")) as image:
        assert is_whole(image)
    said = refused(
        registry, RegistryError, "access denied", keychain=keys(tmp_path, registry.host, "me", "guessed-secret")
    )
    assert str(tmp_path / "auth.json") in said
    assert "guessed" not in said
    said = refused(registry, RegistryError, "access denied")
    assert "log in" in said
    assert "/nonexistent/.docker/config.json" in said


def tokens(registry: FakeRegistry, at: FakeRegistry, *given: str) -> None:
    """Make `registry` want a token from `at`, which gives these, one after the other."""
    registry.challenge = (
        f'Bearer realm="http://{at.host}/token?x=1",service="reg, istry",scope="repository:team/app:pull"'
    )
    registry.valid = {f"Bearer {token}" for token in given}
    at.fault("/token", *[status(200, json.dumps({"token": token, "expires_in": 60}).encode()) for token in given])


def test_a_token_for_nobody(registry: FakeRegistry, other: FakeRegistry) -> None:
    tokens(registry, other, "t1")
    with Pulled(registry) as image:
        assert is_whole(image)
    (seen,) = other.seen
    assert "Authorization" not in seen.headers
    assert seen.path == "/token?x=1&scope=repository%3Ateam%2Fapp%3Apull&service=reg%2C+istry"


def test_a_token_for_somebody(registry: FakeRegistry, other: FakeRegistry, tmp_path: Path) -> None:
    tokens(registry, other, "t1")
    with Pulled(registry, keychain=keys(tmp_path, registry.host, "me", "secret")) as image:
        assert is_whole(image)
    assert [seen.headers["Authorization"] for seen in other.seen] == [basic("me", "secret")]


def test_a_token_for_an_identity_token(registry: FakeRegistry, other: FakeRegistry, tmp_path: Path) -> None:
    tokens(registry, other)
    registry.valid = {"Bearer t2"}
    other.fault("/token", status(200, b'{"access_token": "t2"}'))
    with Pulled(registry, keychain=keys(tmp_path, registry.host, "", "", identitytoken="refresh")) as image:
        assert is_whole(image)
    (seen,) = other.seen
    assert seen.method == "POST"
    assert seen.form["refresh_token"] == ["refresh"]
    assert seen.form["grant_type"] == ["refresh_token"]
    assert seen.form["service"] == ["reg, istry"]


def test_a_token_that_ends_on_the_way_is_renewed_once_for_all(
    registry: FakeRegistry, other: FakeRegistry, tmp_path: Path
) -> None:
    tokens(registry, other, "t1", "t2")
    with Pulled(registry) as image:
        registry.valid = {"Bearer t2"}
        image.expect((0, 1, 2), str(tmp_path))
        assert is_whole(image)
    assert len(other.seen) == 2


def test_a_token_that_is_not_enough(registry: FakeRegistry, other: FakeRegistry) -> None:
    tokens(registry, other, "t1", "t2", "t3")
    registry.valid = set()
    refused(registry, RegistryError, "access denied")
    assert len(other.seen) == 1


@pytest.mark.parametrize(
    "answer", [b"", b"[]", b"{}", b'{"token": 3}', b'{"token": "a b"}', b'{"token": "a\\r\\nX: y"}']
)
def test_a_token_service_that_gives_none(registry: FakeRegistry, other: FakeRegistry, answer: bytes) -> None:
    tokens(registry, other)
    other.fault("/token", status(200, answer))
    refused(registry, RegistryError, "gave no token")


def test_a_token_service_that_refuses(registry: FakeRegistry, other: FakeRegistry, tmp_path: Path) -> None:
    tokens(registry, other)
    other.fault("/token", status(401, error("UNAUTHORIZED", "wrong password")))
    refused(registry, RegistryError, "wrong password", keychain=keys(tmp_path, registry.host, "me", "bad"))


@pytest.mark.parametrize(
    "challenge", ["", "Digest realm=x", "Bearer", 'Bearer realm="', "Negotiate", ",,,", 'Bearer a="b']
)
def test_a_challenge_that_nobody_can_meet(registry: FakeRegistry, challenge: str) -> None:
    registry.fault("/manifests/", *[status(401, **({"WWW_Authenticate": challenge} if challenge else {}))] * 3)
    refused(registry, RegistryError, "access denied|not an HTTP address")


# With TLS.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    place = tmp_path_factory.mktemp("tls")
    files = (str(place / "cert.pem"), str(place / "key.pem"))
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    command += f" -addext subjectAltName=IP:127.0.0.1 -out {files[0]} -keyout {files[1]}"
    subprocess.run(command.split(), check=True, capture_output=True)
    return files


@pytest.fixture
def secure(certificate: tuple[str, str]) -> Iterator[FakeRegistry]:
    with serve(tls=certificate) as running:
        running.put_image(LAYERS, "v1")
        yield running


def trusting(secure: FakeRegistry, certificate: tuple[str, str]) -> Config:
    return Config(Pull(2), {secure.host: Registry(ca_file=certificate[0])})


def test_tls_with_an_own_authority(secure: FakeRegistry, certificate: tuple[str, str]) -> None:
    with Pulled(secure, settings=trusting(secure, certificate)) as image:
        assert is_whole(image)


def test_tls_with_an_unknown_authority(secure: FakeRegistry) -> None:
    assert "ca_file" in refused(secure, RegistryError, "no TLS", settings=Config())


def test_no_tls_where_it_should_be(registry: FakeRegistry) -> None:
    assert "plain_http = true" in refused(registry, RegistryError, "does not speak TLS", settings=Config())


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_an_authority_that_is_none(secure: FakeRegistry, tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    settings = Config(Pull(2), {secure.host: Registry(ca_file=str(file))})
    refused(secure, FlatmountError, str(file), settings=settings)


def test_nothing_leads_out_of_tls(
    secure: FakeRegistry, registry: FakeRegistry, certificate: tuple[str, str], tmp_path: Path
) -> None:
    settings, keychain = trusting(secure, certificate), keys(tmp_path, secure.host, "me", "secret")
    secure.fault("/manifests/", redirect(f"http://{registry.host}/v2/team/app/manifests/v1"))
    refused(secure, RegistryError, "without TLS", settings=settings, keychain=keychain)
    tokens(secure, registry, "t1")
    refused(secure, RegistryError, "without TLS", settings=settings, keychain=keychain)
    assert not registry.seen


# Mirrors.


def mirrored(origin: FakeRegistry, *mirrors: str) -> Config:
    hosts = [mirror.partition("/")[0] for mirror in mirrors]
    return config(*hosts, **{origin.host: Registry(mirrors=mirrors, plain_http=True)})


def test_a_mirror_is_asked_first(registry: FakeRegistry, other: FakeRegistry) -> None:
    other.put_image(LAYERS, "v1")
    with Pulled(registry, settings=mirrored(registry, f"{other.host}/cache/of")) as image:
        assert is_whole(image)
        assert image.name == f"{registry.host}/team/app:v1"
    assert not registry.seen
    assert all(seen.path.startswith("/v2/cache/of/team/app/") for seen in other.seen)


def test_what_a_mirror_does_not_have_comes_from_the_registry(registry: FakeRegistry, other: FakeRegistry) -> None:
    descriptor = other.put_image(LAYERS, "v1")
    first = json.loads(other.manifests[descriptor["digest"]][1])["layers"][0]["digest"]
    del other.blobs[first]
    with Pulled(registry, settings=mirrored(registry, other.host)) as image:
        assert is_whole(image)
    assert [seen.path.rpartition("/")[2] for seen in registry.seen] == [first]


@pytest.mark.parametrize("fault", [status(503), status(500), status(401), status(403), redirect("ftp://x/")])
def test_a_mirror_that_fails_is_not_asked_again(registry: FakeRegistry, other: FakeRegistry, fault: Any) -> None:
    other.fault("", *[fault] * 30)
    with Pulled(registry, settings=mirrored(registry, other.host)) as image:
        assert is_whole(image)
    assert len(other.seen) == 1


def test_a_mirror_that_is_down(registry: FakeRegistry) -> None:
    with Pulled(registry, settings=mirrored(registry, "127.0.0.1:1")) as image:
        assert is_whole(image)


def test_a_mirror_that_stops_within_a_blob(registry: FakeRegistry, other: FakeRegistry) -> None:
    other.put_image(LAYERS, "v1")
    with Pulled(registry, settings=mirrored(registry, other.host)) as image:
        wanted = image.manifest.layers[0]
        other.fault(wanted.digest, half)
        assert is_whole(image, 0)
        assert [seen.headers.get("Range") for seen in registry.seen] == [f"bytes={wanted.size // 2}-"]


def test_the_registry_has_the_last_word(registry: FakeRegistry, other: FakeRegistry) -> None:
    said = refused(registry, UnknownImage, "has no v9", "team/app:v9", settings=mirrored(registry, other.host))
    assert "v1" in said
    assert said.startswith(registry.host)


# What is not there, or not what it should be.


def test_a_tag_that_is_not_there(registry: FakeRegistry) -> None:
    said = refused(registry, UnknownImage, "has no v2", "team/app:v2")
    assert "it has latest, v1" in said


def test_a_tag_that_is_not_there_where_tags_are_not_told(registry: FakeRegistry) -> None:
    registry.fault("/tags/list", status(403, b"no"))
    refused(registry, UnknownImage, "has no v2", "team/app:v2")


def test_an_image_that_is_not_there(registry: FakeRegistry) -> None:
    registry.fault("/manifests/", status(404, error("NAME_UNKNOWN", "unknown")))
    refused(registry, UnknownImage, "has no image team/none", "team/none")


def test_an_unknown_host() -> None:
    with (
        pytest.raises(RegistryError, match=r"no host no\.such\.host\.invalid"),
        Pulled(FakeRegistry(host="no.such.host.invalid")),
    ):
        pass


def test_a_port_where_nobody_listens() -> None:
    refused(FakeRegistry(host="127.0.0.1:1"), RegistryError, "cannot be reached: Connection refused")


def test_an_image_for_another_platform(registry: FakeRegistry) -> None:
    registry.put_image([b"x"], "v2", architecture="s390x")
    refused(registry, BadImage, "linux/s390x", "app:v2")
    registry.put_manifest({"schemaVersion": 2, "manifests": platformed(registry, "s390x")}, "v3", kind=INDEX)
    assert "linux/s390x" in refused(registry, BadImage, "has no image for", "app:v3")


def test_a_manifest_that_is_not_what_was_asked_for(registry: FakeRegistry) -> None:
    wanted = digest(registry.manifests["v1"][1])
    registry.fault("/manifests/", tampered)
    refused(registry, BadImage, "something else", f"team/app@{wanted}")
    registry.digest_header = digest(b"other")
    refused(registry, BadImage, "something else")
    registry.digest_header = "sha256:../../etc"
    refused(registry, BadImage, "Docker-Content-Digest")


def test_a_config_that_is_not_what_was_promised(registry: FakeRegistry) -> None:
    registry.fault("/blobs/", tampered)
    refused(registry, BadImage, "something else")
    registry.fault("/blobs/", status(200, b"{}"))
    refused(registry, BadImage, "2 bytes instead of")


def test_a_layer_of_another_size(registry: FakeRegistry) -> None:
    with Pulled(registry) as image:
        registry.fault(image.manifest.layers[0].digest, status(200, b"short"))
        with pytest.raises(BadImage, match="5 bytes instead of"):
            layer(image, 0)


def test_a_layer_that_is_not_there(registry: FakeRegistry) -> None:
    wanted = json.loads(registry.manifests["v1"][1])["layers"][0]["digest"]
    del registry.blobs[wanted]
    unfetchable(registry, RegistryError, "unknown")


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        ({"schemaVersion": 1, "mediaType": "x"}, "application/json", "schema version 1"),
        ({"schemaVersion": 2, "mediaType": "text/plain"}, "text/plain", "no image"),
        ({"schemaVersion": 2, "manifests": [], "layers": []}, INDEX, "index and a manifest"),
        ({"schemaVersion": 2, "mediaType": MANIFEST, "layers": []}, INDEX, "index and a manifest"),
        ({"schemaVersion": 2, "mediaType": INDEX, "manifests": []}, MANIFEST, "index and a manifest"),
        ({"schemaVersion": 2, "mediaType": INDEX, "manifests": []}, INDEX, "it has nothing"),
        (b"\xff{", MANIFEST, "not JSON"),
        (b"[" * 100_000, MANIFEST, "not JSON"),
        (b" " * (DOCUMENT_BYTES + 1), MANIFEST, "more than"),
    ],
)
def test_what_is_no_manifest(registry: FakeRegistry, value: Any, kind: str, said: str) -> None:
    registry.put_manifest(value, "v2", kind=kind)
    line = refused(registry, BadImage, "app", "app:v2")
    assert said in line


def test_an_index_that_says_manifest_and_is_an_index(registry: FakeRegistry) -> None:
    inner = registry.put_manifest({"schemaVersion": 2, "mediaType": INDEX, "manifests": []}, kind=INDEX)
    lying = inner | {"mediaType": MANIFEST, "platform": {"os": "linux", "architecture": ARCHITECTURE}}
    registry.put_manifest({"schemaVersion": 2, "mediaType": INDEX, "manifests": [lying]}, "v2", kind=INDEX)
    refused(registry, BadImage, "index and a manifest", "app:v2")


def test_indexes_without_end(registry: FakeRegistry) -> None:
    descriptor = registry.put_image([b"x"])
    for _ in range(7):
        descriptor = registry.put_manifest({"schemaVersion": 2, "manifests": [descriptor]}, "deep", kind=INDEX)
    refused(registry, BadImage, "leads to itself", "app:deep")


def test_descriptors_do_not_lead_anywhere(registry: FakeRegistry, other: FakeRegistry) -> None:
    """`urls` of a layer are not followed: CVE-2020-15157."""
    value = json.loads(registry.manifests["v1"][1])
    value["layers"][0]["urls"] = [f"http://{other.host}/blob"]
    registry.put_manifest(value, "v2")
    del registry.blobs[value["layers"][0]["digest"]]
    with Pulled(registry, "app:v2") as image, pytest.raises(RegistryError):
        layer(image, 0)
    assert not other.seen


def test_no_room_for_what_comes(registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pulled(registry) as image:
        image.expect((0,), "/nonexistent/place")
        with pytest.raises(FlatmountError, match=r"keep what was fetched.*No such file"):
            layer(image, 0)


def test_a_fault_of_our_own_reaches_the_reader(registry: FakeRegistry) -> None:
    class Broken:
        def blob(self, *_: object) -> Iterator[bytes]:
            raise KeyError("fault")

    with Pulled(registry) as image:
        fetcher = Fetcher(Broken(), image.manifest.layers, 1)  # type: ignore[arg-type]
        fetcher.begin((0,), None)
        with pytest.raises(FlatmountError, match="KeyError"):
            fetcher.open(0).read(1)
        fetcher.close()


def test_a_proxy(registry: FakeRegistry, other: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes through it has the whole URL in its request."""
    other.fault("", status(404, error("NAME_UNKNOWN", "seen by the proxy")))
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", other.host)
    refused(registry, UnknownImage, "has no image")
    assert other.seen[0].path == f"http://{registry.host}/v2/team/app/manifests/v1"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Pulled(registry) as image:
        assert is_whole(image)
