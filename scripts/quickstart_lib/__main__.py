"""The quickstart: server, load, comparison, report. Exit status 0 only when everything it claims was seen."""

import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from quickstart_lib.arguments import MODEL, SERVER_LOG, WORKING_SET_RATIO_MIN, Arguments, parse
from quickstart_lib.data_type import DataType
from quickstart_lib.disaggregated.arguments import DisaggregatedArguments
from quickstart_lib.disaggregated.arguments import parse as parse_disaggregated
from quickstart_lib.failure import QuickstartError
from quickstart_lib.fleet.arguments import FleetArguments
from quickstart_lib.fleet.arguments import parse as parse_fleet

if TYPE_CHECKING:
    from rich.console import Console


def main() -> int:
    """Parse the command line first: `--help` needs none of the packages that the run imports."""
    arguments = parse_any(sys.argv[1:])
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if isinstance(arguments, FleetArguments):
            run_fleet(arguments)
        elif isinstance(arguments, DisaggregatedArguments):
            run_disaggregated(arguments)
        else:
            run(arguments)
    except QuickstartError as failure:
        print(f"\nquickstart failed: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nquickstart: interrupted; every server is stopped", file=sys.stderr)
        return 130
    return 0


def parse_any(argv: list[str]) -> Arguments | FleetArguments | DisaggregatedArguments:
    """Parse the command line of the comparison that is asked for; a bad value ends the program."""
    if "--fleet" in argv:
        return parse_fleet(argv)
    return parse_disaggregated(argv) if "--disaggregated" in argv else parse(argv)


def run(arguments: Arguments) -> None:
    """Play the load on a fresh server, show and write what was measured, then judge it.

    Raises:
        QuickstartError: something could not be measured, or what was measured is not what the project promises.
    """
    from quickstart_lib import cache_size, chart, folders, report, table
    from quickstart_lib.client import Client
    from quickstart_lib.conversations import Writer
    from quickstart_lib.load import Load
    from quickstart_lib.metrics import Metrics
    from quickstart_lib.server import MODEL_NAME, Server, command, connector_flag, free_port
    from quickstart_lib.subscriber import Subscriber

    console = open_console(arguments.data_type)
    writer = Writer(MODEL, arguments.seed)
    size = cache_size.plan(arguments, MODEL, writer)
    counters = []
    with (
        closing(Subscriber()) as subscriber,
        folders.in_memory("quickstart") as pool_dir,
        nvme_folder(arguments) as nvme_dir,
    ):
        # Both tiers lie in folders of this run alone: a second run must find its cold prompts cold.
        # Nothing of the server stays in memory, so that only the disk can answer after a restart.
        # Its disk tier is gone with this run: it may take the space that a lasting one leaves free.
        sizes = {"dram_size": arguments.dram_size, "nvme_size": arguments.nvme_size, "nvme_reserve": 0}
        tiers = connector_flag(**sizes, pool_dir=pool_dir, nvme_dir=nvme_dir) if arguments.with_kvcellar else None

        @contextmanager
        def serve(log: Path) -> Iterator[Client]:
            port = free_port()
            command_line = command(MODEL, port, size, {"endpoint": subscriber.endpoint, "topic": "kv-events"}, tiers)
            console.print(f"starting vLLM (about 30 s); its log: {log.name} in .cache")
            with (
                console.status("loading the model") as status,
                Server(command_line, port, log, lambda s: status.update(f"loading the model, {s:.0f} s")),
            ):
                status.stop()
                with closing(Client(port, MODEL_NAME)) as client:
                    yield client

        with serve(SERVER_LOG) as client:
            gpu_blocks = Metrics(client.metrics_text()).gpu_blocks() - cache_size.NULL_BLOCKS
            facts = report.CacheFacts(gpu_blocks * cache_size.BLOCK_TOKENS, size.working_set_tokens)
            if facts.ratio < WORKING_SET_RATIO_MIN:
                raise QuickstartError(f"vLLM took a larger KV cache than asked for: {facts.gpu_cache_tokens} tokens")
            load = Load(arguments, client, writer, console)
            load.warm_up(0)
            load.play_conversations(lambda: subscriber.removed_blocks("GPU"))
            load.time_sources()
            if arguments.with_kvcellar:
                load.time_nvme()
            counters.append(Metrics(client.metrics_text()).with_prefix("vllm:kvcellar"))
        if arguments.with_kvcellar:
            remove_pool(Path(pool_dir))
            with serve(SERVER_LOG.with_stem(SERVER_LOG.stem + "-restarted")) as client:
                load.reconnect(client)
                load.warm_up(1)
                load.time_restarted()
                counters.append(Metrics(client.metrics_text()).with_prefix("vllm:kvcellar"))
        events = subscriber.summary()
    result = report.build(arguments, load.measured, events, facts, counters)
    report.write(result, arguments.report)
    chart.write(load.measured, _footnote(result), arguments.chart)
    table.show(console, load.measured, result)
    console.print(f"report: {arguments.report}\nchart:  {arguments.chart}")
    judge(arguments, result, load.measured.empty_hits)


def run_fleet(arguments: FleetArguments) -> None:
    """Compare three ways to route on two fresh engines, show and write what was measured, then judge it.

    Raises:
        QuickstartError: as `run`.
    """
    from quickstart_lib.fleet import verdict

    verdict.run(arguments, open_console(arguments.data_type))


def run_disaggregated(arguments: DisaggregatedArguments) -> None:
    """Compare where the KV of a prompt comes from when prefill and decode are two engines.

    Raises:
        QuickstartError: as `run`.
    """
    from quickstart_lib.disaggregated import run as disaggregated

    disaggregated.run(arguments, open_console(arguments.data_type))


def open_console(data_type: DataType) -> "Console":
    """The terminal, with the first line on it: every time that follows depends on the data type."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    console.print(data_type.sentence())
    return console


def nvme_folder(arguments: Arguments) -> tempfile.TemporaryDirectory[str]:
    """A folder on a disk, removed with all it holds."""
    arguments.nvme_dir.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix="kvcellar-quickstart-", dir=arguments.nvme_dir.resolve())


def remove_pool(pool_dir: Path) -> None:
    """Remove what a server left of its memory: after a restart, only the disk can answer."""
    for path in pool_dir.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def judge(arguments: Arguments, result: dict[str, Any], empty_hits: list[str]) -> None:
    """Check what the run must have shown.

    Raises:
        QuickstartError: names everything that was not shown.
    """
    events = result["events"]
    checks = [
        (events["batches"] > 0, "no KV event arrived at all"),
        (result["gpu_blocks_evicted"] > 0, "the conversations evicted nothing from vLLM's cache"),
    ]
    if arguments.with_kvcellar:
        checks += [
            (result["dram_hit_tokens"] > 0, "no token came from the DRAM tier"),
            (result["nvme_hit_tokens"] > 0, "no token came from the NVMe tier"),
            (not empty_hits, "hits that were due did not come: " + "; ".join(empty_hits[:3])),
            (not result["differences"], "outputs differ: " + "; ".join(result["differences"][:2])),
        ]
        for medium in ("CPU", "STORAGE"):
            stored = events["by_medium"].get(medium, {}).get("events_stored", 0)
            checks.append((stored > 0, f"no BlockStored event with medium {medium} was seen"))
    faults = [fault for shown, fault in checks if not shown]
    if faults:
        raise QuickstartError("\n  - ".join(["not everything was shown:", *faults]))


def _footnote(result: dict[str, Any]) -> str:
    machine, dtype = result["machine"], result["load"]["dtype"]
    return (
        f"SmolLM2-135M in {dtype}, vLLM {machine['vllm']} on {machine['cores']} cores ({machine['cpu']}), no GPU; "
        f"vLLM's KV cache holds 1/{result['working_set_tokens'] / result['gpu_cache_tokens']:.1f} of the conversations"
    )


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
