"""Run a command on the first of several hosts that this machine plays, with a hostfile of all of them.

    python launch/local_hosts.py --hosts 2 --slots 2 -- deepspeed --quiet --hostfile HOSTFILE launch/score.py …

HOSTFILE stands for the hostfile's path. Hosts are network namespaces with an sshd each; Linux, root, openssh-server,
pdsh and iproute2 are needed. When the command ends, they and all that runs on them are gone.
"""

from __future__ import annotations

import subprocess
import sys

from ds_ring.cli.parser import Parser, whole
from ds_ring.errors import UserError
from ds_ring.testing.local_hosts import LocalHosts

MOST_HOSTS = 250
"""Hosts of one network of 8 bits."""


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument(
        "--hosts", type=whole(1, MOST_HOSTS), default=2, metavar="N", help="hosts, named host1 and so on [2]"
    )
    parser.add_argument("--slots", type=whole(1), default=1, metavar="N", help="ranks of each host [1]")
    parser.add_argument("command", nargs="+", metavar="WORD", help="the command, after --")
    return parser


def main() -> None:
    try:
        args = make_parser().parse_args()
        with LocalHosts([f"host{number + 1}" for number in range(args.hosts)], args.slots) as hosts:
            words = [str(hosts.hostfile) if word == "HOSTFILE" else word for word in args.command]
            code = subprocess.run(hosts.command(hosts.names[0], words)).returncode
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
