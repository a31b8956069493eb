"""Resharding: a checkpoint rewritten for another mesh, through a fixed amount of memory. None of it needs torch."""
