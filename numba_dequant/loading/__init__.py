"""Loads tensors of files to a device."""
