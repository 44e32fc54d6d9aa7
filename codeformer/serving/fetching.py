"""Pictures from http(s) addresses, without letting a client reach the server's own network."""

import contextlib
import ipaddress
import os
import re
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urljoin

import requests.utils
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import Timeout, Url, make_headers, parse_url

from codeformer.errors import ImageError, OptionError, in_words
from codeformer.limits import Deadline, Limits
from codeformer.log import operator_logger

PRIVATE_ADDRESSES_VARIABLE: Final = "CODEFORMER_ALLOW_PRIVATE_ADDRESSES"
HOSTS_VARIABLE: Final = "CODEFORMER_ALLOW_HOSTS"

_MAX_REDIRECTS: Final = 5
_MAX_ADDRESS_CHARACTERS: Final = 8192
# Of those that a host name resolves to.
_MAX_TRIED: Final = 4
_CONNECT_S: Final = 10.0
# Between two pieces of data.
_READ_S: Final = 30.0
_CHUNK_BYTES: Final = 1 << 18
_LONGEST_ANNOUNCED: Final = 10**15
# Between two looks at the deadline.
_LOOK_S: Final = 0.1

_HOST_PATTERN: Final = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*")

# Everything else of IPv6 is local, reserved, or a way to write an IPv4 address.
_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
# Not among those that `ipaddress` knows (in every version) to be special: protocol assignments, where some
# clouds have their metadata, and the address at which Azure's hosts serve their machines.
_ALSO_LOCAL: Final = (ipaddress.IPv4Network("192.0.0.0/24"), ipaddress.IPv4Network("168.63.129.16/32"))


def is_public(text: str) -> bool:
    """Whether an IP address belongs to the public internet.

    An IPv6 address that stands for an IPv4 address (mapped, 6to4, NAT64) is what that one is.
    """
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        return address in _GLOBAL_UNICAST and address.is_global
    return (
        address.is_global
        and not address.is_multicast
        and not any(address in network for network in _ALSO_LOCAL)
    )


@dataclass(frozen=True)
class FetchPolicy:
    """Where pictures may be fetched from; set by the operator, in environment variables.

    Attributes:
        allow_private_addresses: also from addresses that are not of the public internet.
        allow_hosts: where there are any, from these hosts only. A name or an IP address, in lower case, which
            may then be private, too; or "*.example.org" for every name that ends so, which may not.
    """

    allow_private_addresses: bool = False
    allow_hosts: tuple[str, ...] = ()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "FetchPolicy":
        """What the environment sets, the defaults for the rest.

        Raises:
            OptionError: the switch is neither on nor off, or something is no host.
        """
        switch = environment.get(PRIVATE_ADDRESSES_VARIABLE, "").strip().lower() or "off"
        if switch not in ("on", "off"):
            raise OptionError(PRIVATE_ADDRESSES_VARIABLE, switch, "on or off")
        text = environment.get(HOSTS_VARIABLE, "").strip().lower()
        hosts = tuple(host.strip() for host in text.split(",")) if text else ()
        for host in hosts:
            if not (_HOST_PATTERN.fullmatch(host) or _is_ip_address(host)):
                raise OptionError(
                    HOSTS_VARIABLE,
                    host,
                    "host names (no scheme, no port), *.example.org or IP addresses, separated by commas",
                )
        return cls(switch == "on", hosts)

    def permits_host(self, host: str) -> bool:
        """Whether anything may be fetched from a host, by its name in lower case or its IP address."""
        return not self.allow_hosts or any(
            host.endswith(allowed[1:]) if allowed.startswith("*") else host == allowed
            for allowed in self.allow_hosts
        )

    def permits_address(self, host: str, address: str) -> bool:
        """Whether a host that is permitted may be reached at an IP address."""
        return self.allow_private_addresses or host in self.allow_hosts or is_public(address)


DEFAULT_POLICY: Final = FetchPolicy()


def fetch(address: str, index: int, limits: Limits, policy: FetchPolicy, deadline: Deadline) -> bytes:
    """What an http(s) address delivers, with up to five redirects.

    The environment's proxies are not used: the address that is checked is the one that is connected to.

    Args:
        address: the scheme in any case.
        index: the picture's place in the request, from 1.
        limits: bytes, after decompression.
        policy: where it may be fetched from; looked at for each connection.
        deadline: of the request; it also holds while a name is resolved or a host keeps silent.

    Raises:
        ImageError: the address is none, is not permitted, or delivers too much, too late or nothing. Says
            nothing of what came, nor of addresses and names that the client did not send.
        TimeLimitError: the request's time is over.
        CancelledError: the request was cancelled.
    """
    transfer = _Transfer(index, limits, policy)
    # In a thread of its own, since nothing can interrupt the resolving of a name.
    with contextlib.closing(transfer):
        worker = ThreadPoolExecutor(1, thread_name_prefix="codeformer-fetch")
        future = worker.submit(transfer.run, address)
        worker.shutdown(wait=False)
        while not wait([future], timeout=_LOOK_S).done:
            deadline.check(f"the end of image {index}'s transfer")
        return future.result()


class _Transfer:
    """The way from an address to its bytes; to be closed by another thread."""

    def __init__(self, index: int, limits: Limits, policy: FetchPolicy) -> None:
        self._index = index
        self._limits = limits
        self._policy = policy
        self._lock = threading.Lock()
        self._is_closed = False
        # A second handle on the connection in use: TLS takes the first one away.
        self._handle: socket.socket | None = None

    def close(self) -> None:
        """Ends what is under way, at whatever step it is."""
        with self._lock:
            self._is_closed = True
            self._drop()

    def run(self, address: str) -> bytes:
        """The body of the answer at the end of all redirects."""
        target = self._parse("", address)
        with _pool_manager(self) as manager:
            for _ in range(_MAX_REDIRECTS + 1):
                try:
                    with manager.request(
                        "GET",
                        target.url,
                        headers=_headers(target),
                        redirect=False,
                        retries=False,
                        preload_content=False,
                        timeout=Timeout(connect=_CONNECT_S, read=_READ_S),
                    ) as response:
                        location = response.get_redirect_location()
                        if not location:
                            return self._body(response)
                except urllib3.exceptions.HTTPError as cause:
                    operator_logger.warning(
                        "image %d: %r cannot be fetched from: %s", self._index, target.host, in_words(cause)
                    )
                    raise self._error(
                        f"the address cannot be fetched ({_reason(cause)}); check it."
                    ) from cause
                target = self._parse(target.url, location)
        raise self._error(
            f"the address cannot be fetched (more than {_MAX_REDIRECTS} redirects); send that of the picture."
        )

    def connect(self, connection: HTTPConnection) -> socket.socket:
        """A socket for a connection, to an address that has been checked; its name is resolved this once."""
        host = connection.host
        if not self._policy.permits_host(host):
            operator_logger.warning("image %d: %r is no host to fetch from", self._index, host)
            raise self._error(
                "the address leads to a host that this server does not fetch from; upload the picture "
                f"instead, or ask the operator to add the host to {HOSTS_VARIABLE}."
            )
        try:
            found = socket.getaddrinfo(host, connection.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as cause:
            raise self._error("the address cannot be fetched (its host is not known); check it.") from cause
        permitted = [entry for entry in found if self._policy.permits_address(host, str(entry[4][0]))]
        if not permitted:
            operator_logger.warning(
                "image %d: %r is not fetched from: %s", self._index, host, sorted({e[4][0] for e in found})
            )
            raise self._error(
                "the address leads to a private, local or reserved network address, which this server does "
                "not fetch from; upload the picture instead."
            )
        failures = []
        for family, kind, protocol, _, end in permitted[:_MAX_TRIED]:
            connected = socket.socket(family, kind, protocol)
            try:
                self._hold(connected)
                connected.settimeout(_CONNECT_S)
                connected.connect(end)
            except OSError as failure:
                connected.close()
                failures.append(failure)
            else:
                return connected
        operator_logger.warning("image %d: %r does not answer: %s", self._index, host, failures)
        raise self._error("the address cannot be fetched (its host does not answer); check it.")

    def _parse(self, base: str, reference: str) -> Url:
        """An address, or the one to which it redirects."""
        try:
            if base:
                # What http.client has read as Latin-1 is UTF-8 as a rule.
                reference = urljoin(base, reference.encode("latin-1").decode())
            if len(reference) <= _MAX_ADDRESS_CHARACTERS:
                url = parse_url(reference)
                if url.scheme in ("http", "https") and url.host:
                    return url
        except ValueError:
            pass  # as the others that are none
        if base:
            raise self._error("the address redirects to something that is no http(s) address; check it.")
        raise self._error(
            f"expected an http(s) address of at most {_MAX_ADDRESS_CHARACTERS:,} characters; check it."
        )

    def _body(self, response: urllib3.BaseHTTPResponse) -> bytes:
        if not 200 <= response.status < 300:
            raise self._error(f"the address answered {response.status}; check it.")
        # A host may announce any number.
        self._limits.check_bytes(min(response.length_remaining or 0, _LONGEST_ANNOUNCED), self._index)
        data = bytearray()
        # A piece is no longer than this after decompression, too.
        while chunk := response.read1(_CHUNK_BYTES, decode_content=True):
            data += chunk
            self._limits.check_bytes(len(data), self._index)
        return bytes(data)

    def _hold(self, connected: socket.socket) -> None:
        """Makes a connection the one that `close` ends."""
        with self._lock:
            self._drop()
            if self._is_closed:
                raise OSError("closed before it was connected")
            self._handle = connected.dup()

    def _drop(self) -> None:
        if self._handle is not None:
            # Wakes a thread that waits for data, as closing does not.
            with contextlib.suppress(OSError):
                self._handle.shutdown(socket.SHUT_RDWR)
            self._handle.close()
            self._handle = None

    def _error(self, reason: str) -> ImageError:
        return ImageError(reason, self._index)


def _pool_manager(transfer: _Transfer) -> urllib3.PoolManager:
    """One whose every connection is made by the transfer."""

    class Plain(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return transfer.connect(self)

    class Encrypted(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return transfer.connect(self)

    class PlainPool(urllib3.HTTPConnectionPool):
        ConnectionCls = Plain

    class EncryptedPool(urllib3.HTTPSConnectionPool):
        ConnectionCls = Encrypted

    manager = urllib3.PoolManager(cert_reqs="CERT_REQUIRED", ca_certs=requests.utils.DEFAULT_CA_BUNDLE_PATH)
    manager.pool_classes_by_scheme = {"http": PlainPool, "https": EncryptedPool}
    return manager


def _headers(target: Url) -> dict[str, str]:
    headers = {
        "User-Agent": requests.utils.default_user_agent(),
        # Pictures are compressed already. What is sent otherwise is understood all the same.
        "Accept-Encoding": "identity",
    }
    if target.auth:
        headers |= make_headers(basic_auth=unquote(target.auth, encoding="latin-1"))
    return headers


def _reason(cause: urllib3.exceptions.HTTPError) -> str:
    if isinstance(cause, urllib3.exceptions.TimeoutError):
        return "its host is too slow"
    if isinstance(cause, urllib3.exceptions.SSLError):
        return "no trusted TLS connection"
    return type(cause).__name__


def _is_ip_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
