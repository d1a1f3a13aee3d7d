"""Look for what stands in the way of a run here: packages, launcher, port, hosts, GPUs, kernels and, with --config or
--model, the configuration. Starts nothing.

    ds-ring doctor --config ds_configs/gpu2/ring2.json --hostfile hosts

The last line of standard output is one JSON document; the exit code is 2 where there is a problem.
"""

from __future__ import annotations

import argparse
from typing import Any

from ds_ring.cli import options


def work(args: argparse.Namespace) -> dict[str, Any]:
    from ds_ring.cli import doctor_checks, findings
    from ds_ring.errors import ConfigError
    from ds_ring.utils import results, strict_json

    run = options.run_config(args) if args.config or args.model else None
    found = doctor_checks.examine(run, args.hostfile, args.master_port)
    findings.show(found)
    document = findings.document(found)
    if document["problems"]:
        if args.output:
            results.write_json(args.output, document)
        print(strict_json.dumps(document), flush=True)
        raise ConfigError(f"{document['problems']} of {len(found)} checks found a problem")
    return document


def main() -> None:
    parser = options.run_parser(__doc__)
    parser.add_argument("--hostfile", metavar="FILE", help="as for the deepspeed launcher")
    parser.add_argument("--master-port", type=int, default=29500, metavar="N", help="the launcher's port [29500]")
    options.main(work, parser)


if __name__ == "__main__":
    main()
