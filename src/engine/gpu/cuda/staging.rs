//! Staging: how small fragments leave the KV cache. The gather kernel lays them one behind the
//! other in a buffer in the device's memory, as they lie in the slots; from there the copy engine
//! moves few large pieces.
//!
//! A copy engine spends about as long on 4 KiB as on 64 KiB. The device's own memory has bandwidth
//! to spare, so packing takes a few multiprocessors for a fraction of the time that the bus takes.
//! Packing goes on a stream of its own, ahead of the copies: while one buffer is emptied the next
//! ones are filled. A buffer is filled again only behind the copies that empty it; the streams know
//! that, no thread waits for it.

use std::sync::Arc;

use super::device::{Device, DeviceEvent, DeviceStream};
use super::driver::{Answer, DeviceAddress};
use super::kernel::{FragmentTable, GatherKernel};
use crate::gpu::fragments::{self, Fragment};
use crate::limits::{STAGING_BUFFER_BYTES, STAGING_BUFFERS};

/// The buffers, and the stream that fills them.
pub(super) struct Staging {
    kernel: Arc<GatherKernel>,
    stream: DeviceStream,
    buffers: Vec<StagingBuffer>,
    next: usize,
    // Freed last.
    memory: Memory,
}

struct StagingBuffer {
    start: DeviceAddress,
    /// The copies that emptied it last are over.
    emptied: Option<DeviceEvent>,
}

struct Memory {
    device: Arc<Device>,
    start: DeviceAddress,
}

impl Staging {
    /// To be called with the device's context current.
    ///
    /// # Errors
    /// [`super::driver::Refused`], for want of memory too.
    pub(super) fn new(device: &Arc<Device>, kernel: &Arc<GatherKernel>) -> Answer<Self> {
        let stream = device.stream()?;
        let mut memory = Memory { device: Arc::clone(device), start: 0 };
        let bytes = STAGING_BUFFERS * STAGING_BUFFER_BYTES as usize;
        // SAFETY: the pointer is to a field; the memory is freed when that is dropped.
        let code = unsafe { (device.driver.functions.cuMemAlloc_v2)(&raw mut memory.start, bytes) };
        device.driver.check("cuMemAlloc", code)?;
        let buffers = (0..STAGING_BUFFERS as u64)
            .map(|at| StagingBuffer { start: memory.start + at * STAGING_BUFFER_BYTES, emptied: None })
            .collect();
        Ok(Self { kernel: Arc::clone(kernel), stream, buffers, next: 0, memory })
    }

    /// Fills the next buffer with the first of these fragments, as many as it holds, behind `mark`;
    /// `out` is given what comes after that. Answers how many fragments, and the pieces that `out`
    /// has to move: from the buffer to the host. Then [`Self::emptied`] must be called.
    ///
    /// # Errors
    /// [`super::driver::Refused`]. Nothing of this call is under way then.
    pub(super) fn fill(
        &mut self,
        fragments: &[Fragment],
        mark: Option<&DeviceEvent>,
        table: &mut FragmentTable,
        out: &DeviceStream,
    ) -> Answer<(usize, Vec<Fragment>)> {
        let buffer = &self.buffers[self.next];
        let mut free = buffer.start..buffer.start + STAGING_BUFFER_BYTES;
        let mut pieces: Vec<Fragment> = Vec::new();
        let from = table.len();
        for fragment in fragments {
            if free.end - free.start < fragment.len {
                break;
            }
            // The kernel moves from a row's `host` to its `device`, wherever these lie.
            table.push(Fragment { device: free.start, host: fragment.device, len: fragment.len });
            pieces.push(Fragment { device: free.start, ..*fragment });
            free.start += fragment.len;
        }
        let count = pieces.len();
        fragments::join(&mut pieces);
        for event in buffer.emptied.iter().chain(mark) {
            self.stream.wait(event)?;
        }
        let filled = self.memory.device.event()?;
        self.kernel.launch(table, from..table.len(), &self.stream)?;
        let ordered = filled.record(&self.stream).and_then(|()| out.wait(&filled));
        if ordered.is_err() {
            // `out` does not know of the kernel: it has to be over before its table and the blocks
            // it reads are given back.
            let _gone = self.stream.synchronize();
        }
        ordered.map(|()| (count, pieces))
    }

    /// `out` was given the copies of the buffer that was filled last, or what could be given of
    /// them.
    pub(super) fn emptied(&mut self, out: &DeviceStream) -> Answer<()> {
        let event = self.memory.device.event().and_then(|event| event.record(out).map(|()| event));
        if event.is_err() {
            // Without an event that would tell: it is empty when `out` has passed everything.
            let _gone = out.synchronize();
        }
        let (emptied, outcome) = event.map_or_else(|refused| (None, Err(refused)), |event| (Some(event), Ok(())));
        self.buffers[self.next].emptied = emptied;
        self.next = (self.next + 1) % self.buffers.len();
        outcome
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Whoever used it has waited for its copies, and they for the kernel. What the driver
        // answers changes nothing here.
        let _gone = self.stream.synchronize();
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let (driver, start) = (self.device.driver, self.start);
        if start != 0 {
            // SAFETY: from `cuMemAlloc`, once; nothing that uses it is under way. What the driver
            // answers changes nothing here.
            let free = || driver.check("cuMemFree", unsafe { (driver.functions.cuMemFree_v2)(start) });
            drop(self.device.with(free));
        }
    }
}
