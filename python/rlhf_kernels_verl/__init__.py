"""What verl loads in every process that imports it, Ray's workers too: its plugin group names it.

RLHF_KERNELS_VERL=1 in the environment of a process patches verl there
(``rlhf_kernels.integrations.verl``); without it nothing happens, and rlhf_kernels is not imported,
which is why this is a package of its own. verl only imports a plugin, so the import is what acts;
and it hides what a plugin raises, so what goes wrong is logged here.
"""

from __future__ import annotations

import logging
import os

VARIABLE = "RLHF_KERNELS_VERL"


def plugin() -> None:
    """Patch verl where the environment asks for it; a failure is logged, and verl left as it is."""
    logger = logging.getLogger(__name__)
    asked = os.environ.get(VARIABLE, "")
    if asked in ("", "0"):
        return
    if asked != "1":
        logger.warning("verl runs without rlhf_kernels: %s is 0 or 1, not %r", VARIABLE, asked)
        return
    try:
        from rlhf_kernels.integrations import verl

        verl.patch()
    except Exception:
        logger.warning("verl runs without rlhf_kernels", exc_info=True)


plugin()
