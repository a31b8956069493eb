"""Saving and loading a Megatron-like state with this package and with its peers, in one run on one machine."""
