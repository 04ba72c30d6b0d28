"""`tollway-node verify-receipt FILE|ID`."""

import hashlib
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.markup import escape

from node_agent.identity import IdentityError, load_identity
from node_agent.receipts import (
    Receipt,
    ReceiptError,
    Verdict,
    kept_receipt,
    marketplace_keys,
    read_receipt,
    verify,
)
from node_agent.terminal import HOME, DataDir, Json, end, out, print_json


def add_to(app: typer.Typer) -> None:
    """Put these commands into `app`."""
    app.command("verify-receipt")(verify_receipt)


def verify_receipt(
    receipt: Annotated[str, typer.Argument(help="A file from GET /api/receipts/ID, or a request's id.")],
    data_dir: DataDir = HOME,
    request: Annotated[
        Path | None, typer.Option(help="The request body as it was sent: is it the one of the receipt?")
    ] = None,
    key: Annotated[str, typer.Option(help="The marketplace's key (hex) that must have signed.")] = "",
    as_json: Json = False,
) -> None:
    """Check a receipt's signatures, its place in the signed page, and its arithmetic."""
    try:
        found = _find(receipt, data_dir)
        verdict = verify(found)
        _check_expectations(verdict, key=key, request=request)
    except ReceiptError as error:
        end(str(error))
    except OSError as error:
        end(f"{error.filename}: {error.strerror}")
    is_known_key = bool(key) or verdict.public_key in marketplace_keys(data_dir)
    facts = {
        "is_valid": True,
        "is_countersigned": verdict.is_countersigned,
        "is_disputed": verdict.is_disputed,
        "public_key": verdict.public_key,
        "is_known_key": is_known_key,
        "statement": msgspec.to_builtins(verdict.statement),
    }
    if as_json:
        print_json(facts)
        return
    stated = verdict.statement
    tokens = f"{stated.prompt_tokens} + {stated.completion_tokens} tokens"
    out.print(f"[green]valid[/]: {escape(stated.model)}, {tokens},")
    out.print(
        f"counted by {escape(stated.counted_by)}, cost {stated.cost_nano} nano-dollars, "
        f"node {escape(stated.node)}"
    )
    out.print(
        "signed by the marketplace" + (" and by the node" if verdict.is_countersigned else " alone so far")
    )
    if verdict.is_disputed:
        out.print("[yellow]the node disputes this statement[/]")
    if not is_known_key:
        out.print(
            f"[yellow]the marketplace key {verdict.public_key} is not one this node has been shown;[/] "
            "compare it with GET /api/receipts/keys"
        )


def _find(receipt: str, data_dir: Path) -> Receipt:
    path = Path(receipt)
    if path.exists():
        return read_receipt(path)
    try:
        public_key = load_identity(data_dir).public_key
    except IdentityError as error:
        raise ReceiptError(f"There is no file {receipt}; for a receipt by its id: {error}") from error
    return kept_receipt(data_dir, receipt, public_key=public_key)


def _check_expectations(verdict: Verdict, *, key: str, request: Path | None) -> None:
    if key and verdict.public_key != key.lower():
        raise ReceiptError("another key signed this receipt")
    if request is not None:
        digest = hashlib.sha256(request.read_bytes()).hexdigest()
        if digest != verdict.statement.request_sha256:
            raise ReceiptError(f"{request} is not the request of this receipt")
