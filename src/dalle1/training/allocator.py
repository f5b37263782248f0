"""Memory that is freed on a CPU and needed again in the next step."""

import ctypes
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Make the C library keep all memory that this process frees; False where it cannot be told to.

    By default glibc gives large tensors back to the system at once and gets them anew, page by page, in every step:
    up to a tenth of a step of the transformer with larger batches. The price is that memory of a peak stays with the
    process.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries than glibc have none
    if mallopt is None:
        return False
    # No large block gets a mapping of its own, which would end with it; and the heap never shrinks.
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
