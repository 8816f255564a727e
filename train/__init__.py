"""What changes weights, and what is kept of them: mesh, optimizer, step, checkpoints and the loop."""
