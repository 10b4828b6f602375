"""`dllm-hf export`."""

import argparse

from dllm_hf.hub import export as export_repository
from dllm_hf.hub import export_loop, push

from .output import show, tell


def export(arguments: argparse.Namespace) -> int:
    if arguments.private and not arguments.push:
        raise ValueError("--private is about the repository that --push makes: give --push REPO as well.")
    if arguments.source == "custom_generate":
        out = export_loop(arguments.out, name=arguments.push)
    else:
        out = export_repository(arguments.source, arguments.out, arguments.config_only, name=arguments.push)
    show(f"Written: {out}")
    if arguments.push:
        tell(f"Publishing {out} as {arguments.push} ...")
        show(f"Published: {push(out, arguments.push, private=arguments.private or None)}")
    return 0
