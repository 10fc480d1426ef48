"""The values of the fp8 flags; the products themselves are in fp8_linear and fp8_grouped_linear."""

FORMATS = ("e4m3", "hybrid")
RECIPES = ("tensorwise", "rowwise")
