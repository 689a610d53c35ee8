"""From an endpoint to a ``trio.abc.Stream``, and the one seam where OSError and SSLError become our errors."""

from __future__ import annotations

import os
import ssl
import sys
from typing import cast

import trio

from ._config import DriverConfig
from ._errors import ConnectionLostError, MQTTDriverError, OptionsError, TLSError, TransportError
from ._tls import TLSConfig

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


async def open_stream(config: DriverConfig) -> trio.abc.Stream:
    """Open the byte stream of one connection. Cancellable; the caller sets the deadline.

    Raises ``TransportError``, ``TLSError`` or, for TLS files that cannot be used, ``OptionsError``.
    """
    endpoint = config.endpoint
    if config.open_stream is not None:
        try:
            return await config.open_stream(endpoint)
        except Exception as exc:  # whatever the application's code raises is one failed attempt
            raise lost(exc, f"connecting to {endpoint}") from exc
    try:
        if endpoint.scheme == "unix":
            return await trio.open_unix_socket(endpoint.path)
        # Made before the connection, so that a bad file costs the broker nothing.
        context = await _make_context(config.tls or TLSConfig()) if endpoint.scheme == "mqtts" else None
        stream = await trio.open_tcp_stream(endpoint.host, endpoint.port)
    except (OSError, UnicodeError) as exc:  # a host name that IDNA cannot encode
        raise lost(exc, f"connecting to {endpoint}") from exc
    if context is None:
        return stream
    hostname = config.tls.server_hostname if config.tls is not None else None
    try:
        # Brokers rarely send close_notify, and DISCONNECT says the same: https_compatible reads a bare EOF as EOF.
        secure = trio.SSLStream(stream, context, server_hostname=hostname or endpoint.host, https_compatible=True)
        await secure.do_handshake()
    except (trio.BrokenResourceError, OSError, ValueError) as exc:  # ValueError: no name that SNI can carry
        await trio.aclose_forcefully(stream)
        raise lost(exc, f"TLS handshake with {endpoint}") from exc
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return secure


async def _make_context(tls: TLSConfig) -> ssl.SSLContext:
    try:
        return await trio.to_thread.run_sync(tls.make_context)
    except ssl.SSLError as exc:
        raise TLSError(f"TLS material: {_words(exc)}; look at the files of {tls!r}") from exc
    except (OSError, ValueError, TypeError) as exc:  # the latter two: a path with a NUL, a PEM text that is not ASCII
        raise OptionsError(f"TLS material cannot be read: {exc}; look at the files of {tls!r}") from exc


def lost(exc: BaseException, doing: str) -> MQTTDriverError:
    """The error for what Trio's stream raised while ``doing`` something on it.

    An ``ssl.SSLError`` hides behind ``BrokenResourceError``, and is itself an ``OSError``: it is looked for first.
    """
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return TLSError(f"{doing}: {_words(cause)}")
        cause = cause.__cause__
    if isinstance(exc, Exception) and not isinstance(exc, trio.BrokenResourceError | trio.ClosedResourceError):
        return TransportError(f"{doing}: {_words(exc)}")
    return ConnectionLostError(f"{doing}: {_words(exc.__cause__ or exc)}")


def _words(exc: BaseException) -> str:
    # An error that a stream of the application's made by itself lacks what Python's ssl module adds.
    if isinstance(exc, ssl.SSLCertVerificationError) and hasattr(exc, "verify_message"):
        return f"certificate verify failed: {exc.verify_message}"
    if isinstance(exc, ssl.SSLError):
        return getattr(exc, "reason", None) or str(exc)
    cause: BaseException | None = exc.__cause__
    if isinstance(exc, OSError) and isinstance(cause, BaseExceptionGroup):
        # "All attempts failed": Trio tries each address of a host and keeps the reasons in a group.
        group = cast("BaseExceptionGroup[BaseException]", cause)
        reasons = [os.strerror(one.errno) for one in group.exceptions if isinstance(one, OSError) and one.errno]
        return "; ".join(dict.fromkeys(reasons)) or str(exc)
    return (exc.strerror if isinstance(exc, OSError) else "") or str(exc) or type(exc).__name__
