//! One Python exception class for each error class, and no panic past this point.

use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::create_exception;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

use kvcellar_block::error::{Error, Result};

create_exception!(kvcellar._native, KvcellarError, PyException, "Base class of everything KV Cellar raises.");
create_exception!(
    kvcellar._native,
    ConfigError,
    KvcellarError,
    "A setting that cannot work; names the field and the remedy."
);
create_exception!(
    kvcellar._native,
    UnsupportedError,
    KvcellarError,
    "The model or deployment cannot be served by this version."
);
create_exception!(
    kvcellar._native,
    SystemRefusedError,
    KvcellarError,
    "The operating system refused something at a path."
);
create_exception!(kvcellar._native, BusyError, KvcellarError, "A resource is taken; the same call may work later.");
create_exception!(kvcellar._native, DataLostError, KvcellarError, "Bytes that cannot be trusted.");
create_exception!(kvcellar._native, DeviceError, KvcellarError, "A device or its driver is gone.");
create_exception!(
    kvcellar._native,
    InternalError,
    KvcellarError,
    "A bug in KV Cellar; the call had no effect that a lookup can see."
);

pub(super) fn add_to(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("KvcellarError", py.get_type::<KvcellarError>())?;
    module.add("ConfigError", py.get_type::<ConfigError>())?;
    module.add("UnsupportedError", py.get_type::<UnsupportedError>())?;
    module.add("SystemRefusedError", py.get_type::<SystemRefusedError>())?;
    module.add("BusyError", py.get_type::<BusyError>())?;
    module.add("DataLostError", py.get_type::<DataLostError>())?;
    module.add("DeviceError", py.get_type::<DeviceError>())?;
    module.add("InternalError", py.get_type::<InternalError>())
}

fn exception(error: &Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::Config { .. } => ConfigError::new_err(text),
        Error::Unsupported { .. } => UnsupportedError::new_err(text),
        Error::Io { .. } => SystemRefusedError::new_err(text),
        Error::TryLater { .. } => BusyError::new_err(text),
        Error::DataLost { .. } => DataLostError::new_err(text),
        Error::DeviceDead { .. } => DeviceError::new_err(text),
    }
}

/// Runs an entry point's work; an error becomes its exception class, a panic an `InternalError`.
pub(super) fn guarded<T>(work: impl FnOnce() -> Result<T>) -> PyResult<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| exception(&error)),
        Err(panic) => {
            let text = panic
                .downcast_ref::<&str>()
                .map(ToString::to_string)
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "panic".to_owned());
            Err(InternalError::new_err(format!("{text}. Please report this with the log above")))
        }
    }
}
