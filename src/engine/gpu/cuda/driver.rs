//! The driver's library, loaded at run time. Promises: a library or a symbol that is not there, and
//! every code the driver answers, is a value with a remedy; nothing here panics or aborts.
//!
//! `cudarc` finds the library and gives the types. Its own wrappers panic when a symbol is missing
//! and read the answer into a Rust enum, which a newer driver's codes would not fit: so the
//! functions are looked up here once, and answer numbers.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys::{
    CUcontext, CUevent, CUfunction, CUmemcpyAttributes, CUmodule, CUstream, culib, is_culib_present,
};

use crate::limits::DRIVER_VERSION_MIN;
use kvcellar_block::error::{Error, Result};

/// An address in the device's memory, or of pinned memory as the device sees it.
pub type DeviceAddress = u64;

/// `cuMemcpyBatchAsync` of CUDA 12.8: destinations, sources, lengths, their number; attributes, the
/// first copy of each, their number; where it failed.
pub(super) type BatchCall = unsafe extern "C" fn(
    *mut DeviceAddress,
    *mut DeviceAddress,
    *mut usize,
    usize,
    *mut CUmemcpyAttributes,
    *mut usize,
    usize,
    *mut usize,
    CUstream,
) -> u32;

/// What a call answers when it worked.
pub(super) const SUCCESS: u32 = 0;
/// The work is not done yet.
pub(super) const NOT_READY: u32 = 600;
pub(super) const OUT_OF_MEMORY: u32 = 2;
const NO_DEVICE: u32 = 100;
const STUB_LIBRARY: u32 = 34;
const MISMATCH: u32 = 803;

/// What a call of the driver gives.
pub type Answer<T> = std::result::Result<T, Refused>;

/// A call that the driver refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call} answered {name} ({code})")]
pub struct Refused {
    /// The driver's function.
    pub call: &'static str,
    /// Its answer.
    pub code: u32,
    /// The driver's name for it.
    pub name: String,
}

impl Refused {
    /// As an error of the crate.
    pub fn into_error(self) -> Error {
        let remedy = self.remedy().to_owned();
        Error::DeviceDead { device: "the GPU's driver".to_owned(), problem: self.to_string(), remedy }
    }

    fn remedy(&self) -> &'static str {
        match self.code {
            OUT_OF_MEMORY => "Leave the device or the host more memory",
            NO_DEVICE => "Give this process a GPU (docker run --gpus all, CUDA_VISIBLE_DEVICES)",
            STUB_LIBRARY => {
                "The library found is the one that programs are linked to, not the driver's: take its folder out of LD_LIBRARY_PATH"
            }
            MISMATCH => {
                "The kernel module and the driver's library are of different versions: restart the machine, or update the container"
            }
            _ => "Look for the driver's messages in the kernel log (dmesg, Xid), then restart the engine",
        }
    }
}

/// Declares the functions by their symbols. All but the optional ones must be there.
macro_rules! functions {
    (required { $($name:ident: fn($($argument:ty),*);)+ } optional { $($maybe:ident: fn($($given:ty),*);)+ }) => {
        /// The driver's functions, named as its symbols are.
        #[expect(non_snake_case, reason = "the driver's own names")]
        pub(super) struct Functions {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) -> u32,)+
            $(pub(super) $maybe: Option<unsafe extern "C" fn($($given),*) -> u32>,)+
        }

        impl Functions {
            /// Looks all of them up. `Err`: the symbol that is missing.
            fn find() -> std::result::Result<Self, &'static str> {
                // The caller saw that the library is there. One that vanished since then panics in
                // `culib`. SAFETY: it is loaded once and never unloaded.
                let library = std::panic::catch_unwind(|| unsafe { culib() }).map_err(|_| "symbols any more")?;
                Ok(Self {
                    // SAFETY: the types are those of the driver API for these symbols, versions
                    // included.
                    $($name: *unsafe { library.get(concat!(stringify!($name), "\0").as_bytes()) }.map_err(|_| stringify!($name))?,)+
                    // SAFETY: as above. A driver that is too old for one of these lacks its symbol.
                    $($maybe: unsafe { library.get(concat!(stringify!($maybe), "\0").as_bytes()) }.ok().map(|found| *found),)+
                })
            }
        }
    };
}

functions! {
    required {
        cuInit: fn(c_uint);
        cuDriverGetVersion: fn(*mut c_int);
        cuGetErrorName: fn(u32, *mut *const c_char);
        cuDeviceGetCount: fn(*mut c_int);
        cuDeviceGet: fn(*mut c_int, c_int);
        cuDeviceGetName: fn(*mut c_char, c_int, c_int);
        cuDeviceGetAttribute: fn(*mut c_int, c_int, c_int);
        cuDevicePrimaryCtxRetain: fn(*mut CUcontext, c_int);
        cuDevicePrimaryCtxRelease_v2: fn(c_int);
        cuCtxPushCurrent_v2: fn(CUcontext);
        cuCtxPopCurrent_v2: fn(*mut CUcontext);
        cuCtxGetStreamPriorityRange: fn(*mut c_int, *mut c_int);
        cuStreamCreateWithPriority: fn(*mut CUstream, c_uint, c_int);
        cuStreamDestroy_v2: fn(CUstream);
        cuStreamSynchronize: fn(CUstream);
        cuStreamQuery: fn(CUstream);
        cuStreamWaitEvent: fn(CUstream, CUevent, c_uint);
        cuEventCreate: fn(*mut CUevent, c_uint);
        cuEventDestroy_v2: fn(CUevent);
        cuEventRecord: fn(CUevent, CUstream);
        cuEventQuery: fn(CUevent);
        cuMemHostRegister_v2: fn(*mut c_void, usize, c_uint);
        cuMemHostUnregister: fn(*mut c_void);
        cuMemHostAlloc: fn(*mut *mut c_void, usize, c_uint);
        cuMemFreeHost: fn(*mut c_void);
        cuMemAlloc_v2: fn(*mut DeviceAddress, usize);
        cuMemFree_v2: fn(DeviceAddress);
        cuMemcpyHtoDAsync_v2: fn(DeviceAddress, *const c_void, usize, CUstream);
        cuMemcpyDtoHAsync_v2: fn(*mut c_void, DeviceAddress, usize, CUstream);
    }
    optional {
        cuThreadExchangeStreamCaptureMode: fn(*mut c_uint);
        cuMemcpyBatchAsync: fn(*mut DeviceAddress, *mut DeviceAddress, *mut usize, usize, *mut CUmemcpyAttributes, *mut usize, usize, *mut usize, CUstream);
        cuModuleLoadData: fn(*mut CUmodule, *const c_void);
        cuModuleUnload: fn(CUmodule);
        cuModuleGetFunction: fn(*mut CUfunction, CUmodule, *const c_char);
        cuLaunchKernel: fn(CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream, *mut *mut c_void, *mut *mut c_void);
    }
}

/// The driver: started, of a version that is used.
pub struct Driver {
    pub(super) functions: Functions,
    version: i32,
    devices: i32,
}

impl Driver {
    /// The process's driver. Looked for once: a driver that was missing stays missing until the
    /// next start.
    ///
    /// # Errors
    /// [`Error::DeviceDead`] when there is no driver, it is too old or damaged, or it finds no
    /// device.
    pub fn get() -> Result<&'static Self> {
        static DRIVER: OnceLock<std::result::Result<Driver, (String, String)>> = OnceLock::new();
        match DRIVER.get_or_init(Self::open) {
            Ok(driver) => Ok(driver),
            Err((problem, remedy)) => Err(Error::DeviceDead {
                device: "the GPU's driver".to_owned(),
                problem: problem.clone(),
                remedy: remedy.clone(),
            }),
        }
    }

    fn open() -> std::result::Result<Self, (String, String)> {
        let update = || "Update the NVIDIA driver".to_owned();
        // SAFETY: loads the library and runs its initialisation, as any program that uses the GPU
        // does.
        if !unsafe { is_culib_present() } {
            let remedy = "Install the NVIDIA driver, or give the container the GPU (docker run --gpus all). Without it KV caches in host memory are served";
            return Err(("its library (libcuda.so.1) is not there".to_owned(), remedy.to_owned()));
        }
        let functions = Functions::find().map_err(|symbol| (format!("its library has no {symbol}"), update()))?;
        let mut driver = Self { functions, version: 0, devices: 0 };
        let told = |refused: Refused| (refused.to_string(), refused.remedy().to_owned());
        let mut number = 0;
        // SAFETY: the pointer is to an integer on this stack and not kept.
        let code = unsafe { (driver.functions.cuDriverGetVersion)(&raw mut number) };
        driver.check("cuDriverGetVersion", code).map_err(told)?;
        driver.version = number;
        if number < DRIVER_VERSION_MIN {
            let (found, wanted) = (show_version(number), show_version(DRIVER_VERSION_MIN));
            return Err((format!("it is for CUDA {found}, and CUDA {wanted} is the oldest that is used"), update()));
        }
        // SAFETY: takes a number only.
        let code = unsafe { (driver.functions.cuInit)(0) };
        driver.check("cuInit", code).map_err(told)?;
        // SAFETY: as for the version.
        let code = unsafe { (driver.functions.cuDeviceGetCount)(&raw mut number) };
        driver.check("cuDeviceGetCount", code).map_err(told)?;
        driver.devices = number;
        Ok(driver)
    }

    /// The version, as people write it.
    pub fn version(&self) -> String {
        show_version(self.version)
    }

    /// Devices that this process sees.
    pub fn devices(&self) -> i32 {
        self.devices
    }

    /// Copies go in batches of one call.
    pub fn batches(&self) -> bool {
        self.functions.cuMemcpyBatchAsync.is_some()
    }

    /// Turns an answer into a value.
    pub(super) fn check(&self, call: &'static str, code: u32) -> std::result::Result<(), Refused> {
        if code == SUCCESS { Ok(()) } else { Err(Refused { call, code, name: self.name_of(code) }) }
    }

    fn name_of(&self, code: u32) -> String {
        let mut text: *const c_char = std::ptr::null();
        // SAFETY: the pointer is to a local; the driver sets it to a text of its own that is never
        // freed, or to null.
        let answer = unsafe { (self.functions.cuGetErrorName)(code, &raw mut text) };
        if answer != SUCCESS || text.is_null() {
            return "an error without a name".to_owned();
        }
        // SAFETY: as above: a text that ends in a null byte and lives as long as the library, which
        // is never unloaded.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}

fn show_version(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}
