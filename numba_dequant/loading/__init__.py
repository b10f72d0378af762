"""The way of a file's bytes to a device."""
