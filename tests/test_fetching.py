"""Addresses that deliver pictures, and those that are to cost or reveal something else.

A listener on loopback stands for the internet: connections to PUBLIC end at it, so that all else, names and
checks included, is what a server does.
"""

import gzip
import http.server
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, unquote

import numpy as np
import pytest

from codeformer.engine.pipeline import Pipeline
from codeformer.errors import CancelledError, ImageError, OptionError, TimeLimitError
from codeformer.imaging.files import decode_image, encode_jpeg
from codeformer.limits import Deadline, Limits
from codeformer.serving import fetching
from codeformer.serving.fetching import DEFAULT_POLICY, FetchPolicy, fetch, is_public
from codeformer.serving.request import serve
from predict import Predictor

PUBLIC = "93.184.216.34"
PHOTO = encode_jpeg(np.full((20, 30, 3), 99, np.uint8))
SMALL = Limits(max_megapixels=1)
LOCAL = FetchPolicy(allow_private_addresses=True)
# Long enough for a busy machine; a test that needs it all has failed.
PATIENCE_S = 60


class Internet(http.server.BaseHTTPRequestHandler):
    """What there is in the world; a request's path says what comes."""

    seen: ClassVar[list[str]] = []
    headers_seen: ClassVar[list[Message]] = []
    hung_up: ClassVar[threading.Event]
    together: ClassVar[threading.Barrier]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path, _, rest = self.path.partition("?")
        self.seen.append(self.path)
        self.headers_seen.append(self.headers)
        try:
            getattr(self, f"send_{path.strip('/')}")(rest)
        except OSError:
            self.hung_up.set()
            self.close_connection = True

    def answer(self, body: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self, piece: bytes) -> None:
        while True:
            self.wfile.write(piece)
            threading.Event().wait(0.02)

    def send_photo(self, _: str) -> None:
        self.answer(PHOTO)

    def send_together(self, _: str) -> None:
        self.together.wait(PATIENCE_S)
        self.answer(PHOTO)

    def send_redirect(self, target: str) -> None:
        # Its body is endless: nobody needs it.
        self.answer(status=302, Location=unquote(target, "latin-1"))
        while True:
            self.wfile.write(bytes(1 << 16))

    def send_hops(self, count: str) -> None:
        if count == "0":
            self.send_photo("")
        else:
            self.answer(status=307, Location=f"/hops?{int(count) - 1}", Content_Length="0")

    def send_loop(self, _: str) -> None:
        self.answer(status=301, Location="/loop", Content_Length="0")

    def send_status(self, status: str) -> None:
        self.send_response_only(int(status), "secret of a status line")
        self.end_headers()
        self.wfile.write(b"secret of a body")

    def send_endless(self, _: str) -> None:
        self.answer()
        while True:
            self.wfile.write(bytes(1 << 16))

    def send_announced(self, length: str) -> None:
        self.answer(Content_Length=length)
        self.drip(b"-")

    def send_bomb(self, times: str) -> None:
        body = bytes(300_000_000)
        for _ in range(int(times)):
            body = gzip.compress(body)
        self.answer(body, Content_Encoding=", ".join(["gzip"] * int(times)))

    def send_gzip(self, _: str) -> None:
        self.answer(gzip.compress(PHOTO), Content_Encoding="gzip")

    def send_slow_body(self, _: str) -> None:
        self.answer()
        self.drip(b"-")

    def send_slow_headers(self, _: str) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        self.drip(b"-")

    def send_interim(self, _: str) -> None:
        self.drip(b"HTTP/1.1 100 Continue\r\n\r\n")

    def send_silence(self, _: str) -> None:
        while self.connection.recv(1):
            pass
        self.hung_up.set()


class Connections(list[tuple[str, int]]):
    """Where sockets have been told to connect, and what names resolve to: set `names` to answers in turn."""

    names: dict[str, list[list[str]]]


@pytest.fixture(scope="module")
def listener() -> Iterator[int]:
    """The port of the internet."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Internet) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def net(listener: int, monkeypatch: pytest.MonkeyPatch) -> Connections:
    connections = Connections()
    connections.names = {"pictures.example": [[PUBLIC]]}
    Internet.seen.clear()
    Internet.headers_seen.clear()
    Internet.hung_up = threading.Event()
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def connect_here(self: socket.socket, address: Any) -> None:
        connections.append(tuple(address[:2]))
        connect(self, ("127.0.0.1", listener) if address[0] == PUBLIC else address)

    def resolve_here(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        if host not in connections.names:
            return resolve(host, port, *arguments, **options)
        answers = connections.names[host]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return [entry for ip in answer for entry in resolve(ip, port, *arguments, **options)]

    monkeypatch.setattr(socket.socket, "connect", connect_here)
    monkeypatch.setattr(socket, "getaddrinfo", resolve_here)
    return connections


def get(address: str, policy: FetchPolicy = DEFAULT_POLICY) -> bytes:
    return fetch(address, 2, SMALL, policy, Deadline(PATIENCE_S))


def refusal(address: str, policy: FetchPolicy = DEFAULT_POLICY) -> str:
    with pytest.raises(ImageError) as raised:
        get(address, policy)
    assert raised.value.index == 2
    text = str(raised.value)
    assert text.startswith("Image 2: ")
    assert "secret" not in text
    return text


# Written down from the registries of special addresses (RFC 6890 and its successors), and what clouds use.
REFUSED = """
0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 100.127.255.255 127.0.0.1 127.255.255.254
169.254.0.1 169.254.169.254 169.254.170.2 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.192 192.0.2.1
192.168.0.1 192.168.255.255 198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255
240.0.0.1 255.255.255.255 168.63.129.16
:: ::1 ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:0:127.0.0.1
64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b::c0a8:1 64:ff9b:1::808:808 64:ff9b:1::7f00:1 2002:7f00:1::
2002:c0a8:101::1 2002:a9fe:a9fe:: 2001::1 2001:0:7f00:1:: 2001:db8::1 100::1 fc00::1 fd00::1 fd00:ec2::254
fe80::1 fe80::1%lo fec0::1 ff02::1 ff0e::1 4000::1
"""
PERMITTED = """
1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 93.184.216.34 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0
169.253.255.255 172.15.255.255 172.32.0.0 192.0.1.0 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0
223.255.255.255
2606:4700:4700::1111 2a00:1450:4001:81b::200e ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1
"""


def test_which_addresses_are_public() -> None:
    assert [text for text in REFUSED.split() if is_public(text)] == []
    assert [text for text in PERMITTED.split() if not is_public(text)] == []


@pytest.mark.parametrize(
    "host",
    [
        "2130706433",
        "0x7f.1",
        "0177.0.0.1",
        "127.1",
        "0",
        "0x7f000001",
        "localhost",
        "169.254.169.254",
        "10.0.0.1",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[fe80::1]",
        "[fe80::1%25lo]",
        "[fd00::1]",
        "user:word@127.0.0.1",
        "127.0.0.1:22",
        "127.0.0.1#@pictures.example",
        r"127.0.0.1\@pictures.example",
    ],
)
@pytest.mark.parametrize("scheme", ["http", "HTTPS"])
def test_no_spelling_of_a_private_address_is_connected_to(net: Connections, scheme: str, host: str) -> None:
    text = refusal(f"{scheme}://{host}/secret")
    assert "private, local or reserved" in text
    assert net == []


@pytest.mark.parametrize("ip", ["127.0.0.1", "192.168.7.7", "169.254.169.254", "::1", "fd00::1"])
def test_a_name_of_a_private_address_is_not_connected_to(
    net: Connections, caplog: pytest.LogCaptureFixture, ip: str
) -> None:
    net.names["inside.example"] = [[ip]]
    text = refusal("http://inside.example/photo")
    assert "private, local or reserved" in text
    assert ip not in text
    assert net == []
    [record] = caplog.records
    assert record.name == "codeformer.operator", "a client reads every other line"
    assert ip in record.getMessage()


def test_of_the_addresses_of_a_name_only_public_ones_are_tried(net: Connections) -> None:
    net.names["both.example"] = [["10.0.0.1", PUBLIC, "::1"]]
    assert get("http://both.example/photo") == PHOTO
    assert net == [(PUBLIC, 80)]


def test_what_was_checked_is_what_is_connected_to(net: Connections) -> None:
    net.names["rebound.example"] = [[PUBLIC], ["127.0.0.1"]]
    assert get("http://rebound.example:8080/photo") == PHOTO
    assert net == [(PUBLIC, 8080)]
    assert net.names["rebound.example"] == [["127.0.0.1"]], "resolved once"
    assert Internet.headers_seen[0]["Host"] == "rebound.example:8080"
    # As another request does, and so may the next redirect.
    assert "private, local or reserved" in refusal("http://rebound.example:8080/photo")
    assert net == [(PUBLIC, 8080)]


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1/secret", "//[::1]/secret", "http://inside.example/secret"]
)
def test_a_redirect_to_a_private_address_is_not_followed(net: Connections, target: str) -> None:
    net.names["inside.example"] = [["10.1.2.3"]]
    text = refusal(f"http://pictures.example/redirect?{quote(target, safe='', encoding='latin-1')}")
    assert "private, local or reserved" in text
    assert not any(part in text for part in ("127.0.0.1", "::1", "inside.example", "10.1.2.3"))
    assert net == [(PUBLIC, 80)]


@pytest.mark.parametrize(
    "target",
    [
        "file:///etc/hostname",
        "ftp://pictures.example/photo",
        "gopher://pictures.example/",
        "data:,secret",
        "http://[::1/secret",
        "http://pictures.example:99999/secret",
        "/secret\xff",
    ],
)
def test_a_redirect_to_what_is_no_http_address_is_not_followed(net: Connections, target: str) -> None:
    text = refusal(f"http://pictures.example/redirect?{quote(target, safe='', encoding='latin-1')}")
    assert "redirects to something that is no http" in text
    assert net == [(PUBLIC, 80)]


def test_redirects_are_followed_five_times(net: Connections) -> None:
    assert get("http://pictures.example/hops?5") == PHOTO
    assert len(Internet.seen) == 6
    assert "more than 5 redirects" in refusal("http://pictures.example/hops?6")
    assert "more than 5 redirects" in refusal("http://pictures.example/loop")


def test_a_redirect_leads_to_another_host_without_the_password(net: Connections) -> None:
    net.names["other.example"] = [[PUBLIC]]
    assert get("http://user:w%20rd@pictures.example/redirect?//other.example/photo") == PHOTO
    first, second = Internet.headers_seen
    assert first["Authorization"] == "Basic dXNlcjp3IHJk"
    assert (second["Host"], second.get("Authorization")) == ("other.example", None)
    Internet.headers_seen.clear()
    assert get("http://user:w%20rd@pictures.example/redirect?/photo") == PHOTO
    assert Internet.headers_seen[0]["Authorization"] == Internet.headers_seen[1]["Authorization"]


@pytest.mark.parametrize("status", [204, 300, 302, 304, 401, 404, 500, 599])
def test_an_answer_without_a_picture_is_named_by_its_number_alone(net: Connections, status: int) -> None:
    if status == 204:
        assert get("http://pictures.example/status?204") == b""
    else:
        assert f"answered {status}; check it" in refusal(f"http://pictures.example/status?{status}")


@pytest.mark.parametrize("path", ["endless", "bomb?1", "bomb?2"])
def test_more_bytes_than_a_picture_has_are_not_read(net: Connections, path: str) -> None:
    text = refusal(f"http://pictures.example/{path}")
    found = re.fullmatch(
        r"Image 2: expected at most 72,000,000 bytes, got ([\d,]+); use a smaller copy\.", text
    )
    assert found
    assert int(found[1].replace(",", "")) < 73_000_000, "it stops there, also where it decompresses"


def test_an_announced_length_is_enough_to_refuse(net: Connections) -> None:
    announced = "http://pictures.example/announced"
    assert "at most 72,000,000 bytes, got 1,000,000,000,000;" in refusal(f"{announced}?{10**12}")
    assert len(refusal(f"{announced}?{'9' * 4000}")) < 200
    for nonsense in ("9" * 6000, "-5", "none"):
        with pytest.raises((TimeLimitError, ImageError)) as raised:
            fetch(f"{announced}?{nonsense}", 2, SMALL, DEFAULT_POLICY, Deadline(0.5))
        assert "9999" not in str(raised.value)


def test_a_host_that_keeps_silent_is_not_waited_for_until_the_deadline(
    net: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_READ_S", 0.3)
    assert "cannot be fetched (its host is too slow)" in refusal("http://pictures.example/silence")
    assert Internet.hung_up.wait(20)


def test_a_compressed_picture_is_decompressed(net: Connections) -> None:
    assert get("http://pictures.example/gzip") == PHOTO


@pytest.mark.parametrize("path", ["slow_body", "slow_headers", "interim", "silence"])
def test_the_deadline_ends_a_transfer_wherever_it_is(
    blind_pipeline: Pipeline, net: Connections, path: str
) -> None:
    with pytest.raises(
        TimeLimitError, match="within 1 s, but the time was up before the end of image 1's transfer"
    ):
        serve(blind_pipeline, [f"http://pictures.example/{path}"], limits=Limits(max_seconds=1))
    assert Internet.hung_up.wait(20), "the connection is closed, not left to itself"
    assert serve(blind_pipeline, ["http://pictures.example/photo"]).files


def test_the_deadline_does_not_wait_for_a_name(net: Connections, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved, resolve = threading.Event(), socket.getaddrinfo

    def resolve_slowly(*arguments: Any, **options: Any) -> Any:
        resolved.wait(PATIENCE_S)
        try:
            return resolve(*arguments, **options)
        finally:
            done.set()

    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", resolve_slowly)
    with pytest.raises(TimeLimitError):
        fetch("http://pictures.example/photo", 1, SMALL, DEFAULT_POLICY, Deadline(0.5))
    assert not done.is_set()
    resolved.set()
    assert done.wait(20)
    for thread in threading.enumerate():
        if thread.name.startswith("codeformer-fetch"):
            thread.join(20)
            assert not thread.is_alive()
    assert net == [], "what has been given up connects to nothing"


def test_a_cancelled_request_ends_its_transfer(net: Connections) -> None:
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(CancelledError):
        fetch("http://pictures.example/silence", 1, SMALL, DEFAULT_POLICY, Deadline(PATIENCE_S, stop))
    assert Internet.hung_up.wait(20)


@pytest.mark.parametrize("silent", [0, 1])
def test_one_bad_picture_ends_the_transfers_of_the_others(
    blind_pipeline: Pipeline, net: Connections, silent: int
) -> None:
    addresses: list[object] = ["http://127.0.0.1/refused"]
    addresses.insert(silent, "http://pictures.example/silence")
    with pytest.raises(ImageError, match=f"^Image {2 - silent}: the address leads to a private"):
        serve(blind_pipeline, addresses, limits=Limits(max_seconds=PATIENCE_S))


def test_all_pictures_are_fetched_at_the_same_time(blind_pipeline: Pipeline, net: Connections) -> None:
    Internet.together = threading.Barrier(4)
    outcome = serve(blind_pipeline, ["http://pictures.example/together"] * 4)
    for image in (decoded.image_bgr for decoded in outcome.photos):
        np.testing.assert_array_equal(image, decode_image(PHOTO))


@pytest.mark.parametrize("count", [5, 300])
def test_too_many_addresses_are_refused_before_the_first_is_fetched(
    blind_pipeline: Pipeline, net: Connections, count: int
) -> None:
    with pytest.raises(OptionError, match=f"images: expected 1 to 4 pictures, got '{count} pictures'"):
        serve(blind_pipeline, ["http://pictures.example/slow_body"] * count)
    assert net == []
    assert Internet.seen == []


def test_proxies_of_the_environment_are_not_used(
    net: Connections, listener: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{listener}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert get("http://pictures.example/photo") == PHOTO
    assert net == [(PUBLIC, 80)]
    assert Internet.seen == ["/photo"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command for a certificate")
def test_tls_is_for_the_name_in_the_address(
    monkeypatch: pytest.MonkeyPatch, listener: int, net: Connections, tmp_path: Path
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "9",
            "-subj",
            "/CN=test",
            "-addext",
            "subjectAltName=DNS:pictures.example",
            "-keyout",
            key,
            "-out",
            certificate,
        ],
        check=True,
        capture_output=True,
    )
    asked = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.sni_callback = lambda _socket, name, _context: asked.append(name)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Internet) as server:
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
        net.names["pictures.example"] = net.names["other.example"] = [["127.0.0.1"]]
        assert "no trusted TLS connection" in refusal(f"https://pictures.example:{port}/photo", LOCAL)
        monkeypatch.setattr("requests.utils.DEFAULT_CA_BUNDLE_PATH", str(certificate))
        assert get(f"https://pictures.example:{port}/photo", LOCAL) == PHOTO
        assert "no trusted TLS connection" in refusal(f"https://other.example:{port}/photo", LOCAL)
        server.shutdown()
    assert asked == ["pictures.example", "pictures.example", "other.example"]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://nowhere.invalid/", "its host is not known"),
        ("http://" + "a" * 70 + ".example/", "its host is not known"),
        ("http://127.0.0.1:1/", "its host does not answer"),
        ("HTTP://", "expected an http"),
        ("https://[::1/", "expected an http"),
        ("http://127.0.0.1:99999/", "expected an http"),
        pytest.param("http://pictures.example/" + "a" * 9000, "expected .* 8,192 characters", id="long"),
    ],
)
def test_addresses_that_lead_nowhere(net: Connections, address: str, reason: str) -> None:
    with pytest.raises(ImageError, match=f"^Image 2: .*{reason}"):
        get(address, LOCAL)


def test_only_hosts_that_are_named_are_fetched_from(net: Connections, listener: int) -> None:
    policy = FetchPolicy(allow_hosts=("*.pictures.example", "other.example", "127.0.0.1"))
    for name in ("a.pictures.example", "a.b.pictures.example", "other.example", "inside.pictures.example"):
        net.names[name] = [[PUBLIC]]
    for host in ("a.pictures.example", "A.B.Pictures.example.", "other.example", f"127.0.0.1:{listener}"):
        assert get(f"http://{host}/photo", policy) == PHOTO
    seen = len(Internet.seen)
    net.clear()
    for host in (
        "pictures.example",
        "badpictures.example",
        "another.example",
        "2130706433",
        "localhost",
        "8.8.8.8",
    ):
        assert "a host that this server does not fetch from" in refusal(f"http://{host}/secret", policy)
    assert net == []
    text = refusal("http://other.example/redirect?http://pictures.example/secret", policy)
    assert "a host that this server does not fetch from" in text
    assert "pictures.example" not in text
    assert len(Internet.seen) == seen + 1
    # Private where it is named itself, not where only the end of its name is.
    net.names["inside.pictures.example"] = net.names["other.example"] = [["127.0.0.1"]]
    assert get(f"http://other.example:{listener}/photo", policy) == PHOTO
    assert "private, local" in refusal(f"http://inside.pictures.example:{listener}/photo", policy)


def test_the_environment_sets_the_policy() -> None:
    assert FetchPolicy.from_environment({}) == FetchPolicy()
    blank = {"CODEFORMER_ALLOW_PRIVATE_ADDRESSES": " ", "CODEFORMER_ALLOW_HOSTS": " "}
    assert FetchPolicy.from_environment(blank) == FetchPolicy()
    chosen = {
        "CODEFORMER_ALLOW_PRIVATE_ADDRESSES": "ON",
        "CODEFORMER_ALLOW_HOSTS": "Cdn.Example.org, *.example.net,10.0.0.7, fd00::7",
    }
    assert FetchPolicy.from_environment(chosen) == FetchPolicy(
        allow_private_addresses=True,
        allow_hosts=("cdn.example.org", "*.example.net", "10.0.0.7", "fd00::7"),
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [("CODEFORMER_ALLOW_PRIVATE_ADDRESSES", text) for text in ("yes", "1", "true")]
    + [
        ("CODEFORMER_ALLOW_HOSTS", text)
        for text in (
            ",",
            "a.example,",
            "*",
            "*.",
            "a.*",
            "http://a.example",
            "a.example:80",
            "a b",
            "[::1]",
            "é.org",
        )
    ],
)
def test_other_values_stop_the_start_before_weights_are_fetched(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    with pytest.raises(OptionError, match=f"^{name}: expected "):
        FetchPolicy.from_environment({name: text})
    monkeypatch.setenv(name, text)
    monkeypatch.setattr(Pipeline, "load", None)
    with pytest.raises(OptionError, match=f"^{name}: expected "):
        Predictor().setup()
