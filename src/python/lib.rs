//! The extension module `kvcellar._native`: parse, delegate, map errors. Nothing is decided here.
//!
//! Every entry point copies what it needs out of Python objects, then releases the GIL for the work
//! itself. A panic becomes an exception of the ordinary kind: vLLM must never die of one.

#![expect(clippy::needless_pass_by_value, reason = "PyO3 extracts arguments by value")]

mod engine;
mod errors;
mod inputs;
mod reports;
mod worker;

use std::time::Duration;

use pyo3::prelude::*;

use errors::guarded;
use kvcellar_block::error::Error;
use kvcellar_engine::config::{Config, Controls, UnsupportedGroups};

/// Typed configuration of one engine.
#[pyclass(frozen, name = "Config", module = "kvcellar._native")]
struct PyConfig {
    inner: Config,
}

#[pymethods]
impl PyConfig {
    /// Parses the JSON object a user wrote as `kv_connector_extra_config`.
    #[staticmethod]
    fn parse(json: &str) -> PyResult<Self> {
        guarded(|| Ok(Self { inner: Config::parse(json)? }))
    }

    /// Checks everything about directories and sizes that can be known before a model is loaded.
    /// Returns warnings; raises `ConfigError` naming the field and the remedy. Makes `nvme_dir`
    /// where only that is missing.
    fn check_machine(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        py.detach(|| guarded(|| kvcellar_engine::tier::machine::check(&self.inner)))
    }

    #[getter]
    fn dram_bytes(&self) -> u64 {
        self.inner.dram_bytes
    }

    #[getter]
    fn bypass_unsupported_groups(&self) -> bool {
        self.inner.unsupported_groups == UnsupportedGroups::Bypass
    }

    #[getter]
    fn without_prefix_caching(&self) -> bool {
        self.inner.without_prefix_caching
    }

    /// Engines on this machine that share the sizes; `None`: as many as vLLM says.
    #[getter]
    fn local_engines(&self) -> Option<u32> {
        self.inner.local_engines
    }

    #[getter]
    fn strict_load_failure(&self) -> bool {
        self.inner.strict_load_failure
    }

    /// There is a disk tier, which changes between steps.
    #[getter]
    fn has_disk(&self) -> bool {
        self.inner.nvme.dir.is_some()
    }

    #[getter]
    fn events(&self) -> bool {
        self.inner.events
    }

    /// The same configuration with another answer to whether events are kept.
    fn narrowed(&self, events: bool) -> Self {
        let mut inner = self.inner.clone();
        inner.events &= events;
        Self { inner }
    }
}

/// Checks per-request controls; raises `ConfigError` naming the key at fault.
#[pyfunction]
fn check_controls(json: &str) -> PyResult<()> {
    guarded(|| Controls::parse(json).map(drop))
}

/// The next log line of the native side: Python's number of its level, and its text; nothing when
/// none came within `timeout_s`. Waits without the interpreter.
#[pyfunction]
fn next_log_line(py: Python<'_>, timeout_s: f64) -> PyResult<Option<(u8, String)>> {
    py.detach(|| {
        guarded(|| {
            let patience = Duration::try_from_secs_f64(timeout_s)
                .map_err(|error| Error::config("timeout_s", error.to_string(), "Write seconds, e.g. 1.0"))?;
            Ok(kvcellar_engine::log_queue::next_line(patience).map(|line| (python_level(line.level), line.text)))
        })
    })
}

fn python_level(level: log::Level) -> u8 {
    match level {
        log::Level::Error => 40,
        log::Level::Warn => 30,
        log::Level::Info => 20,
        log::Level::Debug | log::Level::Trace => 10,
    }
}

/// The extension module.
#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    errors::add_to(module)?;
    module.add_class::<PyConfig>()?;
    module.add_class::<engine::PyTierEngine>()?;
    module.add_class::<worker::PyCopyWorker>()?;
    module.add_class::<reports::PoolReport>()?;
    module.add_class::<reports::DiskReport>()?;
    module.add_class::<reports::ForgetReport>()?;
    module.add_class::<reports::ResetReport>()?;
    module.add_class::<reports::StoredRun>()?;
    module.add_class::<reports::RemovedRun>()?;
    module.add_class::<reports::EngineStats>()?;
    module.add_class::<reports::CopyReport>()?;
    module.add_class::<worker::PyWatch>()?;
    module.add_class::<engine::PyWarmTable>()?;
    module.add_function(wrap_pyfunction!(check_controls, module)?)?;
    module.add_function(wrap_pyfunction!(next_log_line, module)?)?;
    Ok(())
}
