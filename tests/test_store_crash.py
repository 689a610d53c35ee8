"""What the store has confirmed is there after ``kill -9`` at any moment, in order."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.outboxes import payloads

ROUNDS = 10

# Messages are numbered on from round to round. "stored" is said after it is true, "removing" before it happens: what
# is stored and not being removed must be in the file.
PROGRAM = """
import os, random, sys
import trio
from tests.outboxes import outgoing
from trio_mqtt_driver._store import Store

path, first, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(seed)

def say(word, number):
    os.write(1, f"{word} {number}\\n".encode())

async def publish(store, message, number):
    await store.wait_stored(message)
    say("stored", number)
    if rng.random() < 0.3:
        say("removing", number)
        store.remove(message)

async def main():
    say("opening", 0)
    store = await Store.open(path)
    for message in store.messages[::3]:
        say("removing", int(message.payload.split()[0]))
        store.remove(message)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        number = first
        while True:
            for _ in range(rng.randrange(1, 200)):
                message = outgoing("t", b"%d " % number + b"x" * rng.randrange(3000))
                store.add(message)
                nursery.start_soon(publish, store, message, number)
                number += 1
            await store.wait_stored(message)

trio.run(main)
"""


@pytest.mark.long
def test_what_was_confirmed_survives_kill_9_at_any_moment(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"{seed=}")  # noqa: T201  # shown if the test fails
    rng = random.Random(seed)
    path = tmp_path / "outbox.db"
    expected: set[int] = set()
    possible: set[int] = set()
    first = 0
    for number in range(ROUNDS):
        lines = 1 if number == 0 else rng.randrange(2, 3000)
        child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(path), str(first), str(rng.randrange(1 << 32))],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        try:
            assert child.stdout is not None
            said = [child.stdout.readline() for _ in range(lines)]
            child.kill()
            said += child.stdout.read().splitlines()
        finally:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
        assert said[0].split() == ["opening", "0"]
        for line in said:
            word, which = line.split()
            if word == "stored":
                expected.add(int(which))
            elif word == "removing":
                expected.discard(int(which))
        if not path.exists():
            assert not expected
            continue
        found = [int(payload.split()[0]) for payload in payloads(path)]
        assert found == sorted(set(found))
        assert expected <= set(found)
        possible |= set(range(first, first + 100_000))
        assert set(found) <= possible
        # A removal that did not get to the disk is taken back: the message is sent again.
        expected = set(found)
        first += 100_000
    assert len(expected) > 10
    assert [one.name for one in tmp_path.iterdir() if not one.name.startswith(".outbox.db-")] == ["outbox.db"]
