"""The load: conversations that outgrow vLLM's cache, then prompts timed from each source, also after a restart."""

from collections.abc import Callable

from rich.console import Console

from quickstart_lib import measurements as sources
from quickstart_lib.arguments import Arguments
from quickstart_lib.cache_size import BLOCK_TOKENS, conversation_label, probe_extra_tokens
from quickstart_lib.client import Answer, Client
from quickstart_lib.conversations import Writer
from quickstart_lib.failure import QuickstartError
from quickstart_lib.measurements import Measurements
from quickstart_lib.metrics import NO_HITS, HitCounter, Hits, Metrics
from quickstart_lib.progress import Phase


class Load:
    """Sends everything, one request at a time, so that every hit belongs to exactly one request."""

    def __init__(self, arguments: Arguments, client: Client, writer: Writer, console: Console) -> None:
        self._arguments = arguments
        self._client = client
        self._writer = writer
        self._console = console
        self._hits = HitCounter(client.metrics_text)
        self.measured = Measurements()
        self._probes: list[tuple[list[int], Answer]] = []

    def reconnect(self, client: Client) -> None:
        """Go on with another server."""
        self._client = client
        self._hits = HitCounter(client.metrics_text)

    def warm_up(self, start: int) -> None:
        """Two unmeasured prompts: the first requests of a process pay for lazily made buffers."""
        for index in range(2):
            self._send(self._writer.opening(f"W{start}-{index}", self._arguments.opening_tokens))

    def play_conversations(self, gpu_blocks_removed: Callable[[], int]) -> None:
        """Turn by turn over all conversations; between two turns of one, the others push it out of vLLM's cache. Then
        every final prompt once more, by then evicted, to compare with the answer its GPU-cache hit gave.
        """
        arguments = self._arguments
        removed_before = gpu_blocks_removed()
        prompts = {
            label: self._writer.opening(label, arguments.opening_tokens)
            for label in map(conversation_label, range(arguments.conversations))
        }
        references: dict[str, Answer] = {}
        with Phase(self._console, "conversations", arguments.conversations * (arguments.turns + 2)) as phase:
            for turn in range(arguments.turns):
                for label in list(prompts):
                    last_turn = turn + 1 == arguments.turns
                    answer = self._play_turn(prompts[label], turn)
                    phase.advance()
                    if last_turn:
                        references[label] = self._send(prompts[label])
                        phase.advance()
                    else:
                        prompts[label] = (
                            prompts[label] + list(answer.token_ids) + self._writer.follow_up(label, turn + 1)
                        )
            for label, prompt in prompts.items():
                self._ask_tier(f"conversation {label}", prompt, references[label], sources.EVICTED_HIT)
                phase.advance()
        self.measured.gpu_blocks_evicted = gpu_blocks_removed() - removed_before

    def time_sources(self) -> None:
        """Each probe prompt three times: cold, at once again, and after vLLM's own cache was emptied."""
        arguments = self._arguments
        with Phase(self._console, "cold, GPU hit, DRAM hit", 3 * arguments.probes) as phase:
            for index in range(arguments.probes):
                prompt = self._writer.opening(f"P{index}", arguments.probe_tokens + probe_extra_tokens(index))
                self._send_cold(prompt)
                phase.advance()
                reference = self._send(prompt)
                if reference.cached_tokens == 0:
                    raise QuickstartError("a prompt sent twice did not hit vLLM's own prefix cache")
                self.measured.record(sources.GPU_HIT, prompt, reference)
                self._probes.append((prompt, reference))
                phase.advance()
                self._client.reset_prefix_cache()
                self._ask_tier(f"probe {index}", prompt, reference, sources.DRAM_HIT)
                phase.advance()

    def time_nvme(self) -> None:
        """The probes again, after prompts that fill the whole DRAM tier have pushed them out of it."""
        arguments = self._arguments
        blocks = Metrics(self._client.metrics_text()).slots()
        count = -(-blocks * BLOCK_TOKENS // arguments.probe_tokens) + 1
        with Phase(self._console, "NVMe hit", count + len(self._probes)) as phase:
            for index in range(count):
                self._send(self._writer.opening(f"F{index}", arguments.probe_tokens))
                phase.advance()
            self._ask_probes(sources.NVME_HIT, phase)

    def time_restarted(self) -> None:
        """The probes once more: the server is new, its memory was removed, what it knows came from the disk."""
        with Phase(self._console, "hit after restart", len(self._probes)) as phase:
            self._ask_probes(sources.RESTART_HIT, phase)

    def _ask_probes(self, source: str, phase: Phase) -> None:
        for index, (prompt, reference) in enumerate(self._probes):
            self._client.reset_prefix_cache()
            self._ask_tier(f"probe {index}", prompt, reference, source)
            phase.advance()

    def _play_turn(self, prompt: list[int], turn: int) -> Answer:
        if turn == 0:
            return self._send_cold(prompt, source=sources.OPENING)
        answer, hits = self._send_counting(prompt)
        self.measured.record(sources.RESUMED, prompt, answer, hits)
        return answer

    def _ask_tier(self, name: str, prompt: list[int], reference: Answer, source: str) -> None:
        answer, hits = self._send_counting(prompt)
        if not self._arguments.with_kvcellar:
            recomputed = sources.RECOMPUTED if source == sources.DRAM_HIT else sources.EVICTED_RECOMPUTED
            self.measured.record(recomputed, prompt, answer)
            return
        tier = "nvme" if source in (sources.NVME_HIT, sources.RESTART_HIT) else "dram"
        if getattr(hits, tier) == 0:
            self.measured.empty_hits.append(
                f"{name}, {source}: {answer.cached_tokens} tokens cached, none of them from the {tier} tier"
            )
            return
        self.measured.record(source, prompt, answer, hits)
        self.measured.compare(name, reference, answer)

    def _send_cold(self, prompt: list[int], source: str = sources.COLD) -> Answer:
        answer = self._send(prompt)
        if answer.cached_tokens:
            raise QuickstartError(f"a prompt meant to be cold had {answer.cached_tokens} tokens cached")
        self.measured.record(source, prompt, answer)
        return answer

    def _send_counting(self, prompt: list[int]) -> tuple[Answer, Hits]:
        if not self._arguments.with_kvcellar:
            return self._send(prompt), NO_HITS
        self._hits.mark()
        answer = self._send(prompt)
        return answer, self._hits.tokens_since_last()

    def _send(self, prompt: list[int]) -> Answer:
        return self._client.complete(prompt, self._arguments.output_tokens)
