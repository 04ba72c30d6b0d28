"""Sending e-mail: a port, SMTP behind it, and a folder for development.

`smtp://host:25` speaks STARTTLS if the server offers it, and must where there is a user; `smtps://host:465`
is TLS from the first byte.  User and password stand in the URL, percent-encoded.
"""

from __future__ import annotations

import asyncio
import smtplib
import ssl
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import unquote, urlsplit

from marketplace.notices.errors import NotDelivered
from marketplace.platform.errors import SetupFault

SMTP_S_MAX: Final = 20
_PORTS: Final = {"smtp": 587, "smtps": 465}


@dataclass(frozen=True, slots=True)
class Mail:
    """One plain-text mail; `identity` is the same at every repetition."""

    to: str
    subject: str
    text: str
    identity: str


class Mailer(Protocol):
    """Hands mail over."""

    async def send(self, mail: Mail) -> None:
        """Hand it over to be delivered; raises NotDelivered."""
        ...


class SmtpMailer:
    """Through a mail server; one connection a mail."""

    def __init__(self, url: str, sender: str, *, context: ssl.SSLContext | None = None) -> None:
        """`url` as above; SetupFault if it is not one."""
        try:
            parts = urlsplit(url)
            self._port = parts.port or _PORTS[parts.scheme]
        except (ValueError, KeyError) as e:
            raise SetupFault("TOLLWAY_SMTP_URL is smtp://… or smtps://…") from e
        if not parts.hostname or "@" not in sender:
            raise SetupFault("TOLLWAY_SMTP_URL needs a host and TOLLWAY_MAIL_FROM an address")
        self._host = parts.hostname
        self._is_tls = parts.scheme == "smtps"
        self._user, self._password = unquote(parts.username or ""), unquote(parts.password or "")
        self._sender = sender
        self._context = context or ssl.create_default_context()

    async def send(self, mail: Mail) -> None:
        try:
            await asyncio.to_thread(self._send, as_message(mail, self._sender))
        except (OSError, smtplib.SMTPException, ValueError) as e:
            raise NotDelivered(f"{type(e).__name__}: {_first_words(e)}") from e

    def _send(self, message: EmailMessage) -> None:
        with self._connect() as server:
            if not self._is_tls:
                server.ehlo()
                if server.has_extn("starttls"):
                    server.starttls(context=self._context)
                elif self._user:
                    raise NotDelivered("the mail server offers no STARTTLS: the password stays here")
            if self._user:
                server.login(self._user, self._password)
            server.send_message(message)

    def _connect(self) -> smtplib.SMTP:
        if self._is_tls:
            return smtplib.SMTP_SSL(self._host, self._port, timeout=SMTP_S_MAX, context=self._context)
        return smtplib.SMTP(self._host, self._port, timeout=SMTP_S_MAX)


class FolderMailer:
    """Writes each mail into a folder instead of sending it: development."""

    def __init__(self, folder: Path, sender: str) -> None:
        self._folder = folder
        self._sender = sender

    async def send(self, mail: Mail) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{mail.identity}.eml"
            path.write_bytes(as_message(mail, self._sender).as_bytes())
        except (OSError, ValueError) as e:
            raise NotDelivered(f"{type(e).__name__}: {e}") from e


def as_message(mail: Mail, sender: str) -> EmailMessage:
    """The mail in its written form; ValueError if an address or subject would break a header."""
    message = EmailMessage()
    message["From"] = sender
    message["To"] = mail.to
    message["Subject"] = mail.subject
    message["Message-ID"] = f"<{mail.identity}@{sender.rpartition('@')[2].rstrip('>')}>"
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(mail.text)
    return message


def _first_words(error: Exception) -> str:
    if isinstance(error, smtplib.SMTPResponseException):
        return str(error.smtp_code)
    return str(error)[:200]
