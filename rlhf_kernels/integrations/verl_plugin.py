"""What verl loads in every process that imports it, Ray's workers too: its plugin group names it.

RLHF_KERNELS_VERL=1 in the environment of a process patches verl there (``integrations.verl``);
without it nothing happens. verl only imports a plugin, so the import is what acts; and it hides
what a plugin raises, so what goes wrong is logged here.
"""

from __future__ import annotations

import logging
import os

VARIABLE = "RLHF_KERNELS_VERL"


def plugin() -> None:
    """Patch verl where the environment asks for it; a failure is logged, and verl left as it is."""
    if os.environ.get(VARIABLE) != "1":
        return
    try:
        from rlhf_kernels.integrations import verl

        verl.patch()
    except Exception:
        logging.getLogger(__name__).warning("verl runs without rlhf_kernels", exc_info=True)


plugin()
