"""The outbox in the book: written with what it tells of, delivered at least once, signed."""

from __future__ import annotations

import asyncio
import base64
import email
import email.policy
import hashlib
import hmac
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aiohttp import web
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.notices.calling import Caller, require_safe_url
from marketplace.notices.delivery import ATTEMPTS_MAX, CLAIM, Courier, wait_after
from marketplace.notices.errors import NoSuchWebhook, NotDelivered, TooManyWebhooks, UnsafeUrl
from marketplace.notices.mail import FolderMailer, Mail, SmtpMailer, as_message
from marketplace.notices.messages import compose
from marketplace.notices.outbox import enqueue
from marketplace.notices.tables import notice_deliveries, notices
from marketplace.notices.webhooks import WEBHOOKS_MAX, add_webhook, remove_webhook, webhook_secret
from marketplace.platform.database import transaction
from marketplace.platform.processes import free_port

NOW = datetime(2026, 1, 1, tzinfo=UTC)


async def a_person(engine: AsyncEngine, email: str | None) -> uuid.UUID:
    person = uuid.uuid4()
    async with transaction(engine) as conn:
        await conn.execute(
            text("INSERT INTO people (id, email, display_name) VALUES (:id, :email, 'Ann')"),
            {"id": person, "email": email},
        )
    return person


async def test_a_notice_goes_to_the_address_of_its_moment(engine: AsyncEngine) -> None:
    """A thief who changes the address later does not get the news of it (A43)."""
    ann = await a_person(engine, "old@example.org")
    async with transaction(engine) as conn:
        await enqueue(conn, "payout_address_added", ann, {"message": "0x1 on base"}, now=NOW)
        await conn.execute(text("UPDATE people SET email = 'thief@example.org' WHERE id = :id"), {"id": ann})
    async with transaction(engine) as conn:
        targets = list(await conn.scalars(select(notice_deliveries.c.target)))
    assert targets == ["old@example.org"]


async def test_what_rolls_back_was_never_told(engine: AsyncEngine) -> None:
    ann = await a_person(engine, "ann@example.org")

    async def tell_and_fail() -> None:
        async with transaction(engine) as conn:
            await enqueue(conn, "payout_address_added", ann, {"message": "0x1"}, now=NOW)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await tell_and_fail()
    async with transaction(engine) as conn:
        assert (await conn.execute(select(notices))).all() == []
        assert (await conn.execute(select(notice_deliveries))).all() == []


@pytest.mark.parametrize(("kind", "payload"), [("gossip", {}), ("deposit_credited", {"amount": "1"})])
async def test_a_notice_that_could_not_be_written_out_is_refused_at_once(
    engine: AsyncEngine, kind: str, payload: dict[str, str]
) -> None:
    async with transaction(engine) as conn:
        with pytest.raises(KeyError):
            await enqueue(conn, kind, uuid.uuid4(), payload, now=NOW)


async def test_nobody_on_record_is_told_nothing_and_nothing_fails(engine: AsyncEngine) -> None:
    async with transaction(engine) as conn:
        await enqueue(conn, "payout_address_added", uuid.uuid4(), {"message": "0x1"}, now=NOW)
    async with transaction(engine) as conn:
        assert (await conn.execute(select(notice_deliveries))).all() == []
        assert len((await conn.execute(select(notices))).all()) == 1


# ── delivery ──────────────────────────────────────────────────────────────────────────────────────────


SECRET = b"s" * 32


class ManualClock:
    def __init__(self) -> None:
        self.at = NOW

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return self.at.timestamp()


@dataclass
class Receiver:
    """A stranger's server: answers as told, keeps what it heard."""

    port: int = 0
    answers: list[int] = field(default_factory=list)
    heard: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.Response:
        self.heard.append(({k.lower(): v for k, v in request.headers.items()}, await request.read()))
        status = self.answers.pop(0) if self.answers else 200
        return web.Response(status=status, headers={"Location": f"http://127.0.0.1:{self.port}/other"})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver(free_port())
    app = web.Application()
    app.router.add_post("/{any:.*}", made.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", made.port).start()
    yield made
    await runner.cleanup()


@dataclass
class Desk:
    engine: AsyncEngine
    clock: ManualClock
    courier: Courier
    mail: Path

    async def tell(self, person: uuid.UUID, message: str = "0x1") -> uuid.UUID:
        async with transaction(self.engine) as conn:
            return await enqueue(
                conn, "payout_address_added", person, {"message": message}, now=self.clock.now()
            )

    async def statuses(self) -> list[tuple[str, int]]:
        t = notice_deliveries.c
        async with transaction(self.engine) as conn:
            return [(r.status, r.attempts) for r in await conn.execute(select(t.status, t.attempts))]


@pytest.fixture
async def desk(engine: AsyncEngine, tmp_path: Path) -> AsyncIterator[Desk]:
    clock = ManualClock()
    async with Caller(is_loopback_allowed=True) as caller:
        mailer = FolderMailer(tmp_path / "mail", "Tollway <tollway@example.org>")
        courier = Courier(engine, clock, mailer=mailer, caller=caller, secret=SECRET)
        yield Desk(engine, clock, courier, tmp_path / "mail")


async def a_webhook(desk: Desk, person: uuid.UUID, url: str) -> uuid.UUID:
    async with transaction(desk.engine) as conn:
        return await add_webhook(conn, person, url, is_loopback_allowed=True, now=desk.clock.now())


def is_genuine(secret: str, headers: dict[str, str], body: bytes) -> bool:
    """What a receiver does, by the Standard Webhooks document; shares no code with us."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = b".".join((headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body))
    wanted = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return headers["webhook-signature"] == f"v1,{wanted}"


async def test_a_webhook_is_signed_and_says_what_happened(desk: Desk, receiver: Receiver) -> None:
    ann = await a_person(desk.engine, None)
    webhook = await a_webhook(desk, ann, receiver.url)
    notice = await desk.tell(ann)
    assert await desk.courier.tick()
    ((headers, body),) = receiver.heard
    secret = webhook_secret(SECRET, webhook)
    assert is_genuine(secret, headers, body)
    assert not is_genuine(secret, headers, body + b" ")
    assert not is_genuine(webhook_secret(SECRET, uuid.uuid4()), headers, body)
    assert headers["webhook-id"] == str(notice)
    assert headers["webhook-timestamp"] == str(int(NOW.timestamp()))
    said = json.loads(body)
    assert (said["type"], said["data"]) == ("payout_address_added", {"message": "0x1"})
    assert await desk.statuses() == [("delivered", 1)]
    assert not await desk.courier.tick()


async def test_what_fails_is_tried_again_later_and_later_and_given_up(desk: Desk, receiver: Receiver) -> None:
    ann = await a_person(desk.engine, None)
    await a_webhook(desk, ann, receiver.url)
    await desk.tell(ann)
    receiver.answers = [302, 500] + [503] * 100  # a redirect is not followed, it is a failure
    for attempt in range(1, ATTEMPTS_MAX + 1):
        assert await desk.courier.tick()
        assert len(receiver.heard) == attempt
        desk.clock.at += wait_after(attempt) - timedelta(seconds=1)
        assert not await desk.courier.tick(), "tried too soon"
        desk.clock.at += timedelta(seconds=1)
    assert not await desk.courier.tick()
    assert await desk.statuses() == [("given_up", ATTEMPTS_MAX)]
    assert len({headers["webhook-id"] for headers, _ in receiver.heard}) == 1


async def test_a_courier_killed_in_the_middle_loses_nothing(desk: Desk, receiver: Receiver) -> None:
    ann = await a_person(desk.engine, None)
    await a_webhook(desk, ann, receiver.url)
    await desk.tell(ann)
    assert len(await desk.courier._claim()) == 1
    assert not await desk.courier.tick(), "somebody else's claim"
    desk.clock.at += CLAIM
    assert await desk.courier.tick()
    assert await desk.statuses() == [("delivered", 2)]


async def test_a_slow_couriers_late_word_does_not_count(desk: Desk, receiver: Receiver) -> None:
    ann = await a_person(desk.engine, None)
    await a_webhook(desk, ann, receiver.url)
    await desk.tell(ann)
    (late,) = await desk.courier._claim()
    desk.clock.at += CLAIM
    assert await desk.courier.tick()
    await desk.courier._record(late, "failed", "too late")
    assert await desk.statuses() == [("delivered", 2)]


async def test_two_couriers_call_once(desk: Desk, receiver: Receiver) -> None:
    ann = await a_person(desk.engine, None)
    await a_webhook(desk, ann, receiver.url)
    for _ in range(5):
        await desk.tell(ann)
    await asyncio.gather(*(desk.courier.tick() for _ in range(4)))
    assert len(receiver.heard) == 5


async def test_a_removed_webhook_is_not_called(desk: Desk, receiver: Receiver) -> None:
    ann = await a_person(desk.engine, None)
    webhook = await a_webhook(desk, ann, receiver.url)
    await desk.tell(ann)
    async with transaction(desk.engine) as conn:
        await remove_webhook(conn, ann, webhook, now=NOW)
        with pytest.raises(NoSuchWebhook):
            await remove_webhook(conn, ann, webhook, now=NOW)
    await desk.courier.tick()
    assert receiver.heard == []
    assert await desk.statuses() == [("given_up", 1)]


async def test_a_mail_is_written_whole(desk: Desk) -> None:
    ann = await a_person(desk.engine, "ann@example.org")
    await desk.tell(ann, "ünicode\nBcc: everybody@example.org")
    await desk.courier.tick()
    (path,) = desk.mail.iterdir()
    mail = email.message_from_bytes(path.read_bytes(), policy=email.policy.default)
    assert (mail["To"], mail["Bcc"]) == ("ann@example.org", None)
    assert "ünicode" in mail.get_content()


def test_a_subject_cannot_carry_a_header() -> None:
    made = compose("deposit_credited", {"amount": "1\r\nBcc: x@y", "chain": "base", "transactions": []})
    assert "\n" not in made.subject
    with pytest.raises(ValueError, match="linefeed"):
        as_message(Mail("a@b\r\nBcc: x@y", "hello", "text", "1"), "c@d")


async def test_mail_goes_through_a_real_smtp_conversation() -> None:
    said: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 hello\r\n")
        is_data = False
        while line := (await reader.readline()).decode():
            said.append(line.rstrip())
            if is_data and line == ".\r\n":
                is_data = False
                writer.write(b"250 taken\r\n")
            elif line.upper().startswith("DATA"):
                is_data = True
                writer.write(b"354 go on\r\n")
            elif line.upper().startswith("QUIT"):
                writer.write(b"221 bye\r\n")
                break
            elif not is_data:
                writer.write(b"250 fine\r\n" if "refused@" not in line else b"550 nobody\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        mailer = SmtpMailer(f"smtp://127.0.0.1:{port}", "tollway@example.org")
        await mailer.send(Mail("ann@example.org", "Hello", "A text", "id-1"))
        assert "rcpt to:<ann@example.org>" in [line.lower() for line in said]
        assert "Subject: Hello" in said
        assert "Message-ID: <id-1@example.org>" in said
        with pytest.raises(NotDelivered):
            await mailer.send(Mail("refused@example.org", "Hello", "A text", "id-2"))
        with_password = SmtpMailer(f"smtp://ann:secret@127.0.0.1:{port}", "tollway@example.org")
        with pytest.raises(NotDelivered, match="STARTTLS"):
            await with_password.send(Mail("ann@example.org", "Hello", "A text", "id-3"))
    assert not any("secret" in line or "AUTH" in line.upper() for line in said)
    with pytest.raises(NotDelivered):
        await mailer.send(Mail("ann@example.org", "Hello", "A text", "id-4"))


# ── whom we call (A69) ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/hook",
        "https://example.org:8443/hook",
        "https://169.254.169.254/latest/meta-data",
        "https://[::ffff:10.0.0.1]/",
        "https://0177.0.0.1/",
        "https://2130706433/",
        "https://127.1/",
        "https://0x7f.1/",
        "https://user:password@example.org/",
        "https://example.org/#part",
        "https:///nowhere",
        "https://[::1/",
        "https://exa mple.org/",
        "https://" + "a" * 500 + ".org/",
        "file:///etc/passwd",
        "http://127.0.0.1/",
        "http://localhost/",
    ],
)
def test_an_unsafe_address_is_refused(url: str) -> None:
    with pytest.raises(UnsafeUrl):
        require_safe_url(url, is_loopback_allowed=False)


def test_a_plain_address_is_taken() -> None:
    require_safe_url("https://example.org/hook?x=1", is_loopback_allowed=False)
    require_safe_url("http://127.0.0.1:8080/", is_loopback_allowed=True)


@pytest.mark.parametrize("address", ["10.0.0.1", "127.0.0.1", "169.254.169.254", "100.64.0.1", "fd00::1"])
async def test_a_host_that_resolves_into_our_house_is_not_called(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the name was harmless while it was added (DNS rebinding): each call resolves anew."""

    async def resolve(_: object, host: str, port: int = 0, family: int = 0) -> list[dict[str, object]]:
        return [
            {"hostname": host, "host": found, "port": port, "family": family, "proto": 0, "flags": 0}
            for found in ("93.184.216.34", address)
        ]

    monkeypatch.setattr("aiohttp.ThreadedResolver.resolve", resolve)
    async with Caller() as caller:
        with pytest.raises(NotDelivered, match="not public"):
            await caller.post("https://rebinding.example/", b"{}", {})


async def test_a_call_without_an_answer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marketplace.notices.calling.CALL_S_MAX", 0.2)

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        is_over.set()

    is_over = asyncio.Event()
    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    async with server, Caller(is_loopback_allowed=True) as caller:
        with pytest.raises(NotDelivered, match="no answer"):
            await caller.post(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", b"{}", {})
        await is_over.wait()


async def test_no_more_than_a_few_webhooks(desk: Desk) -> None:
    ann = await a_person(desk.engine, None)
    for _ in range(WEBHOOKS_MAX):
        await a_webhook(desk, ann, "https://example.org/")
    with pytest.raises(TooManyWebhooks):
        await a_webhook(desk, ann, "https://example.org/")
