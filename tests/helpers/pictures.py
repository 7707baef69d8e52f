"""A training picture whose left and right can be told apart."""

from PIL import Image


def half_red(width=64, height=64, mode="RGB"):
    """Return a picture whose left half is red, and whose right half is blue."""
    image = Image.new(mode, (width, height), "blue")
    image.paste("red", (0, 0, width // 2, height))
    return image


def left_white(width=64, height=64):
    """Return a mask of the red half."""
    image = Image.new("L", (width, height))
    image.paste(255, (0, 0, width // 2, height))
    return image
