//! The driver's library, its version and its devices.

use super::finding::{Finding, Status};
use crate::gpu::driver;

const NAME: &str = "cuda";
const REMEDY: &str = "Install the NVIDIA driver, or give the container the GPU (docker run --gpus all). Without it KV caches in host memory are served";

/// The line about CUDA.
pub fn examine() -> Finding {
    match driver::ask() {
        Ok((version, devices)) if devices > 0 => Finding::ok(
            NAME,
            format!("driver for CUDA {}.{}, {devices} device(s)", version / 1000, version % 1000 / 10),
        ),
        Ok((version, _)) => Finding::new(
            Status::Warning,
            NAME,
            format!("driver for CUDA {}.{}, no device", version / 1000, version % 1000 / 10),
            REMEDY,
        ),
        Err(why) => Finding::new(Status::Warning, NAME, why, REMEDY),
    }
}
