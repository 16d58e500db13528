"""Units that clients share, so that no client takes all of them.

:class:`FairShare` counts requests, bytes of bodies, and turns at decoders and at the model. The
server and its replicas have their own; :func:`identify_client` names the clients.
"""

import asyncio
import contextlib
import ipaddress
from collections import Counter, deque
from collections.abc import AsyncIterator

#: Bits of an IPv6 address that one client has; a provider gives each customer such a network.
NETWORK_BITS = 64


class FairShare:
    """Units of one event loop.

    A client gets more units only while at least as many stay free as it has then. So one client
    holds half of them at most, a second one half of the rest, and a newcomer finds some. Clients
    that wait take turns.

    Args:
        total: number of units.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[tuple[int, asyncio.Future[None]]]] = {}

    @property
    def held(self) -> int:
        """Number of units that clients hold."""
        return self._held.total()

    def take(self, client: str, amount: int = 1) -> bool:
        """Take units if the client may have them now, and return whether it got them.

        Args:
            client: result of :func:`identify_client`.
            amount: number of units.
        """
        has_room = self._held[client] + amount <= self._total - self.held
        if has_room:
            self._held[client] += amount
        elif not self._held[client]:
            del self._held[client]
        return has_room

    def give_back(self, client: str, amount: int = 1) -> None:
        """Return units of :meth:`take`.

        Args:
            client: that took them.
            amount: number of units.
        """
        self._held[client] -= amount
        if not self._held[client]:
            del self._held[client]
        self._grant()

    @contextlib.asynccontextmanager
    async def hold(self, client: str, amount: int = 1) -> AsyncIterator[None]:
        """Hold units during a block, after a wait if the client may not have them yet.

        Args:
            client: result of :func:`identify_client`.
            amount: number of units, at most the total.
        """
        if client in self._waiting or not self.take(client, amount):
            await self._wait(client, amount)
        try:
            yield
        finally:
            self.give_back(client, amount)

    async def _wait(self, client: str, amount: int) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append((amount, turn))
        try:
            await turn
        except asyncio.CancelledError:
            # The units may have come in the same moment.
            if turn.done() and not turn.cancelled():
                self.give_back(client, amount)
            self._grant()
            raise

    def _grant(self) -> None:
        """Give free units to the clients that wait, one request of each client after the other."""
        while any(self._serve(client) for client in list(self._waiting)):
            pass

    def _serve(self, client: str) -> bool:
        """Give the first waiting request of a client its units; return whether it got them."""
        queue = self._waiting[client]
        while queue and queue[0][1].done():
            queue.popleft()
        if queue and not self.take(client, queue[0][0]):
            return False
        # The client's next request waits behind those of the others.
        del self._waiting[client]
        if not queue:
            return False
        queue.popleft()[1].set_result(None)
        if queue:
            self._waiting[client] = queue
        return True


def identify_client(host: str) -> str:
    """Return the name under which an address shares: itself, or its network in IPv6.

    Args:
        host: address of a peer; "" if it is unknown.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, NETWORK_BITS), strict=False))
