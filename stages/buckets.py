"""Object stores by their address; endpoint and credentials come from the usual environment variables."""

from __future__ import annotations

import os

import obstore.store

SCHEMES = ("s3://", "gs://", "az://")


def open_store(address: str) -> obstore.store.ObjectStore:
    """The store at an address such as `s3://bucket/prefix`, in which names are relative to the prefix."""
    if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        return obstore.store.from_url(address, client_options={"allow_http": True})
    return obstore.store.from_url(address)
