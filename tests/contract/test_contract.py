"""The contract that authors of backends inherit, on mpicoll's own."""

from __future__ import annotations

import pytest

import mpicoll as mc
from mpicoll.testing.contract import GroupContract
from tests.contract.conftest import BACKENDS, GROUP_TIMEOUT

pytestmark = pytest.mark.mpi


class TestOwn(GroupContract):
    dtypes = ("float32", "int64")
    counts = (5,)
    mismatch = mc.CollectiveMismatchError
    late = mc.CollectiveTimeoutError

    @pytest.fixture(params=BACKENDS)
    def group(self, request):
        made = mc.new_group(request.param, timeout=GROUP_TIMEOUT)
        yield made
        made.abort() if made.is_broken else made.shutdown()
