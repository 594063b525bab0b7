"""Methods that change how a model runs: the same weights, less time."""
