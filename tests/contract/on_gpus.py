"""The tests that modules for GPU memory run on fixtures of their own: `pg` and `kind`.

They take them by `from tests.contract.on_gpus import *`.
"""

import pytest

from tests.contract.test_collectives import (  # noqa: F401
    size,
    test_a_one_element_list_is_accepted_where_an_array_is,
    test_all_gather_single,
    test_all_gather_single_coalesced,
    test_all_to_all_single_even,
    test_all_to_all_single_uneven_with_zero_rows,
    test_allgather_coalesced,
    test_allgather_of_differing_sizes,
    test_allreduce,
    test_allreduce_coalesced,
    test_alltoall_of_differing_sizes,
    test_broadcast,
    test_gather_of_differing_sizes,
    test_premul_sum_takes_each_ranks_own_factor,
    test_reduce_leaves_the_inputs_of_others_alone,
    test_reduce_scatter_of_differing_sizes,
    test_reduce_scatter_single,
    test_reduce_scatter_single_coalesced,
    test_scan_and_exscan,
    test_scatter_of_differing_sizes,
    test_shapes_of_any_number_of_dimensions,
)
from tests.contract.test_dtypes import test_every_dtype_moves  # noqa: F401
from tests.contract.test_in_place import (  # noqa: F401
    SIZES,
    odd,
    test_all_gather_single_in_place,
    test_all_to_all_single_with_ones_own_in_place,
    test_allgather_in_place,
    test_alltoall_with_ones_own_in_place,
    test_coalesced_calls_in_place,
    test_every_other_overlap_is_refused,
    test_gather_in_place,
    test_reduce_scatter_in_place,
    test_reduce_scatter_single_in_place,
    test_scatter_in_place,
)
from tests.contract.test_p2p import test_ring  # noqa: F401


@pytest.fixture(params=SIZES[:-1])
def length(request):
    """The sizes of the tests in place, but for the last, at which host memory goes another way."""
    return request.param
