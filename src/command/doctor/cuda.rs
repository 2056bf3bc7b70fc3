//! The GPU's driver, its devices, and how copies would be dispatched on each.

use std::path::PathBuf;

use super::finding::{Finding, Status};

const NAME: &str = "cuda";

/// The lines about CUDA: one of the driver, or one of each device.
#[cfg(feature = "cuda")]
pub fn examine(nvrtc: &[PathBuf]) -> Vec<Finding> {
    use kvcellar_engine::gpu::cuda::driver::Driver;

    match Driver::get() {
        Ok(driver) if driver.devices() > 0 => {
            (0..driver.devices()).map(|ordinal| device(driver, ordinal, nvrtc)).collect()
        }
        Ok(driver) => {
            let found = format!("driver for CUDA {}, no device", driver.version());
            vec![Finding::new(Status::Warning, NAME, found, "Give this process a GPU (docker run --gpus all)")]
        }
        // Without a GPU KV caches in host memory are served.
        Err(error) => vec![refused(&error)],
    }
}

#[cfg(feature = "cuda")]
fn device(driver: &kvcellar_engine::gpu::cuda::driver::Driver, ordinal: i32, nvrtc: &[PathBuf]) -> Finding {
    use kvcellar_engine::gpu::cuda::calibration;
    use kvcellar_engine::gpu::cuda::device::Device;
    use kvcellar_engine::gpu::cuda::driver::Refused;

    let look = || {
        let device = Device::open(ordinal)?;
        let facts = device.facts().map_err(Refused::into_error)?;
        let calibration = calibration::of_device(&device, nvrtc).map_err(Refused::into_error)?;
        Ok((facts, calibration))
    };
    let looked: kvcellar_block::error::Result<_> = look();
    match looked {
        Ok((facts, calibration)) => Finding::ok(
            NAME,
            format!("GPU {ordinal}, {}, driver for CUDA {}: {calibration}", facts.name, driver.version()),
        ),
        Err(error) => refused(&error),
    }
}

#[cfg(feature = "cuda")]
fn refused(error: &kvcellar_block::error::Error) -> Finding {
    match error {
        kvcellar_block::error::Error::DeviceDead { device, problem, remedy } => {
            Finding::new(Status::Warning, NAME, format!("{device} does not work: {problem}"), remedy.as_str())
        }
        other => Finding::new(Status::Warning, NAME, other.to_string(), "Look at the kernel log"),
    }
}

/// The line about CUDA in a build without it.
#[cfg(not(feature = "cuda"))]
pub fn examine(_nvrtc: &[PathBuf]) -> Vec<Finding> {
    vec![Finding::new(
        Status::Warning,
        NAME,
        "built without it",
        "Build with the feature `cuda` to serve KV caches in GPU memory",
    )]
}
