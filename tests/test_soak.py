"""Nothing grows with the number of steps: the soak of ``benchmarks``, short."""

import pytest

from benchmarks.soak import soak

STEPS = 3000


@pytest.mark.usefixtures("one_thread")
def test_nothing_grows():
    first, *_, last = soak(STEPS, looks=6)[1:]  # by the second look everything has been allocated once
    assert last["step"] - first["step"] >= STEPS // 2
    for kind in ("tensors", "hooks", "files"):
        assert last[kind] == first[kind], kind
    assert last["objects"] <= first["objects"] + 50
    assert last["resident_bytes"] <= first["resident_bytes"] + 4 * 2**20
