"""Reads and checks the header, the metadata and the tensor table of GGUF files."""
