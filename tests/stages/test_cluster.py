from __future__ import annotations

import socket

import pytest
import ray

from stages.cluster import join
from stages.errors import UserError


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_place_where_nobody_answers_is_told_at_once(address: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = address.format(free.getsockname()[1])
    with pytest.raises(UserError, match=f"ray_address={address}: no Ray cluster could be joined there: .*refused"):
        join(ray, address)
