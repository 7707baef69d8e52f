"""What the library warns of, as sentences for the page."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_notes() -> Iterator[list[str]]:
    """Collect the warnings for users in the block, each once.

    The list is whole after the block. Only one thread at a time may do this, which the studio's lock ensures.
    """
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        yield notes
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    notes += [message for message in dict.fromkeys(messages) if message not in notes]
