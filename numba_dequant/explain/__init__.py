"""What the bits of a block mean: one block step by step, as text, HTML and SVG."""
