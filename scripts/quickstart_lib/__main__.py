"""The quickstart: server, load, comparison, report. Exit status 0 only when everything it claims was seen."""

import signal
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

from quickstart_lib.arguments import MODEL, SERVER_LOG, WORKING_SET_RATIO_MIN, Arguments, parse
from quickstart_lib.failure import QuickstartError


def main() -> int:
    """Parse the command line first: `--help` needs none of the packages that the run imports."""
    arguments = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run(arguments)
    except QuickstartError as failure:
        print(f"\nquickstart failed: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nquickstart: interrupted; the server is stopped", file=sys.stderr)
        return 130
    return 0


def run(arguments: Arguments) -> None:
    """Play the load on a fresh server, show and write what was measured, then judge it.

    Raises:
        QuickstartError: something could not be measured, or what was measured is not what the project promises.
    """
    from rich.console import Console

    from quickstart_lib import cache_size, chart, report, table
    from quickstart_lib.client import Client
    from quickstart_lib.conversations import Writer
    from quickstart_lib.load import Load
    from quickstart_lib.metrics import Metrics
    from quickstart_lib.server import MODEL_NAME, Server, command, connector_flag, free_port
    from quickstart_lib.subscriber import Subscriber

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    writer = Writer(MODEL, arguments.seed)
    size = cache_size.plan(arguments, MODEL, writer)
    with closing(Subscriber()) as subscriber, pool_folder() as pool_dir:
        port = free_port()
        connector = connector_flag(arguments.dram_size, pool_dir) if arguments.with_kvcellar else None
        command_line = command(MODEL, port, size, subscriber.endpoint, connector)
        console.print(f"starting vLLM (about 30 s); its log: {SERVER_LOG.name} in .cache")
        with (
            console.status("loading the model") as status,
            Server(command_line, port, SERVER_LOG, lambda s: status.update(f"loading the model, {s:.0f} s")),
        ):
            status.stop()
            with closing(Client(port, MODEL_NAME)) as client:
                gpu_blocks = Metrics(client.metrics_text()).gpu_blocks() - cache_size.NULL_BLOCKS
                facts = report.CacheFacts(gpu_blocks * cache_size.BLOCK_TOKENS, size.working_set_tokens)
                if facts.ratio < WORKING_SET_RATIO_MIN:
                    raise QuickstartError(
                        f"vLLM took a larger KV cache than asked for: {facts.gpu_cache_tokens} tokens"
                    )
                load = Load(arguments, client, writer, console)
                load.warm_up()
                load.play_conversations(lambda: subscriber.removed_blocks("GPU"))
                load.time_sources()
                counters = Metrics(client.metrics_text()).with_prefix("vllm:kvcellar")
        events = subscriber.summary()
    result = report.build(arguments, load.measured, events, facts, counters)
    report.write(result, arguments.report)
    chart.write(load.measured, _footnote(result), arguments.chart)
    table.show(console, load.measured, result)
    console.print(f"report: {arguments.report}\nchart:  {arguments.chart}")
    judge(arguments, result, load.measured.empty_hits)


def pool_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder in shared memory (ordinary temporary storage where there is none), removed with all it holds."""
    shared_memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(
        prefix="kvcellar-quickstart-", dir=shared_memory if shared_memory.is_dir() else None
    )


def judge(arguments: Arguments, result: dict[str, Any], empty_hits: list[str]) -> None:
    """Check what the run must have shown.

    Raises:
        QuickstartError: names everything that was not shown.
    """
    faults = []
    if result["events"]["batches"] == 0:
        faults.append("no KV event arrived at all")
    if result["gpu_blocks_evicted"] == 0:
        faults.append("the conversations evicted nothing from vLLM's cache")
    if arguments.with_kvcellar:
        if result["dram_hit_tokens"] == 0:
            faults.append("no token came from the DRAM tier")
        if empty_hits:
            faults.append("DRAM hits that were due did not come: " + "; ".join(empty_hits[:3]))
        if result["differences"]:
            faults.append("outputs differ: " + "; ".join(result["differences"][:2]))
        if result["events"]["by_medium"].get("CPU", {}).get("events_stored", 0) == 0:
            faults.append("no BlockStored event with medium CPU was seen")
    if faults:
        raise QuickstartError("\n  - ".join(["not everything was shown:", *faults]))


def _footnote(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"SmolLM2-135M, vLLM {machine['vllm']} on {machine['cores']} cores ({machine['cpu']}), no GPU; "
        f"vLLM's KV cache holds 1/{result['working_set_tokens'] / result['gpu_cache_tokens']:.1f} of the conversations"
    )


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
