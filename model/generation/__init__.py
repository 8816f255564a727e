"""Text generation: prefill and decode programs, sampling, and the scheduler of rows."""
