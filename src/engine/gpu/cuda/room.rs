//! Memory on both sides, to measure copies with: on the host's it is of the kind a pool has, shared
//! memory that is pinned afterwards.

use std::fs::File;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::device::Device;
use super::driver::{DeviceAddress, OUT_OF_MEMORY, Refused};
use super::pinning::REGISTER_PORTABLE_MAPPED;
use crate::gpu::fragments::Fragment;

/// Layers whose fragments lie one after another in a slot.
const LAYERS: u64 = 32;
/// What lies between two slots' fragments: a page with a descriptor.
const PAGE: u64 = 4096;

/// As many bytes on either side, freed when this is dropped. Copies of it must be over then.
pub(super) struct BothSides {
    device: Arc<Device>,
    host: MmapRaw,
    is_pinned: bool,
    memory: DeviceAddress,
    bytes: u64,
}

impl BothSides {
    /// To be called with the device's context current.
    pub(super) fn new(device: &Arc<Device>, bytes: u64) -> Result<Self, Refused> {
        let functions = &device.driver.functions;
        let host = shared_memory(bytes).map_err(|error| Refused {
            call: "memfd_create",
            code: OUT_OF_MEMORY,
            name: error.to_string(),
        })?;
        let mut room = Self { device: Arc::clone(device), host, is_pinned: false, memory: 0, bytes };
        let start = room.host.as_mut_ptr().cast();
        // SAFETY: the whole mapping, which lives until the room is dropped; it is unpinned before.
        let code = unsafe { (functions.cuMemHostRegister_v2)(start, bytes as usize, REGISTER_PORTABLE_MAPPED) };
        device.driver.check("cuMemHostRegister", code)?;
        room.is_pinned = true;
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

    /// `count` fragments of this size as a model's blocks have them: in slots of [`LAYERS`] on the
    /// host, with a page between two slots, and anywhere on the device, with gaps. `count` is a
    /// power of two; they take up at most twice their bytes.
    pub(super) fn scattered(&self, size: u64, count: u64) -> Vec<Fragment> {
        debug_assert!(count.is_power_of_two() && size >= PAGE && 2 * size * count <= self.bytes);
        let turned = |at: u64| if count == 1 { 0 } else { at.reverse_bits() >> (u64::BITS - count.trailing_zeros()) };
        (0..count).map(|at| self.fragment(2 * size * turned(at), size * at + at / LAYERS * PAGE, size)).collect()
    }

    fn fragment(&self, device: u64, host: u64, len: u64) -> Fragment {
        Fragment { device: self.memory + device, host: self.host.as_mut_ptr() as u64 + host, len }
    }
}

fn shared_memory(bytes: u64) -> std::io::Result<MmapRaw> {
    let file = File::from(memfd_create("kvcellar-room", MFdFlags::MFD_CLOEXEC)?);
    file.set_len(bytes)?;
    MmapOptions::new().populate().map_raw(&file)
}

impl Drop for BothSides {
    fn drop(&mut self) {
        let functions = &self.device.driver.functions;
        let free = || {
            // SAFETY: from the allocations above, once; all copies were waited for. What the driver
            // answers changes nothing here.
            unsafe {
                if self.is_pinned {
                    (functions.cuMemHostUnregister)(self.host.as_mut_ptr().cast());
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
