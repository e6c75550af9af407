"""Kernels of lightning attention against every installed peer, the floor and fp64, on one GPU."""
