"""Devices, kernels and recorded programs. Nothing here knows what a model is."""
