"""The layer: the maths of the edit, the input covariance, and `Rank1EditModule`. It needs only torch."""
