"""`tollway receipts verify FILE`: a buyer's check of a receipt, without a database."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.console import Console
from rich.markup import escape

from marketplace.ledger.money import Nano, cost, dollars, split
from node_agent import protocol
from node_agent.protocol import NOT_DECODED, ProtocolError, Statement

receipts_app = typer.Typer(help="Receipts: signed statements of served requests.", no_args_is_help=True)
DOCUMENT_BYTES_MAX: Final = 256 * 1024
SAYS_ANOTHER: Final = "`says` is not what the signed statement says: the receipt was changed, ask for it anew"
_out: Final = Console()
_err: Final = Console(stderr=True, soft_wrap=True)


class ReceiptInvalid(Exception):
    """The receipt proves nothing; the message says why."""


def check(receipt: dict[str, Any], *, public_key: str = "") -> Statement:
    """Give what a receipt (as `GET /api/receipts/{id}` gives it) says; ReceiptInvalid if it is not proved.

    `public_key`: hex, the key that must have signed; none: whichever did.
    """
    try:
        statement, place, by = receipt["statement"].encode(), receipt["page"], receipt["marketplace"]
        if place is None or by is None:
            raise ReceiptInvalid("not signed yet: ask again in a few seconds")
        if public_key and by["public_key"] != public_key.lower():
            raise ReceiptInvalid("another key signed this receipt")
        leaf, count = protocol.receipt_leaf(statement), int(place["count"])
        proof = [bytes.fromhex(sibling) for sibling in place["proof"]]
        root = protocol.root_from_proof(leaf, int(place["position"]), count, proof)
        signature = bytes.fromhex(by["signature"])
        protocol.verify_page_signature(bytes.fromhex(by["public_key"]), count, root, signature)
        node = receipt.get("node")
        if node is not None:
            signature = bytes.fromhex(node["signature"])
            protocol.verify_countersignature(node["public_key"], count, root, node["disputed"], signature)
        said = protocol.decode_statement(statement)
        if "says" in receipt and receipt["says"] != json.loads(statement):
            raise ReceiptInvalid(SAYS_ANOTHER)
    except ProtocolError as e:
        raise ReceiptInvalid(f"forged or damaged: {e}") from e
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as e:
        raise ReceiptInvalid(f"not a receipt: {type(e).__name__}") from e
    _check_arithmetic(said)
    return said


def _check_arithmetic(said: Statement) -> None:
    charged = Nano(said.cost_nano)
    if said.price_in is not None and said.price_out is not None:
        exact = cost(
            tokens_in=said.prompt_tokens, tokens_out=said.completion_tokens,
            price_in=said.price_in, price_out=said.price_out,
        )  # fmt: skip
        if charged.n > exact.n:
            raise ReceiptInvalid("the cost is above tokens times prices")
    if split(charged)[0].n != said.operator_nano:
        raise ReceiptInvalid("the operator's share is not 80 % of the cost")


@receipts_app.command("verify")
def verify(
    receipt: Annotated[Path, typer.Argument(help="A file as GET /api/receipts/ID gives it.")],
    key: Annotated[str, typer.Option(help="The marketplace's public key (hex) you trust.")] = "",
    request: Annotated[Path | None, typer.Option(help="The body you sent: is it this receipt's?")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Check a receipt's signatures, its place in the signed page, what it says, and its arithmetic."""
    try:
        data = receipt.read_bytes()[: DOCUMENT_BYTES_MAX + 1]
        document = msgspec.json.decode(data, type=dict[str, Any])
        said = check(document, public_key=key)
        if request is not None and hashlib.sha256(request.read_bytes()).hexdigest() != said.request_sha256:
            _refuse(f"{request} is not the request of this receipt")
    except ReceiptInvalid as e:
        _refuse(str(e))
    except NOT_DECODED as e:
        _refuse(f"{receipt} is not JSON: {e}")
    except OSError as e:
        _refuse(f"{e.filename}: {e.strerror}")
    node = document.get("node")
    if as_json:
        facts = {
            "is_valid": True,
            "is_countersigned": node is not None,
            "public_key": document["marketplace"]["public_key"],
            "statement": msgspec.to_builtins(said),
        }
        typer.echo(msgspec.json.encode(facts).decode())
        return
    _out.print(
        f"[green]valid[/]: {escape(said.model)}, {said.prompt_tokens} + {said.completion_tokens} tokens, "
        f"counted by {escape(said.counted_by)}, ${dollars(Nano(said.cost_nano))}, node {escape(said.node)}, "
        + ("signed by marketplace and node" if node is not None else "signed by the marketplace alone so far")
    )
    if not key:
        public_key = escape(document["marketplace"]["public_key"])
        _out.print(f"key {public_key}: compare it with GET /api/receipts/keys", soft_wrap=True)


def _refuse(message: str) -> None:
    _err.print(f"[red]tollway:[/] {escape(message)}")
    raise typer.Exit(1)
