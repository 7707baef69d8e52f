"""The `perfusion` command."""
