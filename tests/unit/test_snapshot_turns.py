"""Turns: who may go on when, without a disk."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from flatmount.snapshotter.turns import Shared, Turns


async def nothing() -> None:
    """Read nothing again, provide nothing."""


def test_who_came_first_goes_first_and_only_one_is_woken() -> None:
    async def play() -> None:
        turns, order = Turns(nothing), []

        async def one(number: int) -> None:
            async with turns.locked("key"):
                order.append(number)
                await asyncio.sleep(0)

        await turns.take("key")
        tasks = [asyncio.create_task(one(number)) for number in range(5)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        turns.release("key")
        assert len(turns.held["key"]) == 4, "the first one has it, and the others still wait"
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [0, 2, 3, 4]
        assert turns.held == {}

    asyncio.run(play())


def test_a_turn_that_came_with_a_cancellation_is_passed_on() -> None:
    async def play() -> None:
        turns = Turns(nothing)
        await turns.take("key")
        first, second = (asyncio.create_task(turns.take("key")) for _ in range(2))
        await asyncio.sleep(0)
        turns.release("key")  # `first` has it, and has not run
        first.cancel()
        await asyncio.wait_for(second, 5)
        turns.release("key")
        assert turns.held == {}

    asyncio.run(play())


def test_two_keys_are_held_without_waiting_for_each_other_for_ever() -> None:
    async def play() -> None:
        turns, done = Turns(nothing), []

        async def both(one: str, other: str) -> None:
            async with turns.locked(one, other):
                await asyncio.sleep(0)
                done.append(one)

        pairs = [("a", "b"), ("b", "a"), ("a", "a"), ("b", "c"), ("c", "a")]
        await asyncio.wait_for(asyncio.gather(*(both(*pair) for pair in pairs)), 5)
        assert len(done) == len(pairs)
        assert turns.held == {}

    asyncio.run(play())


def test_nothing_begins_until_what_was_refused_last_has_been_read() -> None:
    async def play() -> None:
        gates, reads = [asyncio.Event(), asyncio.Event()], []

        async def read() -> None:
            reads.append(len(reads))
            await gates[reads[-1]].wait()

        turns = Turns(read)
        turns.refuse()
        waiting = [asyncio.create_task(turns.not_stale()) for _ in range(3)]
        while not reads:
            await asyncio.sleep(0)
        assert turns.stale, "also while it is being read"
        turns.refuse()  # what is read now may lack it
        waiting[0].cancel()
        gates[0].set()
        while len(reads) < 2:
            await asyncio.sleep(0)
        assert turns.stale
        assert not waiting[1].done()
        gates[1].set()
        await asyncio.gather(*waiting[1:])
        assert reads == [0, 1]
        assert not turns.stale

    asyncio.run(play())


def test_what_cannot_be_read_is_told_and_tried_again() -> None:
    async def play() -> None:
        failing = [OSError("disk")]

        async def read() -> None:
            if failing:
                raise failing.pop()

        turns = Turns(read)
        turns.refuse()
        with pytest.raises(OSError, match="disk"):
            async with turns.locked("key"):
                raise AssertionError
        assert turns.stale
        assert turns.held == {}
        async with turns.locked("key"):
            assert not turns.stale

    asyncio.run(play())


def test_a_request_that_waits_for_its_turn_holds_up_nobody_behind_it() -> None:
    """`begin` that ends at once, that goes on, that fails, and that lacks something."""

    async def play() -> None:
        turns, provided, open_ones = Turns(nothing), [], []

        async def otherwise() -> None:
            provided.append(True)

        def begin(what: str) -> Callable[[Callable[[Any], None]], bool]:
            def started(done: Callable[[Any], None]) -> bool:
                assert "key" not in turns.held
                if what == "lacking" and not provided:
                    return False
                if what == "failing":
                    raise ValueError(what)
                if what == "long":
                    turns.held["key"] = deque()
                    open_ones.append(done)
                else:
                    done(what)
                return True

            return started

        await turns.take("key")
        order = ("long", "at once", "failing", "lacking", "long", "at once")
        tasks = [asyncio.create_task(turns.in_turn("key", begin(what), otherwise)) for what in order]
        await asyncio.sleep(0)
        turns.release("key")
        for _ in range(2):
            while not open_ones:
                await asyncio.sleep(0)
            assert "key" in turns.held
            open_ones.pop()("long")
            turns.release("key")
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert [str(result) for result in results] == list(order)
        assert turns.held == {}

    asyncio.run(play())


def test_work_goes_to_its_end_without_its_caller() -> None:
    async def play() -> None:
        turns, ended = Turns(nothing), asyncio.Event()

        async def work() -> None:
            await asyncio.sleep(0)
            ended.set()
            raise ValueError("told to nobody")

        task = asyncio.create_task(turns.to_its_end(work()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(ended.wait(), 5)
        with pytest.raises(ValueError, match="told"):
            await turns.to_its_end(work())

    asyncio.run(play())


def test_who_comes_while_it_runs_waits_for_the_next_run() -> None:
    async def play() -> None:
        gates, runs = [asyncio.Event(), asyncio.Event()], []

        async def work() -> None:
            runs.append(len(runs))
            await gates[runs[-1]].wait()

        shared = Shared(work)
        first = asyncio.create_task(shared.run())
        while not runs:
            await asyncio.sleep(0)
        others = [asyncio.create_task(shared.run()) for _ in range(10)]
        await asyncio.sleep(0)
        gates[0].set()
        await first
        await asyncio.sleep(0)
        assert not any(task.done() for task in others)
        gates[1].set()
        await asyncio.gather(*others)
        assert runs == [0, 1]

    asyncio.run(play())
