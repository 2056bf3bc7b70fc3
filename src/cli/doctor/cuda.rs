//! The driver's library, its version and its devices.

use std::ffi::{CStr, c_int, c_void};

use super::finding::{Finding, Status};

const NAME: &str = "cuda";
const REMEDY: &str = "Install the NVIDIA driver, or give the container the GPU (docker run --gpus all). Without it KV caches in host memory are served";

/// The line about CUDA.
pub fn examine() -> Finding {
    match ask() {
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

/// A symbol of an open library.
fn symbol(library: *mut c_void, name: &CStr) -> Result<*mut c_void, String> {
    // SAFETY: the handle is an open library's, the name ends in a null byte.
    let found = unsafe { libc::dlsym(library, name.as_ptr()) };
    if found.is_null() { Err(format!("the driver's library has no {}", name.to_string_lossy())) } else { Ok(found) }
}

/// The driver's version and its number of devices.
fn ask() -> Result<(c_int, c_int), String> {
    type Init = unsafe extern "C" fn(u32) -> c_int;
    type Number = unsafe extern "C" fn(*mut c_int) -> c_int;
    // SAFETY: the name ends in a null byte. The library is never closed: its functions stay valid while the process lives.
    let library = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        return Err("the driver's library libcuda.so.1 is not there".to_owned());
    }
    // SAFETY: these are the types of the driver API's functions: cuInit(flags), cuDriverGetVersion(int*), cuDeviceGetCount(int*).
    let (init, version_of, count) = unsafe {
        (
            std::mem::transmute::<*mut c_void, Init>(symbol(library, c"cuInit")?),
            std::mem::transmute::<*mut c_void, Number>(symbol(library, c"cuDriverGetVersion")?),
            std::mem::transmute::<*mut c_void, Number>(symbol(library, c"cuDeviceGetCount")?),
        )
    };
    let (mut version, mut devices) = (0, 0);
    // SAFETY: the pointers are to integers on this stack, and the calls keep none of them.
    let codes = unsafe { (version_of(&raw mut version), init(0), count(&raw mut devices)) };
    match codes {
        (0, 0, 0) => Ok((version, devices)),
        // CUDA_ERROR_NO_DEVICE
        (0, 100, _) => Ok((version, 0)),
        (version, init, count) => {
            Err(format!("the driver answers with errors (version {version}, start {init}, devices {count})"))
        }
    }
}
