"""How good a trained concept is: pictures over prompts and strengths, their figures, and a recommendation."""
