"""Object stores by their address; endpoint and credentials come from the usual environment variables."""

from __future__ import annotations

import os

import obstore
import obstore.store

SCHEMES = ("s3://", "gs://", "az://")


def open_store(address: str) -> obstore.store.ObjectStore:
    """The store at an address such as `s3://bucket/prefix`, in which names are relative to the prefix."""
    if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        return obstore.store.from_url(address, client_options={"allow_http": True})
    return obstore.store.from_url(address)


def read_object(address: str) -> bytes:
    """The content of an object such as `s3://bucket/prefix/name`.

    Raises:
        ValueError, obstore.exceptions.BaseError: it could not be read.
    """
    folder, _, name = address.rpartition("/")
    return bytes(obstore.get(open_store(folder), name).bytes())
