"""One rank's data: dtypes, operators, buffers, on the host and on a GPU."""
