"""Concepts on diffusers pipelines."""
