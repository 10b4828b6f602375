"""`dllm-hf export`."""

import argparse
import sys

from ..hub import export as export_repository
from ..hub import export_loop, push


def export(arguments: argparse.Namespace) -> int:
    if arguments.private and not arguments.push:
        raise ValueError("--private is about the repository that --push makes: give --push REPO as well.")
    if arguments.source == "custom_generate":
        out = export_loop(arguments.out)
    else:
        out = export_repository(arguments.source, arguments.out, arguments.config_only, name=arguments.push)
    print(f"Written: {out}")
    if arguments.push:
        print(f"Publishing {out} as {arguments.push} ...", file=sys.stderr)
        print(f"Published: {push(out, arguments.push, private=arguments.private or None)}")
    return 0
