"""How a run's progress is shown: a bar in a terminal or notebook, elsewhere a line in the log a minute."""

import builtins
import logging
import os
import sys
import time
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

INTERVAL = float(os.environ.get("PERFUSION_LOG_SECONDS", 60))  # from one line to the next


def can_show_bars() -> bool:
    """Return whether stderr is a terminal or a notebook's cell, where a bar is drawn over and over."""
    return sys.stderr.isatty() or hasattr(builtins, "__IPYTHON__")


@dataclass
class LogLines:
    """Logs a line after the first step, then one a minute, and one after the last.

    Attributes:
        last: the number of all steps.
        is_enabled: whether anything is logged.
    """

    last: int
    is_enabled: bool
    _told: tuple[int, float] | None = field(init=False, default=None)  # the last line's step and time

    def step_done(self, step: int, loss: float) -> None:
        """Log a line about a step if one is due.

        Args:
            step: how many steps are done.
            loss: its loss.
        """
        now = time.monotonic()
        if not self.is_enabled or (
            self._told is not None and now - self._told[1] < INTERVAL and step < self.last
        ):
            return
        left = ""
        if self._told is not None and step < self.last:
            minutes = (now - self._told[1]) / (step - self._told[0]) * (self.last - step) / 60
            left = ", less than a minute left" if minutes < 1 else f", about {minutes:.0f} min left"
        self._told = (step, now)
        logger.info("step %d of %d, loss %.4f%s", step, self.last, loss, left)
