//! One GPU: torch's own context on it, and the streams and events that copies need.

use std::ffi::{c_char, c_int, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{CUcontext, CUdevice_attribute_enum as Attribute, CUevent, CUstream};

use super::driver::{Answer, Driver, NOT_READY, Refused, SUCCESS};
use crate::gpu::ComputeStream;
use kvcellar_block::error::Result;

const STREAM_NON_BLOCKING: u32 = 1;
const EVENT_DISABLE_TIMING: u32 = 2;
const CAPTURE_MODE_RELAXED: u32 = 2;

/// A device with its primary context, which is the one torch uses, held for as long as this lives.
pub struct Device {
    pub(super) driver: &'static Driver,
    ordinal: i32,
    context: CUcontext,
    events: Mutex<Vec<Raw>>,
}

/// A handle that may go to another thread: the driver's functions may be called from any.
#[derive(Clone, Copy)]
struct Raw(CUevent);
// SAFETY: an event is the driver's own object; its functions are safe to call from all threads.
unsafe impl Send for Raw {}

// SAFETY: the context is the driver's own object and may be made current in any thread; everything
// else is shared behind a lock.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The driver's name of the device.
    pub name: String,
    /// Compute capability, e.g. 90 for 9.0.
    pub capability: i32,
    /// Streaming multiprocessors.
    pub multiprocessors: i32,
    /// Kernels may use the host's own addresses of pinned memory.
    pub host_addresses: bool,
    /// The memory node next to the device; none on a machine without nodes, or when the driver
    /// (before CUDA 12.2) does not know.
    pub near_node: Option<u32>,
}

impl Device {
    /// Opens device `ordinal`, as torch numbers it.
    ///
    /// # Errors
    /// [`kvcellar_block::error::Error::DeviceDead`] without a driver, or when it refuses.
    pub fn open(ordinal: i32) -> Result<Arc<Self>> {
        let driver = Driver::get()?;
        let (mut handle, mut context): (c_int, CUcontext) = (0, ptr::null_mut());
        // SAFETY: the pointers are to locals and not kept.
        let code = unsafe { (driver.functions.cuDeviceGet)(&raw mut handle, ordinal) };
        driver.check("cuDeviceGet", code).map_err(Refused::into_error)?;
        // SAFETY: as above; the context is released when this is dropped.
        let code = unsafe { (driver.functions.cuDevicePrimaryCtxRetain)(&raw mut context, handle) };
        driver.check("cuDevicePrimaryCtxRetain", code).map_err(Refused::into_error)?;
        Ok(Arc::new(Self { driver, ordinal: handle, context, events: Mutex::default() }))
    }

    /// What the device is.
    ///
    /// # Errors
    /// [`Refused`] when the driver does not tell.
    pub fn facts(&self) -> Answer<Facts> {
        let mut name = [0_u8; 256];
        let into = name.as_mut_ptr().cast::<c_char>();
        // SAFETY: the driver writes at most this many bytes, null-terminated.
        let code =
            unsafe { (self.driver.functions.cuDeviceGetName)(into, name.len().cast_signed() as c_int, self.ordinal) };
        self.driver.check("cuDeviceGetName", code)?;
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
        Ok(Facts {
            name: String::from_utf8_lossy(&name[..end]).into_owned(),
            capability: self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
                + self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            multiprocessors: self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            host_addresses: self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM)?
                != 0,
            near_node: self
                .attribute(Attribute::CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID)
                .ok()
                .and_then(|node| u32::try_from(node).ok()),
        })
    }

    fn attribute(&self, attribute: Attribute) -> Answer<i32> {
        let mut value = 0;
        // SAFETY: the pointer is to a local and not kept.
        let code =
            unsafe { (self.driver.functions.cuDeviceGetAttribute)(&raw mut value, attribute as c_int, self.ordinal) };
        self.driver.check("cuDeviceGetAttribute", code).map(|()| value)
    }

    /// Runs `work` with this device's context current in the calling thread, and leaves the thread
    /// as it was.
    ///
    /// # Errors
    /// [`Refused`] when the context is gone, or the work's own.
    pub fn with<T>(&self, work: impl FnOnce() -> Answer<T>) -> Answer<T> {
        // SAFETY: the context is retained while `self` lives.
        self.driver.check("cuCtxPushCurrent", unsafe { (self.driver.functions.cuCtxPushCurrent_v2)(self.context) })?;
        let outcome = work();
        let mut popped: CUcontext = ptr::null_mut();
        // SAFETY: the pointer is to a local; what is popped is what was pushed, since work of this
        // crate leaves the stack as it found it.
        let code = unsafe { (self.driver.functions.cuCtxPopCurrent_v2)(&raw mut popped) };
        self.driver.check("cuCtxPopCurrent", code).and(outcome)
    }

    /// Lets the calling thread, one of our own, go on while torch captures a graph in another: a
    /// capture forbids all threads what it might miss, asking for events too, and would fail when
    /// one does it. What our threads do never belongs into a graph.
    pub(super) fn stay_out_of_captures(&self) {
        let mut mode = CAPTURE_MODE_RELAXED;
        if let Some(exchange) = self.driver.functions.cuThreadExchangeStreamCaptureMode {
            // SAFETY: the pointer is to a local, which the driver exchanges with the thread's mode.
            // A refusal leaves that as it was.
            unsafe { exchange(&raw mut mode) };
        }
    }

    /// A stream of the lowest priority that waits for no other and that no other waits for.
    ///
    /// # Errors
    /// [`Refused`]. To be called within [`Self::with`].
    pub(super) fn stream(self: &Arc<Self>) -> Answer<DeviceStream> {
        let (mut least, mut greatest, mut handle) = (0, 0, ptr::null_mut());
        let functions = &self.driver.functions;
        // SAFETY: the pointers are to locals and not kept.
        let code = unsafe { (functions.cuCtxGetStreamPriorityRange)(&raw mut least, &raw mut greatest) };
        self.driver.check("cuCtxGetStreamPriorityRange", code)?;
        // SAFETY: as above; the stream is destroyed when its owner is dropped.
        let code = unsafe { (functions.cuStreamCreateWithPriority)(&raw mut handle, STREAM_NON_BLOCKING, least) };
        self.driver.check("cuStreamCreateWithPriority", code)?;
        Ok(DeviceStream { device: Arc::clone(self), handle })
    }

    /// An event, used before if there is one.
    ///
    /// # Errors
    /// [`Refused`]. To be called within [`Self::with`].
    pub(super) fn event(self: &Arc<Self>) -> Answer<DeviceEvent> {
        let used = self.events.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let handle = if let Some(Raw(handle)) = used {
            handle
        } else {
            let mut handle = ptr::null_mut();
            // SAFETY: the pointer is to a local; the event is destroyed with the device.
            let code = unsafe { (self.driver.functions.cuEventCreate)(&raw mut handle, EVENT_DISABLE_TIMING) };
            self.driver.check("cuEventCreate", code)?;
            handle
        };
        Ok(DeviceEvent { device: Arc::clone(self), handle })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let functions = &self.driver.functions;
        let events = std::mem::take(self.events.get_mut().unwrap_or_else(PoisonError::into_inner));
        for Raw(event) in events {
            // SAFETY: the event is this device's and nobody holds it any more. What the driver
            // answers changes nothing here.
            unsafe { (functions.cuEventDestroy_v2)(event) };
        }
        // SAFETY: retained once in `open`; torch holds its own.
        unsafe { (functions.cuDevicePrimaryCtxRelease_v2)(self.ordinal) };
    }
}

/// A stream of our own.
pub(super) struct DeviceStream {
    device: Arc<Device>,
    pub(super) handle: CUstream,
}

// SAFETY: as for `Raw`.
unsafe impl Send for DeviceStream {}

impl DeviceStream {
    /// What is given to this stream from here on comes after what the event was recorded after.
    pub(super) fn wait(&self, event: &DeviceEvent) -> Answer<()> {
        wait(&self.device, self.handle, event)
    }

    /// Whether the device still takes work: an error that stays is answered to this, too.
    pub(super) fn works(&self) -> bool {
        // SAFETY: the stream is alive while `self` is.
        matches!(unsafe { (self.device.driver.functions.cuStreamQuery)(self.handle) }, SUCCESS | NOT_READY)
    }

    /// Waits, in this thread, until all that the stream was given is done. For ends and failures
    /// only.
    pub(super) fn synchronize(&self) -> Answer<()> {
        // SAFETY: the stream is alive while `self` is.
        let code = unsafe { (self.device.driver.functions.cuStreamSynchronize)(self.handle) };
        self.device.driver.check("cuStreamSynchronize", code)
    }
}

impl Drop for DeviceStream {
    fn drop(&mut self) {
        // SAFETY: nobody uses the handle after this; the driver finishes what the stream was given.
        unsafe { (self.device.driver.functions.cuStreamDestroy_v2)(self.handle) };
    }
}

/// A place in a stream's order. Goes back to its device to be used again: a stream that was told to
/// wait for it keeps what it was told.
pub(super) struct DeviceEvent {
    device: Arc<Device>,
    handle: CUevent,
}

// SAFETY: as for `Raw`.
unsafe impl Send for DeviceEvent {}
// SAFETY: as for `Raw`.
unsafe impl Sync for DeviceEvent {}

impl DeviceEvent {
    /// Marks the end of what our stream was given so far.
    pub(super) fn record(&self, stream: &DeviceStream) -> Answer<()> {
        // SAFETY: both are alive while borrowed.
        let code = unsafe { (self.device.driver.functions.cuEventRecord)(self.handle, stream.handle) };
        self.device.driver.check("cuEventRecord", code)
    }

    /// Marks the end of what vLLM's stream was given so far.
    pub(super) fn record_on(&self, compute: ComputeStream) -> Answer<()> {
        // SAFETY: the connector names the stream that torch uses now; torch never destroys its
        // streams.
        let code = unsafe { (self.device.driver.functions.cuEventRecord)(self.handle, foreign(compute)) };
        self.device.driver.check("cuEventRecord", code)
    }

    /// What vLLM's stream is given from here on comes after this event.
    pub(super) fn hold(&self, compute: ComputeStream) -> Answer<()> {
        wait(&self.device, foreign(compute), self)
    }

    /// Whether all before the event is done.
    pub(super) fn is_over(&self) -> Answer<bool> {
        // SAFETY: the event is alive while `self` is.
        match unsafe { (self.device.driver.functions.cuEventQuery)(self.handle) } {
            SUCCESS => Ok(true),
            NOT_READY => Ok(false),
            code => self.device.driver.check("cuEventQuery", code).map(|()| true),
        }
    }
}

impl Drop for DeviceEvent {
    fn drop(&mut self) {
        self.device.events.lock().unwrap_or_else(PoisonError::into_inner).push(Raw(self.handle));
    }
}

fn foreign(compute: ComputeStream) -> CUstream {
    ptr::with_exposed_provenance_mut::<c_void>(compute.0 as usize).cast()
}

fn wait(device: &Device, stream: CUstream, event: &DeviceEvent) -> Answer<()> {
    // SAFETY: the event is alive while borrowed; the stream is ours, or torch's, which never
    // destroys its streams.
    let code = unsafe { (device.driver.functions.cuStreamWaitEvent)(stream, event.handle, 0) };
    device.driver.check("cuStreamWaitEvent", code)
}
