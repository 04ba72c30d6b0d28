"""`tollway nats-config`: one production server's configuration, on standard output."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def nats_config(
    name: Annotated[str, typer.Option(help="This server's name; unique in the cluster.")],
    listen: Annotated[str, typer.Option(help="Where gateways and nodes dial.")] = "0.0.0.0:4222",
    store: Annotated[Path, typer.Option(help="JetStream's folder.")] = Path("/var/lib/nats"),
    cert: Annotated[Path | None, typer.Option(help="The server's certificate (PEM); with --key.")] = None,
    key: Annotated[Path | None, typer.Option(help="The certificate's private key (PEM).")] = None,
    ca: Annotated[Path | None, typer.Option(help="Who signed the cluster's certificates (PEM).")] = None,
    cluster_listen: Annotated[str, typer.Option(help="Where the cluster's servers dial one another.")] = "",
    route: Annotated[
        list[str] | None, typer.Option(help="Another server's --cluster-listen as host:port; repeatable.")
    ] = None,
) -> None:
    """Print a nats-server's configuration for production; it holds secrets.

    Reads TOLLWAY_NATS_PASSWORD and TOLLWAY_NATS_ISSUER_SEED, and TOLLWAY_NATS_CLUSTER_PASSWORD for a cluster.
    """
    from marketplace.platform.nats_configuration import Cluster, NatsCredentials, Server, Tls, configuration

    if (cert is None) != (key is None):
        raise typer.BadParameter("--cert and --key come together")
    credentials = NatsCredentials(_secret("TOLLWAY_NATS_PASSWORD"), _secret("TOLLWAY_NATS_ISSUER_SEED"))
    tls = Tls(cert, key, ca) if cert is not None and key is not None else None
    cluster = None
    if cluster_listen:
        password = _secret("TOLLWAY_NATS_CLUSTER_PASSWORD")
        cluster = Cluster("tollway", cluster_listen, tuple(route or ()), password)
    try:
        text = configuration(Server(name, listen, store, tls, cluster), credentials)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(text, nl=False)


def _secret(variable: str) -> str:
    found = os.environ.get(variable, "")
    if not found:
        raise typer.BadParameter(f"{variable} is not set")
    return found
