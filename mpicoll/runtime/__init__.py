"""What lies beneath: environment, launcher, MPI library, processes, the node's memory."""
