"""A page in the browser to train concepts and make pictures with them."""
