//! How fragments are handed to the device: one call for a whole batch, a call for each, or the
//! gather kernel.
//!
//! Over the bus from the device to the host the copy engines are always used: they take nothing
//! from the model's multiprocessors. Small fragments may be packed in the device's memory first
//! (see `staging`), and to the device they may go by the kernel, where calibration found that to be
//! faster.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys::{
    CUmemLocation, CUmemLocationType_enum as Location, CUmemcpyAttributes, CUmemcpyFlags_enum as Flags,
    CUmemcpySrcAccessOrder_enum as Access,
};

use super::device::{Device, DeviceEvent, DeviceStream};
use super::driver::{Answer, BatchCall, DeviceAddress};
use super::kernel::{FragmentTable, GatherKernel};
use super::staging::Staging;
use crate::gpu::Direction;
use crate::gpu::fragments::{self, Fragment};
use crate::limits::{JOB_FRAGMENTS_MAX, STAGING_BUFFER_BYTES, TABLE_ROWS_MAX};

/// A way of handing fragments over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DispatchWay {
    /// One call for all, to the copy engines.
    Batch,
    /// One call for each, to the copy engines.
    Each,
    /// The gather kernel.
    Gather,
    /// Packed by the kernel, then moved by the copy engines.
    Staged,
}

impl DispatchWay {
    /// About how many commands so many fragments are on a stream.
    pub(super) fn commands(self, fragments: usize) -> usize {
        match self {
            Self::Each => fragments,
            Self::Gather => 1,
            // A copy engine's queue is filled by a batch, too, but not the stream's.
            Self::Batch | Self::Staged => fragments.div_ceil(JOB_FRAGMENTS_MAX) * 8,
        }
    }
}

/// What calibration found, or what is assumed without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thresholds {
    /// Batches are there and not slower than a call for each.
    pub batch: bool,
    /// To the device: fragments of fewer bytes on average go by the kernel. 0: never.
    pub gather_below: u64,
    /// To the host: fragments of fewer bytes on average are packed first. 0: never.
    pub stage_below: u64,
}

impl Thresholds {
    /// The way for these fragments. `pinned`: the device reaches the host's side directly.
    pub fn way(&self, direction: Direction, fragments: &[Fragment], pinned: bool) -> DispatchWay {
        if !pinned {
            // Ordinary memory: the driver stages it, which it does in single copies only.
            return DispatchWay::Each;
        }
        let (below, small_way) = match direction {
            Direction::Load => (self.gather_below, DispatchWay::Gather),
            Direction::Offload => (self.stage_below, DispatchWay::Staged),
        };
        let small = fragments::bytes(fragments) < below.saturating_mul(fragments.len() as u64);
        let may_take_kernel = |fragment: &Fragment| fragment.is_wide() && fragment.len <= STAGING_BUFFER_BYTES;
        if small && (2..=TABLE_ROWS_MAX).contains(&fragments.len()) && fragments.iter().all(may_take_kernel) {
            small_way
        } else if self.batch && fragments.len() > 1 {
            DispatchWay::Batch
        } else {
            DispatchWay::Each
        }
    }
}

/// Hands fragments over, by whatever there is.
pub(super) struct Dispatch {
    engines: CopyEngines,
    kernel: Option<Arc<GatherKernel>>,
    staging: Option<Staging>,
}

impl Dispatch {
    pub(super) fn new(device: &Arc<Device>, kernel: Option<Arc<GatherKernel>>, staging: Option<Staging>) -> Self {
        let engines = CopyEngines { device: Arc::clone(device), from: Vec::new(), to: Vec::new(), sizes: Vec::new() };
        Self { engines, kernel, staging }
    }

    /// The ways there are: in batches, by a call for each, by the kernel.
    pub(super) fn ways(&self, direction: Direction) -> [Option<DispatchWay>; 3] {
        let by_kernel = match direction {
            Direction::Load => self.kernel.is_some().then_some(DispatchWay::Gather),
            Direction::Offload => self.staging.is_some().then_some(DispatchWay::Staged),
        };
        [self.engines.device.driver.batches().then_some(DispatchWay::Batch), Some(DispatchWay::Each), by_kernel]
    }

    /// Gives the fragments to the stream, which waits for `mark` already. After an error some of
    /// them may be under way. Changes the order of `fragments`.
    ///
    /// `table`: for the kernel, of no job that is under way. Without one, or without a kernel or
    /// staging, the copy engines alone are used.
    pub(super) fn hand_over(
        &mut self,
        way: DispatchWay,
        direction: Direction,
        fragments: &mut Vec<Fragment>,
        mut table: Option<&mut FragmentTable>,
        stream: &DeviceStream,
        mark: Option<&DeviceEvent>,
    ) -> Answer<()> {
        if let (DispatchWay::Staged, Some(table), Some(staging)) = (way, &mut table, &mut self.staging) {
            return staged(&mut self.engines, staging, fragments, table, stream, mark);
        }
        if let (DispatchWay::Gather, Some(table), Some(kernel)) = (way, &mut table, &self.kernel) {
            table.clear();
            for fragment in fragments.iter() {
                table.push(*fragment);
            }
            return kernel.launch(table, 0..table.len(), stream);
        }
        fragments::coalesce(fragments);
        if way == DispatchWay::Each {
            self.engines.each(direction, fragments, stream)
        } else {
            self.engines.batch(direction, fragments, stream)
        }
    }
}

/// Buffer by buffer: filled on staging's own stream, emptied on this one.
fn staged(
    engines: &mut CopyEngines,
    staging: &mut Staging,
    fragments: &[Fragment],
    table: &mut FragmentTable,
    stream: &DeviceStream,
    mark: Option<&DeviceEvent>,
) -> Answer<()> {
    table.clear();
    let (mut rest, mut mark) = (fragments, mark);
    while !rest.is_empty() {
        // The later ones come after the first on the same stream.
        let (count, pieces) = staging.fill(rest, mark.take(), table, stream)?;
        debug_assert!(count > 0, "a fragment that no buffer holds");
        let copied = engines.batch(Direction::Offload, &pieces, stream);
        staging.emptied(stream)?;
        copied?;
        rest = &rest[count..];
    }
    Ok(())
}

/// The copy engines, with the room for the lists that they take.
struct CopyEngines {
    device: Arc<Device>,
    from: Vec<DeviceAddress>,
    to: Vec<DeviceAddress>,
    sizes: Vec<usize>,
}

impl CopyEngines {
    fn each(&self, direction: Direction, fragments: &[Fragment], stream: &DeviceStream) -> Answer<()> {
        let (driver, functions) = (self.device.driver, &self.device.driver.functions);
        for fragment in fragments {
            let (host, len) = (fragment.host as usize, fragment.len as usize);
            match direction {
                Direction::Offload => {
                    // SAFETY: both sides stay in place until the order was answered, which is after
                    // the stream has passed this copy (see `Copier`).
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

    fn batch(&mut self, direction: Direction, fragments: &[Fragment], stream: &DeviceStream) -> Answer<()> {
        let Some(batch) = self.device.driver.functions.cuMemcpyBatchAsync else {
            return self.each(direction, fragments, stream);
        };
        for part in fragments.chunks(JOB_FRAGMENTS_MAX) {
            self.batch_of(batch, direction, part, stream)?;
        }
        Ok(())
    }

    fn batch_of(
        &mut self,
        batch: BatchCall,
        direction: Direction,
        fragments: &[Fragment],
        stream: &DeviceStream,
    ) -> Answer<()> {
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
                // The source is the KV cache: it may be read only after the event that the stream
                // waits for.
                Direction::Offload => Access::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
                // The source is a filled slot: whole before this call, and left alone until the
                // order is answered. No work of the stream writes it.
                Direction::Load => Access::CU_MEMCPY_SRC_ACCESS_ORDER_ANY,
            },
            srcLocHint: nowhere,
            dstLocHint: nowhere,
            flags: Flags::CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE as u32,
        };
        let (mut first, mut failed) = (0_usize, 0_usize);
        // SAFETY: the three lists are of one length and outlive the call, which copies them, as are
        // the one set of attributes and its first index. For the memory see `each`.
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
        let thresholds = Thresholds { batch: true, gather_below: 32 << 10, stage_below: 0 };
        let small = fragments(10, 8 << 10);
        assert_eq!(thresholds.way(Direction::Load, &small, true), DispatchWay::Gather);
        assert_eq!(thresholds.way(Direction::Offload, &small, true), DispatchWay::Batch);
        assert_eq!(thresholds.way(Direction::Load, &fragments(10, 32 << 10), true), DispatchWay::Batch);
        assert_eq!(thresholds.way(Direction::Load, &fragments(1, 1 << 20), true), DispatchWay::Each);
        assert_eq!(thresholds.way(Direction::Load, &fragments(10, 8 << 10 | 8), true), DispatchWay::Batch, "no words");
    }

    #[test]
    fn small_fragments_are_packed_before_they_go_to_the_host() {
        let thresholds = Thresholds { batch: true, gather_below: 0, stage_below: 32 << 10 };
        let small = fragments(10, 8 << 10);
        assert_eq!(thresholds.way(Direction::Offload, &small, true), DispatchWay::Staged);
        assert_eq!(thresholds.way(Direction::Load, &small, true), DispatchWay::Batch);
        assert_eq!(thresholds.way(Direction::Offload, &fragments(10, 32 << 10), true), DispatchWay::Batch);
        assert_eq!(
            thresholds.way(Direction::Offload, &fragments(1, 8 << 10), true),
            DispatchWay::Each,
            "one piece already"
        );
        let too_many = fragments(TABLE_ROWS_MAX as u64 + 1, 64);
        assert_eq!(thresholds.way(Direction::Offload, &too_many, true), DispatchWay::Batch, "more than a table holds");
        let mut too_large = fragments(1000, 4096);
        too_large[500].len = STAGING_BUFFER_BYTES + 16;
        assert_eq!(
            thresholds.way(Direction::Offload, &too_large, true),
            DispatchWay::Batch,
            "more than a buffer holds"
        );
    }

    #[test]
    fn ordinary_memory_is_copied_in_single_copies() {
        let thresholds = Thresholds { batch: true, gather_below: u64::MAX, stage_below: u64::MAX };
        assert_eq!(thresholds.way(Direction::Load, &fragments(10, 4096), false), DispatchWay::Each);
    }

    #[test]
    fn without_batches_and_kernel_each_fragment_is_a_call() {
        let thresholds = Thresholds { batch: false, gather_below: 0, stage_below: 0 };
        assert_eq!(thresholds.way(Direction::Load, &fragments(10, 4096), true), DispatchWay::Each);
    }
}
