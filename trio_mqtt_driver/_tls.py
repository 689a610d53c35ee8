"""TLS settings, and the ``ssl.SSLContext`` made from them anew for every connection."""

from __future__ import annotations

import os
import pathlib
import ssl
from typing import Literal

import attrs
from attrs.validators import optional

from ._validators import instance, one_of, text

Path = str | os.PathLike[str]

_path = optional(instance(str, os.PathLike))


@attrs.frozen(kw_only=True)
class TLSConfig:
    """Where the TLS material is. It is read again for each connection, so that rotated files heal a driver.

    Without ``ca_file``, ``ca_path`` and ``ca_data`` the system's certificate authorities are trusted.
    ``ca_data`` is PEM text. ``cert_file`` and ``key_file`` are this client's certificate chain and private key.
    ``server_hostname`` replaces the endpoint's host in SNI and in the check of the broker's certificate.
    ``check_hostname=False`` accepts any name in a trusted certificate; ``verify=False`` accepts any certificate with
    any name, which leaves the link open to whoever can answer at that address.

    ``wrong_host`` is for a certificate with other names than the one that is asked for. ``"retry"`` takes it for any
    other TLS failure: the broker's next certificate may be right. ``"stop"`` ends the driver with that ``TLSError``.
    """

    ca_file: Path | None = attrs.field(default=None, validator=_path)
    ca_path: Path | None = attrs.field(default=None, validator=_path)
    ca_data: str | None = attrs.field(default=None, validator=optional(instance(str)), repr=False)
    cert_file: Path | None = attrs.field(default=None, validator=_path)
    key_file: Path | None = attrs.field(default=None, validator=_path)
    key_password: str | None = attrs.field(default=None, validator=optional(instance(str)), repr=False)
    server_hostname: str | None = attrs.field(default=None, validator=text)
    check_hostname: bool = attrs.field(default=True, validator=instance(bool))
    verify: bool = attrs.field(default=True, validator=instance(bool))
    wrong_host: Literal["retry", "stop"] = attrs.field(default="retry", validator=one_of("retry", "stop"))
    minimum_version: ssl.TLSVersion = attrs.field(default=ssl.TLSVersion.TLSv1_2, validator=instance(ssl.TLSVersion))
    alpn_protocols: tuple[str, ...] = attrs.field(default=(), validator=instance(tuple))

    def __attrs_post_init__(self) -> None:
        if self.cert_file is None and (self.key_file is not None or self.key_password is not None):
            raise ValueError("tls: key_file and key_password need a cert_file")

    @property
    def material(self) -> str:
        """What of the material is given, for error messages."""
        names = ("ca_file", "ca_path", "ca_data", "cert_file", "key_file", "alpn_protocols")
        given = {name: getattr(self, name) for name in names if getattr(self, name)}
        words = [name if name == "ca_data" else f"{name}={value}" for name, value in given.items()]
        return ", ".join(words) or "the system's certificate authorities"

    def make_context(self) -> ssl.SSLContext:
        """A new context. Reads files, so it blocks: call it in a worker thread.

        Raises ``OSError`` for a file that cannot be read and ``ssl.SSLError`` for one that makes no sense.
        """
        for path in (self.ca_file, self.ca_path, self.cert_file, self.key_file):
            if path is not None:
                pathlib.Path(path).stat()  # OpenSSL's own error does not say which file is missing
        context = ssl.create_default_context(
            cafile=None if self.ca_file is None else os.fspath(self.ca_file),
            capath=None if self.ca_path is None else os.fspath(self.ca_path),
            cadata=self.ca_data,
        )
        context.minimum_version = self.minimum_version
        context.check_hostname = self.check_hostname and self.verify
        context.verify_mode = ssl.CERT_REQUIRED if self.verify else ssl.CERT_NONE
        if self.cert_file is not None:
            # Without any password, OpenSSL would ask for that of an encrypted key on the terminal, and wait.
            context.load_cert_chain(self.cert_file, self.key_file, self.key_password or "")
        if self.alpn_protocols:
            context.set_alpn_protocols(list(self.alpn_protocols))
        return context
