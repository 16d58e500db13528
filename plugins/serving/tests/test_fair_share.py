"""Clients share units: nobody takes all of them, and those who wait take turns."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest

from skillnet_serving.server.admission import FairShare, identify_client


@pytest.mark.parametrize("total", [1, 2, 3, 4, 7, 32, 100])
def test_one_client_leaves_units_for_others(total: int) -> None:
    share = FairShare(total)
    while share.take("greedy"):
        pass
    first = share.held
    assert first == -(-total // 2) if total > 1 else 1
    if total > 1:
        assert share.take("newcomer")
    share.give_back("greedy", first)
    assert share.take("greedy") or total <= 2


def test_amounts_count_as_their_units() -> None:
    share = FairShare(400)
    assert share.take("a", 100)
    assert share.take("a", 100)
    assert not share.take("a", 100)
    assert not share.take("b", 300)
    assert share.take("b", 200)
    assert share.held == 400


def test_clients_that_wait_take_turns() -> None:
    order: list[str] = []

    async def use(share: FairShare, client: str) -> None:
        async with share.hold(client):
            order.append(client)
            await asyncio.sleep(0)

    async def run() -> None:
        share = FairShare(1)
        async with share.hold("first"):
            names = ["greedy"] * 6 + ["small"] * 2 + ["late"]
            tasks = [asyncio.create_task(use(share, name)) for name in names]
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert share.held == 0

    asyncio.run(run())
    assert order == ["greedy", "small", "late", "greedy", "small", *["greedy"] * 4]


@pytest.mark.parametrize("moment", ["waiting", "granted"])
def test_a_cancelled_wait_keeps_nothing(moment: str) -> None:
    async def hold(share: FairShare, client: str) -> None:
        async with share.hold(client):
            await asyncio.Event().wait()

    async def run() -> None:
        share = FairShare(1)
        holder = asyncio.create_task(hold(share, "a"))
        await asyncio.sleep(0)
        waiter = asyncio.create_task(hold(share, "b"))
        await asyncio.sleep(0)
        if moment == "granted":
            share.give_back("a")
            share.take("a", 0)
            assert share.held == 1
        waiter.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiter
        assert share.held == (1 if moment == "waiting" else 0)
        holder.cancel()

    asyncio.run(run())


def test_a_large_amount_does_not_stop_the_clients_behind_it() -> None:
    async def run(share: FairShare, use: Callable[[str, int], Awaitable[None]]) -> None:
        assert share.take("a", 6)
        large = asyncio.create_task(use("b", 8))
        small = asyncio.create_task(use("c", 2))
        await asyncio.wait_for(small, 30)
        assert not large.done()
        share.give_back("a", 6)
        await asyncio.wait_for(large, 30)

    async def main() -> None:
        share = FairShare(10)

        async def use(client: str, amount: int) -> None:
            async with share.hold(client, amount):
                await asyncio.sleep(0)

        await run(share, use)

    asyncio.run(main())


def test_an_address_is_one_client_however_it_is_written() -> None:
    assert identify_client("10.0.0.5") == identify_client("::ffff:10.0.0.5") == "10.0.0.5"
    assert identify_client("2001:db8::1") == identify_client("2001:db8:0:0:ffff::2")
    assert identify_client("2001:db8::1") != identify_client("2001:db8:0:1::1")
    assert identify_client("fe80::1%eth0") == identify_client("fe80::2")
    assert identify_client("") == ""
