"""I8, I16, I32, I64, F64: x = the stored number; 8, 16, 32, 64 and 64 bits per weight."""

from numba_dequant.format import Format, block_layout

I8 = Format("I8", 24, 1, block_layout(x="i1"), "plain signed 8-bit integers")
I16 = Format("I16", 25, 1, block_layout(x="i2"), "plain signed 16-bit integers")
I32 = Format("I32", 26, 1, block_layout(x="i4"), "plain signed 32-bit integers")
I64 = Format("I64", 27, 1, block_layout(x="i8"), "plain signed 64-bit integers")
F64 = Format("F64", 28, 1, block_layout(x="f8"), "plain float64")
