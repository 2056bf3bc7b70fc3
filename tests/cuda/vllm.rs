//! vLLM as the copy worker sees it: hooks around forward passes on a compute stream, KV cache in
//! the device's memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvcellar_block::SlotIndex;
use kvcellar_block::plan::{BlockCopy, Load, StepPlan};
use kvcellar_engine::gpu::ComputeStream;
use kvcellar_engine::gpu::cuda::copier::{CopierOptions, CudaCopier};
use kvcellar_engine::gpu::worker::CopyWorker;
use kvcellar_engine::pool::slot_table::Fill;

use crate::maker::{adopt, assumed};
use kvcellar_testkit::copies::ledger::{PATIENCE, until};
use kvcellar_testkit::copies::scene::{Scene, Side};
use kvcellar_testkit::stub_cuda::Stub;

pub(crate) struct Vllm<'a> {
    pub(crate) stub: &'a Stub,
    pub(crate) scene: &'a Scene,
    pub(crate) worker: CopyWorker,
    compute: ComputeStream,
    /// Where the worker has mapped the first slot's payload: it maps the pool for itself, in
    /// whatever process.
    payload: Arc<AtomicU64>,
}

/// Runs hooks that must not wait for the device, which stands still: one that does would never come
/// back, and ends this process instead of hanging it.
pub(crate) fn at_once<T>(what: &str, hooks: impl FnOnce() -> T) -> T {
    let (done, over) = std::sync::mpsc::channel::<()>();
    let what = what.to_owned();
    let watch = std::thread::spawn(move || {
        if over.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            eprintln!("{what}: it waits for the device");
            std::process::abort();
        }
    });
    let outcome = hooks();
    drop(done);
    watch.join().expect("it does not panic");
    outcome
}

/// A worker of rank 0 over the stub's device, not attached yet, and where it will map the first
/// slot's payload.
pub(crate) fn worker(
    scene_groups: &Arc<Vec<kvcellar_engine::gpu::views::GroupRuns>>,
    options: CopierOptions,
) -> (CopyWorker, Arc<AtomicU64>) {
    adopt(scene_groups);
    let (groups, payload) = (Arc::clone(scene_groups), Arc::new(AtomicU64::new(0)));
    let seen = Arc::clone(&payload);
    let worker = CopyWorker::new(
        0,
        false,
        Box::new(move |pool, answers, guard| {
            seen.store(pool.payload(SlotIndex(0)).as_ptr() as u64, Ordering::Release);
            let side = Side { pool, groups: Arc::clone(&groups), rank: 0, verify_loads: false, guard };
            Ok(Box::new(CudaCopier::start(side.host(), answers, &options)?))
        }),
    );
    (worker, payload)
}

pub(crate) fn load(request: &str, copies: &[BlockCopy]) -> Load {
    Load { request: request.to_owned(), doomed: false, copies: copies.to_vec() }
}

impl<'a> Vllm<'a> {
    pub(crate) fn new(stub: &'a Stub, scene: &'a Scene, options: CopierOptions) -> Self {
        let (mut worker, payload) = worker(&scene.ranks[0].groups, options);
        stub.capture();
        worker.attach(&scene.pool.ticket()).expect("the pool is there");
        Self { stub, scene, worker, compute: stub.compute(), payload }
    }

    /// As new, with all of the pool pinned, after which a copy of ordinary memory is wrong.
    pub(crate) fn pinned(stub: &'a Stub, scene: &'a Scene) -> Self {
        Self::pinned_with(stub, scene, assumed())
    }

    /// The same for a copier with these options.
    pub(crate) fn pinned_with(stub: &'a Stub, scene: &'a Scene, options: CopierOptions) -> Self {
        let vllm = Self::new(stub, scene, options);
        until("the pool is pinned", || vllm.worker.take_notes().iter().any(|note| note.starts_with("pinned")));
        stub.strict();
        vllm
    }

    /// Where a block's bytes lie.
    pub(crate) fn ranges(&self, block: u32) -> Vec<(u64, usize)> {
        self.scene.ranks[0].groups[0].pieces(block).expect("a block").collect()
    }

    /// One step: hooks, and a forward pass that reads and writes blocks. Nothing in here may wait
    /// for the device.
    pub(crate) fn step(&mut self, plan: &StepPlan, reads: &[u32], writes: &[(u32, u8)]) {
        self.worker.set_compute(Some(self.compute));
        self.worker.begin_step(&plan.encode()).expect("a plan");
        self.worker.start_loads();
        for block in reads {
            self.stub.forward(self.compute, &self.ranges(*block), 0, false);
        }
        for (block, byte) in writes {
            self.stub.forward(self.compute, &self.ranges(*block), *byte, true);
        }
        self.worker.finish_step();
    }

    /// The host reads a slot's part, or gives the slot to somebody else.
    pub(crate) fn touch_slot(&self, slot: u32, write: bool) {
        let geometry = self.scene.pool.geometry();
        let (offset, len) = geometry.parts[0].spans[0];
        let start = self.payload.load(Ordering::Acquire) + u64::from(slot) * geometry.slot_bytes + offset;
        self.stub.touch(start, len as usize, write);
    }

    /// Waits until the offload into a slot is answered.
    pub(crate) fn wait_for(&self, copy: &BlockCopy) -> Fill {
        until("an offload is answered", || self.scene.line(copy.slot).fill(1) != Fill::Pending);
        self.touch_slot(copy.slot, false);
        self.scene.line(copy.slot).fill(1)
    }

    /// Whether all of a slot's part is this byte.
    pub(crate) fn slot_is(&self, slot: u32, byte: u8) -> bool {
        self.scene.part(slot, 0, 0).iter().all(|found| *found == byte)
    }

    /// Whether all of a block is this byte.
    pub(crate) fn block_is(&self, block: u32, byte: u8) -> bool {
        self.scene.ranks[0].cache.block(0, block as usize).iter().all(|found| *found == byte)
    }
}
