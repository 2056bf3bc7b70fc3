//! How fragments are handed to the device: one call for a whole batch, a call for each, or the gather kernel.
//!
//! From the device to the host the copy engines are always used: they take nothing from the model's multiprocessors. To the device small fragments may go by the
//! kernel, where calibration found that to be faster.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys::{
    CUmemLocation, CUmemLocationType_enum as Location, CUmemcpyAttributes, CUmemcpyFlags_enum as Flags,
    CUmemcpySrcAccessOrder_enum as Access,
};

use super::device::{Device, Stream};
use super::driver::{Address, Refused};
use super::kernel::{Kernel, Table};
use crate::gpu::Direction;
use crate::gpu::fragments::{self, Fragment};

type Answer<T> = std::result::Result<T, Refused>;

/// A way of handing fragments over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// One call for all, to the copy engines.
    Batch,
    /// One call for each, to the copy engines.
    Each,
    /// The gather kernel.
    Gather,
}

/// What calibration found, or what is assumed without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thresholds {
    /// Batches are there and not slower than a call for each.
    pub batch: bool,
    /// To the device: fragments of fewer bytes on average go by the kernel. 0: never.
    pub gather_below: u64,
}

impl Thresholds {
    /// The way for these fragments. `pinned`: the device reaches the host's side directly.
    pub fn way(&self, direction: Direction, fragments: &[Fragment], pinned: bool) -> Way {
        if !pinned {
            // Ordinary memory: the driver stages it, which it does in single copies only.
            return Way::Each;
        }
        let small = fragments::bytes(fragments) < self.gather_below.saturating_mul(fragments.len() as u64);
        if direction == Direction::Load && small && fragments.iter().all(Fragment::is_wide) {
            Way::Gather
        } else if self.batch && fragments.len() > 1 {
            Way::Batch
        } else {
            Way::Each
        }
    }
}

/// Hands fragments over, with the room that takes.
pub(super) struct Dispatch {
    device: Arc<Device>,
    kernel: Option<Arc<Kernel>>,
    from: Vec<Address>,
    to: Vec<Address>,
    sizes: Vec<usize>,
}

impl Dispatch {
    pub(super) fn new(device: &Arc<Device>, kernel: Option<Arc<Kernel>>) -> Self {
        Self { device: Arc::clone(device), kernel, from: Vec::new(), to: Vec::new(), sizes: Vec::new() }
    }

    /// Gives the fragments to the stream. After an error some of them may be under way.
    ///
    /// `table`: for the kernel, of no job that is under way. Without one, or without a kernel, the copy engines are used.
    pub(super) fn hand_over(
        &mut self,
        way: Way,
        direction: Direction,
        fragments: &[Fragment],
        table: Option<&mut Table>,
        stream: &Stream,
    ) -> Answer<()> {
        if let (Way::Gather, Some(kernel), Some(table)) = (way, &self.kernel, table)
            && table.fill(fragments)
        {
            return kernel.launch(table, stream);
        }
        if way == Way::Each {
            self.each(direction, fragments, stream)
        } else {
            self.batch(direction, fragments, stream)
        }
    }

    fn each(&self, direction: Direction, fragments: &[Fragment], stream: &Stream) -> Answer<()> {
        let (driver, functions) = (self.device.driver, &self.device.driver.functions);
        for fragment in fragments {
            let (host, len) = (fragment.host as usize, fragment.len as usize);
            match direction {
                Direction::Offload => {
                    // SAFETY: both sides stay in place until the order was answered, which is after the stream has passed this copy (see `Copier`).
                    let code = unsafe {
                        (functions.cuMemcpyDtoHAsync_v2)(host as *mut c_void, fragment.device, len, stream.handle)
                    };
                    driver.check("cuMemcpyDtoHAsync", code)?;
                }
                Direction::Load => {
                    // SAFETY: as above.
                    let code = unsafe {
                        (functions.cuMemcpyHtoDAsync_v2)(fragment.device, host as *const c_void, len, stream.handle)
                    };
                    driver.check("cuMemcpyHtoDAsync", code)?;
                }
            }
        }
        Ok(())
    }

    fn batch(&mut self, direction: Direction, fragments: &[Fragment], stream: &Stream) -> Answer<()> {
        let Some(batch) = self.device.driver.functions.cuMemcpyBatchAsync else {
            return self.each(direction, fragments, stream);
        };
        let sides = |fragment: &Fragment| match direction {
            Direction::Offload => (fragment.device, fragment.host),
            Direction::Load => (fragment.host, fragment.device),
        };
        self.from.clear();
        self.to.clear();
        self.sizes.clear();
        self.from.extend(fragments.iter().map(|fragment| sides(fragment).0));
        self.to.extend(fragments.iter().map(|fragment| sides(fragment).1));
        self.sizes.extend(fragments.iter().map(|fragment| fragment.len as usize));
        let nowhere = CUmemLocation { type_: Location::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
        let mut attributes = CUmemcpyAttributes {
            srcAccessOrder: match direction {
                // The source is the KV cache: it may be read only after the event that the stream waits for.
                Direction::Offload => Access::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
                // The source is a filled slot: whole before this call, and left alone until the order is answered. No work of the stream writes it.
                Direction::Load => Access::CU_MEMCPY_SRC_ACCESS_ORDER_ANY,
            },
            srcLocHint: nowhere,
            dstLocHint: nowhere,
            flags: Flags::CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE as u32,
        };
        let (mut first, mut failed) = (0_usize, 0_usize);
        // SAFETY: the three lists are of one length and outlive the call, which copies them, as are the one set of attributes and its first index.
        // For the memory see `each`.
        let code = unsafe {
            batch(
                self.to.as_mut_ptr(),
                self.from.as_mut_ptr(),
                self.sizes.as_mut_ptr(),
                fragments.len(),
                &raw mut attributes,
                &raw mut first,
                1,
                &raw mut failed,
                stream.handle,
            )
        };
        self.device.driver.check("cuMemcpyBatchAsync", code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fragments(count: u64, len: u64) -> Vec<Fragment> {
        (0..count).map(|at| Fragment { device: at * 2 * len, host: at * 2 * len, len }).collect()
    }

    #[test]
    fn small_fragments_go_to_the_device_by_the_kernel_and_come_from_it_by_the_engines() {
        let thresholds = Thresholds { batch: true, gather_below: 32 << 10 };
        let small = fragments(10, 8 << 10);
        assert_eq!(thresholds.way(Direction::Load, &small, true), Way::Gather);
        assert_eq!(thresholds.way(Direction::Offload, &small, true), Way::Batch);
        assert_eq!(thresholds.way(Direction::Load, &fragments(10, 32 << 10), true), Way::Batch);
        assert_eq!(thresholds.way(Direction::Load, &fragments(1, 1 << 20), true), Way::Each);
        assert_eq!(thresholds.way(Direction::Load, &fragments(10, 8 << 10 | 8), true), Way::Batch, "no words");
    }

    #[test]
    fn ordinary_memory_is_copied_in_single_copies() {
        let thresholds = Thresholds { batch: true, gather_below: u64::MAX };
        assert_eq!(thresholds.way(Direction::Load, &fragments(10, 4096), false), Way::Each);
    }

    #[test]
    fn without_batches_and_kernel_each_fragment_is_a_call() {
        let thresholds = Thresholds { batch: false, gather_below: 0 };
        assert_eq!(thresholds.way(Direction::Load, &fragments(10, 4096), true), Way::Each);
    }
}
