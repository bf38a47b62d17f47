"""What every command needs and nobody has to read to understand RealDPO. Imports no file of the story."""
import os, sys

# OpenMP's threads spin for each other before they sleep, 300,000 times by default. With a busy neighbour on the same
# cores, that makes a step take up to fifty times as long. The number is read when torch is loaded, so every command
# imports this package before torch.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if os.name == "nt":
    sys.exit("error: this needs Linux or macOS; on Windows, run it in WSL")

class UserError(ValueError):
    """A mistake that only the user can mend. The commands print it as one line and exit with status 1."""
