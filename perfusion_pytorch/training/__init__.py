"""Training a concept from a handful of pictures."""
