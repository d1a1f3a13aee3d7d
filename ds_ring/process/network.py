"""Where this launch's ranks meet, and over which interface: the loopback one where all are on one host."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from ds_ring.errors import ConfigError

LOOPBACK = "127.0.0.1"
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Environment variables with the interface on which process groups listen and send."""


@dataclass(frozen=True)
class MeetingPoint:
    """An address and port of rank 0."""

    address: str
    port: int

    @classmethod
    def of_launch(cls) -> MeetingPoint:
        """Of this launch: ``MASTER_ADDR`` as an address, or the loopback one where no other host takes part.

        Raises:
            ConfigError: a name that does not resolve, or that is this host alone where there are others.
        """
        port = int(os.environ["MASTER_PORT"])
        if one_host():
            return cls(LOOPBACK, port)
        name = os.environ["MASTER_ADDR"]
        address = address_of(name)
        if ipaddress.ip_address(address).is_loopback:
            raise ConfigError(loopback_name(name, address))
        return cls(address, port)

    def own_address(self) -> str:
        """The address of this host from which rank 0 is reached.

        Raises:
            ConfigError: there is none.
        """
        with socket.socket(family_of(self.address), socket.SOCK_DGRAM) as probe:  # which sends nothing
            try:
                probe.connect((self.address, self.port or 1))
            except OSError as error:
                raise ConfigError(
                    f"{socket.gethostname()} has no way to rank 0's address {self.address}: {error.strerror}"
                ) from None
            own: str = probe.getsockname()[0]
            return own


def one_host() -> bool:
    """Whether all ranks of this launch are on this host, as far as their launcher says."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return size == 1 or os.environ.get("CROSS_SIZE") == "1" or size == ranks_of_host()


def ranks_of_host() -> int:
    """How many ranks this launch has on this host; 0 where its launcher does not say."""
    # DeepSpeed's launcher sets the first, torchrun the second.
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "0")


def use_interface(own_address: str) -> None:
    """Make process groups of this process listen on the interface of ``own_address``, not on all.

    What a user has set stays.
    """
    for name in INTERFACES:
        # NCCL takes a name with = as it is, and without as the beginning of names.
        os.environ.setdefault(name, ("=" if name.startswith("NCCL") else "") + interface_of(own_address))


def interface_of(address: str) -> str:
    """The interface of this host that has ``address``."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == address for found in addresses):
            return name
    raise ConfigError(f"no interface of {socket.gethostname()} has the address {address}")


def address_of(name: str) -> str:
    """The address of a host's name, or ConfigError where it has none."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # the second: a name that DNS cannot have, such as a..b
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"the host name {name} does not resolve: {why}") from None
    return str(found[0][4][0])


def is_this_host(name: str) -> bool:
    """Whether a host's name, or its address, is one of this host's."""
    own = {found.address.partition("%")[0] for addresses in psutil.net_if_addrs().values() for found in addresses}
    address = address_of(name)
    return address in own or ipaddress.ip_address(address).is_loopback


def loopback_name(name: str, address: str) -> str:
    """What to say of a host's name that is ``address`` on the host itself."""
    return (
        f"{name} is {address} on {socket.gethostname()}, where no other host reaches it; correct /etc/hosts there, or "
        f"launch with --master_addr and an address that other hosts reach"
    )


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@contextmanager
def listening(address: str, port: int) -> Iterator[socket.socket]:
    """A socket on one address of this host; port 0: any that is free. Who keeps it longer than the block detaches it.

    Raises:
        ConfigError: the port is taken, or the address is not this host's.
    """
    with socket.socket(family_of(address)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
            listener.listen(socket.SOMAXCONN)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on port {port} of {address}: {error.strerror}; end the launch that may still run, or "
                f"give this one another --master_port"
            ) from None
        yield listener
