"""Storage of data sets: where their bytes are, separate from what they contain."""
