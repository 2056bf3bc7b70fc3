//! What entry points return: small typed objects.

use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyBytes, PyDict, PyList};

use kvcellar_block::{BlockHash, Tier};
use kvcellar_engine::event_log::Run;
use kvcellar_engine::gpu::worker::CopyStats;
use kvcellar_engine::tier::{StatsDelta, TenantDelta, engine, opening};

/// The pool an engine got.
#[pyclass(frozen, get_all, module = "kvcellar._native")]
pub(super) struct PoolReport {
    /// The pool file.
    pub(super) path: String,
    /// Slots in it.
    pub(super) slots: u32,
    /// Bytes of a slot.
    pub(super) slot_bytes: u64,
    /// Bytes of the file.
    pub(super) bytes: u64,
    /// Those of them that lie in huge pages.
    pub(super) huge_bytes: u64,
    /// What bounded its size.
    pub(super) bound: String,
    /// Blocks taken over from an earlier engine.
    pub(super) adopted_blocks: u64,
    /// Pools of the same namespace that others hold.
    pub(super) taken: Vec<String>,
    /// What the user should know and can change, each with its remedy.
    pub(super) warnings: Vec<String>,
    /// What was removed for its room.
    pub(super) removed: Vec<String>,
    /// The store below it, if there is one.
    pub(super) disk: Option<DiskReport>,
}

/// The nvme tier an engine got.
#[pyclass(frozen, get_all, module = "kvcellar._native")]
#[derive(Clone)]
pub(super) struct DiskReport {
    /// The store's directory.
    path: String,
    /// Blocks it can hold.
    extents_max: u32,
    /// Blocks that survived.
    blocks: u64,
    /// How they were found: `fresh`, `snapshot` or `scan`.
    recovery: &'static str,
    /// Extents whose descriptor was not whole.
    damaged: u64,
    /// `io_uring` or `threads`.
    engine: &'static str,
    /// `O_DIRECT` is in use.
    direct: bool,
    /// Memory is registered with the kernel.
    registered: bool,
    /// Why the device is used in this way and not a better one.
    engine_why: String,
    /// Why transfers pass through huge pages; empty where they go directly.
    staging: String,
    /// Stores of the same namespace that others hold.
    taken: Vec<String>,
    /// What else there is to say.
    why: String,
    /// Stores that nobody used and that went for this one.
    removed: Vec<String>,
    /// What somebody should know, with the remedy.
    warnings: Vec<String>,
}

/// What a reset of the caches did.
#[pyclass(frozen, get_all, module = "kvcellar._native")]
pub(super) struct ResetReport {
    /// Blocks of the dram tier that are gone.
    blocks_dropped_dram: u64,
    /// Blocks of the nvme tier that are gone.
    blocks_dropped_nvme: u64,
    /// Bytes of both.
    bytes: u64,
    /// `on_reset` is `keep`: nothing was dropped.
    kept: bool,
}

impl From<engine::ResetReport> for ResetReport {
    fn from(report: engine::ResetReport) -> Self {
        let engine::ResetReport { blocks_dropped_dram, blocks_dropped_nvme, bytes, kept } = report;
        Self { blocks_dropped_dram, blocks_dropped_nvme, bytes, kept }
    }
}

/// What a request has forgotten.
#[pyclass(frozen, get_all, module = "kvcellar._native")]
pub(super) struct ForgetReport {
    /// Blocks that lookups found in the dram tier.
    dram_blocks: u64,
    /// Blocks that lookups found in the nvme tier.
    nvme_blocks: u64,
    /// Slots that were overwritten.
    slots_erased: u64,
    /// Extents that were overwritten.
    extents_erased: u64,
    /// Bytes of both.
    bytes_erased: u64,
    /// Extents that could not be overwritten.
    failed: u64,
}

impl From<kvcellar_engine::tier::ForgetReport> for ForgetReport {
    fn from(report: kvcellar_engine::tier::ForgetReport) -> Self {
        let kvcellar_engine::tier::ForgetReport {
            dram_blocks,
            nvme_blocks,
            slots_erased,
            extents_erased,
            bytes_erased,
            failed,
        } = report;
        Self { dram_blocks, nvme_blocks, slots_erased, extents_erased, bytes_erased, failed }
    }
}

impl From<opening::DiskReport> for DiskReport {
    fn from(report: opening::DiskReport) -> Self {
        let opening::DiskReport {
            path,
            extents_max,
            blocks,
            recovery,
            damaged,
            disk,
            staging,
            taken,
            why,
            removed,
            warnings,
        } = report;
        Self {
            path,
            extents_max,
            blocks,
            recovery,
            damaged,
            engine: disk.engine,
            direct: disk.direct,
            registered: disk.registered,
            engine_why: disk.why,
            staging,
            taken,
            why,
            removed,
            warnings,
        }
    }
}

/// Name of a tier as the connector knows it.
fn tier_name(tier: Tier) -> &'static str {
    match tier {
        Tier::Dram => "dram",
        Tier::Nvme => "nvme",
    }
}

/// Blocks that follow one another in a prefix became available.
#[pyclass(frozen, get_all, module = "kvcellar._native")]
pub(super) struct StoredRun {
    tier: &'static str,
    group: u16,
    parent: Option<Py<PyAny>>,
    hashes: Py<PyList>,
    tokens: Py<PyList>,
    lora_name: Option<String>,
    extra: Option<Py<PyList>>,
}

/// Blocks are gone.
#[pyclass(frozen, get_all, module = "kvcellar._native")]
pub(super) struct RemovedRun {
    tier: &'static str,
    group: u16,
    hashes: Py<PyList>,
}

fn external<'py>(py: Python<'py>, hash: &BlockHash, integers: bool) -> PyResult<Bound<'py, PyAny>> {
    if integers {
        return Ok(hash.low_u64().into_pyobject(py)?.into_any());
    }
    Ok(PyBytes::new(py, hash.as_bytes()).into_any())
}

fn external_list(py: Python<'_>, hashes: &[BlockHash], integers: bool) -> PyResult<Py<PyList>> {
    let items = hashes.iter().map(|hash| external(py, hash, integers)).collect::<PyResult<Vec<_>>>()?;
    Ok(PyList::new(py, items)?.unbind())
}

/// A run as a Python object.
pub(super) fn run_object(py: Python<'_>, run: Run, integers: bool) -> PyResult<Py<PyAny>> {
    Ok(match run {
        Run::Stored { tier, group, parent, hashes, tokens, lora, extra } => {
            let extra = extra.map(|blocks| PyList::new(py, blocks.iter().map(|block| PyBytes::new(py, block))));
            let stored = StoredRun {
                tier: tier_name(tier),
                group: group.0,
                parent: parent.map(|parent| external(py, &parent, integers)).transpose()?.map(Bound::unbind),
                hashes: external_list(py, &hashes, integers)?,
                tokens: PyList::new(py, tokens)?.unbind(),
                lora_name: (!lora.is_empty()).then(|| lora.into_string()),
                extra: extra.transpose()?.map(Bound::unbind),
            };
            Py::new(py, stored)?.into_any()
        }
        Run::Removed { tier, group, hashes } => Py::new(
            py,
            RemovedRun { tier: tier_name(tier), group: group.0, hashes: external_list(py, &hashes, integers)? },
        )?
        .into_any(),
    })
}

/// What changed in the tier engine since the last look.
#[pyclass(frozen, get_all, module = "kvcellar._native")]
pub(super) struct EngineStats {
    /// Growth of counters, by name.
    counters: Py<PyDict>,
    /// Dropped blocks, by reason.
    dropped: Py<PyDict>,
    /// Gauges, by name.
    gauges: Py<PyDict>,
    /// Durations of lookups, in seconds.
    lookup_seconds: Py<PyList>,
    /// By tenant, where there are any: growth of its counters, and its blocks by tier.
    tenants: Py<PyDict>,
}

impl EngineStats {
    /// The differences as Python's plain data.
    pub(super) fn new(py: Python<'_>, delta: StatsDelta) -> PyResult<Self> {
        let StatsDelta { counters, seconds, dropped, gauges, lookup_seconds, tenants } = delta;
        let of_tenants = PyDict::new(py);
        for TenantDelta { name, counters, blocks } in tenants {
            of_tenants.set_item(name, (counters.into_py_dict(py)?, blocks.into_py_dict(py)?))?;
        }
        let counters = counters.into_py_dict(py)?;
        for (name, amount) in seconds {
            counters.set_item(name, amount)?;
        }
        Ok(Self {
            counters: counters.unbind(),
            dropped: dropped.into_py_dict(py)?.unbind(),
            gauges: gauges.into_py_dict(py)?.unbind(),
            lookup_seconds: PyList::new(py, lookup_seconds)?.unbind(),
            tenants: of_tenants.unbind(),
        })
    }
}

/// What a copy worker did since the last look.
#[pyclass(frozen, get_all, module = "kvcellar._native")]
pub(super) struct CopyReport {
    offload_bytes: u64,
    load_bytes: u64,
    offload_seconds: f64,
    load_seconds: f64,
    verified_blocks: u64,
    mismatched_blocks: u64,
    followed_loads: u64,
    overlapped_loads: u64,
}

impl From<CopyStats> for CopyReport {
    fn from(stats: CopyStats) -> Self {
        Self {
            offload_bytes: stats.offload_bytes,
            load_bytes: stats.load_bytes,
            offload_seconds: stats.offload_seconds,
            load_seconds: stats.load_seconds,
            verified_blocks: stats.verified_blocks,
            mismatched_blocks: stats.mismatched_blocks,
            followed_loads: stats.followed_loads,
            overlapped_loads: stats.overlapped_loads,
        }
    }
}
