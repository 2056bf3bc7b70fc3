"""The identity of LoRA adapters: what a worker has loaded, and whether that is what lies on disk now.

vLLM names an adapter by name and path. Both may stay while the files are exchanged, and files may be exchanged while
the old adapter is still loaded. So each worker notes what it loads (`Loads`), and the scheduler's side (`Adapters`)
gives an adapter an identity only while every rank has loaded exactly what its files hold now. Everything else is a
doubt, and a request with a doubtful adapter is neither stored nor loaded.
"""

import hashlib
import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from kvcellar.content import DIGEST_BYTES, ChangedError, Stamp, digest_files
from kvcellar.weights import NEUTRAL_FILES, matches

logger = init_logger(f"vllm.{__name__}")

BASE: Final = b""
NOT_YET: Final = "not yet"
# Adapters of which a worker remembers what it loaded, and directories of which digests are
# remembered.
ADAPTERS_MAX = 4096
FILES_MAX = 256
# How often a request may be told to wait for the first report: workers that never report stop
# nobody.
ASKS_MAX = 1000
# Time stamps of a file system are no finer than its clock's ticks: what was written just now may be
# written again without one changing.
_SETTLED_NS = 100_000_000

_digests: "OrderedDict[Path, tuple[tuple[tuple[str, Stamp], ...], bytes]]" = OrderedDict()


@dataclass(frozen=True)
class RankLoads:
    """What one rank has loaded.

    Attributes:
        epoch: grows when loads may have been missed; whatever was known before is void.
        loaded: by adapter number, the digest of its files, or `None` where it cannot be known.
        since: the step after which the rank told last; what is new was loaded after that step.
    """

    epoch: int
    loaded: dict[int, bytes | None]
    since: int = 0


@dataclass(frozen=True)
class AdapterReport:
    """What ranks have loaded, each one's whole state.

    Attributes:
        ranks: by rank.
    """

    ranks: dict[int, RankLoads]


def digest(path: str) -> bytes | None:
    """What an adapter's files hold, 16 bytes; `None` where that cannot be known.

    Remembered as long as no file's stamp changes: a few `stat` calls then.
    """
    folder = _local(path)
    if folder is None:
        return None
    try:
        stamps = _stamps(folder)
        known = _digests.get(folder)
        if known is not None and known[0] == stamps:
            return known[1]
        found = digest_files((name, folder / name) for name, _ in stamps)
        if _stamps(folder) != stamps:
            return None
    except (OSError, ChangedError, ValueError):
        return None
    if time.time_ns() - max(max(stamp.modified_ns, stamp.changed_ns) for _, stamp in stamps) > _SETTLED_NS:
        _digests[folder] = (stamps, found)
        while len(_digests) > ADAPTERS_MAX:
            _digests.popitem(last=False)
    return found


def _local(path: str) -> Path | None:
    """The folder that vLLM loads for this path, if it is there already."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if folder.is_absolute() or os.environ.get("VLLM_USE_MODELSCOPE", "0").lower() in ("1", "true"):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (OSError, ValueError):
        return None


def _stamps(folder: Path) -> tuple[tuple[str, Stamp], ...]:
    """The adapter's files by name.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds nothing, or far too much for an adapter.
    """
    names = [entry.name for entry in os.scandir(folder) if entry.is_file() and not matches(entry.name, NEUTRAL_FILES)]
    if not 0 < len(names) <= FILES_MAX:
        raise ValueError(f"{folder} has {len(names)} files")
    return tuple((name, Stamp.of((folder / name).stat())) for name in sorted(names))


def of_request(request: Any) -> bytes | None:
    """What the files at a request's path hold; `None` for adapters that come in another way than from there."""
    if type(request) is not LoRARequest or not request.lora_path:
        return None
    content = digest(request.lora_path)
    if content is None or not getattr(request, "is_3d_lora_weight", False):
        return content
    # The same files, read as weights of another form.
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES, person=b"3d").digest()


@dataclass
class Loads:
    """A worker's notes of what it loads. One of them a process: vLLM's loading is a function of a class."""

    _by_manager: "weakref.WeakKeyDictionary[Any, OrderedDict[int, bytes | None]]" = field(
        default_factory=weakref.WeakKeyDictionary
    )
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _epoch: int = 0
    _changed: bool = True
    _told: int = 0
    _installed: Callable[..., Any] | None = None

    def observe(self) -> None:
        """Look on at vLLM's loading from now on. May be called again; never raises into vLLM.

        Somebody else may have put a function of their own in our place meanwhile (RL frameworks load adapters from
        memory so): then what was noted is void, and theirs is looked on at.
        """
        try:
            from vllm.lora.worker_manager import WorkerLoRAManager

            present = WorkerLoRAManager._load_adapter
        except (ImportError, AttributeError):
            logger.warning_once(
                "KV Cellar: this vLLM loads LoRA adapters in an unknown way, so their KV is neither kept nor loaded."
            )
            return
        if present is self._installed:
            return
        with self._lock:
            if self._installed is not None:
                self._forget()
            self._installed = _observed(present, self)
        WorkerLoRAManager._load_adapter = self._installed

    def _forget(self) -> None:
        self._by_manager.clear()
        self._epoch += 1
        self._changed = True

    def note(self, manager: Any, number: int, content: bytes | None) -> None:
        """A worker's manager has loaded (or may have loaded, with `None`) an adapter."""
        with self._lock:
            notes = self._by_manager.setdefault(manager, OrderedDict())
            notes[number] = content
            notes.move_to_end(number)
            while len(notes) > ADAPTERS_MAX:
                notes.popitem(last=False)
            self._changed = True

    def take_report(self, rank: int, step: int) -> AdapterReport | None:
        """This rank's state if it changed since the last call; the first call always returns one.

        Args:
            rank: this worker's.
            step: the number of the step that has just been computed.
        """
        self.observe()
        with self._lock:
            since, self._told = self._told, step
            if not self._changed:
                return None
            self._changed = False
            # Two engines in one process share the class, and numbers of adapters are each engine's
            # own.
            managers = list(self._by_manager.values())
            loaded = dict(managers[0]) if len(managers) == 1 else {}
            return AdapterReport({rank: RankLoads(self._epoch, loaded, since)})


LOADS: Final = Loads()


def _observed(load: Callable[..., Any], loads: Loads) -> Callable[..., Any]:
    """vLLM's loading with a look at the files before and after it."""

    def load_adapter(manager: Any, lora_request: Any, *args: Any, **kwargs: Any) -> Any:
        before = _quietly(lambda: of_request(lora_request))
        # vLLM loads first and puts the new adapter in its place later: one that cannot be loaded
        # changes nothing.
        loaded = load(manager, lora_request, *args, **kwargs)
        _quietly(lambda: loads.note(manager, lora_request.lora_int_id, None))
        after = _quietly(lambda: of_request(lora_request))
        if before is not None and before == after:
            _quietly(lambda: loads.note(manager, lora_request.lora_int_id, before))
        return loaded

    return load_adapter


def _quietly(look: Callable[[], bytes | None]) -> bytes | None:
    """What was seen; nothing, and a line in the log, where looking failed."""
    try:
        return look()
    except Exception:
        logger.exception("KV Cellar: a LoRA adapter could not be looked at; its KV is neither kept nor loaded")
        return None


class Adapters:
    """The scheduler's side: which adapter a request's KV belongs to."""

    def __init__(self, ranks: int) -> None:
        """Args: ranks: how many workers report."""
        self._ranks = ranks
        self._reported: dict[int, RankLoads] = {}
        self._given: dict[int, bytes] = {}
        # What ranks have ever loaded as an adapter, and the numbers that a name has stood for.
        self._contents: dict[int, set[bytes | None]] = {}
        self._numbers: dict[str, set[int]] = {}
        self._missed = False
        self._asked = 0
        # Requests that finished while steps with them may still be under way: the adapter's number,
        # their last step.
        self._finished: deque[tuple[int, int]] = deque()

    def confirm(self, report: AdapterReport) -> frozenset[int]:
        """Ranks have told what they loaded.

        Returns:
            Adapters that turned out to be another one than `identity` had said: what was stored with them since then
            may be wrong and has to be dropped.

        """
        before, self._reported = self._reported, {**self._reported, **report.ranks}
        missed = any(rank in before and before[rank].epoch != now.epoch for rank, now in report.ranks.items())
        wrong = {number for number, given in self._given.items() if missed or self._contradicts(number, given)}
        self._missed = self._missed or missed
        for rank in report.ranks.values():
            for number, content in rank.loaded.items():
                self._contents.setdefault(number, set()).add(content)
        self._bound()
        present = {number for rank in self._reported.values() for number in rank.loaded}
        self._given = {number: given for number, given in self._given.items() if number in present - wrong}
        return frozenset(wrong)

    def finished(self, number: int, last_step: int) -> None:
        """A request with this adapter has finished; ``last_step`` is the last one it was scheduled in."""
        self._finished.append((number, last_step))

    def heard_until(self, step: int) -> None:
        """Every rank has told what it loaded before this step's end: requests that ended before are settled."""
        while self._finished and self._finished[0][1] <= step:
            self._finished.popleft()

    def finished_since(self, numbers: Collection[int], step: int) -> bool:
        """Whether a request with one of these adapters was computed after this step, and has finished."""
        return any(number in numbers and last_step > step for number, last_step in self._finished)

    def _contradicts(self, number: int, given: bytes) -> bool:
        return any(rank.loaded.get(number, given) != given for rank in self._reported.values())

    def _bound(self) -> None:
        if max(len(self._contents), len(self._numbers)) > ADAPTERS_MAX:
            # What is forgotten is a doubt.
            self._missed = True
            self._contents.clear()
            self._numbers.clear()

    def is_mixed(self, request: LoRARequest) -> bool:
        """Whether blocks in vLLM's own cache under this adapter's name may be another one's.

        vLLM hashes the name, whatever was loaded under it. It computes on from such blocks, so that nothing that
        begins with them may be kept. Once true, it stays true: nobody tells when vLLM's cache was emptied.
        """
        contents = {
            content for number in self._numbers.get(request.name, ()) for content in self._contents.get(number, ())
        }
        return self._missed or len(contents) > 1 or None in contents

    def identity(self, request: LoRARequest | None) -> bytes | Literal["not yet"] | None:
        """What the KV of a request belongs to.

        Returns:
            16 bytes; nothing (`BASE`) for a request without an adapter; `NOT_YET` until every rank has reported once
            (for `ASKS_MAX` times at most); `None` for a doubt: the request must be neither stored nor loaded.

        """
        if request is None:
            return BASE
        self._numbers.setdefault(request.name, set()).add(request.lora_int_id)
        if len(self._reported) < self._ranks:
            self._asked += 1
            return NOT_YET if self._asked <= ASKS_MAX else None
        loaded = {rank.loaded.get(request.lora_int_id) for rank in self._reported.values()}
        (only,) = loaded if len(loaded) == 1 else (None,)
        if only is None or of_request(request) != only:
            return None
        self._given[request.lora_int_id] = only
        return only
