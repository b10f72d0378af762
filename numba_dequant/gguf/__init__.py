"""The header, the metadata and the tensor table of a GGUF file, with every check of them."""
