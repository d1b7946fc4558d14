"""`python -m cel_dist.launcher LAUNCH SIGNAL` signals the ranks of a launch on this node for another one."""

import sys

from cel_dist.launcher.ranks import signal_ranks

if __name__ == "__main__":
    sys.exit(0 if signal_ranks(sys.argv[1], int(sys.argv[2])) else 1)
