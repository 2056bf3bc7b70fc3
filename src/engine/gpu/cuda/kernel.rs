//! The gather kernel on one device, and the pinned tables that tell it what to move.

use std::ffi::c_void;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use cudarc::driver::sys::{CUfunction, CUmodule};

use super::device::{Device, DeviceStream};
use super::driver::{Answer, Refused};
use crate::gpu::fragments::Fragment;
use crate::limits::{GATHER_SMS, TABLE_ROWS_MAX};

/// Threads of a block, which fill half of a multiprocessor: `cuda/gather.cu` is compiled for as
/// many.
const THREADS: u32 = 1024;

/// Memory may be used in every context, and by kernels.
const ALLOC_PORTABLE_MAPPED: u32 = 3;

/// The loaded kernel.
pub struct GatherKernel {
    device: Arc<Device>,
    module: CUmodule,
    function: CUfunction,
}

// SAFETY: module and function are the driver's own objects; its functions are safe to call from all
// threads.
unsafe impl Send for GatherKernel {}
// SAFETY: as above.
unsafe impl Sync for GatherKernel {}

impl GatherKernel {
    /// Loads a compiled image. To be called with the device's context current.
    ///
    /// # Errors
    /// [`Refused`]; `None` when the driver cannot load modules at all.
    pub fn load(device: &Arc<Device>, image: &[u8]) -> Answer<Option<Self>> {
        let functions = &device.driver.functions;
        let (Some(load), Some(find), Some(_)) =
            (functions.cuModuleLoadData, functions.cuModuleGetFunction, functions.cuLaunchKernel)
        else {
            return Ok(None);
        };
        let (mut module, mut function) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the image is a whole compiled module, which the driver copies.
        device.driver.check("cuModuleLoadData", unsafe { load(&raw mut module, image.as_ptr().cast()) })?;
        let mut kernel = Self { device: Arc::clone(device), module, function };
        // SAFETY: the module was loaded above; the name ends in a null byte.
        let code = unsafe { find(&raw mut function, module, c"kvcellar_gather".as_ptr()) };
        device.driver.check("cuModuleGetFunction", code)?;
        kernel.function = function;
        Ok(Some(kernel))
    }

    /// Moves these rows of the table from where `host` says to where `device` says, in the stream's
    /// order. Both are pinned memory or the device's.
    pub(super) fn launch(&self, table: &FragmentTable, rows: Range<usize>, stream: &DeviceStream) -> Answer<()> {
        let missing = || Refused { call: "cuLaunchKernel", code: 500, name: "no such function".to_owned() };
        let launch = self.device.driver.functions.cuLaunchKernel.ok_or_else(missing)?;
        debug_assert!(rows.end <= table.len);
        let mut address = table.start.as_ptr() as u64 + (rows.start * size_of::<Fragment>()) as u64;
        let mut count = rows.len() as u32;
        let mut arguments = [(&raw mut address).cast::<c_void>(), (&raw mut count).cast::<c_void>()];
        // SAFETY: the arguments are of the kernel's types and copied by the call. The table lives
        // until its job is over, and so do both sides of its fragments (see `Copier`).
        let code = unsafe {
            launch(
                self.function,
                GATHER_SMS,
                1,
                1,
                THREADS,
                1,
                1,
                0,
                stream.handle,
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        self.device.driver.check("cuLaunchKernel", code)
    }
}

impl Drop for GatherKernel {
    fn drop(&mut self) {
        if let Some(unload) = self.device.driver.functions.cuModuleUnload {
            // SAFETY: the copier that held the kernel has no job left. What the driver answers
            // changes nothing here.
            let unloaded =
                self.device.with(|| self.device.driver.check("cuModuleUnload", unsafe { unload(self.module) }));
            drop(unloaded);
        }
    }
}

/// Fragments in pinned memory, where the kernel reads them.
pub(super) struct FragmentTable {
    device: Arc<Device>,
    start: NonNull<Fragment>,
    len: usize,
}

// SAFETY: the memory is this table's alone.
unsafe impl Send for FragmentTable {}

impl FragmentTable {
    /// Room for the fragments of one job. To be called with the device's context current.
    fn new(device: &Arc<Device>) -> Answer<Self> {
        let mut start = ptr::null_mut();
        let bytes = TABLE_ROWS_MAX * size_of::<Fragment>();
        // SAFETY: the pointer is to a local; the memory is freed when the table is dropped.
        let code = unsafe { (device.driver.functions.cuMemHostAlloc)(&raw mut start, bytes, ALLOC_PORTABLE_MAPPED) };
        device.driver.check("cuMemHostAlloc", code)?;
        let start = NonNull::new(start.cast::<Fragment>());
        let missing = || Refused { call: "cuMemHostAlloc", code, name: "no memory".to_owned() };
        Ok(Self { device: Arc::clone(device), start: start.ok_or_else(missing)?, len: 0 })
    }

    /// So many of them, each for a job.
    pub(super) fn several(device: &Arc<Device>, count: usize) -> Answer<Vec<Self>> {
        (0..count).map(|_| Self::new(device)).collect()
    }

    /// Rows.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Empties the table, for a new job: no kernel reads it, since its last job is over.
    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    /// Appends a row.
    ///
    /// # Panics
    /// When the table is full: no job that goes by the kernel has more than [`TABLE_ROWS_MAX`]
    /// fragments.
    pub(super) fn push(&mut self, row: Fragment) {
        assert!(self.len < TABLE_ROWS_MAX, "a job with more fragments than a table has rows");
        // SAFETY: inside the table, and a row that no kernel was told of yet.
        unsafe { self.start.as_ptr().add(self.len).write(row) };
        self.len += 1;
    }
}

impl Drop for FragmentTable {
    fn drop(&mut self) {
        let (start, driver) = (self.start.as_ptr().cast::<c_void>(), self.device.driver);
        // SAFETY: from `cuMemHostAlloc`, and its last job is over. What the driver answers changes
        // nothing here.
        let free = || driver.check("cuMemFreeHost", unsafe { (driver.functions.cuMemFreeHost)(start) });
        drop(self.device.with(free));
    }
}
