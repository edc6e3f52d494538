"""Arrays in GPU memory."""
