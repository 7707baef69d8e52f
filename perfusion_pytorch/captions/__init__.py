"""Captions that an input covariance is estimated from."""
