//! Memory on both sides, to measure copies with: pinned on the host's.

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use super::device::Device;
use super::driver::{Address, Refused};
use crate::gpu::fragments::Fragment;

/// Memory may be used in every context.
const ALLOC_PORTABLE: u32 = 1;

/// As many bytes on either side, freed when this is dropped. Copies of it must be over then.
pub(super) struct Room {
    device: Arc<Device>,
    host: *mut c_void,
    memory: Address,
    bytes: u64,
}

// SAFETY: the memory is this room's alone.
unsafe impl Send for Room {}

impl Room {
    /// To be called with the device's context current.
    pub(super) fn new(device: &Arc<Device>, bytes: u64) -> Result<Self, Refused> {
        let functions = &device.driver.functions;
        let mut room = Self { device: Arc::clone(device), host: ptr::null_mut(), memory: 0, bytes };
        // SAFETY: the pointer is to a field; the memory is freed when the room is dropped.
        let code = unsafe { (functions.cuMemHostAlloc)(&raw mut room.host, bytes as usize, ALLOC_PORTABLE) };
        device.driver.check("cuMemHostAlloc", code)?;
        // SAFETY: as above.
        let code = unsafe { (functions.cuMemAlloc_v2)(&raw mut room.memory, bytes as usize) };
        device.driver.check("cuMemAlloc", code).map(|()| room)
    }

    /// All of it in one piece.
    pub(super) fn whole(&self) -> Vec<Fragment> {
        self.neighbours(self.bytes)
    }

    /// Fragments of this size that touch each other on both sides.
    pub(super) fn neighbours(&self, size: u64) -> Vec<Fragment> {
        (0..self.bytes / size).map(|at| self.fragment(at * size, at * size, size)).collect()
    }

    /// `count` fragments of this size, ascending on the device and with gaps, and in another order on the host. `count` is a power of two; they take up
    /// twice their bytes.
    pub(super) fn scattered(&self, size: u64, count: u64) -> Vec<Fragment> {
        debug_assert!(count.is_power_of_two() && 2 * size * count <= self.bytes);
        let turned = |at: u64| if count == 1 { 0 } else { at.reverse_bits() >> (u64::BITS - count.trailing_zeros()) };
        (0..count).map(|at| self.fragment(2 * size * at, 2 * size * turned(at), size)).collect()
    }

    fn fragment(&self, device: u64, host: u64, len: u64) -> Fragment {
        Fragment { device: self.memory + device, host: self.host as u64 + host, len }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let functions = &self.device.driver.functions;
        let free = || {
            // SAFETY: from the allocations above, once; all copies were waited for. What the driver answers changes nothing here.
            unsafe {
                if !self.host.is_null() {
                    (functions.cuMemFreeHost)(self.host);
                }
                if self.memory != 0 {
                    (functions.cuMemFree_v2)(self.memory);
                }
            }
            Ok(())
        };
        drop(self.device.with(free));
    }
}
