"""Exchange: checkpoints in the formats of others, both ways, in constant memory. None of it needs torch."""
