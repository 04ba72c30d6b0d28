"""Enrolment: trade the operator's one-use token for a node id bound to this machine's key."""

import aiohttp
import msgspec

from node_agent.engines.openai_stream import error_text
from node_agent.protocol import ENROLL_PATH, NOT_DECODED, EnrollReply, EnrollRequest

REPLY_BYTES_MAX = 64 * 1024
SECONDS_MAX = 20.0


class EnrollError(Exception):
    """The marketplace did not enrol us; the text says why."""


async def enroll(api: str, request: EnrollRequest) -> EnrollReply:
    """Give back the marketplace's answer to `request`; raises `EnrollError`."""
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=SECONDS_MAX)) as session,
            session.post(
                api.rstrip("/") + ENROLL_PATH,
                data=msgspec.json.encode(request),
                headers={"Content-Type": "application/json"},
                allow_redirects=False,
            ) as response,
        ):
            body = await response.content.read(REPLY_BYTES_MAX)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        raise EnrollError(f"{api} cannot be reached ({type(error).__name__})") from error
    if response.status not in (200, 201):
        raise EnrollError(f"the marketplace answers {response.status}: {_reason(body)}")
    try:
        return msgspec.json.decode(body, type=EnrollReply)
    except NOT_DECODED as error:
        raise EnrollError("the marketplace's answer is not an enrolment; is the address right?") from error


def _reason(body: bytes) -> str:
    try:
        return error_text(msgspec.json.decode(body))
    except NOT_DECODED:
        return "no reason given"
