//! The GPU driver's library, found at run time: its version and its devices. Promises: works, and says why, where there is none.

use std::ffi::{CStr, c_int, c_void};

/// A symbol of an open library.
fn symbol(library: *mut c_void, name: &CStr) -> Result<*mut c_void, String> {
    // SAFETY: the handle is an open library's, the name ends in a null byte.
    let found = unsafe { libc::dlsym(library, name.as_ptr()) };
    if found.is_null() { Err(format!("the driver's library has no {}", name.to_string_lossy())) } else { Ok(found) }
}

/// The driver's version (1000 times the major number, 10 times the minor) and its number of devices. `Err`: why it does not tell.
pub fn ask() -> Result<(c_int, c_int), String> {
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
