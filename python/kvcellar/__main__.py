"""The ``kvcellar`` command, as installed by pip."""

import sys

from kvcellar import command


def _about_vllm() -> list[str]:
    """What only Python knows: which vLLM is installed here, and whether this package was made for it."""
    from kvcellar import UnsupportedError, window

    try:
        found = window.vllm_version()
    except ImportError:
        oldest, newest = (".".join(map(str, version)) for version in (window.OLDEST, window.NEWEST))
        return ["--vllm-missing", f"Where an engine is to run, install vLLM {oldest} to {newest} beside this package"]
    try:
        window.check(found)
    except UnsupportedError as error:
        return ["--vllm", found, "--vllm-problem", str(error)]
    return ["--vllm", found]


def _about_nvrtc() -> list[str]:
    from kvcellar import nvrtc

    return [argument for library in nvrtc.libraries() for argument in ("--nvrtc", library)]


def main() -> None:
    """Run the command with the process's arguments and exit with its code."""
    args = sys.argv[1:]
    if args[:2] == ["bench", "lookup"]:
        # This one also measures the way through Python, and vLLM's own manager.
        from kvcellar import bench_lookup

        sys.exit(bench_lookup.main(args[2:]))
    if args[:2] == ["bench", "nvme"]:
        # This one also measures vLLM's own tier of files.
        from kvcellar import bench_nvme

        sys.exit(bench_nvme.main(args[2:]))
    if args[:1] == ["doctor"]:
        args += [*_about_vllm(), *_about_nvrtc()]
    if args[:2] == ["bench", "dma"] and "--nvrtc" not in args:
        args += _about_nvrtc()
    command.become(args)


if __name__ == "__main__":
    main()
