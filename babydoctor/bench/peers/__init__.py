"""Other programs on the same weights, measured in turn with this package."""
