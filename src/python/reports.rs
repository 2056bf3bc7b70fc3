//! What entry points return: small typed objects.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};

use crate::block::BlockHash;
use crate::events::Run;
use crate::gpu::worker::CopyStats;
use crate::tier::engine::StatsDelta;

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
    /// What bounded its size.
    pub(super) bound: String,
    /// Blocks taken over from an earlier engine.
    pub(super) adopted_blocks: u64,
    /// Pools of the same namespace that others hold.
    pub(super) taken: Vec<String>,
}

/// Blocks that follow one another in a prefix became available.
#[pyclass(frozen, get_all, module = "kvcellar._native")]
pub(super) struct StoredRun {
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
        Run::Stored { group, parent, hashes, tokens, lora, extra } => {
            let extra = extra.map(|blocks| PyList::new(py, blocks.iter().map(|block| PyBytes::new(py, block))));
            let stored = StoredRun {
                group: group.0,
                parent: parent.map(|parent| external(py, &parent, integers)).transpose()?.map(Bound::unbind),
                hashes: external_list(py, &hashes, integers)?,
                tokens: PyList::new(py, tokens)?.unbind(),
                lora_name: (!lora.is_empty()).then(|| lora.into_string()),
                extra: extra.transpose()?.map(Bound::unbind),
            };
            Py::new(py, stored)?.into_any()
        }
        Run::Removed { group, hashes } => {
            Py::new(py, RemovedRun { group: group.0, hashes: external_list(py, &hashes, integers)? })?.into_any()
        }
    })
}

/// What changed in the tier engine since the last look.
#[pyclass(frozen, get_all, module = "kvcellar._native")]
pub(super) struct EngineStats {
    /// Growth of counters: (name, amount).
    counters: Vec<(String, u64)>,
    /// Dropped blocks: (reason, amount).
    dropped: Vec<(String, u64)>,
    /// Gauges: (name, value).
    gauges: Vec<(String, u64)>,
    /// Durations of lookups, in seconds.
    lookup_seconds: Vec<f64>,
}

impl From<StatsDelta> for EngineStats {
    fn from(delta: StatsDelta) -> Self {
        let owned = |pairs: Vec<(&str, u64)>| pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Self {
            counters: owned(delta.counters),
            dropped: owned(delta.dropped),
            gauges: owned(delta.gauges),
            lookup_seconds: delta.lookup_seconds,
        }
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
}

impl From<CopyStats> for CopyReport {
    fn from(stats: CopyStats) -> Self {
        let CopyStats { offload_bytes, load_bytes, offload_seconds, load_seconds, verified_blocks, mismatched_blocks } =
            stats;
        Self { offload_bytes, load_bytes, offload_seconds, load_seconds, verified_blocks, mismatched_blocks }
    }
}
