"""A device that hands out its certificate authority over HTTP, as some panels do; the test decides what each gets."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

import attrs
import trio

from trio_mqtt_driver import Attempt, DriverConfig, TLSConfig

HOST = "127.0.0.1"


class Question:
    """A request that waits for its answer."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.over = trio.Event()

    async def answer(self, pem: str) -> None:
        await self._say(f"HTTP/1.0 200 OK\r\n\r\n{pem}")

    async def refuse(self) -> None:
        await self._say("HTTP/1.0 502 Bad Gateway\r\n\r\n")

    async def hang_up(self) -> None:
        await self._say("")

    async def wait_given_up(self) -> None:
        """Give no answer, until whoever asked wants none any more."""
        assert await self._stream.receive_some() == b""
        self.over.set()

    async def _say(self, text: str) -> None:
        await self._stream.send_all(text.encode())
        self.over.set()


class Desk:
    """Where the questions come in, one after the other."""

    def __init__(self, port: int, questions: trio.MemoryReceiveChannel[Question]) -> None:
        self._port = port
        self._questions = questions

    async def asked(self) -> Question:
        """The next question; it waits until it is answered."""
        return await self._questions.receive()

    async def fetch(self) -> str:
        async with await trio.open_tcp_stream(HOST, self._port) as stream:
            await stream.send_all(b"GET /ca.pem HTTP/1.0\r\n\r\n")
            answer = b"".join([bytes(part) async for part in stream])
        head, _, body = answer.decode().partition("\r\n\r\n")
        if head != "HTTP/1.0 200 OK":
            raise ValueError(f"the desk said {head!r}")
        return body

    async def options(self, attempt: Attempt) -> DriverConfig:
        """An ``options_factory``: the authority that the desk names is trusted in this attempt."""
        tls = attrs.evolve(attempt.config.tls or TLSConfig(), ca_data=await self.fetch())
        return attempt.config.evolve(tls=tls)


@asynccontextmanager
async def open_desk() -> AsyncGenerator[Desk, None]:
    put, questions = trio.open_memory_channel[Question](0)

    async def serve(stream: trio.SocketStream) -> None:
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            request += await stream.receive_some() or b"\r\n\r\n"
        question = Question(stream)
        await put.send(question)
        await question.over.wait()

    async with trio.open_nursery() as nursery:
        listeners: list[trio.SocketListener] = await nursery.start(partial(trio.serve_tcp, serve, 0, host=HOST))
        yield Desk(listeners[0].socket.getsockname()[1], questions)
        nursery.cancel_scope.cancel(reason="the desk closes")
