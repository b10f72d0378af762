"""Explains formats and blocks, as text, HTML and SVG."""
