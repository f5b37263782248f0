"""Train the original DALL-E."""

import os

# Threads of PyTorch's OpenMP wait for each other by spinning. With another busy process on the machine that made small
# training steps 20 to 40 times slower; giving up the processor after 3000 turns keeps most of their speed (5 times
# faster than the default beside four busy processes) and costs nothing on an idle machine. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
