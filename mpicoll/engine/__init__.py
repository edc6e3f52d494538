"""One call, whatever carries it: what it is, its arrival, its peers, its progress, its end."""
