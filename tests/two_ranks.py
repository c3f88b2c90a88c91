"""A command as two ranks of a ring on this machine: ``python two_ranks.py PORT COMMAND …``. Ends with 1 if
either fails, and with both once `LONGEST_S` are over. The launcher of MLX polls its processes without a
pause, which takes a core of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

LONGEST_S = 280.0
"""Below the limits of the tests: what ends this process alone would leave the ranks alive."""


def main(port: int, *command: str) -> int:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as hosts:
        json.dump([[f"127.0.0.1:{port + rank}"] for rank in range(2)], hosts)
        hosts.flush()
        environ = os.environ | {"MLX_HOSTFILE": hosts.name}
        ranks = [subprocess.Popen(command, env=environ | {"MLX_RANK": str(rank)}) for rank in range(2)]
        ends = time.monotonic() + LONGEST_S
        try:
            return int(any([rank.wait(max(0.0, ends - time.monotonic())) for rank in ranks]))
        finally:
            for rank in ranks:
                rank.kill()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
