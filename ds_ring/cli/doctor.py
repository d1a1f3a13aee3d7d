"""Look for what stands in the way of a run here: packages, launcher, port, hosts, GPUs, kernels and, with --config or
--model, the configuration. Starts nothing.

    python launch/doctor.py --config ds_configs/gpu2/ring2.json --hostfile hosts

The last line of standard output is one JSON document; the exit code is 2 where there is a problem.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_ring.cli import options


def work(args: argparse.Namespace) -> dict[str, Any]:
    from ds_ring.cli import doctor
    from ds_ring.errors import ConfigError
    from ds_ring.utils import results

    run = options.run_config(args) if args.config or args.model else None
    findings = doctor.examine(run, args.hostfile, args.master_port)
    doctor.show(findings)
    found = doctor.document(findings)
    if found["problems"]:
        if args.output:
            results.write_json(args.output, found)
        print(json.dumps(found), flush=True)
        raise ConfigError(f"{found['problems']} of {len(findings)} checks found a problem")
    return found


if __name__ == "__main__":
    parser = options.run_parser(__doc__)
    parser.add_argument("--hostfile", metavar="FILE", help="as for the deepspeed launcher")
    parser.add_argument("--master-port", type=int, default=29500, metavar="N", help="the launcher's port [29500]")
    options.main(work, parser)
