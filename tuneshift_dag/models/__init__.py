"""Weights: where they are, what they are, how they are loaded. Nothing here decodes or trains."""

import logging

# On some CPUs it tells every process to install a package for a kernel that isn't used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
