"""Methods that shrink a model."""
